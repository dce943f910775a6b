/* SPDX-License-Identifier: Apache-2.0 */
/* The card driven by one thread: memory, what it refuses, the queue, what steps bring back, chosen
 * tokens, the trace, aborts, faults and links. */
#include <poll.h>
#include <time.h>

#include "card_test.h"

#define COUNT(array) (sizeof(array) / sizeof *(array))

static struct bench alice, bob; /* two linked cards: numbers 0 and 1 */

static bool readable(struct spk_card *c)
{
    struct pollfd p = {.fd = spk_card_fd(c), .events = POLLIN};
    return poll(&p, 1, 0) == 1;
}

static struct spk_completion collect(struct spk_card *c)
{
    struct spk_completion done;
    CHECK(readable(c));
    CHECK(spk_card_completion(c, &done));
    return done;
}

/* --- memory ------------------------------------------------------------------------------- */

static void creation_refuses_nonsense(void)
{
    int status;
    CASE("creation");
    CHECK(!spk_card_create(0, SPK_ISA_SCALAR, &status));
    CHECK_EQUAL(status, SPK_E_ARG);
    CHECK(!spk_card_create(100, SPK_ISA_SCALAR, &status));
    CHECK_EQUAL(status, SPK_E_ARG);
    CHECK(!spk_card_create(1 << 20, SPK_ISA_COUNT, &status));
    CHECK_EQUAL(status, SPK_E_ARG);
    CHECK(!spk_card_create((uint64_t)1 << 62, SPK_ISA_SCALAR, &status));
    CHECK_EQUAL(status, SPK_E_SYSTEM);
    CHECK(!spk_card_create(UINT64_MAX - 63, SPK_ISA_SCALAR, &status));
    CHECK_EQUAL(status, SPK_E_SYSTEM);
    spk_card_destroy(NULL);
}

static void memory_is_bounded(void)
{
    int status;
    uint32_t a, b, other;
    uint8_t data[256] = {1, 2, 3};
    void *at;
    struct spk_counters counters;
    struct spk_card *c = spk_card_create(1024, SPK_ISA_SCALAR, &status);
    CASE("memory");
    CHECK_EQUAL(spk_card_alloc(c, 0, &a), SPK_E_ARG);
    CHECK_EQUAL(spk_card_alloc(c, 1025, &a), SPK_E_NOMEM);
    CHECK_EQUAL(spk_card_alloc(c, UINT64_MAX, &a), SPK_E_NOMEM);
    CHECK_EQUAL(spk_card_alloc(c, 100, &a), SPK_OK);
    CHECK_EQUAL(spk_card_alloc(c, 896, &b), SPK_OK);
    CHECK_EQUAL(spk_card_alloc(c, 1, &other), SPK_E_NOMEM);
    spk_card_counters(c, &counters);
    CHECK_EQUAL(counters.ddr_used_bytes, 1024);
    CHECK_EQUAL(counters.ddr_total_bytes, 1024);

    CHECK_EQUAL(spk_card_write(c, a, 0, data, 100), SPK_OK);
    CHECK_EQUAL(spk_card_write(c, a, 0, data, 101), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_write(c, a, 100, data, 0), SPK_OK);
    CHECK_EQUAL(spk_card_write(c, a, 100, data, 1), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_write(c, a, 101, data, 0), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_place(c, a, 1, 99, &at), SPK_OK);
    memset(at, 77, 99);
    CHECK_EQUAL(spk_card_read(c, a, 0, data, 100), SPK_OK);
    CHECK(data[0] == 1 && data[1] == 77 && data[99] == 77);
    CHECK_EQUAL(spk_card_place(c, a, 0, 101, &at), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_place(c, a, 100, 0, &at), SPK_OK);
    CHECK_EQUAL(spk_card_place(c, a, 101, 0, &at), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_place(c, a, 1, UINT64_MAX, &at), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_place(c, 2, 0, 1, &at), SPK_E_HANDLE);
    CHECK(!at);
    CHECK_EQUAL(spk_card_read(c, a, UINT64_MAX, data, 2), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_read(c, a, 1, data, UINT64_MAX), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_read(c, 2, 0, data, 1), SPK_E_HANDLE);
    CHECK_EQUAL(spk_card_read(c, UINT32_MAX, 0, data, 1), SPK_E_HANDLE);
    CHECK_EQUAL(spk_card_free(c, 2), SPK_E_HANDLE);

    CHECK_EQUAL(spk_card_free(c, a), SPK_OK);
    CHECK_EQUAL(spk_card_free(c, a), SPK_E_HANDLE);
    CHECK_EQUAL(spk_card_read(c, a, 0, data, 1), SPK_E_HANDLE);
    CHECK_EQUAL(spk_card_alloc(c, 129, &other), SPK_E_NOMEM);
    CHECK_EQUAL(spk_card_alloc(c, 128, &other), SPK_OK); /* the gap before b */
    CHECK_EQUAL(spk_card_free(c, b), SPK_OK);
    spk_card_counters(c, &counters);
    CHECK_EQUAL(counters.ddr_used_bytes, 128);
    spk_card_destroy(c);
}

/* Small and large buffers side by side, freed in every position. */
static void freed_memory_is_zero_and_its_neighbours_keep_theirs(void)
{
    enum { N = 7 };
    static const uint64_t sizes[N] = {64, 100, 5000, 64, 70000, 1, 8192};
    for (int freed = 0; freed < N; freed++) {
        int status;
        uint32_t handle[N];
        uint8_t *data = exact(70000), *back = exact(70000);
        struct spk_card *c = spk_card_create(1 << 20, SPK_ISA_SCALAR, &status);
        CASE("buffer %d freed", freed);
        for (int i = 0; i < N; i++) {
            CHECK_EQUAL(spk_card_alloc(c, sizes[i], &handle[i]), SPK_OK);
            CHECK_EQUAL(spk_card_write(c, handle[i], 0, data, sizes[i]), SPK_OK);
        }
        CHECK_EQUAL(spk_card_free(c, handle[freed]), SPK_OK);
        for (int i = 0; i < N; i++)
            if (i != freed) {
                CHECK_EQUAL(spk_card_read(c, handle[i], 0, back, sizes[i]), SPK_OK);
                CHECK(memcmp(back, data, sizes[i]) == 0);
            }
        CHECK_EQUAL(spk_card_alloc(c, sizes[freed], &handle[freed]), SPK_OK);
        CHECK_EQUAL(spk_card_read(c, handle[freed], 0, back, sizes[freed]), SPK_OK);
        for (uint64_t i = 0; i < sizes[freed]; i++)
            CHECK(back[i] == 0);
        spk_card_destroy(c);
        free(data), free(back);
    }
}

static void lent_memory_stands_for_a_buffer(void)
{
    int status;
    uint32_t a, b, window;
    uint8_t *memory = aligned_alloc(64, 256), data[128];
    struct spk_counters counters;
    struct spk_card *c = spk_card_create(1024, SPK_ISA_SCALAR, &status);
    CASE("a buffer of the host's memory");
    memset(memory, 5, 256);
    memset(data, 1, sizeof data);
    CHECK_EQUAL(spk_card_alloc(c, 128, &a), SPK_OK);
    CHECK_EQUAL(spk_card_alloc(c, 128, &b), SPK_OK);
    CHECK_EQUAL(spk_card_window(c, 128, &window), SPK_OK);
    CHECK_EQUAL(spk_card_write(c, a, 0, data, 128), SPK_OK);
    CHECK_EQUAL(spk_card_write(c, b, 0, data, 128), SPK_OK);
    CHECK_EQUAL(spk_card_lend(c, a, NULL, 128), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_lend(c, a, memory, 127), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_lend(c, a, memory + 16, 128), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_lend(c, window, memory, 127), SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_lend(c, window, memory, 128), SPK_OK);
    CHECK_EQUAL(spk_card_write(c, window, 0, data, 128), SPK_E_HANDLE);
    CHECK_EQUAL(spk_card_free(c, window), SPK_OK);
    CHECK(memory[0] == 5 && memory[127] == 5); /* it was never the card's */
    CHECK_EQUAL(spk_card_lend(c, 9, memory, 128), SPK_E_HANDLE);
    CHECK_EQUAL(spk_card_lend(c, a, memory, 128), SPK_OK);
    CHECK_EQUAL(spk_card_lend(c, a, memory + 32, 128), SPK_OK); /* and again */
    CHECK_EQUAL(spk_card_read(c, a, 0, data, 128), SPK_OK);
    CHECK(data[0] == 5 && data[127] == 5);
    memset(data, 6, sizeof data);
    CHECK_EQUAL(spk_card_write(c, a, 1, data, 100), SPK_OK);
    CHECK(memory[33] == 5 && memory[132] == 5); /* it has moved into the DDR */
    CHECK_EQUAL(spk_card_read(c, a, 0, data, 128), SPK_OK);
    CHECK(data[0] == 5 && data[1] == 6 && data[100] == 6 && data[101] == 5);
    CHECK_EQUAL(spk_card_lend(c, a, memory, 128), SPK_OK);
    CHECK_EQUAL(spk_card_write(c, a, 128, data, 0), SPK_OK);
    CHECK_EQUAL(spk_card_write(c, a, 1, data, 128), SPK_E_BOUNDS);
    spk_card_counters(c, &counters);
    CHECK_EQUAL(counters.ddr_used_bytes, 256);
    CHECK_EQUAL(spk_card_free(c, a), SPK_OK);
    CHECK_EQUAL(spk_card_alloc(c, 128, &a), SPK_OK);
    CHECK_EQUAL(spk_card_read(c, a, 0, data, 128), SPK_OK);
    CHECK(data[0] == 0 && data[127] == 0); /* what was there before is gone, too */
    CHECK_EQUAL(spk_card_read(c, b, 0, data, 128), SPK_OK);
    CHECK(data[0] == 1 && data[127] == 1);
    spk_card_plant(c, SPK_PLANT_DIE);
    CHECK_EQUAL(spk_card_lend(c, a, memory, 128), SPK_E_LOST);
    spk_card_destroy(c);
    free(memory);
}

static void random_allocations_never_overlap(void)
{
    enum { N = 40, STEPS = 4000 };
    int status;
    struct rng r = {.state = 5};
    struct spk_card *c = spk_card_create(1 << 16, SPK_ISA_SCALAR, &status);
    uint32_t handle[N];
    uint64_t bytes[N] = {0}, used = 0;
    struct spk_counters counters;
    uint8_t *data = exact(8192), *back = exact(8192);
    for (int step = 0; step < STEPS; step++) {
        uint32_t i = rng_below(&r, N);
        CASE("random allocations, step %d, seed 5", step);
        if (bytes[i]) {
            memset(data, (int)i + 1, bytes[i]);
            CHECK_EQUAL(spk_card_read(c, handle[i], 0, back, bytes[i]), SPK_OK);
            CHECK(memcmp(data, back, bytes[i]) == 0);
            CHECK_EQUAL(spk_card_free(c, handle[i]), SPK_OK);
            used -= (bytes[i] + 63) / 64 * 64;
            bytes[i] = 0;
        } else {
            uint64_t n = 1 + rng_below(&r, rng_below(&r, 2) ? 8192 : 128);
            if (spk_card_alloc(c, n, &handle[i]) == SPK_OK) {
                memset(data, (int)i + 1, n);
                CHECK_EQUAL(spk_card_write(c, handle[i], 0, data, n), SPK_OK);
                bytes[i] = n;
                used += (n + 63) / 64 * 64;
            }
        }
        spk_card_counters(c, &counters);
        CHECK_EQUAL(counters.ddr_used_bytes, used);
        CHECK(used <= 1 << 16);
    }
    spk_card_destroy(c);
    free(data), free(back);
}

