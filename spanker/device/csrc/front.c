/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Registers and rings in front of a card.
 *
 * Commands pass through a short list, `entries`, in the order of the ring.  RUN goes to the core at
 * once, as far as its queue takes them; everything else waits until it is the oldest and is done here,
 * in no time.  So the core never has anything to do while programs and buffers change.  Completions
 * leave the list in order, too.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "card_internal.h"
#include "spk_front.h"

#define ENTRIES (2 * SPK_QUEUE_MAX)
/* One call does so much, then registers are answered again. */
#define POLL_BUDGET_NS 5000000u
#define FLAP_NS 10000000u
#define EPOCH_MAX 0xfffffffeu /* the core's one is ~0 while it restarts */
#define TEMPERATURE_MC 45000
#define READ_BYTES_MAX ((uint64_t)64 << 20) /* of a RUN's reads together */

_Static_assert(sizeof(struct sail_command) == 64, "a command fills a cache line");
_Static_assert(sizeof(struct sail_completion) == 32, "two completions fill a cache line");
_Static_assert(sizeof(struct sail_read) == sizeof(struct spk_read), "reads are read in place");
_Static_assert(SPK_READS_MAX == SAIL_READS_MAX, "reads are passed on");
_Static_assert(SPK_STEP_BYTES_MAX >= SAIL_PARAMETERS_BYTES_MAX, "parameters are passed on");

/* A command in the host's byte order. */
struct command {
    uint32_t op, program;
    uint64_t fence, data, data_bytes, table;
    uint32_t table_count, stream;
    uint64_t result, result_bytes;
};

enum state { WAITS, IN_CORE, DONE };

struct entry {
    struct command command;
    uint32_t index; /* in the command ring */
    enum state state;
    bool dropped;   /* by clearing ENABLE: it has no completion any more */
    uint64_t core_fence;
    uint32_t status, detail;
    uint64_t busy_ns;
    uint64_t due_ns; /* a slow card's completion comes no earlier */
};

struct slot {
    bool loaded;
    uint32_t core_program, count;
    uint32_t *table; /* the core's buffers */
};

struct end { /* of a link */
    bool wanted;
    uint64_t flap_until_ns;
    uint32_t told;        /* the state that the last event was about */
    uint64_t tx, rx, errors; /* at the last reset */
    uint64_t errors_known;   /* when it was last good */
    uint32_t latched[2];     /* upper halves of tx and rx */
};

/* Steps of a stream that were in the ring when an earlier one of it failed. */
struct doomed {
    uint32_t stream, before; /* RUNs at lower ring indices */
};

struct ring_registers {
    uint64_t base;
    uint32_t base_lo; /* written, without effect yet */
    uint32_t entries, head, tail;
};

struct spk_front {
    struct spk_card *core;
    struct spk_front_host host;
    uint64_t serial;
    char text[3][SAIL_TEXT_BYTES]; /* SKU, name, ISA */
    bool has_faults;
    uint32_t links;
    uint64_t peers[SAIL_LINKS_MAX];

    bool enabled, resetting, gone;
    bool powered_off; /* until the end of the reset: the DDR is to be empty then */
    uint32_t generation, failure, watchdog_ms;
    struct ring_registers commands, completions;
    uint64_t last_fence;
    uint32_t abort_before; /* RUNs at ring indices before it are aborted; never behind the head */
    struct doomed doomed[SAIL_RING_ENTRIES_MAX]; /* no more than can have failed in a ring's round */
    uint32_t doomed_count;
    uint32_t events, events_mask;
    uint32_t epoch;        /* the last one asked for */
    uint32_t epoch_known;  /* the last one that links were told to be good in */
    int32_t temperature_mc;
    uint32_t ecc_corrected, ecc_uncorrected;
    uint32_t fault, fault_arg, slow_us;
    bool hung, wrong_fence;

    struct spk_counters base; /* of the core's, at the last reset */
    uint32_t latched_counter[5];
    uint32_t done_here;       /* grows with everything that is not the core's work */
    uint32_t progress_seen;
    uint64_t progress_ns;

    struct entry entries[ENTRIES];
    uint32_t first, count;
    uint32_t in_core, core_stream; /* the core has steps of one stream at a time */
    struct slot slots[SPK_PROGRAMS_MAX];
    struct end ends[SAIL_LINKS_MAX];
    uint8_t *image;

