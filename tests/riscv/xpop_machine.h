/* SPDX-License-Identifier: Apache-2.0 */
/* What xpop_cases.c needs of a machine: xpop_linux.c and spike/xpop_bare.c have it. */
#ifndef XPOP_MACHINE_H
#define XPOP_MACHINE_H

#include <stdint.h>

#define XPOP_ILLEGAL 2
#define XPOP_MISALIGNED 46 /* 4 or 6: a signal does not tell which */

/* Once, before any case. */
void xpop_prepare(void);
/* A line of so many hexadecimal digits. */
void xpop_print(uint64_t value, unsigned digits);
/* xpop_run() with rounding mode and flags as `modes` has them, where the machine has floats; 0 unless
 * they are the same afterwards. */
int xpop_run_with_modes(unsigned modes);

/* Four pages of 4 KiB from `at`: those of the mask cannot be reached by the next case, until it touches
 * them; xpop_show makes all reachable and returns how often one was touched so far. */
void xpop_hide(void *at, unsigned mask);
unsigned xpop_show(void);

/* Those of xpop_cases.c. */
/* Whether the running case may touch this address so; `cause` is 13, 15 or 0, unknown. */
int xpop_may_fault(uint64_t cause, uint64_t address);
void xpop_run(void);
void xpop_trapped(uint64_t cause, uint64_t address);
extern uint32_t case_insn[1];
extern const uint32_t case_end[1];

#endif
