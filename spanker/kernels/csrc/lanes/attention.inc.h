/* SPDX-License-Identifier: Apache-2.0 */
/* KV append and attention over paged f16 keys and values.
 *
 * Four queries share each load of a key tile or value row: the f16 conversion is the cost, and
 * queries of one KV head (grouped heads, neighbouring tokens) are independent of each other. */
#include "common.inc.h"

#define QUERIES 4

static uint16_t *page_of(const struct spk_kv *kv, uint32_t page, size_t kv_head)
{
    size_t head_words = 2 * kv->page_positions * kv->head_dim;
    return kv->pool + ((size_t)page * kv->kv_heads + kv_head) * head_words;
}

int K(kv_append)(const struct spk_kv *kv, uint32_t page, uint32_t pos, const float *k,
                 const float *v)
{
    return spk_kernels__scalar.kv_append(kv, page, pos, k, v);
}

static inline __attribute__((always_inline)) void
scores(const struct spk_attention *a, size_t first, int n, size_t tiles, size_t row)
{
    const struct spk_kv *kv = &a->kv;
    size_t dim = kv->head_dim, tiles_per_page = kv->page_positions / 16;
    lanes scale = l_set1(a->scale);
    for (size_t tile = 0; tile < tiles; tile++) {
        const uint16_t *keys =
            page_of(kv, a->pages[tile / tiles_per_page], a->kv_head) + tile % tiles_per_page * 16 * dim;
        lanes s[QUERIES];
        for (int j = 0; j < n; j++)
            s[j] = l_set1(0.0f);
        for (size_t i = 0; i < dim; i++) {
            lanes key = l_load_f16(keys + i * 16);
            for (int j = 0; j < n; j++)
                s[j] = l_add(s[j], l_mul(l_set1(a->q[first + (size_t)j][i]), key));
        }
        for (int j = 0; j < n; j++)
            l_store(a->scratch + (size_t)j * row + tile * 16, l_mul(s[j], scale));
    }
}

/* Scores to exp(score - max); returns the sum, NaN when a score is not finite.  Lanes past
 * `visible` become +0. */
static float softmax_numerators(float *score, size_t visible)
{
    size_t whole = visible / 16 * 16;
    float max = score[0];
    lanes m = l_set1(max), sum = l_set1(0.0f), probe = sum;
    for (size_t p = 0; p < whole; p += 16) {
        lanes s = l_load(score + p);
        m = l_max(m, s);
        probe = l_add(probe, l_sub(s, s));
    }
    max = l_reduce_max(m);
    float bad = l_tree(probe);
    for (size_t p = whole; p < visible; p++) {
        max = score[p] > max ? score[p] : max;
        bad = bad + (score[p] - score[p]);
    }
    if (bad != bad)
        return bad;
    m = l_set1(max);
    for (size_t p = 0; p < whole; p += 16) {
        lanes e = l_exp(l_sub(l_load(score + p), m));
        l_store(score + p, e);
        sum = l_add(sum, e);
    }
    if (whole < visible) {
        float tail[16];
        l_store(tail, l_exp(l_sub(l_load_partial(score + whole, visible - whole), m)));
        memset(tail + (visible - whole), 0, (16 - (visible - whole)) * sizeof *tail);
        memcpy(score + whole, tail, sizeof tail);
        sum = l_add(sum, l_load(tail));
    }
    return l_tree(sum);
}

/* Sum over positions [begin, end) of one page into acc, 16 dimensions from `at`. */
static inline __attribute__((always_inline)) void
values_16(const struct spk_attention *a, int n, size_t end, size_t row, size_t at, lanes *acc)
{
    const struct spk_kv *kv = &a->kv;
    size_t dim = kv->head_dim;
    for (size_t begin = 0; begin < end; begin += kv->page_positions) {
        const uint16_t *values = page_of(kv, a->pages[begin / kv->page_positions], a->kv_head) +
                                 kv->page_positions * dim + at;
        size_t count = end - begin < kv->page_positions ? end - begin : kv->page_positions;
        for (size_t p = 0; p < count; p++) {
            lanes v = l_load_f16(values + p * dim);
            for (int j = 0; j < n; j++)
                acc[j] = l_add(acc[j], l_mul(l_set1(a->scratch[(size_t)j * row + begin + p]), v));
        }
    }
}

/* One query, dimensions [from, dim): the last ones of a head size that is no multiple of 16. */
static void values_tail(const struct spk_attention *a, size_t query, size_t row, size_t j,
                        size_t from, float sum)
{
    const struct spk_kv *kv = &a->kv;
    for (size_t i = from; i < kv->head_dim; i++) {
        float o = 0.0f;
        for (size_t p = 0; p < a->visible[query]; p++) {
            const uint16_t *values =
                page_of(kv, a->pages[p / kv->page_positions], a->kv_head) +
                (kv->page_positions + p % kv->page_positions) * kv->head_dim;
            o = o + a->scratch[j * row + p] * spk_f16_to_f32(values[i]);
        }
        a->out[query][i] = o / sum;
    }
}

static inline __attribute__((always_inline)) int attend(const struct spk_attention *a,
                                                        size_t first, int n)
{
    size_t dim = a->kv.head_dim, whole = dim / 16 * 16, longest = 0;
    float sum[QUERIES];
    for (int j = 0; j < n; j++)
        longest = a->visible[first + (size_t)j] > longest ? a->visible[first + (size_t)j] : longest;
    size_t tiles = (longest + 15) / 16, row = tiles * 16;
    scores(a, first, n, tiles, row);
    for (int j = 0; j < n; j++) {
        size_t visible = a->visible[first + (size_t)j];
        sum[j] = softmax_numerators(a->scratch + (size_t)j * row, visible);
        if (sum[j] != sum[j])
            return SPK_E_NONFINITE;
        /* Shorter queries of the group add e = +0: acc + 0*v is acc for finite v, and no
         * accumulator is -0 (it starts at +0). */
        for (size_t p = (visible + 15) / 16 * 16; p < row; p++)
            a->scratch[(size_t)j * row + p] = 0.0f;
    }
    for (size_t at = 0; at < whole; at += 16) {
        lanes acc[QUERIES];
        for (int j = 0; j < n; j++)
            acc[j] = l_set1(0.0f);
        values_16(a, n, longest, row, at, acc);
        for (int j = 0; j < n; j++)
            l_store(a->out[first + (size_t)j] + at, l_div(acc[j], l_set1(sum[j])));
    }
    if (whole < dim)
        for (int j = 0; j < n; j++)
            values_tail(a, first + (size_t)j, row, (size_t)j, whole, sum[j]);
    return SPK_OK;
}

int K(attention)(const struct spk_attention *a)
{
    int status = SPK_OK;
    size_t j = 0;
    for (; status == SPK_OK && j + QUERIES <= a->queries; j += QUERIES)
        status = attend(a, j, QUERIES);
    if (status != SPK_OK)
        return status;
    switch (a->queries - j) {
    case 3: return attend(a, j, 3);
    case 2: return attend(a, j, 2);
    case 1: return attend(a, j, 1);
    default: return SPK_OK;
    }
}
