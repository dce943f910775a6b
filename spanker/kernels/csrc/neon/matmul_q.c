/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantised matmuls with NEON's dot products.  A register holds 4 rows x 4 weights, four of them a
 * tile's width; sdot multiplies signed bytes and accumulates in int32, and takes the word of four
 * activations from a lane of a register, so a block of activations is two registers and nothing is
 * broadcast.  Unsigned weights of up to six bits are signed bytes as they are.  Those stored too
 * large by an offset are corrected by starting the dot product at minus the offset times the sum
 * of the activations.
 *
 * Sketch for one token, 16 rows and one q4_0 block: 288 bytes against about 130 instructions, of
 * which 32 sdot, 32 to unpack, 24 for floats and 22 loads.  The first three kinds are 44 cycles on
 * two vector pipes (Neoverse N1) and 22 on four (V1): 7 and 13 bytes a cycle.  For four tokens:
 * 128 sdot, 32 to unpack, 84 for floats: half of the sdot peak.  A register of rows is done with
 * before the next begins, so the 16 sums of four tokens stay in registers.
 */
#include <arm_neon.h>
#include <string.h>

#include "spk_kernels.h"
#include "spk_tiles.h"

#define GROUP SPK_Q8_GROUP
#define QUARTERS 4 /* registers of 4 rows */
#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE float32x4_t halves(const uint8_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}

/* A compiler wants a literal for the lane even where g becomes one by unrolling. */
ALWAYS_INLINE int32x4_t dot_word(int32x4_t sum, uint8x16_t w, int8x16_t x, int g)
{
    int8x16_t s = vreinterpretq_s8_u8(w);
    switch (g) {
    case 0: return vdotq_laneq_s32(sum, s, x, 0);
    case 1: return vdotq_laneq_s32(sum, s, x, 1);
    case 2: return vdotq_laneq_s32(sum, s, x, 2);
    default: return vdotq_laneq_s32(sum, s, x, 3);
    }
}

/* `w`, 4 rows x 4 weights, with the fifth bits at p. */
ALWAYS_INLINE uint8x16_t with_fifth(uint8x16_t w, const uint8_t *p)
{
    /* Byte i needs bit i: spread the two bytes, then look at one bit of each. */
    const uint8x16_t spread = vcombine_u8(vdup_n_u8(0), vdup_n_u8(1));
    const uint8x16_t pick = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u));
    uint8x16_t bits = vreinterpretq_u8_u16(vld1q_dup_u16((const uint16_t *)(const void *)p));
    return vbslq_u8(vdupq_n_u8(16), vtstq_u8(vqtbl1q_u8(bits, spread), pick), w);
}

/* `w` with the two upper bits that words g have in p. */
ALWAYS_INLINE uint8x16_t with_upper(uint8x16_t w, const uint8_t *p, int g)
{
    uint8x16_t bits = vld1q_u8(p);
    switch (g) {
    case 0: bits = vshlq_n_u8(bits, 4); break;
    case 1: bits = vshlq_n_u8(bits, 2); break;
    case 2: break;
    default: bits = vshrq_n_u8(bits, 2); break;
    }
    return vbslq_u8(vdupq_n_u8(0x30), bits, w);
}

/* Weights of group g and g + 4 of a block, rows from 4 * i. */
ALWAYS_INLINE void weights(struct spk_tiling f, const struct spk_block_at *at, size_t i, int g,
                           uint8x16_t *lo, uint8x16_t *hi)
{
    uint8x16_t bytes = vld1q_u8(at->words + g * 64 + i * 16);
    if (f.bytes) {
        *lo = bytes;
        *hi = vld1q_u8(at->words + 256 + g * 64 + i * 16);
        return;
    }
    *lo = vandq_u8(bytes, vdupq_n_u8(15));
    *hi = vshrq_n_u8(bytes, 4);
    if (f.fifth) {
        *lo = with_fifth(*lo, at->fifth + g * 8 + i * 2);
        *hi = with_fifth(*hi, at->fifth + 32 + g * 8 + i * 2);
    }
    if (f.six) {
        *lo = with_upper(*lo, at->upper + i * 16, g);
        *hi = with_upper(*hi, at->upper + 64 + i * 16, g);
    }
}

/* Scales and minima of a super-block's eight blocks, 16 rows each. */
struct super {
    float32x4_t d[8][QUARTERS], m[8][QUARTERS];
};

ALWAYS_INLINE uint32x4_t load_words(const uint8_t *p)
{
    return vreinterpretq_u32_u8(vld1q_u8(p));
}

ALWAYS_INLINE float32x4_t byte_of(uint32x4_t words, int j)
{
    uint32x4_t moved = vshlq_u32(words, vdupq_n_s32(-8 * j));
    return vcvtq_f32_u32(vandq_u32(moved, vdupq_n_u32(255)));
}

