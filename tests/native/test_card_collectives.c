/* SPDX-License-Identifier: Apache-2.0 */
/* Bulk operations, bulk transfers and windows: what is refused, what they leave in memory, and that
 * a card keeps nothing of what it was lent. */
#include "card_test.h"

enum { ELEMENTS = 37, BYTES = ELEMENTS * 4 };

static struct spk_card *card, *peer;
static uint32_t x, y, window;
static char why[256];

static struct spk_command *bulk(struct builder *p, int op, struct spk_ref into,
                                struct spk_ref operand, uint64_t count)
{
    struct spk_command *c = append(p, op);
    c->format = SPK_F32;
    c->ref[0] = operand;
    c->ref[3] = into;
    c->arg[0] = (uint32_t)count, c->arg[1] = (uint32_t)(count >> 32);
    c->arg[2] = op == SPK_OP_DIVIDE ? 2 : 0;
    return c;
}

static struct spk_command *transfer(struct builder *p, int op, struct spk_ref at, uint64_t bytes)
{
    struct spk_command *c = append(p, op);
    c->flags = SPK_FLAG_BULK;
    c->ref[op == SPK_OP_LINK_SEND ? 0 : 3] = at;
    c->arg[0] = 1, c->arg[1] = (uint32_t)bytes, c->arg[2] = (uint32_t)(bytes >> 32);
    return c;
}

/* One of each, all of them allowed. */
static struct builder valid_program(void)
{
    struct builder p = new_program(1, 0, 1);
    append(&p, SPK_OP_EXCHANGE)->arg[0] = 1;
    transfer(&p, SPK_OP_LINK_SEND, ref_at(window, 0, 0), BYTES);
    bulk(&p, SPK_OP_REDUCE, ref_at(x, 0, 0), ref_at(window, 0, 0), ELEMENTS);
    bulk(&p, SPK_OP_COPY, ref_at(y, 0, 0), ref_at(x, 0, 0), ELEMENTS);
    bulk(&p, SPK_OP_DIVIDE, ref_at(window, 0, 0), ref_at(0, 0, 0), ELEMENTS);
    return p;
}

#define REFUSES(status, change)                                                                \
    do {                                                                                       \
        struct builder p = valid_program();                                                    \
        uint32_t handle, bad;                                                                  \
        CASE("%s", #change);                                                                   \
        change;                                                                                \
        CHECK_EQUAL(load(card, &p, &handle, &bad, why), status);                               \
    } while (0)

static void refuses_what_makes_no_sense(void)
{
    static const uint16_t unknown[] = {SPK_Q4_0, SPK_Q6_K, 25, 27, UINT16_MAX};
    struct builder ok = valid_program();
    uint32_t handle, bad;
    CASE("valid");
    CHECK_EQUAL(load(card, &ok, &handle, &bad, why), SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(card, handle), SPK_OK);
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
        REFUSES(SPK_E_ARG, find(&p, SPK_OP_COPY)->format = unknown[i]);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_REDUCE)->flags = SPK_FLAG_OUTPUTS);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_COPY)->flags = SPK_FLAG_BULK);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_LINK_SEND)->flags = SPK_FLAG_BULK | SPK_FLAG_OUTPUTS);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_EXCHANGE)->flags = SPK_FLAG_BULK);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_REDUCE)->arg[2] = SPK_REDUCE_COUNT);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_DIVIDE)->arg[2] = 0);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_DIVIDE)->arg[2] = 65537);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_REDUCE)->arg[1] = UINT32_MAX);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_REDUCE)->arg[1] = 1);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_REDUCE)->arg[0] = ELEMENTS + 1);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_COPY)->arg[0] = ELEMENTS + 1);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_DIVIDE)->arg[0] = ELEMENTS + 1);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_DIVIDE)->ref[3].offset = 4);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_REDUCE)->ref[0].offset = UINT64_MAX - 3);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_REDUCE)->ref[0].offset = 2);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_LINK_SEND)->arg[1] = BYTES + 1);
    REFUSES(SPK_E_BOUNDS, find(&p, SPK_OP_LINK_SEND)->arg[2] = 1);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_LINK_SEND)->arg[2] = 1u << 16);
    REFUSES(SPK_E_ARG, find(&p, SPK_OP_COPY)->ref[0] = ref_at(y, 0, 0));
    REFUSES(SPK_E_ARG, (find(&p, SPK_OP_COPY)->ref[0] = ref_at(y, 0, 4),
                        find(&p, SPK_OP_COPY)->arg[0] = 30));
    REFUSES(SPK_E_HANDLE, find(&p, SPK_OP_COPY)->ref[0].buffer = 77);
}

