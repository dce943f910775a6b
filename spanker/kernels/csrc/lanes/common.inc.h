/* SPDX-License-Identifier: Apache-2.0 */
/* Helpers over 16 lanes, and the names of the functions of one instruction set.
 * The file that includes this has included its lanes.h and defined SPK_ISA.  Where that defines
 * SPK_LANES_SIZELESS, neither array nor structure can hold lanes: what keeps them in arrays is then
 * the instruction set's own. */
#ifndef SPK_LANES_COMMON_H
#define SPK_LANES_COMMON_H

#include <string.h>

#include "spk_kernels.h"

#define SPK_JOIN2(op, isa) op##__##isa
#define SPK_JOIN(op, isa) SPK_JOIN2(op, isa)
#define K(op) SPK_JOIN(op, SPK_ISA)

/* n < 16 floats, the other lanes zero. */
static inline lanes l_load_partial(const float *p, size_t n)
{
    float tmp[16] = {0};
    memcpy(tmp, p, n * sizeof *p);
    return l_load(tmp);
}

static inline void l_store_partial(float *p, lanes a, size_t n)
{
    float tmp[16];
    l_store(tmp, a);
    memcpy(p, tmp, n * sizeof *p);
}

static inline lanes l_rint(lanes x)
{
    lanes magic = l_set1(12582912.0f);
    return l_sub(l_add(x, magic), magic);
}

/* spk_expf in every lane. */
static inline lanes l_exp(lanes x)
{
    x = l_min(l_max(x, l_set1(SPK_EXP_MIN)), l_set1(SPK_EXP_MAX));
    lanes n = l_rint(l_mul(x, l_set1(SPK_EXP_LOG2E)));
    lanes r = l_sub(x, l_mul(n, l_set1(SPK_EXP_LN2_HI)));
    r = l_sub(r, l_mul(n, l_set1(SPK_EXP_LN2_LO)));
    lanes p = l_set1(SPK_EXP_P0);
    p = l_add(l_mul(p, r), l_set1(SPK_EXP_P1));
    p = l_add(l_mul(p, r), l_set1(SPK_EXP_P2));
    p = l_add(l_mul(p, r), l_set1(SPK_EXP_P3));
    p = l_add(l_mul(p, r), l_set1(SPK_EXP_P4));
    p = l_add(l_mul(p, r), l_set1(SPK_EXP_P5));
    lanes y = l_add(l_add(l_mul(p, l_mul(r, r)), r), l_set1(1.0f));
    return l_mul(y, l_pow2(n));
}

static inline float l_tree(lanes a)
{
    float tmp[16];
    l_store(tmp, a);
    return spk_tree16(tmp);
}

/* The largest lane; any order gives the same value (a zero's sign aside). */
static inline float l_reduce_max(lanes a)
{
    float tmp[16], m;
    l_store(tmp, a);
    m = tmp[0];
    for (int i = 1; i < 16; i++)
        m = tmp[i] > m ? tmp[i] : m;
    return m;
}

#endif
