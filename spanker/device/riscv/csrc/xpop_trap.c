/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Xpop_matmul 0.1 by trap and emulation: a handler of SIGILL that executes the instruction and goes on
 * behind it.  docs/api/xpop-matmul.md defines what it does; the unit's layouts and formulas stand
 * here once more, in the document's letters, and are not shared with the kernels that use it.
 *
 * The instructions have no state but memory, so a handler needs no more of the interrupted program
 * than its integer registers.  It must not touch vector registers: frames of some systems lack them.
 * Of a misaligned operand the program gets SIGBUS at the instruction.  Where an operand cannot be
 * reached the access of the handler itself gets SIGSEGV, with the right address, before anything
 * was written; a handler that makes the page accessible and returns lets the instruction complete.
 */
#define _GNU_SOURCE
#include "xpop_trap.h"

#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "spk_scalar_math.h"
#include "xpop/spk_xpop.h"

#ifdef __riscv_vector
#error "compile this without vectors: the compiler would use them, and they belong to the program"
#endif

enum { ROWS = 16, K = 32, TOKENS_MAX = 4, X_BYTES = 48 };

/* What the bits of an instruction say; `step` or else a dot product. */
struct insn {
    int step, kind;
    unsigned run, tokens, rd, rs1, rs2;
};

/* 0 where the encoding is reserved. */
static int decode(uint32_t bits, struct insn *i)
{
    unsigned funct3 = bits >> 12 & 7, funct7 = bits >> 25;
    *i = (struct insn){
        .step = funct3 == SPK_POP_FUNCT3_STEP,
        .kind = (int)(funct7 >> 4),
        .run = (funct7 >> 3 & 1) + 1,
        .tokens = (funct7 >> 1 & 3) + 1,
        .rd = bits >> 7 & 31,
        .rs1 = bits >> 15 & 31,
        .rs2 = bits >> 20 & 31,
    };
    if ((bits & 0x7f) != 0x0b || funct3 > SPK_POP_FUNCT3_STEP || (funct7 & 1))
        return 0;
    if (!i->step)
        return i->kind <= SPK_POP_S8 && i->run == 1;
    return i->kind < SPK_POP_Q4_K || (i->kind == SPK_POP_Q4_K && i->run == 1) ||
           i->kind == SPK_POP_Q6_K;
}

/* --- layouts -------------------------------------------------------------------------------- */

/* Four-bit integers at a, less an offset. */
static void nibbles(const uint8_t *a, int offset, int8_t w[ROWS][K])
{
    for (int j = 0; j < 16; j++)
        for (int r = 0; r < ROWS; r++) {
            uint8_t byte = a[64 * (j / 4) + 4 * r + j % 4];
            w[r][j] = (int8_t)((byte & 15) - offset);
            w[r][16 + j] = (int8_t)((byte >> 4) - offset);
        }
}

static void whole_bytes(const uint8_t *a, int8_t w[ROWS][K])
{
    for (int k = 0; k < K; k++)
        for (int r = 0; r < ROWS; r++)
            w[r][k] = (int8_t)a[64 * (k / 4) + 4 * r + k % 4];
}

/* Adds 16 times the upper two bits at a, less the offset of six bits. */
static void add_upper(const uint8_t *a, int8_t w[ROWS][K])
{
    for (int k = 0; k < K; k++)
        for (int r = 0; r < ROWS; r++) {
            int h = k / 16, j = k % 16, v = a[64 * h + 4 * r + j % 4] >> 2 * (j / 4) & 3;
            w[r][k] = (int8_t)(w[r][k] + 16 * v - 32);
        }
}

static float half_at(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return spk_f16_to_f32(h);
}

static uint32_t word_at(const uint8_t *p)
{
    uint32_t w;
    memcpy(&w, p, 4);
    return w;
}

/* One block of all rows. */
struct block {
    int8_t w[ROWS][K];
    float d[ROWS]; /* q4_k: times the scale */
    float m[ROWS]; /* q4_k: times the minimum; where the format has them */
    int8_t s[2][ROWS];
};

