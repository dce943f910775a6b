/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantised matmuls with AVX2.  A register holds 8 rows x 4 weights; an activation word (4
 * int8) is broadcast to all rows.
 *
 * Nibbles: a pair product is at most 2 * 15 * 127 = 3,810, so the eight of a block sum to
 * 30,480 and stay in int16: one widening per block.  Bytes: |w| * x pairs reach 2 * 128 * 127
 * = 32,512, so every pair product is widened at once.
 *
 * Sketch for one token (decode), 16 rows and one q4_0 block: 288 bytes against about 70
 * instructions, 25 cycles: 11 bytes a cycle, above what memory gives.  For four tokens the
 * unpacked nibbles are used four times: about 24 multiply-adds a cycle.
 */
#include <immintrin.h>
#include <string.h>

#include "spk_kernels.h"

enum kind { Q4_0, Q4_1, Q8_0 };

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE __m256i words(const int8_t *x)
{
    int32_t word;
    memcpy(&word, x, 4);
    return _mm256_set1_epi32(word);
}

ALWAYS_INLINE __m256 halves(const uint8_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

/* int32 dot products of 8 rows (one half of a tile) with one block of N tokens. */
ALWAYS_INLINE void dots_nibbles(const uint8_t *w, const int8_t *x, size_t x_step, int n,
                                __m256i *dot)
{
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int j = 0; j < n; j++)
        dot[j] = _mm256_setzero_si256();
    for (int g = 0; g < 4; g++) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(w + g * 64));
        __m256i lo = _mm256_and_si256(bytes, low);
        __m256i hi = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
        for (int j = 0; j < n; j++) {
            const int8_t *xj = x + (size_t)j * x_step + g * 4;
            dot[j] = _mm256_add_epi16(dot[j], _mm256_maddubs_epi16(lo, words(xj)));
            dot[j] = _mm256_add_epi16(dot[j], _mm256_maddubs_epi16(hi, words(xj + 16)));
        }
    }
    for (int j = 0; j < n; j++)
        dot[j] = _mm256_madd_epi16(dot[j], ones);
}

ALWAYS_INLINE void dots_bytes(const uint8_t *w, const int8_t *x, size_t x_step, int n,
                              __m256i *dot)
{
    const __m256i ones = _mm256_set1_epi16(1);
    for (int j = 0; j < n; j++)
        dot[j] = _mm256_setzero_si256();
    for (int g = 0; g < 8; g++) {
        __m256i wv = _mm256_loadu_si256((const __m256i *)(w + g * 64));
        __m256i magnitude = _mm256_abs_epi8(wv);
        for (int j = 0; j < n; j++) {
            __m256i xv = _mm256_sign_epi8(words(x + (size_t)j * x_step + g * 4), wv);
            __m256i pairs = _mm256_maddubs_epi16(magnitude, xv);
            dot[j] = _mm256_add_epi32(dot[j], _mm256_madd_epi16(pairs, ones));
        }
    }
}

/* acc over all blocks for 8 rows and N tokens. */
ALWAYS_INLINE void half_tile(enum kind kind, const uint8_t *qs, const uint8_t *d,
                             const uint8_t *m, const struct spk_q8 *x, size_t token, int n,
                             __m256 *acc)
{
    size_t blocks = x->blocks, x_step = blocks * SPK_BLOCK;
    for (int j = 0; j < n; j++)
        acc[j] = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; b++) {
        const int8_t *xq = x->qs + (token * blocks + b) * SPK_BLOCK;
        __m256i dot[4];
        if (kind == Q8_0)
            dots_bytes(qs + b * 512, xq, x_step, n, dot);
        else
            dots_nibbles(qs + b * 256, xq, x_step, n, dot);
        __m256 dw = halves(d + b * 32);
        __m256 mw = kind == Q4_1 ? halves(m + b * 32) : dw;
        for (int j = 0; j < n; j++) {
            size_t xb = (token + (size_t)j) * blocks + b;
            __m256 dx = _mm256_set1_ps(x->d[xb]);
            if (kind == Q4_0)
                dot[j] = _mm256_sub_epi32(dot[j], _mm256_set1_epi32(8 * x->sum[xb]));
            __m256 term = _mm256_mul_ps(_mm256_mul_ps(dw, dx), _mm256_cvtepi32_ps(dot[j]));
            acc[j] = _mm256_add_ps(acc[j], term);
            if (kind == Q4_1) {
                __m256 sum = _mm256_set1_ps((float)x->sum[xb]);
                acc[j] = _mm256_add_ps(acc[j], _mm256_mul_ps(_mm256_mul_ps(mw, dx), sum));
            }
        }
    }
}

ALWAYS_INLINE void tile_tokens(enum kind kind, const uint8_t *qs, const struct spk_q8 *x,
                               float *out, size_t out_stride, size_t rows, size_t token, int n)
{
    const uint8_t *d = qs + x->blocks * (kind == Q8_0 ? 512 : 256);
    const uint8_t *m = d + x->blocks * 32;
    for (size_t half = 0; half < 2; half++) {
        __m256 acc[4];
        half_tile(kind, qs + half * 32, d + half * 16, m + half * 16, x, token, n, acc);
        for (int j = 0; j < n; j++) {
            float *o = out + (token + (size_t)j) * out_stride + half * 8;
            if (rows >= half * 8 + 8) {
                _mm256_storeu_ps(o, acc[j]);
            } else if (rows > half * 8) {
                float tmp[8];
                _mm256_storeu_ps(tmp, acc[j]);
                memcpy(o, tmp, (rows - half * 8) * sizeof *o);
            }
        }
    }
}

ALWAYS_INLINE void matmul(enum kind kind, size_t block_bytes, const uint8_t *w,
                          const struct spk_q8 *x, float *out, size_t out_stride, size_t rows,
                          size_t tokens, size_t tile_begin, size_t tile_end)
{
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const uint8_t *qs = w + tile * x->blocks * block_bytes * 16;
        float *o = out + tile * 16;
        size_t left = rows - tile * 16, t = 0;
        for (; t + 4 <= tokens; t += 4)
            tile_tokens(kind, qs, x, o, out_stride, left, t, 4);
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

MATMUL(matmul_q4_0_q8__avx2, Q4_0, 18)
MATMUL(matmul_q4_1_q8__avx2, Q4_1, 20)
MATMUL(matmul_q8_0_q8__avx2, Q8_0, 34)
