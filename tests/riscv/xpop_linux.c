/* SPDX-License-Identifier: Apache-2.0 */
/* xpop_cases.c as a program of Linux whose processor lacks the extension: the emulation by trap. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "xpop_machine.h"
#include "xpop_trap.h"

/* Of a reserved encoding, which the emulation passes on, and of a misaligned operand. */
static void on_signal(int number, siginfo_t *info, void *raw)
{
    ucontext_t *context = raw;
    unsigned long *pc = &context->uc_mcontext.__gregs[REG_PC];
    if (*pc != (unsigned long)case_insn || (number == SIGBUS && info->si_code != BUS_ADRALN))
        abort();
    xpop_trapped(number == SIGILL ? XPOP_ILLEGAL : XPOP_MISALIGNED,
                 number == SIGILL ? 0 : (uint64_t)(uintptr_t)info->si_addr);
    *pc = (unsigned long)case_end;
}

static char *hidden;
static volatile unsigned faults;

/* A page that the emulation touches while it is hidden. */
static void on_fault(int number, siginfo_t *info, void *raw)
{
    (void)number, (void)raw;
    uintptr_t address = (uintptr_t)info->si_addr, page = address & ~(uintptr_t)0xfff;
    if (page - (uintptr_t)hidden >= 4 * 4096 || !xpop_may_fault(0, address) ||
        mprotect((void *)page, 4096, PROT_READ | PROT_WRITE))
        abort();
    faults++;
}

void xpop_hide(void *at, unsigned mask)
{
    hidden = at;
    for (unsigned i = 0; i < 4; i++)
        if ((mask >> i & 1) && mprotect(hidden + i * 4096, 4096, PROT_NONE))
            abort();
}

unsigned xpop_show(void)
{
    if (mprotect(hidden, 4 * 4096, PROT_READ | PROT_WRITE))
        abort();
    return faults;
}

void xpop_prepare(void)
{
    static char stack[1 << 16] __attribute__((aligned(16)));
    const stack_t other = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    struct sigaction fault = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (sigaltstack(&other, NULL) || sigaction(SIGILL, &action, NULL) ||
        sigaction(SIGBUS, &action, NULL) ||
        sigaction(SIGSEGV, &fault, NULL) || spk_xpop_install_trap()) {
        perror("xpop_prepare");
        exit(1);
    }
}

void xpop_print(uint64_t value, unsigned digits)
{
    printf("%0*llx\n", (int)digits, (unsigned long long)value);
}

int xpop_run_with_modes(unsigned modes)
{
    uint64_t set = (modes & 7) % 5 << 5 | modes >> 3, after;
    __asm__ volatile("csrw fcsr, %0" : : "r"(set) : "memory");
    xpop_run();
    __asm__ volatile("csrrw %0, fcsr, zero" : "=r"(after) : : "memory");
    return after == set;
}
