/* SPDX-License-Identifier: Apache-2.0 */
/* The two products of attention, of up to four queries: each has a group of four registers beside
 * one for the key or value and one for a product. */
#include "lanes.h"
#define SPK_ISA rvv
#include "../lanes/attention.inc.h"

_Static_assert(QUERIES == 4 && VALUE_QUERIES == 4 && VALUE_CHUNKS == 1, "sums have names");

static inline __attribute__((always_inline)) void
scores(const struct spk_attention *a, size_t first, int n, size_t tiles, size_t row)
{
    size_t dim = a->kv.head_dim, width = (size_t)n;
    const float *queries = side_by_side(a, first, n, a->scratch + width * row);
    for (size_t tile = 0; tile < tiles; tile++) {
        const uint16_t *keys = keys_of_tile(a, tile);
        const float *q = queries;
        float *out = a->scratch + tile * 16;
        lanes sum0 = l_set1(0.0f), sum1 = sum0, sum2 = sum0, sum3 = sum0;
        for (size_t i = 0; i < dim; i++, q += width) {
            lanes key = l_load_finite_f16(keys + i * 16);
#define ADD(j) sum##j = l_add(sum##j, l_scale(key, q[j]))
            EACH_OF(n, ADD);
#undef ADD
        }
#define STORE(j) l_store(out + j * row, l_scale(sum##j, a->scale))
        EACH_OF(n, STORE);
#undef STORE
    }
}

static inline __attribute__((always_inline)) void
values(const struct spk_attention *a, size_t first, int n, const float *score, size_t row,
       size_t end, const float *sum, size_t at, int chunks)
{
    (void)chunks; /* is 1 */
    lanes acc0 = l_set1(0.0f), acc1 = acc0, acc2 = acc0, acc3 = acc0;
    for (size_t begin = 0; begin < end; begin += 16) {
        const uint16_t *v = values_of_tile(a, begin / 16) + at;
        const float *e = score + begin;
        size_t count = end - begin < 16 ? end - begin : 16;
        for (size_t p = 0; p < count; p++, v += a->kv.head_dim, e++) {
            lanes value = l_load_finite_f16(v);
#define ADD(j) acc##j = l_add(acc##j, l_scale(value, e[j * row]))
            EACH_OF(n, ADD);
#undef ADD
        }
    }
#define STORE(j) l_store(a->out[first + j] + at, l_div(acc##j, l_set1(sum[j])))
    EACH_OF(n, STORE);
#undef STORE
}