/* --- what it refuses ---------------------------------------------------------------------- */

static void expect_refusal(const struct builder *p, int expected, const char *what)
{
    uint32_t handle, bad;
    char why[256];
    CASE("program with %s", what);
    CHECK_EQUAL(load(alice.card, p, &handle, &bad, why), expected);
    CHECK(strlen(why) > 8 && strlen(why) < 255 && !strchr(why, '\n'));
}

#define REFUSES(status, change)                                                                \
    do {                                                                                       \
        struct builder p = bench_program(&alice);                                              \
        change;                                                                                \
        expect_refusal(&p, status, #change);                                                   \
    } while (0)

static void refuses_broken_headers(void)
{
    struct builder p = bench_program(&alice);
    uint32_t handle, bad;
    char why[256];
    CASE("truncated programs");
    size_t whole = sizeof p.header + p.header.commands * sizeof *p.commands;
    for (size_t n = 0; n < whole; n += n < sizeof p.header ? 1 : 29)
        CHECK_EQUAL(load_bytes(alice.card, &p, n, &handle, &bad, why), SPK_E_ARG);
    CHECK_EQUAL(load_bytes(alice.card, &p, whole + 1, &handle, &bad, why), SPK_E_ARG);
    REFUSES(SPK_E_ARG, p.header.magic++);
    REFUSES(SPK_E_ARG, p.header.version++);
    REFUSES(SPK_E_ARG, p.header.commands = SPK_COMMANDS_MAX + 1);
    REFUSES(SPK_E_ARG, p.header.commands = UINT32_MAX);
    REFUSES(SPK_E_ARG, p.header.tokens_max = 0);
    REFUSES(SPK_E_ARG, p.header.tokens_max = SPK_TOKENS_MAX + 1);
    REFUSES(SPK_E_ARG, p.header.outputs_max = TOKENS_MAX + 1);
    REFUSES(SPK_E_ARG, p.header.positions_max = 0);
    REFUSES(SPK_E_ARG, p.header.positions_max = (1 << 24) + 1);
    REFUSES(SPK_E_ARG, p.header.reserved[0] = 1);
    REFUSES(SPK_E_ARG, p.header.reserved[1] = 1);
    REFUSES(SPK_E_BOUNDS, p.header.tokens_max++);
    REFUSES(SPK_E_BOUNDS, p.header.positions_max++);
}

static const uint8_t refs_of[] = {0, 11, 11, 9, 11, 3, 11, 11, 11, 3, 9, 9, 9, 0, 1, 8, 9, 9};

/* Operands that an operation does not take are not checked, so they must not be looked at. */
static void ignores_operands_that_an_operation_does_not_take(void)
{
    struct spk_card *both[] = {alice.card, bob.card};
    for (int card = 0; card < 2; card++) {
        struct builder p = bench_program(card ? &bob : &alice);
        struct step s = new_step(2, 1, 0, 0, 1);
        uint32_t program, bad;
        uint64_t fence;
        char why[256];
        CASE("extra operands, card %d", card);
        for (uint32_t i = 0; i < p.header.commands; i++)
            for (int slot = 0; slot < 4; slot++)
                if (!(refs_of[p.commands[i].op] >> slot & 1))
                    p.commands[i].ref[slot] = ref_at(0x40000000u, 3, UINT64_MAX);
        CHECK_EQUAL(load(both[card], &p, &program, &bad, why), SPK_OK);
        CHECK_EQUAL(submit(both[card], program, &s, &fence), SPK_OK);
    }
    CHECK(run_cards(both, 2));
    for (int card = 0; card < 2; card++) {
        CHECK_EQUAL(collect(both[card]).status, SPK_OK);
        CHECK_EQUAL(spk_card_unload_program(both[card], 0), SPK_OK);
    }
}

/* Every operand of every command: missing, misplaced, too long by one byte, not aligned. */
static void refuses_every_operand_out_of_bounds(void)
{
    struct builder valid = bench_program(&alice);
    for (uint32_t i = 0; i < valid.header.commands; i++)
        for (int slot = 0; slot < 4; slot++) {
            if (!(refs_of[valid.commands[i].op] >> slot & 1))
                continue;
            uint32_t bad, handle;
            char why[256];
            static const uint64_t offsets[] = {DDR_BYTES, (uint64_t)1 << 47, UINT64_MAX - 31,
                                               (uint64_t)1 << 63};
            struct builder p = valid;
            CASE("command %u, operand %d", i, slot);
            p.commands[i].ref[slot].buffer = 9999;
            CHECK_EQUAL(load(alice.card, &p, &handle, &bad, why), SPK_E_HANDLE);
            CHECK_EQUAL(bad, i);
            p = valid;
            p.commands[i].ref[slot].offset += 160; /* no operand leaves that much of its buffer */
            CHECK_EQUAL(load(alice.card, &p, &handle, &bad, why), SPK_E_BOUNDS);
            CHECK_EQUAL(bad, i);
            for (size_t j = 0; j < COUNT(offsets); j++) {
                p = valid;
                p.commands[i].ref[slot].offset = offsets[j] / 32 * 32;
                CHECK_EQUAL(load(alice.card, &p, &handle, &bad, why), SPK_E_BOUNDS);
            }
            if (p.commands[i].ref[slot].stride) {
                p = valid;
                p.commands[i].ref[slot].stride = UINT32_MAX / 32 * 32;
                CHECK_EQUAL(load(alice.card, &p, &handle, &bad, why), SPK_E_BOUNDS);
                p = valid;
                p.commands[i].ref[slot].stride = 0; /* rows would overlap */
                CHECK(load(alice.card, &p, &handle, &bad, why) != SPK_OK);
            }
        }
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_RMSNORM)->ref[0].offset = 2);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_RMSNORM)->ref[0].stride = WIDTH * 4 + 2);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_MATMUL)->ref[0].offset = 16);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_MATMUL)->ref[1].offset = 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_QUANTIZE)->ref[3].offset = 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_KV_APPEND)->ref[3].offset = 1);
}

static void refuses_arguments_that_make_no_sense(void)
{
    REFUSES(SPK_E_ARG, p.commands[0].op = 0);
    REFUSES(SPK_E_ARG, p.commands[0].op = SPK_OP_DIVIDE + 1);
    REFUSES(SPK_E_ARG, p.commands[0].op = UINT16_MAX);
    REFUSES(SPK_E_ARG, p.commands[1].flags = 2);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_EMBED)->format = 10);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_EMBED)->arg[0] = 33);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_EMBED)->arg[1] = 0);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_EMBED)->arg[1] = VOCABULARY + 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_QUANTIZE)->arg[0] = 31);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_MATMUL)->format = 10);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_MATMUL)->arg[1] = 33);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_MATMUL)->arg[0] = 65);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_ROPE)->arg[2] = HEAD_DIM + 2);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_ROPE)->arg[2] = 3);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_KV_APPEND)->arg[0] = 0);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_KV_APPEND)->arg[1] = 0);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_KV_APPEND)->arg[2] = 17);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_KV_APPEND)->arg[2] = 0);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_KV_APPEND)->arg[3] = 0);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_KV_APPEND)->arg[3] = PAGES + 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_ATTENTION)->arg[3] = PAGES - 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_ATTENTION)->arg[4] = 0);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_ATTENTION)->arg[6] = 0);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_ATTENTION)->arg[5] = 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_ATTENTION)->arg[6] = 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_TOP_K)->arg[1] = 0);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_TOP_K)->arg[1] = 4097);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_TOP_K)->arg[1] = CANDIDATES + 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_BEST)->arg[0] = 0);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_BEST)->arg[0] = 4097);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_BEST)->arg[0] = UINT32_MAX);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_BEST)->arg[0] = CANDIDATES + 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_CHOOSE)->arg[0] = 0);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_CHOOSE)->arg[0] = SPK_CARDS_MAX + 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_CHOOSE)->arg[0] = UINT32_MAX);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_CHOOSE)->arg[0] = 3);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_EXCHANGE)->arg[0] = 3);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_EXCHANGE)->arg[0] = 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_EXCHANGE)->arg[0] = UINT32_MAX);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_EXCHANGE)->op = SPK_OP_LINK_SEND);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_LINK_SEND)->arg[0] = 2);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_LINK_RECV)->arg[0] = SPK_CARDS_MAX);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_LINK_RECV)->arg[0] = UINT32_MAX);
}

/* Sizes whose products wrap around in 64 bits must not look small. */
static void refuses_sizes_that_overflow(void)
{
    static const uint32_t large[] = {0x10000, 0x1000000, 0x40000000, 0x80000000, 0xffffffe0};
    static const int ops[] = {SPK_OP_MATMUL, SPK_OP_ROPE, SPK_OP_KV_APPEND, SPK_OP_ATTENTION};
    for (size_t i = 0; i < COUNT(large); i++)
        for (size_t j = 0; j < COUNT(large); j++) {
            for (size_t o = 0; o < COUNT(ops); o++)
                for (int first = 0; first < (ops[o] == SPK_OP_MATMUL ? 2 : 3); first++) {
                    struct builder p = bench_program(&alice);
                    uint32_t handle, bad;
                    char why[256];
                    CASE("operation %d, arguments %d and %d: %u, %u", ops[o], first, first + 1,
                         large[i], large[j]);
                    find(&p, ops[o])->arg[first] = large[i];
                    find(&p, ops[o])->arg[first + 1] = large[j];
                    CHECK(load(alice.card, &p, &handle, &bad, why) != SPK_OK);
                }
            REFUSES(SPK_E_ARG, find(&p, SPK_OP_LINK_SEND)->arg[1] = large[i]);
            REFUSES(SPK_E_ARG, find(&p, SPK_OP_SWIGLU)->arg[0] = large[i]);
        }
}

/* The parts of a step that are as long as its tokens must not be read by the row of an output, of
 * which there may be more, and the other way around. */
static void refuses_rows_of_the_wrong_kind(void)
{
    static const int by_token[] = {SPK_OP_EMBED, SPK_OP_ROPE, SPK_OP_KV_APPEND, SPK_OP_ATTENTION};
    for (size_t i = 0; i < COUNT(by_token); i++)
        REFUSES(SPK_E_ARG, find(&p, by_token[i])->flags = SPK_FLAG_OUTPUTS);
    static const int by_output[] = {SPK_OP_LOGIT_STATS, SPK_OP_BEST, SPK_OP_CHOOSE};
    for (size_t i = 0; i < COUNT(by_output); i++)
        REFUSES(SPK_E_ARG, find(&p, by_output[i])->flags = 0);
}