/* The scale s and the minimum n of a row's words for block b. */
static void six_bits(const uint32_t w[3], unsigned b, unsigned *s, unsigned *n)
{
    unsigned c = 8 * (b % 4);
    *s = b < 4 ? w[0] >> c & 63 : (w[0] >> (c + 6) & 3) << 4 | (w[2] >> c & 15);
    *n = b < 4 ? w[1] >> c & 63 : (w[1] >> (c + 6) & 3) << 4 | (w[2] >> (c + 4) & 15);
}

static void read_block(const struct insn *i, const uint8_t *tile, unsigned b, struct block *o)
{
    const uint8_t *integers = tile + 32 * i->run;
    switch (i->kind) {
    case SPK_POP_Q4_0: nibbles(integers + 256 * b, 8, o->w); break;
    case SPK_POP_Q4_1: nibbles(integers + 32 * i->run + 256 * b, 0, o->w); break;
    case SPK_POP_Q8_0: whole_bytes(integers + 512 * b, o->w); break;
    case SPK_POP_Q4_K: nibbles(tile + 256 + 256 * b, 0, o->w); break;
    default:
        memcpy(o->s, integers + 416 * b, sizeof o->s);
        nibbles(integers + 416 * b + 32, 0, o->w);
        add_upper(integers + 416 * b + 288, o->w);
    }
    for (unsigned r = 0; r < ROWS; r++) {
        unsigned of_block = i->kind == SPK_POP_Q4_K   ? 0
                            : i->kind == SPK_POP_Q6_K ? b / 8
                                                      : b;
        o->d[r] = half_at(tile + 32 * of_block + 2 * r);
        if (i->kind == SPK_POP_Q4_1)
            o->m[r] = half_at(tile + 32 * i->run + 32 * b + 2 * r);
        if (i->kind == SPK_POP_Q4_K) {
            uint32_t words[3];
            unsigned s, n;
            for (unsigned j = 0; j < 3; j++)
                words[j] = word_at(tile + 64 + 64 * j + 4 * r);
            six_bits(words, b, &s, &n);
            o->d[r] = o->d[r] * (float)s;
            o->m[r] = half_at(tile + 32 + 2 * r) * (float)n;
        }
    }
}

/* --- the instructions ----------------------------------------------------------------------- */

/* A source that cannot be reached, be it a byte that has no use, faults before any of the results. */
static void touch(const uint8_t *source, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i += SPK_POP_SOURCES_ALIGN)
        (void)*(const volatile uint8_t *)(source + i);
}

static int32_t dot(const int8_t *w, const int8_t *xq, int from, int to)
{
    int32_t sum = 0;
    for (int k = from; k < to; k++)
        sum += w[k] * xq[k];
    return sum;
}

static void pop_dot(const struct insn *i, uint8_t *results, const uint8_t *tile, const uint8_t *x)
{
    int8_t w[ROWS][K];
    int32_t sums[TOKENS_MAX][ROWS];
    touch(x, X_BYTES * i->tokens);
    if (i->kind == SPK_POP_S8)
        whole_bytes(tile, w);
    else
        nibbles(tile, i->kind == SPK_POP_S4 ? 8 : 0, w);
    for (unsigned t = 0; t < i->tokens; t++)
        for (unsigned r = 0; r < ROWS; r++)
            sums[t][r] = dot(w[r], (const int8_t *)x + X_BYTES * t, 0, K);
    memcpy(results, sums, i->tokens * sizeof *sums);
}

static void add_block(const struct insn *i, const struct block *block, const uint8_t *x,
                      float acc[ROWS])
{
    const int8_t *xq = (const int8_t *)x;
    int32_t isum = 0;
    float dx;
    memcpy(&dx, x + 32, 4);
    for (int k = 0; k < K; k++)
        isum += xq[k];
    for (unsigned r = 0; r < ROWS; r++) {
        const int8_t *w = block->w[r];
        int32_t idot = i->kind == SPK_POP_Q6_K
                           ? block->s[0][r] * dot(w, xq, 0, 16) + block->s[1][r] * dot(w, xq, 16, K)
                           : dot(w, xq, 0, K);
        acc[r] = acc[r] + (block->d[r] * dx) * (float)idot;
        if (i->kind == SPK_POP_Q4_1)
            acc[r] = acc[r] + (block->m[r] * dx) * (float)isum;
        if (i->kind == SPK_POP_Q4_K)
            acc[r] = acc[r] - (block->m[r] * dx) * (float)isum;
    }
}