    bool completed; /* the host is owed an interrupt */
    uint64_t wake_ns;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void wake_at(struct spk_front *f, uint64_t ns)
{
    if (ns < f->wake_ns)
        f->wake_ns = ns;
}

static struct entry *entry_at(struct spk_front *f, uint32_t i)
{
    return &f->entries[(f->first + i) % ENTRIES];
}

static bool is_running(const struct spk_front *f)
{
    return f->enabled && !f->failure && !f->resetting && !f->gone;
}

static bool may_reach_host(const struct spk_front *f)
{
    return f->enabled && !f->failure && !f->gone;
}

static bool read_host(struct spk_front *f, uint64_t at, void *to, uint64_t nbytes)
{
    return !nbytes || (at + nbytes > at && f->host.read(f->host.context, at, to, nbytes));
}

static bool write_host(struct spk_front *f, uint64_t at, const void *from, uint64_t nbytes)
{
    return !nbytes || (at + nbytes > at && f->host.write(f->host.context, at, from, nbytes));
}

/* --- events and failures --------------------------------------------------------------------- */

static void tell_events(struct spk_front *f)
{
    if (f->events & f->events_mask && !f->gone)
        f->host.interrupt(f->host.context, SAIL_VECTOR_EVENT);
}

static void raise_event(struct spk_front *f, uint32_t cause)
{
    f->events |= cause;
    if (f->events_mask & cause)
        tell_events(f);
}

/* The core keeps what it has and does nothing until a reset. */
static void fail(struct spk_front *f, uint32_t failure)
{
    if (f->failure)
        return;
    f->failure = failure;
    spk_card_plant(f->core, SPK_PLANT_HANG);
    raise_event(f, SAIL_EVENT_FAILED);
}

/* --- programs -------------------------------------------------------------------------------- */

static void release_slot(struct spk_front *f, struct slot *s)
{
    if (s->loaded)
        spk_card_unload_program(f->core, s->core_program);
    for (uint32_t i = 0; i < s->count; i++)
        spk_card_free(f->core, s->table[i]);
    free(s->table);
    *s = (struct slot){0};
}

static void finish(struct spk_front *f, struct entry *e, uint32_t status, uint32_t detail)
{
    e->state = DONE;
    e->status = status;
    e->detail = detail;
    e->due_ns = f->slow_us ? now_ns() + (uint64_t)f->slow_us * 1000 : 0;
}

static void finish_invalid(struct spk_front *f, struct entry *e, size_t field)
{
    finish(f, e, SAIL_E_INVALID, (uint32_t)field);
}

#define FIELD(name) offsetof(struct sail_command, name)

/* The ranges of a table, as the core takes them; false where one is no memory of the card. */
static bool to_ranges(const struct spk_front *f, const struct sail_buffer *table, uint32_t count,
                      struct spk_range *ranges)
{
    for (uint32_t i = 0; i < count; i++) {
        uint64_t at = le64toh(table[i].address), nbytes = le64toh(table[i].bytes);
        if (!nbytes || at % SPK_DDR_ALIGN || at > f->core->ddr_bytes ||
            nbytes > f->core->ddr_bytes - at)
            return false;
        ranges[i] = (struct spk_range){at, nbytes};
    }
    return true;
}

/* Into an empty slot; `why` is text where the status is REFUSED. */
static uint32_t load_into(struct spk_front *f, struct slot *slot, const struct command *c,
                          uint32_t *detail, char *why)
{
    uint32_t status = SAIL_E_NO_MEMORY;
    size_t count = c->table_count;
    uint8_t *program = malloc(c->data_bytes);
    struct sail_buffer *table = malloc((count + 1) * sizeof *table);
    struct spk_range *ranges = malloc((count + 1) * sizeof *ranges);
    uint32_t *handles = malloc((count + 1) * sizeof *handles);
    int entered;

    if (!program || !table || !ranges || !handles)
        goto out;
    status = SAIL_E_DMA;
    if (!read_host(f, c->data, program, c->data_bytes) ||
        !read_host(f, c->table, table, count * sizeof *table))
        goto out;
    status = SAIL_E_INVALID;
    *detail = FIELD(table);
    if (!to_ranges(f, table, c->table_count, ranges))
        goto out;
    *detail = 0;
    status = SAIL_E_NO_MEMORY;
    entered = spk_card_enter(f->core, ranges, count, handles);
    if (entered != SPK_OK)
        goto out;
    slot->table = handles;
    slot->count = c->table_count;
    handles = NULL;
    switch (spk_card_load_by_table(f->core, program, c->data_bytes, slot->table, count,
                                   &slot->core_program, detail, why)) {
    case SPK_OK:
        slot->loaded = true;
        status = SAIL_OK;
        *detail = 0;
        break;
    case SPK_E_NOMEM:
    case SPK_E_SYSTEM:
        *detail = 0;
        break;
    default:
        status = SAIL_E_REFUSED;
    }
    if (status != SAIL_OK)
        release_slot(f, slot);
out:
    free(program), free(table), free(ranges), free(handles);
    return status;
}

static void do_load(struct spk_front *f, struct entry *e)
{
    const struct command *c = &e->command;
    char why[SAIL_WHY_BYTES] = {0};
    uint32_t detail = 0;

    if (c->program >= SPK_PROGRAMS_MAX || f->slots[c->program].loaded) {
        finish_invalid(f, e, FIELD(program));
        return;
    }
    if (!c->data_bytes || c->data_bytes > SAIL_PROGRAM_BYTES_MAX) {
        finish_invalid(f, e, FIELD(data_bytes));
        return;
    }
    if (c->table_count > SAIL_TABLE_MAX) {
        finish_invalid(f, e, FIELD(table_count));
        return;
    }
    uint32_t status = load_into(f, &f->slots[c->program], c, &detail, why);
    if (status == SAIL_E_REFUSED) {
        uint64_t nbytes = c->result_bytes < sizeof why ? c->result_bytes : sizeof why;
        if (!write_host(f, c->result, why, nbytes))
            status = SAIL_E_DMA, detail = 0;
    }
    finish(f, e, status, detail);
}

static void do_unload(struct spk_front *f, struct entry *e)
{
    uint32_t program = e->command.program;
    if (program >= SPK_PROGRAMS_MAX || !f->slots[program].loaded) {
        finish_invalid(f, e, FIELD(program));
        return;
    }
    release_slot(f, &f->slots[program]);
    finish(f, e, SAIL_OK, 0);
}

/* Gives pages of a shared mapping back to the system, which shows zeros from then on.  An emulator of
 * user space takes this for a hint that it may ignore: so one byte is looked at. */
static bool give_back(uint8_t *at, uint64_t nbytes)
{
    *(volatile uint8_t *)at = 1;
    return madvise(at, nbytes, MADV_REMOVE) == 0 && *(volatile uint8_t *)at == 0;
}

static void clear_ddr(struct spk_front *f, uint64_t offset, uint64_t nbytes)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), end = offset + nbytes;
    uint64_t first = (offset + page - 1) / page * page, last = end / page * page;
    uint8_t *ddr = f->core->ddr;
    if (first >= last || !give_back(ddr + first, last - first)) {
        memset(ddr + offset, 0, nbytes);
        return;
    }
    memset(ddr + offset, 0, first - offset);
    memset(ddr + last, 0, end - last);
}

