/* SPDX-License-Identifier: Apache-2.0 */
/* One element of the bulk operations, in plain C: docs/api/kernel-semantics.md says the same in
 * words, reference.py in numpy.  Elements of 16 bits are folded as the floats that they are. */
#ifndef SPK_ELEMENTS_H
#define SPK_ELEMENTS_H

#include "spk_scalar_math.h"

#define SPK_NAN_BITS 0x7fc00000u

static inline float spk_canonical(float x)
{
    return x == x ? x : spk_float(SPK_NAN_BITS);
}

static inline float spk_bf16_to_f32(uint16_t h)
{
    return spk_float((uint32_t)h << 16);
}

/* Round to nearest even.  A canonical NaN stays one: nothing but zeros is dropped of it. */
static inline uint16_t spk_f32_to_bf16(float x)
{
    uint32_t u = spk_bits(x);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* Ordered as the floats are, NaNs at the ends, -0 below +0. */
static inline int32_t spk_order(float x)
{
    int32_t u = (int32_t)spk_bits(x);
    return u ^ (u >> 31 & 0x7fffffff);
}

static inline float spk_sum_f32(float a, float b)
{
    return spk_canonical(a + b);
}

static inline float spk_max_f32(float a, float b)
{
    float r = spk_order(a) > spk_order(b) ? a : b;
    return a == a && b == b ? r : spk_float(SPK_NAN_BITS);
}

static inline float spk_min_f32(float a, float b)
{
    float r = spk_order(a) < spk_order(b) ? a : b;
    return a == a && b == b ? r : spk_float(SPK_NAN_BITS);
}

static inline int32_t spk_sum_i32(int32_t a, int32_t b)
{
    return (int32_t)((uint32_t)a + (uint32_t)b);
}

static inline int32_t spk_max_i32(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

static inline int32_t spk_min_i32(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

/* Towards zero.  Exact: a quotient that is no integer is at least 1/65536 away from one, and the
 * double nearest to it at most 2^-23 from it. */
static inline int32_t spk_divide_i32(int32_t a, uint32_t by)
{
    return (int32_t)((double)a / (double)by);
}

#endif
