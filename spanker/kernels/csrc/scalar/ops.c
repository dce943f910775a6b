/* SPDX-License-Identifier: Apache-2.0 */
/* Norm, RoPE, SwiGLU, addition, embedding rows. */
#include <math.h>
#include <string.h>

#include "spk_kernels.h"
#include "spk_scalar_math.h"

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

int dequantize_row__scalar(int format, const uint8_t *row, float *out, size_t k)
{
    switch (format) {
    case SPK_F32:
        memmove(out, row, k * 4); /* a program may let them overlap */
        return SPK_OK;
    case SPK_F16:
        for (size_t i = 0; i < k; i++)
            out[i] = f16_at(row + 2 * i);
        return SPK_OK;
    case SPK_Q4_0:
        for (size_t b = 0; b < k / 32; b++, row += 18)
            for (size_t i = 0; i < 16; i++) {
                float d = f16_at(row);
                out[b * 32 + i] = d * (float)((row[2 + i] & 15) - 8);
                out[b * 32 + 16 + i] = d * (float)((row[2 + i] >> 4) - 8);
            }
        return SPK_OK;
    case SPK_Q4_1:
        for (size_t b = 0; b < k / 32; b++, row += 20)
            for (size_t i = 0; i < 16; i++) {
                float d = f16_at(row), m = f16_at(row + 2);
                out[b * 32 + i] = d * (float)(row[4 + i] & 15) + m;
                out[b * 32 + 16 + i] = d * (float)(row[4 + i] >> 4) + m;
            }
        return SPK_OK;
    case SPK_Q8_0:
        for (size_t b = 0; b < k / 32; b++, row += 34)
            for (size_t i = 0; i < 32; i++)
                out[b * 32 + i] = f16_at(row) * (float)(int8_t)row[2 + i];
        return SPK_OK;
    default:
        return SPK_E_ARG;
    }
}