static void pop_step(const struct insn *i, uint8_t *results, const uint8_t *tile, const uint8_t *x)
{
    static const unsigned tile_bytes[] = {288, 320, 544, 2304, 3360}; /* of a run of 1 */
    unsigned blocks = i->kind == SPK_POP_Q4_K || i->kind == SPK_POP_Q6_K ? 8 * i->run : i->run;
    float acc[TOKENS_MAX][ROWS];
    touch(tile, tile_bytes[i->kind] * i->run);
    touch(x, X_BYTES * blocks * i->tokens);
    memcpy(acc, results, i->tokens * sizeof *acc);
    for (unsigned b = 0; b < blocks; b++) {
        struct block block;
        read_block(i, tile, b, &block);
        for (unsigned t = 0; t < i->tokens; t++, x += X_BYTES)
            add_block(i, &block, x, acc[t]);
    }
    memcpy(results, acc, i->tokens * sizeof *acc);
}

/* --- the trap ------------------------------------------------------------------------------- */

static struct sigaction before;

/* Hands a signal on to this action.  Without a handler it will kill: the instruction that is illegal is
 * executed once more. */
static void hand_on(const struct sigaction *action, int number, siginfo_t *info, void *context)
{
    if (action->sa_flags & SA_SIGINFO)
        action->sa_sigaction(number, info, context);
    else if (action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN)
        action->sa_handler(number);
    else
        signal(number, SIG_DFL);
}

/* What the system does for a processor that finds it: SIGBUS at the instruction. */
static void misaligned(unsigned long address, void *context)
{
    siginfo_t info = {.si_signo = SIGBUS, .si_code = BUS_ADRALN};
    struct sigaction action;
    info.si_addr = (void *)address;
    sigaction(SIGBUS, NULL, &action);
    hand_on(&action, SIGBUS, &info, context);
    sigaction(SIGBUS, NULL, &action);
    if (!(action.sa_flags & SA_SIGINFO) && action.sa_handler == SIG_DFL) {
        sigset_t bus;
        sigemptyset(&bus);
        sigaddset(&bus, SIGBUS);
        sigprocmask(SIG_UNBLOCK, &bus, NULL);
        syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGBUS);
    }
}

static void on_illegal(int number, siginfo_t *info, void *raw)
{
    ucontext_t *context = raw;
    unsigned long *x = context->uc_mcontext.__gregs; /* x[0] is the pc */
    unsigned long pc = x[REG_PC], at[3], fcsr;
    uint16_t parcels[2];
    struct insn i;
    memcpy(parcels, (const void *)pc, sizeof *parcels);
    if ((parcels[0] & 3) != 3) { /* 16 bits: what follows may be no memory */
        hand_on(&before, number, info, raw);
        return;
    }
    memcpy(&parcels[1], (const void *)(pc + 2), sizeof *parcels);
    if (!decode((uint32_t)parcels[1] << 16 | parcels[0], &i)) {
        hand_on(&before, number, info, raw);
        return;
    }
    const unsigned registers[3] = {i.rs1, i.rs2, i.rd};
    const unsigned long align[3] = {SPK_POP_SOURCES_ALIGN, SPK_POP_SOURCES_ALIGN,
                                    SPK_POP_RESULTS_ALIGN};
    for (int j = 0; j < 3; j++) {
        at[j] = registers[j] ? x[registers[j]] : 0;
        if (at[j] % align[j]) {
            misaligned(at[j], raw);
            return;
        }
    }
    __asm__ volatile("csrrw %0, fcsr, zero" : "=r"(fcsr)); /* nearest even, whatever the program has */
    (i.step ? pop_step : pop_dot)(&i, (uint8_t *)at[2], (const uint8_t *)at[0],
                                  (const uint8_t *)at[1]);
    __asm__ volatile("csrw fcsr, %0" : : "r"(fcsr));
    x[REG_PC] = pc + 4;
}

int spk_xpop_install_trap(void)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_ONSTACK}, current;
    if (sigaction(SIGILL, NULL, &current) != 0)
        return -1;
    if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_illegal)
        return 0;
    before = current;
    action.sa_sigaction = on_illegal;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGILL, &action, NULL);
}
