/* SPDX-License-Identifier: Apache-2.0 */
/* Every instruction set of this machine equals the plain kernels, and none reads or writes a byte
 * beyond what it was promised. */
#include "kernel_compare.h"

static void packing_refuses_what_it_does_not_know(void)
{
    CASE("packing");
    for (int format = -1; format <= SPK_FORMAT_COUNT; format++) {
        size_t weights = spk_block_weights(format);
        int known = weights == 1 || weights == SPK_BLOCK || weights == SPK_SUPER_BLOCK;
        CHECK(known || weights == 0);
        CHECK_EQUAL(spk_row_bytes(format, 256) != 0, known);
        CHECK_EQUAL(spk_pack(format, NULL, 0, NULL, 0, 256), known ? SPK_OK : SPK_E_ARG);
        CHECK_EQUAL(spk_pack(format, NULL, 0, NULL, 0, 257), weights == 1 ? SPK_OK : SPK_E_ARG);
        CHECK_EQUAL(spk_row_bytes(format, 257) != 0, weights == 1);
        CHECK_EQUAL(spk_packed_bytes(format, 17, 512), 32 * spk_row_bytes(format, 512));
    }
    CHECK_EQUAL(spk_row_bytes(SPK_Q4_1, 64), 40);
    CHECK_EQUAL(spk_row_bytes(SPK_Q5_K, 512), 352);
    CHECK_EQUAL(spk_row_bytes(SPK_Q6_K, 32), 0);
    CHECK_EQUAL(spk_packed_bytes(SPK_Q8_0, 17, 32), 32 * 34);
}

#if defined(__x86_64__)
#include <immintrin.h>

/* Whatever the modes of the thread were, between enter and leave they are the defined ones. */
static void floating_point_modes_are_set_and_restored(void)
{
    const uint32_t hostile = 0x1f80u | 0x8000u | 0x0040u | 0x4000u; /* FTZ, DAZ, round up */
    volatile float smallest = 0x1p-149f, third = 3.0f;
    CASE("floating-point modes");
    _mm_setcsr(hostile);
    CHECK(smallest * 1.0f == 0.0f);
    uint64_t saved = spk_fp_enter();
    float kept = smallest * 1.0f, rounded = 1.0f / third;
    uint16_t subnormal = spk_f16_from_f32(0x1p-24f);
    float read = spk_f32_from_f16(1);
    spk_fp_leave(saved);
    uint32_t after = _mm_getcsr() & ~0x3fu; /* but for the sticky exception flags */
    _mm_setcsr(0x1f80u);
    CHECK(kept == 0x1p-149f && rounded == 0x1.555556p-2f);
    CHECK(subnormal == 1 && read == 0x1p-24f);
    CHECK_EQUAL(after, hostile);
}
#else
static void floating_point_modes_are_set_and_restored(void)
{
}
#endif

int main(void)
{
    uint64_t saved = spk_fp_enter();
    for (int isa = 0; isa < SPK_ISA_COUNT; isa++)
        if (spk_kernels_get(isa)) {
            CHECK_EQUAL(spk_kernels_get(isa)->isa, isa);
            compare_kernels(spk_kernels_get(isa));
        }
    CHECK(spk_kernels_get(-1) == NULL && spk_kernels_get(SPK_ISA_COUNT) == NULL);
    packing_refuses_what_it_does_not_know();
    floating_point_modes_are_set_and_restored();
    spk_fp_leave(saved);
    puts("ok kernels");
    return 0;
}
