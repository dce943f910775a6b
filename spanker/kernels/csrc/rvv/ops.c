/* SPDX-License-Identifier: Apache-2.0 */
#include "lanes.h"
#define SPK_ISA rvv

#define ADD(j) acc##j = l_add(acc##j, l_scale(wv, x[(t + j) * x_stride + i]))
#define STORE(j) l_store_partial(out + (t + j) * out_stride + tile * 16, acc##j, n)
#define MATMUL_FLOAT_TILE(load, weight, TOKENS)                        \
    do {                                                               \
        lanes acc0 = l_set1(0.0f), acc1 = acc0, acc2 = acc0, acc3 = acc0; \
        for (size_t i = 0; i < k; i++) {                               \
            lanes wv = load((weight) + i * 16);                        \
            EACH_OF(TOKENS, ADD);                                      \
        }                                                              \
        EACH_OF(TOKENS, STORE);                                        \
    } while (0)
#include "../lanes/ops.inc.h"
