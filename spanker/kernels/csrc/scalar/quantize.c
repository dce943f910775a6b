/* SPDX-License-Identifier: Apache-2.0 */
/* Activations to Q8 blocks, and blocks to what the matmuls read. */
#include <string.h>

#include "spk_kernels.h"
#include "spk_scalar_math.h"

int quantize_q8__scalar(const float *x, size_t x_stride, uint8_t *out, size_t out_stride,
                        size_t k, size_t tokens)
{
    int status = SPK_OK;
    for (size_t t = 0; t < tokens; t++) {
        for (size_t b = 0; b < k / SPK_BLOCK; b++) {
            const float *v = x + t * x_stride + b * SPK_BLOCK;
            uint8_t *block = out + t * out_stride + b * SPK_Q8_BLOCK_BYTES;
            float amax = 0.0f;
            for (int i = 0; i < SPK_BLOCK; i++) {
                float a = spk_float(spk_bits(v[i]) & 0x7fffffffu);
                if (spk_nonfinite(v[i]))
                    status = SPK_E_NONFINITE;
                amax = a > amax ? a : amax;
            }
            float scale = amax / 127.0f;
            uint16_t d = spk_f32_to_f16(scale);
            if (d == 0x7c00u && status == SPK_OK)
                status = SPK_E_F16_RANGE;
            memcpy(block, &d, 2);
            float inverse = d ? 1.0f / scale : 0.0f;
            for (int i = 0; i < SPK_BLOCK; i++)
                block[2 + i] = (uint8_t)(int8_t)(int32_t)spk_rint(status ? 0.0f : v[i] * inverse);
        }
    }
    return status;
}

void expand_q8__scalar(const uint8_t *in, size_t in_stride, struct spk_q8_block *out, size_t k,
                       size_t tokens)
{
    size_t blocks = k / SPK_BLOCK;
    for (size_t first = 0; first < tokens; first += SPK_Q8_GROUP) {
        size_t n = tokens - first < SPK_Q8_GROUP ? tokens - first : SPK_Q8_GROUP;
        for (size_t b = 0; b < blocks; b++)
            for (size_t j = 0; j < n; j++, out++) {
                const uint8_t *block = in + (first + j) * in_stride + b * SPK_Q8_BLOCK_BYTES;
                int32_t half[2] = {0};
                uint16_t h;
                memcpy(&h, block, 2);
                memcpy(out->qs, block + 2, SPK_BLOCK);
                for (int i = 0; i < SPK_BLOCK; i++)
                    half[i / 16] += out->qs[i];
                out->d = spk_f16_to_f32(h);
                out->sum = (float)(half[0] + half[1]);
                out->minus_sum = -(half[0] + half[1]);
                out->minus_first = -half[0];
            }
    }
}