static void do_fill(struct spk_front *f, struct entry *e)
{
    const struct command *c = &e->command;
    uint64_t have = f->core->ddr_bytes;
    if (c->result > have) {
        finish_invalid(f, e, FIELD(result));
    } else if (c->data_bytes > have - c->result) {
        finish_invalid(f, e, FIELD(data_bytes));
    } else {
        clear_ddr(f, c->result, c->data_bytes);
        finish(f, e, SAIL_OK, 0);
    }
}

/* An emulated card has its kernels built in: it keeps the image as silicon would, for nothing. */
static void do_image(struct spk_front *f, struct entry *e)
{
    const struct command *c = &e->command;
    if (!c->data_bytes || c->data_bytes > SAIL_PROGRAM_BYTES_MAX) {
        finish_invalid(f, e, FIELD(data_bytes));
        return;
    }
    uint8_t *image = malloc(c->data_bytes);
    if (!image) {
        finish(f, e, SAIL_E_NO_MEMORY, 0);
    } else if (!read_host(f, c->data, image, c->data_bytes)) {
        free(image);
        finish(f, e, SAIL_E_DMA, 0);
    } else {
        free(f->image);
        f->image = image;
        finish(f, e, SAIL_OK, 0);
    }
}

static void do_here(struct spk_front *f, struct entry *e)
{
    switch (e->command.op) {
    case SAIL_OP_LOAD:
        do_load(f, e);
        break;
    case SAIL_OP_UNLOAD:
        do_unload(f, e);
        break;
    case SAIL_OP_FILL:
        do_fill(f, e);
        break;
    case SAIL_OP_IMAGE:
        do_image(f, e);
        break;
    default:
        finish(f, e, SAIL_OK, 0);
    }
    f->done_here++;
}

/* --- steps ----------------------------------------------------------------------------------- */

static uint32_t to_core_reads(const struct slot *slot, struct spk_read *reads, uint32_t count,
                              uint64_t *total)
{
    *total = 0;
    for (uint32_t i = 0; i < count; i++) {
        struct spk_read r = {.buffer = le32toh(reads[i].buffer),
                             .reserved = le32toh(reads[i].reserved),
                             .offset = le64toh(reads[i].offset),
                             .nbytes = le64toh(reads[i].nbytes)};
        if (r.buffer >= slot->count || r.nbytes > READ_BYTES_MAX - *total)
            return SAIL_E_PARAMETERS;
        *total += r.nbytes;
        r.buffer = slot->table[r.buffer];
        reads[i] = r;
    }
    return SAIL_OK;
}

static bool is_before(uint32_t index, uint32_t limit)
{
    return (int32_t)(index - limit) < 0;
}

static bool is_doomed(const struct spk_front *f, const struct entry *e)
{
    bool found = is_before(e->index, f->abort_before);
    for (uint32_t i = 0; i < f->doomed_count && !found; i++)
        found = f->doomed[i].stream == e->command.stream && is_before(e->index, f->doomed[i].before);
    return found;
}

/* All commands before the head are under way: what was to be aborted among them, has been. */
static void forget_doomed(struct spk_front *f)
{
    uint32_t head = f->commands.head, kept = 0;
    if (is_before(f->abort_before, head))
        f->abort_before = head;
    for (uint32_t i = 0; i < f->doomed_count; i++)
        if (is_before(head, f->doomed[i].before))
            f->doomed[kept++] = f->doomed[i];
    f->doomed_count = kept;
}

static void doom(struct spk_front *f, uint32_t stream)
{
    uint32_t i = 0;
    while (i < f->doomed_count && f->doomed[i].stream != stream)
        i++;
    if (i == SAIL_RING_ENTRIES_MAX)
        return;
    f->doomed[i] = (struct doomed){stream, f->commands.tail};
    f->doomed_count += i == f->doomed_count;
}

static void submit(struct spk_front *f, struct entry *e, const struct slot *slot,
                   const uint8_t *parameters, const struct spk_read *reads)
{
    const struct command *c = &e->command;
    char why[256];
    switch (spk_card_submit(f->core, slot->core_program, parameters, c->data_bytes, reads,
                            c->table_count, &e->core_fence, why)) {
    case SPK_OK:
        e->state = IN_CORE;
        f->in_core++;
        f->core_stream = c->stream;
        break;
    case SPK_E_BUSY:
        break; /* a fault is on its way here: it is tried again once that is known */
    case SPK_E_SYSTEM:
        finish(f, e, SAIL_E_NO_MEMORY, 0);
        break;
    default:
        finish(f, e, SAIL_E_PARAMETERS, 0);
    }
}

