/* SPDX-License-Identifier: Apache-2.0 */
/* The pages behind a card's DDR: whatever the system has of them, and whoever makes huge ones of
 * small ones meanwhile, the bytes are those that were written, and zeros where nothing was.  Runs
 * under ThreadSanitizer too. */
#include <pthread.h>

#include "card_test.h"

enum { MIB = 1 << 20, BYTES = 24 * MIB, NOISE_BYTES = 8 * MIB, ROUNDS = 6 };

/* What is written; different buffers get it from different places on. */
static uint8_t *noise;

static struct spk_card *new_card(void)
{
    int status;
    struct spk_card *c = spk_card_create(BYTES, SPK_ISA_SCALAR, &status);
    CHECK_EQUAL(status, SPK_OK);
    return c;
}

/* As if the system had let the card wait for huge pages too long, or not at all. */
static void has_waited(struct spk_card *c, bool too_long)
{
    atomic_store(&c->pages_waited_ns, too_long ? (int64_t)1 << 60 : 0);
}

static void write_bytes(struct spk_card *c, uint32_t handle, uint64_t offset, const uint8_t *data,
                        uint64_t nbytes, bool in_place)
{
    if (!in_place) {
        CHECK_EQUAL(spk_card_write(c, handle, offset, data, nbytes), SPK_OK);
        return;
    }
    void *at;
    CHECK_EQUAL(spk_card_place(c, handle, offset, nbytes, &at), SPK_OK);
    memcpy(at, data, nbytes);
}

static uint32_t alloc(struct spk_card *c, uint64_t nbytes)
{
    uint32_t handle;
    CHECK_EQUAL(spk_card_alloc(c, nbytes, &handle), SPK_OK);
    return handle;
}

/* Whether a buffer holds these bytes, or zeros where `expected` is NULL. */
static bool holds(struct spk_card *c, uint32_t handle, const uint8_t *expected, uint64_t nbytes)
{
    uint8_t *data = exact(nbytes);
    CHECK_EQUAL(spk_card_read(c, handle, 0, data, nbytes), SPK_OK);
    bool same = expected ? memcmp(data, expected, nbytes) == 0
                         : !data[0] && memcmp(data, data + 1, nbytes - 1) == 0;
    free(data);
    return same;
}

/* --- which pages are left to collapse ------------------------------------------------------- */

static void only_large_writes_ask_for_huge_pages(void)
{
    struct spk_card *c = new_card();
    uint32_t buffer = alloc(c, 8 * MIB);
    has_waited(c, true);
    CASE("small writes");
    for (uint64_t at = 0; at < 8 * MIB; at += 65535)
        write_bytes(c, buffer, at, noise, 8 * MIB - at < 65535 ? 8 * MIB - at : 65535, false);
    CHECK_EQUAL(c->to_collapse, 0);
    CASE("large writes");
    write_bytes(c, buffer, 2 * MIB - 1, noise, 65536, false);
    CHECK_EQUAL(c->to_collapse, 2); /* both that it touches */
    write_bytes(c, buffer, 0, noise, 2 * MIB, true);
    CHECK_EQUAL(c->to_collapse, 2);
    write_bytes(c, buffer, 0, noise, 8 * MIB, true);
    CHECK_EQUAL(c->to_collapse, 4);
    for (int i = 0; i < 4; i++)
        CHECK(pages_collapse_one(c));
    CHECK(!pages_collapse_one(c));
    CHECK_EQUAL(c->to_collapse, 0);
    CHECK(holds(c, buffer, noise, 8 * MIB));
    /* They stay it. */
    write_bytes(c, buffer, 0, noise, 8 * MIB, false);
    CHECK_EQUAL(c->to_collapse, 0);
    spk_card_destroy(c);
}

static void a_patient_card_takes_huge_pages_at_once(void)
{
    struct spk_card *c = new_card();
    uint32_t buffer = alloc(c, BYTES);
    CASE("huge pages at once");
    for (uint64_t at = 0; at < BYTES; at += 2 * MIB) {
        has_waited(c, false);
        write_bytes(c, buffer, at, noise + at % NOISE_BYTES, 2 * MIB, at % (4 * MIB));
    }
    CHECK_EQUAL(c->to_collapse, 0);
    for (uint64_t at = 0; at < BYTES; at += NOISE_BYTES) {
        uint8_t *data = exact(NOISE_BYTES);
        CHECK_EQUAL(spk_card_read(c, buffer, at, data, NOISE_BYTES), SPK_OK);
        CHECK(memcmp(data, noise, NOISE_BYTES) == 0);
        free(data);
    }
    /* What comes when the patience has ended. */
    CHECK_EQUAL(spk_card_free(c, buffer), SPK_OK);
    has_waited(c, true);
    buffer = alloc(c, 4 * MIB);
    write_bytes(c, buffer, 0, noise, 4 * MIB, false);
    CHECK_EQUAL(c->to_collapse, 2);
    spk_card_destroy(c);
}