static void refuses_broken_steps(void)
{
    uint32_t program, bad;
    uint64_t fence;
    char why[256];
    struct builder b = bench_program(&alice);
    CASE("steps");
    CHECK_EQUAL(load(alice.card, &b, &program, &bad, why), SPK_OK);
    struct step valid = new_step(3, 2, 30, 1, 3);
    size_t whole = step_bytes(&valid);
    for (size_t n = 0; n < whole; n++)
        CHECK_EQUAL(submit_bytes(alice.card, program, &valid, n, &fence, why), SPK_E_PARAMS);
    CHECK_EQUAL(submit_bytes(alice.card, program, &valid, whole + 4, &fence, why), SPK_E_PARAMS);
    CHECK_EQUAL(submit_bytes(alice.card, program + 1, &valid, whole, &fence, why), SPK_E_HANDLE);
    CHECK_EQUAL(submit_bytes(alice.card, UINT32_MAX, &valid, whole, &fence, why), SPK_E_HANDLE);
    uint8_t *large = exact(SPK_STEP_BYTES_MAX + 1);
    CHECK_EQUAL(submit_bytes(alice.card, program, large, SPK_STEP_BYTES_MAX + 1, &fence, why),
                SPK_E_PARAMS);
    free(large);

    enum { TOKEN = 0, POSITION = 3, SEQUENCE = 6, OUTPUT = 9, INDEX = 13, PAGE = 15 };
    static const struct {
        const char *what;
        uint32_t word, value;
    } bad_words[] = {
        {"token id", TOKEN + 1, VOCABULARY},
        {"token id", TOKEN, SPK_TOKEN_CHOSEN - 1},
        {"chosen output", TOKEN + 2, SPK_TOKEN_CHOSEN | OUTPUTS_MAX},
        {"chosen output", TOKEN, UINT32_MAX},
        {"position beyond the pages", POSITION + 2, 48},
        {"position beyond the program", POSITION, POSITIONS_MAX},
        {"sequence", SEQUENCE + 2, 1},
        {"sequence", SEQUENCE, UINT32_MAX},
        {"output token", OUTPUT, 3},
        {"output token", OUTPUT + 1, UINT32_MAX},
        {"inverse temperature (NaN)", INDEX - 2, 0x7fc00000},
        {"inverse temperature (infinite)", INDEX - 1, 0x7f800000},
        {"inverse temperature (negative)", INDEX - 1, 0xbf800000},
        {"first page", INDEX, 1},
        {"last page", INDEX + 1, 2},
        {"last page", INDEX + 1, 4},
        {"page", PAGE + 2, PAGES},
        {"page", PAGE, UINT32_MAX},
    };
    for (size_t i = 0; i < COUNT(bad_words); i++) {
        struct step s = valid;
        CASE("step with a bad %s (%u)", bad_words[i].what, bad_words[i].value);
        s.words[bad_words[i].word] = bad_words[i].value;
        CHECK_EQUAL(submit_bytes(alice.card, program, &s, whole, &fence, why), SPK_E_PARAMS);
        CHECK(strlen(why) > 8 && !strchr(why, '\n'));
    }
    static const uint32_t too_many[][3] = {{TOKENS_MAX + 1, 1, 1}, {3, OUTPUTS_MAX + 1, 1}, {1, 1, 2}};
    for (size_t i = 0; i < COUNT(too_many); i++) {
        struct step s = {.header = valid.header};
        CASE("step of %u tokens, %u outputs, %u sequences", too_many[i][0], too_many[i][1],
             too_many[i][2]);
        s.header.tokens = too_many[i][0];
        s.header.outputs = too_many[i][1];
        s.header.sequences = too_many[i][2];
        CHECK_EQUAL(submit_bytes(alice.card, program, &s, step_bytes(&s), &fence, why),
                    SPK_E_PARAMS);
    }
    struct step s = valid;
    CASE("step headers");
    s.header.reserved[1] = 1;
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_E_PARAMS);
    s = valid, s.header.magic++;
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_E_PARAMS);
    s = valid, s.header.version++;
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_E_PARAMS);
    s = valid, s.header.pages = UINT32_MAX;
    CHECK_EQUAL(submit_bytes(alice.card, program, &s, whole, &fence, why), SPK_E_PARAMS);
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_E_HANDLE);
    CHECK_EQUAL(spk_card_unload_program(alice.card, UINT32_MAX), SPK_E_HANDLE);
}

static void buffers_of_a_program_cannot_be_freed(void)
{
    uint32_t one, two, bad;
    char why[256];
    struct builder p = bench_program(&alice);
    CASE("buffers in use");
    CHECK_EQUAL(load(alice.card, &p, &one, &bad, why), SPK_OK);
    CHECK_EQUAL(load(alice.card, &p, &two, &bad, why), SPK_OK);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < BUFFERS; i++)
            CHECK_EQUAL(spk_card_free(alice.card, alice.buffer[i]), SPK_E_BUSY);
        CHECK_EQUAL(spk_card_unload_program(alice.card, round ? two : one), SPK_OK);
    }
    for (int i = 0; i < BUFFERS; i++)
        CHECK_EQUAL(alice.card->buffers[alice.buffer[i]].users, 0);
    uint32_t handles[SPK_PROGRAMS_MAX];
    for (int i = 0; i < SPK_PROGRAMS_MAX; i++)
        CHECK_EQUAL(load(alice.card, &p, &handles[i], &bad, why), SPK_OK);
    CHECK_EQUAL(load(alice.card, &p, &one, &bad, why), SPK_E_NOMEM);
    for (int i = 0; i < SPK_PROGRAMS_MAX; i++)
        CHECK_EQUAL(spk_card_unload_program(alice.card, handles[i]), SPK_OK);
}

/* --- the queue ---------------------------------------------------------------------------- */

static void steps_complete_in_order(void)
{
    struct spk_card *both[] = {alice.card, bob.card};
    struct builder pa = bench_program(&alice), pb = bench_program(&bob);
    uint32_t a, b, bad;
    uint64_t fence = 0, before;
    char why[256];
    struct spk_counters counters;
    struct spk_completion done;
    CASE("queue");
    CHECK_EQUAL(load(alice.card, &pa, &a, &bad, why), SPK_OK);
    CHECK_EQUAL(load(bob.card, &pb, &b, &bad, why), SPK_OK);
    CHECK(!readable(alice.card) && !spk_card_completion(alice.card, &done));
    CHECK_EQUAL(spk_card_step(alice.card), SPK_STEP_IDLE);
    spk_card_counters(alice.card, &counters);
    before = counters.steps;
    for (uint32_t i = 0; i < SPK_QUEUE_MAX; i++) {
        struct step s = new_step(1 + i % TOKENS_MAX, i % 2, 8 * i % 50, 0, 4);
        CHECK_EQUAL(submit(alice.card, a, &s, &fence), SPK_OK);
        CHECK_EQUAL(submit(bob.card, b, &s, &fence), SPK_OK);
    }
    struct step s = new_step(1, 1, 0, 0, 1);
    CHECK_EQUAL(submit(alice.card, a, &s, &fence), SPK_E_BUSY);
    CHECK_EQUAL(spk_card_unload_program(alice.card, a), SPK_E_BUSY);
    CHECK_EQUAL(spk_card_alloc(alice.card, 64, &bad), SPK_E_BUSY);

    /* Alone, alice gets as far as the exchange of the first step. */
    CHECK_EQUAL(spk_card_step(alice.card), SPK_STEP_RAN);
    CHECK_EQUAL(spk_card_step(alice.card), SPK_STEP_WAITING);
    spk_card_counters(alice.card, &counters);
    CHECK_EQUAL(counters.waiting_for, 1);
    CHECK_EQUAL(counters.queued, SPK_QUEUE_MAX);
    CHECK_EQUAL(counters.command, find(&pa, SPK_OP_EXCHANGE) - pa.commands);
    CHECK(!readable(alice.card));

    CHECK(run_cards(both, 2));
    spk_card_counters(alice.card, &counters);
    CHECK_EQUAL(counters.waiting_for, -1);
    CHECK_EQUAL(counters.queued, 0);
    CHECK_EQUAL(counters.steps - before, SPK_QUEUE_MAX);
    CHECK(counters.busy_ns > 0 && counters.ddr_read_bytes > 0 && counters.ddr_written_bytes > 0);
    CHECK_EQUAL(submit(alice.card, a, &s, &fence), SPK_E_BUSY); /* nothing was collected yet */
    for (int card = 0; card < 2; card++) {
        uint64_t last = 0;
        for (int i = 0; i < SPK_QUEUE_MAX; i++) {
            done = collect(both[card]);
            CHECK_EQUAL(done.status, SPK_OK);
            CHECK(done.fence > last);
            last = done.fence;
        }
        CHECK(!spk_card_completion(both[card], &done) && !readable(both[card]));
    }
    uint64_t sent, received, other_sent, other_received;
    spk_card_link_bytes(alice.card, 1, &sent, &received);
    spk_card_link_bytes(bob.card, 0, &other_sent, &other_received);
    CHECK(sent == other_received && received == other_sent && sent > 0);
    spk_card_link_bytes(alice.card, SPK_CARDS_MAX, &sent, &received);
    CHECK(sent == 0 && received == 0);
    CHECK_EQUAL(spk_card_unload_program(alice.card, a), SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(bob.card, b), SPK_OK);
}

static void a_fault_names_its_command(void)
{
    struct builder p = new_program(TOKENS_MAX, OUTPUTS_MAX, POSITIONS_MAX);
    struct builder whole = bench_program(&alice);
    uint32_t program, bad;
    uint64_t fence;
    char why[256];
    float inf = 0x1p127f * 2.0f;
    CASE("fault");
    *append(&p, SPK_OP_ADD) = *find(&whole, SPK_OP_ADD);
    *append(&p, SPK_OP_QUANTIZE) = *find(&whole, SPK_OP_QUANTIZE);
    *append(&p, SPK_OP_SELECT) = *find(&whole, SPK_OP_SELECT);
    CHECK_EQUAL(load(alice.card, &p, &program, &bad, why), SPK_OK);
    struct step s = new_step(3, 1, 0, 0, 1);
    CHECK_EQUAL(spk_card_write(alice.card, alice.buffer[HIDDEN], WIDTH * 4, &inf, 4), SPK_OK);
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
    CHECK(run_cards(&alice.card, 1));
    struct spk_completion done = collect(alice.card);
    CHECK_EQUAL(done.status, SPK_E_NONFINITE);
    CHECK_EQUAL(done.command, 1);
    inf = 0;
    CHECK_EQUAL(spk_card_write(alice.card, alice.buffer[HIDDEN], WIDTH * 4, &inf, 4), SPK_OK);
    CHECK_EQUAL(spk_card_write(alice.card, alice.buffer[X], WIDTH * 4, &inf, 4), SPK_OK);
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
    CHECK(run_cards(&alice.card, 1));
    CHECK_EQUAL(collect(alice.card).status, SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);
}

