/* SPDX-License-Identifier: Apache-2.0 */
/* Programs and steps for the native tests of the card.
 *
 * `struct bench` is a card with a small program that uses every operation: a token's embedding,
 * norm, Q8, attention over a paged cache, SwiGLU, exchanges with a peer, logits, candidates and the
 * choice among the best of both cards.
 * Its buffers are exactly as large as the program needs, and under AddressSanitizer everything
 * else in the card's DDR is poisoned: whatever the engine touches beyond them is reported. */
#ifndef CARD_TEST_H
#define CARD_TEST_H

#include <time.h>

#include "card_internal.h"
#include "native_test.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#define UNPOISON(p, n) ASAN_UNPOISON_MEMORY_REGION(p, n)
#else
#define POISON(p, n) ((void)(p), (void)(n))
#define UNPOISON(p, n) ((void)(p), (void)(n))
#endif

#define COMMANDS_MAX 64
#define DDR_BYTES (1u << 20)
#define RING_BYTES (4u << 16)

struct builder {
    struct spk_program_header header;
    struct spk_command commands[COMMANDS_MAX];
};

static inline struct spk_ref ref_at(uint32_t buffer, uint32_t stride, uint64_t offset)
{
    return (struct spk_ref){.buffer = buffer, .stride = stride, .offset = offset};
}

/* Appends a command; its operands and arguments are set through the pointer. */
static inline struct spk_command *append(struct builder *b, int op)
{
    CHECK(b->header.commands < COMMANDS_MAX);
    struct spk_command *c = &b->commands[b->header.commands++];
    *c = (struct spk_command){.op = (uint16_t)op};
    return c;
}

static inline struct builder new_program(uint32_t tokens, uint32_t outputs, uint32_t positions)
{
    return (struct builder){.header = {.magic = SPK_PROGRAM_MAGIC,
                                       .version = SPK_PROGRAM_VERSION,
                                       .tokens_max = tokens,
                                       .outputs_max = outputs,
                                       .positions_max = positions}};
}

/* Loads from a heap copy of exactly `nbytes`, so that a read beyond them is seen. */
static inline int load_bytes(struct spk_card *c, const void *bytes, size_t nbytes,
                             uint32_t *handle, uint32_t *bad, char *why)
{
    uint8_t *copy = exact(nbytes);
    if (nbytes)
        memcpy(copy, bytes, nbytes);
    memset(why, 0, 256);
    int status = spk_card_load_program(c, copy, nbytes, handle, bad, why);
    free(copy);
    CHECK((status == SPK_OK) == (why[0] == 0));
    return status;
}

static inline int load(struct spk_card *c, const struct builder *b, uint32_t *handle,
                       uint32_t *bad, char *why)
{
    size_t n = b->header.commands < COMMANDS_MAX ? b->header.commands : COMMANDS_MAX;
    return load_bytes(c, b, sizeof b->header + n * sizeof *b->commands, handle, bad, why);
}

/* --- steps ---------------------------------------------------------------------------------- */

#define STEP_WORDS_MAX 512

struct step {
    struct spk_step_header header;
    uint32_t words[STEP_WORDS_MAX];
};

static inline size_t step_bytes(const struct step *s)
{
    const struct spk_step_header *h = &s->header;
    return sizeof *h + 4 * (3 * h->tokens + 2 * h->outputs + h->sequences + 1 + h->pages);
}

/* `tokens` tokens of one sequence from position `first`, its pages being `page` and those after
 * it; the last `outputs` tokens are outputs. */
static inline struct step new_step(uint32_t tokens, uint32_t outputs, uint32_t first,
                                   uint32_t page, uint32_t pages)
{
    struct step s = {.header = {.magic = SPK_STEP_MAGIC,
                                .version = SPK_STEP_VERSION,
                                .tokens = tokens,
                                .outputs = outputs,
                                .sequences = tokens ? 1 : 0,
                                .pages = tokens ? pages : 0}};
    uint32_t *w = s.words;
    CHECK(step_bytes(&s) <= sizeof s);
    for (uint32_t t = 0; t < tokens; t++)
        *w++ = (7 * t + 3) % 40;
    for (uint32_t t = 0; t < tokens; t++)
        *w++ = first + t;
    for (uint32_t t = 0; t < tokens; t++)
        *w++ = 0;
    for (uint32_t i = 0; i < outputs; i++)
        *w++ = tokens - outputs + i;
    for (uint32_t i = 0; i < outputs; i++)
        *w++ = 0x3f800000u; /* 1.0f */
    *w++ = 0;
    if (tokens)
        *w++ = pages;
    for (uint32_t i = 0; tokens && i < pages; i++)
        *w++ = page + i;
    return s;
}