static void neighbours_keep_what_the_engine_has_written(void)
{
    for (int small = 0; small < 2; small++) {
        struct spk_card *c = new_card();
        uint32_t first = alloc(c, MIB), middle = alloc(c, 2 * MIB), last = alloc(c, MIB);
        CASE("neighbours, small %d", small);
        has_waited(c, small);
        memcpy(c->ddr, noise, MIB); /* as the engine does: nobody is told */
        memcpy(c->ddr + 3 * MIB, noise + 1, MIB);
        write_bytes(c, middle, 0, noise + 2, 2 * MIB, false);
        CHECK(holds(c, first, noise, MIB));
        CHECK(holds(c, middle, noise + 2, 2 * MIB));
        CHECK(holds(c, last, noise + 1, MIB));
        spk_card_destroy(c);
    }
}

static void freed_pages_are_not_collapsed(void)
{
    struct spk_card *c = new_card();
    uint32_t first = alloc(c, MIB), middle = alloc(c, 4 * MIB), last = alloc(c, MIB);
    CASE("freed, small");
    has_waited(c, true);
    write_bytes(c, first, 0, noise, MIB, false);
    write_bytes(c, middle, 0, noise, 4 * MIB, false);
    CHECK_EQUAL(c->to_collapse, 3);
    CHECK_EQUAL(spk_card_free(c, middle), SPK_OK);
    CHECK_EQUAL(c->to_collapse, 2); /* neighbours have a part in the others */
    CHECK_EQUAL(spk_card_free(c, first), SPK_OK);
    while (pages_collapse_one(c))
        ;
    CHECK_EQUAL(c->to_collapse, 0);
    middle = alloc(c, 5 * MIB);
    CHECK(holds(c, middle, NULL, 5 * MIB));
    CHECK_EQUAL(spk_card_free(c, middle), SPK_OK);

    CASE("freed, huge");
    middle = alloc(c, 5 * MIB); /* pages 0 and 1, and a half that `last` shares */
    for (uint64_t at = 0; at < 5 * MIB; at += MIB) {
        has_waited(c, false);
        write_bytes(c, middle, at, noise, MIB, true);
    }
    while (pages_collapse_one(c))
        ;
    write_bytes(c, last, 0, noise, MIB, false);
    CHECK_EQUAL(c->to_collapse, 0);
    CHECK_EQUAL(spk_card_free(c, middle), SPK_OK);
    CHECK(holds(c, last, noise, MIB));
    /* The half that went back has torn the third page, which becomes a huge one anew. */
    write_bytes(c, last, 0, noise + 1, MIB, false);
    CHECK_EQUAL(c->to_collapse, 1);
    CHECK(pages_collapse_one(c));
    CHECK(holds(c, last, noise + 1, MIB));
    middle = alloc(c, 5 * MIB);
    CHECK(holds(c, middle, NULL, 5 * MIB));
    spk_card_destroy(c);
}

/* --- side by side ---------------------------------------------------------------------------- */

/* One of the writes that together fill some buffers, each byte once. */
struct piece {
    uint32_t buffer; /* its number below */
    uint64_t offset, nbytes;
};

static const uint64_t sizes[] = {100, 3 * MIB + 4, 2 * MIB, 64, 5 * MIB + 12345, 70000, MIB + 1, 1};
enum { BUFFERS_HERE = sizeof sizes / sizeof *sizes, PIECES_MAX = 4096 };

struct writers {
    struct spk_card *card;
    uint32_t handle[BUFFERS_HERE], shift[BUFFERS_HERE];
    struct piece pieces[PIECES_MAX];
    uint32_t count;
};

struct writer {
    struct writers *all;
    uint32_t number, of;
};

