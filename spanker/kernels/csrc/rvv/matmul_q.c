/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantised matmuls with RVV 1.0, at any length of its registers.  The lanes of a vector are the 16
 * rows of a tile: 64 bytes, 4 weights of each row, are narrowed twice into four columns of 16 bytes,
 * each of which is multiplied by one activation, a scalar, and added up in int16.  V alone has no dot
 * product, and a segmented load, which would make the columns by itself, is slow on some cores.
 *
 * Unsigned nibbles times activations are at most 15 * 127, so the 16 of a half block sum to 30,480
 * and stay in int16: one widening per half.  With a fifth bit 8 of them do (31,496), the 4 + 4 of a
 * group; of six bits the 4 of half a group (32,004), which the scale then widens; of bytes two (2 *
 * 128 * 127 = 32,512).  What weights are stored too large by is taken off through the sums of the
 * activations.
 *
 * Counted for 16 rows and one q4_0 block, 288 bytes: for one token 108 vector instructions, of which 32
 * multiply and add, 24 narrow and 32 split nibbles; for four tokens 236, of which 128 multiply and
 * add.  Their sums take 16 registers of 32 at 128 bits, columns and what they are made of 12; so the
 * float sums of several tokens are in memory, one load and store a block.
 */
#include <string.h>

#include "lanes.h"
#include "spk_kernels.h"
#include "spk_tiles.h"

#define GROUP SPK_Q8_GROUP
#define ALWAYS_INLINE static inline __attribute__((always_inline))

_Static_assert(GROUP == 4, "tokens have names");

/* What follows is not begun before `v` is known.  A compiler that starts all columns of a block at
 * once runs out of registers, and spills what it has just made. */
#define AFTER(v) __asm__ volatile("" : "+vr"(v))

/* 16 rows x 4 weights as bytes; alignment is nobody's promise. */
ALWAYS_INLINE vuint8m4_t load_words(const uint8_t *p)
{
    return __riscv_vle8_v_u8m4(p, 4 * LANES);
}

/* Byte c of every word, rows in order. */
ALWAYS_INLINE vuint8m1_t column(vuint8m4_t words, int c)
{
    vuint32m4_t w = __riscv_vreinterpret_v_u8m4_u32m4(words);
    vuint16m2_t pair = __riscv_vnsrl_wx_u16m2(w, (size_t)(c / 2 * 16), LANES);
    return __riscv_vnsrl_wx_u8m1(pair, (size_t)(c % 2 * 8), LANES);
}

/* 16 where the fifth bits at p are set. */
ALWAYS_INLINE vuint8m4_t fifth_bits(const uint8_t *p)
{
    vbool2_t set = __riscv_vlm_v_b2(p, 4 * LANES);
    return __riscv_vmerge_vxm_u8m4(__riscv_vmv_v_x_u8m4(0, 4 * LANES), 16, set, 4 * LANES);
}

/* The two upper bits that words g have at p, in their places. */
ALWAYS_INLINE vuint8m4_t upper_bits(const uint8_t *p, int g)
{
    vuint8m4_t bits = load_words(p);
    if (g < 2)
        bits = __riscv_vsll_vx_u8m4(bits, (size_t)(4 - 2 * g), 4 * LANES);
    else if (g > 2)
        bits = __riscv_vsrl_vx_u8m4(bits, 2, 4 * LANES);
    return __riscv_vand_vx_u8m4(bits, 0x30, 4 * LANES);
}

/* Column c of group g of a block's weights, or (high) of group g + 4; unsigned but for bytes. */
ALWAYS_INLINE vuint8m1_t weights(struct spk_tiling f, const struct spk_block_at *at, int g, int c,
                                 int high)
{
    if (f.bytes)
        return column(load_words(at->words + high * 256 + g * 64), c);
    vuint8m1_t w = column(load_words(at->words + g * 64), c);
    w = high ? __riscv_vsrl_vx_u8m1(w, 4, LANES) : __riscv_vand_vx_u8m1(w, 15, LANES);
    if (f.fifth)
        w = __riscv_vor_vv_u8m1(w, column(fifth_bits(at->fifth + high * 32 + g * 8), c), LANES);
    if (f.six)
        w = __riscv_vor_vv_u8m1(w, column(upper_bits(at->upper + high * 64, g), c), LANES);
    return w;
}

ALWAYS_INLINE vint16m2_t add_product(struct spk_tiling f, vint16m2_t sum, vuint8m1_t w, int8_t x)
{
    if (f.bytes)
        return __riscv_vwmacc_vx_i16m2(sum, x, __riscv_vreinterpret_v_u8m1_i8m1(w), LANES);
    return __riscv_vwmaccsu_vx_i16m2(sum, x, w, LANES);
}

