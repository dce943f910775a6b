/* SPDX-License-Identifier: Apache-2.0 */
/* Bulk operations on elements: into = into op operand, into = into / count.  Plain loops, which
 * the compiler makes vectors of. */
#include "spk_elements.h"
#include "spk_kernels.h"

#define SAME(x) (x)

#define FOLD(element, type, load, fold, store)                                                  \
    static void fold##_##element(void *restrict into, const void *restrict operand, size_t n)   \
    {                                                                                           \
        type *x = into;                                                                         \
        const type *y = operand;                                                                \
        for (size_t i = 0; i < n; i++)                                                          \
            x[i] = store(fold(load(x[i]), load(y[i])));                                         \
    }

#define FOLDS(element, type, load, kind, store)             \
    FOLD(element, type, load, spk_sum_##kind, store)        \
    FOLD(element, type, load, spk_max_##kind, store)        \
    FOLD(element, type, load, spk_min_##kind, store)

FOLDS(f32, float, SAME, f32, SAME)
FOLDS(f16, uint16_t, spk_f16_to_f32, f32, spk_f32_to_f16)
FOLDS(bf16, uint16_t, spk_bf16_to_f32, f32, spk_f32_to_bf16)
FOLDS(i32, int32_t, SAME, i32, SAME)

#define FOLD_BY_OP(element, kind)                                             \
    switch (op) {                                                             \
    case SPK_REDUCE_SUM: spk_sum_##kind##_##element(into, operand, n); break; \
    case SPK_REDUCE_MAX: spk_max_##kind##_##element(into, operand, n); break; \
    default: spk_min_##kind##_##element(into, operand, n); break;             \
    }                                                                         \
    break

void reduce__scalar(int element, int op, void *into, const void *operand, size_t n)
{
    switch (element) {
    case SPK_F32: FOLD_BY_OP(f32, f32);
    case SPK_F16: FOLD_BY_OP(f16, f32);
    case SPK_BF16: FOLD_BY_OP(bf16, f32);
    default: FOLD_BY_OP(i32, i32);
    }
}

void divide__scalar(int element, void *into, uint32_t by, size_t n)
{
    float *f = into, divisor = (float)by;
    uint16_t *h = into;
    int32_t *i32 = into;
    switch (element) {
    case SPK_F32:
        for (size_t i = 0; i < n; i++)
            f[i] = spk_canonical(f[i] / divisor);
        break;
    case SPK_F16:
        for (size_t i = 0; i < n; i++)
            h[i] = spk_f32_to_f16(spk_canonical(spk_f16_to_f32(h[i]) / divisor));
        break;
    case SPK_BF16:
        for (size_t i = 0; i < n; i++)
            h[i] = spk_f32_to_bf16(spk_canonical(spk_bf16_to_f32(h[i]) / divisor));
        break;
    default:
        for (size_t i = 0; i < n; i++)
            i32[i] = spk_divide_i32(i32[i], by);
    }
}
