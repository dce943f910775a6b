/* SPDX-License-Identifier: Apache-2.0 */
/* KV append and attention over paged f16 keys and values, one query at a time. */
#include "spk_kernels.h"
#include "spk_kv.h"
#include "spk_scalar_math.h"

int kv_append__scalar(const struct spk_kv *kv, uint32_t page, uint32_t pos, const float *k,
                      const float *v)
{
    size_t dim = kv->head_dim;
    int status = SPK_OK;
    for (size_t h = 0; h < kv->kv_heads; h++) {
        uint16_t *keys = spk_keys(kv, page, h) + (pos / 16) * 16 * dim + pos % 16;
        uint16_t *values = spk_values(kv, page, h) + pos * dim;
        for (size_t i = 0; i < dim; i++) {
            keys[i * 16] = spk_f32_to_f16(k[h * dim + i]);
            values[i] = spk_f32_to_f16(v[h * dim + i]);
            if ((keys[i * 16] & 0x7c00u) == 0x7c00u || (values[i] & 0x7c00u) == 0x7c00u)
                status = SPK_E_F16_RANGE;
        }
    }
    return status;
}

/* Keys and values are finite (kv_append sees to it), which spares the conversion a branch. */
static inline float finite_f16(uint16_t h)
{
    uint32_t mag = (uint32_t)(h & 0x7fffu) << 13;
    return spk_float(spk_bits(spk_float(mag) * 0x1p112f) | (uint32_t)(h & 0x8000u) << 16);
}

/* Scores of the 16 positions of a key tile, one lane each. */
static void score_tile(const float *q, const uint16_t *keys, size_t dim, float scale, float s[16])
{
    for (int l = 0; l < 16; l++)
        s[l] = 0.0f;
    for (size_t i = 0; i < dim; i++)
        for (size_t l = 0; l < 16; l++)
            s[l] = s[l] + q[i] * finite_f16(keys[i * 16 + l]);
    for (int l = 0; l < 16; l++)
        s[l] = s[l] * scale;
}

int attention__scalar(const struct spk_attention *a)
{
    const struct spk_kv *kv = &a->kv;
    size_t dim = kv->head_dim, page = kv->page_positions;
    int status = SPK_OK;
    for (size_t j = 0; j < a->queries; j++) {
        size_t n = a->visible[j];
        float *score = a->scratch, *out = a->out[j], max = 0.0f, lane[16] = {0};
        for (size_t p = 0; p < n; p += 16)
            score_tile(a->q[j], spk_keys(kv, a->pages[p / page], a->kv_head) + p % page * dim, dim,
                       a->scale, score + p);
        for (size_t p = 0; p < n; p++) {
            if (spk_nonfinite(score[p]))
                status = SPK_E_NONFINITE;
            if (p == 0 || score[p] > max)
                max = score[p];
        }
        for (size_t p = 0; p < n; p++) {
            score[p] = spk_expf(score[p] - max);
            lane[p % 16] = lane[p % 16] + score[p];
        }
        float sum = spk_tree16(lane);
        for (size_t i = 0; i < dim; i++)
            out[i] = 0.0f;
        for (size_t p = 0; p < n; p++) {
            const uint16_t *values =
                spk_values(kv, a->pages[p / page], a->kv_head) + p % page * dim;
            for (size_t i = 0; i < dim; i++)
                out[i] = out[i] + score[p] * finite_f16(values[i]);
        }
        for (size_t i = 0; i < dim; i++)
            out[i] = out[i] / sum;
    }
    return status;
}
