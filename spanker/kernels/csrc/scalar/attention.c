/* SPDX-License-Identifier: Apache-2.0 */
/* KV append and attention over paged f16 keys and values, one query at a time. */
#include "spk_kernels.h"
#include "spk_scalar_math.h"

static uint16_t *page_of(const struct spk_kv *kv, uint32_t page, size_t kv_head)
{
    size_t head_words = 2 * kv->page_positions * kv->head_dim;
    return kv->pool + ((size_t)page * kv->kv_heads + kv_head) * head_words;
}

int kv_append__scalar(const struct spk_kv *kv, uint32_t page, uint32_t pos, const float *k,
                      const float *v)
{
    size_t dim = kv->head_dim;
    int status = SPK_OK;
    for (size_t h = 0; h < kv->kv_heads; h++) {
        uint16_t *keys = page_of(kv, page, h) + (pos / 16) * 16 * dim + pos % 16;
        uint16_t *values = page_of(kv, page, h) + kv->page_positions * dim + pos * dim;
        for (size_t i = 0; i < dim; i++) {
            keys[i * 16] = spk_f32_to_f16(k[h * dim + i]);
            values[i] = spk_f32_to_f16(v[h * dim + i]);
            if ((keys[i * 16] & 0x7c00u) == 0x7c00u || (values[i] & 0x7c00u) == 0x7c00u)
                status = SPK_E_F16_RANGE;
        }
    }
    return status;
}

int attention__scalar(const struct spk_attention *a)
{
    const struct spk_kv *kv = &a->kv;
    size_t dim = kv->head_dim;
    int status = SPK_OK;
    for (size_t j = 0; j < a->queries; j++) {
        size_t n = a->visible[j];
        float *score = a->scratch, max = 0.0f, lane[16] = {0};
        for (size_t p = 0; p < n; p++) {
            size_t in_page = p % kv->page_positions;
            const uint16_t *keys = page_of(kv, a->pages[p / kv->page_positions], a->kv_head) +
                                   (in_page / 16) * 16 * dim + in_page % 16;
            float s = 0.0f;
            for (size_t i = 0; i < dim; i++)
                s = s + a->q[j][i] * spk_f16_to_f32(keys[i * 16]);
            score[p] = s * a->scale;
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
        for (size_t i = 0; i < dim; i++) {
            float o = 0.0f;
            for (size_t p = 0; p < n; p++) {
                const uint16_t *values =
                    page_of(kv, a->pages[p / kv->page_positions], a->kv_head) +
                    kv->page_positions * dim + (p % kv->page_positions) * dim;
                o = o + score[p] * spk_f16_to_f32(values[i]);
            }
            a->out[j][i] = o / sum;
        }
    }
    return status;
}
