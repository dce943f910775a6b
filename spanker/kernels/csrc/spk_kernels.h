/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Kernels of a card: what each one computes, bit for bit.
 *
 * The definition of every operation is docs/api/kernel-semantics.md and, as running code,
 * spanker/kernels/reference.py; every instruction set must equal it exactly.  A kernel takes
 * sizes and strides, uses no globals, allocates nothing and returns a status.
 *
 * Strides of float arrays count floats, strides of block arrays count bytes.  Counts of zero
 * are valid and write nothing (a norm has at least one element).  Arguments are checked by the
 * caller (the command processor).
 */
#ifndef SPK_KERNELS_H
#define SPK_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
#define SPK_SEMANTICS_VERSION 1
#define SPK_TILE_ROWS 16    /* output rows interleaved in packed weights; one row is one lane */
#define SPK_BLOCK 32        /* weights or activations that share a scale */
#define SPK_SUPER_BLOCK 256 /* weights that share the outer scales of a K-quant (GGML's QK_K) */
#define SPK_Q8_BLOCK_BYTES 34 /* f16 scale and 32 int8, as in GGML's block_q8_0 */
#define SPK_Q8_GROUP 4      /* tokens whose expanded blocks lie side by side */
#define SPK_ATTENTION_ROWS 8 /* rows of scores that attention keeps in its scratch memory */
#define SPK_LOGIT_CHUNK 256 /* vocabulary rows that share one (max, sum of exp) pair */

/* Statuses; docs/api/kernel-semantics.md lists what each means to the caller. */
#define SPK_OK 0
#define SPK_E_ARG 1
#define SPK_E_NONFINITE 2   /* a NaN or an infinity entered or left a kernel */
#define SPK_E_F16_RANGE 3   /* a scale, key or value does not fit into f16 */
#define SPK_E_NOMEM 4
#define SPK_E_BOUNDS 5      /* a command reaches outside its buffer */
#define SPK_E_HANDLE 6      /* no such buffer or program */
#define SPK_E_BUSY 7        /* queue full, or buffer still used by a program */
#define SPK_E_PARAMS 8      /* a parameter block does not fit the program */
#define SPK_E_ABORTED 9
#define SPK_E_LINK 10       /* a link message failed its checks after all retries */
#define SPK_E_LOST 11       /* the card is gone */
#define SPK_E_SYSTEM 12     /* the operating system refused memory, a thread or an fd */
#define SPK_E_RESET 13      /* the card was reset by somebody */
#define SPK_E_MEMORY 14     /* an uncorrected error of the card's memory */

/* Weight formats carry GGML's type numbers. */
#define SPK_F32 0
#define SPK_F16 1
#define SPK_Q4_0 2
#define SPK_Q4_1 3
#define SPK_Q5_0 6
#define SPK_Q5_1 7
#define SPK_Q8_0 8
#define SPK_Q4_K 12
#define SPK_Q5_K 13
#define SPK_Q6_K 14
#define SPK_BF16 30
#define SPK_I32 26 /* of elements only: no weights have it */
#define SPK_FORMAT_COUNT 31 /* above every format's number */

#define SPK_ISA_SCALAR 0
#define SPK_ISA_AVX2 1
#define SPK_ISA_AVX512VNNI 2
#define SPK_ISA_NEON 3
#define SPK_ISA_RVV 4
#define SPK_ISA_XPOP 5
#define SPK_ISA_COUNT 6

/* How REDUCE folds two elements. */
#define SPK_REDUCE_SUM 0
#define SPK_REDUCE_MAX 1
#define SPK_REDUCE_MIN 2
#define SPK_REDUCE_COUNT 3

/* One Q8 block of activations, ready for a matmul.  The sums are negative as the kernels start
 * their dot products from an offset times them. */
struct spk_q8_block {
    int8_t qs[32];
    float d;
    float sum;           /* of the 32 integers */
    int32_t minus_sum;   /* the same, negative */
    int32_t minus_first; /* minus the sum of the first 16 */
};

/* Activations ready for a matmul: tokens in groups of SPK_Q8_GROUP (the last may be smaller),
 * within a group block after block, within a block token after token.  So block b of token t is
 * block[first*blocks + b*n + (t - first)] where first is the group's first token and n its size. */
struct spk_q8 {
    const struct spk_q8_block *block;
    size_t blocks; /* of a token */
};

/* KV pages of one layer on one card, all f16: for each KV head its keys, page after page, then its
 * values, page after page.  A page of keys is tiles of 16 positions ([position/16][head_dim][16]), a
 * page of values [position][head_dim].  So a sequence on neighbouring pages is two streams. */
struct spk_kv {
    uint16_t *pool;
    size_t pages;
    size_t page_positions; /* a multiple of 16 */
    size_t kv_heads;
    size_t head_dim;
};

/* One KV head, one sequence, some queries against it. */
struct spk_attention {
    struct spk_kv kv;
    const uint32_t *pages;   /* page numbers of the sequence, in order of position */
    size_t kv_head;
    size_t queries;
    const float *const *q;   /* queries pointers to head_dim floats */
    float *const *out;       /* queries pointers to head_dim floats */
    const uint32_t *visible; /* positions each query attends to: its own position + 1 */
    float scale;             /* 1/sqrt(head_dim) */
    /* SPK_ATTENTION_ROWS * (largest visible, rounded up to 16, + head_dim) floats */
    float *scratch;
};

/* Rows [tile_begin*16, min(tile_end*16, rows)) of out[token][row]; weights as spk_pack leaves
 * them.  w and x->block are aligned to 16 bytes, as memory of a card and of malloc is. */
