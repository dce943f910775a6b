/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantised matmuls with AVX2.  A register holds 8 rows x 4 weights; an activation word (4
 * int8) is broadcast to all rows.
 *
 * Nibbles: a pair product is at most 2 * 15 * 127 = 3,810, so the eight of a block sum to
 * 30,480 and stay in int16: one widening per block.  With a fifth bit four of them do (31,496):
 * two widenings.  q6_K widens every pair by a multiplication with its scale.  Bytes: |w| * x pairs
 * reach 2 * 128 * 127 = 32,512, so every pair product is widened at once.
 *
 * Sketch for one token (decode), 16 rows and one q4_0 block: 288 bytes against about 70
 * instructions, 25 cycles: 11 bytes a cycle, above what memory gives.  For four tokens the
 * unpacked nibbles are used four times: about 24 multiply-adds a cycle.
 */
#include <immintrin.h>
#include <string.h>

#include "spk_kernels.h"
#include "spk_tiles.h"

#define GROUP SPK_Q8_GROUP
#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE __m256i word(const int8_t *x)
{
    int32_t w;
    memcpy(&w, x, 4);
    return _mm256_set1_epi32(w);
}

ALWAYS_INLINE __m256i load(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

ALWAYS_INLINE __m256 halves(const uint8_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

/* The fifth bits of 8 rows x 4 weights as 16 or 0 in each byte. */
ALWAYS_INLINE __m256i fifth_bits(const uint8_t *p)
{
    uint32_t bits;
    memcpy(&bits, p, 4);
    /* Byte i of the register needs bit i: spread the four bytes, then pick one bit of each. */
    const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202,
                                             0x0101010101010101, 0);
    const __m256i pick = _mm256_set1_epi64x((long long)0x8040201008040201u);
    __m256i x = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), spread), pick);
    return _mm256_and_si256(_mm256_cmpeq_epi8(x, pick), _mm256_set1_epi8(16));
}

/* Weights of group g and g + 4 of a block, 8 rows from `half`, unsigned; not for bytes. */
ALWAYS_INLINE void weights(struct spk_tiling f, const struct spk_block_at *at, size_t half, int g,
                           __m256i *lo, __m256i *hi)
{
    const __m256i low = _mm256_set1_epi8(15);
    __m256i bytes = load(at->words + g * 64 + half * 32);
    *lo = _mm256_and_si256(bytes, low);
    *hi = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
    if (f.fifth) {
        *lo = _mm256_or_si256(*lo, fifth_bits(at->fifth + g * 8 + half * 4));
        *hi = _mm256_or_si256(*hi, fifth_bits(at->fifth + 32 + g * 8 + half * 4));
    }
    if (f.six) {
        const __m256i mask = _mm256_set1_epi8(0x30);
        __m256i a = load(at->upper + half * 32), b = load(at->upper + 64 + half * 32);
        if (g < 2) {
            a = _mm256_slli_epi16(a, 4 - 2 * g);
            b = _mm256_slli_epi16(b, 4 - 2 * g);
        } else if (g > 2) {
            a = _mm256_srli_epi16(a, 2);
            b = _mm256_srli_epi16(b, 2);
        }
        *lo = _mm256_or_si256(*lo, _mm256_and_si256(a, mask));
        *hi = _mm256_or_si256(*hi, _mm256_and_si256(b, mask));
    }
}

/* int32 dot products of 8 rows with one block of n tokens, offsets taken off. */
ALWAYS_INLINE void dots_nibbles(struct spk_tiling f, const struct spk_block_at *at, size_t half,
                                const struct spk_q8_block *x, int n, __m256i *dot)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i first[GROUP], last[GROUP];
    for (int j = 0; j < n; j++)
        first[j] = last[j] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
        __m256i lo, hi;
        weights(f, at, half, g, &lo, &hi);
        for (int j = 0; j < n; j++) {
            __m256i a = _mm256_maddubs_epi16(lo, word(x[j].qs + g * 4));
            __m256i b = _mm256_maddubs_epi16(hi, word(x[j].qs + 16 + g * 4));
            first[j] = _mm256_add_epi16(first[j], a);
            if (f.fifth)
                last[j] = _mm256_add_epi16(last[j], b);
            else
                first[j] = _mm256_add_epi16(first[j], b);
        }
    }
    for (int j = 0; j < n; j++) {
        dot[j] = _mm256_madd_epi16(first[j], ones);
        if (f.fifth)
            dot[j] = _mm256_add_epi32(dot[j], _mm256_madd_epi16(last[j], ones));
        if (f.offset)
            dot[j] = _mm256_add_epi32(dot[j], _mm256_set1_epi32(x[j].minus_sum * (1 << f.offset)));
    }
}

