/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tiled weight layout, as pack.c writes it and every matmul reads it.
 *
 * A tile is 16 output rows.  It is one stream of bytes in the order in which a product reads
 * them, since a core follows one stream at twice the speed of three (measured: 27 against
 * 13 GB/s).  `[16]` below is one entry per row, `words` are [16 rows][4 bytes]: four consecutive
 * integers of a row stay together, one 32-bit lane of a dot-product instruction.
 *
 *   q4_0 q4_1 q5_0 q5_1 q8_0, a run of two blocks (n = 2; an odd last block alone, n = 1):
 *       d[n][16] f16   m[n][16] f16 (q4_1, q5_1)   fifth[n][8] u64 (q5_*)   words[n][4, q8_0: 8]
 *   q4_K q5_K, a super-block of eight blocks:
 *       d[16] f16   dmin[16] f16   scales[3][16] u32   then 8 x (fifth[8] u64 (q5_K)  words[4])
 *   q6_K, a run of two super-blocks (n = 2; an odd last one alone, n = 1):
 *       d[n][16] f16   n x 8 x (scales[2][16] i8   words[4]   upper[2] words)
 *   f16 bf16 w[k][16]      f32 w[k][16]
 *
 * A nibble byte holds weight j of its block in its low half and weight j + 16 in its high half.
 * Bit 4*row + c of fifth[g] is the fifth bit of weight 4*g + c.  Bits 2*g, 2*g + 1 of a byte of
 * upper[h] are the upper bits of weight 16*h + 4*g + c.  A block's words g hold weights 4*g + c.
 * The three scale words of a row are GGML's twelve bytes (ggml-common.h, block_q4_K).
 */
#ifndef SPK_TILES_H
#define SPK_TILES_H

#include "spk_kernels.h"

/* What the format of a quantised matrix means for its kernels; a constant in each of them. */
struct spk_tiling {
    int minima;   /* m per block, or dmin and 6-bit minima */
    int fifth;    /* a fifth bit */
    int super;    /* a K-quant */
    int six;      /* q6_K */
    int bytes;    /* q8_0: integers are whole bytes */
    int offset;   /* what the stored unsigned integers are too large by, as a shift; 0: none */
};

#define SPK_TILING_Q4_0 ((struct spk_tiling){.offset = 3})
#define SPK_TILING_Q4_1 ((struct spk_tiling){.minima = 1})
#define SPK_TILING_Q5_0 ((struct spk_tiling){.fifth = 1, .offset = 4})
#define SPK_TILING_Q5_1 ((struct spk_tiling){.minima = 1, .fifth = 1})
#define SPK_TILING_Q8_0 ((struct spk_tiling){.bytes = 1})
#define SPK_TILING_Q4_K ((struct spk_tiling){.minima = 1, .super = 1})
#define SPK_TILING_Q5_K ((struct spk_tiling){.minima = 1, .fifth = 1, .super = 1})
#define SPK_TILING_Q6_K ((struct spk_tiling){.super = 1, .six = 1, .offset = 5})

/* Where the parts of one block of a tile are. */
struct spk_block_at {
    const uint8_t *d, *m, *fifth, *upper, *words;
    const uint8_t *scales; /* the super-block's (q4_K, q5_K), or this block's two (q6_K) */
};

/* Weights of few tokens come from memory, in one stream; on some processors their own prefetching
 * ends at every page, and a core then reads at half of what it could.  So a block asks for what
 * comes this much later.  Beyond the last tile that is in vain, but no access. */
enum { SPK_AHEAD_BYTES = 4096 };

static inline void spk_ahead(struct spk_tiling f, const uint8_t *block)
{
    int lines = f.six ? 7 : f.bytes ? 9 : 5;
    for (int i = 0; i < lines; i++)
        __builtin_prefetch(block + SPK_AHEAD_BYTES + i * 64);
}

/* Bytes of one block (a K-quant: of one super-block) of a tile. */
static inline size_t spk_block_bytes_of(struct spk_tiling f)
{
    if (f.six)
        return 16 * 210;
    if (f.super)
        return 16 * (f.fifth ? 176 : 144);
    return 16 * (2 + (f.minima ? 2 : 0) + (f.fifth ? 4 : 0) + (f.bytes ? 32 : 16));
}

static inline size_t spk_tile_bytes(struct spk_tiling f, size_t blocks)
{
    return (f.super ? blocks / 8 : blocks) * spk_block_bytes_of(f);
}

static inline struct spk_block_at spk_locate(struct spk_tiling f, const uint8_t *tile,
                                             size_t blocks, size_t b)
{
    struct spk_block_at at = {0};
    size_t bytes = spk_block_bytes_of(f);
    if (f.six) {
        size_t super = b / 8, i = super % 2, first = super - i, n = blocks / 8 - first < 2 ? 1 : 2;
        const uint8_t *base = tile + first * bytes;
        at.d = base + i * 32;
        at.scales = base + n * 32 + (i * 8 + b % 8) * 416;
        at.words = at.scales + 32;
        at.upper = at.words + 256;
    } else if (f.super) {
        const uint8_t *base = tile + b / 8 * bytes;
        at.d = base;
        at.m = base + 32;
        at.scales = base + 64;
        at.fifth = base + 256 + b % 8 * (f.fifth ? 320 : 256);
        at.words = at.fifth + (f.fifth ? 64 : 0);
    } else {
        size_t i = b % 2, first = b - i, n = blocks - first < 2 ? 1 : 2;
        const uint8_t *base = tile + first * bytes;
        at.d = base + i * 32;
        base += n * 32;
        at.m = base + i * 32;
        base += f.minima ? n * 32 : 0;
        at.fifth = base + i * 64;
        base += f.fifth ? n * 64 : 0;
        at.words = base + i * (f.bytes ? 512 : 256);
    }
    return at;
}

/* The 6-bit scale (minimum) j of a K-quant, from a row's three words. */
static inline unsigned spk_scale6(const uint32_t w[3], int j)
{
    int shift = 8 * (j % 4);
    return j < 4 ? (w[0] >> shift) & 63u
                 : ((w[2] >> shift) & 15u) | ((w[0] >> shift) & 0xc0u) >> 2;
}

static inline unsigned spk_minimum6(const uint32_t w[3], int j)
{
    int shift = 8 * (j % 4);
    return j < 4 ? (w[1] >> shift) & 63u
                 : ((w[2] >> shift) & 0xf0u) >> 4 | ((w[1] >> shift) & 0xc0u) >> 2;
}

/* The group of a token: its first token and its size. */
static inline const struct spk_q8_block *spk_q8_group(const struct spk_q8 *x, size_t first)
{
    return x->block + first * x->blocks;
}

#endif
