/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stands in for the compiler's <immintrin.h>: AVX-512 in plain C by SIMDe, so that the AVX-512
 * kernels run on any machine.  tools/check_avx512.sh puts this directory first in the path.
 *
 * The intrinsics at the end are missing from SIMDe 0.7.4, or take it thousands of lines
 * (ternarylogic).  They are given one lane at a time from Intel's description of each, not from how
 * the kernels use them.  Another one that the kernels come to use fails to compile: add it here.
 */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H

#define SIMDE_NO_NATIVE
#define SIMDE_NO_INLINE /* compiles many times faster */
#define SIMDE_ENABLE_NATIVE_ALIASES
/* What the kernels use; <simde/x86/avx512.h> takes ten times as long. */
#include <simde/x86/avx512/add.h>
#include <simde/x86/avx512/and.h>
#include <simde/x86/avx512/cast.h>
#include <simde/x86/avx512/div.h>
#include <simde/x86/avx512/dpbusd.h>
#include <simde/x86/avx512/loadu.h>
#include <simde/x86/avx512/max.h>
#include <simde/x86/avx512/min.h>
#include <simde/x86/avx512/mul.h>
#include <simde/x86/avx512/mullo.h>
#include <simde/x86/avx512/or.h>
#include <simde/x86/avx512/set1.h>
#include <simde/x86/avx512/setzero.h>
#include <simde/x86/avx512/slli.h>
#include <simde/x86/avx512/srli.h>
#include <simde/x86/avx512/storeu.h>
#include <simde/x86/avx512/sub.h>
#include <simde/x86/avx512/xor.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef simde__mmask16 __mmask16;

static inline float emulated_f32_from_f16(uint16_t h)
{
    int exponent = h >> 10 & 31, fraction = h & 1023;
    float x = exponent == 31  ? (fraction ? NAN : INFINITY)
              : exponent == 0 ? ldexpf((float)fraction, -24)
                              : ldexpf((float)(1024 + fraction), exponent - 25);
    return h >> 15 ? -x : x;
}

/* Nearest even; INT32_MIN where the value does not fit, as the instruction has it. */
static inline int32_t emulated_i32_from_f32(float x)
{
    return x >= -0x1p31f && x < 0x1p31f ? (int32_t)lrintf(x) : INT32_MIN;
}

static inline simde__m512 emulated_cvtph_ps(simde__m256i a)
{
    uint16_t in[16];
    float out[16];
    simde__m512 r;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++)
        out[i] = emulated_f32_from_f16(in[i]);
    memcpy(&r, out, sizeof r);
    return r;
}

/* Nearest even, which is what the rounding operand says; a NaN stays quiet with its upper bits. */
static inline uint16_t emulated_f16_from_f32(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    double m = fabs((double)x);
    if (isnan(x))
        return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x1ff));
    if (m >= 65520.0) /* halfway between the largest and what would follow it */
        return (uint16_t)(sign | 0x7c00);
    int exponent;
    frexp(m, &exponent); /* m = f * 2^exponent, f in [0.5, 1) */
    exponent = exponent < -13 ? -13 : exponent;
    /* Whole units of the last place; the next binade follows by itself. */
    long units = lrint(ldexp(m, 11 - exponent));
    return (uint16_t)(sign | (((exponent + 13) << 10) + units));
}

static inline simde__m256i emulated_cvtps_ph(simde__m512 a)
{
    float in[16];
    uint16_t out[16];
    simde__m256i r;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++)
        out[i] = emulated_f16_from_f32(in[i]);
    memcpy(&r, out, sizeof r);
    return r;
}

static inline simde__m512i emulated_cvtps_epi32(simde__m512 a)
{
    float in[16];
    int32_t out[16];
    simde__m512i r;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++)
        out[i] = emulated_i32_from_f32(in[i]);
    memcpy(&r, out, sizeof r);
    return r;
}

static inline simde__m512 emulated_cvtepi32_ps(simde__m512i a)
{
    int32_t in[16];
    float out[16];
    simde__m512 r;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++)
        out[i] = (float)in[i];
    memcpy(&r, out, sizeof r);
    return r;
}

static inline simde__m512i emulated_cvtepi8_epi32(simde__m128i a)
{
    int8_t in[16];
    int32_t out[16];
    simde__m512i r;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++)
        out[i] = in[i];
    memcpy(&r, out, sizeof r);
    return r;
}

static inline simde__m512i emulated_cvtepu16_epi32(simde__m256i a)
{
    uint16_t in[16];
    uint32_t out[16];
    simde__m512i r;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++)
        out[i] = in[i];
    memcpy(&r, out, sizeof r);
    return r;
}

/* Truncates, where packs would saturate. */
static inline simde__m128i emulated_cvtepi32_epi8(simde__m512i a)
{
    uint32_t in[16];
    uint8_t out[16];
    simde__m128i r;
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++)
        out[i] = (uint8_t)in[i];
    memcpy(&r, out, sizeof r);
    return r;
}

/* Each bit is the bit of imm8 that the three operands' bits, a's above b's above c's, number. */
static inline simde__m512i emulated_ternarylogic_epi32(simde__m512i a, simde__m512i b,
                                                       simde__m512i c, int imm8)
{
    uint32_t x[16], y[16], z[16], out[16] = {0};
    simde__m512i r;
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    memcpy(z, &c, sizeof z);
    for (int i = 0; i < 16; i++)
        for (int n = 0; n < 8; n++)
            if (imm8 >> n & 1)
                out[i] |= (n & 4 ? x[i] : ~x[i]) & (n & 2 ? y[i] : ~y[i]) & (n & 1 ? z[i] : ~z[i]);
    memcpy(&r, out, sizeof r);
    return r;
}

static inline simde__mmask64 emulated_cvtu64_mask64(uint64_t a)
{
    return a;
}

/* Touches no byte of a lane that is masked out. */
static inline void emulated_mask_storeu_ps(void *p, simde__mmask16 mask, simde__m512 a)
{
    float in[16];
    memcpy(in, &a, sizeof in);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1)
            memcpy((char *)p + 4 * i, &in[i], 4);
}

#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated_cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) emulated_cvtps_ph(a)
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 emulated_ternarylogic_epi32
#undef _cvtu64_mask64
#define _cvtu64_mask64 emulated_cvtu64_mask64
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps

#endif