/* Two halves of one buffer side by side do not overlap. */
static void neighbours_are_no_overlap(void)
{
    struct builder p = new_program(1, 0, 1);
    uint32_t handle, bad;
    CASE("neighbours");
    bulk(&p, SPK_OP_REDUCE, ref_at(x, 0, 0), ref_at(x, 0, 40), 10);
    bulk(&p, SPK_OP_REDUCE, ref_at(x, 0, 40), ref_at(x, 0, 0), 0);
    CHECK_EQUAL(load(card, &p, &handle, &bad, why), SPK_OK);
    CHECK_EQUAL(spk_card_unload_program(card, handle), SPK_OK);
}

static void windows_have_no_memory_of_their_own(void)
{
    uint8_t byte = 0;
    uint32_t handle, bad, many[SPK_WINDOWS_MAX + 1];
    uint64_t fence;
    struct spk_counters before, after;
    struct spk_read read = {.buffer = window, .nbytes = 1};
    struct step s = new_step(0, 0, 0, 0, 0);
    CASE("windows");
    CHECK_EQUAL(spk_card_window(card, 0, &handle), SPK_E_ARG);
    CHECK_EQUAL(spk_card_window(card, (uint64_t)1 << 48, &handle), SPK_E_ARG);
    CHECK_EQUAL(spk_card_write(card, window, 0, &byte, 1), SPK_E_HANDLE);
    CHECK_EQUAL(spk_card_read(card, window, 0, &byte, 1), SPK_E_HANDLE);

    spk_card_counters(card, &before);
    struct builder p = new_program(1, 0, 1);
    for (uint32_t i = 0; i <= SPK_WINDOWS_MAX; i++) {
        CHECK_EQUAL(spk_card_window(card, 1u << 30, &many[i]), SPK_OK);
        bulk(&p, SPK_OP_DIVIDE, ref_at(many[i], 0, 0), ref_at(0, 0, 0), 1);
    }
    spk_card_counters(card, &after);
    CHECK_EQUAL(after.ddr_used_bytes, before.ddr_used_bytes);
    CHECK_EQUAL(load(card, &p, &handle, &bad, why), SPK_E_ARG);
    CHECK_EQUAL(bad, SPK_WINDOWS_MAX);
    for (uint32_t i = 0; i <= SPK_WINDOWS_MAX; i++)
        CHECK_EQUAL(spk_card_free(card, many[i]), SPK_OK);

    /* Nothing else may work on one: what a kernel reads must be aligned and long enough. */
    p = new_program(1, 0, 1);
    struct spk_command *c = append(&p, SPK_OP_ADD);
    c->ref[0] = ref_at(x, 16, 0), c->ref[1] = ref_at(window, 16, 0), c->arg[0] = 4;
    CHECK_EQUAL(load(card, &p, &handle, &bad, why), SPK_E_ARG);

    p = valid_program();
    CHECK_EQUAL(load(card, &p, &handle, &bad, why), SPK_OK);
    CHECK_EQUAL(spk_card_free(card, window), SPK_E_BUSY);
    CHECK_EQUAL(submit_reading(card, handle, &s, step_bytes(&s), &read, 1, &fence, why),
                SPK_E_PARAMS);
    CHECK_EQUAL(spk_card_unload_program(card, handle), SPK_OK);
    p = new_program(1, 0, 1);
    CHECK_EQUAL(load(card, &p, &handle, &bad, why), SPK_OK);
    CHECK_EQUAL(submit_reading(card, handle, &s, step_bytes(&s), &read, 1, &fence, why),
                SPK_E_HANDLE);
    CHECK_EQUAL(spk_card_unload_program(card, handle), SPK_OK);
}

