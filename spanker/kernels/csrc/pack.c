/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tiled weight layout.  A tile is 16 output rows; within it the integers come first, then
 * the scales, then the minima, so that integers start aligned:
 *
 *   q4_0  nibbles[block][4][16 rows][4 bytes]  d[block][16] f16
 *   q4_1  the same, then m[block][16] f16
 *   q8_0  int8[block][8][16 rows][4 bytes]     d[block][16] f16
 *   f16   w[k][16]                             f32 w[k][16]
 *
 * Four consecutive bytes of a row stay together (one 32-bit lane of a dot-product
 * instruction).  A nibble byte keeps GGML's pairing: low = weight j, high = weight j + 16.
 */
#include <string.h>

#include "spk_kernels.h"
#include "spk_scalar_math.h"

/* GGML's block layouts: q4_0 {f16 d; u8 qs[16]}, q4_1 {f16 d, m; u8 qs[16]},
 * q8_0 {f16 d; i8 qs[32]} (ggml/src/ggml-common.h). */
struct layout {
    size_t block_bytes, scales, words; /* words: 4-byte groups of integers in a block */
};

static int quantised(int format, struct layout *l)
{
    switch (format) {
    case SPK_Q4_0: *l = (struct layout){18, 1, 4}; return 1;
    case SPK_Q4_1: *l = (struct layout){20, 2, 4}; return 1;
    case SPK_Q8_0: *l = (struct layout){34, 1, 8}; return 1;
    default: return 0;
    }
}

size_t spk_row_bytes(int format, size_t k)
{
    struct layout l;
    if (format == SPK_F32)
        return k * 4;
    if (format == SPK_F16)
        return k * 2;
    if (!quantised(format, &l) || k % SPK_BLOCK)
        return 0;
    return k / SPK_BLOCK * l.block_bytes;
}

size_t spk_packed_bytes(int format, size_t rows, size_t k)
{
    return (rows + SPK_TILE_ROWS - 1) / SPK_TILE_ROWS * SPK_TILE_ROWS * spk_row_bytes(format, k);
}

static void pack_tile_quantised(const struct layout *l, const uint8_t *src, size_t row_stride,
                                uint8_t *dst, size_t rows, size_t blocks)
{
    uint8_t *ints = dst, *scales = dst + blocks * l->words * 64;
    for (size_t r = 0; r < rows; r++) {
        const uint8_t *row = src + r * row_stride;
        for (size_t b = 0; b < blocks; b++) {
            const uint8_t *block = row + b * l->block_bytes;
            for (size_t s = 0; s < l->scales; s++)
                memcpy(scales + ((s * blocks + b) * 16 + r) * 2, block + 2 * s, 2);
            block += 2 * l->scales;
            for (size_t g = 0; g < l->words; g++)
                memcpy(ints + (b * l->words + g) * 64 + r * 4, block + g * 4, 4);
        }
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
    size_t row_bytes = spk_row_bytes(format, k), tile_bytes = 16 * row_bytes;
    struct layout l = {0};
    int is_quantised = quantised(format, &l);
    if (!is_quantised && format != SPK_F32 && format != SPK_F16)
        return SPK_E_ARG;
    if (is_quantised && k % SPK_BLOCK)
        return SPK_E_ARG;
    for (size_t r = 0; r < rows; r += 16, dst += tile_bytes, src += 16 * row_stride) {
        size_t n = rows - r < 16 ? rows - r : 16;
        if (n < 16)
            memset(dst, 0, tile_bytes);
        if (is_quantised)
            pack_tile_quantised(&l, src, row_stride, dst, n, k / SPK_BLOCK);
        else
            pack_tile_float(format == SPK_F32 ? 4 : 2, src, row_stride, dst, n, k);
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