/* What a token's dot products start at: minus the offset times the sum of its activations. */
ALWAYS_INLINE vint32m4_t start(struct spk_tiling f, vint16m2_t first, vint16m2_t second,
                               const struct spk_q8_block *x)
{
    if (!f.six)
        return __riscv_vmv_v_x_i32m4(f.offset ? x->minus_sum * (1 << f.offset) : 0, LANES);
    int16_t low = (int16_t)x->minus_first, high = (int16_t)(x->minus_sum - x->minus_first);
    vint32m4_t sum = __riscv_vwmul_vx_i32m4(first, low, LANES);
    sum = __riscv_vwmacc_vx_i32m4(sum, high, second, LANES);
    return __riscv_vsll_vx_i32m4(sum, (size_t)f.offset, LANES);
}

/* int32 dot products of the 16 rows with one block of n tokens, offsets taken off: nibbles. */
ALWAYS_INLINE void dots_nibbles(struct spk_tiling f, const struct spk_block_at *at,
                                const struct spk_q8_block *x, int n, vint32m4_t *dot0,
                                vint32m4_t *dot1, vint32m4_t *dot2, vint32m4_t *dot3)
{
    vint16m2_t zero = __riscv_vmv_v_x_i16m2(0, LANES);
    vint16m2_t low0 = zero, low1 = zero, low2 = zero, low3 = zero;
    vint16m2_t high0 = zero, high1 = zero, high2 = zero, high3 = zero;
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            vuint8m1_t low = weights(f, at, g, c, 0), high = weights(f, at, g, c, 1);
#define ADD(j)                                                      \
    low##j = add_product(f, low##j, low, x[j].qs[4 * g + c]);       \
    high##j = add_product(f, high##j, high, x[j].qs[16 + 4 * g + c])
            EACH_OF(n, ADD);
#undef ADD
        }
#define HOLD(j)    \
    AFTER(low##j); \
    AFTER(high##j)
        if (n > 2)
            EACH_OF(n, HOLD);
#undef HOLD
    }
#define JOIN(j)                                               \
    *dot##j = __riscv_vwadd_vv_i32m4(low##j, high##j, LANES); \
    if (f.offset)                                             \
        *dot##j = __riscv_vadd_vx_i32m4(*dot##j, x[j].minus_sum * (1 << f.offset), LANES)
    EACH_OF(n, JOIN);
#undef JOIN
}

/* The same of wider weights, whose sums leave int16 sooner. */
ALWAYS_INLINE void dots_wide(struct spk_tiling f, const struct spk_block_at *at,
                             const struct spk_q8_block *x, int n, vint32m4_t *dot0,
                             vint32m4_t *dot1, vint32m4_t *dot2, vint32m4_t *dot3)
{
    vint16m2_t zero = __riscv_vmv_v_x_i16m2(0, LANES), first = zero, second = zero;
    vint16m2_t sum0 = zero, sum1 = zero, sum2 = zero, sum3 = zero;
    if (f.six) {
        const int8_t *scales = (const int8_t *)at->scales;
        first = __riscv_vsext_vf2_i16m2(__riscv_vle8_v_i8m1(scales, LANES), LANES);
        second = __riscv_vsext_vf2_i16m2(__riscv_vle8_v_i8m1(scales + 16, LANES), LANES);
    }
#define START(j) *dot##j = start(f, first, second, &x[j])
    EACH_OF(n, START);
#undef START
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
#pragma GCC unroll 2
        for (int high = 0; high < 2; high++) {
            vint16m2_t scale = high ? second : first;
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                vuint8m1_t w = weights(f, at, g, c, high);
#define ADD(j) sum##j = add_product(f, sum##j, w, x[j].qs[16 * high + 4 * g + c])
                EACH_OF(n, ADD);
#undef ADD
                if (f.bytes ? c % 2 == 0 : c < 3 || (f.fifth && !high))
                    continue;
#define WIDEN(j)                                                            \
    *dot##j = f.six ? __riscv_vwmacc_vv_i32m4(*dot##j, sum##j, scale, LANES) \
                    : __riscv_vwadd_wv_i32m4(*dot##j, sum##j, LANES);       \
    sum##j = zero
                EACH_OF(n, WIDEN);
#undef WIDEN
#define HOLD(j) AFTER(*dot##j)
                if (n > 2)
                    EACH_OF(n, HOLD);
#undef HOLD
            }
        }
    }
}

