/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The NEON kernels equal the plain ones, and both equal those of another machine: the digest of
 * all results, which this prints, is the same where the program runs natively.  With an argument
 * it only says which instruction sets the machine has.  Built and run by tools/check_neon.sh.
 */
#include "../kernel_compare.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define COMPARED (&spk_kernels__neon)

static uint64_t fpcr(void)
{
    uint64_t value;
    __asm__ volatile("mrs %0, fpcr" : "=r"(value));
    return value;
}

/* Whatever the modes of the thread were, between enter and leave they are the defined ones. */
static void floating_point_modes_are_set_and_restored(void)
{
    /* Alternative half precision, default NaN, flush to zero (f32 and f16), round up. */
    const uint64_t hostile = 1u << 26 | 1u << 25 | 1u << 24 | 1u << 19 | 1u << 22;
    /* Volatile: nothing is computed by the compiler, or before or after its time. */
    volatile float smallest = 0x1p-149f, third = 3.0f, kept, rounded, read;
    volatile uint16_t infinity = 0x7c00;
    CASE("floating-point modes");
    uint64_t before = fpcr();
    __asm__ volatile("msr fpcr, %0" : : "r"(hostile));
    CHECK(smallest * 1.0f == 0.0f);
    uint64_t saved = spk_fp_enter();
    kept = smallest * 1.0f;
    rounded = 1.0f / third;
    read = vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(infinity))), 0);
    spk_fp_leave(saved);
    uint64_t after = fpcr();
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
    CHECK(kept == 0x1p-149f && rounded == 0x1.555556p-2f && isinf(read));
    CHECK_EQUAL(after, hostile);
}
#else
#define COMPARED PLAIN

static void floating_point_modes_are_set_and_restored(void)
{
}
#endif

int main(int count, char **arguments)
{
    (void)arguments;
    if (count > 1) {
        for (int isa = 0; isa < SPK_ISA_COUNT; isa++)
            if (spk_kernels_get(isa))
                printf("%s\n", spk_kernels_get(isa)->name);
        return 0;
    }
    uint64_t saved = spk_fp_enter();
    compare_kernels(COMPARED);
    floating_point_modes_are_set_and_restored();
    spk_fp_leave(saved);
    printf("%016llx\n", (unsigned long long)compared_digest);
    return 0;
}
