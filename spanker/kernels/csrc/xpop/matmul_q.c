/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantised matmuls with Xpop_matmul (docs/api/xpop-matmul.md).  Of Q4_0, Q4_1, Q8_0, Q4_K and Q6_K
 * one instruction takes a run of a tile and a group of tokens: nothing is left but to step through
 * them.  Of the formats with a fifth bit, which the unit does not know, weights are unpacked to
 * bytes, pop.dot multiplies them, and plain C scales.
 *
 * Sketch for one token, 16 rows and a run of two blocks in q4_0: 29 cycles of DDR for 576 bytes,
 * beside which the loop's five instructions vanish.
 */
#include <string.h>

#include "spk_kernels.h"
#include "spk_scalar_math.h"
#include "spk_tiles.h"
#include "spk_xpop.h"

#define GROUP SPK_Q8_GROUP
#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* What an instruction adds to, or leaves, for a group of tokens. */
#define RESULTS(type, name)                                                                    \
    type name[GROUP][SPK_TILE_ROWS] __attribute__((aligned(SPK_POP_RESULTS_ALIGN)))

/* A group of n tokens has an instruction of its own, and its code wants a literal. */
#define FOR_TOKENS(n, STEP)                                                                    \
    switch (n) {                                                                               \
    case 4: STEP(4); break;                                                                    \
    case 3: STEP(3); break;                                                                    \
    case 2: STEP(2); break;                                                                    \
    default: STEP(1); break;                                                                   \
    }

/* --- the whole step in the unit ------------------------------------------------------------- */

/* Blocks of 32 in a run of one block or super-block. */
ALWAYS_INLINE size_t run_unit(struct spk_tiling f)
{
    return f.super ? SPK_SUPER_BLOCK / SPK_BLOCK : 1;
}

#define STEPS(FORMAT, RUN)                                                                     \
    do {                                                                                       \
        size_t bytes = (RUN) * spk_block_bytes_of(f);                                          \
        size_t ahead = (RUN) * run_unit(f) * (size_t)n;                                        \
        const uint8_t *end = w + count / (RUN) * bytes;                                        \
        for (; w < end; w += bytes, x += ahead)                                                \
            FOR_TOKENS(n, STEP_##RUN##_##FORMAT)                                               \
        count %= (RUN);                                                                        \
    } while (0)

#define STEP_1_Q4_0(N) SPK_POP_STEP(SPK_POP_Q4_0, 1, N, acc, w, x)
#define STEP_2_Q4_0(N) SPK_POP_STEP(SPK_POP_Q4_0, 2, N, acc, w, x)
#define STEP_1_Q4_1(N) SPK_POP_STEP(SPK_POP_Q4_1, 1, N, acc, w, x)
#define STEP_2_Q4_1(N) SPK_POP_STEP(SPK_POP_Q4_1, 2, N, acc, w, x)
#define STEP_1_Q8_0(N) SPK_POP_STEP(SPK_POP_Q8_0, 1, N, acc, w, x)
#define STEP_2_Q8_0(N) SPK_POP_STEP(SPK_POP_Q8_0, 2, N, acc, w, x)
#define STEP_1_Q4_K(N) SPK_POP_STEP(SPK_POP_Q4_K, 1, N, acc, w, x)
#define STEP_1_Q6_K(N) SPK_POP_STEP(SPK_POP_Q6_K, 1, N, acc, w, x)
#define STEP_2_Q6_K(N) SPK_POP_STEP(SPK_POP_Q6_K, 2, N, acc, w, x)

/* Steps through `count` blocks or super-blocks of a tile, in runs of two as they are stored. */
#define IN_PAIRS(FORMAT)                                                                       \
    ALWAYS_INLINE void add_##FORMAT(struct spk_tiling f, const uint8_t *w,                     \
                                    const struct spk_q8_block *x, size_t count, int n,         \
                                    float acc[][SPK_TILE_ROWS])                                \
    {                                                                                          \
        STEPS(FORMAT, 2);                                                                      \
        STEPS(FORMAT, 1);                                                                      \
    }

IN_PAIRS(Q4_0)
IN_PAIRS(Q4_1)
IN_PAIRS(Q8_0)
IN_PAIRS(Q6_K)

ALWAYS_INLINE void add_Q4_K(struct spk_tiling f, const uint8_t *w, const struct spk_q8_block *x,
                            size_t count, int n, float acc[][SPK_TILE_ROWS])
{
    STEPS(Q4_K, 1);
}

