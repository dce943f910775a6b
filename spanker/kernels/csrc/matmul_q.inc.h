/* SPDX-License-Identifier: Apache-2.0 */
/* The quantised matmuls of an instruction set out of its tile_group, which multiplies one tile with a
 * group of tokens.  Its matmul_q.c ends with this and has defined SPK_ISA, GROUP and ALWAYS_INLINE. */
#define SPK_JOIN2(op, isa) op##__##isa
#define SPK_JOIN(op, isa) SPK_JOIN2(op, isa)

ALWAYS_INLINE void matmul(struct spk_tiling f, const uint8_t *w, const struct spk_q8 *x,
                          float *out, size_t out_stride, size_t rows, size_t tokens,
                          size_t tile_begin, size_t tile_end)
{
    size_t blocks = x->blocks;
    for (size_t tile = tile_begin; tile < tile_end; tile++) {
        const uint8_t *wt = w + tile * spk_tile_bytes(f, blocks);
        size_t left = rows - tile * 16;
        for (size_t t = 0; t < tokens; t += GROUP) {
            const struct spk_q8_block *xt = spk_q8_group(x, t);
            float *o = out + t * out_stride + tile * 16;
            switch (tokens - t < GROUP ? tokens - t : GROUP) {
            case 4: tile_group(f, wt, xt, blocks, 4, o, out_stride, left); break;
            case 3: tile_group(f, wt, xt, blocks, 3, o, out_stride, left); break;
            case 2: tile_group(f, wt, xt, blocks, 2, o, out_stride, left); break;
            default: tile_group(f, wt, xt, blocks, 1, o, out_stride, left); break;
            }
        }
    }
}

#define MATMUL(name, tiling)                                                                   \
    void SPK_JOIN(name, SPK_ISA)(const uint8_t *w, const struct spk_q8 *x, float *out,         \
                                 size_t out_stride, size_t rows, size_t tokens,                \
                                 size_t tile_begin, size_t tile_end)                           \
    {                                                                                          \
        matmul(tiling, w, x, out, out_stride, rows, tokens, tile_begin, tile_end);             \
    }

MATMUL(matmul_q4_0_q8, SPK_TILING_Q4_0)
MATMUL(matmul_q4_1_q8, SPK_TILING_Q4_1)
MATMUL(matmul_q5_0_q8, SPK_TILING_Q5_0)
MATMUL(matmul_q5_1_q8, SPK_TILING_Q5_1)
MATMUL(matmul_q8_0_q8, SPK_TILING_Q8_0)
MATMUL(matmul_q4_k_q8, SPK_TILING_Q4_K)
MATMUL(matmul_q5_k_q8, SPK_TILING_Q5_K)
MATMUL(matmul_q6_k_q8, SPK_TILING_Q6_K)
