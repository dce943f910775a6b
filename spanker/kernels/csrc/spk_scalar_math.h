/* SPDX-License-Identifier: Apache-2.0 */
/* f16 conversion, exp and rint in plain C: the same bits as reference.py on any machine. */
#ifndef SPK_SCALAR_MATH_H
#define SPK_SCALAR_MATH_H

#include <stdint.h>
#include <string.h>

static inline uint32_t spk_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float spk_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* True for NaN and infinities. */
static inline int spk_nonfinite(float x)
{
    return (spk_bits(x) & 0x7f800000u) == 0x7f800000u;
}

/* Exact: every f16 is a float.  Subnormals become normal by the multiplication. */
static inline float spk_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t mag = (uint32_t)(h & 0x7fffu) << 13;
    if ((h & 0x7c00u) == 0x7c00u)
        return spk_float(sign | 0x7f800000u | mag);
    return spk_float(sign | spk_bits(spk_float(mag) * 0x1p112f));
}

/* Round to nearest even; overflow gives infinity, which callers report. */
static inline uint16_t spk_f32_to_f16(float x)
{
    uint32_t u = spk_bits(x), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
    if (mag >= 0x7f800000u)
        return (uint16_t)(sign | 0x7c00u | (mag > 0x7f800000u ? 0x200u : 0));
    if (mag >= 0x477ff000u) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00u);
    if (mag < 0x38800000u) { /* below 2^-14: adding 0.5 aligns the f16 subnormal grid */
        float f = spk_float(mag) + 0.5f;
        return (uint16_t)(sign | (spk_bits(f) - 0x3f000000u));
    }
    uint32_t odd = (mag >> 13) & 1u;
    return (uint16_t)(sign | ((mag - 0x38000000u + 0xfffu + odd) >> 13));
}

/* |x| < 2^22: the addition rounds to an integer, ties to even. */
static inline float spk_rint(float x)
{
    return (x + 12582912.0f) - 12582912.0f;
}

/* Cephes' expf by Horner with every operation rounded; the argument is clamped. */
#define SPK_EXP_MIN -87.0f
#define SPK_EXP_MAX 88.0f
#define SPK_EXP_LOG2E 1.44269504088896341f
#define SPK_EXP_LN2_HI 0.693359375f
#define SPK_EXP_LN2_LO -2.12194440e-4f
#define SPK_EXP_P0 1.9875691500e-4f
#define SPK_EXP_P1 1.3981999507e-3f
#define SPK_EXP_P2 8.3334519073e-3f
#define SPK_EXP_P3 4.1665795894e-2f
#define SPK_EXP_P4 1.6666665459e-1f
#define SPK_EXP_P5 5.0000001201e-1f

static inline float spk_expf(float x)
{
    x = x > SPK_EXP_MIN ? x : SPK_EXP_MIN; /* a NaN too: its conversion below has no meaning */
    x = x < SPK_EXP_MAX ? x : SPK_EXP_MAX;
    float n = spk_rint(x * SPK_EXP_LOG2E);
    float r = (x - n * SPK_EXP_LN2_HI) - n * SPK_EXP_LN2_LO;
    float p = SPK_EXP_P0;
    p = p * r + SPK_EXP_P1;
    p = p * r + SPK_EXP_P2;
    p = p * r + SPK_EXP_P3;
    p = p * r + SPK_EXP_P4;
    p = p * r + SPK_EXP_P5;
    float y = (p * (r * r) + r) + 1.0f;
    return y * spk_float((uint32_t)((int32_t)n + 127) << 23);
}

/* The fixed tree over 16 lanes: halves are added, 8 + 8, 4 + 4, 2 + 2, 1 + 1. */
static inline float spk_tree16(const float lane[16])
{
    float t[8];
    for (int i = 0; i < 8; i++)
        t[i] = lane[i] + lane[i + 8];
    for (int i = 0; i < 4; i++)
        t[i] = t[i] + t[i + 4];
    for (int i = 0; i < 2; i++)
        t[i] = t[i] + t[i + 2];
    return t[0] + t[1];
}

#endif
