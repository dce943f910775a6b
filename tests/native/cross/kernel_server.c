/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs the kernels of one instruction set, the argument, for a program on another machine: requests
 * come in at the standard input, answers go out at the standard output, until the input ends.
 * tests/riscv/guest_kernels.py is the other side.
 *
 * It begins with a greeting: the instruction set's number and the bytes of a vector register (0 where
 * there are none), two 32-bit words.  All numbers are little-endian, as both machines are.
 *
 *   request   op, scalars, buffers, mask of the buffers to return: 32-bit words; then the scalars and
 *             the sizes of the buffers, 64-bit words; then the buffers
 *   answer    the kernel's status, mask of the buffers before which it wrote: 32-bit words; then
 *             the buffers to return
 *
 * Every buffer ends where a page begins that nobody may touch, so that one byte too far is the end
 * of this program; what is before a buffer must keep its pattern.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "spk_kernels.h"
#include "xpop_trap.h"

enum {
    QUANTIZE_Q8,
    EXPAND_Q8,
    MATMUL_Q8,
    MATMUL_F32,
    RMSNORM,
    ROPE,
    KV_APPEND,
    ATTENTION,
    SWIGLU,
    ADD,
    DEQUANTIZE_ROW,
    LOGIT_STATS,
    TOP_K,
    REDUCE,
    DIVIDE
};

#define SCALARS 10
#define BUFFERS 6
#define QUERIES_MAX 4096
#define BEFORE 256 /* bytes that are looked at */
#define PATTERN 0xa5
#define BUFFER_BYTES_MAX ((size_t)64 << 20)
#define PAGE_BYTES ((size_t)65536) /* of any machine this may run on */

struct request {
    uint32_t op, scalars, buffers, returned;
};

static uint64_t scalar[SCALARS], size[BUFFERS];
static uint8_t *end_of[BUFFERS], *at[BUFFERS];

static void fail(const char *what)
{
    fprintf(stderr, "kernel server: %s\n", what);
    exit(1);
}

static void make_buffers(void)
{
    for (int i = 0; i < BUFFERS; i++) {
        size_t room = PAGE_BYTES + BUFFER_BYTES_MAX;
        uint8_t *base = mmap(NULL, room + PAGE_BYTES, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED || mprotect(base + room, PAGE_BYTES, PROT_NONE) != 0)
            fail("no memory for buffers");
        end_of[i] = base + room;
    }
}

/* False at the end of the input, which may only come before the first byte. */
static int read_all(void *to, size_t n)
{
    for (size_t got = 0; got < n;) {
        ssize_t more = read(STDIN_FILENO, (uint8_t *)to + got, n - got);
        if (more == 0 && got == 0)
            return 0;
        if (more == 0 || (more < 0 && errno != EINTR))
            fail("the input ends within a request");
        got += more > 0 ? (size_t)more : 0;
    }
    return 1;
}

static void write_all(const void *from, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t more = write(STDOUT_FILENO, (const uint8_t *)from + done, n - done);
        if (more < 0 && errno != EINTR)
            fail("the output is closed");
        done += more > 0 ? (size_t)more : 0;
    }
}

