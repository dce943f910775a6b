/* SPDX-License-Identifier: Apache-2.0 */
/* Matmuls over packed weights (spk_tiles.h has the layout); the arithmetic of one element is
 *   acc = acc + (dw*dx) * float(idot)          [then, with minima, acc = acc +- (m*dx)*float(sum)]
 * for blocks in ascending k, every operation rounded once. */
#include <string.h>

#include "spk_kernels.h"
#include "spk_scalar_math.h"
#include "spk_tiles.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

static float load_f16(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return spk_f16_to_f32(h);
}

static float load_bf16(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return spk_float((uint32_t)h << 16);
}

static float load_f32(const uint8_t *p)
{
    float x;
    memcpy(&x, p, 4);
    return x;
}

/* The integers of one row of one block without their offset. */
ALWAYS_INLINE void unpack(struct spk_tiling f, const struct spk_block_at *at, size_t row,
                          int16_t q[SPK_BLOCK])
{
    int offset = f.offset ? 1 << f.offset : 0;
    for (int g = 0; g < 4; g++) {
        const uint8_t *w = at->words + g * 64 + row * 4;
        for (int c = 0; c < 4; c++) {
            int i = 4 * g + c, lo = w[c] & 15, hi = w[c] >> 4;
            if (f.bytes) {
                q[i] = (int8_t)w[c];
                q[16 + i] = (int8_t)w[256 + c];
                continue;
            }
            if (f.fifth) {
                uint64_t mask[2];
                memcpy(&mask[0], at->fifth + g * 8, 8);
                memcpy(&mask[1], at->fifth + 32 + g * 8, 8);
                lo |= (int)(mask[0] >> (4 * row + (size_t)c) & 1u) << 4;
                hi |= (int)(mask[1] >> (4 * row + (size_t)c) & 1u) << 4;
            }
            if (f.six) {
                lo |= (at->upper[row * 4 + (size_t)c] >> 2 * g & 3) << 4;
                hi |= (at->upper[64 + row * 4 + (size_t)c] >> 2 * g & 3) << 4;
            }
            q[i] = (int16_t)(lo - offset);
            q[16 + i] = (int16_t)(hi - offset);
        }
    }
}

/* q6_K: the scales of the two halves of a block, which the products take into the integers. */
ALWAYS_INLINE int half_scale(const struct spk_block_at *at, size_t row, int i)
{
    return (int8_t)at->scales[i / 16 * 16 + (int)row];
}

/* The scale and minimum of one row of one block; both products are exact. */
ALWAYS_INLINE void scales(struct spk_tiling f, const struct spk_block_at *at, size_t row, int j,
                          float *d, float *m)
{
    *d = load_f16(at->d + row * 2);
    *m = f.minima ? load_f16(at->m + row * 2) : 0.0f;
    if (f.super && !f.six) {
        uint32_t w[3];
        for (int i = 0; i < 3; i++)
            memcpy(&w[i], at->scales + i * 64 + row * 4, 4);
        *d = *d * (float)spk_scale6(w, j);
        *m = *m * (float)spk_minimum6(w, j);
    }
}

static int32_t dot(const int16_t *w, const int16_t *x)
{
    int32_t sum = 0;
    for (int i = 0; i < SPK_BLOCK; i++)
        sum += w[i] * x[i];
    return sum;
}

/* Tokens that share one unpacking of a block of weights: several groups. */
#define TOKENS (4 * SPK_Q8_GROUP)

/* One tile against n tokens from `first`. */
ALWAYS_INLINE void tile_tokens(struct spk_tiling f, const uint8_t *tile, const struct spk_q8 *x,
                               size_t first, size_t n, size_t tokens, float acc[TOKENS][16])
{
    memset(acc, 0, TOKENS * sizeof *acc);
    for (size_t b = 0; b < x->blocks; b++) {
        struct spk_block_at at = spk_locate(f, tile, x->blocks, b);
        int16_t q[16][SPK_BLOCK], xq[SPK_BLOCK];
        float dw[16], mw[16];
        for (size_t r = 0; r < 16; r++) {
            unpack(f, &at, r, q[r]);
            for (int i = 0; f.six && i < SPK_BLOCK; i++)
                q[r][i] = (int16_t)(q[r][i] * half_scale(&at, r, i));
            scales(f, &at, r, (int)(b % 8), &dw[r], &mw[r]);
        }
        for (size_t j = 0; j < n; j++) {
            size_t group = first + j / SPK_Q8_GROUP * SPK_Q8_GROUP;
            size_t size = tokens - group < SPK_Q8_GROUP ? tokens - group : SPK_Q8_GROUP;
            const struct spk_q8_block *xb =
                spk_q8_group(x, group) + b * size + j % SPK_Q8_GROUP;
            for (int i = 0; i < SPK_BLOCK; i++)
                xq[i] = xb->qs[i];
            for (int r = 0; r < 16; r++) {
                acc[j][r] = acc[j][r] + (dw[r] * xb->d) * (float)dot(q[r], xq);
                if (f.minima && f.super)
                    acc[j][r] = acc[j][r] - (mw[r] * xb->d) * xb->sum;
                else if (f.minima)
                    acc[j][r] = acc[j][r] + (mw[r] * xb->d) * xb->sum;
            }
        }
    }
}

static void store_tile(const float acc[16], float *out, size_t rows, size_t tile)
{
    size_t n = rows - tile * 16 < 16 ? rows - tile * 16 : 16;
    memcpy(out + tile * 16, acc, n * sizeof *acc);
}