/* Submits heap copies of exactly these bytes and reads. */
static inline int submit_reading(struct spk_card *c, uint32_t program, const void *bytes,
                                 size_t nbytes, const struct spk_read *reads, size_t count,
                                 uint64_t *fence, char *why)
{
    uint8_t *copy = exact(nbytes);
    struct spk_read *wanted = count ? exact(count * sizeof *reads) : NULL;
    if (nbytes)
        memcpy(copy, bytes, nbytes);
    if (count)
        memcpy(wanted, reads, count * sizeof *reads);
    memset(why, 0, 256);
    int status = spk_card_submit(c, program, copy, nbytes, wanted, count, fence, why);
    free(copy), free(wanted);
    CHECK((status == SPK_OK) == (why[0] == 0));
    return status;
}

static inline int submit_bytes(struct spk_card *c, uint32_t program, const void *bytes,
                               size_t nbytes, uint64_t *fence, char *why)
{
    return submit_reading(c, program, bytes, nbytes, NULL, 0, fence, why);
}

static inline int submit(struct spk_card *c, uint32_t program, const struct step *s,
                         uint64_t *fence)
{
    char why[256];
    return submit_bytes(c, program, s, step_bytes(s), fence, why);
}

/* --- cards that a pool steps ----------------------------------------------------------------- */

static inline void sleep_ns(uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    nanosleep(&t, NULL);
}

/* Waits for one completion of a card. */
static inline struct spk_completion wait_for(struct spk_card *c)
{
    struct spk_completion done;
    for (int i = 0; i < 200000; i++) {
        if (spk_card_completion(c, &done))
            return done;
        sleep_ns(50000);
    }
    struct spk_counters counters;
    spk_card_counters(c, &counters);
    fprintf(stderr, "hangs at command %u, waiting for %d, epoch %u\n  case: %s\n",
            counters.command, counters.waiting_for, counters.epoch, test_case);
    exit(1);
}

/* --- a card with a program of every operation ----------------------------------------------- */

enum {
    TOKENS_MAX = 5,
    OUTPUTS_MAX = 3,
    POSITIONS_MAX = 64,
    VOCABULARY = 40,
    WIDTH = 32,
    HEAD_DIM = 16,
    PAGES = 6,
    CANDIDATES = 4,
};

enum bench_buffer {
    EMBEDDING,
    X,
    NORM,
    HIDDEN,
    ACTIVATIONS,
    WEIGHTS,
    QKV,
    TABLE,
    CACHE,
    ATTENDED,
    RECEIVED,
    HEAD,
    SELECTED,
    LOGITS,
    STATS,
    CANDIDATE,
    PAIRS,
    CHOSEN,
    BUFFERS
};

struct bench {
    struct spk_card *card;
    uint32_t number;
    uint32_t buffer[BUFFERS];
    uint64_t bytes[BUFFERS];
};

/* Leaves only the buffers' own bytes readable and writable. */
static inline void bench_poison(struct bench *b)
{
    POISON(b->card->ddr, b->card->ddr_bytes);
    for (int i = 0; i < BUFFERS; i++)
        UNPOISON(b->card->ddr + b->card->buffers[b->buffer[i]].offset, b->bytes[i]);
}

static inline void bench_fill(struct bench *b, enum bench_buffer which, struct rng *r, int format)
{
    uint8_t *data = exact(b->bytes[which]);
    for (uint64_t i = 0; i + 4 <= b->bytes[which]; i += 4) {
        float x = rng_float(r);
        memcpy(data + i, &x, 4);
    }
    if (format != SPK_F32)
        for (uint64_t i = 0; i < b->bytes[which]; i++)
            data[i] = (uint8_t)rng_below(r, 0x3c); /* every f16 in it is below 1 */
    CHECK_EQUAL(spk_card_write(b->card, b->buffer[which], 0, data, b->bytes[which]), SPK_OK);
    free(data);
}

