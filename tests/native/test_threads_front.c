/* SPDX-License-Identifier: Apache-2.0 */
/* Two linked cards behind registers while workers step them: each has a thread as in the server, which
 * sleeps until the core, or the clock, wants something. */
#include <errno.h>
#include <poll.h>

#include "front_test.h"

enum { ROUNDS = 60 };

struct half {
    struct rig *rig;
    uint32_t number;
    pthread_barrier_t *together;
    uint64_t seed;
};

static struct rig *rigs[2];

static void wait_for_news(struct rig *r)
{
    uint64_t until = spk_front_poll(r->front);
    struct pollfd fd = {.fd = spk_card_fd(r->core), .events = POLLIN};
    CHECK(poll(&fd, 1, until == UINT64_MAX ? 2 : 1) >= 0 || errno == EINTR);
    spk_front_poll(r->front);
}

static struct sail_completion next(struct rig *r)
{
    struct sail_completion c;
    for (int i = 0; !peek(r, &c); i++) {
        CHECK(i < 10000);
        wait_for_news(r);
    }
    r->taken++;
    set(r, SAIL_REG_COMPLETION_HEAD, r->taken);
    return c;
}

static void start_again(struct rig *r)
{
    set(r, SAIL_REG_CONTROL, SAIL_CONTROL_RESET);
    for (int i = 0; !(get(r, SAIL_REG_STATUS) & SAIL_STATUS_READY); i++) {
        CHECK(i < 10000);
        wait_for_news(r);
    }
    r->fence = 0;
    start_rings(r, 16);
}

static void load_exchange(struct half *h)
{
    struct builder b = new_program(4, 4, 64);
    append(&b, SPK_OP_EXCHANGE)->arg[0] = 2;
    struct spk_command *c = append(&b, SPK_OP_LINK_SEND);
    c->ref[0] = ref_at(0, 64, 0), c->arg[0] = !h->number, c->arg[1] = 64;
    c = append(&b, SPK_OP_LINK_RECV);
    c->ref[3] = ref_at(1, 64, 0), c->arg[0] = !h->number, c->arg[1] = 64;
    put(h->rig, loading(h->rig, 0, &b));
    set(h->rig, SAIL_REG_COMMAND_TAIL, h->rig->tail);
    CHECK_EQUAL(next(h->rig).status, SAIL_OK);
}

/* Rows go both ways; now and then both start anew, or one waits in vain and is aborted. */
static void *live(void *argument)
{
    struct half *h = argument;
    struct rig *r = h->rig;
    struct rng rng = {h->seed};
    for (uint32_t round = 0; round < ROUNDS; round++) {
        if (round % 8 == 0) {
            start_again(r);
            load_exchange(h);
            pthread_barrier_wait(h->together);
        }
        uint32_t steps = 1 + rng_below(&rng, 12), epoch = round % 8 + 1;
        set_floats(r, X_AT, (float)(2 * round + h->number));
        for (uint32_t i = 0; i < steps; i++)
            put(r, running(r, 0, 4));
        set(r, SAIL_REG_COMMAND_TAIL, r->tail);
        for (uint32_t i = 0; i < steps; i++) {
            struct sail_completion done = next(r);
            CHECK_EQUAL(done.status, SAIL_OK);
        }
        CHECK(float_at(r, Y_AT + 4 * N) == (float)(2 * round + !h->number));
        pthread_barrier_wait(h->together);
        if (round % 2 == h->number) {
            put(r, running(r, 0, 4));
            set(r, SAIL_REG_COMMAND_TAIL, r->tail);
            spk_front_poll(r->front);
        }
        set(r, SAIL_REG_LINK(!h->number) + SAIL_LINK_CONTROL, 0);
        set(r, SAIL_REG_LINK(!h->number) + SAIL_LINK_CONTROL, 1);
        set(r, SAIL_REG_EPOCH, epoch);
        if (round % 2 == h->number)
            CHECK_EQUAL(next(r).status, SAIL_E_ABORTED);
        for (int i = 0; get(r, SAIL_REG_EPOCH) != epoch; i++) {
            CHECK(i < 10000);
            wait_for_news(r);
        }
        pthread_barrier_wait(h->together);
    }
    return NULL;
}

int main(void)
{
    struct spk_card *cores[2];
    pthread_barrier_t together;
    pthread_t threads[2];
    struct half halves[2];
    int status;

    CASE("two cards, two workers");
    for (uint32_t i = 0; i < 2; i++) {
        rigs[i] = rig_core();
        rigs[i]->pooled = true;
        cores[i] = rigs[i]->core;
    }
    CHECK_EQUAL(spk_link_connect(cores[0], 0, cores[1], 1, RING_BYTES), SPK_OK);
    for (uint32_t i = 0; i < 2; i++)
        rig_front(rigs[i], 2, i);
    struct spk_pool *pool = spk_pool_create(cores, 2, 2, &status);
    CHECK_EQUAL(status, SPK_OK);
    pthread_barrier_init(&together, NULL, 2);
    for (uint32_t i = 0; i < 2; i++) {
        halves[i] = (struct half){rigs[i], i, &together, 7};
        CHECK_EQUAL(pthread_create(&threads[i], NULL, live, &halves[i]), 0);
    }
    for (uint32_t i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&together);
    spk_pool_destroy(pool);
    rig_destroy(rigs[0]);
    rig_destroy(rigs[1]);
    return 0;
}
