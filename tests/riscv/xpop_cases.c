/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Executes random instructions of Xpop_matmul on random operands, and prints a digest of what they
 * did for each batch: for a program of Linux and for a bare machine (xpop_machine.h has what
 * differs).  test_xpop_differential.py makes the same cases and digests in numpy.
 *
 * A batch fills the arena, then executes cases that read and write anywhere in it: operands overlap,
 * and results of one case are operands of others.  An instruction is executed with all registers but
 * the stack's owner's (gp, tp) chosen by the case, and afterwards every one must be what it was.
 */
#include "xpop_machine.h"

#include <stddef.h>

#include "spk_kernels.h"

#define ARENA_BYTES 16384
#define SLACK_BYTES 256 /* a misaligned address may be this much further */
#define TILE_BYTES_MAX 6720 /* of operands, the largest */
#define X_BYTES_MAX 3072
#define CASES 64 /* of a batch */

enum {
    DIGESTS,    /* of batches */
    EVERY_CASE, /* digests of each case, too */
    SWEEP,      /* which encodings there are */
    FAULTS,     /* DIGESTS, where pages of the arena are out of reach; then how often */
};

/* Written into the program's file by who starts it. */
volatile struct {
    char mark[16];
    uint64_t mode;
    uint64_t seed, first, count;
} parameters = {.mark = "xpop parameters"};

static uint8_t arena[ARENA_BYTES + SLACK_BYTES] __attribute__((aligned(ARENA_BYTES)));

struct run {
    uint64_t in[32], out[32];
    uint64_t sp, cause, address;
};

/* Registers but x3 and x4 from in[], the instruction at case_insn, registers to out[]. */
void run_case(struct run *run);

#define X_LIST(DO)                                                                             \
    DO(1) DO(2) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15) DO(16)     \
    DO(17) DO(18) DO(19) DO(20) DO(21) DO(22) DO(23) DO(24) DO(25) DO(26) DO(27) DO(28) DO(29)     \
    DO(30) DO(31)
#define LOAD(n) "ld x" #n ", 8*" #n "(tp)\n"
#define SAVE(n) "sd x" #n ", 256+8*" #n "(tp)\n"
__asm__(".pushsection .case,\"awx\",@progbits\n"
        ".balign 4096\n"
        ".option push\n.option norvc\n.option norelax\n"
        ".globl run_case\n.globl case_insn\n.globl case_end\n"
        "run_case:\n"
        "addi sp, sp, -112\n"
        "sd ra, 0(sp)\n sd tp, 8(sp)\n sd s0, 16(sp)\n sd s1, 24(sp)\n sd s2, 32(sp)\n"
        "sd s3, 40(sp)\n sd s4, 48(sp)\n sd s5, 56(sp)\n sd s6, 64(sp)\n sd s7, 72(sp)\n"
        "sd s8, 80(sp)\n sd s9, 88(sp)\n sd s10, 96(sp)\n sd s11, 104(sp)\n"
        "sd sp, 512(a0)\n"
        "mv tp, a0\n" X_LIST(LOAD)
        "case_insn: .word 0\n"
        "case_end:\n" X_LIST(SAVE)
        "ld sp, 512(tp)\n"
        "ld ra, 0(sp)\n ld tp, 8(sp)\n ld s0, 16(sp)\n ld s1, 24(sp)\n ld s2, 32(sp)\n"
        "ld s3, 40(sp)\n ld s4, 48(sp)\n ld s5, 56(sp)\n ld s6, 64(sp)\n ld s7, 72(sp)\n"
        "ld s8, 80(sp)\n ld s9, 88(sp)\n ld s10, 96(sp)\n ld s11, 104(sp)\n"
        "addi sp, sp, 112\n ret\n"
        ".balign 4096\n"
        ".option pop\n.popsection\n");
_Static_assert(offsetof(struct run, out) == 256 && offsetof(struct run, sp) == 512, "in the code");

static struct run run;

/* What the machine's handlers of exceptions call; execution goes on at case_end. */
void xpop_trapped(uint64_t cause, uint64_t address)
{
    run.cause = cause;
    run.address = address;
}

static uint64_t of_operand[3]; /* rs1, rs2, rd of the case */
static int results_faulted;    /* faults of the sources come first */

int xpop_may_fault(uint64_t cause, uint64_t address)
{
    int source = address - of_operand[0] < TILE_BYTES_MAX || address - of_operand[1] < X_BYTES_MAX;
    if (source && cause != 15)
        return !results_faulted;
    results_faulted = 1;
    return cause != 13 && address - of_operand[2] < 256;
}

/* splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t mixed(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t state;

static uint64_t next(void)
{
    return mixed(state += 0x9e3779b97f4a7c15u);
}

/* Any bits; bytes that are extreme as integers; halves that are moderate as floats. */
static uint64_t filled(uint64_t bits, unsigned mode)
{
    static const uint8_t extremes[8] = {0x80, 0x7f, 0x00, 0xff, 0x01, 0x81, 0x0f, 0xf0};
    uint64_t word = 0;
    if (mode == 3)
        mode = bits >> 62;
    if (mode == 1) {
        for (unsigned i = 0; i < 8; i++)
            word |= (uint64_t)extremes[bits >> 8 * i & 7] << 8 * i;
        return word;
    }
    return mode == 2 ? (bits & 0x8fff8fff8fff8fffu) | 0x3000300030003000u : bits;
}

static void fill(uint64_t seed, uint64_t batch)
{
    state = mixed(seed * 0x9e3779b97f4a7c15u + batch);
    unsigned mode = next() & 3;
    uint64_t *words = (uint64_t *)(void *)arena;
    for (size_t i = 0; i < sizeof arena / 8; i++)
        words[i] = filled(next(), mode);
}