static inline struct bench bench_create(uint32_t number, int isa)
{
    struct bench b = {.number = number};
    struct rng r = {.state = 99};
    int status;
    b.card = spk_card_create(DDR_BYTES, isa, &status);
    CHECK_EQUAL(status, SPK_OK);
    b.bytes[EMBEDDING] = VOCABULARY * 34;
    b.bytes[X] = b.bytes[HIDDEN] = b.bytes[ATTENDED] = b.bytes[RECEIVED] = TOKENS_MAX * WIDTH * 4;
    b.bytes[NORM] = WIDTH * 4;
    b.bytes[ACTIVATIONS] = TOKENS_MAX * 34;
    b.bytes[WEIGHTS] = spk_packed_bytes(SPK_Q4_0, 2 * WIDTH, WIDTH);
    b.bytes[QKV] = TOKENS_MAX * 2 * WIDTH * 4;
    b.bytes[TABLE] = POSITIONS_MAX * HEAD_DIM * 4;
    b.bytes[CACHE] = PAGES * 2 * 16 * HEAD_DIM * 2;
    b.bytes[HEAD] = spk_packed_bytes(SPK_F16, VOCABULARY, WIDTH);
    b.bytes[SELECTED] = OUTPUTS_MAX * WIDTH * 4;
    b.bytes[LOGITS] = OUTPUTS_MAX * VOCABULARY * 4;
    b.bytes[STATS] = OUTPUTS_MAX * 8;
    b.bytes[CANDIDATE] = OUTPUTS_MAX * CANDIDATES * 8;
    b.bytes[PAIRS] = OUTPUTS_MAX * 2 * 8;
    b.bytes[CHOSEN] = OUTPUTS_MAX * 4;
    uint32_t gap[BUFFERS]; /* what lies between two buffers belongs to neither */
    for (int i = 0; i < BUFFERS; i++) {
        CHECK_EQUAL(spk_card_alloc(b.card, b.bytes[i], &b.buffer[i]), SPK_OK);
        CHECK_EQUAL(spk_card_alloc(b.card, 64, &gap[i]), SPK_OK);
    }
    for (int i = 0; i < BUFFERS; i++)
        CHECK_EQUAL(spk_card_free(b.card, gap[i]), SPK_OK);
    bench_fill(&b, EMBEDDING, &r, SPK_Q8_0);
    bench_fill(&b, NORM, &r, SPK_F32);
    bench_fill(&b, WEIGHTS, &r, SPK_Q4_0);
    bench_fill(&b, TABLE, &r, SPK_F32);
    bench_fill(&b, HEAD, &r, SPK_F16);
    bench_poison(&b);
    return b;
}

static inline void bench_destroy(struct bench *b)
{
    UNPOISON(b->card->ddr, b->card->ddr_bytes);
    spk_card_destroy(b->card);
}

static inline struct spk_ref bench_ref(const struct bench *b, enum bench_buffer which,
                                       uint32_t stride, uint64_t offset)
{
    return ref_at(b->buffer[which], stride, offset);
}

/* Two cards with this program, linked, exchange their attended rows and their best tokens with
 * each other: card 1's vocabulary begins where card 0's ends. */
