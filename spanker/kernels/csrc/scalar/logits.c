/* SPDX-License-Identifier: Apache-2.0 */
/* Per-chunk (max, sum of exp) and the best candidates of a row of logits. */
#include "spk_kernels.h"
#include "spk_scalar_math.h"

int logit_stats__scalar(const float *logits, size_t n, float inv_temperature, float *stats)
{
    int status = SPK_OK;
    for (size_t begin = 0; begin < n; begin += SPK_LOGIT_CHUNK, stats += 2) {
        size_t count = n - begin < SPK_LOGIT_CHUNK ? n - begin : SPK_LOGIT_CHUNK;
        const float *x = logits + begin;
        float max = x[0], lane[16] = {0};
        for (size_t i = 0; i < count; i++) {
            max = x[i] > max ? x[i] : max;
            if (spk_nonfinite(x[i]))
                status = SPK_E_NONFINITE;
        }
        for (size_t i = 0; i < count; i++)
            lane[i % 16] = lane[i % 16] + spk_expf((x[i] - max) * inv_temperature);
        stats[0] = max + 0.0f; /* -0 becomes +0 */
        stats[1] = spk_tree16(lane);
    }
    return status;
}

/* Insertion into a sorted list: almost every logit fails the first comparison. */
size_t top_k__scalar(const float *logits, size_t n, size_t k, uint32_t *ids, float *values)
{
    size_t held = 0;
    for (size_t i = 0; i < n && k; i++) {
        if (held == k && !(logits[i] > values[k - 1]))
            continue;
        size_t at = held < k ? held++ : k - 1;
        for (; at > 0 && logits[i] > values[at - 1]; at--) {
            values[at] = values[at - 1];
            ids[at] = ids[at - 1];
        }
        values[at] = logits[i];
        ids[at] = (uint32_t)i;
    }
    return held;
}
