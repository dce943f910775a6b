/* SPDX-License-Identifier: Apache-2.0 */
/* Four cards on two workers fold memory that they are lent, of more bytes than a ring holds: by
 * messages, and where it lies.  It is
 * freed as soon as its completion is there, aborts at any moment included: whoever still touches it
 * then is found by AddressSanitizer, whoever touches it unordered by ThreadSanitizer. */
#include <poll.h>
#include <pthread.h>
#include <time.h>

#include "card_test.h"

enum { CARDS = 4, WORKERS = 2, SHARE = 40000, TOTAL = CARDS * SHARE };

struct fleet {
    struct spk_card *cards[CARDS];
    struct spk_pool *pool;
    uint32_t window[CARDS], rooms[CARDS], program[CARDS];
    float *lent[CARDS];
    struct spk_part parts[CARDS]; /* `done` where one of the last round is yet to be looked at */
};

static void transfer(struct builder *p, int op, int peer, struct spk_ref at)
{
    struct spk_command *c = append(p, op);
    c->flags = SPK_FLAG_BULK;
    c->ref[op == SPK_OP_LINK_SEND ? 0 : 3] = at;
    c->arg[0] = (uint32_t)peer, c->arg[1] = SHARE * 4;
}

/* Each card gets everybody's part of its share, folds it, and sends the result to all. */
static void load_all_reduce(struct fleet *f, int card)
{
    struct builder p = new_program(1, 0, 1);
    uint32_t bad, window = f->window[card], rooms = f->rooms[card];
    char why[256];
    append(&p, SPK_OP_EXCHANGE)->arg[0] = 2 * (CARDS - 1);
    for (int i = 1; i < CARDS; i++) {
        int peer = (card + i) % CARDS;
        transfer(&p, SPK_OP_LINK_SEND, peer, ref_at(window, 0, (uint64_t)peer * SHARE * 4));
        transfer(&p, SPK_OP_LINK_RECV, peer, ref_at(rooms, 0, (uint64_t)(i - 1) * SHARE * 4));
    }
    for (int i = 1; i < CARDS; i++) {
        struct spk_command *c = append(&p, SPK_OP_REDUCE);
        c->format = SPK_F32;
        c->ref[0] = ref_at(rooms, 0, (uint64_t)(i - 1) * SHARE * 4);
        c->ref[3] = ref_at(window, 0, (uint64_t)card * SHARE * 4);
        c->arg[0] = SHARE;
    }
    append(&p, SPK_OP_EXCHANGE)->arg[0] = 2 * (CARDS - 1);
    for (int i = 1; i < CARDS; i++) {
        int peer = (card + i) % CARDS;
        transfer(&p, SPK_OP_LINK_SEND, peer, ref_at(window, 0, (uint64_t)card * SHARE * 4));
        transfer(&p, SPK_OP_LINK_RECV, peer, ref_at(window, 0, (uint64_t)peer * SHARE * 4));
    }
    CHECK_EQUAL(load(f->cards[card], &p, &f->program[card], &bad, why), SPK_OK);
}

/* The same as one command. */
static void meeting(struct builder *p, int card, uint32_t window, uint32_t count)
{
    struct spk_command *c = append(p, SPK_OP_ALL_REDUCE);
    c->format = SPK_F32;
    c->ref[3] = ref_at(window, 0, 0);
    c->arg[0] = count, c->arg[3] = 1, c->arg[4] = CARDS, c->arg[5] = (uint32_t)card;
}

static void load_meeting(struct fleet *f, int card)
{
    struct builder p = new_program(1, 0, 1);
    uint32_t bad;
    char why[256];
    meeting(&p, card, f->window[card], TOTAL);
    CHECK_EQUAL(load(f->cards[card], &p, &f->program[card], &bad, why), SPK_OK);
}

static struct fleet fleet_create(bool meet)
{
    struct fleet f = {0};
    int status;
    for (int i = 0; i < CARDS; i++) {
        f.cards[i] = spk_card_create(16u << 20, SPK_ISA_SCALAR, &status);
        CHECK_EQUAL(status, SPK_OK);
        CHECK_EQUAL(spk_card_window(f.cards[i], TOTAL * 4, &f.window[i]), SPK_OK);
        CHECK_EQUAL(spk_card_alloc(f.cards[i], (CARDS - 1) * SHARE * 4, &f.rooms[i]), SPK_OK);
    }
    for (uint32_t i = 0; i < CARDS; i++)
        for (uint32_t j = i + 1; j < CARDS; j++)
            CHECK_EQUAL(spk_link_connect(f.cards[i], i, f.cards[j], j, RING_BYTES), SPK_OK);
    for (int i = 0; i < CARDS; i++)
        (meet ? load_meeting : load_all_reduce)(&f, i);
    f.pool = spk_pool_create(f.cards, CARDS, WORKERS, &status);
    CHECK(f.pool && status == SPK_OK);
    return f;
}

