/* SPDX-License-Identifier: Apache-2.0 */
/*
 * 16 float lanes as a group of four RVV 1.0 registers, at whatever length these have: 128 bits are
 * what V promises, and every instruction says that it means 16 elements.  The names are those that
 * lanes/ is written in, except that no array or structure can hold such lanes.
 *
 * No vfmacc and its kin: they are fused.  No vfredusum: its order is the machine's.  f16 is
 * converted with integers, as V alone has no instruction for it.
 */
#ifndef SPK_LANES_H
#define SPK_LANES_H

#if !defined(__riscv_v_intrinsic) || __riscv_v_intrinsic < 11000
#error "the RVV kernels need a compiler with the intrinsics of RVV 1.0, such as clang 17 or gcc 14"
#endif
#include <riscv_vector.h>

#include "spk_scalar_math.h"

#define SPK_LANES_SIZELESS 1
#define SPK_LANES_QUERIES 4 /* queries of attention at a time */
#define SPK_LANES_VALUE_CHUNKS 1
#define LANES 16

/* DO(0) to DO(n - 1) where n, at most 4, is a constant: such lanes have names instead of indices. */
#define EACH_OF(n, DO) \
    do {               \
        DO(0);         \
        if ((n) > 1) { \
            DO(1);     \
        }              \
        if ((n) > 2) { \
            DO(2);     \
        }              \
        if ((n) > 3) { \
            DO(3);     \
        }              \
    } while (0)

typedef vfloat32m4_t lanes;

static inline lanes l_add(lanes x, lanes y) { return __riscv_vfadd_vv_f32m4(x, y, LANES); }
static inline lanes l_sub(lanes x, lanes y) { return __riscv_vfsub_vv_f32m4(x, y, LANES); }
static inline lanes l_mul(lanes x, lanes y) { return __riscv_vfmul_vv_f32m4(x, y, LANES); }
static inline lanes l_div(lanes x, lanes y) { return __riscv_vfdiv_vv_f32m4(x, y, LANES); }
static inline lanes l_scale(lanes x, float y) { return __riscv_vfmul_vf_f32m4(x, y, LANES); }
static inline lanes l_set1(float x) { return __riscv_vfmv_v_f_f32m4(x, LANES); }
static inline lanes l_load(const float *p) { return __riscv_vle32_v_f32m4(p, LANES); }
static inline void l_store(float *p, lanes x) { __riscv_vse32_v_f32m4(p, x, LANES); }
static inline lanes l_abs(lanes x) { return __riscv_vfabs_v_f32m4(x, LANES); }

/* The second operand where they are equal or one is a NaN, like `x > y ? x : y` of the plain
 * kernels; vfmax and vfmin order zeros and drop NaNs. */
static inline lanes l_max(lanes x, lanes y)
{
    return __riscv_vmerge_vvm_f32m4(y, x, __riscv_vmfgt_vv_f32m4_b8(x, y, LANES), LANES);
}

static inline lanes l_min(lanes x, lanes y)
{
    return __riscv_vmerge_vvm_f32m4(y, x, __riscv_vmflt_vv_f32m4_b8(x, y, LANES), LANES);
}

/* 2^n for integral n in [-126, 127]. */
static inline lanes l_pow2(lanes n)
{
    vint32m4_t e = __riscv_vadd_vx_i32m4(__riscv_vfcvt_x_f_v_i32m4(n, LANES), 127, LANES);
    return __riscv_vreinterpret_v_i32m4_f32m4(__riscv_vsll_vx_i32m4(e, 23, LANES));
}

/* 16 integral lanes in [-128, 127] as int8. */
static inline void l_store_i8(uint8_t *p, lanes x)
{
    vint16m2_t w = __riscv_vncvt_x_x_w_i16m2(__riscv_vfcvt_x_f_v_i32m4(x, LANES), LANES);
    __riscv_vse8_v_i8m1((int8_t *)p, __riscv_vncvt_x_x_w_i8m1(w, LANES), LANES);
}

/* The sum of 16 int8. */
static inline int32_t l_sum_i8(const uint8_t *p)
{
    vint8m1_t x = __riscv_vle8_v_i8m1((const int8_t *)p, LANES);
    vint16m1_t zero = __riscv_vmv_s_x_i16m1(0, 1);
    return __riscv_vmv_x_s_i16m1_i16(__riscv_vwredsum_vs_i8m1_i16m1(x, zero, LANES));
}

/* Exact.  The half's exponent and fraction in their places, its sign in its own: what is missing is
 * a factor of 2^112, which makes subnormals normal. */
