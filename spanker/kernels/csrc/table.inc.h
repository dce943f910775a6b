/* SPDX-License-Identifier: Apache-2.0 */
/* The function table of one instruction set; table.c of each directory includes this.  One that has
 * quantised products only takes the rest from another, SPK_TABLE_REST. */
#include "spk_kernels.h"

#ifndef SPK_TABLE_REST
#define SPK_TABLE_REST SPK_TABLE
#endif

#define SPK_JOIN2(op, isa) op##__##isa
#define SPK_JOIN(op, isa) SPK_JOIN2(op, isa)
#define SPK_STR2(x) #x
#define SPK_STR(x) SPK_STR2(x)
#define K(op) SPK_JOIN(op, SPK_TABLE)
#define REST(op) SPK_JOIN(op, SPK_TABLE_REST)
#define MATMUL_Q8(op)                                                                          \
    void K(op)(const uint8_t *, const struct spk_q8 *, float *, size_t, size_t, size_t, size_t, \
               size_t)
#define MATMUL_F32(op)                                                                          \
    void REST(op)(const uint8_t *, const float *, size_t, float *, size_t, size_t, size_t, size_t, \
               size_t, size_t)

int REST(quantize_q8)(const float *, size_t, uint8_t *, size_t, size_t, size_t);
void REST(expand_q8)(const uint8_t *, size_t, struct spk_q8_block *, size_t, size_t);
MATMUL_Q8(matmul_q4_0_q8);
MATMUL_Q8(matmul_q4_1_q8);
MATMUL_Q8(matmul_q5_0_q8);
MATMUL_Q8(matmul_q5_1_q8);
MATMUL_Q8(matmul_q8_0_q8);
MATMUL_Q8(matmul_q4_k_q8);
MATMUL_Q8(matmul_q5_k_q8);
MATMUL_Q8(matmul_q6_k_q8);
MATMUL_F32(matmul_f16_f32);
MATMUL_F32(matmul_bf16_f32);
MATMUL_F32(matmul_f32_f32);
int REST(rmsnorm)(const float *, size_t, const float *, float *, size_t, size_t, size_t, float);
void REST(rope)(float *, size_t, size_t, size_t, size_t, const float *, const uint32_t *, size_t);
int REST(kv_append)(const struct spk_kv *, uint32_t, uint32_t, const float *, const float *);
int REST(attention)(const struct spk_attention *);
void REST(swiglu)(const float *, size_t, const float *, size_t, float *, size_t, size_t, size_t);
void REST(add)(float *, size_t, const float *, size_t, size_t, size_t);
int REST(dequantize_row)(int, const uint8_t *, float *, size_t);
int REST(logit_stats)(const float *, size_t, float, float *);
size_t REST(top_k)(const float *, size_t, size_t, uint32_t *, float *);
void REST(reduce)(int, int, void *, const void *, size_t);
void REST(divide)(int, void *, uint32_t, size_t);

const struct spk_kernels K(spk_kernels) = {
    .name = SPK_STR(SPK_TABLE),
    .isa = SPK_TABLE_ISA,
    .quantize_q8 = REST(quantize_q8),
    .expand_q8 = REST(expand_q8),
    .matmul_q8 = {[SPK_Q4_0] = K(matmul_q4_0_q8),
                  [SPK_Q4_1] = K(matmul_q4_1_q8),
                  [SPK_Q5_0] = K(matmul_q5_0_q8),
                  [SPK_Q5_1] = K(matmul_q5_1_q8),
                  [SPK_Q8_0] = K(matmul_q8_0_q8),
                  [SPK_Q4_K] = K(matmul_q4_k_q8),
                  [SPK_Q5_K] = K(matmul_q5_k_q8),
                  [SPK_Q6_K] = K(matmul_q6_k_q8)},
    .matmul_f32 = {[SPK_F16] = REST(matmul_f16_f32),
                   [SPK_BF16] = REST(matmul_bf16_f32),
                   [SPK_F32] = REST(matmul_f32_f32)},
    .rmsnorm = REST(rmsnorm),
    .rope = REST(rope),
    .kv_append = REST(kv_append),
    .attention = REST(attention),
    .swiglu = REST(swiglu),
    .add = REST(add),
    .dequantize_row = REST(dequantize_row),
    .logit_stats = REST(logit_stats),
    .top_k = REST(top_k),
    .reduce = REST(reduce),
    .divide = REST(divide),
};