/* q6_K: a pair product is at most 2 * 63 * 127 = 16,002; times the scale it is an int32. */
ALWAYS_INLINE void dots_six(struct spk_tiling f, const struct spk_block_at *at, size_t half,
                            const struct spk_q8_block *x, int n, __m256i *dot)
{
    __m256i s[2], both;
    for (int h = 0; h < 2; h++) {
        uint64_t bytes;
        memcpy(&bytes, at->scales + (size_t)h * 16 + half * 8, 8);
        s[h] = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)bytes));
    }
    const __m256i low = _mm256_set1_epi32(0xffff);
    both = _mm256_or_si256(_mm256_and_si256(s[0], low), _mm256_slli_epi32(s[1], 16));
    for (int h = 0; h < 2; h++) /* the scale in both halves of the lane */
        s[h] = _mm256_or_si256(_mm256_and_si256(s[h], low), _mm256_slli_epi32(s[h], 16));
    for (int j = 0; j < n; j++) {
        /* Sums of 16 fit into int16. */
        int32_t a = x[j].minus_first, b = x[j].minus_sum - x[j].minus_first;
        __m256i sums = _mm256_set1_epi32((int32_t)((uint32_t)a & 0xffffu) | (int32_t)((uint32_t)b << 16));
        dot[j] = _mm256_slli_epi32(_mm256_madd_epi16(both, sums), 5);
    }
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
        __m256i lo, hi;
        weights(f, at, half, g, &lo, &hi);
        for (int j = 0; j < n; j++) {
            __m256i a = _mm256_maddubs_epi16(lo, word(x[j].qs + g * 4));
            __m256i b = _mm256_maddubs_epi16(hi, word(x[j].qs + 16 + g * 4));
            dot[j] = _mm256_add_epi32(dot[j], _mm256_madd_epi16(a, s[0]));
            dot[j] = _mm256_add_epi32(dot[j], _mm256_madd_epi16(b, s[1]));
        }
    }
}

ALWAYS_INLINE void dots_bytes(const struct spk_block_at *at, size_t half,
                              const struct spk_q8_block *x, int n, __m256i *dot)
{
    const __m256i ones = _mm256_set1_epi16(1);
    for (int j = 0; j < n; j++)
        dot[j] = _mm256_setzero_si256();
    for (int g = 0; g < 8; g++) {
        __m256i w = load(at->words + g * 64 + half * 32), magnitude = _mm256_abs_epi8(w);
        for (int j = 0; j < n; j++) {
            __m256i xv = _mm256_sign_epi8(word(x[j].qs + g * 4), w);
            __m256i pairs = _mm256_maddubs_epi16(magnitude, xv);
            dot[j] = _mm256_add_epi32(dot[j], _mm256_madd_epi16(pairs, ones));
        }
    }
}

/* Scales (and minima) of the eight blocks of a super-block, 8 rows. */
ALWAYS_INLINE void super_scales(const struct spk_block_at *at, size_t half, __m256 d[8],
                                __m256 m[8])
{
    const __m256i six = _mm256_set1_epi8(63), four = _mm256_set1_epi8(15),
                  two = _mm256_set1_epi8(0x30), byte = _mm256_set1_epi32(255);
    __m256i w0 = load(at->scales + half * 32), w1 = load(at->scales + 64 + half * 32),
            w2 = load(at->scales + 128 + half * 32);
    __m256i words[4] = {
        _mm256_and_si256(w0, six),
        _mm256_or_si256(_mm256_and_si256(w2, four),
                        _mm256_and_si256(_mm256_srli_epi32(w0, 2), two)),
        _mm256_and_si256(w1, six),
        _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(w2, 4), four),
                        _mm256_and_si256(_mm256_srli_epi32(w1, 2), two)),
    };
    __m256 dw = halves(at->d + half * 16), mw = halves(at->m + half * 16);
    for (int j = 0; j < 8; j++) {
        __m256i s = _mm256_srli_epi32(words[j / 4], 8 * (j % 4));
        __m256i n = _mm256_srli_epi32(words[2 + j / 4], 8 * (j % 4));
        d[j] = _mm256_mul_ps(dw, _mm256_cvtepi32_ps(_mm256_and_si256(s, byte)));
        m[j] = _mm256_mul_ps(mw, _mm256_cvtepi32_ps(_mm256_and_si256(n, byte)));
    }
}

/* acc over all blocks for 8 rows and a group of n tokens. */
ALWAYS_INLINE void half_tile(struct spk_tiling f, const uint8_t *tile, size_t half,
                             const struct spk_q8_block *x, size_t blocks, int n, __m256 *acc)
{
    __m256 dk[8], mk[8];
    for (int j = 0; j < n; j++)
        acc[j] = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; b++, x += n) {
        struct spk_block_at at = spk_locate(f, tile, blocks, b);
        spk_ahead(f, at.words);
        __m256i dot[GROUP];
        __m256 dw, mw = _mm256_setzero_ps();
        if (f.bytes)
            dots_bytes(&at, half, x, n, dot);
        else if (f.six)
            dots_six(f, &at, half, x, n, dot);
        else
            dots_nibbles(f, &at, half, x, n, dot);
        if (f.super && !f.six) {
            if (b % 8 == 0)
                super_scales(&at, half, dk, mk);
            dw = dk[b % 8];
            mw = mk[b % 8];
        } else {
            dw = halves(at.d + half * 16);
            if (f.minima)
                mw = halves(at.m + half * 16);
        }
        for (int j = 0; j < n; j++) {
            __m256 dx = _mm256_set1_ps(x[j].d), term = _mm256_mul_ps(dw, dx);
            acc[j] = _mm256_add_ps(acc[j], _mm256_mul_ps(term, _mm256_cvtepi32_ps(dot[j])));
            if (f.minima) {
                term = _mm256_mul_ps(_mm256_mul_ps(mw, dx), _mm256_set1_ps(x[j].sum));
                acc[j] = f.super ? _mm256_sub_ps(acc[j], term) : _mm256_add_ps(acc[j], term);
            }
        }
    }
}

ALWAYS_INLINE void tile_group(struct spk_tiling f, const uint8_t *tile,
                              const struct spk_q8_block *x, size_t blocks, int n, float *out,
                              size_t out_stride, size_t rows)
{
    for (size_t half = 0; half < 2; half++) {
        __m256 acc[GROUP];
        half_tile(f, tile, half, x, blocks, n, acc);
        for (int j = 0; j < n; j++) {
            float *o = out + (size_t)j * out_stride + half * 8;
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

#define SPK_ISA avx2
#include "../matmul_q.inc.h"
