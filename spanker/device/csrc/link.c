/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Links: a ring of bytes in each direction, one producer and one consumer.
 *
 * A message is a header and up to MESSAGE_MAX bytes of payload, padded to 8; it is published by
 * one store to `tail` once it is complete.  It carries the epoch of its sender: after an abort,
 * what an earlier epoch left in a ring is dropped.  docs/api/wire-protocol.md has the layout.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "card_internal.h"

#define MESSAGE_MAX 65536u
#define RING_BYTES_MIN (2 * (MESSAGE_MAX + 64))
#define RING_BYTES_MAX ((uint64_t)1 << 32)
#define HOST_RING_BYTES (1u << 18)
#define CRC_TRIES 3
/* A message that a core's first cache holds: the CRC brings it there, the copy finds it. */
#define SEND_BYTES 16384u
/* A transfer moves so much, then others get their turn and aborts are noticed. */
#define SLICE_BYTES (1u << 19)

struct message {
    uint32_t epoch;
    uint32_t bytes;
    uint64_t sequence;
    uint32_t crc; /* CRC32C of the fields above and the payload */
    uint32_t reserved;
};

#define CRC_COVERS offsetof(struct message, crc)

static uint64_t padded(uint64_t bytes)
{
    return sizeof(struct message) + (bytes + 7) / 8 * 8;
}

/* A ring and how long it is, which is not in memory that the far end may be able to write to. */
struct ring_view {
    struct ring *ring;
    uint64_t capacity;
};

static struct ring_view sending(const struct way *w)
{
    return (struct ring_view){w->tx, w->capacity};
}

static struct ring_view receiving(const struct way *w)
{
    return (struct ring_view){w->rx, w->capacity};
}

/* The part of [position, position + n) that lies before the ring's end. */
static uint64_t before_wrap(struct ring_view r, uint64_t position, uint64_t n)
{
    uint64_t room = r.capacity - position % r.capacity;
    return n < room ? n : room;
}

static void ring_put(struct ring_view r, uint64_t position, const void *data, uint64_t n)
{
    uint64_t first = before_wrap(r, position, n);
    memcpy(r.ring->data + position % r.capacity, data, first);
    memcpy(r.ring->data, (const uint8_t *)data + first, n - first);
}

static void ring_get(struct ring_view r, uint64_t position, void *data, uint64_t n)
{
    uint64_t first = before_wrap(r, position, n);
    memcpy(data, r.ring->data + position % r.capacity, first);
    memcpy((uint8_t *)data + first, r.ring->data, n - first);
}

static uint32_t ring_crc(struct ring_view r, uint32_t crc, uint64_t position, uint64_t n)
{
    uint64_t first = before_wrap(r, position, n);
    crc = spk_crc32c(crc, r.ring->data + position % r.capacity, first);
    return spk_crc32c(crc, r.ring->data, n - first);
}

/* --- a link and its ends --------------------------------------------------------------------- */

/* What both ends share begins with the wire; then come the rings, that of end 1 to send first. */
#define RINGS_AT 4096u

static uint64_t ring_span(uint64_t ring_bytes)
{
    return (sizeof(struct ring) + ring_bytes + 4095) / 4096 * 4096;
}

static uint64_t link_bytes(uint64_t ring_bytes)
{
    return RINGS_AT + 2 * ring_span(ring_bytes);
}

/* Nothing that is under way will ever arrive. */
static void skip_all(struct way *w)
{
    if (!w->tx)
        return;
    atomic_store(&w->tx->forget, atomic_load(&w->tx->tail));
    atomic_store(&w->rx->head, atomic_load(&w->rx->tail));
}

static void link_begin(struct link *l)
{
    atomic_fetch_and(&l->wire->down, ~l->end);
    skip_all(&l->direct);
}

/* Leaves what goes over the host. */
static void detach(struct link *l)
{
    if (l->wire)
        munmap(l->wire, link_bytes(l->direct.capacity));
    *l = (struct link){.host = l->host};
}

static bool is_ring(uint64_t bytes)
{
    return bytes % 8 == 0 && bytes >= RING_BYTES_MIN && bytes <= RING_BYTES_MAX;
}

int spk_link_create(uint64_t ring_bytes)
{
    if (!is_ring(ring_bytes))
        return -1;
    int fd = memfd_create("spanker-link", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, (off_t)link_bytes(ring_bytes)) != 0) {
        close(fd);
        fd = -1;
    }
    return fd;
}