static float float_of(uint64_t bits)
{
    uint32_t u = (uint32_t)bits;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static int attention(const struct spk_kernels *k)
{
    static const float *q[QUERIES_MAX];
    static float *out[QUERIES_MAX];
    const uint64_t *s = scalar;
    if (s[5] > QUERIES_MAX)
        fail("too many queries");
    for (size_t i = 0; i < s[5]; i++) {
        q[i] = (const float *)at[2] + i * s[6];
        out[i] = (float *)at[3] + i * s[7];
    }
    struct spk_attention a = {
        .kv = {(uint16_t *)at[0], s[0], s[1], s[2], s[3]},
        .pages = (const uint32_t *)at[1],
        .kv_head = s[4],
        .queries = s[5],
        .q = q,
        .out = out,
        .visible = (const uint32_t *)at[4],
        .scale = float_of(s[8]),
        .scratch = (float *)at[5],
    };
    return k->attention(&a);
}

static int run(const struct spk_kernels *k, uint32_t op)
{
    const uint64_t *s = scalar;
    uint8_t *const *b = at;
#define FLOATS(i) ((float *)b[i])
    switch (op) {
    case QUANTIZE_Q8: return k->quantize_q8(FLOATS(0), s[0], b[1], s[1], s[2], s[3]);
    case EXPAND_Q8:
        k->expand_q8(b[0], s[0], (struct spk_q8_block *)b[1], s[1], s[2]);
        return SPK_OK;
    case MATMUL_Q8: {
        struct spk_q8 x = {(const struct spk_q8_block *)b[1], s[1]};
        k->matmul_q8[s[0]](b[0], &x, FLOATS(2), s[2], s[3], s[4], s[5], s[6]);
        return SPK_OK;
    }
    case MATMUL_F32:
        k->matmul_f32[s[0]](b[0], FLOATS(1), s[1], FLOATS(2), s[2], s[3], s[4], s[5], s[6], s[7]);
        return SPK_OK;
    case RMSNORM:
        return k->rmsnorm(FLOATS(0), s[0], FLOATS(1), FLOATS(2), s[1], s[2], s[3], float_of(s[4]));
    case ROPE:
        k->rope(FLOATS(0), s[0], s[1], s[2], s[3], FLOATS(1), (const uint32_t *)b[2], s[4]);
        return SPK_OK;
    case KV_APPEND: {
        struct spk_kv kv = {(uint16_t *)b[0], s[0], s[1], s[2], s[3]};
        return k->kv_append(&kv, (uint32_t)s[4], (uint32_t)s[5], FLOATS(1), FLOATS(2));
    }
    case ATTENTION: return attention(k);
    case SWIGLU:
        k->swiglu(FLOATS(0), s[0], FLOATS(1), s[1], FLOATS(2), s[2], s[3], s[4]);
        return SPK_OK;
    case ADD: k->add(FLOATS(0), s[0], FLOATS(1), s[1], s[2], s[3]); return SPK_OK;
    case DEQUANTIZE_ROW: return k->dequantize_row((int)s[0], b[0], FLOATS(1), s[1]);
    case LOGIT_STATS: return k->logit_stats(FLOATS(0), s[0], float_of(s[1]), FLOATS(1));
    case TOP_K: return (int)k->top_k(FLOATS(0), s[0], s[1], (uint32_t *)b[1], FLOATS(2));
    case REDUCE: k->reduce((int)s[0], (int)s[1], b[0], b[1], s[2]); return SPK_OK;
    case DIVIDE: k->divide((int)s[0], b[0], (uint32_t)s[1], s[2]); return SPK_OK;
    default: fail("no such operation");
    }
    return SPK_E_ARG;
}

/* Whatever the modes of the thread are, kernels run in the defined ones: here they are others. */
#if defined(__riscv)
#define ROUND_UP 3u

static void round_up(void)
{
    __asm__ volatile("csrw frm, %0" : : "r"((uint64_t)ROUND_UP));
}

static int rounds_up(void)
{
    uint64_t mode;
    __asm__ volatile("csrr %0, frm" : "=r"(mode));
    return mode == ROUND_UP;
}
#else
#error "how is the rounding mode of this machine set?"
#endif

static int serve_one(const struct spk_kernels *k)
{
    struct request r;
    uint32_t answer[2] = {0, 0};
    if (!read_all(&r, sizeof r))
        return 0;
    if (r.scalars > SCALARS || r.buffers > BUFFERS || r.returned >> r.buffers)
        fail("a request has too many parts");
    if ((r.scalars && !read_all(scalar, r.scalars * sizeof *scalar)) ||
        (r.buffers && !read_all(size, r.buffers * sizeof *size)))
        fail("the input ends within a request");
    for (uint32_t i = 0; i < r.buffers; i++) {
        if (size[i] > BUFFER_BYTES_MAX)
            fail("a buffer is too large");
        at[i] = end_of[i] - size[i];
        memset(at[i] - BEFORE, PATTERN, BEFORE);
        if (size[i] && !read_all(at[i], size[i]))
            fail("the input ends within a request");
    }
    round_up();
    uint64_t saved = spk_fp_enter();
    answer[0] = (uint32_t)run(k, r.op);
    spk_fp_leave(saved);
    if (!rounds_up())
        fail("the rounding mode was not restored");
    for (uint32_t i = 0; i < r.buffers; i++)
        for (size_t j = 1; j <= BEFORE; j++)
            if (*(at[i] - j) != PATTERN)
                answer[1] |= 1u << i;
    write_all(answer, sizeof answer);
    for (uint32_t i = 0; i < r.buffers; i++)
        if (r.returned >> i & 1)
            write_all(at[i], size[i]);
    return 1;
}

static uint32_t vector_bytes(void)
{
    /* By its number, as a compiler for plain RISC-V does not know the name: vlenb. */
    uint64_t bytes = 0;
    if (spk_kernels_get(SPK_ISA_RVV))
        __asm__ volatile("csrr %0, 0xc22" : "=r"(bytes));
    return (uint32_t)bytes;
}

int main(int count, char **arguments)
{
    const struct spk_kernels *kernels = NULL;
    if (spk_xpop_install_trap() != 0)
        fail("Xpop_matmul cannot be emulated");
    spk_xpop_found();
    for (int isa = 0; count == 2 && isa < SPK_ISA_COUNT; isa++)
        if (spk_kernels_get(isa) && strcmp(spk_kernels_get(isa)->name, arguments[1]) == 0)
            kernels = spk_kernels_get(isa);
    if (!kernels)
        fail("expected one argument, an instruction set that this machine has");
    make_buffers();
    uint32_t greeting[2] = {(uint32_t)kernels->isa, vector_bytes()};
    write_all(greeting, sizeof greeting);
    while (serve_one(kernels))
        ;
    return 0;
}
