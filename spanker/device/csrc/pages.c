/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The system's pages behind a card's DDR.
 *
 * Large pieces are weights, read from end to end in every step: a quarter faster from huge pages
 * (27 against 22 GB/s, measured).  Nothing else gets them: a KV pool of which a page is used would
 * cost two megabytes a layer.
 *
 * A huge page comes in 0.2 ms where the system has one at hand.  Where other pages must be moved out
 * of the way, or a virtual machine's host must find the memory first, it takes 5 ms: seconds for a
 * model, before its first token.  The same memory in small pages takes 0.6 ms.  So where huge ones
 * are dearer, the rest of the weights goes to small ones, and a thread of the pool makes huge ones
 * of them once the writing is over.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include "card_internal.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; an older system says no: then they come one by one */
#endif

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1; an older system says no: nothing is lost but speed */
#endif

#define LARGE_WRITE ((size_t)64 << 10)
/* All huge pages of a card may take so long each, and so much longer together. */
#define HUGE_PAGE_NS 500000
#define PATIENCE_NS 10000000

/* What the host knows of a huge page's worth of DDR; what the engine writes changes nothing.
 * BUSY: a thread prepares it to be written, and whoever else wants to write there waits. */
enum { UNTOUCHED, BUSY, TOUCHED, HUGE, TO_COLLAPSE };

static int64_t clock_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Reserved, not committed: a 16 GB card costs what is written to it. */
bool pages_reserve(struct spk_card *c)
{
    if (c->ddr_bytes > UINT64_MAX - 2 * SPK_HUGE_PAGE)
        return false;
    c->huge_pages = (c->ddr_bytes + SPK_HUGE_PAGE - 1) / SPK_HUGE_PAGE;
    /* One more, to begin at a multiple. */
    c->mapping_bytes = (c->huge_pages + 1) * SPK_HUGE_PAGE;
    uint8_t *p = mmap(NULL, c->mapping_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED)
        return false;
    c->mapping = p;
    c->ddr = (uint8_t *)(((uintptr_t)p + SPK_HUGE_PAGE - 1) / SPK_HUGE_PAGE * SPK_HUGE_PAGE);
    c->page_state = calloc(c->huge_pages, sizeof *c->page_state); /* UNTOUCHED */
    return c->page_state != NULL;
}

bool pages_renew(struct spk_card *c)
{
    /* In its own place, zeros and no table of what was there. */
    void *p = mmap(c->mapping, c->mapping_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (p == MAP_FAILED)
        return false;
    for (uint64_t page = 0; page < c->huge_pages; page++)
        if (atomic_exchange(&c->page_state[page], UNTOUCHED) == TO_COLLAPSE)
            atomic_fetch_sub(&c->to_collapse, 1);
    atomic_store(&c->pages_waited_ns, 0);
    atomic_store(&c->small_pages, false);
    return true;
}

void pages_release(struct spk_card *c)
{
    if (c->mapping)
        munmap(c->mapping, c->mapping_bytes);
    free(c->page_state);
}

/* `within`: a byte of the page that the caller is about to write. */
static void take_huge(struct spk_card *c, uint64_t page, uint8_t *within)
{
    /* By this thread's own clock: that others had the core is no fault of the page. */
    int64_t begin = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    if (madvise(c->ddr + page * SPK_HUGE_PAGE, SPK_HUGE_PAGE, MADV_HUGEPAGE) != 0)
        return;
    *(volatile uint8_t *)within = 0;
    int64_t took = clock_ns(CLOCK_THREAD_CPUTIME_ID) - begin;
    atomic_fetch_add(&c->pages_waited_ns, took - HUGE_PAGE_NS);
}

static void take_small(struct spk_card *c, uint64_t page)
{
    /* All at once take three quarters of the time of one by one. */
    madvise(c->ddr + page * SPK_HUGE_PAGE, SPK_HUGE_PAGE, MADV_POPULATE_WRITE);
    atomic_fetch_add(&c->to_collapse, 1);
}

static void before_write(struct spk_card *c, uint64_t page, bool large, uint8_t *within)
{
    _Atomic uint8_t *state = &c->page_state[page];
    uint8_t found = atomic_load(state);
    for (;;) {
        if (found == HUGE || found == TO_COLLAPSE || (found == TOUCHED && !large))
            return;
        if (found == BUSY) {
            sched_yield();
            found = atomic_load(state);
        } else if (atomic_compare_exchange_strong(state, &found, large ? BUSY : TOUCHED)) {
            break;
        }
    }
    if (!large)
        return;
    bool huge = found == UNTOUCHED && atomic_load(&c->pages_waited_ns) < PATIENCE_NS;
    if (huge)
        take_huge(c, page, within);
    else
        take_small(c, page);
    atomic_store(state, huge ? HUGE : TO_COLLAPSE);
}

void pages_before_write(struct spk_card *c, uint8_t *at, uint64_t nbytes)
{
    if (!c->mapping)
        return; /* a front's memory, whose pages are its own */
    uint64_t begin = (uint64_t)(at - c->ddr), end = begin + nbytes;
    bool large = nbytes >= LARGE_WRITE && !atomic_load(&c->small_pages);
    /* Before a page can be found to collapse: the settler begins so much later. */
    if (large)
        atomic_store(&c->last_write_ns, (uint64_t)clock_ns(CLOCK_MONOTONIC));
    while (begin < end) {
        uint64_t page = begin / SPK_HUGE_PAGE;
        before_write(c, page, large, c->ddr + begin);
        begin = (page + 1) * SPK_HUGE_PAGE;
    }
    if (large && atomic_load(&c->to_collapse))
        pool_settle(c);
}

void pages_freed(struct spk_card *c, uint64_t offset, uint64_t nbytes)
{
    uint64_t end = c->mapping ? offset + nbytes : 0;
    for (uint64_t page = offset / SPK_HUGE_PAGE; page * SPK_HUGE_PAGE < end; page++) {
        _Atomic uint8_t *state = &c->page_state[page];
        uint64_t at = page * SPK_HUGE_PAGE;
        bool whole = at >= offset && at + SPK_HUGE_PAGE <= end;
        uint8_t expected = HUGE;
        /* A huge page that goes back in part falls apart.  A whole one can be had again; not so one
         * of small pages, where older systems leave a table that stands in its way. */
        if (atomic_compare_exchange_strong(state, &expected, whole ? UNTOUCHED : TOUCHED))
            continue;
        if (whole && atomic_exchange(state, TOUCHED) == TO_COLLAPSE)
            atomic_fetch_sub(&c->to_collapse, 1);
    }
}

bool pages_collapse_one(struct spk_card *c)
{
    if (!atomic_load(&c->to_collapse))
        return false;
    for (uint64_t page = 0; page < c->huge_pages; page++) {
        uint8_t expected = TO_COLLAPSE;
        /* Before it is one: should it be freed meanwhile, what that makes of it must stay. */
        if (!atomic_compare_exchange_strong(&c->page_state[page], &expected, HUGE))
            continue;
        atomic_fetch_sub(&c->to_collapse, 1);
        /* The bytes stay what they are; whoever uses them meanwhile waits for the copy. */
        madvise(c->ddr + page * SPK_HUGE_PAGE, SPK_HUGE_PAGE, MADV_COLLAPSE);
        return true;
    }
    return false;
}
