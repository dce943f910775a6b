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

/* Exact dot products of 16 rows with one block of activations. */
static void dot_nibbles(const uint8_t *w, const int8_t *x, int32_t dot[16])
{
    for (int row = 0; row < 16; row++) {
        int32_t s = 0;
        for (int g = 0; g < 4; g++)
            for (int c = 0; c < 4; c++) {
                int32_t byte = w[g * 64 + row * 4 + c];
                s += (byte & 15) * x[g * 4 + c] + (byte >> 4) * x[16 + g * 4 + c];
            }
        dot[row] = s;
    }
}

static void dot_bytes(const int8_t *w, const int8_t *x, int32_t dot[16])
{
    for (int row = 0; row < 16; row++) {
        int32_t s = 0;
        for (int g = 0; g < 8; g++)
            for (int c = 0; c < 4; c++)
                s += w[g * 64 + row * 4 + c] * x[g * 4 + c];
        dot[row] = s;
    }
}

static void store_tile(const float acc[16], float *out, size_t rows, size_t tile)
{
    size_t n = rows - tile * 16 < 16 ? rows - tile * 16 : 16;
    memcpy(out + tile * 16, acc, n * sizeof *acc);
}

void matmul_q4_0_q8__scalar(const uint8_t *w, const struct spk_q8 *x, float *out,
                            size_t out_stride, size_t rows, size_t tokens, size_t tile_begin,
                            size_t tile_end)
{
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const uint8_t *qs = w + tile * x->blocks * 288, *d = qs + x->blocks * 256;
        for (size_t t = 0; t < tokens; t++) {
            float acc[16] = {0};
            for (size_t b = 0; b < x->blocks; b++) {
                size_t xb = t * x->blocks + b;
                int32_t dot[16];
                dot_nibbles(qs + b * 256, x->qs + xb * SPK_BLOCK, dot);
                for (int r = 0; r < 16; r++) {
                    float scale = load_f16(d + (b * 16 + (size_t)r) * 2) * x->d[xb];
                    acc[r] = acc[r] + scale * (float)(dot[r] - 8 * x->sum[xb]);
                }
            }
            store_tile(acc, out + t * out_stride, rows, tile);
        }
    }
}

void matmul_q4_1_q8__scalar(const uint8_t *w, const struct spk_q8 *x, float *out,
                            size_t out_stride, size_t rows, size_t tokens, size_t tile_begin,
                            size_t tile_end)
{
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const uint8_t *qs = w + tile * x->blocks * 320, *d = qs + x->blocks * 256;
        const uint8_t *m = d + x->blocks * 32;
        for (size_t t = 0; t < tokens; t++) {
            float acc[16] = {0};
            for (size_t b = 0; b < x->blocks; b++) {
                size_t xb = t * x->blocks + b;
                int32_t dot[16];
                dot_nibbles(qs + b * 256, x->qs + xb * SPK_BLOCK, dot);
                for (int r = 0; r < 16; r++) {
                    float scale = load_f16(d + (b * 16 + (size_t)r) * 2) * x->d[xb];
                    float offset = load_f16(m + (b * 16 + (size_t)r) * 2) * x->d[xb];
                    acc[r] = acc[r] + scale * (float)dot[r];
                    acc[r] = acc[r] + offset * (float)x->sum[xb];
                }
            }
            store_tile(acc, out + t * out_stride, rows, tile);
        }
    }
}

void matmul_q8_0_q8__scalar(const uint8_t *w, const struct spk_q8 *x, float *out,
                            size_t out_stride, size_t rows, size_t tokens, size_t tile_begin,
                            size_t tile_end)
{
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const uint8_t *qs = w + tile * x->blocks * 544, *d = qs + x->blocks * 512;
        for (size_t t = 0; t < tokens; t++) {
            float acc[16] = {0};
            for (size_t b = 0; b < x->blocks; b++) {
                size_t xb = t * x->blocks + b;
                int32_t dot[16];
                dot_bytes((const int8_t *)qs + b * 512, x->qs + xb * SPK_BLOCK, dot);
                for (int r = 0; r < 16; r++) {
                    float scale = load_f16(d + (b * 16 + (size_t)r) * 2) * x->d[xb];
                    acc[r] = acc[r] + scale * (float)dot[r];
                }
            }
            store_tile(acc, out + t * out_stride, rows, tile);
        }
    }
}

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