static inline lanes from_finite_halves(vuint16m2_t h)
{
    vint32m4_t x = __riscv_vsext_vf2_i32m4(__riscv_vreinterpret_v_u16m2_i16m2(h), LANES);
    x = __riscv_vand_vx_i32m4(__riscv_vsll_vx_i32m4(x, 13, LANES), (int32_t)0x8fffe000, LANES);
    return l_scale(__riscv_vreinterpret_v_i32m4_f32m4(x), 0x1p112f);
}

static inline lanes from_halves(vuint16m2_t h)
{
    vuint16m2_t exponent = __riscv_vand_vx_u16m2(h, 0x7c00, LANES);
    vbool8_t special = __riscv_vmseq_vx_u16m2_b8(exponent, 0x7c00, LANES);
    vint32m4_t x = __riscv_vreinterpret_v_f32m4_i32m4(from_finite_halves(h));
    x = __riscv_vor_vx_i32m4_mu(special, x, x, 0x7f800000, LANES);
    return __riscv_vreinterpret_v_i32m4_f32m4(x);
}

static inline lanes l_load_f16(const uint16_t *p)
{
    return from_halves(__riscv_vle16_v_u16m2(p, LANES));
}

/* Of keys and values, of which kv_append lets none pass that is not finite. */
static inline lanes l_load_finite_f16(const uint16_t *p)
{
    return from_finite_halves(__riscv_vle16_v_u16m2(p, LANES));
}

static inline lanes l_load_bf16(const uint16_t *p)
{
    vuint32m4_t x = __riscv_vzext_vf2_u32m4(__riscv_vle16_v_u16m2(p, LANES), LANES);
    return __riscv_vreinterpret_v_u32m4_f32m4(__riscv_vsll_vx_u32m4(x, 16, LANES));
}

/* Nearest even, as spk_f32_to_f16 does it. */
static inline void l_store_f16(uint16_t *p, lanes x)
{
    const uint32_t half = 0x3f000000; /* the bits of 0.5 */
    vuint32m4_t u = __riscv_vreinterpret_v_f32m4_u32m4(x);
    vuint32m4_t sign = __riscv_vand_vx_u32m4(__riscv_vsrl_vx_u32m4(u, 16, LANES), 0x8000, LANES);
    vuint32m4_t mag = __riscv_vand_vx_u32m4(u, 0x7fffffff, LANES);
    vuint32m4_t odd = __riscv_vand_vx_u32m4(__riscv_vsrl_vx_u32m4(mag, 13, LANES), 1, LANES);
    vuint32m4_t h = __riscv_vadd_vv_u32m4(mag, odd, LANES);
    h = __riscv_vsrl_vx_u32m4(__riscv_vadd_vx_u32m4(h, 0xfff - 0x38000000, LANES), 13, LANES);
    /* Below 2^-14: adding 0.5 aligns the f16 subnormal grid. */
    lanes aligned = __riscv_vfadd_vf_f32m4(__riscv_vreinterpret_v_u32m4_f32m4(mag), 0.5f, LANES);
    vuint32m4_t small =
        __riscv_vsub_vx_u32m4(__riscv_vreinterpret_v_f32m4_u32m4(aligned), half, LANES);
    h = __riscv_vmerge_vvm_u32m4(h, small, __riscv_vmsltu_vx_u32m4_b8(mag, 0x38800000, LANES),
                                 LANES);
    /* What rounds to 65536 or more, then NaN. */
    h = __riscv_vmerge_vxm_u32m4(h, 0x7c00, __riscv_vmsgeu_vx_u32m4_b8(mag, 0x477ff000, LANES),
                                 LANES);
    h = __riscv_vmerge_vxm_u32m4(h, 0x7e00, __riscv_vmsgtu_vx_u32m4_b8(mag, 0x7f800000, LANES),
                                 LANES);
    h = __riscv_vor_vv_u32m4(h, sign, LANES);
    __riscv_vse16_v_u16m2(p, __riscv_vncvt_x_x_w_u16m2(h, LANES), LANES);
}

/* For work that is no lanes: the compiler's own vector of 16 floats, to and from f16. */
#define SPK_REGISTER_BYTES 64

typedef float sixteen __attribute__((vector_size(SPK_REGISTER_BYTES)));

static inline sixteen r_load_f16(const uint16_t *p)
{
    sixteen x;
    l_store((float *)&x, l_load_f16(p));
    return x;
}

static inline void r_store_f16(uint16_t *p, sixteen x)
{
    l_store_f16(p, l_load((const float *)&x));
}

#endif
