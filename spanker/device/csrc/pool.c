/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Workers: native threads that step cards.
 *
 * A worker drives its own cards and, when they cannot move, lends a hand to a card that can but
 * is not being stepped.  It spins for SPIN_NS while one of its cards waits for a link (the peer is
 * usually a few microseconds away), then sleeps on its doorbell, which every submission, abort and
 * link movement that concerns one of its cards rings.  A doorbell for each worker, and not one for
 * all: a needless wake takes the core of the thread that is still submitting to the other cards.
 * Cards in other processes ring none: who waits for one looks again every LOOK_AGAIN_NS.
 *
 * One more thread, the settler, makes huge pages where loading had to do without (pages.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "card_internal.h"

#define SPIN_NS 100000u
/* Who waits for another process looks so often. */
#define LOOK_AGAIN_NS 100000u
/* So long after the last large write: a load, and the first token after it, have the cores. */
#define SETTLE_AFTER_NS 250000000u
/* The last bit of a throttled card's wait: sleeping takes longer than that. */
#define PACE_SPIN_NS 20000u
#define HELP_NS 100000u
#define HELP_BESIDE_NS 1000000u

enum { ALONE = 1, BESIDE = 2 };

struct worker {
    struct spk_pool *pool;
    size_t number;
    pthread_t thread;
    _Alignas(64) _Atomic uint32_t doorbell;
    _Atomic uint32_t sleeping;
};

struct spk_pool {
    struct spk_card *cards[SPK_CARDS_MAX];
    _Atomic size_t card_count, worker_count;
    _Atomic int stop;
    _Atomic uint32_t pause; /* workers are to stand still, and so many do */
    _Atomic size_t paused;
    struct worker settler; /* without cards */
    bool settles;
    /* A host thread steps cards: no worker is woken for what it will find (ALONE), or not the one
     * in whose place it is (its number above BESIDE). */
    _Atomic uint64_t helped;
    struct worker workers[SPK_CARDS_MAX];
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* `timeout` NULL: however long it takes. */
static void futex_wait(_Atomic uint32_t *word, uint32_t seen, const struct timespec *timeout)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, timeout, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void ring(struct worker *w)
{
    atomic_fetch_add(&w->doorbell, 1);
    if (atomic_load(&w->sleeping))
        futex_wake(&w->doorbell);
}

void pool_notify(struct spk_card *c)
{
    struct worker *owner = c->owner;
    if (!owner)
        return;
    atomic_store(&c->ready, 1);
    uint64_t helped = atomic_load(&owner->pool->helped);
    if (helped == ALONE || helped == BESIDE + owner->number)
        return; /* whoever helps looks at `ready` when it stops */
    ring(owner);
    /* An owner of several cards may be busy with another one: someone idle can take this one. */
    struct spk_pool *p = owner->pool;
    if (p->card_count == p->worker_count || helped || atomic_load(&owner->sleeping))
        return;
    for (size_t i = 0; i < p->worker_count; i++) {
        if (atomic_load(&p->workers[i].sleeping)) {
            ring(&p->workers[i]);
            return;
        }
    }
}

static int try_step(struct spk_card *c)
{
    /* Someone else steps it and will let it go soon. */
    if (atomic_exchange(&c->stepping, 1))
        return SPK_STEP_WAITING;
    /* Before, so that news that come meanwhile are not forgotten. */
    atomic_store(&c->ready, 0);
    int result = spk_card_step(c);
    if (result == SPK_STEP_RAN)
        atomic_store(&c->ready, 1);
    atomic_store(&c->stepping, 0);
    return result;
}

/* One round over the cards.  Own cards are always tried, others only where work is known.
 * `wake_ns` is when the first of those will have something to do that are ahead of their time, and
 * `far` whether one of them waits for another process. */
static void round_over_cards(struct worker *w, bool *ran, bool *waiting, bool *far,
                             uint64_t *wake_ns)
{
    struct spk_pool *p = w->pool;
    for (size_t i = 0; i < p->card_count; i++) {
        if (p->cards[i]->owner != w)
            continue;
        int result = try_step(p->cards[i]);
        *ran |= result == SPK_STEP_RAN;
        *waiting |= result == SPK_STEP_WAITING;
        if (result == SPK_STEP_PACED && spk_card_wake_ns(p->cards[i]) < *wake_ns)
            *wake_ns = spk_card_wake_ns(p->cards[i]);
        *far |= result == SPK_STEP_WAITING && atomic_load(&p->cards[i]->waits_far);
    }
    for (size_t i = 0; i < p->card_count && !*ran; i++) {
        struct spk_card *c = p->cards[i];
        if (c->owner == w || !atomic_load(&c->ready) || atomic_load(&c->stepping))
            continue;
        *ran |= try_step(c) == SPK_STEP_RAN;
        /* Its own worker may have looked away meanwhile and must not miss what is left. */
        pool_notify(c);
    }
}

/* --- a host thread that lends a hand ------------------------------------------------------- */

bool pool_hush(struct spk_card *c, bool beside)
{
    uint64_t nobody = 0;
    if (!c->owner)
        return false;
    return atomic_compare_exchange_strong(&c->owner->pool->helped, &nobody,
                                          beside ? BESIDE + c->owner->number : ALONE);
}

static bool any_busy(struct spk_pool *p)
{
    bool busy = false;
    for (size_t i = 0; i < p->card_count && !busy; i++) {
        pthread_mutex_lock(&p->cards[i]->mutex);
        busy = p->cards[i]->queue_count > 0;
        pthread_mutex_unlock(&p->cards[i]->mutex);
    }
    return busy;
}

/* A card that rests, or waits for another process, needs a worker who looks again. */
static bool help(struct spk_card *c)
{
    int result = try_step(c);
    if (result == SPK_STEP_PACED ||
        (result == SPK_STEP_WAITING && atomic_load(&c->waits_far)))
        atomic_store(&c->ready, 1);
    return result == SPK_STEP_RAN;
}

void pool_help(struct spk_card *c, bool beside)
{
    struct spk_pool *p = c->owner->pool;
    uint64_t saved = spk_fp_enter(), begin = now_ns();
    uint64_t most = beside ? HELP_BESIDE_NS : HELP_NS;
    bool on = true;
    while (on && now_ns() - begin < most) {
        /* This card first: a worker may be on its way to the others. */
        on = atomic_load(&c->ready) && help(c);
        for (size_t i = 0; i < p->card_count; i++)
            if (atomic_load(&p->cards[i]->ready))
                on |= help(p->cards[i]);
        if (!on && beside) {
            relax();
            on = meeting_is_on(p->cards, p->card_count) && any_busy(p);
        }
    }
    spk_fp_leave(saved);
    atomic_store(&p->helped, 0);
    /* In this order: who found `helped` set has made a card ready before. */
    for (size_t i = 0; i < p->card_count; i++)
        if (atomic_load(&p->cards[i]->ready))
            pool_notify(p->cards[i]);
}

static void stand_still(struct spk_pool *p)
{
    atomic_fetch_add(&p->paused, 1);
    while (atomic_load(&p->pause))
        futex_wait(&p->pause, 1, NULL);
    atomic_fetch_sub(&p->paused, 1);
}

static void *work(void *argument)
{
    struct worker *w = argument;
    struct spk_pool *p = w->pool;
    uint64_t spin_since = 0;
    spk_fp_enter();
    /* Timers that are 50 us late by default would make every throttled step so much longer. */
    if (p->cards[0]->pace)
        prctl(PR_SET_TIMERSLACK, 1ul);
    while (!atomic_load(&p->stop)) {
        if (atomic_load(&p->pause))
            stand_still(p);
        uint32_t seen = atomic_load(&w->doorbell);
        bool ran = false, waiting = false, far = false;
        uint64_t wake_ns = UINT64_MAX;
        round_over_cards(w, &ran, &waiting, &far, &wake_ns);
        if (ran) {
            spin_since = 0;
            continue;
        }
        if (waiting) {
            uint64_t now = now_ns();
            if (!spin_since)
                spin_since = now;
            if (now - spin_since < SPIN_NS) {
                for (int i = 0; i < 8; i++)
                    relax();
                continue;
            }
        }
        struct timespec timeout, *until = NULL;
        if (far && wake_ns == UINT64_MAX)
            wake_ns = now_ns() + LOOK_AGAIN_NS;
        if (wake_ns != UINT64_MAX) {
            uint64_t now = now_ns(), left = wake_ns > now ? wake_ns - now : 0;
            if (left <= PACE_SPIN_NS) {
                relax();
                continue;
            }
            left -= PACE_SPIN_NS;
            timeout = (struct timespec){.tv_sec = (time_t)(left / 1000000000u),
                                        .tv_nsec = (long)(left % 1000000000u)};
            until = &timeout;
        }
        if (!far)
            spin_since = 0; /* once is enough for what it looks for again and again */
        atomic_store(&w->sleeping, 1);
        if (!atomic_load(&p->stop) && !atomic_load(&p->pause))
            futex_wait(&w->doorbell, seen, until);
        atomic_store(&w->sleeping, 0);
    }
    return NULL;
}

void pool_settle(struct spk_card *c)
{
    if (c->owner)
        ring(&c->owner->pool->settler);
}

/* When to collapse pages: SETTLE_AFTER_NS after the last large write to a card that has some; 0 when
 * none has. */
static uint64_t settle_time_ns(const struct spk_pool *p)
{
    uint64_t time = 0;
    for (size_t i = 0; i < p->card_count; i++) {
        uint64_t written = atomic_load(&p->cards[i]->last_write_ns);
        if (atomic_load(&p->cards[i]->to_collapse) && written + SETTLE_AFTER_NS > time)
            time = written + SETTLE_AFTER_NS;
    }
    return time;
}

static void *settle(void *argument)
{
    struct worker *w = argument;
    struct spk_pool *p = w->pool;
    for (;;) {
        /* First the doorbell: the end of the pool is told before it rings. */
        uint32_t seen = atomic_load(&w->doorbell);
        if (atomic_load(&p->stop))
            return NULL;
        uint64_t time = settle_time_ns(p), now = now_ns();
        if (!time) {
            atomic_store(&w->sleeping, 1);
            futex_wait(&w->doorbell, seen, NULL);
            atomic_store(&w->sleeping, 0);
        } else if (time > now) {
            /* Only the end of the pool interrupts this: more writing just makes it longer. */
            struct timespec left = {.tv_nsec = (long)(time - now)};
            futex_wait(&w->doorbell, seen, &left);
        } else {
            for (size_t i = 0; i < p->card_count && !pages_collapse_one(p->cards[i]); i++)
                ;
        }
    }
}

static bool start_worker(struct spk_pool *p)
{
    struct worker *w = &p->workers[p->worker_count];
    *w = (struct worker){.pool = p, .number = p->worker_count};
    if (pthread_create(&w->thread, NULL, work, w) != 0)
        return false;
    p->worker_count++;
    return true;
}

struct spk_pool *spk_pool_create(struct spk_card **cards, size_t count, size_t workers, int *status)
{
    *status = SPK_E_ARG;
    if (!count || !workers || workers > count || count > SPK_CARDS_MAX)
        return NULL;
    size_t nbytes = (sizeof(struct spk_pool) + 63) / 64 * 64;
    struct spk_pool *p = aligned_alloc(64, nbytes);
    *status = SPK_E_SYSTEM;
    if (!p)
        return NULL;
    memset(p, 0, nbytes);
    for (size_t i = 0; i < count; i++) {
        p->cards[i] = cards[i];
        cards[i]->owner = &p->workers[i % workers];
    }
    p->card_count = count;
    p->settler = (struct worker){.pool = p};
    p->settles = pthread_create(&p->settler.thread, NULL, settle, &p->settler) == 0;
    bool complete = p->settles;
    /* They begin once all are there. */
    atomic_store(&p->pause, 1);
    while (complete && p->worker_count < workers)
        complete = start_worker(p);
    spk_pool_resume(p);
    if (!complete) {
        spk_pool_destroy(p);
        return NULL;
    }
    *status = SPK_OK;
    return p;
}

void spk_pool_pause(struct spk_pool *p)
{
    atomic_store(&p->pause, 1);
    for (size_t i = 0; i < p->worker_count; i++)
        ring(&p->workers[i]);
    while (atomic_load(&p->paused) < p->worker_count)
        usleep(10);
}

void spk_pool_resume(struct spk_pool *p)
{
    atomic_store(&p->pause, 0);
    syscall(SYS_futex, &p->pause, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    /* Nobody is asleep who should not be. */
    for (size_t i = 0; i < p->worker_count; i++)
        ring(&p->workers[i]);
}

int spk_pool_add(struct spk_pool *p, struct spk_card *card, size_t workers)
{
    if (p->card_count == SPK_CARDS_MAX || card->owner)
        return SPK_E_ARG;
    bool more = p->worker_count < workers && p->worker_count < p->card_count + 1;
    if (more && !start_worker(p))
        return SPK_E_SYSTEM;
    card->owner = &p->workers[more ? p->worker_count - 1 : p->card_count % p->worker_count];
    p->cards[p->card_count] = card;
    p->card_count++;
    return SPK_OK;
}

void spk_pool_destroy(struct spk_pool *p)
{
    if (!p)
        return;
    atomic_store(&p->stop, 1);
    for (size_t i = 0; i < p->worker_count; i++)
        ring(&p->workers[i]);
    for (size_t i = 0; i < p->worker_count; i++)
        pthread_join(p->workers[i].thread, NULL);
    if (p->settles) {
        /* It may be waiting without being `sleeping`. */
        atomic_fetch_add(&p->settler.doorbell, 1);
        futex_wake(&p->settler.doorbell);
        pthread_join(p->settler.thread, NULL);
    }
    for (size_t i = 0; i < p->card_count; i++)
        p->cards[i]->owner = NULL;
    free(p);
}