static int lend(uint32_t program, const struct spk_lent *lent, size_t count)
{
    struct step s = new_step(0, 0, 0, 0, 0);
    uint64_t fence;
    memset(why, 0, sizeof why);
    return spk_card_submit_lending(card, program, &s, step_bytes(&s), NULL, 0, lent, count, &fence,
                                   why);
}

static void what_is_lent_must_fit(void)
{
    uint8_t *memory = exact(BYTES + 4);
    uint32_t handle, bad, other;
    struct builder p = valid_program();
    CASE("lent memory that does not fit");
    CHECK_EQUAL(load(card, &p, &handle, &bad, why), SPK_OK);
    CHECK_EQUAL(spk_card_window(card, BYTES, &other), SPK_OK);
    struct spk_lent good = {.window = window, .memory = memory, .nbytes = BYTES};
    struct spk_lent wrong[] = {good, good, good, good, good, good};
    wrong[0].window = other;
    wrong[1].memory = NULL;
    wrong[2].memory = memory + 2;
    wrong[3].nbytes = BYTES + 4;
    wrong[4].nbytes = BYTES - 4;
    wrong[5].reserved = 1;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        CHECK_EQUAL(lend(handle, &wrong[i], 1), SPK_E_PARAMS);
    CHECK_EQUAL(lend(handle, NULL, 0), SPK_E_PARAMS);
    CHECK_EQUAL(lend(handle, (struct spk_lent[]){good, good}, 2), SPK_E_PARAMS);
    CHECK_EQUAL(spk_card_unload_program(card, handle), SPK_OK);
    CHECK_EQUAL(spk_card_free(card, other), SPK_OK);
    free(memory);
}

/* The window is sent, doubled into x by two folds, copied to y, and halved in place.  A step of no
 * tokens does all of it, and once. */
static void a_step_works_on_what_it_was_lent(void)
{
    uint32_t handle, bad;
    struct builder p = valid_program();
    float zero[ELEMENTS] = {0}, got[ELEMENTS];
    struct spk_completion done;
    struct spk_counters counters;
    find(&p, SPK_OP_COPY)->op = SPK_OP_REDUCE; /* y is zero, too */
    CHECK_EQUAL(load(card, &p, &handle, &bad, why), SPK_OK);
    for (int round = 0; round < 3; round++) {
        CASE("round %d", round);
        float *memory = exact(BYTES);
        for (int i = 0; i < ELEMENTS; i++)
            memory[i] = (float)(i * 3 + round);
        CHECK_EQUAL(spk_card_write(card, x, 0, zero, BYTES), SPK_OK);
        CHECK_EQUAL(spk_card_write(card, y, 0, zero, BYTES), SPK_OK);
        struct spk_lent lent = {.window = window, .memory = memory, .nbytes = BYTES};
        CHECK_EQUAL(lend(handle, &lent, 1), SPK_OK);
        while (spk_card_step(card) == SPK_STEP_RAN)
            ;
        CHECK(spk_card_completion(card, &done));
        CHECK_EQUAL(done.status, SPK_OK);
        CHECK(card->buffers[window].memory == NULL);
        CHECK_EQUAL(spk_card_read(card, y, 0, got, BYTES), SPK_OK);
        for (int i = 0; i < ELEMENTS; i++) {
            CHECK(got[i] == (float)(i * 3 + round));
            CHECK(memory[i] == (float)(i * 3 + round) / 2.0f);
        }
        free(memory);
    }
    spk_card_counters(card, &counters);
    CHECK_EQUAL(counters.steps, 3);
    CHECK_EQUAL(spk_card_unload_program(card, handle), SPK_OK);
}

/* A step that waits for its peer is aborted: it lets go of what it was lent. */
static void an_aborted_step_lets_go(void)
{
    uint32_t handle, bad;
    struct builder p = new_program(1, 0, 1);
    struct spk_completion done;
    CASE("aborted");
    append(&p, SPK_OP_EXCHANGE)->arg[0] = 1;
    transfer(&p, SPK_OP_LINK_RECV, ref_at(window, 0, 0), BYTES);
    CHECK_EQUAL(load(card, &p, &handle, &bad, why), SPK_OK);
    uint8_t *memory = exact(BYTES);
    struct spk_lent lent = {.window = window, .memory = memory, .nbytes = BYTES};
    CHECK_EQUAL(lend(handle, &lent, 1), SPK_OK);
    CHECK_EQUAL(lend(handle, &lent, 1), SPK_OK);
    CHECK_EQUAL(spk_card_step(card), SPK_STEP_WAITING);
    CHECK(card->buffers[window].memory == memory);
    CHECK_EQUAL(spk_card_abort(card, 2), SPK_OK);
    while (spk_card_step(card) == SPK_STEP_RAN)
        ;
    for (int i = 0; i < 2; i++) {
        CHECK(spk_card_completion(card, &done));
        CHECK_EQUAL(done.status, SPK_E_ABORTED);
    }
    CHECK(card->buffers[window].memory == NULL);
    free(memory);
    CHECK_EQUAL(spk_card_unload_program(card, handle), SPK_OK);
}

