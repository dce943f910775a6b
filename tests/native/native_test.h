/* SPDX-License-Identifier: Apache-2.0 */
/* What the native tests share: checks that print where and with which seed, seeded numbers, and
 * buffers exactly as large as promised, so that a sanitizer sees the first byte beyond. */
#ifndef NATIVE_TEST_H
#define NATIVE_TEST_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The case being run, for the message of a failure. */
static char test_case[256];

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "%s:%d: failed: %s\n  case: %s\n", __FILE__, __LINE__, #condition, \
                    test_case);                                                                \
            exit(1);                                                                           \
        }                                                                                      \
    } while (0)

#define CHECK_EQUAL(got, expected)                                                             \
    do {                                                                                       \
        long long got_ = (long long)(got), expected_ = (long long)(expected);                  \
        if (got_ != expected_) {                                                               \
            fprintf(stderr, "%s:%d: %s is %lld, expected %lld\n  case: %s\n", __FILE__,        \
                    __LINE__, #got, got_, expected_, test_case);                               \
            exit(1);                                                                           \
        }                                                                                      \
    } while (0)

#define CASE(...) snprintf(test_case, sizeof test_case, __VA_ARGS__)

/* splitmix64 (Steele, Lea, Flood 2014): one word of state, so a case is repeated by its seed. */
struct rng {
    uint64_t state;
};

static inline uint64_t rng_next(struct rng *r)
{
    uint64_t z = (r->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Below n, for small n. */
static inline uint32_t rng_below(struct rng *r, uint32_t n)
{
    return (uint32_t)(((rng_next(r) >> 32) * n) >> 32);
}

static inline float rng_float(struct rng *r)
{
    return (float)(int32_t)(rng_next(r) >> 40) * 0x1p-22f - 2.0f;
}

/* Exactly n bytes, every one of them 0xa5. */
static inline void *exact(size_t n)
{
    void *p = malloc(n);
    if (!p && n) {
        fprintf(stderr, "no memory for %zu bytes\n", n);
        exit(1);
    }
    if (n)
        memset(p, 0xa5, n);
    return p;
}

static inline float *exact_floats(struct rng *r, size_t n)
{
    float *p = exact(n * sizeof *p);
    for (size_t i = 0; i < n; i++)
        p[i] = rng_float(r);
    return p;
}

/* Bytes of `rows` rows of `width` elements that lie `stride` apart: nothing after the last. */
static inline size_t span(size_t rows, size_t width, size_t stride)
{
    return rows ? (rows - 1) * stride + width : 0;
}

#endif
