/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests of the card protocol, one function each.  What comes from the host is checked before it is
 * used: here that a body is as long as its kind has it, by the card all that it names.
 */
#include "answer.h"

#include <stdio.h>
#include <string.h>

#include "spanker_card.h"
#include "spk_kernels.h"

_Static_assert(SPK_WIRE_REQUEST_MAX >= sizeof(struct spk_program_header) +
                                           SPK_COMMANDS_MAX * sizeof(struct spk_command),
               "the longest program fits");
_Static_assert(SPK_WIRE_REQUEST_MAX >= sizeof(struct spk_wire_submit) +
                                           SPK_READS_MAX * sizeof(struct spk_read) +
                                           SPK_STEP_BYTES_MAX,
               "the longest step fits");
_Static_assert(SPK_WIRE_REPLY_MAX >= sizeof(struct spk_counters) +
                                         SPK_CARDS_MAX * sizeof(struct spk_wire_link),
               "all links fit");
_Static_assert(SPK_WIRE_REPLY_MAX >=
                   sizeof(uint64_t) + SPK_WIRE_EVENTS_MAX * sizeof(struct spk_trace_event),
               "all events fit");

/* One request as it is answered. */
struct request {
    struct spk_card *card;
    const struct served *served;
    const uint8_t *body;
    uint32_t nbytes;
    int file; /* -1 for none */
    uint8_t *out;     /* the reply's body */
    uint32_t written; /* of it */
    uint32_t command;
    char why[256]; /* empty where the status says all */
};

bool header_is_good(const struct spk_wire_header *h, uint32_t most)
{
    return h->magic == SPK_WIRE_MAGIC && h->nbytes <= most;
}

/* Takes `nbytes` from the front of the body; false where it is shorter. */
static bool take(struct request *r, void *to, uint32_t nbytes)
{
    if (r->nbytes < nbytes)
        return false;
    memcpy(to, r->body, nbytes);
    r->body += nbytes;
    r->nbytes -= nbytes;
    return true;
}

/* The same where nothing may be left. */
static bool take_all(struct request *r, void *to, uint32_t nbytes)
{
    return take(r, to, nbytes) && r->nbytes == 0;
}

static void put(struct request *r, const void *from, size_t nbytes)
{
    memcpy(r->out + r->written, from, nbytes);
    r->written += (uint32_t)nbytes;
}

static int malformed(struct request *r, const char *what)
{
    snprintf(r->why, sizeof r->why, "a malformed request: %s", what);
    return SPK_E_ARG;
}

static int hello(struct request *r)
{
    uint32_t version;
    if (!take_all(r, &version, sizeof version))
        return malformed(r, "hello");
    if (version != SPK_WIRE_VERSION) {
        snprintf(r->why, sizeof r->why, "the host speaks version %u of the protocol, the card %d",
                 version, SPK_WIRE_VERSION);
        return SPK_E_ARG;
    }
    struct spk_wire_hello h = {.version = SPK_WIRE_VERSION,
                               .abi_major = SAIL_VERSION_MAJOR,
                               .abi_minor = SAIL_VERSION_MINOR,
                               .semantics = SPK_SEMANTICS_VERSION,
                               .programs_max = SPK_PROGRAMS_MAX,
                               .serial = r->served->serial,
                               .ddr_bytes = r->served->ddr_bytes};
    snprintf(h.isa, sizeof h.isa, "%s", r->served->isa);
    put(r, &h, sizeof h);
    return SPK_OK;
}

static int alloc(struct request *r)
{
    uint64_t nbytes;
    uint32_t handle;
    if (!take_all(r, &nbytes, sizeof nbytes))
        return malformed(r, "alloc");
    int status = spk_card_alloc(r->card, nbytes, &handle);
    if (status == SPK_OK)
        put(r, &handle, sizeof handle);
    return status;
}

