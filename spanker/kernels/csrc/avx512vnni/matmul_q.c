/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantised matmuls with AVX-512 VNNI.  A register holds 16 rows x 4 weights, one tile's width;
 * vpdpbusd multiplies unsigned weights by a broadcast word of four signed activations and
 * accumulates in int32 without saturation.  Weights stored too large by an offset are corrected by
 * starting the dot product at minus the offset times the sum of the activations.
 *
 * Sketch for one token, 16 rows and one q4_0 block: 288 bytes against about 35 instructions of
 * 512 bits, 16 cycles: 18 bytes a cycle, more than a core can read.  For four tokens and two
 * tiles: 64 vpdpbusd, 16 multiplications and about 50 others, of which the first two share ports:
 * at most 80 % of the vpdpbusd peak.
 */
#include <immintrin.h>
#include <string.h>

#include "spk_kernels.h"
#include "spk_tiles.h"

#define GROUP SPK_Q8_GROUP
#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE __m512i word(const int8_t *x)
{
    int32_t w;
    memcpy(&w, x, 4);
    return _mm512_set1_epi32(w);
}

ALWAYS_INLINE __m512 halves(const uint8_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

/* Weights of group g and g + 4 of a block, unsigned. */
ALWAYS_INLINE void weights(struct spk_tiling f, const struct spk_block_at *at, int g, __m512i *lo,
                           __m512i *hi)
{
    const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8((char)0x80);
    __m512i bytes = _mm512_loadu_si512(at->words + g * 64);
    if (f.bytes) {
        *lo = _mm512_xor_si512(bytes, flip);
        *hi = _mm512_xor_si512(_mm512_loadu_si512(at->words + 256 + g * 64), flip);
        return;
    }
    *lo = _mm512_and_si512(bytes, low);
    *hi = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
    if (f.fifth) {
        const __m512i sixteen = _mm512_set1_epi8(16);
        uint64_t m[2];
        memcpy(&m[0], at->fifth + g * 8, 8);
        memcpy(&m[1], at->fifth + 32 + g * 8, 8);
        *lo = _mm512_mask_add_epi8(*lo, _cvtu64_mask64(m[0]), *lo, sixteen);
        *hi = _mm512_mask_add_epi8(*hi, _cvtu64_mask64(m[1]), *hi, sixteen);
    }
    if (f.six) {
        const __m512i mask = _mm512_set1_epi8(0x30);
        __m512i a = _mm512_loadu_si512(at->upper), b = _mm512_loadu_si512(at->upper + 64);
        if (g < 2) {
            a = _mm512_slli_epi16(a, (unsigned)(4 - 2 * g));
            b = _mm512_slli_epi16(b, (unsigned)(4 - 2 * g));
        } else if (g > 2) {
            a = _mm512_srli_epi16(a, 2);
            b = _mm512_srli_epi16(b, 2);
        }
        /* (a & mask) | lo */
        *lo = _mm512_ternarylogic_epi32(a, mask, *lo, 0xea);
        *hi = _mm512_ternarylogic_epi32(b, mask, *hi, 0xea);
    }
}

/* The scales and minima of a super-block's eight blocks, 16 rows each. */
ALWAYS_INLINE void super_scales(const struct spk_block_at *at, __m512 d[8], __m512 m[8])
{
    const __m512i six = _mm512_set1_epi8(63), four = _mm512_set1_epi8(15),
                  two = _mm512_set1_epi8(0x30), byte = _mm512_set1_epi32(255);
    __m512i w0 = _mm512_loadu_si512(at->scales), w1 = _mm512_loadu_si512(at->scales + 64),
            w2 = _mm512_loadu_si512(at->scales + 128);
    __m512i words[4] = {
        _mm512_and_si512(w0, six),
        _mm512_or_si512(_mm512_and_si512(w2, four),
                        _mm512_and_si512(_mm512_srli_epi32(w0, 2), two)),
        _mm512_and_si512(w1, six),
        _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(w2, 4), four),
                        _mm512_and_si512(_mm512_srli_epi32(w1, 2), two)),
    };
    __m512 dw = halves(at->d), mw = halves(at->m);
    for (int j = 0; j < 8; j++) {
        __m512i s = _mm512_srli_epi32(words[j / 4], (unsigned)(8 * (j % 4)));
        __m512i n = _mm512_srli_epi32(words[2 + j / 4], (unsigned)(8 * (j % 4)));
        d[j] = _mm512_mul_ps(dw, _mm512_cvtepi32_ps(_mm512_and_si512(s, byte)));
        m[j] = _mm512_mul_ps(mw, _mm512_cvtepi32_ps(_mm512_and_si512(n, byte)));
    }
}

