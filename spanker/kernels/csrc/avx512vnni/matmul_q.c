/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantised matmuls with AVX-512 VNNI.  A register holds 16 rows x 4 weights, one tile's width;
 * vpdpbusd multiplies unsigned weights by a broadcast word of four signed activations and
 * accumulates in int32 without saturation.  Signed weight bytes are offset by 128 and corrected
 * by the activations' sum, which keeps the integer exact.
 *
 * Sketch for one token, 16 rows and one q4_0 block: 288 bytes against about 30 instructions.
 * Eight tokens at once use each unpacked register eight times.
 */
#include <immintrin.h>
#include <string.h>

#include "spk_kernels.h"

enum kind { Q4_0, Q4_1, Q8_0 };

#define TOKENS 8
#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE __m512i words(const int8_t *x)
{
    int32_t word;
    memcpy(&word, x, 4);
    return _mm512_set1_epi32(word);
}

ALWAYS_INLINE __m512 halves(const uint8_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

/* int32 dot products, before any offset, of 16 rows with one block of N tokens. */
ALWAYS_INLINE void dots(enum kind kind, const uint8_t *w, const int8_t *x, size_t x_step, int n,
                        __m512i *dot)
{
    const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8((char)0x80);
    for (int j = 0; j < n; j++)
        dot[j] = _mm512_setzero_si512();
    if (kind == Q8_0) {
        for (int g = 0; g < 8; g++) {
            __m512i wv = _mm512_xor_si512(_mm512_loadu_si512(w + g * 64), flip);
            for (int j = 0; j < n; j++)
                dot[j] = _mm512_dpbusd_epi32(dot[j], wv, words(x + (size_t)j * x_step + g * 4));
        }
        return;
    }
    for (int g = 0; g < 4; g++) {
        __m512i bytes = _mm512_loadu_si512(w + g * 64);
        __m512i lo = _mm512_and_si512(bytes, low);
        __m512i hi = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
        for (int j = 0; j < n; j++) {
            const int8_t *xj = x + (size_t)j * x_step + g * 4;
            dot[j] = _mm512_dpbusd_epi32(dot[j], lo, words(xj));
            dot[j] = _mm512_dpbusd_epi32(dot[j], hi, words(xj + 16));
        }
    }
}

ALWAYS_INLINE void tile_tokens(enum kind kind, const uint8_t *qs, const struct spk_q8 *x,
                               float *out, size_t out_stride, size_t rows, size_t token, int n)
{
    size_t blocks = x->blocks, x_step = blocks * SPK_BLOCK;
    size_t block_ints = kind == Q8_0 ? 512 : 256;
    int32_t offset = kind == Q8_0 ? 128 : kind == Q4_0 ? 8 : 0;
    const uint8_t *d = qs + blocks * block_ints, *m = d + blocks * 32;
    __m512 acc[TOKENS];
    for (int j = 0; j < n; j++)
        acc[j] = _mm512_setzero_ps();
    for (size_t b = 0; b < blocks; b++) {
        __m512i dot[TOKENS];
        dots(kind, qs + b * block_ints, x->qs + (token * blocks + b) * SPK_BLOCK, x_step, n, dot);
        __m512 dw = halves(d + b * 32);
        __m512 mw = kind == Q4_1 ? halves(m + b * 32) : dw;
        for (int j = 0; j < n; j++) {
            size_t xb = (token + (size_t)j) * blocks + b;
            __m512 dx = _mm512_set1_ps(x->d[xb]);
            if (offset)
                dot[j] = _mm512_sub_epi32(dot[j], _mm512_set1_epi32(offset * x->sum[xb]));
            __m512 term = _mm512_mul_ps(_mm512_mul_ps(dw, dx), _mm512_cvtepi32_ps(dot[j]));
            acc[j] = _mm512_add_ps(acc[j], term);
            if (kind == Q4_1) {
                __m512 sum = _mm512_set1_ps((float)x->sum[xb]);
                acc[j] = _mm512_add_ps(acc[j], _mm512_mul_ps(_mm512_mul_ps(mw, dx), sum));
            }
        }
    }
    __mmask16 mask = rows >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << rows) - 1u);
    for (int j = 0; j < n; j++)
        _mm512_mask_storeu_ps(out + (token + (size_t)j) * out_stride, mask, acc[j]);
}

ALWAYS_INLINE void matmul(enum kind kind, size_t block_bytes, const uint8_t *w,
                          const struct spk_q8 *x, float *out, size_t out_stride, size_t rows,
                          size_t tokens, size_t tile_begin, size_t tile_end)
{
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const uint8_t *qs = w + tile * x->blocks * block_bytes * 16;
        float *o = out + tile * 16;
        size_t left = rows - tile * 16, t = 0;
        for (; t + TOKENS <= tokens; t += TOKENS)
            tile_tokens(kind, qs, x, o, out_stride, left, t, TOKENS);
        for (; t + 2 <= tokens; t += 2)
            tile_tokens(kind, qs, x, o, out_stride, left, t, 2);
        if (t < tokens)
            tile_tokens(kind, qs, x, o, out_stride, left, t, 1);
    }
}

#define MATMUL(name, kind, block_bytes)                                                        \
    void name(const uint8_t *w, const struct spk_q8 *x, float *out, size_t out_stride,         \
              size_t rows, size_t tokens, size_t tile_begin, size_t tile_end)                  \
    {                                                                                          \
        matmul(kind, block_bytes, w, x, out, out_stride, rows, tokens, tile_begin, tile_end);  \
    }

MATMUL(matmul_q4_0_q8__avx512vnni, Q4_0, 18)
MATMUL(matmul_q4_1_q8__avx512vnni, Q4_1, 20)
MATMUL(matmul_q8_0_q8__avx512vnni, Q8_0, 34)
