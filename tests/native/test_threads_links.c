/* SPDX-License-Identifier: Apache-2.0 */
/* Four cards on two workers: exchanges over every link at once, queued, traced, aborted and torn down
 * at any moment.  Runs under ThreadSanitizer too. */
#include <math.h>
#include <pthread.h>
#include <sched.h>

#include "card_test.h"

enum {
    CARDS = 4,
    WORKERS = 2,
    CHUNK = 96,     /* floats of a row that one card contributes */
    ROWS = 40,
    EXCHANGES = 6,  /* between two of them every card changes its chunk */
    WIDE = 1200,    /* floats of a wide row: a step moves more than a ring holds */
    WIDE_ROWS = 60,
};

struct fleet {
    struct spk_card *cards[CARDS];
    struct spk_pool *pool;
    uint32_t gathered[CARDS], increment[CARDS], program[CARDS];
    uint32_t chunk, rows, epoch;
};

/* Small integers, so that sums are exact: depends on the step, the row, the card, the column. */
static float initial(uint32_t step, uint32_t row, uint32_t card, uint32_t column)
{
    return (float)((step * 131 + row * 31 + card * 7 + column) % 1021);
}

static float added(uint32_t row, uint32_t card, uint32_t column)
{
    return (float)(1 + (row * 3 + card * 5 + column) % 17);
}

static uint32_t row_bytes(const struct fleet *f)
{
    return CARDS * f->chunk * 4;
}

/* All-gathers, direct: every card sends its chunk of each row to every other. */
static void load_gathers(struct fleet *f, int card)
{
    struct builder p = new_program(f->rows, 0, 1);
    uint32_t bad;
    char why[256];
    uint64_t own = (uint64_t)card * f->chunk * 4;
    for (int e = 0; e < EXCHANGES; e++) {
        append(&p, SPK_OP_EXCHANGE)->arg[0] = 2 * (CARDS - 1);
        for (int i = 1; i < CARDS; i++) {
            int peer = (card + i) % CARDS;
            struct spk_command *c = append(&p, SPK_OP_LINK_SEND);
            c->ref[0] = ref_at(f->gathered[card], row_bytes(f), own);
            c->arg[0] = (uint32_t)peer, c->arg[1] = f->chunk * 4;
            c = append(&p, SPK_OP_LINK_RECV);
            c->ref[3] = ref_at(f->gathered[card], row_bytes(f), (uint64_t)peer * f->chunk * 4);
            c->arg[0] = (uint32_t)peer, c->arg[1] = f->chunk * 4;
        }
        struct spk_command *c = append(&p, SPK_OP_ADD);
        c->ref[0] = ref_at(f->gathered[card], row_bytes(f), own);
        c->ref[1] = ref_at(f->increment[card], f->chunk * 4, 0);
        c->arg[0] = f->chunk;
    }
    CHECK_EQUAL(load(f->cards[card], &p, &f->program[card], &bad, why), SPK_OK);
}

/* The buffers and the program of a card that has none. */
static void furnish(struct fleet *f, int i)
{
    uint64_t bytes = (uint64_t)f->chunk * 4 * f->rows;
    CHECK_EQUAL(spk_card_alloc(f->cards[i], (uint64_t)row_bytes(f) * f->rows, &f->gathered[i]),
                SPK_OK);
    CHECK_EQUAL(spk_card_alloc(f->cards[i], bytes, &f->increment[i]), SPK_OK);
    float *increments = exact(bytes);
    for (uint32_t r = 0; r < f->rows; r++)
        for (uint32_t c = 0; c < f->chunk; c++)
            increments[r * f->chunk + c] = added(r, (uint32_t)i, c);
    CHECK_EQUAL(spk_card_write(f->cards[i], f->increment[i], 0, increments, bytes), SPK_OK);
    free(increments);
    load_gathers(f, i);
}

static struct fleet fleet_create(uint32_t chunk, uint32_t rows)
{
    struct fleet f = {.chunk = chunk, .rows = rows, .epoch = 1};
    int status;
    for (int i = 0; i < CARDS; i++) {
        f.cards[i] = spk_card_create(16u << 20, SPK_ISA_SCALAR, &status);
        CHECK_EQUAL(status, SPK_OK);
    }
    for (uint32_t i = 0; i < CARDS; i++)
        for (uint32_t j = i + 1; j < CARDS; j++)
            CHECK_EQUAL(spk_link_connect(f.cards[i], i, f.cards[j], j, RING_BYTES), SPK_OK);
    for (int i = 0; i < CARDS; i++)
        furnish(&f, i);
    f.pool = spk_pool_create(f.cards, CARDS, WORKERS, &status);
    CHECK(f.pool && status == SPK_OK);
    return f;
}

static void fleet_destroy(struct fleet *f)
{
    spk_pool_destroy(f->pool);
    for (int i = 0; i < CARDS; i++)
        spk_card_destroy(f->cards[i]);
}

static void write_step(struct fleet *f, uint32_t step)
{
    size_t n = (size_t)f->rows * CARDS * f->chunk;
    float *x = exact(n * 4);
    for (uint32_t card = 0; card < CARDS; card++) {
        for (size_t i = 0; i < n; i++)
            x[i] = -1.0f; /* the others' chunks must arrive */
        for (uint32_t r = 0; r < f->rows; r++)
            for (uint32_t c = 0; c < f->chunk; c++)
                x[(r * CARDS + card) * f->chunk + c] = initial(step, r, card, c);
        CHECK_EQUAL(spk_card_write(f->cards[card], f->gathered[card], 0, x, n * 4), SPK_OK);
    }
    free(x);
}

/* Every card brings back its whole buffer after the step where `reading`. */
static void submit_step_reading(struct fleet *f, uint32_t tokens, bool reading)
{
    struct spk_step_header *h = exact(sizeof *h + (3 * tokens + 2) * 4);
    uint32_t *words = (uint32_t *)(h + 1);
    *h = (struct spk_step_header){.magic = SPK_STEP_MAGIC,
                                  .version = SPK_STEP_VERSION,
                                  .tokens = tokens,
                                  .sequences = 1};
    memset(words, 0, (3 * tokens + 2) * 4);
    for (int i = 0; i < CARDS; i++) {
        uint64_t fence;
        char why[256];
        struct spk_read read = {.buffer = f->gathered[i],
                                .nbytes = (uint64_t)row_bytes(f) * f->rows};
        CHECK_EQUAL(submit_reading(f->cards[i], f->program[i], h,
                                   sizeof *h + (3 * tokens + 2) * 4, &read, reading, &fence, why),
                    SPK_OK);
    }
    free(h);
}

static void submit_step(struct fleet *f, uint32_t tokens)
{
    submit_step_reading(f, tokens, false);
}

static int wait_status(struct spk_card *c)
{
    return wait_for(c).status;
}

/* What a card holds once it has run the step `runs` times, each time on the same tokens. */
static void check_rows(struct fleet *f, const float *x, uint32_t step, uint32_t tokens,
                       uint32_t card, uint32_t runs)
{
    for (uint32_t r = 0; r < f->rows; r++)
        for (uint32_t from = 0; from < CARDS; from++)
            for (uint32_t c = 0; c < f->chunk; c++) {
                /* The last exchange carries what all changes but the last have made. */
                uint32_t changes = runs * EXCHANGES - (from != card);
                float value = initial(step, r, from, c) + (float)changes * added(r, from, c);
                if (r >= tokens)
                    value = from == card ? initial(step, r, from, c) : -1.0f;
                if (x[(r * CARDS + from) * f->chunk + c] != value) {
                    CASE("step %u, run %u, card %u, row %u, from %u, column %u: %g, expected %g",
                         step, runs, card, r, from, c,
                         (double)x[(r * CARDS + from) * f->chunk + c], (double)value);
                    CHECK(!"the right value arrived");
                }
            }
}

static void check_step(struct fleet *f, uint32_t step, uint32_t tokens)
{
    size_t n = (size_t)f->rows * CARDS * f->chunk;
    float *x = exact(n * 4);
    for (uint32_t card = 0; card < CARDS; card++) {
        CHECK_EQUAL(spk_card_read(f->cards[card], f->gathered[card], 0, x, n * 4), SPK_OK);
        check_rows(f, x, step, tokens, card, 1);
    }
    free(x);
}

static void whole_step(struct fleet *f, uint32_t step, uint32_t tokens)
{
    write_step(f, step);
    submit_step(f, tokens);
    for (int i = 0; i < CARDS; i++)
        CHECK_EQUAL(wait_status(f->cards[i]), SPK_OK);
    check_step(f, step, tokens);
}

static void gathers_carry_the_right_data(void)
{
    struct fleet f = fleet_create(CHUNK, ROWS);
    for (uint32_t step = 0; step < 40; step++) {
        CASE("step %u", step);
        whole_step(&f, step, 1 + step * 7 % ROWS);
    }
    uint64_t expected = 0;
    for (uint32_t step = 0; step < 40; step++)
        expected += (uint64_t)(1 + step * 7 % ROWS) * EXCHANGES * CHUNK * 4;
    for (uint32_t i = 0; i < CARDS; i++)
        for (uint32_t j = 0; j < CARDS; j++) {
            uint64_t sent, received;
            spk_card_link_bytes(f.cards[i], j, &sent, &received);
            CHECK_EQUAL(sent, i == j ? 0 : expected);
            CHECK_EQUAL(received, i == j ? 0 : expected);
        }
    fleet_destroy(&f);
}

static void gathers_larger_than_a_ring_arrive(void)
{
    struct fleet f = fleet_create(WIDE, WIDE_ROWS);
    CASE("wide");
    for (uint32_t step = 0; step < 3; step++)
        whole_step(&f, step, step == 1 ? 1 : WIDE_ROWS);
    fleet_destroy(&f);
}

static void queued_steps_follow_each_other(void)
{
    struct fleet f = fleet_create(CHUNK, ROWS);
    CASE("queued");
    for (int round = 0; round < 10; round++) {
        for (uint32_t i = 0; i < SPK_QUEUE_MAX; i++)
            submit_step(&f, 1 + i);
        for (uint32_t i = 0; i < SPK_QUEUE_MAX; i++)
            for (int card = 0; card < CARDS; card++)
                CHECK_EQUAL(wait_status(f.cards[card]), SPK_OK);
    }
    fleet_destroy(&f);
}

/* Each step brings back what it left, though the next one runs before anybody collects. */
static void queued_steps_bring_back_their_own_results(void)
{
    struct fleet f = fleet_create(CHUNK, ROWS);
    size_t bytes = (size_t)row_bytes(&f) * ROWS;
    float *x = exact(bytes);
    for (uint32_t step = 0; step < 10; step++) {
        uint32_t tokens = 1 + step * 13 % ROWS;
        CASE("results of queued steps, step %u", step);
        write_step(&f, step);
        for (uint32_t i = 0; i < SPK_QUEUE_MAX; i++)
            submit_step_reading(&f, tokens, true);
        for (uint32_t i = 0; i < SPK_QUEUE_MAX; i++)
            for (uint32_t card = 0; card < CARDS; card++) {
                struct spk_completion done = wait_for(f.cards[card]);
                CHECK_EQUAL(done.status, SPK_OK);
                CHECK_EQUAL(done.result_bytes, bytes);
                memcpy(x, done.result, bytes);
                check_rows(&f, x, step, tokens, card, i + 1);
            }
    }
    free(x);
    fleet_destroy(&f);
}

/* Takes what a card has traced so far; says how many events that were. */
static uint64_t take_trace(struct spk_card *c, uint64_t *last_ns, uint64_t *lost)
{
    struct spk_trace_event events[37];
    uint64_t got, all = 0;
    while ((got = spk_card_trace_read(c, events, 37, lost)) != 0) {
        for (uint64_t i = 0; i < got; i++) {
            CHECK(events[i].begin_ns >= *last_ns && events[i].end_ns >= events[i].begin_ns);
            *last_ns = events[i].end_ns;
        }
        all += got;
    }
    return all;
}

/* The host reads the trace while the workers write it: every command is told or counted as lost. */
static void a_trace_may_be_read_while_steps_run(void)
{
    enum { COMMANDS = EXCHANGES * (1 + 2 * (CARDS - 1) + 1), STEPS = 30 };
    static const uint64_t rooms[] = {16 * COMMANDS, 10, 1};
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) {
        struct fleet f = fleet_create(CHUNK, ROWS);
        uint64_t told[CARDS] = {0}, last_ns[CARDS] = {0}, lost[CARDS];
        CASE("trace, room for %llu", (unsigned long long)rooms[i]);
        for (int card = 0; card < CARDS; card++)
            CHECK_EQUAL(spk_card_trace(f.cards[card], rooms[i]), SPK_OK);
        for (int step = 0; step < STEPS; step++) {
            bool waits[CARDS] = {false};
            int left = CARDS;
            submit_step(&f, 1);
            while (left)
                for (int card = 0; card < CARDS; card++) {
                    struct spk_completion done;
                    told[card] += take_trace(f.cards[card], &last_ns[card], &lost[card]);
                    if (!waits[card] && spk_card_completion(f.cards[card], &done)) {
                        CHECK_EQUAL(done.status, SPK_OK);
                        waits[card] = true;
                        left--;
                    }
                }
        }
        for (int card = 0; card < CARDS; card++) {
            told[card] += take_trace(f.cards[card], &last_ns[card], &lost[card]);
            CHECK_EQUAL(told[card] + lost[card], STEPS * COMMANDS);
            CHECK(i > 0 || lost[card] == 0);
            CHECK_EQUAL(spk_card_trace(f.cards[card], 0), SPK_OK);
        }
        fleet_destroy(&f);
    }
}

static void abort_all(struct fleet *f, struct rng *r)
{
    int first = (int)rng_below(r, CARDS);
    f->epoch++;
    for (int i = 0; i < CARDS; i++) {
        CHECK_EQUAL(spk_card_abort(f->cards[(first + i) % CARDS], f->epoch), SPK_OK);
        if (rng_below(r, 4) == 0)
            sleep_ns(rng_below(r, 200000));
    }
}

/* A moment of a card's work and not of the clock: when it has executed so many commands, or has nothing
 * queued any more. */
static void wait_for_commands(struct spk_card *c, uint64_t commands)
{
    struct spk_counters now;
    do {
        spk_card_counters(c, &now);
        sched_yield();
    } while (now.queued && now.commands < commands);
}

/* How long a step takes here and now: sanitizers and busy machines stretch it. */
static uint32_t step_duration_ns(struct fleet *f)
{
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    submit_step(f, ROWS);
    for (int i = 0; i < CARDS; i++)
        CHECK_EQUAL(wait_status(f->cards[i]), SPK_OK);
    clock_gettime(CLOCK_MONOTONIC, &end);
    int64_t ns = (end.tv_sec - begin.tv_sec) * 1000000000 + (end.tv_nsec - begin.tv_nsec);
    return ns < 20000000 ? (uint32_t)ns : 20000000;
}

static void an_abort_at_any_moment_leaves_nothing_behind(void)
{
    enum { ROUNDS = 120, SEED = 17 };
    struct rng r = {.state = SEED};
    struct fleet f = fleet_create(CHUNK, ROWS);
    struct spk_counters counters;
    int aborted = 0, finished = 0;
    whole_step(&f, 0, ROWS);
    spk_card_counters(f.cards[0], &counters);
    uint32_t step_commands = (uint32_t)counters.commands;
    for (uint32_t round = 0; round < ROUNDS; round++) {
        CASE("abort, round %u, seed %d", round, SEED);
        write_step(&f, round);
        submit_step(&f, ROWS);
        if (rng_below(&r, 2))
            submit_step(&f, 3);
        struct spk_card *drawn = f.cards[rng_below(&r, CARDS)];
        spk_card_counters(drawn, &counters);
        if (rng_below(&r, 4))
            wait_for_commands(drawn, counters.commands + rng_below(&r, 2 * step_commands));
        abort_all(&f, &r);
        for (int i = 0; i < CARDS; i++) {
            for (;;) {
                struct spk_completion done;
                while (spk_card_completion(f.cards[i], &done)) {
                    CHECK(done.status == SPK_OK || done.status == SPK_E_ABORTED);
                    aborted += done.status == SPK_E_ABORTED;
                    finished += done.status == SPK_OK;
                }
                spk_card_counters(f.cards[i], &counters);
                if (!counters.queued && !spk_card_completion(f.cards[i], &done))
                    break;
                sleep_ns(20000);
            }
        }
        whole_step(&f, round + 1, 1 + rng_below(&r, ROWS));
    }
    CHECK(aborted > 0 && finished > 0); /* or the moments were not any */
    fleet_destroy(&f);
}

/* A step submitted right behind an abort runs, whatever the workers have seen of the abort. */
static void a_step_may_be_submitted_right_behind_an_abort(void)
{
    enum { ROUNDS = 100, SEED = 23 };
    struct rng r = {.state = SEED};
    struct fleet f = fleet_create(CHUNK, ROWS);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        CASE("behind an abort, round %u, seed %d", round, SEED);
        submit_step(&f, ROWS);
        sleep_ns(rng_below(&r, 500000));
        abort_all(&f, &r);
        submit_step(&f, 2);
        for (int i = 0; i < CARDS; i++) {
            int status = wait_status(f.cards[i]);
            CHECK(status == SPK_OK || status == SPK_E_ABORTED);
            CHECK_EQUAL(wait_status(f.cards[i]), SPK_OK);
        }
    }
    fleet_destroy(&f);
}

static void a_fleet_may_be_destroyed_while_it_runs(void)
{
    struct rng r = {.state = 29};
    for (int round = 0; round < 15; round++) {
        struct fleet f = fleet_create(CHUNK, ROWS);
        CASE("destroyed, round %d", round);
        submit_step(&f, ROWS);
        submit_step(&f, ROWS);
        sleep_ns(rng_below(&r, 1000000));
        if (round % 3 == 0)
            spk_card_plant(f.cards[round % CARDS], SPK_PLANT_HANG);
        if (round % 3 == 1)
            spk_card_plant(f.cards[round % CARDS], SPK_PLANT_DIE);
        fleet_destroy(&f);
    }
}

static void a_dead_card_answers_and_the_others_can_be_aborted(void)
{
    struct rng r = {.state = 31};
    for (int round = 0; round < 10; round++) {
        struct fleet f = fleet_create(CHUNK, ROWS);
        int dead = round % CARDS;
        CASE("a dead card, round %d", round);
        submit_step(&f, ROWS);
        submit_step(&f, ROWS);
        sleep_ns(rng_below(&r, 500000));
        spk_card_plant(f.cards[dead], SPK_PLANT_DIE);
        for (int i = 0; i < 2; i++) {
            int status = wait_status(f.cards[dead]);
            CHECK(status == SPK_E_LOST || status == SPK_OK);
        }
        abort_all(&f, &r);
        for (int card = 0; card < CARDS; card++)
            for (int i = 0; card != dead && i < 2; i++) {
                int status = wait_status(f.cards[card]);
                CHECK(status == SPK_E_ABORTED || status == SPK_OK);
            }
        fleet_destroy(&f);
    }
}

/* Some fault, or its end. */
static void turn_a_knob(struct fleet *f, struct rng *r)
{
    uint32_t card = rng_below(r, CARDS), peer = (card + 1 + rng_below(r, CARDS - 1)) % CARDS;
    struct spk_card *c = f->cards[card];
    switch (rng_below(r, 7)) {
    case 0:
        spk_card_link_want(c, peer, 0);
        break;
    case 1:
        spk_card_link_want(c, peer, 1);
        break;
    case 2:
        spk_card_corrupt(c, peer, 1 + rng_below(r, 3));
        break;
    case 3:
        spk_card_slow(c, 1 + rng_below(r, 20));
        break;
    case 4:
        spk_card_plant(c, (int)rng_below(r, SPK_PLANT_MEMORY + 1));
        break;
    case 5:
        spk_card_plant_at(c, (int)(1 + rng_below(r, SPK_PLANT_MEMORY)), rng_below(r, 60));
        break;
    default:
        spk_card_plant_at(c, SPK_PLANT_MEMORY, SPK_COMMAND_ANY);
    }
}

/* While all cards are at work one of them is reopened; then all are, one by one, and work together in
 * an epoch that is new to them.  Meanwhile the others have met whatever faults there are. */
static void a_card_may_be_reopened_at_any_moment(void)
{
    enum { ROUNDS = 60, SEED = 37 };
    struct rng r = {.state = SEED};
    struct fleet f = fleet_create(CHUNK, ROWS);
    uint32_t duration_ns = step_duration_ns(&f);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        struct spk_counters counters;
        struct spk_completion done;
        uint64_t sent, received;
        CASE("reopened, round %u, seed %d", round, SEED);
        for (int card = 0; card < CARDS; card++)
            CHECK_EQUAL(spk_card_trace(f.cards[card], 20), SPK_OK);
        write_step(&f, round);
        submit_step(&f, ROWS);
        submit_step(&f, 2);
        for (uint32_t knobs = rng_below(&r, 4); knobs; knobs--) {
            sleep_ns(rng_below(&r, duration_ns));
            turn_a_knob(&f, &r);
        }
        sleep_ns(rng_below(&r, duration_ns));
        uint32_t first = rng_below(&r, CARDS);
        for (uint32_t i = 0; i < CARDS; i++) {
            struct spk_card *c = f.cards[(first + i) % CARDS];
            CHECK_EQUAL(spk_card_reopen(c), SPK_OK);
            CHECK(!spk_card_completion(c, &done));
            spk_card_counters(c, &counters);
            CHECK(!counters.queued && !counters.ddr_used_bytes && !counters.steps);
            CHECK(counters.epoch == 1 && counters.waiting_for == -1);
            CHECK_EQUAL(spk_card_lost(c), SPK_OK);
            spk_card_link_bytes(c, (first + i + 1) % CARDS, &sent, &received);
            CHECK_EQUAL(sent, 0);
        }
        for (int card = 0; card < CARDS; card++) {
            CHECK_EQUAL(spk_card_link_state(f.cards[card], (uint32_t)(card + 1) % CARDS),
                        SPK_LINK_UP);
            furnish(&f, card);
        }
        abort_all(&f, &r);
        whole_step(&f, round + 1, 1 + rng_below(&r, ROWS));
    }
    fleet_destroy(&f);
}

/* Another thread of the host reads counters all the time. */
static _Atomic int watching;

static void *watch(void *argument)
{
    struct fleet *f = argument;
    uint64_t last[CARDS] = {0};
    while (watching) {
        for (int i = 0; i < CARDS; i++) {
            struct spk_counters counters;
            uint64_t sent, received;
            spk_card_counters(f->cards[i], &counters);
            spk_card_link_bytes(f->cards[i], (uint32_t)(i + 1) % CARDS, &sent, &received);
            CHECK(counters.progress >= last[i]);
            last[i] = counters.progress;
        }
        sleep_ns(100000);
    }
    return NULL;
}

static void counters_may_be_read_meanwhile(void)
{
    struct fleet f = fleet_create(CHUNK, ROWS);
    pthread_t thread;
    CASE("counters");
    watching = 1;
    CHECK(pthread_create(&thread, NULL, watch, &f) == 0);
    for (uint32_t step = 0; step < 10; step++)
        whole_step(&f, step, ROWS);
    watching = 0;
    pthread_join(thread, NULL);
    fleet_destroy(&f);
}

