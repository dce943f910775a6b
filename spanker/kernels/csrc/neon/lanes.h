/* SPDX-License-Identifier: Apache-2.0 */
/* 16 float lanes as four NEON registers; the names are those that lanes/ is written in.
 *
 * No vmlaq_f32 and no vfmaq_f32: the first may be fused, the second is. */
#ifndef SPK_LANES_H
#define SPK_LANES_H

#include <arm_neon.h>

#include "spk_scalar_math.h"

#define SPK_LANES_QUERIES 4 /* queries of attention at a time */
#define SPK_LANES_VALUE_CHUNKS 1

typedef struct {
    float32x4_t a, b, c, d;
} lanes;

#define LANES_BINARY(name, f)                                                       \
    static inline lanes name(lanes x, lanes y)                                      \
    {                                                                               \
        return (lanes){f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)};         \
    }
LANES_BINARY(l_add, vaddq_f32)
LANES_BINARY(l_sub, vsubq_f32)
LANES_BINARY(l_mul, vmulq_f32)
LANES_BINARY(l_div, vdivq_f32)

/* The second operand where they are equal or one is a NaN, like `x > y ? x : y` of the plain
 * kernels; fmax and fmin order zeros and keep NaNs. */
static inline float32x4_t greater_else_second(float32x4_t x, float32x4_t y)
{
    return vbslq_f32(vcgtq_f32(x, y), x, y);
}

static inline float32x4_t less_else_second(float32x4_t x, float32x4_t y)
{
    return vbslq_f32(vcltq_f32(x, y), x, y);
}

LANES_BINARY(l_max, greater_else_second)
LANES_BINARY(l_min, less_else_second)
#undef LANES_BINARY

static inline lanes l_set1(float x)
{
    float32x4_t v = vdupq_n_f32(x);
    return (lanes){v, v, v, v};
}

static inline lanes l_load(const float *p)
{
    return (lanes){vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}

static inline void l_store(float *p, lanes x)
{
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}

static inline lanes l_load_f16(const uint16_t *p)
{
    float16x8_t lo = vreinterpretq_f16_u16(vld1q_u16(p));
    float16x8_t hi = vreinterpretq_f16_u16(vld1q_u16(p + 8));
    return (lanes){vcvt_f32_f16(vget_low_f16(lo)), vcvt_high_f32_f16(lo),
                   vcvt_f32_f16(vget_low_f16(hi)), vcvt_high_f32_f16(hi)};
}

static inline lanes l_abs(lanes x)
{
    return (lanes){vabsq_f32(x.a), vabsq_f32(x.b), vabsq_f32(x.c), vabsq_f32(x.d)};
}

static inline float32x4_t pow2(float32x4_t n)
{
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}

/* 2^n for integral n in [-126, 127]. */
static inline lanes l_pow2(lanes n)
{
    return (lanes){pow2(n.a), pow2(n.b), pow2(n.c), pow2(n.d)};
}

/* 16 integral lanes in [-128, 127] as int8. */
static inline void l_store_i8(uint8_t *p, lanes x)
{
    int16x8_t lo = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(x.a)), vmovn_s32(vcvtnq_s32_f32(x.b)));
    int16x8_t hi = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(x.c)), vmovn_s32(vcvtnq_s32_f32(x.d)));
    vst1q_u8(p, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(lo), vmovn_s16(hi))));
}

/* The sum of 16 int8. */
static inline int32_t l_sum_i8(const uint8_t *p)
{
    return vaddlvq_s8(vreinterpretq_s8_u8(vld1q_u8(p)));
}

static inline float32x4_t upper_half(uint16x4_t h)
{
    return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}

static inline lanes l_load_bf16(const uint16_t *p)
{
    uint16x8_t lo = vld1q_u16(p), hi = vld1q_u16(p + 8);
    return (lanes){upper_half(vget_low_u16(lo)), upper_half(vget_high_u16(lo)),
                   upper_half(vget_low_u16(hi)), upper_half(vget_high_u16(hi))};
}

/* For work that is no lanes: a register of floats to and from f16, nearest even. */
#define SPK_REGISTER_BYTES 16

static inline float32x4_t r_load_f16(const uint16_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

static inline void r_store_f16(uint16_t *p, float32x4_t x)
{
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}

#endif