/* Every row count up to a program's largest, no row beyond them being written. */
static void only_the_rows_of_the_step_are_written(void)
{
    struct builder p = new_program(TOKENS_MAX, OUTPUTS_MAX, POSITIONS_MAX);
    struct builder whole = bench_program(&alice);
    uint32_t program, bad;
    uint64_t fence;
    char why[256];
    *append(&p, SPK_OP_EMBED) = *find(&whole, SPK_OP_EMBED);
    *append(&p, SPK_OP_SELECT) = *find(&whole, SPK_OP_SELECT);
    CHECK_EQUAL(load(alice.card, &p, &program, &bad, why), SPK_OK);
    for (uint32_t tokens = 0; tokens <= TOKENS_MAX; tokens++)
        for (uint32_t outputs = 0; outputs <= OUTPUTS_MAX && outputs <= tokens; outputs++) {
            uint8_t x[TOKENS_MAX * WIDTH * 4], selected[OUTPUTS_MAX * WIDTH * 4];
            CASE("%u tokens, %u outputs", tokens, outputs);
            memset(x, 0xa5, sizeof x);
            CHECK_EQUAL(spk_card_write(alice.card, alice.buffer[X], 0, x, sizeof x), SPK_OK);
            CHECK_EQUAL(spk_card_write(alice.card, alice.buffer[SELECTED], 0, x, sizeof selected),
                        SPK_OK);
            struct step s = new_step(tokens, outputs, 0, 0, 1);
            CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
            CHECK(run_cards(&alice.card, 1));
            CHECK_EQUAL(collect(alice.card).status, SPK_OK);
            CHECK_EQUAL(spk_card_read(alice.card, alice.buffer[X], 0, x, sizeof x), SPK_OK);
            CHECK_EQUAL(spk_card_read(alice.card, alice.buffer[SELECTED], 0, selected,
                                      sizeof selected),
                        SPK_OK);
            for (size_t i = tokens * WIDTH * 4; i < sizeof x; i++)
                CHECK_EQUAL(x[i], 0xa5);
            for (size_t i = outputs * WIDTH * 4; i < sizeof selected; i++)
                CHECK_EQUAL(selected[i], 0xa5);
            CHECK(memcmp(selected, x + (tokens - outputs) * WIDTH * 4, outputs * WIDTH * 4) == 0);
        }
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);
}

/* --- what a step brings back -------------------------------------------------------------- */

/* A program that adds HIDDEN to X, once for each command, on the first row or more. */
static struct builder adding(const struct bench *b, int commands)
{
    struct builder p = new_program(TOKENS_MAX, OUTPUTS_MAX, POSITIONS_MAX), whole = bench_program(b);
    for (int i = 0; i < commands; i++)
        *append(&p, SPK_OP_ADD) = *find(&whole, SPK_OP_ADD);
    return p;
}

/* X to zeros and HIDDEN to ones: `adding` counts. */
static void start_counting(const struct bench *b)
{
    float x[TOKENS_MAX * WIDTH] = {0};
    CHECK_EQUAL(spk_card_write(b->card, b->buffer[X], 0, x, sizeof x), SPK_OK);
    for (size_t i = 0; i < COUNT(x); i++)
        x[i] = 1.0f;
    CHECK_EQUAL(spk_card_write(b->card, b->buffer[HIDDEN], 0, x, sizeof x), SPK_OK);
}

static float float_at(const uint8_t *bytes)
{
    float x;
    memcpy(&x, bytes, sizeof x);
    return x;
}

static void reads_come_with_their_own_step(void)
{
    struct builder p = adding(&alice, 1);
    uint32_t program, bad;
    uint64_t fence;
    char why[256];
    struct step s = new_step(1, 0, 0, 0, 1);
    struct spk_completion done;
    CASE("reads");
    CHECK_EQUAL(load(alice.card, &p, &program, &bad, why), SPK_OK);
    start_counting(&alice);
    for (uint32_t i = 0; i < SPK_QUEUE_MAX; i++) {
        /* As many reads as there may be; the last one ends with its buffer. */
        struct spk_read reads[SPK_READS_MAX] = {
            {.buffer = alice.buffer[X], .offset = 4 * i, .nbytes = 4},
            {.buffer = alice.buffer[HIDDEN], .offset = 0, .nbytes = 0},
            {.buffer = alice.buffer[X], .offset = TOKENS_MAX * WIDTH * 4, .nbytes = 0},
            {.buffer = alice.buffer[HIDDEN], .offset = 4, .nbytes = 8},
            {.buffer = alice.buffer[X], .offset = TOKENS_MAX * WIDTH * 4 - 1, .nbytes = 1},
        };
        for (int j = 5; j < SPK_READS_MAX; j++)
            reads[j] = reads[0];
        CHECK_EQUAL(submit_reading(alice.card, program, &s, step_bytes(&s), reads, i + 1, &fence,
                                   why),
                    SPK_OK);
    }
    CHECK(run_cards(&alice.card, 1));
    static const uint64_t ends[SPK_READS_MAX] = {4, 4, 4, 12, 13, 17, 21, 25};
    for (uint32_t i = 0; i < SPK_QUEUE_MAX; i++) {
        CASE("reads of step %u", i);
        done = collect(alice.card);
        CHECK_EQUAL(done.status, SPK_OK);
        CHECK_EQUAL(done.result_bytes, ends[i]);
        /* The memory as it was then, though all the steps are over. */
        CHECK(float_at(done.result) == (float)(i + 1));
        if (i >= 3)
            CHECK(float_at(done.result + 4) == 1.0f && float_at(done.result + 8) == 1.0f);
        if (i >= 4)
            CHECK_EQUAL(done.result[12], 0);
        for (uint32_t j = 5; j <= i; j++)
            CHECK(float_at(done.result + 13 + 4 * (j - 5)) == (float)(i + 1));
    }
    CHECK(!spk_card_completion(alice.card, &done));
    /* A step of no rows reads too, one without reads brings nothing. */
    struct step empty = new_step(0, 0, 0, 0, 0);
    struct spk_read whole = {.buffer = alice.buffer[X], .nbytes = TOKENS_MAX * WIDTH * 4};
    CHECK_EQUAL(submit_reading(alice.card, program, &empty, step_bytes(&empty), &whole, 1, &fence,
                               why),
                SPK_OK);
    CHECK_EQUAL(submit(alice.card, program, &empty, &fence), SPK_OK);
    CHECK(run_cards(&alice.card, 1));
    done = collect(alice.card);
    CHECK_EQUAL(done.result_bytes, whole.nbytes);
    CHECK(float_at(done.result + 4 * WIDTH) == 0.0f && float_at(done.result) == SPK_QUEUE_MAX);
    CHECK_EQUAL(collect(alice.card).result_bytes, 0);
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);
}

static void refuses_reads_that_do_not_fit(void)
{
    struct builder p = adding(&alice, 1);
    uint32_t program, bad, users[BUFFERS];
    uint64_t fence;
    char why[256];
    struct step s = new_step(1, 0, 0, 0, 1);
    struct spk_counters counters;
    struct spk_completion done;
    const uint64_t end = TOKENS_MAX * WIDTH * 4;
    const uint32_t x = alice.buffer[X];
    const struct {
        int status;
        struct spk_read read;
    } bad_reads[] = {
        {SPK_E_HANDLE, {.buffer = 9999, .nbytes = 1}},
        {SPK_E_HANDLE, {.buffer = UINT32_MAX}},
        {SPK_E_BOUNDS, {.buffer = x, .offset = end, .nbytes = 1}},
        {SPK_E_BOUNDS, {.buffer = x, .offset = end + 1}},
        {SPK_E_BOUNDS, {.buffer = x, .nbytes = end + 1}},
        {SPK_E_BOUNDS, {.buffer = x, .offset = 1, .nbytes = UINT64_MAX}},
        {SPK_E_BOUNDS, {.buffer = x, .offset = UINT64_MAX, .nbytes = 1}},
        {SPK_E_BOUNDS, {.buffer = x, .offset = UINT64_MAX - 3, .nbytes = 8}},
        {SPK_E_BOUNDS, {.buffer = x, .reserved = 1}},
        {SPK_E_BOUNDS, {.buffer = x, .reserved = UINT32_MAX, .nbytes = 4}},
    };
    CASE("reads");
    CHECK_EQUAL(load(alice.card, &p, &program, &bad, why), SPK_OK);
    start_counting(&alice);
    for (int i = 0; i < BUFFERS; i++)
        users[i] = alice.card->buffers[alice.buffer[i]].users;
    for (size_t i = 0; i < COUNT(bad_reads) + 1; i++)
        for (size_t at = 0; at < SPK_READS_MAX; at++) {
            /* The bad one among good ones, or one too many of those. */
            struct spk_read reads[SPK_READS_MAX + 1];
            bool many = i == COUNT(bad_reads);
            CASE("bad read %zu of number %zu", at, i);
            for (size_t j = 0; j < COUNT(reads); j++)
                reads[j] = (struct spk_read){.buffer = x, .nbytes = 4};
            if (!many)
                reads[at] = bad_reads[i].read;
            CHECK_EQUAL(submit_reading(alice.card, program, &s, step_bytes(&s), reads,
                                       SPK_READS_MAX + many, &fence, why),
                        many ? SPK_E_PARAMS : bad_reads[i].status);
            CHECK(strlen(why) > 8 && !strchr(why, '\n'));
            for (int j = 0; j < BUFFERS; j++)
                CHECK_EQUAL(alice.card->buffers[alice.buffer[j]].users, users[j]);
        }
    CASE("a number of reads beyond any memory");
    CHECK_EQUAL(spk_card_submit(alice.card, program, &s, step_bytes(&s), NULL, SIZE_MAX, &fence,
                                why),
                SPK_E_PARAMS);
    spk_card_counters(alice.card, &counters);
    CHECK_EQUAL(counters.queued, 0);
    CHECK_EQUAL(spk_card_step(alice.card), SPK_STEP_IDLE);
    CHECK(!spk_card_completion(alice.card, &done));
    /* What is wrong with the step itself is told though the reads are good. */
    struct spk_read good = {.buffer = x, .nbytes = 4};
    CHECK_EQUAL(submit_reading(alice.card, program, &s, step_bytes(&s) - 4, &good, 1, &fence, why),
                SPK_E_PARAMS);
    CHECK_EQUAL(submit_reading(alice.card, program, &s, step_bytes(&s), &good, 1, &fence, why),
                SPK_OK);
    CHECK(run_cards(&alice.card, 1));
    CHECK(float_at(collect(alice.card).result) == 1.0f); /* nothing ran before it */
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);
}

/* Reads within their buffers, but together more than a result may have. */
static void refuses_results_that_are_too_large(void)
{
    int status;
    uint32_t large, program, bad;
    uint64_t fence;
    char why[256];
    struct spk_card *c = spk_card_create(SPK_RESULT_BYTES_MAX, SPK_ISA_SCALAR, &status);
    struct builder p = new_program(1, 0, 1);
    struct step s = new_step(1, 0, 0, 0, 0);
    struct spk_read reads[2] = {{.nbytes = SPK_RESULT_BYTES_MAX}, {.nbytes = 1}};
    CASE("large results");
    CHECK_EQUAL(spk_card_alloc(c, SPK_RESULT_BYTES_MAX, &large), SPK_OK);
    CHECK_EQUAL(load(c, &p, &program, &bad, why), SPK_OK);
    reads[0].buffer = reads[1].buffer = large;
    CHECK_EQUAL(submit_reading(c, program, &s, step_bytes(&s), reads, 2, &fence, why),
                SPK_E_BOUNDS);
    reads[0].nbytes = reads[1].nbytes = SPK_RESULT_BYTES_MAX / 2 + 1;
    CHECK_EQUAL(submit_reading(c, program, &s, step_bytes(&s), reads, 2, &fence, why),
                SPK_E_BOUNDS);
    CHECK_EQUAL(spk_card_free(c, large), SPK_OK);
    spk_card_destroy(c);
}