static int release(struct request *r)
{
    uint32_t handle;
    return take_all(r, &handle, sizeof handle) ? spk_card_free(r->card, handle)
                                               : malformed(r, "free");
}

static int write_memory(struct request *r)
{
    struct spk_wire_range range;
    if (!take(r, &range, sizeof range) || range.reserved || range.nbytes != r->nbytes ||
        range.nbytes > SPK_WIRE_DATA_MAX)
        return malformed(r, "write");
    return spk_card_write(r->card, range.buffer, range.offset, r->body, range.nbytes);
}

static int read_memory(struct request *r)
{
    struct spk_wire_range range;
    if (!take_all(r, &range, sizeof range) || range.reserved || range.nbytes > SPK_WIRE_DATA_MAX)
        return malformed(r, "read");
    int status = spk_card_read(r->card, range.buffer, range.offset, r->out, range.nbytes);
    if (status == SPK_OK)
        r->written = (uint32_t)range.nbytes;
    return status;
}

static int load(struct request *r)
{
    uint32_t handle;
    int status = spk_card_load_program(r->card, r->body, r->nbytes, &handle, &r->command, r->why);
    if (status == SPK_OK)
        put(r, &handle, sizeof handle);
    return status;
}

static int unload(struct request *r)
{
    uint32_t handle;
    return take_all(r, &handle, sizeof handle) ? spk_card_unload_program(r->card, handle)
                                               : malformed(r, "unload");
}

static int submit(struct request *r)
{
    struct spk_wire_submit s;
    struct spk_read reads[SPK_READS_MAX];
    uint64_t fence;
    if (!take(r, &s, sizeof s) || s.reads > SPK_READS_MAX ||
        !take(r, reads, s.reads * (uint32_t)sizeof *reads))
        return malformed(r, "submit");
    int status = spk_card_submit(r->card, s.program, r->body, r->nbytes, reads, s.reads, &fence,
                                 r->why);
    if (status == SPK_OK)
        put(r, &fence, sizeof fence);
    return status;
}

static int enter_epoch(struct request *r)
{
    uint32_t epoch;
    if (!take_all(r, &epoch, sizeof epoch))
        return malformed(r, "abort");
    int lost = spk_card_lost(r->card);
    return lost == SPK_OK ? spk_card_abort(r->card, epoch) : lost;
}

static int counters(struct request *r)
{
    uint32_t cards;
    struct spk_counters c;
    if (!take_all(r, &cards, sizeof cards) || cards > SPK_CARDS_MAX)
        return malformed(r, "counters");
    spk_card_counters(r->card, &c);
    put(r, &c, sizeof c);
    for (uint32_t peer = 0; peer < cards; peer++) {
        struct spk_wire_link l = {.state = (uint32_t)spk_card_link_state(r->card, peer)};
        spk_card_link_bytes(r->card, peer, &l.tx_bytes, &l.rx_bytes);
        put(r, &l, sizeof l);
    }
    return SPK_OK;
}

static int trace(struct request *r)
{
    uint64_t events;
    return take_all(r, &events, sizeof events) ? spk_card_trace(r->card, events)
                                               : malformed(r, "trace");
}

static int events(struct request *r)
{
    uint32_t most;
    uint64_t lost;
    if (!take_all(r, &most, sizeof most) || most > SPK_WIRE_EVENTS_MAX)
        return malformed(r, "events");
    uint64_t count = spk_card_trace_read(
        r->card, (struct spk_trace_event *)(void *)(r->out + sizeof lost), most, &lost);
    put(r, &lost, sizeof lost);
    r->written += (uint32_t)(count * sizeof(struct spk_trace_event));
    return SPK_OK;
}

static int plant(struct request *r)
{
    struct spk_wire_plant p;
    if (!take_all(r, &p, sizeof p) || p.fault > SPK_PLANT_MEMORY || p.at > 1)
        return malformed(r, "plant");
    if (p.at)
        spk_card_plant_at(r->card, (int)p.fault, p.command);
    else
        spk_card_plant(r->card, (int)p.fault);
    return SPK_OK;
}

