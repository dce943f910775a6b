/* SPDX-License-Identifier: Apache-2.0 */
/* Norm, RoPE, SwiGLU, addition, embedding rows. */
#include <math.h>
#include <string.h>

#include "spk_kernels.h"
#include "spk_scalar_math.h"
#include "spk_tiles.h"

int rmsnorm__scalar(const float *x, size_t x_stride, const float *w, float *out,
                    size_t out_stride, size_t n, size_t tokens, float eps)
{
    int status = SPK_OK;
    for (size_t t = 0; t < tokens; t++) {
        const float *row = x + t * x_stride;
        float lane[16] = {0};
        for (size_t i = 0; i < n; i++)
            lane[i % 16] = lane[i % 16] + row[i] * row[i];
        float mean = spk_tree16(lane) / (float)n;
        float r = 1.0f / sqrtf(mean + eps);
        if (spk_nonfinite(r) || spk_nonfinite(mean))
            status = SPK_E_NONFINITE;
        for (size_t i = 0; i < n; i++)
            out[t * out_stride + i] = (row[i] * r) * w[i];
    }
    return status;
}

void rope__scalar(float *x, size_t x_stride, size_t heads, size_t head_dim, size_t rope_dim,
                  const float *table, const uint32_t *positions, size_t tokens)
{
    for (size_t t = 0; t < tokens; t++) {
        const float *cs = table + positions[t] * rope_dim;
        for (size_t h = 0; h < heads; h++) {
            float *v = x + t * x_stride + h * head_dim;
            for (size_t i = 0; i < rope_dim; i += 2) {
                float a = v[i], b = v[i + 1], c = cs[i], s = cs[i + 1];
                v[i] = a * c - b * s;
                v[i + 1] = a * s + b * c;
            }
        }
    }
}

void swiglu__scalar(const float *gate, size_t gate_stride, const float *up, size_t up_stride,
                    float *out, size_t out_stride, size_t n, size_t tokens)
{
    for (size_t t = 0; t < tokens; t++)
        for (size_t i = 0; i < n; i++) {
            float g = gate[t * gate_stride + i];
            float silu = g / (1.0f + spk_expf(-g));
            out[t * out_stride + i] = silu * up[t * up_stride + i];
        }
}

void add__scalar(float *x, size_t x_stride, const float *y, size_t y_stride, size_t n,
                 size_t tokens)
{
    for (size_t t = 0; t < tokens; t++)
        for (size_t i = 0; i < n; i++)
            x[t * x_stride + i] = x[t * x_stride + i] + y[t * y_stride + i];
}

static float f16_at(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return spk_f16_to_f32(h);
}

static uint32_t bits_at(const uint8_t *p)
{
    uint32_t bits;
    memcpy(&bits, p, 4);
    return bits;
}

/* Two weights of a block of 32: nibble bytes with, maybe, a word of fifth bits. */
static void nibble_pair(const uint8_t *qs, const uint8_t *fifth, int i, int q[2])
{
    uint32_t bits = fifth ? bits_at(fifth) : 0;
    q[0] = (qs[i] & 15) | (int)(bits >> i & 1u) << 4;
    q[1] = qs[i] >> 4 | (int)(bits >> (i + 16) & 1u) << 4;
}

static void row_without_minima(const uint8_t *row, size_t bytes, int offset, float *out, size_t k)
{
    for (; k; k -= 32, row += bytes, out += 32)
        for (int i = 0; i < 16; i++) {
            int q[2];
            nibble_pair(row + bytes - 16, bytes == 22 ? row + 2 : NULL, i, q);
            out[i] = f16_at(row) * (float)(q[0] - offset);
            out[16 + i] = f16_at(row) * (float)(q[1] - offset);
        }
}

static void row_with_minima(const uint8_t *row, size_t bytes, float *out, size_t k)
{
    for (; k; k -= 32, row += bytes, out += 32)
        for (int i = 0; i < 16; i++) {
            int q[2];
            nibble_pair(row + bytes - 16, bytes == 24 ? row + 4 : NULL, i, q);
            out[i] = f16_at(row) * (float)q[0] + f16_at(row + 2);
            out[16 + i] = f16_at(row) * (float)q[1] + f16_at(row + 2);
        }
}

/* q4_K and, with fifth bits behind the scales, q5_K. */
static void row_super(const uint8_t *row, int fifth, float *out, size_t k)
{
    for (; k; k -= 256, row += fifth ? 176 : 144) {
        const uint8_t *qs = row + (fifth ? 48 : 16);
        uint32_t w[3] = {bits_at(row + 4), bits_at(row + 8), bits_at(row + 12)};
        for (int s = 0; s < 8; s++) {
            float d = f16_at(row) * (float)spk_scale6(w, s);
            float m = f16_at(row + 2) * (float)spk_minimum6(w, s);
            for (int i = 0; i < 32; i++) {
                int q = qs[s / 2 * 32 + i] >> (s % 2 * 4) & 15;
                if (fifth)
                    q |= (row[16 + i] >> s & 1) << 4;
                *out++ = d * (float)q - m;
            }
        }
    }
}

static void row_six(const uint8_t *row, float *out, size_t k)
{
    for (; k; k -= 256, row += 210)
        for (int s = 0; s < 8; s++)
            for (int i = 0; i < 32; i++) {
                int low = row[s / 4 * 64 + s % 2 * 32 + i] >> (s % 4 / 2 * 4) & 15;
                int high = row[128 + s / 4 * 32 + i] >> (s % 4 * 2) & 3;
                float d = f16_at(row + 208) * (float)(int8_t)row[192 + 2 * s + i / 16];
                *out++ = d * (float)((low | high << 4) - 32);
            }
}

int dequantize_row__scalar(int format, const uint8_t *row, float *out, size_t k)
{
    switch (format) {
    case SPK_F32: memmove(out, row, k * 4); break; /* a program may let them overlap */
    case SPK_F16:
        for (size_t i = 0; i < k; i++)
            out[i] = f16_at(row + 2 * i);
        break;
    case SPK_BF16:
        for (size_t i = 0; i < k; i++)
            out[i] = spk_float((uint32_t)(row[2 * i] | row[2 * i + 1] << 8) << 16);
        break;
    case SPK_Q4_0: row_without_minima(row, 18, 8, out, k); break;
    case SPK_Q4_1: row_with_minima(row, 20, out, k); break;
    case SPK_Q5_0: row_without_minima(row, 22, 16, out, k); break;
    case SPK_Q5_1: row_with_minima(row, 24, out, k); break;
    case SPK_Q8_0:
        for (size_t b = 0; b < k / 32; b++, row += 34)
            for (size_t i = 0; i < 32; i++)
                out[b * 32 + i] = f16_at(row) * (float)(int8_t)row[2 + i];
        break;
    case SPK_Q4_K: row_super(row, 0, out, k); break;
    case SPK_Q5_K: row_super(row, 1, out, k); break;
    case SPK_Q6_K: row_six(row, out, k); break;
    default: return SPK_E_ARG;
    }
    return SPK_OK;
}