/* However a step ends, its buffers are held until then and no longer. */
static void a_buffer_that_a_step_will_read_cannot_be_freed(void)
{
    static const char *const endings[] = {"success", "fault", "abort", "death"};
    for (size_t how = 0; how < COUNT(endings); how++) {
        struct bench b = bench_create(0, SPK_ISA_SCALAR);
        struct builder p = adding(&b, 1), whole = bench_program(&b);
        uint32_t program, bad, extra;
        uint64_t fence;
        char why[256];
        float inf = 0x1p127f * 2.0f;
        struct step s = new_step(1, 0, 0, 0, 1);
        CASE("held until %s", endings[how]);
        *append(&p, SPK_OP_QUANTIZE) = *find(&whole, SPK_OP_QUANTIZE);
        UNPOISON(b.card->ddr, b.card->ddr_bytes);
        CHECK_EQUAL(spk_card_alloc(b.card, 100, &extra), SPK_OK);
        CHECK_EQUAL(spk_card_write(b.card, extra, 0, "abcdef", 6), SPK_OK);
        CHECK_EQUAL(load(b.card, &p, &program, &bad, why), SPK_OK);
        start_counting(&b);
        if (how == 1)
            CHECK_EQUAL(spk_card_write(b.card, b.buffer[HIDDEN], 0, &inf, 4), SPK_OK);
        struct spk_read reads[] = {{.buffer = extra, .offset = 2, .nbytes = 3},
                                   {.buffer = extra, .nbytes = 1}};
        /* Of the second one nothing runs but on success. */
        for (int i = 0; i < 2; i++)
            CHECK_EQUAL(submit_reading(b.card, program, &s, step_bytes(&s), reads, 2, &fence, why),
                        SPK_OK);
        CHECK_EQUAL(spk_card_free(b.card, extra), SPK_E_BUSY);
        if (how == 2)
            CHECK_EQUAL(spk_card_abort(b.card, 2), SPK_OK);
        if (how == 3)
            spk_card_plant(b.card, SPK_PLANT_DIE);
        CHECK(run_cards(&b.card, 1));
        static const int statuses[][2] = {{SPK_OK, SPK_OK},
                                          {SPK_E_NONFINITE, SPK_E_ABORTED},
                                          {SPK_E_ABORTED, SPK_E_ABORTED},
                                          {SPK_E_LOST, SPK_E_LOST}};
        for (int i = 0; i < 2; i++) {
            struct spk_completion done = collect(b.card);
            CHECK_EQUAL(done.status, statuses[how][i]);
            CHECK_EQUAL(done.result_bytes, how == 0 ? 4 : 0);
            if (how == 0)
                CHECK(memcmp(done.result, "cdea", 4) == 0);
        }
        CHECK_EQUAL(b.card->buffers[extra].users, 0);
        CHECK_EQUAL(spk_card_free(b.card, extra), how == 3 ? SPK_E_LOST : SPK_OK);
        bench_destroy(&b);
    }
}

/* --- the choice of a token ---------------------------------------------------------------- */

static float choice_value(struct rng *r)
{
    static const float values[] = {-3.0e38f, -1.0f, -0.0f, 0.0f, 0x1p-149f, 1.0f, 1.5f, 3.0e38f};
    return values[rng_below(r, COUNT(values))];
}

/* The largest value wins and of equal ones the first, whatever lies between the rows. */
static void the_best_of_all_lists_is_chosen(void)
{
    enum { ROWS = 5, K_MAX = 6, LISTS_MAX = 7, ROUNDS = 300, SEED = 41 };
    struct rng r = {.state = SEED};
    int status;
    struct spk_card *c = spk_card_create(1 << 20, SPK_ISA_SCALAR, &status);
    uint32_t top, pairs, chosen, best;
    CHECK_EQUAL(spk_card_alloc(c, 4096, &top), SPK_OK);
    CHECK_EQUAL(spk_card_alloc(c, 4096, &best), SPK_OK);
    CHECK_EQUAL(spk_card_alloc(c, 4096, &pairs), SPK_OK);
    CHECK_EQUAL(spk_card_alloc(c, 4096, &chosen), SPK_OK);
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t k = 1 + rng_below(&r, K_MAX), lists = 1 + rng_below(&r, LISTS_MAX);
        uint32_t outputs = rng_below(&r, ROWS + 1), program, bad, words[1024], ids[1024];
        uint32_t stride = 8 * k + 4 * rng_below(&r, 4), pair_stride = 8 * lists + 4 * rng_below(&r, 4);
        uint32_t out_stride = 8 + 4 * rng_below(&r, 3), id_stride = 4 + 4 * rng_below(&r, 3);
        uint32_t offset = 4 * rng_below(&r, 5);
        uint64_t fence;
        char why[256];
        struct builder p = new_program(ROWS, ROWS, ROWS);
        struct step s = new_step(outputs, outputs, 0, 0, 0);
        CASE("choice, round %d, seed %d", round, SEED);
        for (size_t i = 0; i < COUNT(words); i++) {
            float x = choice_value(&r);
            memcpy(&words[i], &x, 4);
            ids[i] = (uint32_t)rng_next(&r);
        }
        CHECK_EQUAL(spk_card_write(c, top, 0, words, 4096), SPK_OK);
        for (size_t i = 1; i < COUNT(words); i += 2)
            ids[i] = words[i];
        if (offset % 8) /* ids stand at even words of a list, wherever that begins */
            for (size_t i = 0; i + 1 < COUNT(words); i += 2) {
                uint32_t id = ids[i];
                ids[i] = ids[i + 1], ids[i + 1] = id;
            }
        CHECK_EQUAL(spk_card_write(c, pairs, 0, ids, 4096), SPK_OK);
        struct spk_command *cmd = append(&p, SPK_OP_BEST);
        cmd->flags = SPK_FLAG_OUTPUTS;
        cmd->ref[0] = ref_at(top, stride, offset);
        cmd->ref[3] = ref_at(best, out_stride, offset);
        cmd->arg[0] = k;
        cmd = append(&p, SPK_OP_CHOOSE);
        cmd->flags = SPK_FLAG_OUTPUTS;
        cmd->ref[0] = ref_at(pairs, pair_stride, offset);
        cmd->ref[3] = ref_at(chosen, id_stride, offset);
        cmd->arg[0] = lists;
        uint32_t out[2][1024], expected[2][1024];
        memset(expected, 0xa5, sizeof expected);
        CHECK_EQUAL(spk_card_write(c, best, 0, expected, 4096), SPK_OK);
        CHECK_EQUAL(spk_card_write(c, chosen, 0, expected, 4096), SPK_OK);
        for (uint32_t i = 0; i < outputs; i++) {
            const uint32_t *list = words + (offset + i * stride) / 4;
            uint32_t *pair = expected[0] + (offset + i * out_stride) / 4;
            pair[0] = list[0], pair[1] = list[k];
            list = ids + (offset + i * pair_stride) / 4;
            float most = float_at((const uint8_t *)&list[1]);
            uint32_t winner = list[0];
            for (uint32_t j = 1; j < lists; j++) {
                float value = float_at((const uint8_t *)&list[2 * j + 1]);
                if (value > most)
                    most = value, winner = list[2 * j];
            }
            expected[1][(offset + i * id_stride) / 4] = winner;
        }
        CHECK_EQUAL(load(c, &p, &program, &bad, why), SPK_OK);
        CHECK_EQUAL(submit(c, program, &s, &fence), SPK_OK);
        CHECK(run_cards(&c, 1));
        CHECK_EQUAL(collect(c).status, SPK_OK);
        CHECK_EQUAL(spk_card_read(c, best, 0, out[0], 4096), SPK_OK);
        CHECK_EQUAL(spk_card_read(c, chosen, 0, out[1], 4096), SPK_OK);
        CHECK(memcmp(out, expected, sizeof out) == 0);
        CHECK_EQUAL(spk_card_unload_program(c, program), SPK_OK);
    }
    spk_card_destroy(c);
}

/* What the steps of `ids` bring back from both cards: the logits and the chosen ids of each. */
static void run_queued(const uint32_t *programs, const struct step *steps, size_t count,
                       uint8_t *results, size_t result_bytes)
{
    struct spk_card *both[] = {alice.card, bob.card};
    char why[256];
    uint64_t fence;
    for (size_t i = 0; i < count; i++)
        for (int card = 0; card < 2; card++) {
            const struct bench *b = card ? &bob : &alice;
            struct spk_read reads[] = {
                {.buffer = b->buffer[CHOSEN], .nbytes = b->bytes[CHOSEN]},
                {.buffer = b->buffer[LOGITS], .nbytes = b->bytes[LOGITS]},
            };
            CHECK_EQUAL(submit_reading(both[card], programs[card], &steps[i],
                                       step_bytes(&steps[i]), reads, 2, &fence, why),
                        SPK_OK);
        }
    CHECK(run_cards(both, 2));
    for (size_t i = 0; i < count; i++)
        for (int card = 0; card < 2; card++) {
            struct spk_completion done = collect(both[card]);
            CHECK_EQUAL(done.status, SPK_OK);
            CHECK_EQUAL(done.result_bytes, result_bytes);
            memcpy(results + (2 * i + (size_t)card) * result_bytes, done.result, result_bytes);
        }
}

/* Queued before anyone knows the tokens, steps compute what they do when the ids are given. */
static void a_step_begins_with_what_the_step_before_chose(void)
{
    enum { STEPS = 4 };
    uint32_t programs[2], bad;
    char why[256];
    struct builder pa = bench_program(&alice), pb = bench_program(&bob);
    size_t bytes = alice.bytes[CHOSEN] + alice.bytes[LOGITS];
    uint8_t *ahead = exact(STEPS * 2 * bytes), *single = exact(STEPS * 2 * bytes);
    CASE("chosen tokens");
    CHECK_EQUAL(load(alice.card, &pa, &programs[0], &bad, why), SPK_OK);
    CHECK_EQUAL(load(bob.card, &pb, &programs[1], &bad, why), SPK_OK);
    struct step steps[STEPS] = {new_step(3, 3, 0, 0, 1)};
    /* Each of these begins with an output of the one before, and chooses one to two more. */
    steps[1] = new_step(2, 2, 3, 0, 1);
    steps[1].words[0] = SPK_TOKEN_CHOSEN | 2, steps[1].words[1] = SPK_TOKEN_CHOSEN;
    steps[2] = new_step(1, 1, 5, 0, 1);
    steps[2].words[0] = SPK_TOKEN_CHOSEN | 1;
    steps[3] = new_step(2, 1, 6, 0, 1);
    steps[3].words[0] = SPK_TOKEN_CHOSEN;
    run_queued(programs, steps, STEPS, ahead, bytes);
    for (int i = 0; i < STEPS; i++) {
        const uint32_t *before = (const uint32_t *)(const void *)(single + 2 * (i - 1) * bytes);
        for (uint32_t t = 0; i && t < steps[i].header.tokens; t++)
            if (steps[i].words[t] & SPK_TOKEN_CHOSEN) {
                steps[i].words[t] = before[steps[i].words[t] ^ SPK_TOKEN_CHOSEN];
                CHECK(steps[i].words[t] < VOCABULARY);
            }
        run_queued(programs, &steps[i], 1, single + 2 * (size_t)i * bytes, bytes);
    }
    /* Rows that a step does not write keep what an earlier one, of the other run too, has left. */
    for (int i = 0; i < STEPS; i++)
        for (int card = 0; card < 2; card++) {
            size_t at = (2 * (size_t)i + (size_t)card) * bytes, outputs = steps[i].header.outputs;
            CASE("chosen tokens, step %d, card %d", i, card);
            CHECK(memcmp(ahead + at, single + at, outputs * 4) == 0);
            at += alice.bytes[CHOSEN];
            CHECK(memcmp(ahead + at, single + at, outputs * VOCABULARY * 4) == 0);
        }
    CHECK_EQUAL(spk_card_unload_program(alice.card, programs[0]), SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(bob.card, programs[1]), SPK_OK);
    free(ahead), free(single);
}

