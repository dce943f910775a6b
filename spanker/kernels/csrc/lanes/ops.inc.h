/* SPDX-License-Identifier: Apache-2.0 */
/* Norm, RoPE, SwiGLU, addition, embedding rows, float matmuls. */
#include <math.h>

#include "common.inc.h"

int K(rmsnorm)(const float *x, size_t x_stride, const float *w, float *out, size_t out_stride,
               size_t n, size_t tokens, float eps)
{
    int status = SPK_OK;
    size_t whole = n / 16 * 16;
    for (size_t t = 0; t < tokens; t++) {
        const float *row = x + t * x_stride;
        float *o = out + t * out_stride;
        lanes sum = l_set1(0.0f);
        for (size_t i = 0; i < whole; i += 16) {
            lanes v = l_load(row + i);
            sum = l_add(sum, l_mul(v, v));
        }
        if (whole < n) {
            lanes v = l_load_partial(row + whole, n - whole);
            sum = l_add(sum, l_mul(v, v)); /* adds +0 to the other lanes: no change */
        }
        float mean = l_tree(sum) / (float)n;
        float r = 1.0f / sqrtf(mean + eps);
        if (spk_nonfinite(r) || spk_nonfinite(mean))
            status = SPK_E_NONFINITE;
        lanes rv = l_set1(r);
        for (size_t i = 0; i < whole; i += 16)
            l_store(o + i, l_mul(l_mul(l_load(row + i), rv), l_load(w + i)));
        for (size_t i = whole; i < n; i++)
            o[i] = (row[i] * r) * w[i];
    }
    return status;
}

void K(rope)(float *x, size_t x_stride, size_t heads, size_t head_dim, size_t rope_dim,
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

static inline lanes silu_times(lanes g, lanes u)
{
    lanes e = l_exp(l_sub(l_set1(-0.0f), g)); /* -0 - g is -g, for zeros too */
    return l_mul(l_div(g, l_add(l_set1(1.0f), e)), u);
}

void K(swiglu)(const float *gate, size_t gate_stride, const float *up, size_t up_stride,
               float *out, size_t out_stride, size_t n, size_t tokens)
{
    size_t whole = n / 16 * 16;
    for (size_t t = 0; t < tokens; t++) {
        const float *g = gate + t * gate_stride, *u = up + t * up_stride;
        float *o = out + t * out_stride;
        for (size_t i = 0; i < whole; i += 16)
            l_store(o + i, silu_times(l_load(g + i), l_load(u + i)));
        if (whole < n)
            l_store_partial(o + whole,
                            silu_times(l_load_partial(g + whole, n - whole),
                                       l_load_partial(u + whole, n - whole)),
                            n - whole);
    }
}

void K(add)(float *x, size_t x_stride, const float *y, size_t y_stride, size_t n, size_t tokens)
{
    for (size_t t = 0; t < tokens; t++)
        for (size_t i = 0; i < n; i++)
            x[t * x_stride + i] = x[t * x_stride + i] + y[t * y_stride + i];
}

int K(dequantize_row)(int format, const uint8_t *row, float *out, size_t k)
{
    return spk_kernels__scalar.dequantize_row(format, row, out, k);
}

/* FORMAT_LOAD reads 16 rows' weights of one k; tokens go four at a time over each load. */
#ifndef MATMUL_FLOAT_TILE
#define MATMUL_FLOAT_TILE(load, weight, TOKENS)                                                \
    do {                                                                                       \
        lanes acc[TOKENS];                                                                     \
        for (int j = 0; j < (TOKENS); j++)                                                     \
            acc[j] = l_set1(0.0f);                                                             \
        for (size_t i = 0; i < k; i++) {                                                       \
            lanes wv = load((weight) + i * 16);                                                \
            for (int j = 0; j < (TOKENS); j++)                                                 \
                acc[j] = l_add(acc[j], l_mul(wv, l_set1(x[(t + (size_t)j) * x_stride + i])));  \
        }                                                                                      \
        for (int j = 0; j < (TOKENS); j++)                                                     \
            l_store_partial(out + (t + (size_t)j) * out_stride + tile * 16, acc[j], n);        \
    } while (0)
#endif

#define MATMUL_FLOAT(name, type, load)                                                         \
    void K(name)(const uint8_t *w, const float *x, size_t x_stride, float *out,                \
                 size_t out_stride, size_t rows, size_t k, size_t tokens, size_t tile_begin,   \
                 size_t tile_end)                                                              \
    {                                                                                          \
        for (size_t tile = tile_begin; tile < tile_end; tile++) {                              \
            const type *wt = (const type *)w + tile * k * 16;                                  \
            size_t n = rows - tile * 16 < 16 ? rows - tile * 16 : 16, t = 0;                   \
            for (; t + 4 <= tokens; t += 4)                                                    \
                MATMUL_FLOAT_TILE(load, wt, 4);                                                \
            for (; t < tokens; t++)                                                            \
                MATMUL_FLOAT_TILE(load, wt, 1);                                                \
        }                                                                                      \
    }

MATMUL_FLOAT(matmul_f16_f32, uint16_t, l_load_f16)
MATMUL_FLOAT(matmul_bf16_f32, uint16_t, l_load_bf16)
MATMUL_FLOAT(matmul_f32_f32, float, l_load)