ALWAYS_INLINE void super_scales(const struct spk_block_at *at, struct super *s)
{
    const uint32x4_t six = vdupq_n_u32(0x3f3f3f3f), four = vdupq_n_u32(0x0f0f0f0f),
                     two = vdupq_n_u32(0x30303030);
    for (size_t i = 0; i < QUARTERS; i++) {
        uint32x4_t w0 = load_words(at->scales + i * 16),
                   w1 = load_words(at->scales + 64 + i * 16),
                   w2 = load_words(at->scales + 128 + i * 16);
        uint32x4_t words[4] = {
            vandq_u32(w0, six),
            vorrq_u32(vandq_u32(w2, four), vandq_u32(vshrq_n_u32(w0, 2), two)),
            vandq_u32(w1, six),
            vorrq_u32(vandq_u32(vshrq_n_u32(w2, 4), four), vandq_u32(vshrq_n_u32(w1, 2), two)),
        };
        float32x4_t d = halves(at->d + i * 8), m = halves(at->m + i * 8);
        for (int j = 0; j < 8; j++) {
            s->d[j][i] = vmulq_f32(d, byte_of(words[j / 4], j % 4));
            s->m[j][i] = vmulq_f32(m, byte_of(words[2 + j / 4], j % 4));
        }
    }
}

ALWAYS_INLINE int32x4_t scales_of_half(const uint8_t *scales)
{
    int32_t bytes;
    memcpy(&bytes, scales, 4);
    int8x8_t s = vreinterpret_s8_s32(vdup_n_s32(bytes));
    return vmovl_s16(vget_low_s16(vmovl_s8(s)));
}

/* A block of activations of n tokens. */
struct words {
    int8x16_t first[GROUP], last[GROUP];
};

/* int32 dot products of rows from 4 * i with one block of n tokens, offsets taken off. */
ALWAYS_INLINE void dots(struct spk_tiling f, const struct spk_block_at *at, size_t i,
                        const struct spk_q8_block *x, const struct words *words, int n,
                        int32x4_t dot[GROUP])
{
    int32x4_t second[GROUP];
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) {
        int32_t whole = x[j].minus_sum, half = x[j].minus_first;
        dot[j] = vdupq_n_s32((f.six ? half : f.offset ? whole : 0) * (1 << f.offset));
        second[j] = vdupq_n_s32((whole - half) * (1 << f.offset));
    }
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
        uint8x16_t lo, hi;
        weights(f, at, i, g, &lo, &hi);
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            int32x4_t *into = f.six ? second : dot;
            dot[j] = dot_word(dot[j], lo, words->first[j], g);
            into[j] = dot_word(into[j], hi, words->last[j], g);
        }
    }
    if (f.six) {
        int32x4_t s = scales_of_half(at->scales + i * 4);
        int32x4_t s2 = scales_of_half(at->scales + 16 + i * 4);
#pragma GCC unroll 4
        for (int j = 0; j < n; j++)
            dot[j] = vmlaq_s32(vmulq_s32(dot[j], s), second[j], s2);
    }
}

/* One tile against a group of n tokens. */
ALWAYS_INLINE void tile_group(struct spk_tiling f, const uint8_t *tile,
                              const struct spk_q8_block *x, size_t blocks, int n, float *out,
                              size_t out_stride, size_t rows)
{
    const int scaled = f.super && !f.six;
    struct super super;
    float32x4_t acc[GROUP][QUARTERS];
#pragma GCC unroll 4
    for (int j = 0; j < n; j++)
#pragma GCC unroll 4
        for (int i = 0; i < QUARTERS; i++)
            acc[j][i] = vdupq_n_f32(0.0f);
    for (size_t b = 0; b < blocks; b++, x += n) {
        struct spk_block_at at = spk_locate(f, tile, blocks, b);
        struct words words;
        if (scaled && b % 8 == 0)
            super_scales(&at, &super);
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            words.first[j] = vld1q_s8(x[j].qs);
            words.last[j] = vld1q_s8(x[j].qs + 16);
        }
#pragma GCC unroll 4
        for (size_t i = 0; i < QUARTERS; i++) {
            int32x4_t dot[GROUP];
            float32x4_t dw, mw = vdupq_n_f32(0.0f);
            dots(f, &at, i, x, &words, n, dot);
            if (scaled) {
                dw = super.d[b % 8][i];
                mw = super.m[b % 8][i];
            } else {
                dw = halves(at.d + i * 8);
                if (f.minima)
                    mw = halves(at.m + i * 8);
            }
#pragma GCC unroll 4
            for (int j = 0; j < n; j++) {
                float32x4_t dx = vdupq_n_f32(x[j].d), term = vmulq_f32(dw, dx), *a = &acc[j][i];
                *a = vaddq_f32(*a, vmulq_f32(term, vcvtq_f32_s32(dot[j])));
                if (f.minima) {
                    term = vmulq_f32(vmulq_f32(mw, dx), vdupq_n_f32(x[j].sum));
                    *a = f.super ? vsubq_f32(*a, term) : vaddq_f32(*a, term);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) {
        float tmp[16];
#pragma GCC unroll 4
        for (int i = 0; i < QUARTERS; i++)
            vst1q_f32(tmp + i * 4, acc[j][i]);
        memcpy(out + (size_t)j * out_stride, tmp, (rows < 16 ? rows : 16) * sizeof *tmp);
    }
}

#define SPK_ISA neon
#include "../matmul_q.inc.h"