static void a_chosen_id_that_is_no_token_is_a_fault(void)
{
    static const uint32_t ids[] = {VOCABULARY, SPK_TOKEN_CHOSEN, SPK_TOKEN_CHOSEN | 1, UINT32_MAX};
    struct builder p = new_program(TOKENS_MAX, OUTPUTS_MAX, POSITIONS_MAX);
    struct builder whole = bench_program(&alice);
    uint32_t program, bad, zero = 0;
    uint64_t fence;
    char why[256];
    struct step s = new_step(2, 0, 0, 0, 1);
    *append(&p, SPK_OP_SELECT) = *find(&whole, SPK_OP_SELECT);
    *append(&p, SPK_OP_EMBED) = *find(&whole, SPK_OP_EMBED);
    CHECK_EQUAL(load(alice.card, &p, &program, &bad, why), SPK_OK);
    for (size_t i = 0; i < COUNT(ids); i++)
        for (uint32_t slot = 0; slot < OUTPUTS_MAX; slot++) {
            CASE("chosen id %u of output %u", ids[i], slot);
            s.words[1] = SPK_TOKEN_CHOSEN | slot;
            CHECK_EQUAL(spk_card_write(alice.card, alice.buffer[CHOSEN], 4 * slot, &ids[i], 4),
                        SPK_OK);
            CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
            CHECK(run_cards(&alice.card, 1));
            struct spk_completion done = collect(alice.card);
            CHECK_EQUAL(done.status, SPK_E_PARAMS);
            CHECK_EQUAL(done.command, 1);
            CHECK_EQUAL(spk_card_write(alice.card, alice.buffer[CHOSEN], 4 * slot, &zero, 4),
                        SPK_OK);
            CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
            CHECK(run_cards(&alice.card, 1));
            CHECK_EQUAL(collect(alice.card).status, SPK_OK);
        }
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);
    /* A program that embeds nothing takes any ids. */
    p.header.commands = 1;
    s.words[0] = UINT32_MAX, s.words[1] = SPK_TOKEN_CHOSEN | OUTPUTS_MAX;
    CHECK_EQUAL(load(alice.card, &p, &program, &bad, why), SPK_OK);
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
    CHECK(run_cards(&alice.card, 1));
    CHECK_EQUAL(collect(alice.card).status, SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);
}

/* --- the trace ---------------------------------------------------------------------------- */

#define EVENTS_MAX 64

/* Reads what was traced, which must be in order of time and no two at once. */
static uint64_t read_trace(struct spk_card *c, struct spk_trace_event *events, uint64_t most,
                           uint64_t *lost)
{
    struct spk_trace_event *copy = exact(most * sizeof *copy);
    uint64_t got = spk_card_trace_read(c, copy, most, lost);
    CHECK(got <= most);
    for (uint64_t i = 0; i < got; i++) {
        CHECK(copy[i].begin_ns && copy[i].begin_ns <= copy[i].end_ns);
        CHECK(!i || copy[i - 1].end_ns <= copy[i].begin_ns);
        events[i] = copy[i];
    }
    free(copy);
    return got;
}

static void a_trace_tells_every_command_in_order(void)
{
    struct spk_card *both[] = {alice.card, bob.card};
    struct builder p[] = {bench_program(&alice), bench_program(&bob)};
    struct spk_trace_event events[EVENTS_MAX];
    uint32_t programs[2], bad;
    uint64_t fences[2][2], lost, last_end = 0;
    char why[256];
    struct timespec begin, end;
    CASE("trace");
    for (int card = 0; card < 2; card++) {
        CHECK_EQUAL(load(both[card], &p[card], &programs[card], &bad, why), SPK_OK);
        CHECK_EQUAL(spk_card_trace(both[card], EVENTS_MAX), SPK_OK);
        CHECK_EQUAL(read_trace(both[card], events, EVENTS_MAX, &lost), 0);
        CHECK_EQUAL(lost, 0);
    }
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < 2; i++)
        for (int card = 0; card < 2; card++) {
            struct step s = new_step(i ? 1 : 4, i ? 0 : 2, 0, 0, 1);
            CHECK_EQUAL(submit(both[card], programs[card], &s, &fences[card][i]), SPK_OK);
            CHECK_EQUAL(spk_card_trace(both[card], EVENTS_MAX), SPK_E_BUSY);
            CHECK_EQUAL(spk_card_trace(both[card], 0), SPK_E_BUSY);
        }
    CHECK(run_cards(both, 2));
    clock_gettime(CLOCK_MONOTONIC, &end);
    for (int card = 0; card < 2; card++) {
        CASE("trace of card %d", card);
        uint32_t commands = p[card].header.commands;
        CHECK(2 * commands <= EVENTS_MAX);
        /* In two pieces. */
        uint64_t got = read_trace(both[card], events, 7, &lost);
        CHECK_EQUAL(got, 7);
        got += read_trace(both[card], events + got, EVENTS_MAX, &lost);
        CHECK_EQUAL(got, 2 * commands);
        CHECK_EQUAL(lost, 0);
        CHECK(events[6].end_ns <= events[7].begin_ns);
        for (uint64_t i = 0; i < got; i++) {
            const struct spk_command *cmd = &p[card].commands[i % commands];
            CHECK_EQUAL(events[i].command, i % commands);
            CHECK_EQUAL(events[i].fence, fences[card][i / commands]);
            CHECK_EQUAL(events[i].op, cmd->op);
            CHECK_EQUAL(events[i].format, cmd->format);
        }
        last_end = events[got - 1].end_ns;
        CHECK(events[0].begin_ns >=
              (uint64_t)begin.tv_sec * 1000000000u + (uint64_t)begin.tv_nsec);
        CHECK(last_end <= (uint64_t)end.tv_sec * 1000000000u + (uint64_t)end.tv_nsec);
        CHECK_EQUAL(read_trace(both[card], events, EVENTS_MAX, &lost), 0);
        for (int i = 0; i < 2; i++)
            CHECK_EQUAL(collect(both[card]).status, SPK_OK);
        CHECK_EQUAL(spk_card_trace(both[card], 0), SPK_OK);
        CHECK_EQUAL(spk_card_unload_program(both[card], programs[card]), SPK_OK);
    }
}

static void a_trace_that_nobody_reads_loses_the_newest(void)
{
    enum { ROOM = 5, COMMANDS = 3 };
    struct builder p = adding(&alice, COMMANDS);
    struct spk_trace_event events[EVENTS_MAX];
    uint32_t program, bad;
    uint64_t fence, first = 0, lost;
    char why[256];
    struct step s = new_step(1, 0, 0, 0, 1);
    CASE("full trace");
    CHECK_EQUAL(load(alice.card, &p, &program, &bad, why), SPK_OK);
    CHECK_EQUAL(spk_card_trace(alice.card, SPK_TRACE_EVENTS_MAX + 1), SPK_E_ARG);
    CHECK_EQUAL(spk_card_trace(alice.card, UINT64_MAX), SPK_E_ARG);
    CHECK_EQUAL(spk_card_trace(alice.card, ROOM), SPK_OK);
    uint64_t total_lost = 0;
    for (int round = 0; round < 6; round++) {
        CASE("full trace, round %d", round);
        uint64_t steps = 1 + (uint64_t)round % 3, made = steps * COMMANDS;
        for (uint64_t i = 0; i < steps; i++) {
            CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
            first = i ? first : fence;
        }
        CHECK(run_cards(&alice.card, 1));
        for (uint64_t i = 0; i < steps; i++)
            CHECK_EQUAL(collect(alice.card).status, SPK_OK);
        uint64_t kept = made < ROOM ? made : ROOM;
        total_lost += made - kept;
        CHECK_EQUAL(read_trace(alice.card, events, 0, &lost), 0);
        CHECK_EQUAL(lost, total_lost);
        CHECK_EQUAL(read_trace(alice.card, events, EVENTS_MAX, &lost), kept);
        CHECK_EQUAL(lost, total_lost);
        for (uint64_t i = 0; i < kept; i++) {
            CHECK_EQUAL(events[i].fence, first + i / COMMANDS);
            CHECK_EQUAL(events[i].command, i % COMMANDS);
        }
    }
    /* Begun again it has lost nothing, stopped it records nothing. */
    CHECK_EQUAL(spk_card_trace(alice.card, ROOM), SPK_OK);
    CHECK_EQUAL(read_trace(alice.card, events, EVENTS_MAX, &lost), 0);
    CHECK_EQUAL(lost, 0);
    CHECK_EQUAL(spk_card_trace(alice.card, 0), SPK_OK);
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
    CHECK(run_cards(&alice.card, 1));
    CHECK_EQUAL(collect(alice.card).status, SPK_OK);
    CHECK_EQUAL(read_trace(alice.card, events, EVENTS_MAX, &lost), 0);
    CHECK_EQUAL(lost, 0);
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);
}

/* The command that fails and what an abort cuts short are not told. */
static void a_trace_ends_where_a_step_does(void)
{
    struct builder p = adding(&alice, 1), whole = bench_program(&alice);
    struct spk_trace_event events[EVENTS_MAX];
    uint32_t program, bad;
    uint64_t fence, lost;
    char why[256];
    float inf = 0x1p127f * 2.0f;
    struct step s = new_step(1, 0, 0, 0, 1);
    CASE("trace of a fault");
    *append(&p, SPK_OP_QUANTIZE) = *find(&whole, SPK_OP_QUANTIZE);
    CHECK_EQUAL(load(alice.card, &p, &program, &bad, why), SPK_OK);
    CHECK_EQUAL(spk_card_trace(alice.card, EVENTS_MAX), SPK_OK);
    CHECK_EQUAL(spk_card_write(alice.card, alice.buffer[HIDDEN], 0, &inf, 4), SPK_OK);
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
    CHECK(run_cards(&alice.card, 1));
    CHECK_EQUAL(collect(alice.card).status, SPK_E_NONFINITE);
    CHECK_EQUAL(collect(alice.card).status, SPK_E_ABORTED);
    CHECK_EQUAL(read_trace(alice.card, events, EVENTS_MAX, &lost), 1);
    CHECK_EQUAL(events[0].fence, fence - 1);
    CHECK_EQUAL(events[0].command, 0);
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);

    CASE("trace of an abort");
    CHECK_EQUAL(load(alice.card, &whole, &program, &bad, why), SPK_OK);
    start_counting(&alice);
    uint32_t exchange = (uint32_t)(find(&whole, SPK_OP_EXCHANGE) - whole.commands);
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
    CHECK(!run_cards(&alice.card, 1)); /* bob does nothing */
    CHECK_EQUAL(read_trace(alice.card, events, EVENTS_MAX, &lost), exchange);
    uint32_t epoch = alice.card->epoch + 1;
    CHECK_EQUAL(spk_card_abort(alice.card, epoch), SPK_OK);
    CHECK_EQUAL(spk_card_abort(bob.card, epoch), SPK_OK);
    struct spk_card *both[] = {alice.card, bob.card};
    CHECK(run_cards(both, 2));
    CHECK_EQUAL(collect(alice.card).status, SPK_E_ABORTED);
    CHECK_EQUAL(read_trace(alice.card, events, EVENTS_MAX, &lost), 0);
    CHECK_EQUAL(spk_card_trace(alice.card, 0), SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);
}

/* --- aborts, planted faults, links -------------------------------------------------------- */

static struct spk_completion completion_of(struct bench *b)
{
    return collect(b->card);
}