static void do_run(struct spk_front *f, struct entry *e)
{
    const struct command *c = &e->command;
    struct spk_read reads[SAIL_READS_MAX];
    uint64_t total;

    if (is_doomed(f, e)) {
        finish(f, e, SAIL_E_ABORTED, 0);
        return;
    }
    if (f->in_core == SPK_QUEUE_MAX || (f->in_core && f->core_stream != c->stream))
        return;
    if (c->program >= SPK_PROGRAMS_MAX || !f->slots[c->program].loaded) {
        finish_invalid(f, e, FIELD(program));
        return;
    }
    if (c->data_bytes > SAIL_PARAMETERS_BYTES_MAX) {
        finish_invalid(f, e, FIELD(data_bytes));
        return;
    }
    if (c->table_count > SAIL_READS_MAX) {
        finish_invalid(f, e, FIELD(table_count));
        return;
    }
    const struct slot *slot = &f->slots[c->program];
    uint8_t *parameters = malloc(c->data_bytes + 1);
    if (!parameters) {
        finish(f, e, SAIL_E_NO_MEMORY, 0);
        return;
    }
    if (!read_host(f, c->data, parameters, c->data_bytes) ||
        !read_host(f, c->table, reads, c->table_count * sizeof *reads)) {
        finish(f, e, SAIL_E_DMA, 0);
    } else if (to_core_reads(slot, reads, c->table_count, &total) != SAIL_OK) {
        finish(f, e, SAIL_E_PARAMETERS, 0);
    } else if (total > c->result_bytes) {
        finish_invalid(f, e, FIELD(result_bytes));
    } else {
        submit(f, e, slot, parameters, reads);
    }
    free(parameters);
}

static uint32_t status_of(int core_status)
{
    switch (core_status) {
    case SPK_OK:
        return SAIL_OK;
    case SPK_E_ABORTED:
    case SPK_E_LOST:
        return SAIL_E_ABORTED;
    case SPK_E_NONFINITE:
        return SAIL_E_NUMERIC;
    case SPK_E_F16_RANGE:
        return SAIL_E_RANGE;
    case SPK_E_LINK:
        return SAIL_E_LINK;
    default:
        return SAIL_E_FAULT;
    }
}

/* What the core has completed. */
static void collect(struct spk_front *f)
{
    struct spk_completion c;
    while (spk_card_completion(f->core, &c)) {
        uint32_t i = 0;
        while (i < f->count && entry_at(f, i)->state != IN_CORE)
            i++;
        if (i == f->count || entry_at(f, i)->core_fence != c.fence)
            continue; /* from before a reset */
        struct entry *e = entry_at(f, i);
        uint32_t status = status_of(c.status), detail = c.command;
        f->in_core--;
        e->busy_ns = c.busy_ns;
        if (status == SAIL_OK || status == SAIL_E_ABORTED)
            detail = 0;
        else if (!e->dropped)
            doom(f, e->command.stream);
        if (status == SAIL_OK && !e->dropped && may_reach_host(f) &&
            !write_host(f, e->command.result, c.result, c.result_bytes))
            status = SAIL_E_DMA;
        finish(f, e, status, detail);
    }
}

/* --- rings ----------------------------------------------------------------------------------- */

/* Takes the next command into the list. */
static bool fetch(struct spk_front *f)
{
    struct ring_registers *r = &f->commands;
    struct sail_command raw;
    if (f->count == ENTRIES || r->head == r->tail ||
        (f->count && entry_at(f, f->count - 1)->state == WAITS))
        return false;
    uint64_t at = r->base + (uint64_t)(r->head & (r->entries - 1)) * sizeof raw;
    if (!read_host(f, at, &raw, sizeof raw)) {
        fail(f, SAIL_FAILURE_DMA);
        return false;
    }
    struct entry *e = entry_at(f, f->count++);
    *e = (struct entry){
        .index = r->head++,
        .command = {.op = le32toh(raw.op),
                    .program = le32toh(raw.program),
                    .fence = le64toh(raw.fence),
                    .data = le64toh(raw.data),
                    .data_bytes = le64toh(raw.data_bytes),
                    .table = le64toh(raw.table),
                    .table_count = le32toh(raw.table_count),
                    .stream = le32toh(raw.stream),
                    .result = le64toh(raw.result),
                    .result_bytes = le64toh(raw.result_bytes)},
    };
    if (e->command.op > SAIL_OP_IMAGE) {
        finish_invalid(f, e, FIELD(op));
    } else if (e->command.fence <= f->last_fence) {
        finish_invalid(f, e, FIELD(fence));
    } else if (e->command.stream && e->command.op != SAIL_OP_RUN) {
        finish_invalid(f, e, FIELD(stream));
    }
    if (e->command.fence > f->last_fence)
        f->last_fence = e->command.fence;
    return true;
}

/* The oldest command that is not under way yet. */
static bool begin_waiting(struct spk_front *f)
{
    if (!f->count || entry_at(f, f->count - 1)->state != WAITS)
        return false;
    struct entry *e = entry_at(f, f->count - 1);
    if (e->command.op == SAIL_OP_RUN)
        do_run(f, e);
    else if (!f->in_core && !f->hung)
        do_here(f, e);
    if (e->state != WAITS)
        forget_doomed(f);
    return e->state != WAITS;
}

static void pop(struct spk_front *f)
{
    f->first = (f->first + 1) % ENTRIES;
    f->count--;
}

static bool complete_first(struct spk_front *f, uint64_t now)
{
    struct ring_registers *r = &f->completions;
    if (!f->count || entry_at(f, 0)->state != DONE)
        return false;
    const struct entry *e = entry_at(f, 0);
    if (e->dropped) {
        pop(f);
        return true;
    }
    if (e->due_ns > now) {
        wake_at(f, e->due_ns);
        return false;
    }
    if (r->tail - r->head >= r->entries)
        return false; /* until the host has taken some */
    uint64_t at = r->base + (uint64_t)(r->tail & (r->entries - 1)) * sizeof(struct sail_completion);
    struct sail_completion c = {
        .fence = htole64(f->wrong_fence ? ~e->command.fence : e->command.fence),
        .busy_ns = htole64(e->busy_ns),
        .status = htole32(e->status),
        .detail = htole32(e->detail),
        .index = htole32(r->tail + 1 ? r->tail + 1 : 1),
    };
    /* The index last: a host may wait for it. */
    size_t before = offsetof(struct sail_completion, index);
    if (!write_host(f, at, &c, before) ||
        !write_host(f, at + before, (uint8_t *)&c + before, sizeof c - before)) {
        fail(f, SAIL_FAILURE_DMA);
        return false;
    }
    f->wrong_fence = false;
    r->tail++;
    f->completed = true;
    pop(f);
    return true;
}

