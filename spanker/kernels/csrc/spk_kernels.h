/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Kernels of a card: what each one computes, bit for bit.
 *
 * The definition of every operation is docs/api/kernel-semantics.md and, as running code,
 * spanker/kernels/reference.py; every instruction set must equal it exactly.  A kernel takes
 * sizes and strides, uses no globals, allocates nothing and returns a status.
 *
 * Strides of float arrays count floats, strides of block arrays count bytes.  Counts of zero
 * are valid and write nothing (a norm has at least one element).  Arguments are checked by the caller (the command processor).
 */
#ifndef SPK_KERNELS_H
#define SPK_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
#define SPK_SEMANTICS_VERSION 1
#define SPK_TILE_ROWS 16    /* output rows interleaved in packed weights; one row is one lane */
#define SPK_BLOCK 32        /* weights or activations that share a scale */
#define SPK_Q8_BLOCK_BYTES 34 /* f16 scale and 32 int8, as in GGML's block_q8_0 */
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

/* Weight formats carry GGML's type numbers. */
#define SPK_F32 0
#define SPK_F16 1
#define SPK_Q4_0 2
#define SPK_Q4_1 3
#define SPK_Q8_0 8

#define SPK_ISA_SCALAR 0
#define SPK_ISA_AVX2 1
#define SPK_ISA_AVX512VNNI 2
#define SPK_ISA_COUNT 3

/* Activations ready for a matmul: for token t and block b, 32 int8 at qs[(t*blocks + b)*32],
 * the scale d[t*blocks + b] and the sum of the 32 integers sum[t*blocks + b]. */
struct spk_q8 {
    const int8_t *qs;
    const float *d;
    const int32_t *sum;
    size_t blocks;
};

/* KV pages of one layer on one card.  A page holds, for each KV head, K in tiles of 16
 * positions ([position/16][head_dim][16]) followed by V ([position][head_dim]), all f16. */
struct spk_kv {
    uint16_t *pool;
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
    float *scratch;          /* 4 * (largest visible, rounded up to 16) floats */
};

struct spk_kernels {
    const char *name;
    int isa;
    int (*quantize_q8)(const float *x, size_t x_stride, uint8_t *out, size_t out_stride,
                       size_t k, size_t tokens);
    void (*expand_q8)(const uint8_t *in, size_t in_stride, int8_t *qs, float *d, int32_t *sum,
                      size_t k, size_t tokens);
    /* Rows [tile_begin*16, min(tile_end*16, rows)) of out[token][row]; weights as spk_pack
     * leaves them. */
    void (*matmul_q4_0_q8)(const uint8_t *w, const struct spk_q8 *x, float *out,
                           size_t out_stride, size_t rows, size_t tokens, size_t tile_begin,
                           size_t tile_end);
    void (*matmul_q4_1_q8)(const uint8_t *w, const struct spk_q8 *x, float *out,
                           size_t out_stride, size_t rows, size_t tokens, size_t tile_begin,
                           size_t tile_end);
    void (*matmul_q8_0_q8)(const uint8_t *w, const struct spk_q8 *x, float *out,
                           size_t out_stride, size_t rows, size_t tokens, size_t tile_begin,
                           size_t tile_end);
    void (*matmul_f16_f32)(const uint8_t *w, const float *x, size_t x_stride, float *out,
                           size_t out_stride, size_t rows, size_t k, size_t tokens,
                           size_t tile_begin, size_t tile_end);
    void (*matmul_f32_f32)(const uint8_t *w, const float *x, size_t x_stride, float *out,
                           size_t out_stride, size_t rows, size_t k, size_t tokens,
                           size_t tile_begin, size_t tile_end);
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
};

/* The kernels of an instruction set, or NULL when this build or this machine lacks it. */
const struct spk_kernels *spk_kernels_get(int isa);

/* Bytes of one row of k weights in GGML's layout; 0 when the format is unknown or k does not
 * fill whole blocks. */
size_t spk_row_bytes(int format, size_t k);
/* Bytes of rows x k weights as packed for the matmuls: rows are padded to a multiple of 16. */
size_t spk_packed_bytes(int format, size_t rows, size_t k);
/* Interleave 16 rows at a time; src rows are row_stride bytes apart; missing rows are zero. */
int spk_pack(int format, const uint8_t *src, size_t row_stride, uint8_t *dst, size_t rows,
             size_t k);

uint16_t spk_f16_from_f32(float x);
float spk_f32_from_f16(uint16_t h);
float spk_exp(float x);
uint32_t spk_crc32c(uint32_t crc, const void *data, size_t nbytes);

/* Round to nearest, no flush to zero, for this thread; returns what to restore. */
uint64_t spk_fp_enter(void);
void spk_fp_leave(uint64_t saved);
/* cffi: end */

extern const struct spk_kernels spk_kernels__scalar;
extern const struct spk_kernels spk_kernels__avx2;
extern const struct spk_kernels spk_kernels__avx512vnni;

#endif
