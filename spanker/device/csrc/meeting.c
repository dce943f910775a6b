/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ALL_REDUCE: the cards of one process meet, and each folds its share of everybody's arrays where
 * they lie and leaves the result in all of them.  Every byte is read once and written once, and
 * nothing goes through a ring.
 *
 * A card opens its memory to its peers under a key, its epoch and the number of the meeting.  It
 * works on theirs while `inside` says so, and only where all are open under its own key; so a card
 * that is aborted closes its memory and gives it back once nobody is inside any more, which is a
 * slice later at most.  A card that has done its share says so under the same key, and is finished
 * when everybody has.
 */
#include <string.h>

#include "card_internal.h"

/* Bytes that a card reads or writes in one slice, some 50 us: so long an abort waits. */
#define SLICE_BYTES (1u << 20)
/* A block of every array and the next of each are in a core's first cache together; longer ones ask
 * for more lines at once than a core can wait for, and take a fifth longer (measured). */
#define BLOCK_BYTES_MAX (1u << 10)
#define BLOCKS_BYTES (16u << 10)
#define LINE 64u

#if defined(__x86_64__)
#define PREFETCH_TARGET __attribute__((target("prfchw")))
#else
#define PREFETCH_TARGET
#endif

enum { ARRIVING, WAITING_FOR_ALL, FOLDING, WAITING_FOR_SHARES };


static uint64_t bytes_of(const struct spk_command *cmd)
{
    return bulk_count(cmd, 0) * spk_element_bytes(cmd->format);
}

/* Where share `card` begins: whole cache lines, so that no two cards write to the same one. */
static uint64_t share_at(const struct spk_command *cmd, uint64_t card)
{
    uint64_t bytes = bytes_of(cmd), lines = (bytes + LINE - 1) / LINE, cards = cmd->arg[4];
    uint64_t at = (lines / cards * card + lines % cards * card / cards) * LINE;
    return at < bytes ? at : bytes;
}

static uint64_t share_bytes(const struct spk_command *cmd, uint64_t card)
{
    return share_at(cmd, card + 1) - share_at(cmd, card);
}

static bool same_work(const struct spk_command *a, const struct spk_command *b)
{
    return a->op == b->op && a->format == b->format &&
           memcmp(a->arg, b->arg, MEETING_ARGS_ALIKE * sizeof *a->arg) == 0;
}

/* Every meeting is one of all cards, so that all count alike. */
static uint64_t key_of(const struct spk_card *c)
{
    return (uint64_t)c->epoch << 32 | c->meeting->number;
}

/* The first peer that has not opened its memory under this card's key, or whose link is down; -1. */
static int32_t missing_from(const struct spk_card *c, uint32_t cards, uint64_t key)
{
    for (uint32_t i = 0; i < cards; i++) {
        const struct spk_card *peer = c->links[i].peer;
        if (c->links[i].direct.tx && (!peer || atomic_load(&peer->meeting->open) != key ||
                               atomic_load(&c->links[i].wire->down)))
            return (int32_t)i;
    }
    return -1;
}

static int32_t unfinished_of(const struct spk_card *c, uint32_t cards, uint64_t key)
{
    for (uint32_t i = 0; i < cards; i++) {
        const struct spk_card *peer = c->links[i].peer;
        if (c->links[i].direct.tx && (!peer || atomic_load(&peer->meeting->done) != key))
            return (int32_t)i;
    }
    return -1;
}

static void tell_all(const struct spk_card *c, uint32_t cards)
{
    for (uint32_t i = 0; i < cards; i++)
        if (c->links[i].peer)
            pool_notify(c->links[i].peer);
}

static void count_sent(struct link *l, uint64_t bytes)
{
    atomic_fetch_add_explicit(&l->tx_bytes, bytes, memory_order_relaxed);
}

static void count_received(struct link *l, uint64_t bytes)
{
    atomic_fetch_add_explicit(&l->rx_bytes, bytes, memory_order_relaxed);
}

static void open_memory(struct spk_card *c, const struct spk_command *cmd)
{
    struct meeting *m = c->meeting;
    m->number++;
    m->memory = card_at(c, &cmd->ref[3]);
    m->work = cmd;
    atomic_store(&m->open, key_of(c));
}

/* Everybody is there: what each owner needs of this card's array is at its disposal. */
static int enter(struct spk_card *c, const struct spk_command *cmd)
{
    for (uint32_t i = 0; i < cmd->arg[4]; i++) {
        struct link *l = &c->links[i];
        if (!l->direct.tx)
            continue;
        if (!same_work(l->peer->meeting->work, cmd))
            return SPK_E_LINK;
        count_sent(l, share_bytes(cmd, i));
    }
    return SPK_OK;
}

/* The next block of every array: asked for as one's own, or each line would be fetched twice, to be
 * read and to be written.  Without the feature the compiler makes it a request for reading; processors
 * that have no such instruction take it for none. */
PREFETCH_TARGET static void prefetch(uint8_t *const *arrays, uint32_t cards, uint64_t at, uint64_t bytes)
{
    for (uint32_t i = 0; i < cards; i++)
        for (uint64_t j = 0; j < bytes; j += LINE)
            __builtin_prefetch(arrays[i] + at + j, 1);
}

