/* SPDX-License-Identifier: Apache-2.0 */
/* 16 float lanes as two AVX2 registers; the names are those that lanes/ is written in. */
#ifndef SPK_LANES_H
#define SPK_LANES_H

#include <immintrin.h>

#include "spk_scalar_math.h"

#define SPK_LANES_QUERIES 4 /* queries of attention at a time */
#define SPK_LANES_VALUE_CHUNKS 1

typedef struct {
    __m256 lo, hi;
} lanes;

#define LANES_BINARY(name, op)                                              \
    static inline lanes name(lanes a, lanes b)                              \
    {                                                                       \
        return (lanes){_mm256_##op##_ps(a.lo, b.lo), _mm256_##op##_ps(a.hi, b.hi)}; \
    }
LANES_BINARY(l_add, add)
LANES_BINARY(l_sub, sub)
LANES_BINARY(l_mul, mul)
LANES_BINARY(l_div, div)
LANES_BINARY(l_min, min)
LANES_BINARY(l_max, max)
#undef LANES_BINARY

static inline lanes l_set1(float x)
{
    return (lanes){_mm256_set1_ps(x), _mm256_set1_ps(x)};
}

static inline lanes l_load(const float *p)
{
    return (lanes){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}

static inline void l_store(float *p, lanes a)
{
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}

static inline lanes l_load_f16(const uint16_t *p)
{
    return (lanes){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                   _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}

static inline lanes l_abs(lanes a)
{
    __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return (lanes){_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}

/* 2^n for integral n in [-126, 127]. */
static inline lanes l_pow2(lanes n)
{
    __m256i bias = _mm256_set1_epi32(127);
    __m256i lo = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.lo), bias), 23);
    __m256i hi = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.hi), bias), 23);
    return (lanes){_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
}

/* 16 integral lanes in [-128, 127] as int8. */
static inline void l_store_i8(uint8_t *p, lanes a)
{
    __m256i w = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    w = _mm256_permute4x64_epi64(w, 0xd8);
    __m128i b = _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storeu_si128((__m128i *)p, b);
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
    __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
    return (lanes){_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
                   _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}

/* For work that is no lanes: a register of floats to and from f16, nearest even. */
#define SPK_REGISTER_BYTES 32

static inline __m256 r_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

static inline void r_store_f16(uint16_t *p, __m256 x)
{
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#endif