static bool is_good_ring(const struct ring_registers *r, uint64_t entry_bytes)
{
    return r->base % 64 == 0 && r->entries >= 2 && r->entries <= SAIL_RING_ENTRIES_MAX &&
           !(r->entries & (r->entries - 1)) && r->base <= UINT64_MAX - r->entries * entry_bytes &&
           r->tail - r->head <= r->entries;
}

static void enable(struct spk_front *f)
{
    f->enabled = true;
    if (!is_good_ring(&f->commands, sizeof(struct sail_command)) ||
        !is_good_ring(&f->completions, sizeof(struct sail_completion)))
        fail(f, SAIL_FAILURE_RING);
}

/* From here on no memory of the host's is touched. */
static void disable(struct spk_front *f)
{
    f->enabled = false;
    for (uint32_t i = 0; i < f->count; i++) {
        struct entry *e = entry_at(f, i);
        e->dropped = true;
        if (e->state == WAITS)
            e->state = DONE;
    }
    f->commands.head = f->commands.tail = f->completions.head = f->completions.tail = 0;
    f->abort_before = f->doomed_count = 0;
    f->last_fence = 0;
    f->completed = false;
}

/* --- links ----------------------------------------------------------------------------------- */

static uint32_t link_state(struct spk_front *f, uint32_t i)
{
    struct end *end = &f->ends[i];
    switch (spk_card_link_state(f->core, i)) {
    case SPK_LINK_UP:
        if (spk_card_link_errors(f->core, i) != end->errors_known)
            return SAIL_LINK_ERROR;
        return SAIL_LINK_UP;
    case SPK_LINK_WAITS:
        return SAIL_LINK_TRAINING;
    default:
        return SAIL_LINK_DOWN;
    }
}

static void control_link(struct spk_front *f, uint32_t i, uint32_t value)
{
    if (value > 1)
        return;
    f->ends[i].wanted = value;
    f->ends[i].flap_until_ns = 0;
    if (value)
        f->ends[i].errors_known = spk_card_link_errors(f->core, i);
    spk_card_link_want(f->core, i, (int)value);
}

static void watch_links(struct spk_front *f, uint64_t now)
{
    bool changed = false;
    for (uint32_t i = 0; i < f->links; i++) {
        struct end *end = &f->ends[i];
        if (end->flap_until_ns && now >= end->flap_until_ns) {
            end->flap_until_ns = 0;
            spk_card_link_want(f->core, i, end->wanted);
        } else if (end->flap_until_ns) {
            wake_at(f, end->flap_until_ns);
        }
        if (f->epoch_known != f->core->epoch_seen)
            end->errors_known = spk_card_link_errors(f->core, i);
        uint32_t state = link_state(f, i);
        changed |= state != end->told;
        end->told = state;
    }
    f->epoch_known = f->core->epoch_seen;
    if (changed && !f->gone && !f->resetting)
        raise_event(f, SAIL_EVENT_LINK);
}

static void want_links(struct spk_front *f, bool up)
{
    for (uint32_t i = 0; i < f->links; i++) {
        f->ends[i].wanted = up;
        f->ends[i].flap_until_ns = 0;
        spk_card_link_want(f->core, i, up);
    }
}

/* --- reset ----------------------------------------------------------------------------------- */

static void begin_reset(struct spk_front *f)
{
    disable(f);
    f->count = 0;
    f->in_core = 0;
    f->failure = SAIL_FAILURE_NONE;
    f->watchdog_ms = 0;
    f->commands = f->completions = (struct ring_registers){0};
    f->events = f->events_mask = 0;
    f->temperature_mc = TEMPERATURE_MC;
    f->ecc_corrected = f->ecc_uncorrected = 0;
    f->fault = f->fault_arg = f->slow_us = 0;
    f->hung = f->wrong_fence = false;
    f->resetting = true;
    f->epoch = f->epoch_known = 0;
    spk_card_restart(f->core);
    want_links(f, true);
}

static void end_reset(struct spk_front *f)
{
    spk_card_counters(f->core, &f->base);
    if (f->base.epoch || f->base.queued)
        return; /* it signals when it has restarted */
    collect(f);
    for (uint32_t i = 0; i < SPK_PROGRAMS_MAX; i++)
        release_slot(f, &f->slots[i]);
    free(f->image);
    f->image = NULL;
    if (f->powered_off)
        clear_ddr(f, 0, f->core->ddr_bytes);
    f->powered_off = false;
    for (uint32_t i = 0; i < f->links; i++) {
        struct end *end = &f->ends[i];
        spk_card_link_bytes(f->core, i, &end->tx, &end->rx);
        end->errors = end->errors_known = spk_card_link_errors(f->core, i);
        end->told = link_state(f, i);
    }
    f->resetting = false;
}

void spk_front_reset(struct spk_front *f)
{
    if (f->gone)
        return;
    f->generation++;
    begin_reset(f);
}

void spk_front_power_cycle(struct spk_front *f)
{
    f->gone = false;
    f->powered_off = true;
    f->generation = 0;
    begin_reset(f);
}