typedef void (*spk_matmul_q8)(const uint8_t *w, const struct spk_q8 *x, float *out,
                              size_t out_stride, size_t rows, size_t tokens, size_t tile_begin,
                              size_t tile_end);
typedef void (*spk_matmul_f32)(const uint8_t *w, const float *x, size_t x_stride, float *out,
                               size_t out_stride, size_t rows, size_t k, size_t tokens,
                               size_t tile_begin, size_t tile_end);

struct spk_kernels {
    const char *name;
    int isa;
    int (*quantize_q8)(const float *x, size_t x_stride, uint8_t *out, size_t out_stride,
                       size_t k, size_t tokens);
    void (*expand_q8)(const uint8_t *in, size_t in_stride, struct spk_q8_block *out, size_t k,
                      size_t tokens);
    /* By format, NULL where activations are of the other kind. */
    spk_matmul_q8 matmul_q8[SPK_FORMAT_COUNT];
    spk_matmul_f32 matmul_f32[SPK_FORMAT_COUNT];
    int (*rmsnorm)(const float *x, size_t x_stride, const float *w, float *out,
                   size_t out_stride, size_t n, size_t tokens, float eps);
    /* In place; table[position][rope_dim/2][2] = (cos, sin); pairs are (2i, 2i+1). */
    void (*rope)(float *x, size_t x_stride, size_t heads, size_t head_dim, size_t rope_dim,
                 const float *table, const uint32_t *positions, size_t tokens);
    /* k and v are one token's kv_heads*head_dim floats, written to the position in its page. */
    int (*kv_append)(const struct spk_kv *kv, uint32_t page, uint32_t position_in_page,
                     const float *k, const float *v);
    int (*attention)(const struct spk_attention *a);
    void (*swiglu)(const float *gate, size_t gate_stride, const float *up, size_t up_stride,
                   float *out, size_t out_stride, size_t n, size_t tokens);
    void (*add)(float *x, size_t x_stride, const float *y, size_t y_stride, size_t n,
                size_t tokens);
    /* One row of GGML blocks, unpacked: out[i] for i < k. */
    int (*dequantize_row)(int format, const uint8_t *row, float *out, size_t k);
    /* stats[2*c], stats[2*c+1]: max and sum of exp((x - max) * inv_temperature) of chunk c. */
    int (*logit_stats)(const float *logits, size_t n, float inv_temperature, float *stats);
    /* The k largest, by logit descending then index ascending; fewer when n < k.
     * Returns the number written. */
    size_t (*top_k)(const float *logits, size_t n, size_t k, uint32_t *ids, float *values);
    /* into[i] = into[i] op operand[i] for i < n elements of SPK_F32, SPK_F16, SPK_BF16 or SPK_I32,
     * aligned to their size; the two do not overlap. */
    void (*reduce)(int element, int op, void *into, const void *operand, size_t n);
    /* into[i] = into[i] / by; 1 <= by <= 65536. */
    void (*divide)(int element, void *into, uint32_t by, size_t n);
};

/* The kernels of an instruction set, or NULL when this build or this machine lacks it. */
const struct spk_kernels *spk_kernels_get(int isa);

/* Weights that share a scale in GGML's layout: 1, 32 or 256; 0 when the format is unknown. */
size_t spk_block_weights(int format);
/* Bytes of one row of k weights in GGML's layout; 0 when the format is unknown or k does not
 * fill whole blocks. */
size_t spk_row_bytes(int format, size_t k);
/* Bytes of rows x k weights as packed for the matmuls: rows are padded to a multiple of 16. */
size_t spk_packed_bytes(int format, size_t rows, size_t k);
/* Interleave 16 rows at a time; src rows are row_stride bytes apart; missing rows are zero. */
int spk_pack(int format, const uint8_t *src, size_t row_stride, uint8_t *dst, size_t rows,
             size_t k);

/* Columns [first, first + n) of one row of packed weights, k columns wide, as floats: the values of
 * dequantize_row.  Both are whole blocks. */
void spk_dequantize_packed_row(int format, const uint8_t *packed, size_t row, size_t k,
                               size_t first, size_t n, float *out);

uint16_t spk_f16_from_f32(float x);
float spk_f32_from_f16(uint16_t h);
float spk_exp(float x);
/* total + sum over chunks, ascending, of exp((max - top) * inv_temperature) * sum, each operation
 * on the float64 total rounded once; stats as logit_stats leaves them. */
double spk_fold_stats(double total, const float *stats, size_t chunks, float top,
                      float inv_temperature);
uint32_t spk_crc32c(uint32_t crc, const void *data, size_t nbytes);
/* The same of bytes that it copies on the way; the two do not overlap. */
uint32_t spk_copy_crc32c(uint32_t crc, void *to, const void *data, size_t nbytes);
/* Bytes of an element of the bulk operations; 0 when the number is none of theirs. */
size_t spk_element_bytes(int element);

/* Round to nearest, no flush to zero, for this thread; returns what to restore. */
uint64_t spk_fp_enter(void);
void spk_fp_leave(uint64_t saved);
/* cffi: end */

extern const struct spk_kernels spk_kernels__scalar;
extern const struct spk_kernels spk_kernels__avx2;
extern const struct spk_kernels spk_kernels__avx512vnni;
extern const struct spk_kernels spk_kernels__neon;
extern const struct spk_kernels spk_kernels__rvv;
extern const struct spk_kernels spk_kernels__xpop;

/* For riscv64: this machine has Xpop_matmul, or an emulation of it is installed.  No system tells a
 * program; whoever knows says so before the first spk_kernels_get. */
void spk_xpop_found(void);

#endif