/* --- meetings ------------------------------------------------------------------------------- */

static struct builder meeting_of(uint32_t buffer, uint32_t own, uint32_t count)
{
    struct builder p = new_program(1, 0, 1);
    struct spk_command *c = append(&p, SPK_OP_ALL_REDUCE);
    c->format = SPK_F32;
    c->ref[3] = ref_at(buffer, 0, 0);
    c->arg[0] = count, c->arg[3] = 1, c->arg[4] = 2, c->arg[5] = own;
    return p;
}

#define REFUSES_MEETING(status, change)                                                        \
    do {                                                                                       \
        CASE("%s", #change);                                                                   \
        struct builder p = meeting_of(window, 0, ELEMENTS);                                    \
        struct spk_command *c = p.commands;                                                    \
        change;                                                                                \
        CHECK_EQUAL(load(card, &p, &handle, &bad, why), status);                               \
    } while (0)

static void refuses_meetings_that_make_no_sense(void)
{
    uint32_t handle, bad;
    REFUSES_MEETING(SPK_OK, (void)c);
    CHECK_EQUAL(spk_card_unload_program(card, handle), SPK_OK);
    REFUSES_MEETING(SPK_E_ARG, c->format = SPK_Q4_0);
    REFUSES_MEETING(SPK_E_ARG, c->flags = SPK_FLAG_BULK);
    REFUSES_MEETING(SPK_E_ARG, c->flags = SPK_FLAG_OUTPUTS);
    REFUSES_MEETING(SPK_E_ARG, c->arg[1] = UINT32_MAX);
    REFUSES_MEETING(SPK_E_ARG, c->arg[2] = SPK_REDUCE_COUNT);
    REFUSES_MEETING(SPK_E_ARG, c->arg[3] = 0);
    REFUSES_MEETING(SPK_E_ARG, c->arg[3] = 65537);
    REFUSES_MEETING(SPK_E_ARG, c->arg[4] = 0);
    REFUSES_MEETING(SPK_E_ARG, c->arg[4] = 1);
    REFUSES_MEETING(SPK_E_ARG, c->arg[4] = 3);
    REFUSES_MEETING(SPK_E_ARG, c->arg[4] = UINT32_MAX);
    REFUSES_MEETING(SPK_E_ARG, c->arg[5] = 1);
    REFUSES_MEETING(SPK_E_ARG, c->arg[5] = UINT32_MAX);
    REFUSES_MEETING(SPK_E_ARG, c->ref[3].offset = 2);
    REFUSES_MEETING(SPK_E_BOUNDS, c->arg[0] = ELEMENTS + 1);
    REFUSES_MEETING(SPK_E_HANDLE, c->ref[3].buffer = 77);
}

static void run_both(void)
{
    while (spk_card_step(card) == SPK_STEP_RAN || spk_card_step(peer) == SPK_STEP_RAN)
        ;
}

static uint64_t submit_to(struct spk_card *c, uint32_t program)
{
    struct step s = new_step(0, 0, 0, 0, 0);
    uint64_t fence;
    memset(why, 0, sizeof why);
    CHECK_EQUAL(spk_card_submit(c, program, &s, step_bytes(&s), NULL, 0, &fence, why), SPK_OK);
    return fence;
}

/* Who finds that the others ask for something else gets an error, they wait until they are aborted,
 * and nobody's memory is touched. */
static void cards_that_meet_must_want_the_same(void)
{
    uint32_t there, bad, epoch = card->epoch > peer->epoch ? card->epoch : peer->epoch;
    CHECK_EQUAL(spk_card_alloc(peer, BYTES, &there), SPK_OK);
    for (uint32_t wrong = 0; wrong < 6; wrong++) {
        uint32_t here_program, there_program;
        float ones[ELEMENTS], got[ELEMENTS];
        struct spk_completion done;
        CASE("meeting, wrong %u", wrong);
        for (int i = 0; i < ELEMENTS; i++)
            ones[i] = 1;
        CHECK_EQUAL(spk_card_write(card, x, 0, ones, BYTES), SPK_OK);
        CHECK_EQUAL(spk_card_write(peer, there, 0, ones, BYTES), SPK_OK);
        struct builder p = meeting_of(x, 0, ELEMENTS), q = meeting_of(there, 1, ELEMENTS);
        if (wrong == 1)
            q.commands[0].arg[0]--;
        if (wrong == 2)
            q.commands[0].arg[2] = 1;
        if (wrong == 3)
            q.commands[0].arg[3] = 2;
        if (wrong == 4)
            q.commands[0].format = SPK_I32;
        CHECK_EQUAL(load(card, &p, &here_program, &bad, why), SPK_OK);
        CHECK_EQUAL(load(peer, &q, &there_program, &bad, why), SPK_OK);
        /* Both begin to count again; in the last round one of them alone, and they never meet. */
        epoch++;
        CHECK_EQUAL(spk_card_abort(card, epoch), SPK_OK);
        if (wrong != 5)
            CHECK_EQUAL(spk_card_abort(peer, epoch), SPK_OK);
        run_both();
        submit_to(card, here_program), submit_to(peer, there_program);
        run_both();
        if (wrong) {
            CHECK(!spk_card_completion(card, &done));
            CHECK_EQUAL(spk_card_completion(peer, &done), wrong != 5);
            CHECK(wrong == 5 || done.status == SPK_E_LINK);
            epoch++;
            CHECK_EQUAL(spk_card_abort(card, epoch), SPK_OK);
            CHECK_EQUAL(spk_card_abort(peer, epoch), SPK_OK);
            run_both();
        }
        int expected = wrong == 0 ? SPK_OK : SPK_E_ABORTED;
        CHECK(spk_card_completion(card, &done) && done.status == expected);
        if (wrong == 0 || wrong == 5)
            CHECK(spk_card_completion(peer, &done) && done.status == expected);
        CHECK_EQUAL(spk_card_read(card, x, 0, got, BYTES), SPK_OK);
        CHECK(got[0] == (wrong ? 1 : 2) && got[ELEMENTS - 1] == got[0]);
        CHECK_EQUAL(spk_card_read(peer, there, 0, got, BYTES), SPK_OK);
        CHECK(got[0] == (wrong ? 1 : 2) && got[ELEMENTS - 1] == got[0]);
        CHECK_EQUAL(spk_card_unload_program(card, here_program), SPK_OK);
        CHECK_EQUAL(spk_card_unload_program(peer, there_program), SPK_OK);
    }
}

int main(void)
{
    int status;
    spk_fp_enter();
    card = spk_card_create(DDR_BYTES, SPK_ISA_SCALAR, &status);
    CHECK_EQUAL(status, SPK_OK);
    peer = spk_card_create(DDR_BYTES, SPK_ISA_SCALAR, &status);
    CHECK_EQUAL(status, SPK_OK);
    CHECK_EQUAL(spk_card_alloc(card, BYTES, &x), SPK_OK);
    CHECK_EQUAL(spk_card_window(card, BYTES, &window), SPK_OK);
    CHECK_EQUAL(spk_card_alloc(card, BYTES, &y), SPK_OK);
    CHECK_EQUAL(spk_link_connect(card, 0, peer, 1, RING_BYTES), SPK_OK);
    refuses_what_makes_no_sense();
    neighbours_are_no_overlap();
    windows_have_no_memory_of_their_own();
    what_is_lent_must_fit();
    a_step_works_on_what_it_was_lent();
    an_aborted_step_lets_go();
    refuses_meetings_that_make_no_sense();
    cards_that_meet_must_want_the_same();
    spk_card_destroy(card), spk_card_destroy(peer);
    puts("ok card collectives");
    return 0;
}