/* --- faults ---------------------------------------------------------------------------------- */

static void set_fault(struct spk_front *f, uint32_t fault)
{
    uint32_t arg = f->fault_arg;
    f->fault = fault;
    switch (fault) {
    case SAIL_FAULT_NONE:
        f->slow_us = 0;
        f->wrong_fence = false;
        if (f->hung && !f->failure)
            spk_card_plant(f->core, SPK_PLANT_NONE);
        f->hung = false;
        break;
    case SAIL_FAULT_HANG:
        f->hung = true;
        spk_card_plant(f->core, SPK_PLANT_HANG);
        break;
    case SAIL_FAULT_SLOW:
        f->slow_us = arg;
        break;
    case SAIL_FAULT_GONE:
        want_links(f, false);
        spk_card_plant(f->core, SPK_PLANT_HANG);
        f->gone = true;
        break;
    case SAIL_FAULT_CORRECTED:
        f->ecc_corrected += arg;
        raise_event(f, SAIL_EVENT_ECC);
        break;
    case SAIL_FAULT_UNCORRECTED:
        f->ecc_uncorrected += arg ? arg : 1;
        raise_event(f, SAIL_EVENT_ECC);
        fail(f, SAIL_FAILURE_ECC);
        break;
    case SAIL_FAULT_COMPLETION:
        f->wrong_fence = true;
        break;
    case SAIL_FAULT_FLAP:
        if (arg < f->links) {
            f->ends[arg].flap_until_ns = now_ns() + FLAP_NS;
            spk_card_link_want(f->core, arg, false);
        }
        break;
    case SAIL_FAULT_HOT:
        f->temperature_mc = (int32_t)arg;
        raise_event(f, SAIL_EVENT_HOT);
        break;
    default:
        f->fault = SAIL_FAULT_NONE;
    }
}

/* --- registers ------------------------------------------------------------------------------- */

static struct spk_counters counters_of(struct spk_front *f)
{
    struct spk_counters c;
    spk_card_counters(f->core, &c);
    return c;
}

static uint32_t progress_of(struct spk_front *f)
{
    return (uint32_t)counters_of(f).progress + f->done_here;
}

/* The command under way: the oldest that is not done. */
static struct entry *running(struct spk_front *f)
{
    for (uint32_t i = 0; i < f->count; i++)
        if (entry_at(f, i)->state != DONE && !entry_at(f, i)->dropped)
            return entry_at(f, i);
    return NULL;
}

static uint32_t low(uint64_t x)
{
    return (uint32_t)x;
}

static uint32_t high(uint64_t x)
{
    return (uint32_t)(x >> 32);
}

static uint32_t text_word(const char *text, uint64_t offset)
{
    uint32_t word;
    memcpy(&word, text + offset, sizeof word);
    return le32toh(word);
}

/* A 64-bit counter's halves: the upper one is of when the lower one was read last. */
static uint32_t half(uint64_t value, bool upper, uint32_t *latched)
{
    if (upper)
        return *latched;
    *latched = high(value);
    return low(value);
}

static uint32_t read_counter(struct spk_front *f, uint64_t offset)
{
    uint64_t which = (offset - SAIL_REG_STEPS_LO) / 8;
    struct spk_counters c = counters_of(f);
    uint64_t values[] = {c.steps - f->base.steps, c.commands - f->base.commands,
                         c.busy_ns - f->base.busy_ns, c.ddr_read_bytes - f->base.ddr_read_bytes,
                         c.ddr_written_bytes - f->base.ddr_written_bytes};
    return half(values[which], offset & 4, &f->latched_counter[which]);
}

static uint32_t read_link(struct spk_front *f, uint64_t offset)
{
    uint32_t i = (uint32_t)((offset - SAIL_REG_LINK(0)) / 0x40);
    uint64_t tx, rx;
    if (i >= f->links)
        return 0;
    struct end *end = &f->ends[i];
    spk_card_link_bytes(f->core, i, &tx, &rx);
    switch (offset & 0x3f) {
    case SAIL_LINK_STATE:
        return link_state(f, i);
    case SAIL_LINK_CONTROL:
        return end->wanted;
    case SAIL_LINK_PEER_LO:
        return low(f->peers[i]);
    case SAIL_LINK_PEER_HI:
        return high(f->peers[i]);
    case SAIL_LINK_TX_LO:
    case SAIL_LINK_TX_HI:
        return half(tx - end->tx, offset & 4, &end->latched[0]);
    case SAIL_LINK_RX_LO:
    case SAIL_LINK_RX_HI:
        return half(rx - end->rx, offset & 4, &end->latched[1]);
    case SAIL_LINK_ERRORS:
        return (uint32_t)(spk_card_link_errors(f->core, i) - end->errors);
    default:
        return 0;
    }
}

static uint32_t read_status(const struct spk_front *f)
{
    return (f->resetting ? 0 : SAIL_STATUS_READY) | (is_running(f) ? SAIL_STATUS_RUNNING : 0) |
           (f->failure ? SAIL_STATUS_FAILED : 0);
}

static uint32_t read_waiting(struct spk_front *f)
{
    int32_t peer = counters_of(f).waiting_for;
    return peer < 0 ? SAIL_NO_LINK : (uint32_t)peer;
}

static uint32_t read_running(struct spk_front *f)
{
    const struct entry *e = running(f);
    return e ? low(e->command.fence) : 0;
}

static uint32_t read_command(struct spk_front *f)
{
    const struct entry *e = running(f);
    return e && e->state == IN_CORE ? counters_of(f).command : 0;
}

