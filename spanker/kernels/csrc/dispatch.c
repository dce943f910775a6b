/* SPDX-License-Identifier: Apache-2.0 */
/* Which instruction sets this build has and this machine can run. */
#include "spk_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if SPK_HAVE_X86_ISAS
#include <cpuid.h>

/* Not every compiler knows "f16c" by name; it is bit 29 of leaf 1's ecx. */
static int has_f16c(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
}

/* __builtin_cpu_supports also asks the operating system whether it saves the registers. */
static int machine_has(int isa)
{
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && has_f16c();
    if (isa == SPK_ISA_AVX2)
        return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

#if SPK_HAVE_NEON
#include <sys/auxv.h>

/* Dot products are an extension; the kernel tells which a program may use. */
static int machine_has_neon_dotprod(void)
{
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}
#endif

#if SPK_HAVE_RVV
#include <sys/auxv.h>

/* The letter V of the machine's ISA string: RVV 1.0, with registers of 128 bits at least. */
static int machine_has_rvv(void)
{
    return (getauxval(AT_HWCAP) >> ('V' - 'A') & 1) != 0;
}
#endif

#if SPK_HAVE_XPOP
static int xpop_found;

void spk_xpop_found(void)
{
    xpop_found = 1;
}
#endif

const struct spk_kernels *spk_kernels_get(int isa)
{
    if (isa == SPK_ISA_SCALAR)
        return &spk_kernels__scalar;
#if SPK_HAVE_X86_ISAS
    if (isa == SPK_ISA_AVX2 && machine_has(isa))
        return &spk_kernels__avx2;
    if (isa == SPK_ISA_AVX512VNNI && machine_has(isa))
        return &spk_kernels__avx512vnni;
#endif
#if SPK_HAVE_NEON
    if (isa == SPK_ISA_NEON && machine_has_neon_dotprod())
        return &spk_kernels__neon;
#endif
#if SPK_HAVE_RVV
    if (isa == SPK_ISA_RVV && machine_has_rvv())
        return &spk_kernels__rvv;
#endif
#if SPK_HAVE_XPOP
    /* All but its products are those of RVV. */
    if (isa == SPK_ISA_XPOP && xpop_found && machine_has_rvv())
        return &spk_kernels__xpop;
#endif
    return NULL;
}

#if defined(__x86_64__)
#define MXCSR_DEFAULT 0x1f80u /* all exceptions masked, round to nearest, no FTZ, no DAZ */

uint64_t spk_fp_enter(void)
{
    uint32_t saved = _mm_getcsr();
    _mm_setcsr(MXCSR_DEFAULT);
    return saved;
}

void spk_fp_leave(uint64_t saved)
{
    _mm_setcsr((uint32_t)saved);
}
#elif defined(__aarch64__)
uint64_t spk_fp_enter(void)
{
    uint64_t saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return saved;
}

void spk_fp_leave(uint64_t saved)
{
    __asm__ volatile("msr fpcr, %0" : : "r"(saved));
}
#elif defined(__riscv_flen)
uint64_t spk_fp_enter(void)
{
    uint64_t saved;
    __asm__ volatile("csrrw %0, fcsr, zero" : "=r"(saved)); /* nearest even; there is no flushing */
    return saved;
}

void spk_fp_leave(uint64_t saved)
{
    __asm__ volatile("csrw fcsr, %0" : : "r"(saved));
}
#else
uint64_t spk_fp_enter(void)
{
    return 0;
}

void spk_fp_leave(uint64_t saved)
{
    (void)saved;
}
#endif