/* All bytes of all buffers in pieces of any size, in any order. */
static void cut(struct writers *w, struct rng *r)
{
    static const uint32_t most[] = {100, 4096, 65535, 65536, 65537, 300000, 3 * MIB};
    w->count = 0;
    for (uint32_t b = 0; b < BUFFERS_HERE; b++) {
        w->shift[b] = rng_below(r, 2 * MIB);
        for (uint64_t at = 0; at < sizes[b];) {
            uint32_t limit = most[rng_below(r, sizeof most / sizeof *most)];
            uint64_t n = rng_below(r, 2) ? limit : 1 + rng_below(r, limit);
            n = n < sizes[b] - at ? n : sizes[b] - at;
            CHECK(w->count < PIECES_MAX);
            w->pieces[w->count++] = (struct piece){.buffer = b, .offset = at, .nbytes = n};
            at += n;
        }
    }
    for (uint32_t i = w->count; i > 1; i--) {
        uint32_t j = rng_below(r, i);
        struct piece kept = w->pieces[i - 1];
        w->pieces[i - 1] = w->pieces[j];
        w->pieces[j] = kept;
    }
}

static void *write_share(void *argument)
{
    struct writer *me = argument;
    struct writers *w = me->all;
    for (uint32_t i = me->number; i < w->count; i += me->of) {
        const struct piece *p = &w->pieces[i];
        write_bytes(w->card, w->handle[p->buffer], p->offset,
                    noise + w->shift[p->buffer] + p->offset, p->nbytes, i % 3 == 0);
    }
    return NULL;
}

static void write_side_by_side(struct writers *w)
{
    struct writer each[2] = {{w, 0, 2}, {w, 1, 2}};
    pthread_t other;
    CHECK(pthread_create(&other, NULL, write_share, &each[1]) == 0);
    write_share(&each[0]);
    pthread_join(other, NULL);
}

/* A settler that never waits for the writing to end. */
static _Atomic int settling;

static void *settle_always(void *argument)
{
    while (settling)
        if (!pages_collapse_one(argument))
            sleep_ns(10000);
    return NULL;
}

static void bytes_arrive_however_and_beside_whom_they_are_written(bool with_settler)
{
    enum { SEED = 41 };
    struct rng r = {.state = SEED};
    struct writers *w = exact(sizeof *w);
    pthread_t settler;
    w->card = new_card();
    for (uint32_t b = 0; b < BUFFERS_HERE; b++)
        w->handle[b] = alloc(w->card, sizes[b]);
    settling = with_settler;
    if (with_settler)
        CHECK(pthread_create(&settler, NULL, settle_always, w->card) == 0);
    for (int round = 0; round < ROUNDS; round++) {
        CASE("side by side, settler %d, round %d, seed %d", with_settler, round, SEED);
        if (round % 3 < 2)
            has_waited(w->card, round % 3 == 0); /* else as the rounds before have left it */
        cut(w, &r);
        write_side_by_side(w);
        for (uint32_t b = 0; b < BUFFERS_HERE; b++)
            CHECK(holds(w->card, w->handle[b], noise + w->shift[b], sizes[b]));
        /* Some go, also while they are settled, and the next owner finds zeros. */
        for (uint32_t b = rng_below(&r, 2); b < BUFFERS_HERE; b += 1 + rng_below(&r, 3)) {
            CHECK_EQUAL(spk_card_free(w->card, w->handle[b]), SPK_OK);
            w->handle[b] = alloc(w->card, sizes[b]);
            CHECK(holds(w->card, w->handle[b], NULL, sizes[b]));
        }
    }
    settling = 0;
    if (with_settler)
        pthread_join(settler, NULL);
    while (pages_collapse_one(w->card))
        ;
    CHECK_EQUAL(w->card->to_collapse, 0); /* none was counted twice, or lost */
    spk_card_destroy(w->card);
    free(w);
}

/* --- the pool's settler ---------------------------------------------------------------------- */

static struct spk_pool *new_pool(struct spk_card **cards, size_t count)
{
    int status;
    struct spk_pool *pool = spk_pool_create(cards, count, 1, &status);
    CHECK(pool && status == SPK_OK);
    return pool;
}