ALWAYS_INLINE __m512i scale_of_half(const uint8_t *scales)
{
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)scales));
}

/* `tiles` neighbouring tiles against a group of `n` tokens. */
ALWAYS_INLINE void block_of_tiles(struct spk_tiling f, const uint8_t *w,
                                  const struct spk_q8_block *x, size_t blocks, int tiles, int n,
                                  float *out, size_t out_stride, size_t rows)
{
    size_t tile_bytes = spk_tile_bytes(f, blocks);
    __m512 acc[2 * GROUP], dk[2][8], mk[2][8];
    for (int i = 0; i < tiles * n; i++)
        acc[i] = _mm512_setzero_ps();
    for (size_t b = 0; b < blocks; b++, x += n) {
        struct spk_block_at at[2];
        __m512i dot[2 * GROUP], second[2 * GROUP];
        for (int t = 0; t < tiles; t++) {
            at[t] = spk_locate(f, w + (size_t)t * tile_bytes, blocks, b);
            if (tiles == 1)
                spk_ahead(f, at[t].words);
            if (f.super && !f.six && b % 8 == 0)
                super_scales(&at[t], dk[t], mk[t]);
        }
        for (int j = 0; j < n; j++) {
            __m512i start = _mm512_setzero_si512(), start2 = start;
            if (f.bytes) {
                start = _mm512_slli_epi32(_mm512_set1_epi32(x[j].minus_sum), 7);
            } else if (f.six) {
                start = _mm512_slli_epi32(_mm512_set1_epi32(x[j].minus_first), 5);
                start2 = _mm512_slli_epi32(
                    _mm512_set1_epi32(x[j].minus_sum - x[j].minus_first), 5);
            } else if (f.offset) {
                start = _mm512_slli_epi32(_mm512_set1_epi32(x[j].minus_sum), (unsigned)f.offset);
            }
            for (int t = 0; t < tiles; t++) {
                dot[t * n + j] = start;
                second[t * n + j] = start2;
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) {
            __m512i lo[2], hi[2];
            for (int t = 0; t < tiles; t++)
                weights(f, &at[t], g, &lo[t], &hi[t]);
            for (int j = 0; j < n; j++) {
                __m512i first = word(x[j].qs + g * 4), last = word(x[j].qs + 16 + g * 4);
                for (int t = 0; t < tiles; t++)
                    dot[t * n + j] = _mm512_dpbusd_epi32(dot[t * n + j], lo[t], first);
                for (int t = 0; t < tiles; t++) {
                    __m512i *into = f.six ? second : dot;
                    into[t * n + j] = _mm512_dpbusd_epi32(into[t * n + j], hi[t], last);
                }
            }
        }
        for (int t = 0; t < tiles; t++) {
            __m512 dw, mw = _mm512_setzero_ps();
            if (f.super && !f.six) {
                dw = dk[t][b % 8];
                mw = mk[t][b % 8];
            } else {
                dw = halves(at[t].d);
                if (f.minima)
                    mw = halves(at[t].m);
            }
            if (f.six) {
                __m512i s = scale_of_half(at[t].scales), s2 = scale_of_half(at[t].scales + 16);
                for (int j = 0; j < n; j++)
                    dot[t * n + j] =
                        _mm512_add_epi32(_mm512_mullo_epi32(dot[t * n + j], s),
                                         _mm512_mullo_epi32(second[t * n + j], s2));
            }
            for (int j = 0; j < n; j++) {
                __m512 *a = &acc[t * n + j], dx = _mm512_set1_ps(x[j].d);
                __m512 term = _mm512_mul_ps(dw, dx);
                *a = _mm512_add_ps(*a, _mm512_mul_ps(term, _mm512_cvtepi32_ps(dot[t * n + j])));
                if (f.minima) {
                    term = _mm512_mul_ps(_mm512_mul_ps(mw, dx), _mm512_set1_ps(x[j].sum));
                    *a = f.super ? _mm512_sub_ps(*a, term) : _mm512_add_ps(*a, term);
                }
            }
        }
    }
    for (int t = 0; t < tiles; t++) {
        size_t left = rows - (size_t)t * 16;
        __mmask16 mask = left >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1u);
        for (int j = 0; j < n; j++)
            _mm512_mask_storeu_ps(out + (size_t)j * out_stride + t * 16, mask, acc[t * n + j]);
    }
}

