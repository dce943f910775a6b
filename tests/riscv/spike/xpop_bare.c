/* SPDX-License-Identifier: Apache-2.0 */
/* xpop_cases.c on a bare machine with the extension: Spike's, with its host interface. */
#include <stddef.h>

#include "xpop_machine.h"

extern volatile uint64_t tohost, fromhost;

static void put(char c)
{
    tohost = (uint64_t)1 << 56 | (uint64_t)1 << 48 | (uint8_t)c;
    while (tohost)
        if (fromhost)
            fromhost = 0;
    fromhost = 0;
}

__attribute__((noreturn)) void xpop_exit(int status)
{
    for (;;)
        tohost = (uint64_t)status << 1 | 1;
}

void xpop_print(uint64_t value, unsigned digits)
{
    while (digits--)
        put("0123456789abcdef"[value >> 4 * digits & 15]);
    put('\n');
}

/* Sv39: data of a case is translated, each page to itself, by MPRV as user mode sees it.  All there is
 * lies in the first 2 MiB from here. */
#define BASE 0x80000000u
#define PTE_VALID 1u
#define PTE_USER_DATA 0xd7u /* valid, readable, writable, user's, accessed, dirty */

static uint64_t root[512] __attribute__((aligned(4096)));
static uint64_t middle[512] __attribute__((aligned(4096)));
static uint64_t pages[512] __attribute__((aligned(4096)));
static unsigned first_hidden, faults;

static uint64_t pte_of(uint64_t address, uint64_t flags)
{
    return address >> 12 << 10 | flags;
}

static void flush(void)
{
    __asm__ volatile("sfence.vma" : : : "memory");
}

void xpop_hide(void *at, unsigned mask)
{
    first_hidden = (unsigned)(((uint64_t)(uintptr_t)at - BASE) >> 12);
    for (unsigned i = 0; i < 4; i++)
        if (mask >> i & 1)
            pages[first_hidden + i] &= ~(uint64_t)PTE_VALID;
    flush();
}

unsigned xpop_show(void)
{
    for (unsigned i = 0; i < 4; i++)
        pages[first_hidden + i] |= PTE_VALID;
    flush();
    return faults;
}

/* Called by start.S with the cause, the address and where; returns where to go on. */
uint64_t xpop_exception(uint64_t cause, uint64_t address, uint64_t at)
{
    int page_fault = (cause == 13 || cause == 15) && xpop_may_fault(cause, address);
    if (at != (uint64_t)(uintptr_t)case_insn || (cause > 6 && !page_fault)) {
        xpop_print(cause, 16);
        xpop_print(address, 16);
        xpop_print(at, 16);
        xpop_exit(1);
    }
    if (page_fault) {
        pages[(address - BASE) >> 12] |= PTE_VALID;
        flush();
        faults++;
        return at;
    }
    xpop_trapped(cause, address);
    return (uint64_t)(uintptr_t)case_end;
}

void xpop_prepare(void)
{
    root[BASE >> 30] = pte_of((uint64_t)(uintptr_t)middle, PTE_VALID);
    middle[0] = pte_of((uint64_t)(uintptr_t)pages, PTE_VALID);
    for (unsigned i = 0; i < 512; i++)
        pages[i] = pte_of(BASE + i * 4096u, PTE_USER_DATA);
    __asm__ volatile("csrw pmpaddr0, %0\ncsrw pmpcfg0, %1" : : "r"(~(uint64_t)0), "r"(0x1f));
    __asm__ volatile("csrw satp, %0" : : "r"((uint64_t)8 << 60 | (uint64_t)(uintptr_t)root >> 12));
    flush();
}

/* Vectors are off all the time.  Floating point is on with one half of the modes, in state "initial":
 * it does not become "dirty".  Spike rounds as its last instruction did, so there is one. */
int xpop_run_with_modes(unsigned modes)
{
    const uint64_t mpp = 3 << 11, mprv = 1 << 17, fs = 3 << 13, units = fs | 3 << 9 | 3 << 15;
    const uint64_t set = (modes & 7) % 5 << 5 | modes >> 3;
    const uint64_t initial = set & 16 ? 0 : 1 << 13;
    uint64_t status, after;
    __asm__ volatile("csrs mstatus, %0\ncsrw fcsr, %1\nfmv.w.x ft0, zero\nfadd.s ft0, ft0, ft0"
                     : : "r"(fs), "r"(set) : "ft0");
    __asm__ volatile("csrc mstatus, %0\ncsrs mstatus, %1"
                     : : "r"(fs | mpp), "r"(mprv | initial) : "memory");
    xpop_run();
    __asm__ volatile("csrr %0, mstatus\ncsrs mstatus, %2\ncsrr %1, fcsr\ncsrc mstatus, %3"
                     : "=&r"(status), "=&r"(after) : "r"(fs), "r"(fs | mprv) : "memory");
    return (status & units) == initial && after == set;
}

void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
    uint8_t *a = to;
    const uint8_t *b = from;
    while (n--)
        *a++ = *b++;
    return to;
}