/* --- a fifth bit ---------------------------------------------------------------------------- */

/* The weights of a block as bytes, without their offset, in the order of q8_0. */
ALWAYS_INLINE void unpack_fifth(struct spk_tiling f, const struct spk_block_at *at,
                                int8_t bytes[512])
{
    int offset = f.offset ? 1 << f.offset : 0;
    for (size_t g = 0; g < 4; g++) {
        uint64_t low, high;
        memcpy(&low, at->fifth + g * 8, 8);
        memcpy(&high, at->fifth + 32 + g * 8, 8);
        for (size_t i = 0; i < 64; i++) {
            int w = at->words[g * 64 + i];
            bytes[g * 64 + i] = (int8_t)(((w & 15) | (int)(low >> i & 1) << 4) - offset);
            bytes[256 + g * 64 + i] = (int8_t)((w >> 4 | (int)(high >> i & 1) << 4) - offset);
        }
    }
}

ALWAYS_INLINE float half(const uint8_t *p, size_t row)
{
    uint16_t h;
    memcpy(&h, p + row * 2, 2);
    return spk_f16_to_f32(h);
}

/* The scales and minima of a block, 16 rows each. */
ALWAYS_INLINE void block_scales(struct spk_tiling f, const struct spk_block_at *at, size_t b,
                                float d[SPK_TILE_ROWS], float m[SPK_TILE_ROWS])
{
    for (size_t r = 0; r < SPK_TILE_ROWS; r++) {
        d[r] = half(at->d, r);
        m[r] = f.minima ? half(at->m, r) : 0.0f;
        if (f.super) {
            uint32_t w[3];
            for (size_t i = 0; i < 3; i++)
                memcpy(&w[i], at->scales + i * 64 + r * 4, 4);
            d[r] = d[r] * (float)spk_scale6(w, (int)(b % 8));
            m[r] = m[r] * (float)spk_minimum6(w, (int)(b % 8));
        }
    }
}

#define DOT_S8(N) SPK_POP_DOT(SPK_POP_S8, N, dot, bytes, x)

ALWAYS_INLINE void add_fifth(struct spk_tiling f, const uint8_t *w, const struct spk_q8_block *x,
                             size_t count, int n, float acc[][SPK_TILE_ROWS])
{
    RESULTS(int32_t, dot);
    int8_t bytes[512] __attribute__((aligned(SPK_POP_SOURCES_ALIGN)));
    size_t blocks = count * run_unit(f);
    for (size_t b = 0; b < blocks; b++, x += n) {
        struct spk_block_at at = spk_locate(f, w, blocks, b);
        float d[SPK_TILE_ROWS], m[SPK_TILE_ROWS];
        unpack_fifth(f, &at, bytes);
        block_scales(f, &at, b, d, m);
        FOR_TOKENS(n, DOT_S8)
        for (int j = 0; j < n; j++)
            for (int r = 0; r < SPK_TILE_ROWS; r++) {
                float *a = &acc[j][r];
                *a = *a + (d[r] * x[j].d) * (float)dot[j][r];
                if (f.minima && f.super)
                    *a = *a - (m[r] * x[j].d) * x[j].sum;
                else if (f.minima)
                    *a = *a + (m[r] * x[j].d) * x[j].sum;
            }
    }
}

/* --- tiles and groups ----------------------------------------------------------------------- */

/* One tile against a group of n tokens. */
ALWAYS_INLINE void tile_group(struct spk_tiling f, const uint8_t *tile,
                              const struct spk_q8_block *x, size_t blocks, int n, float *out,
                              size_t out_stride, size_t rows)
{
    size_t count = blocks / run_unit(f);
    RESULTS(float, acc);
    memset(acc, 0, sizeof acc);
    if (f.fifth)
        add_fifth(f, tile, x, count, n, acc);
    else if (f.six)
        add_Q6_K(f, tile, x, count, n, acc);
    else if (f.super)
        add_Q4_K(f, tile, x, count, n, acc);
    else if (f.bytes)
        add_Q8_0(f, tile, x, count, n, acc);
    else if (f.minima)
        add_Q4_1(f, tile, x, count, n, acc);
    else
        add_Q4_0(f, tile, x, count, n, acc);
    for (int j = 0; j < n; j++)
        memcpy(out + (size_t)j * out_stride, acc[j],
               (rows < SPK_TILE_ROWS ? rows : SPK_TILE_ROWS) * sizeof(float));
}

#define SPK_ISA xpop
#include "../matmul_q.inc.h"