/* Scales and minima of a super-block's eight blocks, 16 rows each. */
struct super {
    float d[8][16], m[8][16];
};

ALWAYS_INLINE vuint32m4_t shifted(vuint32m4_t x, int by, uint32_t mask)
{
    return __riscv_vand_vx_u32m4(__riscv_vsrl_vx_u32m4(x, (size_t)by, LANES), mask, LANES);
}

/* The four bytes of each row's word, times that row's scale. */
ALWAYS_INLINE void scaled_bytes(lanes scale, vuint32m4_t words, float out[4][16])
{
    for (int j = 0; j < 4; j++) {
        lanes byte = __riscv_vfcvt_f_xu_v_f32m4(shifted(words, 8 * j, 255), LANES);
        l_store(out[j], l_mul(scale, byte));
    }
}

ALWAYS_INLINE lanes load_halves(const uint8_t *p)
{
    vuint8m2_t bytes = __riscv_vle8_v_u8m2(p, 2 * LANES);
    return from_halves(__riscv_vreinterpret_v_u8m2_u16m2(bytes));
}

ALWAYS_INLINE void super_scales(const struct spk_block_at *at, struct super *s)
{
    const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x30303030;
    vuint32m4_t w0 = __riscv_vreinterpret_v_u8m4_u32m4(load_words(at->scales));
    vuint32m4_t w1 = __riscv_vreinterpret_v_u8m4_u32m4(load_words(at->scales + 64));
    vuint32m4_t w2 = __riscv_vreinterpret_v_u8m4_u32m4(load_words(at->scales + 128));
    lanes d = load_halves(at->d), m = load_halves(at->m);
    scaled_bytes(d, shifted(w0, 0, six), s->d);
    scaled_bytes(d, __riscv_vor_vv_u32m4(shifted(w2, 0, four), shifted(w0, 2, two), LANES),
                 s->d + 4);
    scaled_bytes(m, shifted(w1, 0, six), s->m);
    scaled_bytes(m, __riscv_vor_vv_u32m4(shifted(w2, 4, four), shifted(w1, 2, two), LANES),
                 s->m + 4);
}

/* `acc` and one block of a token. */
ALWAYS_INLINE lanes add_block(struct spk_tiling f, lanes acc, lanes dw, lanes mw, vint32m4_t dot,
                              const struct spk_q8_block *x)
{
    lanes term = l_scale(dw, x->d);
    acc = l_add(acc, l_mul(term, __riscv_vfcvt_f_x_v_f32m4(dot, LANES)));
    if (f.minima) {
        term = l_scale(l_scale(mw, x->d), x->sum);
        acc = f.super ? l_sub(acc, term) : l_add(acc, term);
    }
    return acc;
}

/* One tile against a group of n tokens. */
ALWAYS_INLINE void tile_group(struct spk_tiling f, const uint8_t *tile,
                              const struct spk_q8_block *x, size_t blocks, int n, float *out,
                              size_t out_stride, size_t rows)
{
    const int scaled = f.super && !f.six;
    struct super super;
    float acc[GROUP][16] = {0};
    lanes acc_of_one = l_set1(0.0f);
    for (size_t b = 0; b < blocks; b++, x += n) {
        struct spk_block_at at = spk_locate(f, tile, blocks, b);
        vint32m4_t dot0 = __riscv_vmv_v_x_i32m4(0, LANES), dot1 = dot0, dot2 = dot0, dot3 = dot0;
        lanes dw, mw = l_set1(0.0f);
        if (f.bytes || f.fifth || f.six)
            dots_wide(f, &at, x, n, &dot0, &dot1, &dot2, &dot3);
        else
            dots_nibbles(f, &at, x, n, &dot0, &dot1, &dot2, &dot3);
        if (scaled) {
            if (b % 8 == 0)
                super_scales(&at, &super);
            dw = l_load(super.d[b % 8]);
            mw = l_load(super.m[b % 8]);
        } else {
            dw = load_halves(at.d);
            if (f.minima)
                mw = load_halves(at.m);
        }
#define ADD(j) l_store(acc[j], add_block(f, l_load(acc[j]), dw, mw, dot##j, &x[j]))
        if (n == 1)
            acc_of_one = add_block(f, acc_of_one, dw, mw, dot0, x);
        else
            EACH_OF(n, ADD);
#undef ADD
    }
    if (n == 1)
        l_store(acc[0], acc_of_one);
    for (int j = 0; j < n; j++)
        memcpy(out + (size_t)j * out_stride, acc[j], (rows < 16 ? rows : 16) * sizeof *acc[j]);
}

#define SPK_ISA rvv
#include "../matmul_q.inc.h"