ALWAYS_INLINE void matmul(struct spk_tiling f, const uint8_t *w, const struct spk_q8 *x,
                          float *out, size_t out_stride, size_t rows, size_t tokens,
                          size_t tile_begin, size_t tile_end)
{
    float acc[TOKENS][16];
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const uint8_t *wt = w + tile * spk_tile_bytes(f, x->blocks);
        for (size_t t = 0; t < tokens; t += TOKENS) {
            size_t n = tokens - t < TOKENS ? tokens - t : TOKENS;
            tile_tokens(f, wt, x, t, n, tokens, acc);
            for (size_t j = 0; j < n; j++)
                store_tile(acc[j], out + (t + j) * out_stride, rows, tile);
        }
    }
}

#define MATMUL(name, tiling)                                                                   \
    void name(const uint8_t *w, const struct spk_q8 *x, float *out, size_t out_stride,         \
              size_t rows, size_t tokens, size_t tile_begin, size_t tile_end)                  \
    {                                                                                          \
        matmul(tiling, w, x, out, out_stride, rows, tokens, tile_begin, tile_end);             \
    }

MATMUL(matmul_q4_0_q8__scalar, SPK_TILING_Q4_0)
MATMUL(matmul_q4_1_q8__scalar, SPK_TILING_Q4_1)
MATMUL(matmul_q5_0_q8__scalar, SPK_TILING_Q5_0)
MATMUL(matmul_q5_1_q8__scalar, SPK_TILING_Q5_1)
MATMUL(matmul_q8_0_q8__scalar, SPK_TILING_Q8_0)
MATMUL(matmul_q4_k_q8__scalar, SPK_TILING_Q4_K)
MATMUL(matmul_q5_k_q8__scalar, SPK_TILING_Q5_K)
MATMUL(matmul_q6_k_q8__scalar, SPK_TILING_Q6_K)

/* --- one row back to floats ----------------------------------------------------------------- */

ALWAYS_INLINE void dequantize(struct spk_tiling f, const uint8_t *packed, size_t row,
                              size_t blocks, size_t begin, size_t end, float *out)
{
    const uint8_t *tile = packed + row / 16 * spk_tile_bytes(f, blocks);
    for (size_t b = begin; b < end; b++, out += SPK_BLOCK) {
        struct spk_block_at at = spk_locate(f, tile, blocks, b);
        int16_t q[SPK_BLOCK];
        float d, m;
        unpack(f, &at, row % 16, q);
        scales(f, &at, row % 16, (int)(b % 8), &d, &m);
        for (int i = 0; i < SPK_BLOCK; i++) {
            float step = f.six ? d * (float)half_scale(&at, row % 16, i) : d;
            out[i] = step * (float)q[i];
            if (f.minima)
                out[i] = f.super ? out[i] - m : out[i] + m;
        }
    }
}

void spk_dequantize_packed_row(int format, const uint8_t *packed, size_t row, size_t k,
                               size_t first, size_t n, float *out)
{
    size_t blocks = k / SPK_BLOCK, begin = first / SPK_BLOCK, end = (first + n) / SPK_BLOCK;
    switch (format) {
    case SPK_Q4_0: dequantize(SPK_TILING_Q4_0, packed, row, blocks, begin, end, out); break;
    case SPK_Q4_1: dequantize(SPK_TILING_Q4_1, packed, row, blocks, begin, end, out); break;
    case SPK_Q5_0: dequantize(SPK_TILING_Q5_0, packed, row, blocks, begin, end, out); break;
    case SPK_Q5_1: dequantize(SPK_TILING_Q5_1, packed, row, blocks, begin, end, out); break;
    case SPK_Q8_0: dequantize(SPK_TILING_Q8_0, packed, row, blocks, begin, end, out); break;
    case SPK_Q4_K: dequantize(SPK_TILING_Q4_K, packed, row, blocks, begin, end, out); break;
    case SPK_Q5_K: dequantize(SPK_TILING_Q5_K, packed, row, blocks, begin, end, out); break;
    case SPK_Q6_K: dequantize(SPK_TILING_Q6_K, packed, row, blocks, begin, end, out); break;
    default: /* floats: w[k][16] */
        for (size_t i = 0, size = format == SPK_F32 ? 4 : 2; i < n; i++) {
            const uint8_t *w = packed + ((row / 16 * k + first + i) * 16 + row % 16) * size;
            out[i] = format == SPK_F32 ? load_f32(w) : format == SPK_F16 ? load_f16(w) : load_bf16(w);
        }
    }
}

#define MATMUL_FLOAT(name, size, load)                                                         \
    void name(const uint8_t *w, const float *x, size_t x_stride, float *out,                   \
              size_t out_stride, size_t rows, size_t k, size_t tokens, size_t tile_begin,      \
              size_t tile_end)                                                                 \
    {                                                                                          \
        for (size_t tile = tile_begin; tile < tile_end; tile++) {                              \
            const uint8_t *wt = w + tile * k * 16 * (size);                                    \
            for (size_t t = 0; t < tokens; t++) {                                              \
                float acc[16] = {0};                                                           \
                for (size_t i = 0; i < k; i++)                                                 \
                    for (size_t r = 0; r < 16; r++)                                            \
                        acc[r] = acc[r] + load(wt + (i * 16 + r) * (size)) * x[t * x_stride + i]; \
                store_tile(acc, out + t * out_stride, rows, tile);                             \
            }                                                                                  \
        }                                                                                      \
    }

MATMUL_FLOAT(matmul_f16_f32__scalar, 2, load_f16)
MATMUL_FLOAT(matmul_bf16_f32__scalar, 2, load_bf16)
MATMUL_FLOAT(matmul_f32_f32__scalar, 4, load_f32)
