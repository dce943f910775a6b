/* SPDX-License-Identifier: Apache-2.0 */
/* Activations to Q8 blocks, and blocks to what the matmuls read. */
#include "common.inc.h"

int K(quantize_q8)(const float *x, size_t x_stride, uint8_t *out, size_t out_stride, size_t k,
                   size_t tokens)
{
    int status = SPK_OK;
    for (size_t t = 0; t < tokens; t++) {
        for (size_t b = 0; b < k / SPK_BLOCK; b++) {
            const float *v = x + t * x_stride + b * SPK_BLOCK;
            uint8_t *block = out + t * out_stride + b * SPK_Q8_BLOCK_BYTES;
            lanes x0 = l_load(v), x1 = l_load(v + 16);
            /* x - x is 0 for finite x and NaN otherwise; NaN survives the sum. */
            float probe = l_tree(l_add(l_sub(x0, x0), l_sub(x1, x1)));
            if (probe != probe) {
                status = SPK_E_NONFINITE;
                continue;
            }
            float scale = l_reduce_max(l_max(l_abs(x0), l_abs(x1))) / 127.0f;
            uint16_t d = spk_f32_to_f16(scale);
            if (d == 0x7c00u && status == SPK_OK)
                status = SPK_E_F16_RANGE;
            memcpy(block, &d, 2);
            lanes inverse = l_set1(d ? 1.0f / scale : 0.0f);
            l_store_i8(block + 2, l_rint(l_mul(x0, inverse)));
            l_store_i8(block + 18, l_rint(l_mul(x1, inverse)));
        }
    }
    return status;
}

void K(expand_q8)(const uint8_t *in, size_t in_stride, struct spk_q8_block *out, size_t k,
                  size_t tokens)
{
    size_t blocks = k / SPK_BLOCK;
    for (size_t first = 0; first < tokens; first += SPK_Q8_GROUP) {
        size_t n = tokens - first < SPK_Q8_GROUP ? tokens - first : SPK_Q8_GROUP;
        for (size_t b = 0; b < blocks; b++)
            for (size_t j = 0; j < n; j++, out++) {
                const uint8_t *block = in + (first + j) * in_stride + b * SPK_Q8_BLOCK_BYTES;
                uint16_t h;
                memcpy(&h, block, 2);
                memcpy(out->qs, block + 2, SPK_BLOCK);
                int32_t low = l_sum_i8(block + 2), both = low + l_sum_i8(block + 18);
                out->d = spk_f16_to_f32(h);
                out->sum = (float)both;
                out->minus_sum = -both;
                out->minus_first = -low;
            }
    }
}