static void the_pool_settles_while_steps_run(void)
{
    enum { FLOATS = 1000, CARDS = 2 };
    struct spk_card *cards[CARDS];
    uint32_t weights[CARDS], x[CARDS], ones[CARDS], program[CARDS], bad;
    float *data = exact(FLOATS * sizeof *data);
    char why[256];
    for (int i = 0; i < CARDS; i++) {
        cards[i] = new_card();
        has_waited(cards[i], true);
        /* What the steps read and write lies among the pages that are collapsed. */
        weights[i] = alloc(cards[i], 7 * MIB);
        x[i] = alloc(cards[i], FLOATS * 4);
        ones[i] = alloc(cards[i], FLOATS * 4);
        struct builder p = new_program(1, 0, 1);
        struct spk_command *c = append(&p, SPK_OP_ADD);
        c->ref[0] = ref_at(x[i], FLOATS * 4, 0);
        c->ref[1] = ref_at(ones[i], FLOATS * 4, 0);
        c->arg[0] = FLOATS;
        CHECK_EQUAL(load(cards[i], &p, &program[i], &bad, why), SPK_OK);
    }
    struct step step = new_step(1, 0, 0, 0, 0);
    for (uint32_t i = 0; i < CARDS; i++) {
        for (int k = 0; k < FLOATS; k++)
            data[k] = 1.0f;
        CHECK_EQUAL(spk_card_write(cards[i], ones[i], 0, data, FLOATS * 4), SPK_OK);
        write_bytes(cards[i], weights[i], 0, noise + i, 7 * MIB, true);
        CASE("before there is a pool");
        CHECK_EQUAL(cards[i]->to_collapse, 4);
    }
    struct spk_pool *pool = new_pool(cards, CARDS);
    uint32_t steps = 0;
    while (cards[0]->to_collapse || cards[1]->to_collapse || steps < 10) {
        CASE("steps while the pool settles, %u", steps);
        for (int i = 0; i < CARDS; i++) {
            uint64_t fence;
            CHECK_EQUAL(submit(cards[i], program[i], &step, &fence), SPK_OK);
        }
        for (int i = 0; i < CARDS; i++)
            CHECK_EQUAL(wait_for(cards[i]).status, SPK_OK);
        CHECK(++steps < 1000000);
    }
    for (uint32_t i = 0; i < CARDS; i++) {
        CHECK_EQUAL(spk_card_read(cards[i], x[i], 0, data, FLOATS * 4), SPK_OK);
        for (int k = 0; k < FLOATS; k++)
            CHECK(data[k] == (float)steps);
        CHECK(holds(cards[i], weights[i], noise + i, 7 * MIB));
    }
    /* More is written when it sleeps again. */
    CASE("settled a second time");
    uint32_t more = alloc(cards[1], 4 * MIB);
    write_bytes(cards[1], more, 0, noise, 4 * MIB, false);
    for (int i = 0; cards[1]->to_collapse; i++) {
        CHECK(i < 10000);
        sleep_ns(1000000);
    }
    CHECK(holds(cards[1], more, noise, 4 * MIB));
    spk_pool_destroy(pool);
    for (int i = 0; i < CARDS; i++)
        spk_card_destroy(cards[i]);
    free(data);
}

static uint64_t monotonic_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* However long the pool would wait before it settles, its end does not wait for that. */
static void a_pool_ends_at_once_with_pages_left_to_collapse(void)
{
    uint64_t shortest_ns = UINT64_MAX;
    for (int round = 0; round < 8; round++) {
        struct spk_card *c = new_card();
        uint32_t buffer = alloc(c, NOISE_BYTES);
        CASE("the end of a pool, round %d", round);
        has_waited(c, true);
        write_bytes(c, buffer, 0, noise, NOISE_BYTES, true);
        CHECK_EQUAL(c->to_collapse, NOISE_BYTES / (2 * MIB));
        /* At once, while it waits, and while it settles. */
        if (round < 4)
            atomic_fetch_add(&c->last_write_ns, 500000000u);
        struct spk_pool *pool = new_pool(&c, 1);
        sleep_ns(round < 4 ? (uint64_t)round * 20000000u : 245000000u + (uint64_t)round * 1000000u);
        uint64_t begin = monotonic_ns();
        spk_pool_destroy(pool);
        uint64_t took = monotonic_ns() - begin;
        if (round < 4)
            shortest_ns = took < shortest_ns ? took : shortest_ns;
        CHECK(took < 5000000000u);
        CHECK(holds(c, buffer, noise, NOISE_BYTES));
        spk_card_destroy(c);
    }
    CHECK(shortest_ns < 100000000u);
}

int main(void)
{
    struct rng r = {.state = 5};
    noise = exact(NOISE_BYTES + 2 * MIB);
    for (size_t i = 0; i < NOISE_BYTES + 2 * MIB; i += 8) {
        uint64_t x = rng_next(&r);
        memcpy(noise + i, &x, 8);
    }
    only_large_writes_ask_for_huge_pages();
    a_patient_card_takes_huge_pages_at_once();
    neighbours_keep_what_the_engine_has_written();
    freed_pages_are_not_collapsed();
    bytes_arrive_however_and_beside_whom_they_are_written(false);
    bytes_arrive_however_and_beside_whom_they_are_written(true);
    the_pool_settles_while_steps_run();
    a_pool_ends_at_once_with_pages_left_to_collapse();
    free(noise);
    puts("ok threads_pages");
    return 0;
}