/* Small integers: sums are exact in any order. */
static float initial(uint32_t round, int card, size_t i)
{
    return (float)((round * 131 + (uint32_t)card * 7 + i) % 1021);
}

/* All cards by one call; what is not over by then is collected like anything else. */
static size_t run_parts(struct fleet *f, const uint32_t *program, const uint32_t *window,
                        float *const *memory, size_t count)
{
    struct step s = new_step(0, 0, 0, 0, 0);
    for (int card = 0; card < CARDS; card++)
        f->parts[card] = (struct spk_part){.card = f->cards[card],
                                           .program = program[card],
                                           .lent_count = 1,
                                           .lent = {{.window = window[card], .nbytes = count * 4}}};
    return spk_parts_run(f->parts, CARDS, (void *const *)memory, &s, step_bytes(&s));
}

static void submit_all(struct fleet *f, uint32_t round)
{
    struct step s = new_step(0, 0, 0, 0, 0);
    for (int card = 0; card < CARDS; card++) {
        f->lent[card] = exact(TOTAL * 4);
        for (size_t i = 0; i < TOTAL; i++)
            f->lent[card][i] = initial(round, card, i);
    }
    if (round % 3 == 2) {
        run_parts(f, f->program, f->window, f->lent, TOTAL);
        for (int card = 0; card < CARDS; card++)
            CHECK(f->parts[card].fence);
        return;
    }
    for (int card = 0; card < CARDS; card++) {
        uint64_t fence;
        char why[256];
        struct spk_lent lent = {.window = f->window[card],
                                .memory = f->lent[card],
                                .nbytes = TOTAL * 4};
        /* Every other time the thread that submits may stay and lend a hand. */
        CHECK_EQUAL((round % 3 ? spk_card_submit_helping : spk_card_submit_lending)(
                        f->cards[card], f->program[card], &s, step_bytes(&s), NULL, 0, &lent, 1,
                        &fence, why),
                    SPK_OK);
    }
}

/* Waits for one completion of a card. */
static struct spk_completion completion_of(struct fleet *f, int card)
{
    struct spk_completion done = f->parts[card].completion;
    bool known = f->parts[card].done;
    f->parts[card].done = 0;
    for (int i = 0; !known && !spk_card_completion(f->cards[card], &done); i++) {
        CHECK(i < 200000);
        sleep_ns(20000);
    }
    return done;
}

/* Collects one completion of a card, checks what it worked on, and takes that away. */
static int take(struct fleet *f, int card, uint32_t round)
{
    struct spk_completion done = completion_of(f, card);
    for (size_t i = 0; done.status == SPK_OK && i < TOTAL; i++) {
        float sum = 0;
        for (int from = 0; from < CARDS; from++)
            sum += initial(round, from, i);
        CHECK(f->lent[card][i] == sum);
    }
    free(f->lent[card]);
    return done.status;
}

static void folds_are_right(bool meet)
{
    struct fleet f = fleet_create(meet);
    for (uint32_t round = 0; round < 4; round++) {
        CASE("round %u", round);
        submit_all(&f, round);
        for (int card = 0; card < CARDS; card++)
            CHECK_EQUAL(take(&f, card, round), SPK_OK);
    }
    spk_pool_destroy(f.pool);
    for (int i = 0; i < CARDS; i++)
        spk_card_destroy(f.cards[i]);
}

