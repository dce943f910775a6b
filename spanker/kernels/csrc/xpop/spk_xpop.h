/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The instructions of Xpop_matmul 0.1, for C and for assembler files; docs/api/xpop-matmul.md
 * defines them.  Any compiler and assembler for riscv64 takes them: they need no -march.
 *
 * In C, with format, run and tokens constants (the compiler must see numbers):
 *     SPK_POP_DOT(type, tokens, results, tile, x)          int32_t results[tokens][16], written
 *     SPK_POP_STEP(format, run, tokens, results, tile, x)  float results[tokens][16], added to
 * results are aligned to 256 bytes, tile and x to 16.  In assembler, named as in the document:
 *     pop.dot.s8    rd, rs1, rs2, tokens
 *     pop.step.q4_0 rd, rs1, rs2, run, tokens
 */
#ifndef SPK_XPOP_H
#define SPK_XPOP_H

#define SPK_POP_RESULTS_ALIGN 256
#define SPK_POP_SOURCES_ALIGN 16

#define SPK_POP_FUNCT3_DOT 0
#define SPK_POP_FUNCT3_STEP 1

#define SPK_POP_U4 0
#define SPK_POP_S4 1
#define SPK_POP_S8 2

#define SPK_POP_Q4_0 0
#define SPK_POP_Q4_1 1
#define SPK_POP_Q8_0 2
#define SPK_POP_Q4_K 3
#define SPK_POP_Q6_K 4

#define SPK_POP_FUNCT7(kind, run, tokens) ((kind) << 4 | ((run) - 1) << 3 | ((tokens) - 1) << 1)

#ifdef __ASSEMBLER__

/* clang-format off */
.macro pop.dot.u4 rd, rs1, rs2, tokens
    .insn r CUSTOM_0, 0, (0 << 4 | (\tokens - 1) << 1), \rd, \rs1, \rs2
.endm
.macro pop.dot.s4 rd, rs1, rs2, tokens
    .insn r CUSTOM_0, 0, (1 << 4 | (\tokens - 1) << 1), \rd, \rs1, \rs2
.endm
.macro pop.dot.s8 rd, rs1, rs2, tokens
    .insn r CUSTOM_0, 0, (2 << 4 | (\tokens - 1) << 1), \rd, \rs1, \rs2
.endm
.macro pop.step.q4_0 rd, rs1, rs2, run, tokens
    .insn r CUSTOM_0, 1, (0 << 4 | (\run - 1) << 3 | (\tokens - 1) << 1), \rd, \rs1, \rs2
.endm
.macro pop.step.q4_1 rd, rs1, rs2, run, tokens
    .insn r CUSTOM_0, 1, (1 << 4 | (\run - 1) << 3 | (\tokens - 1) << 1), \rd, \rs1, \rs2
.endm
.macro pop.step.q8_0 rd, rs1, rs2, run, tokens
    .insn r CUSTOM_0, 1, (2 << 4 | (\run - 1) << 3 | (\tokens - 1) << 1), \rd, \rs1, \rs2
.endm
.macro pop.step.q4_k rd, rs1, rs2, tokens
    .insn r CUSTOM_0, 1, (3 << 4 | (\tokens - 1) << 1), \rd, \rs1, \rs2
.endm
.macro pop.step.q6_k rd, rs1, rs2, run, tokens
    .insn r CUSTOM_0, 1, (4 << 4 | (\run - 1) << 3 | (\tokens - 1) << 1), \rd, \rs1, \rs2
.endm
/* clang-format on */

#elif defined(__riscv)

#define SPK_POP_INSN(funct3, funct7, results, tile, x)                                         \
    __asm__ volatile(".insn r CUSTOM_0, %0, %1, %2, %3, %4"                                    \
                     :                                                                         \
                     : "i"(funct3), "i"(funct7), "r"(results), "r"(tile), "r"(x)               \
                     : "memory")
#define SPK_POP_DOT(type, tokens, results, tile, x)                                            \
    SPK_POP_INSN(SPK_POP_FUNCT3_DOT, SPK_POP_FUNCT7(type, 1, tokens), results, tile, x)
#define SPK_POP_STEP(format, run, tokens, results, tile, x)                                    \
    SPK_POP_INSN(SPK_POP_FUNCT3_STEP, SPK_POP_FUNCT7(format, run, tokens), results, tile, x)

#endif
#endif
