/* SPDX-License-Identifier: Apache-2.0 */
/* Packing GGML rows into the tiled layout of spk_tiles.h, and the sizes of both and of elements.  GGML's block
 * layouts are those of ggml/src/ggml-common.h. */
#include <string.h>

#include "spk_kernels.h"
#include "spk_scalar_math.h"
#include "spk_tiles.h"

size_t spk_block_weights(int format)
{
    switch (format) {
    case SPK_F32:
    case SPK_F16:
    case SPK_BF16: return 1;
    case SPK_Q4_0:
    case SPK_Q4_1:
    case SPK_Q5_0:
    case SPK_Q5_1:
    case SPK_Q8_0: return SPK_BLOCK;
    case SPK_Q4_K:
    case SPK_Q5_K:
    case SPK_Q6_K: return SPK_SUPER_BLOCK;
    default: return 0;
    }
}

size_t spk_element_bytes(int element)
{
    switch (element) {
    case SPK_F32:
    case SPK_I32: return 4;
    case SPK_F16:
    case SPK_BF16: return 2;
    default: return 0;
    }
}

static struct spk_tiling tiling_of(int format)
{
    switch (format) {
    case SPK_Q4_1: return SPK_TILING_Q4_1;
    case SPK_Q5_0: return SPK_TILING_Q5_0;
    case SPK_Q5_1: return SPK_TILING_Q5_1;
    case SPK_Q8_0: return SPK_TILING_Q8_0;
    case SPK_Q4_K: return SPK_TILING_Q4_K;
    case SPK_Q5_K: return SPK_TILING_Q5_K;
    case SPK_Q6_K: return SPK_TILING_Q6_K;
    default: return SPK_TILING_Q4_0;
    }
}

size_t spk_row_bytes(int format, size_t k)
{
    size_t weights = spk_block_weights(format);
    if (!weights || k % weights)
        return 0;
    if (weights == 1)
        return k * (format == SPK_F32 ? 4 : 2);
    return k / weights * (spk_block_bytes_of(tiling_of(format)) / SPK_TILE_ROWS);
}

size_t spk_packed_bytes(int format, size_t rows, size_t k)
{
    return (rows + SPK_TILE_ROWS - 1) / SPK_TILE_ROWS * SPK_TILE_ROWS * spk_row_bytes(format, k);
}

/* --- pieces of a row ---------------------------------------------------------------------- */

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE uint8_t *writable(const uint8_t *p)
{
    return (uint8_t *)(uintptr_t)p;
}

ALWAYS_INLINE void put_words(const uint8_t *words, size_t row, const uint8_t *bytes, int count)
{
    for (int g = 0; g < count; g++)
        memcpy(writable(words) + g * 64 + row * 4, bytes + g * 4, 4);
}

ALWAYS_INLINE void put_fifth(const uint8_t *fifth, size_t row, uint32_t bits)
{
    for (int g = 0; g < 8; g++) {
        uint64_t mask;
        memcpy(&mask, fifth + g * 8, 8);
        mask |= (uint64_t)((bits >> 4 * g) & 15u) << (4 * row);
        memcpy(writable(fifth) + g * 8, &mask, 8);
    }
}

/* One nibble of each of 32 bytes: the first 16 to the low halves, the others to the high ones. */
ALWAYS_INLINE void pair_nibbles(const uint8_t *bytes, int high, uint8_t out[16])
{
    for (int half = 0; half < 16; half += 8) {
        uint64_t a, b;
        memcpy(&a, bytes + half, 8);
        memcpy(&b, bytes + 16 + half, 8);
        a = (a >> 4 * high) & 0x0f0f0f0f0f0f0f0fu;
        b = (b >> 4 * high) & 0x0f0f0f0f0f0f0f0fu;
        a |= b << 4;
        memcpy(out + half, &a, 8);
    }
}

/* Bit `bit` of each of 32 bytes. */
ALWAYS_INLINE uint32_t gather_bit(const uint8_t *bytes, int bit)
{
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        uint64_t x;
        memcpy(&x, bytes + 8 * i, 8);
        /* The product moves bit 8*j to bit 56 + j. */
        x = ((x >> bit) & 0x0101010101010101u) * 0x0102040810204080u >> 56;
        out |= (uint32_t)x << 8 * i;
    }
    return out;
}

/* --- a row of a tile ------------------------------------------------------------------------ */

ALWAYS_INLINE void pack_row(struct spk_tiling f, const uint8_t *src, uint8_t *tile, size_t row,
                            size_t blocks)
{
    size_t bytes = spk_block_bytes_of(f) / 16;
    for (size_t b = 0; b < blocks; b++, src += bytes) {
        struct spk_block_at at = spk_locate(f, tile, blocks, b);
        const uint8_t *p = src;
        memcpy(writable(at.d) + row * 2, p, 2);
        p += 2;
        if (f.minima) {
            memcpy(writable(at.m) + row * 2, p, 2);
            p += 2;
        }
        if (f.fifth) {
            uint32_t bits;
            memcpy(&bits, p, 4);
            put_fifth(at.fifth, row, bits);
            p += 4;
        }
        put_words(at.words, row, p, f.bytes ? 8 : 4);
    }
}

