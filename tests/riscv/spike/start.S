# SPDX-License-Identifier: Apache-2.0
# Where a bare machine begins, what it does with exceptions, and its words to Spike's host.

    .section .text.start
    .globl _start
_start:
    .option push
    .option norelax
    lla gp, __global_pointer$
    .option pop
    lla sp, stack_end
    lla t0, exception_stack_end
    csrw mscratch, t0
    lla t0, exception
    csrw mtvec, t0
    li t0, 0x6600               # mstatus.FS and VS: floating point and vectors off
    csrc mstatus, t0
    call main
    call xpop_exit

    # sp may be an operand: exceptions have a stack of their own.
    .balign 4
exception:
    csrrw sp, mscratch, sp
    addi sp, sp, -128
    sd ra, 0(sp)
    sd t0, 8(sp)
    sd t1, 16(sp)
    sd t2, 24(sp)
    sd t3, 32(sp)
    sd t4, 40(sp)
    sd t5, 48(sp)
    sd t6, 56(sp)
    sd a0, 64(sp)
    sd a1, 72(sp)
    sd a2, 80(sp)
    sd a3, 88(sp)
    sd a4, 96(sp)
    sd a5, 104(sp)
    sd a6, 112(sp)
    sd a7, 120(sp)
    csrr a0, mcause
    csrr a1, mtval
    csrr a2, mepc
    call xpop_exception
    csrw mepc, a0
    ld ra, 0(sp)
    ld t0, 8(sp)
    ld t1, 16(sp)
    ld t2, 24(sp)
    ld t3, 32(sp)
    ld t4, 40(sp)
    ld t5, 48(sp)
    ld t6, 56(sp)
    ld a0, 64(sp)
    ld a1, 72(sp)
    ld a2, 80(sp)
    ld a3, 88(sp)
    ld a4, 96(sp)
    ld a5, 104(sp)
    ld a6, 112(sp)
    ld a7, 120(sp)
    addi sp, sp, 128
    csrrw sp, mscratch, sp
    mret

    .section .tohost, "aw", @progbits
    .balign 64
    .globl tohost
tohost: .dword 0
    .balign 64
    .globl fromhost
fromhost: .dword 0

    .bss
    .balign 16
    .skip 16384
stack_end:
    .skip 16384
exception_stack_end:
