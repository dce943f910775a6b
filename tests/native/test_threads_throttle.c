/* SPDX-License-Identifier: Apache-2.0 */
/* Throttled cards on fewer workers: exchanges paced by the model's clock, queued, aborted, made to
 * fault, read while they run, and torn down at any moment.  Runs under ThreadSanitizer too. */
#include <math.h>
#include <time.h>

#include "card_test.h"

enum { CARDS = 4, WORKERS = 2, WIDTH_BYTES = 64, ROUNDS = 6 };

struct fleet {
    struct spk_card *cards[CARDS];
    struct spk_throttle *throttle;
    struct spk_pool *pool;
    uint32_t own[CARDS], gathered[CARDS], program[CARDS], epoch;
};

static struct spk_card_speed speed(double elements_per_s)
{
    return (struct spk_card_speed){.memory_bytes_per_s = INFINITY,
                                   .int8_madds_per_s = INFINITY,
                                   .float_madds_per_s = INFINITY,
                                   .elements_per_s = elements_per_s,
                                   .port_bytes_per_s = 100e6,
                                   .command_s = 1e-6,
                                   .step_s = 5e-6};
}

static struct spk_throttle *throttle(struct fleet *f, double elements_per_s, int *status)
{
    struct spk_card_speed speeds[CARDS];
    struct spk_link_speed links[CARDS * CARDS];
    for (int i = 0; i < CARDS; i++)
        speeds[i] = speed(elements_per_s);
    for (int i = 0; i < CARDS * CARDS; i++)
        links[i] = (struct spk_link_speed){.bytes_per_s = 50e6, .latency_s = 2e-6};
    return spk_throttle_create(f->cards, CARDS, speeds, links, status);
}

/* Rounds of: x += x, then everyone's x to everyone; `norm` adds one that fails where x is NaN. */
static void load_rounds(struct fleet *f, int card, bool norm)
{
    struct builder p = new_program(2, 1, 1);
    uint32_t bad;
    char why[256];
    for (int r = 0; r < ROUNDS; r++) {
        struct spk_command *c = append(&p, SPK_OP_ADD);
        c->ref[0] = c->ref[1] = ref_at(f->own[card], WIDTH_BYTES, 0);
        c->arg[0] = WIDTH_BYTES / 4;
        append(&p, SPK_OP_EXCHANGE)->arg[0] = 2 * (CARDS - 1);
        for (uint32_t i = 1; i < CARDS; i++) {
            uint32_t peer = ((uint32_t)card + i) % CARDS;
            c = append(&p, SPK_OP_LINK_SEND);
            c->ref[0] = ref_at(f->own[card], WIDTH_BYTES, 0);
            c->arg[0] = peer, c->arg[1] = WIDTH_BYTES;
            c = append(&p, SPK_OP_LINK_RECV);
            c->ref[3] = ref_at(f->gathered[card], CARDS * WIDTH_BYTES, peer * WIDTH_BYTES);
            c->arg[0] = peer, c->arg[1] = WIDTH_BYTES;
        }
        if (norm) {
            c = append(&p, SPK_OP_RMSNORM);
            c->ref[0] = c->ref[1] = c->ref[3] = ref_at(f->own[card], WIDTH_BYTES, 0);
            c->arg[0] = WIDTH_BYTES / 4;
            c->arg[1] = 0x3727c5acu; /* 1e-5f */
        }
    }
    CHECK_EQUAL(load(f->cards[card], &p, &f->program[card], &bad, why), SPK_OK);
}

static struct fleet fleet_create(double elements_per_s, bool norm)
{
    struct fleet f = {.epoch = 1};
    int status;
    for (int i = 0; i < CARDS; i++) {
        f.cards[i] = spk_card_create(1u << 20, SPK_ISA_SCALAR, &status);
        CHECK_EQUAL(status, SPK_OK);
        CHECK_EQUAL(spk_card_alloc(f.cards[i], 2 * WIDTH_BYTES, &f.own[i]), SPK_OK);
        CHECK_EQUAL(spk_card_alloc(f.cards[i], 2 * CARDS * WIDTH_BYTES, &f.gathered[i]), SPK_OK);
    }
    for (uint32_t i = 0; i < CARDS; i++)
        for (uint32_t j = i + 1; j < CARDS; j++)
            CHECK_EQUAL(spk_link_connect(f.cards[i], i, f.cards[j], j, RING_BYTES), SPK_OK);
    for (int i = 0; i < CARDS; i++)
        load_rounds(&f, i, norm && i == 1);
    f.throttle = throttle(&f, elements_per_s, &status);
    CHECK_EQUAL(status, SPK_OK);
    f.pool = spk_pool_create(f.cards, CARDS, WORKERS, &status);
    CHECK(f.pool && status == SPK_OK);
    return f;
}

static void fleet_destroy(struct fleet *f)
{
    spk_pool_destroy(f->pool);
    spk_throttle_destroy(f->throttle);
    for (int i = 0; i < CARDS; i++)
        spk_card_destroy(f->cards[i]);
}

static void submit_all(struct fleet *f)
{
    struct step s = new_step(2, 0, 0, 0, 0);
    uint64_t fence;
    memset(s.words, 0, sizeof s.words);
    for (int i = 0; i < CARDS; i++)
        CHECK_EQUAL(submit(f->cards[i], f->program[i], &s, &fence), SPK_OK);
}

static void pause_ns(long ns)
{
    nanosleep(&(struct timespec){.tv_nsec = ns}, NULL);
}

/* Collects `count` completions of every card; how many succeeded. */
static int collect_all(struct fleet *f, int count)
{
    int succeeded = 0;
    for (int i = 0; i < CARDS; i++) {
        struct spk_completion done;
        for (int n = 0; n < count;) {
            if (!spk_card_completion(f->cards[i], &done)) {
                pause_ns(20000);
                continue;
            }
            succeeded += done.status == SPK_OK;
            n++;
        }
    }
    return succeeded;
}

static void abort_all(struct fleet *f)
{
    f->epoch++;
    for (int i = 0; i < CARDS; i++)
        CHECK_EQUAL(spk_card_abort(f->cards[i], f->epoch), SPK_OK);
}

static void test_steps_run_in_the_models_time(void)
{
    struct fleet f = fleet_create(16e6, false);
    for (int n = 0; n < 60; n++) {
        struct spk_pace before, after;
        CASE("step pair %d", n);
        spk_card_pace(f.cards[n % CARDS], &before);
        submit_all(&f);
        submit_all(&f);
        CHECK_EQUAL(collect_all(&f, 2), 2 * CARDS);
        spk_card_pace(f.cards[n % CARDS], &after);
        CHECK_EQUAL(after.steps, before.steps + 2);
        /* 5 us, and ROUNDS of 1 + 2 us, 1 us, 3 messages of 128 bytes at 33 MB/s. */
        CHECK(after.modelled_ns - before.modelled_ns >= 2 * (5e3 + ROUNDS * (4e3 + 3840)) - 1);
        CHECK(after.late_ns >= before.late_ns && after.last_end_ns > before.last_end_ns);
    }
    fleet_destroy(&f);
}

static void test_aborts_at_any_moment(void)
{
    struct fleet f = fleet_create(1e6, false);
    struct rng rng = {1};
    for (int n = 0; n < 80; n++) {
        CASE("abort %d", n);
        submit_all(&f);
        submit_all(&f);
        pause_ns((long)rng_below(&rng, 600000));
        abort_all(&f);
        collect_all(&f, 2);
        submit_all(&f);
        CHECK_EQUAL(collect_all(&f, 1), CARDS);
    }
    fleet_destroy(&f);
}

static void test_a_fault_ends_in_an_abort(void)
{
    struct fleet f = fleet_create(1e6, true);
    float nans[2 * WIDTH_BYTES / 4], zeros[2 * WIDTH_BYTES / 4] = {0};
    for (size_t i = 0; i < sizeof nans / sizeof *nans; i++)
        nans[i] = NAN;
    for (int n = 0; n < 20; n++) {
        struct spk_completion done;
        CASE("fault %d", n);
        CHECK_EQUAL(spk_card_write(f.cards[1], f.own[1], 0, nans, sizeof nans), SPK_OK);
        submit_all(&f);
        submit_all(&f);
        while (!spk_card_completion(f.cards[1], &done))
            pause_ns(20000);
        CHECK_EQUAL(done.status, SPK_E_NONFINITE);
        while (!spk_card_completion(f.cards[1], &done))
            pause_ns(20000);
        /* It may have come too late to be aborted with the first, and fail by itself. */
        CHECK(done.status == SPK_E_ABORTED || done.status == SPK_E_NONFINITE);
        abort_all(&f);
        for (int i = 0; i < CARDS; i++)
            for (int left = i == 1 ? 0 : 2; left;)
                left -= spk_card_completion(f.cards[i], &done);
        CHECK_EQUAL(spk_card_write(f.cards[1], f.own[1], 0, zeros, sizeof zeros), SPK_OK);
        submit_all(&f);
        CHECK_EQUAL(collect_all(&f, 1), CARDS);
    }
    fleet_destroy(&f);
}