/* Cards may leave an epoch one by one; what counts is that those who exchange agree. */
static void cards_meet_in_one_epoch_from_different_ones(void)
{
    static const uint32_t epochs[][CARDS] = {
        {3, 3, 1, 1}, /* two of them went on, the others follow */
        {3, 3, 3, 3},
        {4, 7, 5, 6}, /* each has one of its own, all enter a later one */
        {9, 9, 9, 9},
        {9, 9, 9, 12},
        {12, 12, 12, 12},
    };
    struct fleet f = fleet_create(CHUNK, ROWS);
    for (uint32_t i = 0; i < sizeof epochs / sizeof *epochs; i++) {
        bool agreed = true;
        CASE("epochs, row %u", i);
        for (int card = 0; card < CARDS; card++) {
            struct spk_counters now;
            spk_card_counters(f.cards[card], &now);
            if (epochs[i][card] > now.epoch)
                CHECK_EQUAL(spk_card_abort(f.cards[card], epochs[i][card]), SPK_OK);
            agreed = agreed && epochs[i][card] == epochs[i][0];
            while (now.epoch != epochs[i][card]) /* an idle card enters it all the same */
                spk_card_counters(f.cards[card], &now);
        }
        for (uint32_t step = 0; agreed && step < 3; step++)
            whole_step(&f, step, ROWS);
    }
    fleet_destroy(&f);
}

/* Whoever has seen a fault may submit at once: only what was queued before is aborted with it. */
static void a_step_may_be_submitted_as_soon_as_a_fault_is_known(void)
{
    enum { ROUNDS = 2000 };
    struct fleet f = fleet_create(CHUNK, 1);
    struct builder p = new_program(1, 0, 1);
    struct step step = new_step(1, 0, 0, 0, 1);
    uint32_t bad_program, good_program, bad, blocks;
    uint64_t fence;
    char why[256];
    float *nans = exact(CHUNK * 4);
    CASE("a fault");
    CHECK_EQUAL(spk_card_alloc(f.cards[0], CHUNK / 32 * 34, &blocks), SPK_OK);
    struct spk_command *c = append(&p, SPK_OP_QUANTIZE);
    c->ref[0] = ref_at(f.gathered[0], row_bytes(&f), 0);
    c->ref[3] = ref_at(blocks, CHUNK / 32 * 34, 0);
    c->arg[0] = CHUNK;
    CHECK_EQUAL(load(f.cards[0], &p, &bad_program, &bad, why), SPK_OK);
    p.commands[0].ref[0].buffer = f.increment[0];
    p.commands[0].ref[0].stride = CHUNK * 4;
    CHECK_EQUAL(load(f.cards[0], &p, &good_program, &bad, why), SPK_OK);
    for (int i = 0; i < CHUNK; i++)
        nans[i] = NAN;
    CHECK_EQUAL(spk_card_write(f.cards[0], f.gathered[0], 0, nans, CHUNK * 4), SPK_OK);
    for (int round = 0; round < ROUNDS; round++) {
        struct spk_completion done;
        bool two = round % 2;
        CASE("a fault, round %d", round);
        CHECK_EQUAL(submit(f.cards[0], bad_program, &step, &fence), SPK_OK);
        /* Behind it in good faith: aborted, unless the fault was known by then. */
        if (two)
            CHECK_EQUAL(submit(f.cards[0], good_program, &step, &fence), SPK_OK);
        while (!spk_card_completion(f.cards[0], &done))
            ;
        CHECK_EQUAL(done.status, SPK_E_NONFINITE);
        CHECK_EQUAL(submit(f.cards[0], good_program, &step, &fence), SPK_OK);
        if (two) {
            int status = wait_status(f.cards[0]);
            CHECK(status == SPK_E_ABORTED || status == SPK_OK);
        }
        CHECK_EQUAL(wait_status(f.cards[0]), SPK_OK);
    }
    free(nans);
    fleet_destroy(&f);
}

int main(void)
{
    gathers_carry_the_right_data();
    gathers_larger_than_a_ring_arrive();
    queued_steps_follow_each_other();
    queued_steps_bring_back_their_own_results();
    a_trace_may_be_read_while_steps_run();
    an_abort_at_any_moment_leaves_nothing_behind();
    a_step_may_be_submitted_right_behind_an_abort();
    a_fleet_may_be_destroyed_while_it_runs();
    a_dead_card_answers_and_the_others_can_be_aborted();
    a_card_may_be_reopened_at_any_moment();
    counters_may_be_read_meanwhile();
    cards_meet_in_one_epoch_from_different_ones();
    a_step_may_be_submitted_as_soon_as_a_fault_is_known();
    puts("ok threads_links");
    return 0;
}
