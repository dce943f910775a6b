/* SPDX-License-Identifier: Apache-2.0 */
/* 16 float lanes as one AVX-512 register; the names are those that lanes/ is written in. */
#ifndef SPK_LANES_H
#define SPK_LANES_H

#include <immintrin.h>

#include "spk_scalar_math.h"

#define SPK_LANES_QUERIES 8 /* queries of attention at a time */
#define SPK_LANES_VALUE_CHUNKS 4

typedef __m512 lanes;

static inline lanes l_add(lanes a, lanes b) { return _mm512_add_ps(a, b); }
static inline lanes l_sub(lanes a, lanes b) { return _mm512_sub_ps(a, b); }
static inline lanes l_mul(lanes a, lanes b) { return _mm512_mul_ps(a, b); }
static inline lanes l_div(lanes a, lanes b) { return _mm512_div_ps(a, b); }
static inline lanes l_min(lanes a, lanes b) { return _mm512_min_ps(a, b); }
static inline lanes l_max(lanes a, lanes b) { return _mm512_max_ps(a, b); }
static inline lanes l_set1(float x) { return _mm512_set1_ps(x); }
static inline lanes l_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void l_store(float *p, lanes a) { _mm512_storeu_ps(p, a); }

static inline lanes l_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

static inline lanes l_abs(lanes a)
{
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
}

/* 2^n for integral n in [-126, 127]. */
static inline lanes l_pow2(lanes n)
{
    __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
}

/* 16 integral lanes in [-128, 127] as int8. */
static inline void l_store_i8(uint8_t *p, lanes a)
{
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}

/* The sum of 16 int8. */
static inline int32_t l_sum_i8(const uint8_t *p)
{
    /* Bytes offset by 128 are unsigned, which psadbw adds up in two halves. */
    __m128i x = _mm_xor_si128(_mm_loadu_si128((const __m128i *)p), _mm_set1_epi8((char)0x80));
    __m128i s = _mm_sad_epu8(x, _mm_setzero_si128());
    return _mm_cvtsi128_si32(s) + _mm_extract_epi16(s, 4) - 16 * 128;
}

static inline lanes l_load_bf16(const uint16_t *p)
{
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}

/* For work that is no lanes: a register of floats to and from f16, nearest even. */
#define SPK_REGISTER_BYTES 64

static inline __m512 r_load_f16(const uint16_t *p)
{
    return l_load_f16(p);
}

static inline void r_store_f16(uint16_t *p, __m512 x)
{
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#endif
