/* SPDX-License-Identifier: Apache-2.0 */
/* KV append and attention over paged f16 keys and values.
 *
 * Several queries share each load of a key tile or value row: queries of one KV head (grouped
 * heads, neighbouring tokens) are independent of each other.
 *
 * Sketch: a query and 16 positions take 2 * dim multiplications and as many additions of 16 lanes,
 * which bound the kernel: no fused operation may join them.  An instruction set says in lanes.h how
 * many queries its registers hold. */
#include "common.inc.h"
#include "spk_kv.h"

#define QUERIES SPK_LANES_QUERIES
#define VALUE_QUERIES (QUERIES < 4 ? QUERIES : 4)
#define VALUE_CHUNKS SPK_LANES_VALUE_CHUNKS /* of 16 dimensions that are summed at a time */

int K(kv_append)(const struct spk_kv *kv, uint32_t page, uint32_t pos, const float *k,
                 const float *v)
{
    return spk_kernels__scalar.kv_append(kv, page, pos, k, v);
}

static const uint16_t *keys_of_tile(const struct spk_attention *a, size_t tile)
{
    size_t tiles_per_page = a->kv.page_positions / 16;
    return spk_keys(&a->kv, a->pages[tile / tiles_per_page], a->kv_head) +
           tile % tiles_per_page * 16 * a->kv.head_dim;
}

/* What comes AHEAD tiles later is asked for while a tile is worked on: a page ends before the core
 * has seen where the stream goes. */
#define AHEAD 4

/* The queries side by side, [dim][n], behind the scores: one pointer instead of n. */
static inline __attribute__((always_inline)) const float *
side_by_side(const struct spk_attention *a, size_t first, int n, float *out)
{
    for (int j = 0; j < n; j++)
        for (size_t i = 0; i < a->kv.head_dim; i++)
            out[i * (size_t)n + (size_t)j] = a->q[first + (size_t)j][i];
    return out;
}

/* Scaled scores of n queries from `first`, `row` floats apart, and the queries behind them. */
static inline __attribute__((always_inline)) void
scores(const struct spk_attention *a, size_t first, int n, size_t tiles, size_t row);

#if !SPK_LANES_SIZELESS
static inline __attribute__((always_inline)) void
scores(const struct spk_attention *a, size_t first, int n, size_t tiles, size_t row)
{
    size_t dim = a->kv.head_dim;
    const float *q = side_by_side(a, first, n, a->scratch + (size_t)n * row);
    lanes scale = l_set1(a->scale);
    for (size_t tile = 0; tile < tiles; tile++) {
        const uint16_t *keys = keys_of_tile(a, tile);
        const uint16_t *later = keys_of_tile(a, tile + AHEAD < tiles ? tile + AHEAD : tile);
        lanes s[QUERIES];
        for (int j = 0; j < n; j++)
            s[j] = l_set1(0.0f);
        for (size_t i = 0; i < dim; i++) {
            lanes key = l_load_f16(keys + i * 16);
            __builtin_prefetch(later + i * 16);
            for (int j = 0; j < n; j++)
                s[j] = l_add(s[j], l_mul(l_set1(q[i * (size_t)n + (size_t)j]), key));
        }
        for (int j = 0; j < n; j++)
            l_store(a->scratch + (size_t)j * row + tile * 16, l_mul(s[j], scale));
    }
}
#endif

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

static const uint16_t *values_of_tile(const struct spk_attention *a, size_t tile)
{
    size_t page = a->kv.page_positions, position = tile * 16;
    return spk_values(&a->kv, a->pages[position / page], a->kv_head) +
           position % page * a->kv.head_dim;
}

/* Sums over all positions for n queries from `first` (their scores from `score`), `chunks` times 16
 * dimensions from `at`. */
static inline __attribute__((always_inline)) void
values(const struct spk_attention *a, size_t first, int n, const float *score, size_t row,
       size_t end, const float *sum, size_t at, int chunks);

#if !SPK_LANES_SIZELESS
static inline __attribute__((always_inline)) void
values(const struct spk_attention *a, size_t first, int n, const float *score, size_t row,
       size_t end, const float *sum, size_t at, int chunks)
{
    size_t dim = a->kv.head_dim;
    lanes acc[VALUE_QUERIES][VALUE_CHUNKS];
    for (int j = 0; j < n; j++)
        for (int c = 0; c < chunks; c++)
            acc[j][c] = l_set1(0.0f);
    for (size_t begin = 0; begin < end; begin += 16) {
        const uint16_t *v = values_of_tile(a, begin / 16) + at;
        const uint16_t *later = values_of_tile(a, (begin + 16 * AHEAD < end ? begin + 16 * AHEAD
                                                                           : begin) / 16) + at;
        size_t count = end - begin < 16 ? end - begin : 16;
        for (size_t p = 0; p < count; p++, v += dim, later += dim) {
            lanes value[VALUE_CHUNKS];
            for (int c = 0; c < chunks; c++) {
                value[c] = l_load_f16(v + c * 16);
                __builtin_prefetch(later + c * 16);
            }
            for (int j = 0; j < n; j++) {
                lanes e = l_set1(score[(size_t)j * row + begin + p]);
                for (int c = 0; c < chunks; c++)
                    acc[j][c] = l_add(acc[j][c], l_mul(e, value[c]));
            }
        }
    }
    for (int j = 0; j < n; j++)
        for (int c = 0; c < chunks; c++)
            l_store(a->out[first + (size_t)j] + at + c * 16, l_div(acc[j][c], l_set1(sum[j])));
}
#endif

static inline __attribute__((always_inline)) void
values_of(const struct spk_attention *a, size_t first, int n, const float *score, size_t row,
          size_t end, const float *sum)
{
    size_t at = 0, whole = a->kv.head_dim / 16 * 16;
    for (; at + 16 * VALUE_CHUNKS <= whole; at += 16 * VALUE_CHUNKS)
        values(a, first, n, score, row, end, sum, at, VALUE_CHUNKS);
    for (; at < whole; at += 16)
        values(a, first, n, score, row, end, sum, at, 1);
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
                spk_values(kv, a->pages[p / kv->page_positions], a->kv_head) +
                p % kv->page_positions * kv->head_dim;
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
    for (int j = 0; j < n; j += VALUE_QUERIES) {
        const float *score = a->scratch + (size_t)j * row;
        size_t at = first + (size_t)j;
        switch (n - j < VALUE_QUERIES ? n - j : VALUE_QUERIES) {
        case 1: values_of(a, at, 1, score, row, longest, sum + j); break;
        case 2: values_of(a, at, 2, score, row, longest, sum + j); break;
        case 3: values_of(a, at, 3, score, row, longest, sum + j); break;
        default: values_of(a, at, VALUE_QUERIES, score, row, longest, sum + j); break;
        }
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
#if SPK_LANES_QUERIES > 4
    case 7: return attend(a, j, 7);
    case 6: return attend(a, j, 6);
    case 5: return attend(a, j, 5);
    case 4: return attend(a, j, 4);
#endif
    case 3: return attend(a, j, 3);
    case 2: return attend(a, j, 2);
    case 1: return attend(a, j, 1);
    default: return SPK_OK;
    }
}