static void aborts_end_waiting_steps_and_leave_nothing_behind(void)
{
    struct spk_card *both[] = {alice.card, bob.card};
    struct builder pa = bench_program(&alice), pb = bench_program(&bob);
    uint32_t a, b, bad, epoch;
    uint64_t fence;
    char why[256];
    struct spk_counters counters;
    CASE("abort");
    CHECK_EQUAL(load(alice.card, &pa, &a, &bad, why), SPK_OK);
    CHECK_EQUAL(load(bob.card, &pb, &b, &bad, why), SPK_OK);
    spk_card_counters(alice.card, &counters);
    epoch = counters.epoch;
    CHECK_EQUAL(spk_card_abort(alice.card, epoch), SPK_E_ARG);
    CHECK_EQUAL(spk_card_abort(alice.card, 0), SPK_E_ARG);
    for (int round = 0; round < 3; round++) {
        struct step s = new_step(4, 2, 0, 0, 1);
        CHECK_EQUAL(submit(alice.card, a, &s, &fence), SPK_OK);
        CHECK_EQUAL(submit(alice.card, a, &s, &fence), SPK_OK);
        CHECK(!run_cards(&alice.card, 1));
        /* What alice sent is in the ring and must not be taken for the next step's. */
        epoch++;
        CHECK_EQUAL(spk_card_abort(alice.card, epoch), SPK_OK);
        CHECK_EQUAL(spk_card_abort(bob.card, epoch), SPK_OK);
        /* An abort ends what was submitted before it, not what comes after. */
        struct step next = new_step(2 + (uint32_t)round, 1, 0, 0, 1);
        CHECK_EQUAL(submit(alice.card, a, &next, &fence), SPK_OK);
        CHECK_EQUAL(submit(bob.card, b, &next, &fence), SPK_OK);
        CHECK(run_cards(both, 2));
        CHECK_EQUAL(completion_of(&alice).status, SPK_E_ABORTED);
        CHECK_EQUAL(completion_of(&alice).status, SPK_E_ABORTED);
        CHECK_EQUAL(completion_of(&alice).status, SPK_OK);
        CHECK_EQUAL(completion_of(&bob).status, SPK_OK);
        spk_card_counters(alice.card, &counters);
        CHECK_EQUAL(counters.epoch, epoch);
        CHECK_EQUAL(counters.queued, 0);
    }
    /* An abort that only one card has seen: the other's messages wait or are dropped. */
    struct step s = new_step(3, 1, 0, 0, 1);
    CHECK_EQUAL(submit(bob.card, b, &s, &fence), SPK_OK);
    CHECK(!run_cards(&bob.card, 1));
    epoch++;
    CHECK_EQUAL(spk_card_abort(alice.card, epoch), SPK_OK);
    CHECK_EQUAL(submit(alice.card, a, &s, &fence), SPK_OK);
    CHECK(!run_cards(both, 2));
    CHECK_EQUAL(spk_card_abort(bob.card, epoch), SPK_OK);
    CHECK_EQUAL(submit(bob.card, b, &s, &fence), SPK_OK);
    CHECK(run_cards(both, 2));
    CHECK_EQUAL(completion_of(&bob).status, SPK_E_ABORTED);
    CHECK_EQUAL(completion_of(&bob).status, SPK_OK);
    CHECK_EQUAL(completion_of(&alice).status, SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(alice.card, a), SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(bob.card, b), SPK_OK);
}

/* A step submitted after an abort that the engine has not seen yet starts in the new epoch. */
static void a_step_never_starts_in_an_epoch_before_its_own(void)
{
    struct builder p = new_program(1, 1, POSITIONS_MAX), whole = bench_program(&alice);
    uint32_t program, bad;
    uint64_t fence;
    char why[256];
    struct step s = new_step(1, 1, 0, 0, 1);
    CASE("submission after an abort");
    *append(&p, SPK_OP_ADD) = *find(&whole, SPK_OP_ADD);
    CHECK_EQUAL(load(alice.card, &p, &program, &bad, why), SPK_OK);
    uint32_t epoch = alice.card->epoch;
    CHECK_EQUAL(spk_card_abort(alice.card, epoch + 1), SPK_OK);
    CHECK_EQUAL(submit(alice.card, program, &s, &fence), SPK_OK);
    /* As if the abort had come just after the engine looked for one. */
    atomic_store(&alice.card->abort_epoch, epoch);
    CHECK_EQUAL(spk_card_step(alice.card), SPK_STEP_IDLE);
    CHECK(!alice.card->run.active);
    atomic_store(&alice.card->abort_epoch, epoch + 1);
    CHECK(run_cards(&alice.card, 1));
    CHECK_EQUAL(collect(alice.card).status, SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(alice.card, program), SPK_OK);
}

static void a_corrupt_message_is_a_link_fault(void)
{
    struct spk_card *both[] = {alice.card, bob.card};
    struct builder pa = bench_program(&alice), pb = bench_program(&bob);
    uint32_t a, b, bad;
    uint64_t fence;
    char why[256];
    CHECK_EQUAL(load(alice.card, &pa, &a, &bad, why), SPK_OK);
    CHECK_EQUAL(load(bob.card, &pb, &b, &bad, why), SPK_OK);
    /* Both in one epoch, an odd one: its lowest bit flipped it is an older one. */
    uint32_t epoch = (alice.card->epoch | 1) + 2;
    CHECK_EQUAL(spk_card_abort(alice.card, epoch), SPK_OK);
    CHECK_EQUAL(spk_card_abort(bob.card, epoch), SPK_OK);
    CHECK(run_cards(both, 2));
    /* Header: epoch, bytes, sequence, CRC; then the payload of 4 rows. */
    static const struct {
        const char *what;
        uint64_t at;
        uint8_t flip;
    } flips[] = {{"epoch, now older", 0, 1}, {"epoch, now newer", 3, 0x80},
                 {"bytes", 4, 4},            {"bytes", 6, 0x40},
                 {"sequence", 8, 1},         {"CRC", 16, 1},
                 {"payload", 24, 1},         {"payload", 200, 0x80},
                 {"last byte", 24 + 511, 1}};
    for (size_t i = 0; i < COUNT(flips); i++) {
        struct step s = new_step(4, 2, 0, 0, 1);
        CASE("a flipped bit in the %s", flips[i].what);
        struct ring *ring = alice.card->links[1].direct.tx;
        uint64_t capacity = alice.card->links[1].direct.capacity;
        CHECK_EQUAL(submit(alice.card, a, &s, &fence), SPK_OK);
        uint64_t tail = atomic_load(&ring->tail);
        CHECK(!run_cards(&alice.card, 1));
        ring->data[(tail + flips[i].at) % capacity] ^= flips[i].flip;
        CHECK_EQUAL(submit(bob.card, b, &s, &fence), SPK_OK);
        while (spk_card_step(bob.card) == SPK_STEP_RAN)
            ;
        struct spk_completion done;
        bool completed = spk_card_completion(bob.card, &done);
        /* An older epoch is dropped and a newer one waits; anything else is reported. */
        CHECK(flips[i].at < 4 ? !completed : completed && done.status == SPK_E_LINK);
        /* The ring still holds the bad message: put it right, so that it can be dropped. */
        ring->data[(tail + flips[i].at) % capacity] ^= flips[i].flip;
        epoch += 2;
        CHECK_EQUAL(spk_card_abort(alice.card, epoch), SPK_OK);
        CHECK_EQUAL(spk_card_abort(bob.card, epoch), SPK_OK);
        run_cards(both, 2);
        while (spk_card_completion(alice.card, &done) || spk_card_completion(bob.card, &done))
            CHECK_EQUAL(done.status, SPK_E_ABORTED);
        CHECK_EQUAL(submit(alice.card, a, &s, &fence), SPK_OK);
        CHECK_EQUAL(submit(bob.card, b, &s, &fence), SPK_OK);
        CHECK(run_cards(both, 2));
        CHECK_EQUAL(collect(alice.card).status, SPK_OK);
        CHECK_EQUAL(collect(bob.card).status, SPK_OK);
    }
    CHECK_EQUAL(spk_card_unload_program(alice.card, a), SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(bob.card, b), SPK_OK);
}

static void links_refuse_nonsense(void)
{
    CASE("links");
    CHECK_EQUAL(spk_link_connect(alice.card, 0, alice.card, 0, RING_BYTES), SPK_E_ARG);
    CHECK_EQUAL(spk_link_connect(alice.card, 0, bob.card, 1, RING_BYTES), SPK_E_ARG);
    CHECK_EQUAL(spk_link_connect(alice.card, 0, bob.card, SPK_CARDS_MAX, RING_BYTES), SPK_E_ARG);
    CHECK_EQUAL(spk_link_connect(alice.card, 2, bob.card, 3, 8), SPK_E_ARG);
    CHECK_EQUAL(spk_link_connect(alice.card, 2, bob.card, 3, RING_BYTES + 4), SPK_E_ARG);
}

/* Two transfers to one peer in one exchange, both larger than the ring, keep their order. */
static void transfers_to_one_peer_keep_their_order(void)
{
    enum { ROW = 4096, ROWS = 97 }; /* 388 KiB against a ring of 256 KiB */
    struct spk_card *both[2];
    int status;
    uint32_t program[2], big[2], small[2], bad;
    uint64_t fence;
    char why[256];
    uint8_t *data = exact(ROW * ROWS), *back = exact(ROW * ROWS);
    struct step s = new_step(ROWS, 0, 0, 0, 1);
    CASE("order");
    for (int i = 0; i < 2; i++) {
        both[i] = spk_card_create(4 << 20, SPK_ISA_SCALAR, &status);
        CHECK_EQUAL(spk_card_alloc(both[i], ROW * ROWS, &big[i]), SPK_OK);
        CHECK_EQUAL(spk_card_alloc(both[i], 8 * ROWS, &small[i]), SPK_OK);
    }
    CHECK_EQUAL(spk_link_connect(both[0], 0, both[1], 1, RING_BYTES), SPK_OK);
    for (int i = 0; i < 2; i++) {
        struct builder p = new_program(ROWS, 0, POSITIONS_MAX + ROWS);
        append(&p, SPK_OP_EXCHANGE)->arg[0] = 2;
        for (int part = 0; part < 2; part++) {
            struct spk_command *c = append(&p, i ? SPK_OP_LINK_RECV : SPK_OP_LINK_SEND);
            c->ref[i ? 3 : 0] =
                part ? ref_at(small[i], 8, 0) : ref_at(big[i], ROW, 0);
            c->arg[0] = !i, c->arg[1] = part ? 8 : ROW;
        }
        CHECK_EQUAL(load(both[i], &p, &program[i], &bad, why), SPK_OK);
        CHECK_EQUAL(submit(both[i], program[i], &s, &fence), SPK_OK);
    }
    for (size_t i = 0; i < ROW * ROWS; i++)
        data[i] = (uint8_t)(i * 2654435761u >> 13);
    CHECK_EQUAL(spk_card_write(both[0], big[0], 0, data, ROW * ROWS), SPK_OK);
    CHECK_EQUAL(spk_card_write(both[0], small[0], 0, data, 8 * ROWS), SPK_OK);
    CHECK(run_cards(both, 2));
    for (int i = 0; i < 2; i++)
        CHECK_EQUAL(collect(both[i]).status, SPK_OK);
    CHECK_EQUAL(spk_card_read(both[1], big[1], 0, back, ROW * ROWS), SPK_OK);
    CHECK(memcmp(back, data, ROW * ROWS) == 0);
    CHECK_EQUAL(spk_card_read(both[1], small[1], 0, back, 8 * ROWS), SPK_OK);
    CHECK(memcmp(back, data, 8 * ROWS) == 0);
    spk_card_destroy(both[1]); /* either may go first */
    spk_card_destroy(both[0]);
    free(data), free(back);
}

