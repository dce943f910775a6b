/* SPDX-License-Identifier: Apache-2.0 */
/* Per-chunk (max, sum of exp) and the best candidates of a row of logits. */
#include "common.inc.h"

int K(logit_stats)(const float *logits, size_t n, float inv_temperature, float *stats)
{
    lanes inv = l_set1(inv_temperature);
    int status = SPK_OK;
    for (size_t begin = 0; begin < n; begin += SPK_LOGIT_CHUNK, stats += 2) {
        size_t count = n - begin < SPK_LOGIT_CHUNK ? n - begin : SPK_LOGIT_CHUNK;
        size_t whole = count / 16 * 16;
        const float *x = logits + begin;
        lanes m = l_set1(x[0]), sum = l_set1(0.0f), probe = sum;
        for (size_t i = 0; i < whole; i += 16) {
            lanes v = l_load(x + i);
            m = l_max(m, v);
            probe = l_add(probe, l_sub(v, v)); /* NaN when any is not finite */
        }
        float max = l_reduce_max(m), bad = l_tree(probe);
        for (size_t i = whole; i < count; i++) {
            max = x[i] > max ? x[i] : max;
            bad = bad + (x[i] - x[i]);
        }
        if (bad != bad)
            status = SPK_E_NONFINITE;
        m = l_set1(max);
        for (size_t i = 0; i < whole; i += 16)
            sum = l_add(sum, l_exp(l_mul(l_sub(l_load(x + i), m), inv)));
        float lane[16];
        l_store(lane, sum);
        for (size_t i = whole; i < count; i++)
            lane[i - whole] = lane[i - whole] + spk_expf((x[i] - max) * inv_temperature);
        stats[0] = max + 0.0f; /* -0 becomes +0 */
        stats[1] = spk_tree16(lane);
    }
    return status;
}

/* Most groups of 16 hold nothing above the worst candidate: one comparison skips them. */
size_t K(top_k)(const float *logits, size_t n, size_t k, uint32_t *ids, float *values)
{
    size_t held = 0;
    for (size_t group = 0; group < n && k; group += 16) {
        size_t end = n - group < 16 ? n : group + 16;
        if (held == k && end - group == 16 &&
            !(l_reduce_max(l_load(logits + group)) > values[k - 1]))
            continue;
        for (size_t i = group; i < end; i++) {
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
    }
    return held;
}