/* Few tokens are bound by memory, which likes a single stream: one tile at a time.  Many read a
 * tile from the cache, and two at a time halve the loads of activations. */
#define TWO_TILES_TOKENS 24

ALWAYS_INLINE void matmul(struct spk_tiling f, const uint8_t *w, const struct spk_q8 *x,
                          float *out, size_t out_stride, size_t rows, size_t tokens,
                          size_t tile_begin, size_t tile_end)
{
    size_t blocks = x->blocks, tile_bytes = spk_tile_bytes(f, blocks);
    size_t whole = tokens / GROUP * GROUP, tile = tile_begin;
    while (tile < tile_end) {
        size_t pair = tokens >= TWO_TILES_TOKENS && tile + 2 <= tile_end ? 2 : 1;
        const uint8_t *wt = w + tile * tile_bytes;
        float *o = out + tile * 16;
        size_t left = rows - tile * 16;
        for (size_t t = 0; t < whole; t += GROUP) {
            const struct spk_q8_block *xt = spk_q8_group(x, t);
            float *ot = o + t * out_stride;
            if (pair == 2)
                block_of_tiles(f, wt, xt, blocks, 2, GROUP, ot, out_stride, left);
            else
                block_of_tiles(f, wt, xt, blocks, 1, GROUP, ot, out_stride, left);
        }
        for (size_t i = 0; i < pair; i++, wt += tile_bytes, left -= 16) {
            const struct spk_q8_block *xt = spk_q8_group(x, whole);
            float *ot = o + whole * out_stride + i * 16;
            switch (tokens - whole) {
            case 3: block_of_tiles(f, wt, xt, blocks, 1, 3, ot, out_stride, left); break;
            case 2: block_of_tiles(f, wt, xt, blocks, 1, 2, ot, out_stride, left); break;
            case 1: block_of_tiles(f, wt, xt, blocks, 1, 1, ot, out_stride, left); break;
            default: break;
            }
        }
        tile += pair;
    }
}

#define MATMUL(name, tiling)                                                                   \
    void name(const uint8_t *w, const struct spk_q8 *x, float *out, size_t out_stride,         \
              size_t rows, size_t tokens, size_t tile_begin, size_t tile_end)                  \
    {                                                                                          \
        matmul(tiling, w, x, out, out_stride, rows, tokens, tile_begin, tile_end);             \
    }

MATMUL(matmul_q4_0_q8__avx512vnni, SPK_TILING_Q4_0)
MATMUL(matmul_q4_1_q8__avx512vnni, SPK_TILING_Q4_1)
MATMUL(matmul_q5_0_q8__avx512vnni, SPK_TILING_Q5_0)
MATMUL(matmul_q5_1_q8__avx512vnni, SPK_TILING_Q5_1)
MATMUL(matmul_q8_0_q8__avx512vnni, SPK_TILING_Q8_0)
MATMUL(matmul_q4_k_q8__avx512vnni, SPK_TILING_Q4_K)
MATMUL(matmul_q5_k_q8__avx512vnni, SPK_TILING_Q5_K)
MATMUL(matmul_q6_k_q8__avx512vnni, SPK_TILING_Q6_K)
