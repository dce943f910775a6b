/* SPDX-License-Identifier: Apache-2.0 */
/* Matmuls over packed weights (pack.c has the layout); the arithmetic of one element is
 *   acc = acc + (dw*dx) * float(idot)          [then, with minima, acc = acc + (m*dx)*float(sum)]
 * for blocks in ascending k, every operation rounded once. */
#include <string.h>

#include "spk_kernels.h"
#include "spk_scalar_math.h"

static float load_f16(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return spk_f16_to_f32(h);
}

enum kind { Q4_0, Q4_1, Q8_0 };

/* Tokens that share one unpacking of a block of weights. */
#define TOKENS 8

/* The integers of 16 rows of one block, as the products take them: q4_0 minus 8. */
static inline __attribute__((always_inline)) void unpack(enum kind kind, const uint8_t *w, int16_t q[16][SPK_BLOCK])
{
    int words = kind == Q8_0 ? 8 : 4, offset = kind == Q4_0 ? 8 : 0;
    for (int row = 0; row < 16; row++)
        for (int g = 0; g < words; g++)
            for (int c = 0; c < 4; c++) {
                uint8_t byte = w[g * 64 + row * 4 + c];
                if (kind == Q8_0) {
                    q[row][g * 4 + c] = (int8_t)byte;
                } else {
                    q[row][g * 4 + c] = (int16_t)((byte & 15) - offset);
                    q[row][16 + g * 4 + c] = (int16_t)((byte >> 4) - offset);
                }
            }
}

static int32_t dot(const int16_t *w, const int16_t *x)
{
    int32_t sum = 0;
    for (int i = 0; i < SPK_BLOCK; i++)
        sum += w[i] * x[i];
    return sum;
}

/* One tile against up to TOKENS tokens from `token`. */
static inline __attribute__((always_inline)) void
tile_tokens(enum kind kind, const uint8_t *qs, const struct spk_q8 *x, size_t token,
            size_t tokens, float acc[TOKENS][16])
{
    size_t ints = kind == Q8_0 ? 512 : 256;
    const uint8_t *d = qs + x->blocks * ints, *m = d + x->blocks * 32;
    memset(acc, 0, TOKENS * sizeof *acc);
    for (size_t b = 0; b < x->blocks; b++) {
        int16_t q[16][SPK_BLOCK], xq[SPK_BLOCK];
        float dw[16], mw[16] = {0};
        unpack(kind, qs + b * ints, q);
        for (size_t r = 0; r < 16; r++) {
            dw[r] = load_f16(d + (b * 16 + r) * 2);
            if (kind == Q4_1)
                mw[r] = load_f16(m + (b * 16 + r) * 2);
        }
        for (size_t j = 0; j < tokens; j++) {
            size_t xb = (token + j) * x->blocks + b;
            float dx = x->d[xb], sum = (float)x->sum[xb];
            for (int i = 0; i < SPK_BLOCK; i++)
                xq[i] = x->qs[xb * SPK_BLOCK + (size_t)i];
            for (int r = 0; r < 16; r++) {
                acc[j][r] = acc[j][r] + (dw[r] * dx) * (float)dot(q[r], xq);
                if (kind == Q4_1)
                    acc[j][r] = acc[j][r] + (mw[r] * dx) * sum;
            }
        }
    }
}

static void store_tile(const float acc[16], float *out, size_t rows, size_t tile)
{
    size_t n = rows - tile * 16 < 16 ? rows - tile * 16 : 16;
    memcpy(out + tile * 16, acc, n * sizeof *acc);
}

static inline __attribute__((always_inline)) void
matmul(enum kind kind, size_t block_bytes, const uint8_t *w, const struct spk_q8 *x, float *out,
       size_t out_stride, size_t rows, size_t tokens, size_t tile_begin, size_t tile_end)
{
    float acc[TOKENS][16];
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const uint8_t *qs = w + tile * x->blocks * block_bytes * 16;
        for (size_t t = 0; t < tokens; t += TOKENS) {
            size_t n = tokens - t < TOKENS ? tokens - t : TOKENS;
            tile_tokens(kind, qs, x, t, n, acc);
            for (size_t j = 0; j < n; j++)
                store_tile(acc[j], out + (t + j) * out_stride, rows, tile);
        }
    }
}

#define MATMUL(name, kind, block_bytes)                                                        \
    void name(const uint8_t *w, const struct spk_q8 *x, float *out, size_t out_stride,         \
              size_t rows, size_t tokens, size_t tile_begin, size_t tile_end)                  \
    {                                                                                          \
        matmul(kind, block_bytes, w, x, out, out_stride, rows, tokens, tile_begin, tile_end);  \
    }

MATMUL(matmul_q4_0_q8__scalar, Q4_0, 18)
MATMUL(matmul_q4_1_q8__scalar, Q4_1, 20)
MATMUL(matmul_q8_0_q8__scalar, Q8_0, 34)

void matmul_f16_f32__scalar(const uint8_t *w, const float *x, size_t x_stride, float *out,
                            size_t out_stride, size_t rows, size_t k, size_t tokens,
                            size_t tile_begin, size_t tile_end)
{
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const uint8_t *wt = w + tile * k * 32;
        for (size_t t = 0; t < tokens; t++) {
            float acc[16] = {0};
            for (size_t i = 0; i < k; i++)
                for (size_t r = 0; r < 16; r++)
                    acc[r] = acc[r] + load_f16(wt + (i * 16 + r) * 2) * x[t * x_stride + i];
            store_tile(acc, out + t * out_stride, rows, tile);
        }
    }
}

void matmul_f32_f32__scalar(const uint8_t *w, const float *x, size_t x_stride, float *out,
                            size_t out_stride, size_t rows, size_t k, size_t tokens,
                            size_t tile_begin, size_t tile_end)
{
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const float *wt = (const float *)w + tile * k * 16;
        for (size_t t = 0; t < tokens; t++) {
            float acc[16] = {0};
            for (size_t i = 0; i < k; i++)
                for (size_t r = 0; r < 16; r++)
                    acc[r] = acc[r] + wt[i * 16 + r] * x[t * x_stride + i];
            store_tile(acc, out + t * out_stride, rows, tile);
        }
    }
}