static uint32_t read_register(struct spk_front *f, uint64_t offset)
{
    if (offset >= SAIL_REG_SKU && offset < SAIL_REG_SKU + sizeof f->text)
        return text_word(f->text[0], offset - SAIL_REG_SKU);
    if (offset >= SAIL_REG_STEPS_LO && offset <= SAIL_REG_DDR_WRITTEN_HI)
        return read_counter(f, offset);
    if (offset >= SAIL_REG_LINK(0) && offset < SAIL_REG_LINK(SAIL_LINKS_MAX))
        return read_link(f, offset);
    switch (offset) {
    case SAIL_REG_MAGIC:
        return SAIL_MAGIC;
    case SAIL_REG_VERSION:
        return SAIL_VERSION_MAJOR << 16 | SAIL_VERSION_MINOR;
    case SAIL_REG_CAPABILITIES:
        return SAIL_CAP_EMULATED | SAIL_CAP_ECC | SAIL_CAP_IMAGE |
               (f->has_faults ? SAIL_CAP_FAULTS : 0);
    case SAIL_REG_SERIAL_LO:
        return low(f->serial);
    case SAIL_REG_SERIAL_HI:
        return high(f->serial);
    case SAIL_REG_DDR_LO:
    case SAIL_REG_APERTURE_LO:
        return low(f->core->ddr_bytes);
    case SAIL_REG_DDR_HI:
    case SAIL_REG_APERTURE_HI:
        return high(f->core->ddr_bytes);
    case SAIL_REG_SEMANTICS:
        return SPK_SEMANTICS_VERSION;
    case SAIL_REG_PROGRAMS:
        return SPK_PROGRAMS_MAX;
    case SAIL_REG_LINKS:
        return f->links;
    case SAIL_REG_CONTROL:
        return f->enabled ? SAIL_CONTROL_ENABLE : 0;
    case SAIL_REG_STATUS:
        return read_status(f);
    case SAIL_REG_GENERATION:
        return f->generation;
    case SAIL_REG_FAILURE:
        return f->failure;
    case SAIL_REG_WATCHDOG_MS:
        return f->watchdog_ms;
    case SAIL_REG_PROGRESS:
        return progress_of(f);
    case SAIL_REG_RUNNING:
        return read_running(f);
    case SAIL_REG_COMMAND:
        return read_command(f);
    case SAIL_REG_WAITING:
        return read_waiting(f);
    case SAIL_REG_EPOCH:
        return f->resetting ? 0 : counters_of(f).epoch;
    case SAIL_REG_COMMAND_BASE_LO:
        return low(f->commands.base);
    case SAIL_REG_COMMAND_BASE_HI:
        return high(f->commands.base);
    case SAIL_REG_COMMAND_ENTRIES:
        return f->commands.entries;
    case SAIL_REG_COMMAND_TAIL:
        return f->commands.tail;
    case SAIL_REG_COMMAND_HEAD:
        return f->commands.head;
    case SAIL_REG_COMPLETION_BASE_LO:
        return low(f->completions.base);
    case SAIL_REG_COMPLETION_BASE_HI:
        return high(f->completions.base);
    case SAIL_REG_COMPLETION_ENTRIES:
        return f->completions.entries;
    case SAIL_REG_COMPLETION_HEAD:
        return f->completions.head;
    case SAIL_REG_COMPLETION_TAIL:
        return f->completions.tail;
    case SAIL_REG_EVENTS:
        return f->events;
    case SAIL_REG_EVENTS_MASK:
        return f->events_mask;
    case SAIL_REG_TEMPERATURE_MC:
        return (uint32_t)f->temperature_mc;
    case SAIL_REG_ECC_CORRECTED:
        return f->ecc_corrected;
    case SAIL_REG_ECC_UNCORRECTED:
        return f->ecc_uncorrected;
    case SAIL_REG_FAULT:
        return f->fault;
    case SAIL_REG_FAULT_ARG:
        return f->fault_arg;
    default:
        return 0;
    }
}

static void write_control(struct spk_front *f, uint32_t value)
{
    if (value & SAIL_CONTROL_RESET) {
        spk_front_reset(f);
        return;
    }
    bool wanted = value & SAIL_CONTROL_ENABLE;
    if (wanted && !f->enabled)
        enable(f);
    else if (!wanted && f->enabled)
        disable(f);
}

static void write_epoch(struct spk_front *f, uint32_t epoch)
{
    if (epoch > EPOCH_MAX || epoch <= f->epoch || f->resetting)
        return;
    f->epoch = epoch;
    f->abort_before = f->commands.tail;
    spk_card_abort(f->core, epoch);
}

static void write_command_tail(struct spk_front *f, uint32_t tail)
{
    f->commands.tail = tail;
    if (f->enabled && tail - f->commands.head > f->commands.entries)
        fail(f, SAIL_FAILURE_RING);
}

/* `head` may not overtake the tail, nor go back. */
static void write_completion_head(struct spk_front *f, uint32_t head)
{
    struct ring_registers *r = &f->completions;
    bool good = head - r->head <= r->tail - r->head;
    r->head = head;
    if (f->enabled && !good)
        fail(f, SAIL_FAILURE_RING);
}

static void write_setup(struct spk_front *f, uint64_t offset, uint32_t value)
{
    if (f->enabled)
        return;
    struct ring_registers *r =
        offset < SAIL_REG_COMPLETION_BASE_LO ? &f->commands : &f->completions;
    switch (offset) {
    case SAIL_REG_COMMAND_BASE_LO:
    case SAIL_REG_COMPLETION_BASE_LO:
        r->base_lo = value;
        break;
    case SAIL_REG_COMMAND_BASE_HI:
    case SAIL_REG_COMPLETION_BASE_HI:
        r->base = (uint64_t)value << 32 | r->base_lo;
        break;
    default:
        r->entries = value;
    }
}