static void fold(struct spk_card *c, const struct spk_command *cmd, uint8_t *const *arrays,
                 uint64_t begin, uint64_t end)
{
    const struct spk_kernels *k = c->kernels;
    uint32_t cards = cmd->arg[4], by = cmd->arg[3];
    uint64_t size = spk_element_bytes(cmd->format), n;
    uint64_t block = BLOCKS_BYTES / cards / LINE * LINE;
    block = block > BLOCK_BYTES_MAX ? BLOCK_BYTES_MAX : block;
    prefetch(arrays, cards, begin, end - begin < block ? end - begin : block);
    for (uint64_t at = begin; at < end; at += n) {
        n = end - at < block ? end - at : block;
        uint64_t left = end - at - n;
        prefetch(arrays, cards, at + n, left < block ? left : block);
        for (uint32_t i = 1; i < cards; i++)
            k->reduce(cmd->format, (int)cmd->arg[2], arrays[0] + at, arrays[i] + at, n / size);
        if (by > 1)
            k->divide(cmd->format, arrays[0] + at, by, n / size);
        for (uint32_t i = 1; i < cards; i++)
            memcpy(arrays[i] + at, arrays[0] + at, n);
    }
}

/* A slice of this card's share; `open` is false when a peer has closed its memory meanwhile: an
 * abort is on its way to this card, too. */
static int fold_some(struct spk_card *c, const struct spk_command *cmd, uint64_t key, bool *open)
{
    uint8_t *arrays[SPK_CARDS_MAX];
    uint32_t cards = cmd->arg[4], own = cmd->arg[5];
    uint64_t end = share_at(cmd, own + 1), at = share_at(cmd, own) + c->run.cursor2;
    uint64_t slice = SLICE_BYTES / 2 / cards / LINE * LINE;
    slice = slice > LINE ? slice : LINE;
    slice = slice < end - at ? slice : end - at;
    /* Sequentially consistent on both sides: either this card sees that a peer has closed, or the
     * peer sees that this card is inside. */
    int status = SPK_OK;
    atomic_store(&c->meeting->inside, 1);
    *open = missing_from(c, cards, key) < 0;
    if (*open && !c->run.cursor2)
        status = enter(c, cmd);
    if (*open && status == SPK_OK) {
        for (uint32_t i = 0; i < cards; i++)
            arrays[i] = i == own ? c->meeting->memory : c->links[i].peer->meeting->memory;
        fold(c, cmd, arrays, at, at + slice);
        c->run.cursor2 += slice;
        atomic_fetch_add_explicit(&c->ddr_read, slice * cards, memory_order_relaxed);
        atomic_fetch_add_explicit(&c->ddr_written, slice * cards, memory_order_relaxed);
    }
    atomic_store_explicit(&c->meeting->inside, 0, memory_order_release);
    return status;
}

static void leave_share(struct spk_card *c, const struct spk_command *cmd, uint64_t key)
{
    uint64_t bytes = share_bytes(cmd, cmd->arg[5]);
    for (uint32_t i = 0; i < cmd->arg[4]; i++) {
        if (!c->links[i].direct.tx)
            continue;
        count_received(&c->links[i], bytes);
        count_sent(&c->links[i], bytes);
    }
    atomic_store(&c->meeting->done, key);
    tell_all(c, cmd->arg[4]);
}

int meet(struct spk_card *c, const struct spk_command *cmd, bool *done, bool *waiting)
{
    struct execution *run = &c->run;
    uint32_t cards = cmd->arg[4];
    int32_t waits_for = -1;
    uint64_t key = key_of(c);
    bool open;
    int status;

    switch (run->cursor) {
    case ARRIVING:
        open_memory(c, cmd);
        key = key_of(c);
        run->cursor = WAITING_FOR_ALL;
        /* The others need to know of the last one, who is whoever finds all open. */
        if (missing_from(c, cards, key) < 0)
            tell_all(c, cards);
        /* fall through */
    case WAITING_FOR_ALL:
        waits_for = missing_from(c, cards, key);
        if (waits_for >= 0)
            break;
        run->cursor = FOLDING;
        /* fall through */
    case FOLDING:
        status = fold_some(c, cmd, key, &open);
        if (status != SPK_OK)
            return status;
        if (!open) {
            waits_for = missing_from(c, cards, key);
            break;
        }
        if (run->cursor2 == share_bytes(cmd, cmd->arg[5])) {
            leave_share(c, cmd, key);
            run->cursor = WAITING_FOR_SHARES;
        }
        return SPK_OK;
    default:
        waits_for = unfinished_of(c, cards, key);
        if (waits_for >= 0)
            break;
        for (uint32_t i = 0; i < cards; i++)
            if (c->links[i].direct.tx)
                count_received(&c->links[i], share_bytes(cmd, i));
        *done = true;
        return SPK_OK;
    }
    *waiting = true;
    atomic_store_explicit(&c->waiting_for, waits_for, memory_order_relaxed);
    return SPK_OK;
}

bool meeting_left(struct spk_card *c)
{
    atomic_store(&c->meeting->open, 0);
    for (int i = 0; i < SPK_CARDS_MAX; i++) {
        const struct spk_card *peer = c->links[i].peer;
        if (peer && atomic_load(&peer->meeting->inside))
            return false;
    }
    return true;
}

bool meeting_is_on(struct spk_card *const *cards, size_t count)
{
    uint64_t key = atomic_load(&cards[0]->meeting->open);
    for (size_t i = 1; i < count; i++)
        if (atomic_load(&cards[i]->meeting->open) != key)
            return false;
    return key != 0;
}