static inline struct builder bench_program(const struct bench *b)
{
    struct builder p = new_program(TOKENS_MAX, OUTPUTS_MAX, POSITIONS_MAX);
    const uint32_t row = WIDTH * 4, qkv = 2 * WIDTH * 4, one = 0x3f800000u;
    const uint32_t attention[] = {1, HEAD_DIM, 16, PAGES, 2, 0, 2, 0x3e800000u};
    struct spk_command *c;

    c = append(&p, SPK_OP_EMBED);
    c->format = SPK_Q8_0;
    c->ref[0] = bench_ref(b, EMBEDDING, 34, 0);
    c->ref[1] = bench_ref(b, CHOSEN, 4, 0);
    c->ref[3] = bench_ref(b, X, row, 0);
    c->arg[0] = WIDTH, c->arg[1] = VOCABULARY;
    c = append(&p, SPK_OP_RMSNORM);
    c->ref[0] = bench_ref(b, X, row, 0);
    c->ref[1] = bench_ref(b, NORM, 0, 0);
    c->ref[3] = bench_ref(b, HIDDEN, row, 0);
    c->arg[0] = WIDTH, c->arg[1] = one;
    c = append(&p, SPK_OP_QUANTIZE);
    c->ref[0] = bench_ref(b, HIDDEN, row, 0);
    c->ref[3] = bench_ref(b, ACTIVATIONS, 34, 0);
    c->arg[0] = WIDTH;
    c = append(&p, SPK_OP_MATMUL);
    c->format = SPK_Q4_0;
    c->ref[0] = bench_ref(b, WEIGHTS, 0, 0);
    c->ref[1] = bench_ref(b, ACTIVATIONS, 34, 0);
    c->ref[3] = bench_ref(b, QKV, qkv, 0);
    c->arg[0] = 2 * WIDTH, c->arg[1] = WIDTH;
    c = append(&p, SPK_OP_ROPE);
    c->ref[0] = bench_ref(b, QKV, qkv, 0);
    c->ref[1] = bench_ref(b, TABLE, 0, 0);
    c->arg[0] = 3, c->arg[1] = HEAD_DIM, c->arg[2] = HEAD_DIM;
    c = append(&p, SPK_OP_KV_APPEND);
    c->ref[0] = bench_ref(b, QKV, qkv, 2 * HEAD_DIM * 4);
    c->ref[1] = bench_ref(b, QKV, qkv, 3 * HEAD_DIM * 4);
    c->ref[3] = bench_ref(b, CACHE, 0, 0);
    memcpy(c->arg, attention, 4 * sizeof *attention);
    c = append(&p, SPK_OP_ATTENTION);
    c->ref[0] = bench_ref(b, QKV, qkv, 0);
    c->ref[1] = bench_ref(b, CACHE, 0, 0);
    c->ref[3] = bench_ref(b, ATTENDED, row, 0);
    memcpy(c->arg, attention, sizeof attention);
    c = append(&p, SPK_OP_EXCHANGE);
    c->arg[0] = 2;
    c = append(&p, SPK_OP_LINK_SEND);
    c->ref[0] = bench_ref(b, ATTENDED, row, 0);
    c->arg[0] = !b->number, c->arg[1] = row;
    c = append(&p, SPK_OP_LINK_RECV);
    c->ref[3] = bench_ref(b, RECEIVED, row, 0);
    c->arg[0] = !b->number, c->arg[1] = row;
    c = append(&p, SPK_OP_SWIGLU);
    c->ref[0] = bench_ref(b, ATTENDED, row, 0);
    c->ref[1] = bench_ref(b, RECEIVED, row, 0);
    c->ref[3] = bench_ref(b, HIDDEN, row, 0);
    c->arg[0] = WIDTH;
    c = append(&p, SPK_OP_ADD);
    c->ref[0] = bench_ref(b, X, row, 0);
    c->ref[1] = bench_ref(b, HIDDEN, row, 0);
    c->arg[0] = WIDTH;
    c = append(&p, SPK_OP_SELECT);
    c->ref[0] = bench_ref(b, X, row, 0);
    c->ref[3] = bench_ref(b, SELECTED, row, 0);
    c->arg[0] = WIDTH;
    c = append(&p, SPK_OP_MATMUL);
    c->format = SPK_F16;
    c->flags = SPK_FLAG_OUTPUTS;
    c->ref[0] = bench_ref(b, HEAD, 0, 0);
    c->ref[1] = bench_ref(b, SELECTED, row, 0);
    c->ref[3] = bench_ref(b, LOGITS, VOCABULARY * 4, 0);
    c->arg[0] = VOCABULARY, c->arg[1] = WIDTH;
    c = append(&p, SPK_OP_LOGIT_STATS);
    c->flags = SPK_FLAG_OUTPUTS;
    c->ref[0] = bench_ref(b, LOGITS, VOCABULARY * 4, 0);
    c->ref[3] = bench_ref(b, STATS, 8, 0);
    c->arg[0] = VOCABULARY;
    c = append(&p, SPK_OP_TOP_K);
    c->flags = SPK_FLAG_OUTPUTS;
    c->ref[0] = bench_ref(b, LOGITS, VOCABULARY * 4, 0);
    c->ref[3] = bench_ref(b, CANDIDATE, CANDIDATES * 8, 0);
    c->arg[0] = VOCABULARY, c->arg[1] = CANDIDATES, c->arg[2] = b->number * VOCABULARY;
    c = append(&p, SPK_OP_BEST);
    c->flags = SPK_FLAG_OUTPUTS;
    c->ref[0] = bench_ref(b, CANDIDATE, CANDIDATES * 8, 0);
    c->ref[3] = bench_ref(b, PAIRS, 2 * 8, b->number * 8);
    c->arg[0] = CANDIDATES;
    c = append(&p, SPK_OP_EXCHANGE);
    c->arg[0] = 2;
    c = append(&p, SPK_OP_LINK_SEND);
    c->flags = SPK_FLAG_OUTPUTS;
    c->ref[0] = bench_ref(b, PAIRS, 2 * 8, b->number * 8);
    c->arg[0] = !b->number, c->arg[1] = 8;
    c = append(&p, SPK_OP_LINK_RECV);
    c->flags = SPK_FLAG_OUTPUTS;
    c->ref[3] = bench_ref(b, PAIRS, 2 * 8, !b->number * 8u);
    c->arg[0] = !b->number, c->arg[1] = 8;
    c = append(&p, SPK_OP_CHOOSE);
    c->flags = SPK_FLAG_OUTPUTS;
    c->ref[0] = bench_ref(b, PAIRS, 2 * 8, 0);
    c->ref[3] = bench_ref(b, CHOSEN, 4, 0);
    c->arg[0] = 2;
    return p;
}

/* Where an operation stands in the bench's program (its first use). */
static inline struct spk_command *find(struct builder *p, int op)
{
    for (uint32_t i = 0; i < p->header.commands; i++)
        if (p->commands[i].op == op)
            return &p->commands[i];
    CHECK(!"operation in the program");
    return NULL;
}

/* Steps the cards in turn until all are idle or wait; says whether all are idle. */
static inline bool run_cards(struct spk_card **cards, int count)
{
    for (;;) {
        bool ran = false, waits = false;
        for (int i = 0; i < count; i++) {
            int result = spk_card_step(cards[i]);
            ran |= result == SPK_STEP_RAN;
            waits |= result == SPK_STEP_WAITING;
        }
        if (!ran)
            return !waits;
    }
}

#endif