ALWAYS_INLINE void pack_row_super(struct spk_tiling f, const uint8_t *src, uint8_t *tile,
                                  size_t row, size_t blocks)
{
    for (size_t b = 0; b < blocks; b++) {
        const uint8_t *block = src + b / 8 * (spk_block_bytes_of(f) / 16);
        struct spk_block_at at = spk_locate(f, tile, blocks, b);
        int s = (int)(b % 8);
        uint8_t nibbles[16];
        if (f.six) {
            const uint8_t *ql = block + s / 4 * 64 + s % 2 * 32, *qh = block + 128 + s / 4 * 32;
            pair_nibbles(ql, s % 4 / 2, nibbles);
            for (int h = 0; h < 2; h++) {
                uint32_t upper = 0, x;
                for (int g = 0; g < 4; g++) {
                    memcpy(&x, qh + 16 * h + 4 * g, 4);
                    upper |= ((x >> 2 * (s % 4)) & 0x03030303u) << 2 * g;
                }
                memcpy(writable(at.upper) + h * 64 + row * 4, &upper, 4);
                writable(at.scales)[h * 16 + (int)row] = block[192 + 2 * s + h];
            }
            memcpy(writable(at.d) + row * 2, block + 208, 2);
        } else {
            pair_nibbles(block + (f.fifth ? 48 : 16) + s / 2 * 32, s % 2, nibbles);
            if (f.fifth)
                put_fifth(at.fifth, row, gather_bit(block + 16, s));
            memcpy(writable(at.d) + row * 2, block, 2);
            memcpy(writable(at.m) + row * 2, block + 2, 2);
            put_words(at.scales, row, block + 4, 3);
        }
        put_words(at.words, row, nibbles, 4);
    }
}

typedef void (*pack_fn)(const uint8_t *src, uint8_t *tile, size_t row, size_t blocks);

#define PACK(name, tiling, function)                                                           \
    static void name(const uint8_t *src, uint8_t *tile, size_t row, size_t blocks)             \
    {                                                                                          \
        function(tiling, src, tile, row, blocks);                                              \
    }

PACK(pack_q4_0, SPK_TILING_Q4_0, pack_row)
PACK(pack_q4_1, SPK_TILING_Q4_1, pack_row)
PACK(pack_q5_0, SPK_TILING_Q5_0, pack_row)
PACK(pack_q5_1, SPK_TILING_Q5_1, pack_row)
PACK(pack_q8_0, SPK_TILING_Q8_0, pack_row)
PACK(pack_q4_k, SPK_TILING_Q4_K, pack_row_super)
PACK(pack_q5_k, SPK_TILING_Q5_K, pack_row_super)
PACK(pack_q6_k, SPK_TILING_Q6_K, pack_row_super)

static pack_fn pack_of(int format)
{
    switch (format) {
    case SPK_Q4_0: return pack_q4_0;
    case SPK_Q4_1: return pack_q4_1;
    case SPK_Q5_0: return pack_q5_0;
    case SPK_Q5_1: return pack_q5_1;
    case SPK_Q8_0: return pack_q8_0;
    case SPK_Q4_K: return pack_q4_k;
    case SPK_Q5_K: return pack_q5_k;
    case SPK_Q6_K: return pack_q6_k;
    default: return NULL;
    }
}

static void pack_tile_float(size_t size, const uint8_t *src, size_t row_stride, uint8_t *dst,
                            size_t rows, size_t k)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < k; i++)
            memcpy(dst + (i * 16 + r) * size, src + r * row_stride + i * size, size);
}

int spk_pack(int format, const uint8_t *src, size_t row_stride, uint8_t *dst, size_t rows,
             size_t k)
{
    size_t weights = spk_block_weights(format);
    if (!weights || k % weights)
        return SPK_E_ARG;
    size_t tile_bytes = SPK_TILE_ROWS * spk_row_bytes(format, k);
    pack_fn pack = pack_of(format);
    for (size_t r = 0; r < rows; r += 16, dst += tile_bytes, src += 16 * row_stride) {
        size_t n = rows - r < 16 ? rows - r : 16;
        /* Missing rows are zero, and bits of several rows are joined into one word. */
        if (n < 16 || (weights > 1 && tiling_of(format).fifth))
            memset(dst, 0, tile_bytes);
        if (weights == 1)
            pack_tile_float(format == SPK_F32 ? 4 : 2, src, row_stride, dst, n, k);
        for (size_t row = 0; pack && row < n; row++)
            pack(src + row * row_stride, dst, row, k / SPK_BLOCK);
    }
    return SPK_OK;
}

uint16_t spk_f16_from_f32(float x)
{
    return spk_f32_to_f16(x);
}

float spk_f32_from_f16(uint16_t h)
{
    return spk_f16_to_f32(h);
}

float spk_exp(float x)
{
    return spk_expf(x);
}

double spk_fold_stats(double total, const float *stats, size_t chunks, float top,
                      float inv_temperature)
{
    uint64_t saved = spk_fp_enter();
    for (size_t i = 0; i < chunks; i++)
        total = total + (double)spk_expf((stats[2 * i] - top) * inv_temperature) *
                            (double)stats[2 * i + 1];
    spk_fp_leave(saved);
    return total;
}