static void an_abort_at_any_moment_lets_go_of_everything(bool meet)
{
    enum { ROUNDS = 25, SEED = 41 };
    struct rng r = {.state = SEED};
    struct fleet f = fleet_create(meet);
    int aborted = 0;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        CASE("abort, round %u, seed %d", round, SEED);
        submit_all(&f, round);
        sleep_ns(rng_below(&r, 4) ? rng_below(&r, meet ? 300000 : 3000000) : 0);
        for (int i = 0; i < CARDS; i++)
            CHECK_EQUAL(spk_card_abort(f.cards[i], round + 2), SPK_OK);
        for (int card = 0; card < CARDS; card++)
            aborted += take(&f, card, round) == SPK_E_ABORTED;
        if (round % 8 == 7) {
            submit_all(&f, round);
            for (int card = 0; card < CARDS; card++)
                CHECK_EQUAL(take(&f, card, round), SPK_OK);
        }
    }
    CHECK(aborted > 0);
    spk_pool_destroy(f.pool);
    for (int i = 0; i < CARDS; i++)
        spk_card_destroy(f.cards[i]);
}

static void a_dead_card_lets_go_too(bool meet)
{
    for (uint32_t round = 0; round < 6; round++) {
        struct fleet f = fleet_create(meet);
        CASE("a dead card, round %u", round);
        submit_all(&f, round);
        sleep_ns(round * (meet ? 60000 : 300000));
        spk_card_plant(f.cards[round % CARDS], SPK_PLANT_DIE);
        for (int i = 0; i < CARDS; i++)
            CHECK_EQUAL(spk_card_abort(f.cards[i], 2), SPK_OK);
        for (int card = 0; card < CARDS; card++) {
            int status = take(&f, card, round);
            CHECK(status == SPK_OK || status == SPK_E_ABORTED || status == SPK_E_LOST);
        }
        spk_pool_destroy(f.pool);
        for (int i = 0; i < CARDS; i++)
            spk_card_destroy(f.cards[i]);
    }
}

/* --- little, done by the thread that submits ---------------------------------------------------- */

enum { LITTLE = 50 };

/* Everybody sends everything to everybody, and folds. */
static uint32_t load_little(struct fleet *f, int card, uint32_t window, bool meet)
{
    struct builder p = new_program(1, 0, 1);
    uint32_t bad, program;
    char why[256];
    if (meet)
        meeting(&p, card, window, LITTLE);
    else
        append(&p, SPK_OP_EXCHANGE)->arg[0] = 2 * (CARDS - 1);
    for (int i = 1; i < CARDS && !meet; i++) {
        int peer = (card + i) % CARDS;
        transfer(&p, SPK_OP_LINK_SEND, peer, ref_at(window, 0, 0));
        p.commands[p.header.commands - 1].arg[1] = LITTLE * 4;
        transfer(&p, SPK_OP_LINK_RECV, peer, ref_at(f->rooms[card], 0, (uint64_t)i * LITTLE * 4));
        p.commands[p.header.commands - 1].arg[1] = LITTLE * 4;
    }
    for (int i = 1; i < CARDS && !meet; i++) {
        struct spk_command *c = append(&p, SPK_OP_REDUCE);
        c->format = SPK_F32;
        c->ref[0] = ref_at(f->rooms[card], 0, (uint64_t)i * LITTLE * 4);
        c->ref[3] = ref_at(window, 0, 0);
        c->arg[0] = LITTLE;
    }
    CHECK_EQUAL(load(f->cards[card], &p, &program, &bad, why), SPK_OK);
    CHECK(f->cards[card]->programs[program]->quick);
    const struct program *large = f->cards[card]->programs[f->program[card]];
    CHECK(!large->quick && large->brief == meet);
    return program;
}