static void planted_faults(void)
{
    struct bench b = bench_create(0, SPK_ISA_SCALAR);
    struct builder p = new_program(TOKENS_MAX, OUTPUTS_MAX, POSITIONS_MAX), whole = bench_program(&b);
    uint32_t program, bad, handle = 0;
    uint64_t fence;
    char why[256];
    struct step s = new_step(1, 0, 0, 0, 1);
    struct spk_completion done;
    CASE("planted faults");
    *append(&p, SPK_OP_ADD) = *find(&whole, SPK_OP_ADD);
    CHECK_EQUAL(load(b.card, &p, &program, &bad, why), SPK_OK);
    spk_card_plant(b.card, SPK_PLANT_HANG);
    CHECK_EQUAL(submit(b.card, program, &s, &fence), SPK_OK);
    for (int i = 0; i < 10; i++)
        CHECK(spk_card_step(b.card) != SPK_STEP_RAN);
    CHECK(!spk_card_completion(b.card, &done));
    spk_card_plant(b.card, SPK_PLANT_DIE);
    CHECK_EQUAL(spk_card_step(b.card), SPK_STEP_IDLE);
    done = collect(b.card);
    CHECK_EQUAL(done.status, SPK_E_LOST);
    CHECK_EQUAL(done.fence, fence);
    CHECK_EQUAL(submit(b.card, program, &s, &fence), SPK_E_LOST);
    CHECK_EQUAL(load(b.card, &p, &program, &bad, why), SPK_E_LOST);
    CHECK_EQUAL(spk_card_alloc(b.card, 64, &handle), SPK_E_LOST);
    CHECK_EQUAL(spk_card_free(b.card, handle), SPK_E_LOST);
    CHECK_EQUAL(spk_card_read(b.card, handle, 0, why, 1), SPK_E_LOST);
    CHECK_EQUAL(spk_card_write(b.card, handle, 0, why, 1), SPK_E_LOST);
    CHECK_EQUAL(spk_card_unload_program(b.card, program), SPK_E_LOST);
    bench_destroy(&b);
}

/* Without a pool: exactly so many commands are done before a fault, and nothing after it. */
static void faults_wait_for_their_command(void)
{
    static const struct {
        int fault, status;
    } faults[] = {{SPK_PLANT_DIE, SPK_E_LOST},
                  {SPK_PLANT_RESET, SPK_E_RESET},
                  {SPK_PLANT_MEMORY, SPK_E_MEMORY}};
    static const uint32_t commands[] = {0, 1, 3, 4, 5, SPK_COMMAND_ANY};
    struct bench b = bench_create(0, SPK_ISA_SCALAR);
    struct builder p = new_program(TOKENS_MAX, OUTPUTS_MAX, POSITIONS_MAX), whole = bench_program(&b);
    const struct spk_command add = *find(&whole, SPK_OP_ADD);
    uint64_t bytes = b.card->buffers[add.ref[0].buffer].bytes;
    uint64_t more = b.card->buffers[add.ref[1].buffer].bytes;
    for (int i = 0; i < 4; i++)
        *append(&p, SPK_OP_ADD) = add;
    for (size_t f = 0; f < sizeof faults / sizeof *faults; f++)
        for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
            uint32_t program, bad, buffer[2], expected = commands[i] < 4 ? commands[i] : 4;
            uint64_t fence;
            char why[256];
            struct step s = new_step(1, 0, 0, 0, 1);
            CASE("fault %d at command %u", faults[f].fault, commands[i]);
            UNPOISON(b.card->ddr, DDR_BYTES);
            CHECK_EQUAL(spk_card_reopen(b.card), SPK_OK);
            CHECK_EQUAL(spk_card_alloc(b.card, bytes, &buffer[0]), SPK_OK);
            CHECK_EQUAL(spk_card_alloc(b.card, more, &buffer[1]), SPK_OK);
            for (int c = 0; c < 4; c++)
                for (int ref = 0; ref < 2; ref++)
                    p.commands[c].ref[ref].buffer = buffer[ref];
            CHECK_EQUAL(load(b.card, &p, &program, &bad, why), SPK_OK);
            spk_card_plant_at(b.card, faults[f].fault, commands[i]);
            CHECK_EQUAL(spk_card_step(b.card), SPK_STEP_IDLE);
            CHECK_EQUAL(spk_card_lost(b.card), SPK_OK);
            CHECK_EQUAL(submit(b.card, program, &s, &fence), SPK_OK);
            CHECK_EQUAL(spk_card_step(b.card), SPK_STEP_RAN);
            CHECK_EQUAL(spk_card_step(b.card), SPK_STEP_IDLE);
            struct spk_completion done = collect(b.card);
            CHECK_EQUAL(done.status, faults[f].status);
            CHECK_EQUAL(done.fence, fence);
            CHECK_EQUAL(done.command, commands[i] == SPK_COMMAND_ANY ? 0 : expected);
            spk_card_plant(b.card, SPK_PLANT_HANG);
            CHECK_EQUAL(spk_card_lost(b.card), faults[f].status);
            CHECK_EQUAL(submit(b.card, program, &s, &fence), faults[f].status);
        }
    CHECK_EQUAL(spk_card_reopen(b.card), SPK_OK);
    bench_destroy(&b);
}

static void a_card_may_be_destroyed_with_work_queued(void)
{
    struct bench one = bench_create(0, SPK_ISA_SCALAR), two = bench_create(1, SPK_ISA_SCALAR);
    CASE("destroyed with work");
    CHECK_EQUAL(spk_link_connect(one.card, 0, two.card, 1, RING_BYTES), SPK_OK);
    struct builder p = bench_program(&one);
    struct step s = new_step(3, 1, 0, 0, 1);
    struct spk_read reads[] = {{.buffer = one.buffer[X], .nbytes = 16}};
    uint32_t program, bad;
    uint64_t fence;
    char why[256];
    CHECK_EQUAL(load(one.card, &p, &program, &bad, why), SPK_OK);
    for (int i = 0; i < 2; i++)
        CHECK_EQUAL(submit_reading(one.card, program, &s, step_bytes(&s), reads, 1, &fence, why),
                    SPK_OK);
    CHECK(!run_cards(&one.card, 1));
    bench_destroy(&one);
    /* The other's link leads nowhere now: it gets what was sent, then waits, and can be aborted. */
    p = bench_program(&two);
    p.header.commands = (uint32_t)(find(&p, SPK_OP_SWIGLU) - p.commands);
    CHECK_EQUAL(load(two.card, &p, &program, &bad, why), SPK_OK);
    CHECK_EQUAL(submit(two.card, program, &s, &fence), SPK_OK);
    CHECK_EQUAL(submit(two.card, program, &s, &fence), SPK_OK);
    CHECK(!run_cards(&two.card, 1));
    CHECK_EQUAL(completion_of(&two).status, SPK_OK);
    CHECK_EQUAL(spk_card_abort(two.card, two.card->epoch + 1), SPK_OK);
    CHECK(run_cards(&two.card, 1));
    CHECK_EQUAL(completion_of(&two).status, SPK_E_ABORTED);
    bench_destroy(&two);
}

/* The same program and inputs on every instruction set: the same bytes in every buffer. */
static void every_isa_leaves_the_same_bytes(void)
{
    uint8_t *expected[BUFFERS] = {0};
    for (int isa = 0; isa < SPK_ISA_COUNT; isa++) {
        if (!spk_kernels_get(isa))
            continue;
        struct bench pair[2] = {bench_create(0, isa), bench_create(1, SPK_ISA_SCALAR)};
        struct spk_card *both[] = {pair[0].card, pair[1].card};
        CASE("isa %d", isa);
        CHECK_EQUAL(spk_link_connect(both[0], 0, both[1], 1, RING_BYTES), SPK_OK);
        for (int i = 0; i < 2; i++) {
            struct builder p = bench_program(&pair[i]);
            uint32_t program, bad;
            uint64_t fence;
            char why[256];
            CHECK_EQUAL(load(both[i], &p, &program, &bad, why), SPK_OK);
            for (uint32_t first = 0; first < 25; first += TOKENS_MAX) {
                struct step s = new_step(TOKENS_MAX, OUTPUTS_MAX, first, 2, 3);
                CHECK_EQUAL(submit(both[i], program, &s, &fence), SPK_OK);
            }
        }
        CHECK(run_cards(both, 2));
        for (int i = 0; i < 5; i++)
            CHECK_EQUAL(collect(both[0]).status, SPK_OK);
        for (int i = 0; i < BUFFERS; i++) {
            uint8_t *data = exact(pair[0].bytes[i]);
            CHECK_EQUAL(spk_card_read(both[0], pair[0].buffer[i], 0, data, pair[0].bytes[i]),
                        SPK_OK);
            if (!expected[i]) {
                expected[i] = data;
                continue;
            }
            CASE("isa %d, buffer %d", isa, i);
            CHECK(memcmp(data, expected[i], pair[0].bytes[i]) == 0);
            free(data);
        }
        bench_destroy(&pair[0]), bench_destroy(&pair[1]);
    }
    for (int i = 0; i < BUFFERS; i++)
        free(expected[i]);
}

int main(void)
{
    spk_fp_enter();
    creation_refuses_nonsense();
    memory_is_bounded();
    lent_memory_stands_for_a_buffer();
    freed_memory_is_zero_and_its_neighbours_keep_theirs();
    random_allocations_never_overlap();

    alice = bench_create(0, SPK_ISA_SCALAR), bob = bench_create(1, SPK_ISA_SCALAR);
    CHECK_EQUAL(spk_link_connect(alice.card, 0, bob.card, 1, RING_BYTES), SPK_OK);
    links_refuse_nonsense();
    refuses_broken_headers();
    refuses_every_operand_out_of_bounds();
    ignores_operands_that_an_operation_does_not_take();
    refuses_arguments_that_make_no_sense();
    refuses_sizes_that_overflow();
    refuses_rows_of_the_wrong_kind();
    refuses_broken_steps();
    buffers_of_a_program_cannot_be_freed();
    steps_complete_in_order();
    a_fault_names_its_command();
    only_the_rows_of_the_step_are_written();
    reads_come_with_their_own_step();
    refuses_reads_that_do_not_fit();
    a_step_begins_with_what_the_step_before_chose();
    a_chosen_id_that_is_no_token_is_a_fault();
    a_trace_tells_every_command_in_order();
    a_trace_that_nobody_reads_loses_the_newest();
    a_trace_ends_where_a_step_does();
    aborts_end_waiting_steps_and_leave_nothing_behind();
    a_step_never_starts_in_an_epoch_before_its_own();
    a_corrupt_message_is_a_link_fault();
    bench_destroy(&alice), bench_destroy(&bob);

    refuses_results_that_are_too_large();
    a_buffer_that_a_step_will_read_cannot_be_freed();
    the_best_of_all_lists_is_chosen();
    transfers_to_one_peer_keep_their_order();
    planted_faults();
    faults_wait_for_their_command();
    a_card_may_be_destroyed_with_work_queued();
    every_isa_leaves_the_same_bytes();
    puts("ok card");
    return 0;
}