static int want_link(struct request *r)
{
    struct spk_wire_want w;
    if (!take_all(r, &w, sizeof w) || w.up > 1)
        return malformed(r, "link");
    spk_card_link_want(r->card, w.peer, (int)w.up);
    return SPK_OK;
}

static bool is_at_work(struct request *r)
{
    struct spk_counters c;
    spk_card_counters(r->card, &c);
    return c.queued != 0;
}

/* With the worker standing still, as the links of a card are its own while it works. */
static int attach(struct request *r)
{
    struct spk_wire_attach a;
    if (!take_all(r, &a, sizeof a) || r->file < 0)
        return malformed(r, "attach");
    if (is_at_work(r))
        return SPK_E_BUSY;
    spk_pool_pause(r->served->pool);
    int status = spk_link_attach(r->card, a.peer, r->file, a.end, a.ring_bytes);
    spk_pool_resume(r->served->pool);
    return status;
}

static int detach(struct request *r)
{
    uint32_t peer;
    if (!take_all(r, &peer, sizeof peer))
        return malformed(r, "detach");
    if (is_at_work(r))
        return SPK_E_BUSY;
    spk_pool_pause(r->served->pool);
    int status = spk_link_detach(r->card, peer);
    spk_pool_resume(r->served->pool);
    return status;
}

void answer(const struct served *served, const struct spk_wire_header *h, const uint8_t *body,
            int file, struct reply *out)
{
    static int (*const by_kind[])(struct request *) = {
        [SPK_WIRE_HELLO] = hello,      [SPK_WIRE_ALLOC] = alloc,
        [SPK_WIRE_FREE] = release,     [SPK_WIRE_WRITE] = write_memory,
        [SPK_WIRE_READ] = read_memory, [SPK_WIRE_LOAD] = load,
        [SPK_WIRE_UNLOAD] = unload,    [SPK_WIRE_SUBMIT] = submit,
        [SPK_WIRE_ABORT] = enter_epoch, [SPK_WIRE_COUNTERS] = counters,
        [SPK_WIRE_TRACE] = trace,      [SPK_WIRE_EVENTS] = events,
        [SPK_WIRE_PLANT] = plant,      [SPK_WIRE_LINK] = want_link,
        [SPK_WIRE_ATTACH] = attach,    [SPK_WIRE_DETACH] = detach,
    };
    struct request r = {.card = served->card,
                        .served = served,
                        .body = body,
                        .nbytes = h->nbytes,
                        .file = file,
                        .out = out->bytes + sizeof(struct spk_wire_header)};
    int status;
    if (h->kind < sizeof by_kind / sizeof *by_kind && by_kind[h->kind])
        status = by_kind[h->kind](&r);
    else
        status = malformed(&r, "no such kind");
    if (status != SPK_OK) {
        r.written = 0;
        put(&r, r.why, strnlen(r.why, SPK_WIRE_TEXT_MAX));
    }
    struct spk_wire_header header = {.magic = SPK_WIRE_MAGIC,
                                     .kind = (uint16_t)(h->kind | SPK_WIRE_REPLY),
                                     .status = (uint16_t)status,
                                     .command = r.command,
                                     .nbytes = r.written};
    memcpy(out->bytes, &header, sizeof header);
    out->nbytes = (uint32_t)sizeof header + r.written;
}

struct completion_frame tell(const struct spk_completion *c)
{
    return (struct completion_frame){
        .header = {.magic = SPK_WIRE_MAGIC,
                   .kind = SPK_WIRE_COMPLETION,
                   .nbytes = (uint32_t)(sizeof(struct spk_wire_completion) + c->result_bytes)},
        .completion = {.fence = c->fence,
                       .busy_ns = c->busy_ns,
                       .result_bytes = c->result_bytes,
                       .status = (uint32_t)c->status,
                       .command = c->command}};
}