int spk_link_attach(struct spk_card *c, uint32_t peer, int fd, uint32_t end, uint64_t ring_bytes)
{
    struct stat status;
    if (peer >= SPK_CARDS_MAX || c->links[peer].direct.tx || end < 1 || end > 2 ||
        !is_ring(ring_bytes) || fstat(fd, &status) != 0 ||
        (uint64_t)status.st_size != link_bytes(ring_bytes))
        return SPK_E_ARG;
    uint8_t *at = mmap(NULL, link_bytes(ring_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return SPK_E_SYSTEM;
    struct ring *first = (struct ring *)(at + RINGS_AT);
    struct ring *second = (struct ring *)(at + RINGS_AT + ring_span(ring_bytes));
    struct link *l = &c->links[peer];
    *l = (struct link){.direct = {.tx = end == 1 ? first : second,
                                  .rx = end == 1 ? second : first,
                                  .capacity = ring_bytes},
                       .host = l->host,
                       .wire = (struct wire *)at,
                       .end = end,
                       .far = true};
    /* Whoever had this end before has left it as it was. */
    link_begin(l);
    return SPK_OK;
}

int spk_link_detach(struct spk_card *c, uint32_t peer)
{
    if (peer >= SPK_CARDS_MAX || !c->links[peer].far)
        return SPK_E_ARG;
    detach(&c->links[peer]);
    return SPK_OK;
}

int spk_link_connect(struct spk_card *a, uint32_t number_a, struct spk_card *b, uint32_t number_b,
                     uint64_t ring_bytes)
{
    if (a == b || number_a >= SPK_CARDS_MAX || number_b >= SPK_CARDS_MAX ||
        a->links[number_b].direct.tx || b->links[number_a].direct.tx || !is_ring(ring_bytes))
        return SPK_E_ARG;
    int fd = spk_link_create(ring_bytes), status = SPK_E_SYSTEM;
    if (fd < 0)
        return status;
    status = spk_link_attach(a, number_b, fd, 1, ring_bytes);
    if (status == SPK_OK)
        status = spk_link_attach(b, number_a, fd, 2, ring_bytes);
    close(fd);
    if (status != SPK_OK) {
        detach(&a->links[number_b]);
        return status;
    }
    a->links[number_b].peer = b;
    b->links[number_a].peer = a;
    a->links[number_b].far = b->links[number_a].far = false;
    return SPK_OK;
}

void spk_link_disconnect(struct spk_card *a, uint32_t number_a, struct spk_card *b,
                         uint32_t number_b)
{
    if (a->links[number_b].peer != b || b->links[number_a].peer != a)
        return;
    detach(&a->links[number_b]);
    detach(&b->links[number_a]);
}

static struct ring *ring_create(uint64_t capacity)
{
    struct ring *r = aligned_alloc(64, (sizeof *r + capacity + 63) / 64 * 64);
    if (r) {
        atomic_init(&r->head, 0);
        atomic_init(&r->tail, 0);
        atomic_init(&r->forget, 0);
    }
    return r;
}

bool link_host(struct spk_card *c, uint32_t peer)
{
    struct way *w = &c->links[peer].host;
    if (w->tx)
        return true;
    struct ring *tx = ring_create(HOST_RING_BYTES), *rx = ring_create(HOST_RING_BYTES);
    if (!tx || !rx) {
        free(tx);
        free(rx);
        return false;
    }
    w->tx = tx;
    w->rx = rx;
    w->capacity = HOST_RING_BYTES;
    c->hosted++;
    return true;
}

void link_release(struct spk_card *c)
{
    for (int i = 0; i < SPK_CARDS_MAX; i++) {
        struct link *l = &c->links[i];
        /* Nobody steps either card now; the peer may go on, and finds nobody to wake. */
        for (int j = 0; l->peer && j < SPK_CARDS_MAX; j++)
            if (l->peer->links[j].peer == c)
                l->peer->links[j].peer = NULL;
        detach(l);
        free(l->host.tx);
        free(l->host.rx);
    }
}

void link_new_epoch(struct spk_card *c)
{
    for (int i = 0; i < SPK_CARDS_MAX; i++) {
        struct link *l = &c->links[i];
        l->direct.tx_sequence = l->direct.rx_sequence = 0;
        l->host.tx_sequence = l->host.rx_sequence = 0;
    }
    c->meeting->number = 0;
    memset(c->transfers, 0, sizeof c->transfers);
}

void link_restart(struct spk_card *c)
{
    link_new_epoch(c);
    atomic_store(&c->meeting->done, 0); /* meetings are counted anew */
    for (int i = 0; i < SPK_CARDS_MAX; i++) {
        struct link *l = &c->links[i];
        skip_all(&l->direct);
        skip_all(&l->host);
        if (l->peer)
            pool_notify(l->peer);
    }
}

void link_renew(struct spk_card *c)
{
    for (int i = 0; i < SPK_CARDS_MAX; i++) {
        struct link *l = &c->links[i];
        if (l->wire)
            link_begin(l);
        atomic_store(&l->corrupt, 0);
        l->tx_bytes = l->rx_bytes = l->errors = 0;
    }
    link_restart(c);
}

/* --- up and down ----------------------------------------------------------------------------- */

static bool is_down(const struct link *l)
{
    return !l->wire || atomic_load_explicit(&l->wire->down, memory_order_relaxed) != 0;
}

void spk_card_link_want(struct spk_card *c, uint32_t peer, int up)
{
    if (peer >= SPK_CARDS_MAX || !c->links[peer].wire)
        return;
    struct link *l = &c->links[peer];
    if (up)
        atomic_fetch_and(&l->wire->down, ~l->end);
    else
        atomic_fetch_or(&l->wire->down, l->end);
    /* Both ends may have something to send, and those who watch over them to tell. */
    card_signal(c);
    pool_notify(c);
    if (l->peer) {
        card_signal(l->peer);
        pool_notify(l->peer);
    }
}

int spk_card_link_state(struct spk_card *c, uint32_t peer)
{
    if (peer >= SPK_CARDS_MAX || !c->links[peer].wire)
        return SPK_LINK_NONE;
    const struct link *l = &c->links[peer];
    uint32_t down = atomic_load(&l->wire->down);
    return down & l->end ? SPK_LINK_DOWN : down ? SPK_LINK_WAITS : SPK_LINK_UP;
}

void spk_card_corrupt(struct spk_card *c, uint32_t peer, uint32_t messages)
{
    if (peer < SPK_CARDS_MAX)
        atomic_store(&c->links[peer].corrupt, messages);
}

uint64_t spk_card_link_errors(struct spk_card *c, uint32_t peer)
{
    return peer < SPK_CARDS_MAX ? atomic_load(&c->links[peer].errors) : 0;
}

/* --- one transfer ---------------------------------------------------------------------------- */

/* What a transfer moves: `count` rows of `bytes`, `stride` apart, as one stream of bytes. */
struct rows {
    uint8_t *base;
    uint64_t count, bytes, stride;
};

static struct rows rows_of(const struct spk_card *c, const struct spk_command *x)
{
    const struct spk_ref *ref = &x->ref[x->op == SPK_OP_LINK_SEND ? 0 : 3];
    if (x->flags & SPK_FLAG_BULK)
        return (struct rows){card_at(c, ref), 1, bulk_count(x, 1), 0};
    return (struct rows){card_at(c, ref),
                         x->flags & SPK_FLAG_OUTPUTS ? c->run.outputs : c->run.tokens, x->arg[1],
                         ref->stride};
}

/* The first contiguous piece of n bytes of the stream, from byte `from`. */
static uint8_t *piece_at(const struct rows *rows, uint64_t from, uint64_t n, uint64_t *piece)
{
    uint64_t row = from / rows->bytes, in_row = from % rows->bytes, left = rows->bytes - in_row;
    *piece = left < n ? left : n;
    return rows->base + row * rows->stride + in_row;
}

/* Copies bytes of the stream into a ring; the CRC goes on over them. */
static uint32_t put_rows(struct ring_view r, uint64_t position, const struct rows *rows,
                         uint64_t from, uint64_t n, uint32_t crc)
{
    uint64_t piece;
    for (; n; n -= piece, from += piece, position += piece) {
        const uint8_t *memory = piece_at(rows, from, n, &piece);
        piece = before_wrap(r, position, piece);
        crc = spk_copy_crc32c(crc, r.ring->data + position % r.capacity, memory, piece);
    }
    return crc;
}

static void get_rows(struct ring_view r, uint64_t position, const struct rows *rows,
                     uint64_t from, uint64_t n)
{
    uint64_t piece;
    for (; n; n -= piece, from += piece, position += piece) {
        uint8_t *memory = piece_at(rows, from, n, &piece);
        ring_get(r, position, memory, piece);
    }
}

static bool send_some(struct spk_card *c, struct link *l, struct way *w, const struct rows *rows,
                      uint64_t total, struct transfer *t)
{
    struct ring_view view = sending(w);
    struct ring *r = view.ring;
    uint64_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed), sent = 0;
    while (t->done_bytes < total && sent < SLICE_BYTES) {
        uint64_t left = total - t->done_bytes, n = left < SEND_BYTES ? left : SEND_BYTES;
        uint64_t head = atomic_load_explicit(&r->head, memory_order_acquire);
        if (view.capacity - (tail - head) < padded(n))
            break;
        struct message m = {.epoch = c->epoch, .bytes = (uint32_t)n, .sequence = w->tx_sequence++};
        m.crc = put_rows(view, tail + sizeof m, rows, t->done_bytes, n, spk_crc32c(0, &m, CRC_COVERS));
        if (atomic_load_explicit(&l->corrupt, memory_order_relaxed)) {
            atomic_fetch_sub(&l->corrupt, 1);
            r->data[(tail + sizeof m) % view.capacity] ^= 1;
        }
        ring_put(view, tail, &m, sizeof m);
        tail += padded(n);
        atomic_store_explicit(&r->tail, tail, memory_order_release);
        t->done_bytes += n;
        sent += n;
    }
    atomic_fetch_add_explicit(&l->tx_bytes, sent, memory_order_relaxed);
    return sent != 0;
}

static int receive_some(struct spk_card *c, struct link *l, struct way *w, const struct rows *rows,
                        uint64_t total, struct transfer *t, bool *moved)
{
    struct ring_view view = receiving(w);
    struct ring *r = view.ring;
    uint64_t head = atomic_load_explicit(&r->head, memory_order_relaxed), received = 0;
    uint64_t forget = atomic_load_explicit(&r->forget, memory_order_acquire);
    if (head < forget) {
        head = forget;
        atomic_store_explicit(&r->head, head, memory_order_release);
        *moved = true;
    }
    while (t->done_bytes < total && received < SLICE_BYTES) {
        uint64_t tail = atomic_load_explicit(&r->tail, memory_order_acquire);
        if (tail == head)
            break;
        struct message m;
        if (tail - head < sizeof m)
            return SPK_E_LINK;
        ring_get(view, head, &m, sizeof m);
        if (m.bytes > MESSAGE_MAX || padded(m.bytes) > tail - head)
            return SPK_E_LINK;
        /* Epochs only grow: a message from ahead waits until this card has been aborted too. */
        if (m.epoch > c->epoch)
            break;
        if (m.epoch == c->epoch) {
            uint64_t payload = head + sizeof m;
            if (m.sequence != w->rx_sequence || m.bytes > total - t->done_bytes)
                return SPK_E_LINK;
            int tries = 0;
            while (ring_crc(view, spk_crc32c(0, &m, CRC_COVERS), payload, m.bytes) != m.crc)
                if (++tries == CRC_TRIES)
                    return SPK_E_LINK;
            get_rows(view, payload, rows, t->done_bytes, m.bytes);
            t->done_bytes += m.bytes;
            w->rx_sequence++;
        }
        /* Dropped ones too: what was sent and is not counted here still waits to be taken. */
        atomic_fetch_add_explicit(&l->rx_bytes, m.bytes, memory_order_relaxed);
        received += m.bytes;
        head += padded(m.bytes);
        atomic_store_explicit(&r->head, head, memory_order_release);
        *moved = true;
    }
    return SPK_OK;
}

/* The host has something to take, or room for what it has. */
static void tell_host(struct spk_card *c, bool sent, struct way *w)
{
    if (sent || atomic_exchange(&w->full, 0))
        card_signal(c);
}

/* All transfers of an exchange advance together: no order of sends and receives can deadlock. */
int link_exchange(struct spk_card *c, bool *done, bool *waiting)
{
    struct execution *run = &c->run;
    const struct spk_command *cmd = &run->submission.program->commands[run->pc];
    uint32_t count = cmd->arg[0], finished = 0;
    int32_t waits_for = -1;
    bool moved = false, far = false;
    /* Peers with an unfinished transfer, by direction: a later one must not overtake it. */
    bool behind[2][SPK_CARDS_MAX] = {{false}};

    if (run->cursor == 0) {
        memset(c->transfers, 0, count * sizeof *c->transfers);
        run->cursor = 1;
    }
    for (uint32_t i = 0; i < count; i++) {
        const struct spk_command *x = cmd + 1 + i;
        struct link *l = &c->links[x->arg[0]];
        bool host = x->flags & SPK_FLAG_HOST;
        struct way *w = host ? &l->host : &l->direct;
        struct rows rows = rows_of(c, x);
        uint64_t total = rows.count * rows.bytes;
        bool *unfinished = &behind[x->op == SPK_OP_LINK_SEND][x->arg[0]];
        if (c->transfers[i].done_bytes < total && !*unfinished) {
            bool some = false;
            if (!host && is_down(l)) {
                /* What is in the rings, and whoever waits, stays there. */
            } else if (x->op == SPK_OP_LINK_SEND) {
                some = send_some(c, l, w, &rows, total, &c->transfers[i]);
            } else {
                int status = receive_some(c, l, w, &rows, total, &c->transfers[i], &some);
                if (status != SPK_OK) {
                    atomic_fetch_add(&l->errors, 1);
                    return status;
                }
            }
            if (some && host)
                tell_host(c, x->op == SPK_OP_LINK_SEND, w);
            else if (some && l->peer)
                pool_notify(l->peer);
            moved |= some;
        }
        if (c->transfers[i].done_bytes == total) {
            finished++;
        } else {
            *unfinished = true;
            far |= !host && l->far;
            waits_for = (int32_t)x->arg[0];
        }
    }
    *done = finished == count;
    *waiting = !*done && !moved;
    atomic_store_explicit(&c->waits_far, *waiting && far, memory_order_relaxed);
    if (*waiting)
        atomic_store_explicit(&c->waiting_for, waits_for, memory_order_relaxed);
    return SPK_OK;
}

/* --- over the host --------------------------------------------------------------------------- */

int spk_card_relays(struct spk_card *c)
{
    return c->hosted != 0;
}

size_t spk_card_relay_take(struct spk_card *c, uint32_t *peer, void *messages)
{
    for (uint32_t i = 0; i < SPK_CARDS_MAX && c->hosted; i++) {
        struct ring_view view = sending(&c->links[i].host);
        struct ring *r = view.ring;
        if (!r)
            continue;
        uint64_t begin = atomic_load_explicit(&r->head, memory_order_relaxed);
        uint64_t forget = atomic_load_explicit(&r->forget, memory_order_acquire);
        uint64_t tail = atomic_load_explicit(&r->tail, memory_order_acquire);
        begin = begin < forget ? forget : begin;
        uint64_t end = begin;
        while (end < tail) {
            struct message m;
            ring_get(view, end, &m, sizeof m);
            if (end + padded(m.bytes) - begin > SPK_RELAY_BYTES)
                break;
            end += padded(m.bytes);
        }
        if (end > begin)
            ring_get(view, begin, messages, end - begin);
        atomic_store_explicit(&r->head, end, memory_order_release);
        if (end > begin) {
            pool_notify(c); /* it may have waited for room */
            *peer = i;
            return end - begin;
        }
    }
    return 0;
}

static bool are_messages(const uint8_t *at, size_t nbytes)
{
    while (nbytes) {
        struct message m;
        if (nbytes < sizeof m)
            return false;
        memcpy(&m, at, sizeof m);
        if (m.bytes > MESSAGE_MAX || padded(m.bytes) > nbytes)
            return false;
        at += padded(m.bytes);
        nbytes -= padded(m.bytes);
    }
    return true;
}

int spk_card_relay_put(struct spk_card *c, uint32_t peer, const void *messages, size_t nbytes)
{
    if (peer >= SPK_CARDS_MAX)
        return SPK_E_ARG;
    struct ring_view view = receiving(&c->links[peer].host);
    struct ring *r = view.ring;
    if (!r || nbytes > SPK_RELAY_BYTES || !are_messages(messages, nbytes))
        return SPK_E_ARG;
    uint64_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);
    /* Before looking, so that room that is made meanwhile is told of. */
    atomic_store(&c->links[peer].host.full, 1);
    if (view.capacity - (tail - atomic_load(&r->head)) < nbytes)
        return SPK_E_BUSY;
    atomic_store(&c->links[peer].host.full, 0);
    ring_put(view, tail, messages, nbytes);
    atomic_store_explicit(&r->tail, tail + nbytes, memory_order_release);
    pool_notify(c);
    return SPK_OK;
}
