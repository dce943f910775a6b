/* SPDX-License-Identifier: Apache-2.0 */
/* Xpop_matmul on a processor that lacks it, by emulating what traps; xpop_trap.c does it. */
#ifndef SPK_XPOP_TRAP_H
#define SPK_XPOP_TRAP_H

/*
 * From now on the instructions of Xpop_matmul work in every thread of this process, at some
 * microseconds each.  Whatever else is illegal goes to the handler of SIGILL that was there before,
 * and kills the process where there was none.  Returns 0, or -1 with errno.
 */
int spk_xpop_install_trap(void);

#endif