/* Workers are asleep, or still awake from something else, or busy with the step before. */
static void little_is_done_by_whoever_submits(bool meet)
{
    enum { ROUNDS = 400, SEED = 43 };
    struct rng r = {.state = SEED};
    struct fleet f = fleet_create(meet);
    struct step s = new_step(0, 0, 0, 0, 0);
    uint32_t window[CARDS], little[CARDS], epoch = 1, all_at_once = 0;
    for (int i = 0; i < CARDS; i++)
        CHECK_EQUAL(spk_card_window(f.cards[i], LITTLE * 4, &window[i]), SPK_OK);
    for (int i = 0; i < CARDS; i++)
        little[i] = load_little(&f, i, window[i], meet);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        CASE("little, round %u, seed %d", round, SEED);
        bool behind = rng_below(&r, 8) == 0, aborted = rng_below(&r, 8) == 0;
        bool at_once = !behind && !aborted && rng_below(&r, 2);
        float *memory[CARDS];
        if (behind)
            submit_all(&f, round);
        if (rng_below(&r, 2))
            sleep_ns(rng_below(&r, 200000));
        for (int card = 0; card < CARDS; card++) {
            memory[card] = exact(LITTLE * 4);
            for (size_t i = 0; i < LITTLE; i++)
                memory[card][i] = initial(round, card, i);
        }
        if (at_once)
            all_at_once += run_parts(&f, little, window, memory, LITTLE) == CARDS;
        for (int card = 0; card < CARDS && !at_once; card++) {
            uint64_t fence;
            char why[256];
            struct spk_lent lent = {.window = window[card],
                                    .memory = memory[card],
                                    .nbytes = LITTLE * 4};
            CHECK_EQUAL(spk_card_submit_helping(f.cards[card], little[card], &s, step_bytes(&s),
                                                NULL, 0, &lent, 1, &fence, why),
                        SPK_OK);
            if (aborted && card == 1)
                for (int i = 0; i < CARDS; i++)
                    CHECK_EQUAL(spk_card_abort(f.cards[i], epoch + 1), SPK_OK);
        }
        if (aborted) {
            epoch++;
            for (int i = 0; i < CARDS; i++) /* those behind the abort wait for the others' */
                CHECK_EQUAL(spk_card_abort(f.cards[i], epoch + 1), SPK_OK);
            epoch++;
        }
        for (int card = 0; card < CARDS; card++) {
            if (behind)
                take(&f, card, round);
            struct spk_completion done = completion_of(&f, card);
            CHECK(done.status == SPK_OK || (aborted && done.status == SPK_E_ABORTED));
            for (size_t i = 0; done.status == SPK_OK && i < LITTLE; i++) {
                float sum = 0;
                for (int from = 0; from < CARDS; from++)
                    sum += initial(round, from, i);
                CHECK(memory[card][i] == sum);
            }
            free(memory[card]);
        }
    }
    CHECK(all_at_once > 0);
    spk_pool_destroy(f.pool);
    for (int i = 0; i < CARDS; i++)
        spk_card_destroy(f.cards[i]);
}

/* Only from one card on there is somebody who refuses; of what is not over, the fd tells. */
static void a_part_that_is_refused_leaves_the_others_waiting(bool meet)
{
    struct fleet f = fleet_create(meet);
    float *memory[CARDS];
    uint32_t little[CARDS], window[CARDS];
    for (int i = 0; i < CARDS; i++) {
        CHECK_EQUAL(spk_card_window(f.cards[i], LITTLE * 4, &window[i]), SPK_OK);
        little[i] = load_little(&f, i, window[i], meet);
        memory[i] = exact(LITTLE * 4);
        memset(memory[i], 0, LITTLE * 4);
    }
    little[2] += 1; /* no such program */
    CHECK_EQUAL(run_parts(&f, little, window, memory, LITTLE), 0);
    for (int i = 0; i < CARDS; i++)
        CHECK(!f.parts[i].done && !f.parts[i].fence == (i >= 2));
    /* What has something queued takes nothing more. */
    little[2] -= 1;
    CHECK_EQUAL(run_parts(&f, little, window, memory, LITTLE), 0);
    for (int i = 0; i < CARDS; i++)
        CHECK(!f.parts[i].done && !f.parts[i].fence);
    for (int i = 0; i < CARDS; i++)
        CHECK_EQUAL(spk_card_abort(f.cards[i], 2), SPK_OK);
    for (int i = 0; i < 2; i++) {
        struct pollfd fd = {.fd = spk_card_fd(f.cards[i]), .events = POLLIN};
        CHECK_EQUAL(poll(&fd, 1, 10000), 1);
        CHECK_EQUAL(completion_of(&f, i).status, SPK_E_ABORTED);
    }
    run_parts(&f, little, window, memory, LITTLE);
    for (int i = 0; i < CARDS; i++) {
        CHECK(f.parts[i].fence);
        CHECK_EQUAL(completion_of(&f, i).status, SPK_OK);
        free(memory[i]);
    }
    spk_pool_destroy(f.pool);
    for (int i = 0; i < CARDS; i++)
        spk_card_destroy(f.cards[i]);
}

int main(void)
{
    for (int meet = 0; meet < 2; meet++) {
        folds_are_right(meet);
        an_abort_at_any_moment_lets_go_of_everything(meet);
        a_dead_card_lets_go_too(meet);
        little_is_done_by_whoever_submits(meet);
        a_part_that_is_refused_leaves_the_others_waiting(meet);
    }
    puts("ok threads_collectives");
    return 0;
}