static void test_torn_down_with_steps_queued(void)
{
    struct rng rng = {2};
    for (int n = 0; n < 20; n++) {
        CASE("teardown %d", n);
        struct fleet f = fleet_create(n % 2 ? 1e6 : 1e3, false);
        submit_all(&f);
        submit_all(&f);
        pause_ns((long)rng_below(&rng, 400000));
        if (n % 3 == 0)
            spk_card_plant(f.cards[2], SPK_PLANT_DIE);
        fleet_destroy(&f);
    }
}

static void test_driven_without_a_pool_it_says_when_to_come_back(void)
{
    struct fleet f = fleet_create(1e3, false);
    struct spk_completion done;
    uint64_t fence;
    uint32_t program, bad;
    char why[256];
    int paced = 0;
    CASE("without a pool");
    spk_pool_destroy(f.pool);
    f.pool = NULL;
    struct builder p = new_program(2, 1, 1);
    struct spk_command *c = append(&p, SPK_OP_ADD);
    c->ref[0] = c->ref[1] = ref_at(f.own[0], WIDTH_BYTES, 0);
    c->arg[0] = 16;
    CHECK_EQUAL(load(f.cards[0], &p, &program, &bad, why), SPK_OK);
    struct step s = new_step(1, 0, 0, 0, 0);
    CHECK_EQUAL(submit(f.cards[0], program, &s, &fence), SPK_OK);
    uint64_t saved = spk_fp_enter();
    while (!spk_card_completion(f.cards[0], &done)) {
        int result = spk_card_step(f.cards[0]);
        CHECK(result == SPK_STEP_RAN || result == SPK_STEP_PACED);
        paced += result == SPK_STEP_PACED && spk_card_wake_ns(f.cards[0]) > 0;
    }
    spk_fp_leave(saved);
    CHECK(done.status == SPK_OK && paced > 0);
    fleet_destroy(&f);
}

static void test_what_makes_no_sense_is_refused(void)
{
    struct fleet f = fleet_create(1e6, false);
    struct spk_card_speed speeds[CARDS];
    struct spk_link_speed links[CARDS * CARDS] = {0};
    int status;
    CASE("refusals");
    CHECK(!throttle(&f, 1e6, &status)); /* they are throttled already */
    CHECK_EQUAL(status, SPK_E_ARG);
    spk_pool_destroy(f.pool);
    spk_throttle_destroy(f.throttle);
    CHECK(!throttle(&f, 0, &status) && status == SPK_E_ARG);
    CHECK(!throttle(&f, NAN, &status) && status == SPK_E_ARG);
    for (int i = 0; i < CARDS; i++)
        speeds[i] = speed(1);
    CHECK(!spk_throttle_create(f.cards, CARDS, speeds, links, &status) && status == SPK_E_ARG);
    speeds[0].step_s = INFINITY;
    CHECK(!spk_throttle_create(f.cards, 1, speeds, links, &status) && status == SPK_E_ARG);
    CHECK(!spk_throttle_create(f.cards, 0, speeds, links, &status) && status == SPK_E_ARG);
    f.pool = NULL;
    f.throttle = NULL;
    fleet_destroy(&f);
}

int main(void)
{
    test_steps_run_in_the_models_time();
    test_aborts_at_any_moment();
    test_a_fault_ends_in_an_abort();
    test_torn_down_with_steps_queued();
    test_driven_without_a_pool_it_says_when_to_come_back();
    test_what_makes_no_sense_is_refused();
    puts("ok threads_throttle");
    return 0;
}