static void write_register(struct spk_front *f, uint64_t offset, uint32_t value)
{
    uint64_t link = (offset - SAIL_REG_LINK(0)) / 0x40;
    if (offset >= SAIL_REG_LINK(0) && link < f->links && offset % 0x40 == SAIL_LINK_CONTROL) {
        control_link(f, (uint32_t)link, value);
        return;
    }
    if (offset >= SAIL_REG_FAULT && !f->has_faults)
        return;
    switch (offset) {
    case SAIL_REG_CONTROL:
        write_control(f, value);
        break;
    case SAIL_REG_WATCHDOG_MS:
        f->watchdog_ms = value;
        break;
    case SAIL_REG_EPOCH:
        write_epoch(f, value);
        break;
    case SAIL_REG_COMMAND_BASE_LO:
    case SAIL_REG_COMMAND_BASE_HI:
    case SAIL_REG_COMMAND_ENTRIES:
    case SAIL_REG_COMPLETION_BASE_LO:
    case SAIL_REG_COMPLETION_BASE_HI:
    case SAIL_REG_COMPLETION_ENTRIES:
        write_setup(f, offset, value);
        break;
    case SAIL_REG_COMMAND_TAIL:
        write_command_tail(f, value);
        break;
    case SAIL_REG_COMPLETION_HEAD:
        write_completion_head(f, value);
        break;
    case SAIL_REG_EVENTS:
        f->events &= ~value;
        tell_events(f);
        break;
    case SAIL_REG_EVENTS_MASK:
        f->events_mask = value & SAIL_EVENT_ALL;
        tell_events(f);
        break;
    case SAIL_REG_FAULT:
        set_fault(f, value);
        break;
    case SAIL_REG_FAULT_ARG:
        f->fault_arg = value;
        break;
    }
}

static bool is_register(uint64_t offset, uint32_t size)
{
    return size == 4 && offset % 4 == 0 && offset < SAIL_REGISTERS_BYTES;
}

uint32_t spk_front_read(struct spk_front *f, uint64_t offset, uint32_t size)
{
    if (f->gone)
        return UINT32_MAX;
    return is_register(offset, size) ? read_register(f, offset) : 0;
}

void spk_front_write(struct spk_front *f, uint64_t offset, uint32_t size, uint32_t value)
{
    if (!f->gone && is_register(offset, size))
        write_register(f, offset, value);
}

bool spk_front_is_gone(const struct spk_front *f)
{
    return f->gone;
}

bool spk_front_is_ready(const struct spk_front *f)
{
    return !f->resetting;
}

/* --- what drives it -------------------------------------------------------------------------- */

/* Waiting for a link is no fault of the card's; a host that does not take completions, neither. */
static void watch_progress(struct spk_front *f, uint64_t now)
{
    uint32_t progress = progress_of(f);
    bool waits = !f->hung && read_waiting(f) != SAIL_NO_LINK;
    if (!is_running(f) || !f->watchdog_ms || !running(f) || waits ||
        progress != f->progress_seen) {
        f->progress_seen = progress;
        f->progress_ns = now;
    }
    if (!is_running(f) || !f->watchdog_ms || !running(f))
        return;
    uint64_t limit = f->progress_ns + (uint64_t)f->watchdog_ms * 1000000u;
    if (now >= limit)
        fail(f, SAIL_FAILURE_WATCHDOG);
    else
        wake_at(f, limit);
}

uint64_t spk_front_poll(struct spk_front *f)
{
    uint64_t begin = now_ns(), now = begin;
    bool moved = true;
    f->wake_ns = UINT64_MAX;
    collect(f);
    if (f->resetting)
        end_reset(f);
    watch_links(f, now);
    while (moved && is_running(f)) {
        moved = begin_waiting(f);
        moved |= complete_first(f, now);
        moved |= fetch(f);
        now = now_ns();
        if (moved && now - begin > POLL_BUDGET_NS) {
            wake_at(f, now);
            break;
        }
    }
    if (f->completed && !f->gone)
        f->host.interrupt(f->host.context, SAIL_VECTOR_COMPLETION);
    f->completed = false;
    watch_progress(f, now);
    return f->wake_ns;
}

/* --- life ------------------------------------------------------------------------------------ */

struct spk_front *spk_front_create(struct spk_card *core, const struct spk_front_identity *identity,
                                   const struct spk_front_host *host, int *status)
{
    const char *texts[] = {identity->sku, identity->name, identity->isa};
    *status = SPK_E_ARG;
    if (identity->links > SAIL_LINKS_MAX || core->mapping)
        return NULL;
    *status = SPK_E_SYSTEM;
    struct spk_front *f = calloc(1, sizeof *f);
    if (!f)
        return NULL;
    f->core = core;
    f->host = *host;
    f->serial = identity->serial;
    for (int i = 0; i < 3; i++)
        memcpy(f->text[i], texts[i], strnlen(texts[i], SAIL_TEXT_BYTES));
    f->has_faults = identity->faults;
    f->links = identity->links;
    memcpy(f->peers, identity->peers, sizeof f->peers);
    begin_reset(f);
    *status = SPK_OK;
    return f;
}

void spk_front_destroy(struct spk_front *f)
{
    if (!f)
        return;
    for (uint32_t i = 0; i < SPK_PROGRAMS_MAX; i++)
        free(f->slots[i].table);
    free(f->image);
    free(f);
}
