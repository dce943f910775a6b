/* SPDX-License-Identifier: Apache-2.0 */
/* Bulk operations on elements, a register of the machine at a time, in the compiler's own vectors
 * (the results of comparisons are masks).  What is left at the end is done element by element. */
#include "common.inc.h"
#include "spk_elements.h"

enum { WIDTH = SPK_REGISTER_BYTES / 4 };

typedef float floats __attribute__((vector_size(SPK_REGISTER_BYTES)));
typedef int32_t ints __attribute__((vector_size(SPK_REGISTER_BYTES)));
typedef uint32_t words __attribute__((vector_size(SPK_REGISTER_BYTES)));
typedef uint16_t halves __attribute__((vector_size(SPK_REGISTER_BYTES / 2)));

static inline ints choose(ints mask, ints a, ints b)
{
    return (mask & a) | (~mask & b);
}

static inline ints nan_bits(void)
{
    return (ints){0} + (int32_t)SPK_NAN_BITS;
}

static inline floats canonical(floats x)
{
    return (floats)choose((ints)(x == x), (ints)x, nan_bits());
}

static inline ints order(floats x)
{
    ints u = (ints)x;
    return u ^ (u >> 31 & 0x7fffffff);
}

static inline floats sum_f32(floats a, floats b)
{
    return canonical(a + b);
}

static inline floats first_if(ints first, floats a, floats b)
{
    ints ordered = (ints)(a == a) & (ints)(b == b);
    return (floats)choose(ordered, choose(first, (ints)a, (ints)b), nan_bits());
}

static inline floats max_f32(floats a, floats b)
{
    return first_if((ints)(order(a) > order(b)), a, b);
}

static inline floats min_f32(floats a, floats b)
{
    return first_if((ints)(order(a) < order(b)), a, b);
}

static inline ints sum_i32(ints a, ints b)
{
    return (ints)((words)a + (words)b);
}

static inline ints max_i32(ints a, ints b)
{
    return choose((ints)(a > b), a, b);
}

static inline ints min_i32(ints a, ints b)
{
    return choose((ints)(a < b), a, b);
}

/* --- between memory and registers: WIDTH elements ------------------------------------------- */

static inline floats load_f32(const float *p)
{
    floats x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void store_f32(float *p, floats x)
{
    memcpy(p, &x, sizeof x);
}

static inline ints load_i32(const int32_t *p)
{
    ints x;
    memcpy(&x, p, sizeof x);
    return x;
}

static inline void store_i32(int32_t *p, ints x)
{
    memcpy(p, &x, sizeof x);
}

static inline floats load_f16(const uint16_t *p)
{
    return (floats)r_load_f16(p);
}

static inline void store_f16(uint16_t *p, floats x)
{
    r_store_f16(p, x);
}

static inline floats load_bf16(const uint16_t *p)
{
    halves h;
    memcpy(&h, p, sizeof h);
    return (floats)(__builtin_convertvector(h, words) << 16);
}

static inline void store_bf16(uint16_t *p, floats x)
{
    words u = (words)x;
    halves h = __builtin_convertvector((u + 0x7fffu + (u >> 16 & 1u)) >> 16, halves);
    memcpy(p, &h, sizeof h);
}

/* --- one element: the plain definitions under names that the macros can make ----------------- */

#define SAME(x) (x)
#define one_load_f32 SAME
#define one_store_f32 SAME
#define one_load_i32 SAME
#define one_store_i32 SAME
#define one_load_f16 spk_f16_to_f32
#define one_store_f16 spk_f32_to_f16
#define one_load_bf16 spk_bf16_to_f32
#define one_store_bf16 spk_f32_to_bf16

#define FOLD(element, type, kind, op)                                                           \
    static void op##_of_##element(void *into, const void *operand, size_t n)                    \
    {                                                                                           \
        type *x = into;                                                                         \
        const type *y = operand;                                                                \
        size_t i = 0;                                                                           \
        for (; i + WIDTH <= n; i += WIDTH)                                                      \
            store_##element(x + i, op##_##kind(load_##element(x + i), load_##element(y + i)));  \
        for (; i < n; i++)                                                                      \
            x[i] = one_store_##element(                                                         \
                spk_##op##_##kind(one_load_##element(x[i]), one_load_##element(y[i])));         \
    }

#define FOLDS(element, type, kind)   \
    FOLD(element, type, kind, sum)   \
    FOLD(element, type, kind, max)   \
    FOLD(element, type, kind, min)   \
    static void fold_##element(int op, void *into, const void *operand, size_t n)               \
    {                                                                                           \
        if (op == SPK_REDUCE_SUM)                                                               \
            sum_of_##element(into, operand, n);                                                 \
        else if (op == SPK_REDUCE_MAX)                                                          \
            max_of_##element(into, operand, n);                                                 \
        else                                                                                    \
            min_of_##element(into, operand, n);                                                 \
    }

FOLDS(f32, float, f32)
FOLDS(f16, uint16_t, f32)
FOLDS(bf16, uint16_t, f32)
FOLDS(i32, int32_t, i32)

void K(reduce)(int element, int op, void *into, const void *operand, size_t n)
{
    switch (element) {
    case SPK_F32: fold_f32(op, into, operand, n); break;
    case SPK_F16: fold_f16(op, into, operand, n); break;
    case SPK_BF16: fold_bf16(op, into, operand, n); break;
    default: fold_i32(op, into, operand, n);
    }
}

#define DIVIDE(element, type)                                                                   \
    static void divide_##element(void *into, uint32_t by, size_t n)                             \
    {                                                                                           \
        type *x = into;                                                                         \
        float divisor = (float)by;                                                              \
        floats divisors = (floats){0} + divisor;                                                \
        size_t i = 0;                                                                           \
        for (; i + WIDTH <= n; i += WIDTH)                                                      \
            store_##element(x + i, canonical(load_##element(x + i) / divisors));                \
        for (; i < n; i++)                                                                      \
            x[i] = one_store_##element(spk_canonical(one_load_##element(x[i]) / divisor));      \
    }

DIVIDE(f32, float)
DIVIDE(f16, uint16_t)
DIVIDE(bf16, uint16_t)

void K(divide)(int element, void *into, uint32_t by, size_t n)
{
    switch (element) {
    case SPK_F32: divide_f32(into, by, n); break;
    case SPK_F16: divide_f16(into, by, n); break;
    case SPK_BF16: divide_bf16(into, by, n); break;
    default: spk_kernels__scalar.divide(element, into, by, n);
    }
}