static uint32_t assemble(unsigned funct3, unsigned funct7, unsigned rd, unsigned rs1, unsigned rs2)
{
    return funct7 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | 0x0b;
}

/* As the document counts them, by funct3, then by funct7. */
static int defined(unsigned funct3, unsigned funct7)
{
    unsigned kind = funct7 >> 4, two = funct7 >> 3 & 1;
    if (funct7 & 1)
        return 0;
    return funct3 == 0 ? kind < 3 && !two : funct3 == 1 ? kind < 5 && !(kind == 3 && two) : 0;
}

static unsigned defined_funct(unsigned number)
{
    for (unsigned funct = 0; funct < 1024; funct++)
        if (defined(funct >> 7, funct & 127) && number-- == 0)
            return funct;
    return 0;
}

static int execute(uint32_t insn, unsigned modes)
{
    case_insn[0] = insn;
    __asm__ volatile("fence.i" : : : "memory");
    for (unsigned i = 0; i < 32; i++)
        run.out[i] = ~run.in[i];
    run.cause = run.address = 0;
    int kept = xpop_run_with_modes(modes);
    for (unsigned i = 1; i < 32; i++)
        kept &= i == 3 || i == 4 || run.out[i] == run.in[i];
    return kept;
}

void xpop_run(void)
{
    run_case(&run);
}

static void random_case(uint32_t *digest)
{
    static const uint8_t registers[29] = {1,  2,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17,
                                          18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    uint64_t a = next(), b = next(), c = next();
    unsigned defined_number = (a >> 8 & 0xffff) % 48;
    if (defined_number >= 36 && (a >> 4 & 3)) /* q4_k and q6_k take long: fewer of them */
        defined_number = (a >> 24 & 0xffff) % 36;
    unsigned funct = a & 15 ? defined_funct(defined_number) : a >> 8 & 1023;
    unsigned number[3]; /* rs1, rs2, rd */
    uint64_t at[3] = {
        16 * ((c & 0xffff) % ((ARENA_BYTES - TILE_BYTES_MAX) / 16)),
        16 * ((c >> 16 & 0xffff) % ((ARENA_BYTES - TILE_BYTES_MAX) / 16)),
        256 * ((c >> 32 & 0xffff) % ((ARENA_BYTES - TILE_BYTES_MAX) / 256)),
    };
    unsigned which = c >> 53 & 3;
    for (unsigned i = 0; i < 3; i++) {
        number[i] = registers[(b >> 8 * i & 0xff) % 29];
        if ((c >> 48 & 15) == 0 && (which == i || which == 3))
            at[i] += (uint64_t)1 << (c >> 56 & (i == 2 ? 7 : 3));
    }
    for (unsigned i = 0; i < 32; i++)
        run.in[i] = b * (2 * i + 1);
    for (unsigned i = 0; i < 3; i++)
        run.in[number[i]] = (uint64_t)(uintptr_t)arena + at[i];
    for (unsigned i = 0; i < 3; i++)
        of_operand[i] = run.in[number[i]];
    uint32_t insn = assemble(funct >> 7, funct & 127, number[2], number[0], number[1]);
    results_faulted = 0;
    if (parameters.mode == FAULTS)
        xpop_hide(arena, b >> 40 & 15);
    int kept = execute(insn, b >> 32 & 0xff);
    if (parameters.mode == FAULTS)
        xpop_show();
    uint64_t record[4] = {insn, run.cause, 0, (uint64_t)kept};
    if (run.cause && run.cause != XPOP_ILLEGAL)
        record[2] = run.address - (uint64_t)(uintptr_t)arena;
    uint64_t results = run.in[number[2]] - (uint64_t)(uintptr_t)arena;
    *digest = spk_crc32c(*digest, record, sizeof record);
    *digest = spk_crc32c(*digest, arena + results / 256 * 256, 256);
    if (parameters.mode == EVERY_CASE)
        xpop_print(*digest, 8);
}

/* Every funct7 and funct3 of custom-0, then of the other custom opcodes: 1 executed, 0 illegal. */
static void sweep(void)
{
    static const uint32_t opcodes[] = {0x0b, 0x2b, 0x5b, 0x7b};
    for (unsigned i = 0; i < 4; i++)
        for (unsigned line = 0; line < 16; line++) {
            uint64_t bits = 0;
            for (unsigned j = 0; j < 64; j++) {
                unsigned funct = line * 64 + j;
                run.in[10] = run.in[11] = run.in[12] = (uint64_t)(uintptr_t)arena;
                uint32_t insn = assemble(funct >> 7, funct & 127, 10, 11, 12);
                int kept = execute((insn & ~0x7fu) | opcodes[i], 0);
                if (!kept || (run.cause && run.cause != XPOP_ILLEGAL))
                    xpop_print(0xbad, 4);
                bits |= (uint64_t)(run.cause == 0) << j;
            }
            xpop_print(bits, 16);
        }
    xpop_print(spk_crc32c(0, arena, sizeof arena), 8);
}

int main(void)
{
    xpop_prepare();
    if (parameters.mode == SWEEP) {
        fill(parameters.seed, 0);
        sweep();
        return 0;
    }
    for (uint64_t batch = parameters.first; batch < parameters.first + parameters.count; batch++) {
        uint32_t digest = 0;
        fill(parameters.seed, batch);
        for (unsigned i = 0; i < CASES; i++)
            random_case(&digest);
        xpop_print(spk_crc32c(digest, arena, sizeof arena), 8);
    }
    if (parameters.mode == FAULTS)
        xpop_print(xpop_show(), 8);
    return 0;
}
