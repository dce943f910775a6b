/* SPDX-License-Identifier: Apache-2.0 */
/* The card's outside: DDR buffers, programs, the queue, completions, and the step that drives
 * the engine. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "card_internal.h"

/* A step gives the worker back after this much work, to look for aborts and other cards. */
#define STEP_BUDGET_NS 1000000u
/* Longer rests of a slow card are cut: whoever watches for progress sees some. */
#define REST_MAX_NS 20000000u

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t align_up(uint64_t n)
{
    return (n + SPK_DDR_ALIGN - 1) / SPK_DDR_ALIGN * SPK_DDR_ALIGN;
}

static bool is_end(int plant)
{
    return plant >= SPK_PLANT_DIE;
}

static int status_of(int plant)
{
    static const int status[] = {[SPK_PLANT_DIE] = SPK_E_LOST,
                                 [SPK_PLANT_RESET] = SPK_E_RESET,
                                 [SPK_PLANT_MEMORY] = SPK_E_MEMORY};
    return is_end(plant) ? status[plant] : SPK_OK;
}

int spk_card_lost(struct spk_card *c)
{
    return status_of(atomic_load(&c->plant));
}

/* --- life ------------------------------------------------------------------------------- */

/* `ddr` NULL: memory of its own. */
static struct spk_card *create(uint8_t *ddr, uint64_t ddr_bytes, int isa, int *status)
{
    const struct spk_kernels *kernels = spk_kernels_get(isa);
    struct spk_card *c = NULL;

    *status = SPK_E_ARG;
    if (!kernels || ddr_bytes == 0 || ddr_bytes % SPK_DDR_ALIGN)
        return NULL;
    *status = SPK_E_SYSTEM;
    c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->kernels = kernels;
    c->ddr_bytes = ddr_bytes;
    atomic_init(&c->waiting_for, -1);
    c->next_fence = 1;
    c->epoch = 1;
    atomic_init(&c->epoch_seen, 1);
    atomic_init(&c->abort_epoch, 1);
    c->event_fd = -1;
    pthread_mutex_init(&c->mutex, NULL);
    c->ddr = ddr;
    if (!ddr && !pages_reserve(c))
        goto fail;
    c->links = calloc(SPK_CARDS_MAX, sizeof *c->links);
    c->meeting = aligned_alloc(_Alignof(struct meeting), sizeof *c->meeting);
    if (!c->links || !c->meeting)
        goto fail;
    memset(c->meeting, 0, sizeof *c->meeting);
    c->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (c->event_fd < 0)
        goto fail;
    *status = SPK_OK;
    return c;
fail:
    spk_card_destroy(c);
    return NULL;
}

struct spk_card *spk_card_create(uint64_t ddr_bytes, int isa, int *status)
{
    return create(NULL, ddr_bytes, isa, status);
}

struct spk_card *spk_card_create_on(void *ddr, uint64_t ddr_bytes, int isa, int *status)
{
    *status = SPK_E_ARG;
    if (!ddr || (uintptr_t)ddr % 4096)
        return NULL;
    return create(ddr, ddr_bytes, isa, status);
}

static uint8_t *writable(const uint8_t *p)
{
    return (uint8_t *)(uintptr_t)p;
}

static void free_program(struct program *p)
{
    if (p)
        free(p->commands);
    free(p);
}

static void free_completions(struct spk_card *c)
{
    for (uint32_t i = 0; i < c->completion_count; i++)
        free(writable(c->completions[(c->completion_head + i) % SPK_QUEUE_MAX].result));
    free(c->taken_result);
}

static void free_programs(struct spk_card *c)
{
    for (int i = 0; i < SPK_PROGRAMS_MAX; i++)
        free_program(c->programs[i]);
}

void spk_card_destroy(struct spk_card *c)
{
    if (!c)
        return;
    for (uint32_t i = 0; i < c->queue_count; i++) {
        free(c->queue[(c->queue_head + i) % SPK_QUEUE_MAX].params);
        free(c->queue[(c->queue_head + i) % SPK_QUEUE_MAX].result);
        free(c->queue[(c->queue_head + i) % SPK_QUEUE_MAX].timeline);
    }
    free_completions(c);
    free(c->trace.events);
    free_programs(c);
    if (c->links)
        link_release(c);
    free(c->links);
    free(c->meeting);
    free(c->buffers);
    free(c->scratch);
    if (c->event_fd >= 0)
        close(c->event_fd);
    pages_release(c);
    pthread_mutex_destroy(&c->mutex);
    free(c);
}

/* --- memory ------------------------------------------------------------------------------ */

/* First fit over the buffers in order of address: few hundred buffers, allocated at load. */
static bool find_gap(struct spk_card *c, uint64_t need, uint64_t *offset)
{
    uint64_t at = 0;
    for (;;) {
        uint64_t next = c->ddr_bytes, next_end = 0;
        for (uint32_t i = 0; i < c->buffer_count; i++) {
            const struct buffer *b = &c->buffers[i];
            if (b->bytes && !b->window && b->offset >= at && b->offset < next) {
                next = b->offset;
                next_end = b->offset + align_up(b->bytes);
            }
        }
        if (next - at >= need) {
            *offset = at;
            return true;
        }
        if (!next_end)
            return false;
        at = next_end;
    }
}

static uint32_t free_slot_from(const struct spk_card *c, uint32_t slot)
{
    while (slot < c->buffer_count && c->buffers[slot].bytes)
        slot++;
    return slot;
}

static uint32_t free_slot(const struct spk_card *c)
{
    return free_slot_from(c, 0);
}

static int enter_buffer(struct spk_card *c, uint32_t slot, struct buffer b)
{
    if (slot == c->buffer_count) {
        if (slot == SPK_BUFFERS_MAX)
            return SPK_E_NOMEM;
        if (slot == c->buffer_room) {
            uint32_t room = slot ? 2 * slot : 64;
            struct buffer *grown = realloc(c->buffers, room * sizeof *grown);
            if (!grown)
                return SPK_E_SYSTEM;
            c->buffers = grown;
            c->buffer_room = room;
        }
        c->buffer_count++;
    }
    c->buffers[slot] = b;
    return SPK_OK;
}

static int alloc_locked(struct spk_card *c, uint64_t nbytes, uint32_t *handle)
{
    uint64_t offset, need = align_up(nbytes);
    uint32_t slot = free_slot(c);

    /* Most cards only ever allocate: then everything before is packed and the gap is the end. */
    if (slot == c->buffer_count && c->ddr_used + need <= c->ddr_bytes) {
        uint64_t end = 0;
        for (uint32_t i = 0; i < c->buffer_count; i++) {
            const struct buffer *b = &c->buffers[i];
            uint64_t e = b->window ? 0 : b->offset + align_up(b->bytes);
            end = e > end ? e : end;
        }
        if (c->ddr_bytes - end >= need)
            offset = end;
        else if (!find_gap(c, need, &offset))
            return SPK_E_NOMEM;
    } else if (!find_gap(c, need, &offset)) {
        return SPK_E_NOMEM;
    }
    int status = enter_buffer(
        c, slot,
        (struct buffer){.offset = offset, .bytes = nbytes, .memory = c->ddr + offset});
    if (status != SPK_OK)
        return status;
    c->ddr_used += need;
    *handle = slot;
    return SPK_OK;
}

int spk_card_alloc(struct spk_card *c, uint64_t nbytes, uint32_t *handle)
{
    int lost = spk_card_lost(c);
    if (lost != SPK_OK)
        return lost;
    if (nbytes == 0)
        return SPK_E_ARG;
    if (nbytes > c->ddr_bytes)
        return SPK_E_NOMEM;
    pthread_mutex_lock(&c->mutex);
    /* The engine reads the table without the lock: it may only move while nothing runs. */
    int status = c->queue_count ? SPK_E_BUSY : alloc_locked(c, nbytes, handle);
    pthread_mutex_unlock(&c->mutex);
    return status;
}

int spk_card_window(struct spk_card *c, uint64_t nbytes, uint32_t *handle)
{
    int lost = spk_card_lost(c);
    if (lost != SPK_OK)
        return lost;
    if (nbytes == 0 || nbytes >> 48)
        return SPK_E_ARG;
    pthread_mutex_lock(&c->mutex);
    *handle = free_slot(c);
    int status = c->queue_count
                     ? SPK_E_BUSY
                     : enter_buffer(c, *handle, (struct buffer){.bytes = nbytes, .window = true});
    pthread_mutex_unlock(&c->mutex);
    return status;
}

static int enter_locked(struct spk_card *c, const struct spk_range *ranges, size_t count,
                        uint32_t *handles)
{
    uint32_t slot = 0;
    int status = c->queue_count ? SPK_E_BUSY : SPK_OK;
    size_t entered = 0;
    for (; entered < count && status == SPK_OK; entered++) {
        const struct spk_range *r = &ranges[entered];
        slot = free_slot_from(c, slot);
        status = enter_buffer(c, slot,
                              (struct buffer){.offset = r->offset,
                                              .bytes = r->nbytes,
                                              .entered = true,
                                              .memory = c->ddr + r->offset});
        if (status != SPK_OK)
            break;
        c->ddr_used += align_up(r->nbytes);
        handles[entered] = slot;
    }
    for (size_t i = 0; status != SPK_OK && i < entered; i++) {
        c->ddr_used -= align_up(c->buffers[handles[i]].bytes);
        c->buffers[handles[i]].bytes = 0;
    }
    return status;
}

int spk_card_enter(struct spk_card *c, const struct spk_range *ranges, size_t count,
                   uint32_t *handles)
{
    int lost = spk_card_lost(c);
    if (lost != SPK_OK)
        return lost;
    for (size_t i = 0; i < count; i++)
        if (!ranges[i].nbytes || ranges[i].offset % SPK_DDR_ALIGN ||
            ranges[i].offset > c->ddr_bytes || ranges[i].nbytes > c->ddr_bytes - ranges[i].offset)
            return SPK_E_BOUNDS;
    pthread_mutex_lock(&c->mutex);
    int status = enter_locked(c, ranges, count, handles);
    pthread_mutex_unlock(&c->mutex);
    return status;
}

static struct buffer *find_buffer(struct spk_card *c, uint32_t handle)
{
    if (handle >= c->buffer_count || !c->buffers[handle].bytes)
        return NULL;
    return &c->buffers[handle];
}

/* Zeros for the next owner.  Whole pages go back to the system, the rest is cleared by hand: the
 * first and last page may be shared with neighbours. */
static void clear(uint8_t *begin, uint64_t nbytes)
{
    uint8_t *end = begin + nbytes;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uint8_t *first = (uint8_t *)(((uintptr_t)begin + page - 1) / page * page);
    uint8_t *last = (uint8_t *)((uintptr_t)end / page * page);
    if (first >= last || madvise(first, (size_t)(last - first), MADV_DONTNEED) != 0) {
        memset(begin, 0, nbytes);
        return;
    }
    memset(begin, 0, (size_t)(first - begin));
    memset(last, 0, (size_t)(end - last));
}

/* Nothing is left of what was in its place in the DDR. */
static void empty(struct spk_card *c, const struct buffer *b)
{
    clear(c->ddr + b->offset, align_up(b->bytes));
    pages_freed(c, b->offset, align_up(b->bytes));
}

int spk_card_free(struct spk_card *c, uint32_t handle)
{
    int status = SPK_OK;
    int lost = spk_card_lost(c);
    if (lost != SPK_OK)
        return lost;
    pthread_mutex_lock(&c->mutex);
    struct buffer *b = find_buffer(c, handle);
    if (!b) {
        status = SPK_E_HANDLE;
    } else if (b->users) {
        status = SPK_E_BUSY;
    } else {
        uint64_t bytes = b->window ? 0 : align_up(b->bytes);
        if (bytes && !b->lent && !b->entered)
            empty(c, b);
        c->ddr_used -= bytes;
        b->bytes = 0;
    }
    pthread_mutex_unlock(&c->mutex);
    return status;
}

int spk_card_lend(struct spk_card *c, uint32_t handle, const void *memory, uint64_t nbytes)
{
    int status = SPK_OK;
    int lost = spk_card_lost(c);
    if (lost != SPK_OK)
        return lost;
    pthread_mutex_lock(&c->mutex);
    struct buffer *b = find_buffer(c, handle);
    if (!b || b->entered)
        status = SPK_E_HANDLE;
    else if (!memory || (uintptr_t)memory % SPK_LENT_ALIGN || nbytes != b->bytes)
        status = SPK_E_BOUNDS;
    else if (c->queue_count || b->users)
        status = SPK_E_BUSY; /* the engine may be looking at the table, and a program at the bytes */
    else {
        /* Clearing would touch its first and last page. */
        if (!b->lent && b->used && !b->window)
            empty(c, b);
        b->lent = true;
        b->memory = writable(memory);
        atomic_store(&c->small_pages, true);
    }
    pthread_mutex_unlock(&c->mutex);
    return status;
}

/* Moves the bytes of a lent buffer to its place in the DDR. */
static void own(struct spk_card *c, struct buffer *b)
{
    uint8_t *place = c->ddr + b->offset;
    pages_before_write(c, place, b->bytes);
    memcpy(place, b->memory, b->bytes);
    b->memory = place;
    b->lent = false;
    b->used = true;
}

static int locate(struct spk_card *c, uint32_t handle, uint64_t offset, uint64_t nbytes, bool write,
                  uint8_t **at)
{
    int status = SPK_OK;
    int lost = spk_card_lost(c);
    if (lost != SPK_OK)
        return lost;
    pthread_mutex_lock(&c->mutex);
    struct buffer *b = find_buffer(c, handle);
    if (!b || b->window)
        status = SPK_E_HANDLE;
    else if (offset > b->bytes || nbytes > b->bytes - offset)
        status = SPK_E_BOUNDS;
    else {
        if (write && b->lent)
            own(c, b);
        b->used |= write;
        *at = b->memory + offset;
    }
    pthread_mutex_unlock(&c->mutex);
    return status;
}

int spk_card_write(struct spk_card *c, uint32_t handle, uint64_t offset, const void *data,
                   uint64_t nbytes)
{
    uint8_t *at;
    int status = locate(c, handle, offset, nbytes, true, &at);
    if (status == SPK_OK && nbytes) {
        pages_before_write(c, at, nbytes);
        memcpy(at, data, nbytes);
    }
    return status;
}

int spk_card_place(struct spk_card *c, uint32_t handle, uint64_t offset, uint64_t nbytes, void **out)
{
    uint8_t *at = NULL;
    int status = locate(c, handle, offset, nbytes, true, &at);
    if (status == SPK_OK && nbytes)
        pages_before_write(c, at, nbytes);
    *out = at;
    return status;
}

int spk_card_can_read(struct spk_card *c, uint32_t handle, uint64_t offset, uint64_t nbytes)
{
    uint8_t *at;
    return locate(c, handle, offset, nbytes, false, &at);
}

int spk_card_read(struct spk_card *c, uint32_t handle, uint64_t offset, void *data, uint64_t nbytes)
{
    uint8_t *at;
    int status = locate(c, handle, offset, nbytes, false, &at);
    if (status == SPK_OK && nbytes)
        memcpy(data, at, nbytes);
    return status;
}

/* --- programs ---------------------------------------------------------------------------- */

static int load_locked(struct spk_card *c, struct program *p, uint32_t *handle, uint32_t *bad,
                       char *why)
{
    uint32_t slot = 0;
    while (slot < SPK_PROGRAMS_MAX && c->programs[slot])
        slot++;
    if (slot == SPK_PROGRAMS_MAX) {
        snprintf(why, 256, "all %d program slots are taken", SPK_PROGRAMS_MAX);
        return SPK_E_NOMEM;
    }
    int status = program_check(c, p, bad, why);
    if (status != SPK_OK)
        return status;
    size_t scratch = program_scratch_bytes(p);
    if (scratch > c->scratch_bytes) {
        if (c->queue_count) {
            snprintf(why, 256, "the program needs more scratch memory while another runs");
            return SPK_E_BUSY;
        }
        free(c->scratch);
        c->scratch_bytes = 0;
        c->scratch = aligned_alloc(64, scratch);
        if (!c->scratch) {
            snprintf(why, 256, "no host memory for %zu bytes of scratch", scratch);
            return SPK_E_SYSTEM;
        }
        c->scratch_bytes = scratch;
    }
    if (p->table)
        program_translate(p);
    uint32_t command = 0;
    int ref = 0;
    for (struct buffer *b; (b = program_next_written(c, p, &command, &ref));)
        if (b->lent) {
            if (c->queue_count) {
                snprintf(why, 256, "a buffer that it writes to must move while another runs");
                return SPK_E_BUSY;
            }
            own(c, b);
        }
    program_count_users(c, p, 1);
    c->programs[slot] = p;
    *handle = slot;
    return SPK_OK;
}

int spk_card_load_program(struct spk_card *c, const void *blob, size_t nbytes, uint32_t *handle,
                          uint32_t *bad, char *why)
{
    return spk_card_load_by_table(c, blob, nbytes, NULL, 0, handle, bad, why);
}

int spk_card_load_by_table(struct spk_card *c, const void *blob, size_t nbytes,
                           const uint32_t *table, size_t table_count, uint32_t *handle,
                           uint32_t *bad, char *why)
{
    struct program *p;
    size_t body;

    *bad = 0;
    int lost = spk_card_lost(c);
    if (lost != SPK_OK) {
        snprintf(why, 256, "the card is gone");
        return lost;
    }
    p = calloc(1, sizeof *p);
    if (!p) {
        snprintf(why, 256, "no host memory");
        return SPK_E_SYSTEM;
    }
    if (nbytes < sizeof p->header) {
        snprintf(why, 256, "a program has at least %zu bytes, got %zu", sizeof p->header, nbytes);
        goto bad_argument;
    }
    memcpy(&p->header, blob, sizeof p->header);
    if (p->header.magic != SPK_PROGRAM_MAGIC || p->header.version != SPK_PROGRAM_VERSION) {
        snprintf(why, 256, "not a version %d program", SPK_PROGRAM_VERSION);
        goto bad_argument;
    }
    body = nbytes - sizeof p->header;
    if (p->header.commands > SPK_COMMANDS_MAX ||
        body != (size_t)p->header.commands * sizeof *p->commands) {
        snprintf(why, 256, "%u commands (at most %d) do not fill %zu bytes", p->header.commands,
                 SPK_COMMANDS_MAX, body);
        goto bad_argument;
    }
    p->commands = malloc(body ? body : 1);
    if (!p->commands) {
        snprintf(why, 256, "no host memory");
        free_program(p);
        return SPK_E_SYSTEM;
    }
    if (body)
        memcpy(p->commands, (const uint8_t *)blob + sizeof p->header, body);
    p->table = table;
    p->table_count = table_count;
    pthread_mutex_lock(&c->mutex);
    int status = load_locked(c, p, handle, bad, why);
    pthread_mutex_unlock(&c->mutex);
    if (status != SPK_OK)
        free_program(p);
    return status;
bad_argument:
    free_program(p);
    return SPK_E_ARG;
}

int spk_card_unload_program(struct spk_card *c, uint32_t handle)
{
    int status = SPK_OK;
    int lost = spk_card_lost(c);
    if (lost != SPK_OK)
        return lost;
    pthread_mutex_lock(&c->mutex);
    if (handle >= SPK_PROGRAMS_MAX || !c->programs[handle]) {
        status = SPK_E_HANDLE;
    } else if (c->programs[handle]->users) {
        status = SPK_E_BUSY;
    } else {
        program_count_users(c, c->programs[handle], -1);
        free_program(c->programs[handle]);
        c->programs[handle] = NULL;
    }
    pthread_mutex_unlock(&c->mutex);
    return status;
}

/* --- queue ------------------------------------------------------------------------------- */

/* The bytes that the reads of a step bring back; checked, and their buffers held. */
static int hold_reads(struct spk_card *c, const struct spk_read *reads, size_t count,
                      uint64_t *bytes, char *why)
{
    *bytes = 0;
    for (size_t i = 0; i < count; i++) {
        const struct buffer *b = find_buffer(c, reads[i].buffer);
        if (!b || b->window) {
            snprintf(why, 256, "read %zu: no buffer %u", i, reads[i].buffer);
            return SPK_E_HANDLE;
        }
        if (reads[i].offset > b->bytes || reads[i].nbytes > b->bytes - reads[i].offset ||
            reads[i].reserved) {
            snprintf(why, 256, "read %zu: %llu bytes at %llu, buffer %u ends at %llu", i,
                     (unsigned long long)reads[i].nbytes, (unsigned long long)reads[i].offset,
                     reads[i].buffer, (unsigned long long)b->bytes);
            return SPK_E_BOUNDS;
        }
        *bytes += reads[i].nbytes;
        if (*bytes > SPK_RESULT_BYTES_MAX) {
            snprintf(why, 256, "reads of more than %d bytes", SPK_RESULT_BYTES_MAX);
            return SPK_E_BOUNDS;
        }
    }
    for (size_t i = 0; i < count; i++)
        c->buffers[reads[i].buffer].users++;
    return SPK_OK;
}

/* Memory for exactly the windows of the program, put in its order. */
static int check_lent(struct spk_card *c, const struct program *p, struct submission *s,
                      const struct spk_lent *lent, size_t count, char *why)
{
    if (count != p->window_count) {
        snprintf(why, 256, "memory lent for %zu windows, the program has %u", count,
                 p->window_count);
        return SPK_E_PARAMS;
    }
    for (uint32_t w = 0; w < p->window_count; w++) {
        size_t i = 0;
        while (i < count && lent[i].window != p->window[w])
            i++;
        if (i == count) {
            snprintf(why, 256, "no memory lent for window %u", p->window[w]);
            return SPK_E_PARAMS;
        }
        if (!lent[i].memory || (uintptr_t)lent[i].memory % p->window_align[w] || lent[i].reserved ||
            lent[i].nbytes != c->buffers[p->window[w]].bytes) {
            snprintf(why, 256, "window %u takes %llu bytes aligned to %u, lent are %llu at %p",
                     p->window[w], (unsigned long long)c->buffers[p->window[w]].bytes,
                     p->window_align[w], (unsigned long long)lent[i].nbytes, lent[i].memory);
            return SPK_E_PARAMS;
        }
        s->lent[w] = lent[i];
    }
    return SPK_OK;
}

/* What comes next was given out in the belief that the step before it succeeds. */
static bool unknown_fault(const struct spk_card *c)
{
    bool found = false;
    for (uint32_t i = 0; i < c->completion_count; i++) {
        int status = c->completions[(c->completion_head + i) % SPK_QUEUE_MAX].status;
        found |= status != SPK_OK && status != SPK_E_ABORTED;
    }
    return found;
}

static int submit_locked(struct spk_card *c, uint32_t handle, struct submission *s, size_t nbytes,
                         const struct spk_lent *lent, size_t lent_count, char *why)
{
    uint64_t bytes;
    if (handle >= SPK_PROGRAMS_MAX || !c->programs[handle]) {
        snprintf(why, 256, "no program %u", handle);
        return SPK_E_HANDLE;
    }
    if (c->queue_count + c->completion_count >= SPK_QUEUE_MAX) {
        snprintf(why, 256, "%d steps are queued or wait to be collected", SPK_QUEUE_MAX);
        return SPK_E_BUSY;
    }
    if (!c->mapping && unknown_fault(c)) {
        snprintf(why, 256, "a completion that has not been collected tells of a fault");
        return SPK_E_BUSY;
    }
    int status = step_check(c->programs[handle], s->params, nbytes, why);
    if (status == SPK_OK)
        status = check_lent(c, c->programs[handle], s, lent, lent_count, why);
    if (status == SPK_OK)
        status = hold_reads(c, s->reads, s->read_count, &bytes, why);
    if (status != SPK_OK)
        return status;
    s->program = c->programs[handle];
    s->epoch = atomic_load(&c->abort_epoch);
    s->result = malloc(bytes ? bytes : 1);
    if (!s->result || (c->pace && !pace_submitted(c, s))) {
        free(s->result);
        for (uint32_t i = 0; i < s->read_count; i++)
            c->buffers[s->reads[i].buffer].users--;
        snprintf(why, 256, "no host memory");
        return SPK_E_SYSTEM;
    }
    s->program->users++;
    s->fence = c->next_fence++;
    c->queue[(c->queue_head + c->queue_count) % SPK_QUEUE_MAX] = *s;
    c->queue_count++;
    return SPK_OK;
}

int spk_card_submit(struct spk_card *c, uint32_t handle, const void *params, size_t nbytes,
                    const struct spk_read *reads, size_t read_count, uint64_t *fence, char *why)
{
    return spk_card_submit_lending(c, handle, params, nbytes, reads, read_count, NULL, 0, fence,
                                   why);
}

/* `awaited`: for a card that has nothing queued and nothing to be collected. */
static int submit(struct spk_card *c, uint32_t handle, const void *params, size_t nbytes,
                  const struct spk_read *reads, size_t read_count, const struct spk_lent *lent,
                  size_t lent_count, bool awaited, uint64_t *fence, char *why)
{
    struct submission s = {0};

    int lost = spk_card_lost(c);
    if (lost != SPK_OK) {
        snprintf(why, 256, "the card is gone");
        return lost;
    }
    if (nbytes > SPK_STEP_BYTES_MAX) {
        snprintf(why, 256, "%zu bytes of parameters, at most %d", nbytes, SPK_STEP_BYTES_MAX);
        return SPK_E_PARAMS;
    }
    if (read_count > SPK_READS_MAX) {
        snprintf(why, 256, "%zu reads, at most %d", read_count, SPK_READS_MAX);
        return SPK_E_PARAMS;
    }
    s.params = malloc(nbytes ? nbytes : 1);
    if (!s.params) {
        snprintf(why, 256, "no host memory");
        return SPK_E_SYSTEM;
    }
    if (nbytes)
        memcpy(s.params, params, nbytes);
    s.read_count = (uint32_t)read_count;
    if (read_count)
        memcpy(s.reads, reads, read_count * sizeof *reads);
    pthread_mutex_lock(&c->mutex);
    int status = SPK_E_BUSY;
    if (!awaited || !(c->queue_count + c->completion_count))
        status = submit_locked(c, handle, &s, nbytes, lent, lent_count, why);
    *fence = s.fence;
    if (status == SPK_OK) {
        c->awaited = awaited;
        atomic_store(&c->ready, 1);
    }
    pthread_mutex_unlock(&c->mutex);
    if (status == SPK_OK)
        pool_notify(c);
    else
        free(s.params);
    return status;
}

int spk_card_submit_lending(struct spk_card *c, uint32_t handle, const void *params, size_t nbytes,
                            const struct spk_read *reads, size_t read_count,
                            const struct spk_lent *lent, size_t lent_count, uint64_t *fence,
                            char *why)
{
    return submit(c, handle, params, nbytes, reads, read_count, lent, lent_count, false, fence, why);
}

/* Whether a host thread may do a program itself, or `beside` workers. */
static bool is_quick(struct spk_card *c, uint32_t handle, bool *beside)
{
    pthread_mutex_lock(&c->mutex);
    const struct program *p = handle < SPK_PROGRAMS_MAX ? c->programs[handle] : NULL;
    /* A throttled or slow card ends its commands when it is their time: a worker waits for that. */
    bool quick = !c->pace && !atomic_load(&c->slowness) && p && (p->quick || p->brief);
    *beside = quick && !p->quick;
    pthread_mutex_unlock(&c->mutex);
    return quick;
}

int spk_card_submit_helping(struct spk_card *c, uint32_t handle, const void *params, size_t nbytes,
                            const struct spk_read *reads, size_t read_count,
                            const struct spk_lent *lent, size_t lent_count, uint64_t *fence,
                            char *why)
{
    bool beside, help = is_quick(c, handle, &beside) && pool_hush(c, beside);
    int status = spk_card_submit_lending(c, handle, params, nbytes, reads, read_count, lent,
                                         lent_count, fence, why);
    if (help)
        pool_help(c, beside);
    return status;
}

/* With the card's mutex held. */
static bool take_completion(struct spk_card *c, struct spk_completion *out)
{
    bool got = c->completion_count > 0;
    free(c->taken_result);
    c->taken_result = NULL;
    if (got) {
        *out = c->completions[c->completion_head];
        c->taken_result = writable(out->result);
        c->completion_head = (c->completion_head + 1) % SPK_QUEUE_MAX;
        c->completion_count--;
    }
    return got;
}

/* Whether one thread may do the programs of all parts, or `beside` workers. */
static bool are_quick(const struct spk_part *parts, size_t count, bool *beside)
{
    bool all = count > 0, one_beside;
    *beside = false;
    for (size_t i = 0; i < count && all; i++) {
        all = is_quick(parts[i].card, parts[i].program, &one_beside);
        *beside |= one_beside;
    }
    return all;
}

size_t spk_parts_run(struct spk_part *parts, size_t count, void *const *memory, const void *params,
                     size_t nbytes)
{
    char why[256];
    size_t begun = 0, succeeded = 0;
    bool beside, help = are_quick(parts, count, &beside);
    /* In place of the last card's worker: that of the first has its part begun already. */
    help = help && pool_hush(parts[count - 1].card, beside);
    for (size_t i = 0; i < count; i++) {
        struct spk_part *part = &parts[i];
        part->fence = part->done = 0;
        for (uint32_t w = 0; w < part->lent_count; w++)
            part->lent[w].memory = *memory++;
        if (begun == i && submit(part->card, part->program, params, nbytes, NULL, 0, part->lent,
                                 part->lent_count, true, &part->fence, why) == SPK_OK)
            begun++;
    }
    if (help)
        pool_help(parts[count - 1].card, beside);
    for (size_t i = 0; i < begun; i++) {
        struct spk_card *c = parts[i].card;
        pthread_mutex_lock(&c->mutex);
        c->awaited = false;
        parts[i].done = take_completion(c, &parts[i].completion);
        pthread_mutex_unlock(&c->mutex);
        succeeded += parts[i].done && parts[i].completion.status == SPK_OK;
    }
    return succeeded;
}

void card_signal(struct spk_card *c)
{
    uint64_t one = 1;
    ssize_t n = write(c->event_fd, &one, sizeof one);
    (void)n; /* fails only when the counter is full, and then the fd is readable already */
}

/* What the step brings back is copied now: the next step may write where it was. */
static uint64_t take_reads(struct spk_card *c, struct submission *s, bool succeeded)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < s->read_count; i++) {
        const struct spk_read *r = &s->reads[i];
        struct buffer *b = &c->buffers[r->buffer];
        b->users--;
        if (succeeded) {
            memcpy(s->result + bytes, b->memory + r->offset, r->nbytes);
            bytes += r->nbytes;
        }
    }
    return bytes;
}

static void show_lent(struct spk_card *c, const struct submission *s, bool shown)
{
    for (uint32_t w = 0; w < s->program->window_count; w++)
        c->buffers[s->program->window[w]].memory = shown ? s->lent[w].memory : NULL;
}

/* Completes the submission at the head of the queue. */
static void complete(struct spk_card *c, int status)
{
    struct execution *run = &c->run;
    pthread_mutex_lock(&c->mutex);
    struct submission *s = &c->queue[c->queue_head];
    uint32_t slot = (c->completion_head + c->completion_count) % SPK_QUEUE_MAX;
    if (s->timeline) {
        /* What a throttled card would have computed, not what this machine did. */
        run->busy_ns = pace_completed(c, s, status == SPK_OK);
        atomic_fetch_add(&c->busy_ns, run->busy_ns);
    }
    c->completions[slot] = (struct spk_completion){
        .fence = s->fence,
        .busy_ns = run->active ? run->busy_ns : 0,
        .status = status,
        .command = run->active ? run->pc : 0,
        .result = s->result,
        .result_bytes = take_reads(c, s, status == SPK_OK),
    };
    c->completion_count++;
    show_lent(c, s, false);
    s->program->users--;
    free(s->params);
    c->queue_head = (c->queue_head + 1) % SPK_QUEUE_MAX;
    c->queue_count--;
    run->active = false;
    c->known_from = c->next_fence;
    atomic_store(&c->waiting_for, -1);
    if (status == SPK_OK)
        atomic_fetch_add(&c->steps, 1);
    bool awaited = c->awaited;
    pthread_mutex_unlock(&c->mutex);
    /* After the lock is free, or the host wakes up only to wait for it.  So a collector that was
     * quicker can find the fd readable once with nothing behind it. */
    if (!awaited)
        card_signal(c);
}

int spk_card_completion(struct spk_card *c, struct spk_completion *out)
{
    uint64_t drained;
    pthread_mutex_lock(&c->mutex);
    int got = take_completion(c, out);
    if (!c->completion_count) {
        ssize_t n = read(c->event_fd, &drained, sizeof drained);
        (void)n; /* EAGAIN: nothing was signalled */
    }
    pthread_mutex_unlock(&c->mutex);
    return got;
}

int spk_card_fd(struct spk_card *c)
{
    return c->event_fd;
}

int spk_card_abort(struct spk_card *c, uint32_t epoch)
{
    uint32_t seen = atomic_load(&c->abort_epoch);
    do {
        if (epoch <= seen)
            return SPK_E_ARG;
    } while (!atomic_compare_exchange_weak(&c->abort_epoch, &seen, epoch));
    atomic_store(&c->ready, 1);
    pool_notify(c);
    return SPK_OK;
}

static void look_again(struct spk_card *c)
{
    atomic_store(&c->ready, 1);
    pool_notify(c);
}

/* What has ended stays so; only SPK_PLANT_NONE comes after an end. */
static void plant_fault(struct spk_card *c, int fault)
{
    int found = atomic_load(&c->plant);
    while (!(is_end(found) && fault != SPK_PLANT_NONE) &&
           !atomic_compare_exchange_weak(&c->plant, &found, fault))
        ;
}

void spk_card_plant(struct spk_card *c, int fault)
{
    plant_fault(c, fault);
    look_again(c);
}

void spk_card_plant_at(struct spk_card *c, int fault, uint32_t command)
{
    atomic_store(&c->planted, (uint64_t)fault << 32 | command);
    look_again(c);
}

void spk_card_slow(struct spk_card *c, double factor)
{
    if (!(factor >= 1))
        factor = 1;
    factor = factor < SPK_SLOWEST ? factor : SPK_SLOWEST;
    if (c->pace)
        pace_slow(c, factor);
    else
        atomic_store(&c->slowness, (uint64_t)((factor - 1) * 65536));
    look_again(c);
}

void spk_card_restart(struct spk_card *c)
{
    /* Before it has restarted the counters must not say so. */
    atomic_store(&c->epoch_seen, UINT32_MAX);
    atomic_store(&c->restarts, 1);
    spk_card_plant(c, SPK_PLANT_NONE);
}

void spk_card_counters(struct spk_card *c, struct spk_counters *out)
{
    pthread_mutex_lock(&c->mutex);
    *out = (struct spk_counters){
        .commands = c->commands,
        .steps = c->steps,
        .ddr_read_bytes = c->ddr_read,
        .ddr_written_bytes = c->ddr_written,
        .busy_ns = c->busy_ns,
        .progress = c->progress,
        .ddr_used_bytes = c->ddr_used,
        .ddr_total_bytes = c->ddr_bytes,
        .queued = c->queue_count,
        .waiting_for = c->waiting_for,
        .command = c->command,
        .epoch = c->epoch_seen,
    };
    pthread_mutex_unlock(&c->mutex);
}

void spk_card_link_bytes(struct spk_card *c, uint32_t peer, uint64_t *tx, uint64_t *rx)
{
    *tx = *rx = 0;
    if (peer < SPK_CARDS_MAX) {
        *tx = atomic_load(&c->links[peer].tx_bytes);
        *rx = atomic_load(&c->links[peer].rx_bytes);
    }
}

/* --- the trace ---------------------------------------------------------------------------- */

int spk_card_trace(struct spk_card *c, uint64_t events)
{
    int status = SPK_OK;
    if (events > SPK_TRACE_EVENTS_MAX)
        return SPK_E_ARG;
    pthread_mutex_lock(&c->mutex);
    if (c->queue_count) {
        status = SPK_E_BUSY;
    } else {
        free(c->trace.events);
        c->trace.events = events ? malloc(events * sizeof *c->trace.events) : NULL;
        c->trace.capacity = c->trace.events ? events : 0;
        c->trace.written = c->trace.read = c->trace.lost = 0;
        if (events && !c->trace.events)
            status = SPK_E_SYSTEM;
    }
    pthread_mutex_unlock(&c->mutex);
    return status;
}

uint64_t spk_card_trace_read(struct spk_card *c, struct spk_trace_event *out, uint64_t most,
                             uint64_t *lost)
{
    struct trace *t = &c->trace;
    uint64_t from = atomic_load(&t->read), left = atomic_load(&t->written) - from;
    left = left < most ? left : most;
    for (uint64_t i = 0; i < left; i++)
        out[i] = t->events[(from + i) % t->capacity];
    atomic_store(&t->read, from + left);
    *lost = atomic_load(&t->lost);
    return left;
}

static void trace_command(struct spk_card *c, uint64_t end_ns)
{
    struct trace *t = &c->trace;
    const struct execution *run = &c->run;
    const struct spk_command *cmd = &run->submission.program->commands[run->pc];
    uint64_t at = atomic_load_explicit(&t->written, memory_order_relaxed);
    if (at - atomic_load_explicit(&t->read, memory_order_acquire) == t->capacity) {
        atomic_fetch_add_explicit(&t->lost, 1, memory_order_relaxed);
        return;
    }
    t->events[at % t->capacity] = (struct spk_trace_event){.begin_ns = run->command_begin_ns,
                                                           .end_ns = end_ns,
                                                           .fence = run->submission.fence,
                                                           .command = run->pc,
                                                           .op = cmd->op,
                                                           .format = cmd->format};
    atomic_store_explicit(&t->written, at + 1, memory_order_release);
}

/* --- the engine -------------------------------------------------------------------------- */

/* Whether the head of the queue was submitted before `epoch` began. */
static bool stale(struct spk_card *c, uint32_t epoch)
{
    pthread_mutex_lock(&c->mutex);
    bool any = c->queue_count > 0 && c->queue[c->queue_head].epoch < epoch;
    pthread_mutex_unlock(&c->mutex);
    return any;
}

/* Completes what was submitted before the step that has just completed was known to have failed,
 * in the belief that it succeeds; whoever submits after that knows. */
static void flush_behind(struct spk_card *c)
{
    uint64_t known_from = c->known_from;
    for (;;) {
        pthread_mutex_lock(&c->mutex);
        bool any = c->queue_count > 0 && c->queue[c->queue_head].fence < known_from;
        pthread_mutex_unlock(&c->mutex);
        if (!any)
            return;
        complete(c, SPK_E_ABORTED);
    }
}

static bool start_next(struct spk_card *c)
{
    pthread_mutex_lock(&c->mutex);
    /* What was submitted behind an abort waits until the card has entered its epoch. */
    bool any = c->queue_count > 0 && c->queue[c->queue_head].epoch == c->epoch;
    if (any) {
        memset(&c->run, 0, sizeof c->run);
        c->run.submission = c->queue[c->queue_head];
        c->run.active = true;
        show_lent(c, &c->run.submission, true);
        step_bind(&c->run);
    }
    pthread_mutex_unlock(&c->mutex);
    return any;
}

uint64_t spk_card_wake_ns(struct spk_card *c)
{
    return atomic_load_explicit(&c->wake_ns, memory_order_relaxed);
}

/* So much of a worker's time went into the card; of a throttled card the model says how much. */
static void count_busy(struct spk_card *c, uint64_t ns)
{
    if (c->pace)
        return;
    atomic_fetch_add(&c->busy_ns, ns);
    c->run.busy_ns += ns;
}

static void flush(struct spk_card *c, int status, uint32_t before_epoch)
{
    c->rests_until_ns = 0;
    while (stale(c, before_epoch))
        complete(c, status);
}

static void restart(struct spk_card *c)
{
    flush(c, SPK_E_ABORTED, UINT32_MAX);
    c->epoch = 0;
    atomic_store(&c->abort_epoch, 0);
    link_restart(c);
    atomic_store(&c->restarts, 0);
    atomic_store(&c->epoch_seen, 0);
    card_signal(c); /* whoever waits for that may look */
}

/* Nothing of what it was; the epoch is 1 again. */
static bool renew(struct spk_card *c)
{
    uint64_t drained;
    flush(c, SPK_E_ABORTED, UINT32_MAX);
    pthread_mutex_lock(&c->mutex);
    free_completions(c);
    free_programs(c);
    free(c->scratch);
    free(c->trace.events);
    c->completion_head = c->completion_count = 0;
    c->taken_result = NULL;
    memset(c->programs, 0, sizeof c->programs);
    c->scratch = NULL;
    c->scratch_bytes = 0;
    c->buffer_count = 0;
    atomic_store(&c->ddr_used, 0);
    c->trace.events = NULL;
    c->trace.capacity = 0;
    c->trace.written = c->trace.read = c->trace.lost = 0;
    c->next_fence = 1;
    c->known_from = 0;
    memset(&c->run, 0, sizeof c->run);
    c->commands = c->steps = c->ddr_read = c->ddr_written = c->busy_ns = c->progress = 0;
    c->command = 0;
    ssize_t n = read(c->event_fd, &drained, sizeof drained);
    (void)n; /* EAGAIN: nothing was signalled */
    pthread_mutex_unlock(&c->mutex);
    c->epoch = 1;
    atomic_store(&c->abort_epoch, 1);
    atomic_store(&c->epoch_seen, 1);
    link_renew(c);
    if (c->pace)
        pace_renew(c);
    atomic_store(&c->planted, 0);
    atomic_store(&c->slowness, 0);
    if (!pages_renew(c)) {
        plant_fault(c, SPK_PLANT_DIE);
        return false;
    }
    atomic_store(&c->plant, SPK_PLANT_NONE);
    return true;
}

int spk_card_reopen(struct spk_card *c)
{
    if (!c->mapping)
        return SPK_E_ARG;
    /* As if this thread were a worker that steps the card; a slice is over soon. */
    while (atomic_exchange(&c->stepping, 1))
        sched_yield();
    while (!meeting_left(c))
        sched_yield();
    bool renewed = renew(c);
    atomic_store(&c->stepping, 0);
    return renewed ? SPK_OK : SPK_E_SYSTEM;
}

/* What comes before work: death, aborts, taking up the next step.  Whether there is work; what the
 * step of the engine was, if not. */
static bool has_work(struct spk_card *c, int *result)
{
    uint32_t abort_epoch = atomic_load(&c->abort_epoch);
    int plant = atomic_load(&c->plant);
    int restarts = atomic_load(&c->restarts);
    *result = SPK_STEP_IDLE;
    if ((restarts || is_end(plant) || abort_epoch != c->epoch) && !meeting_left(c)) {
        *result = SPK_STEP_RAN; /* a slice of somebody else's, whose end rings no doorbell */
        return false;
    }
    if (is_end(plant)) {
        flush(c, status_of(plant), UINT32_MAX);
        return false;
    }
    if (restarts) {
        restart(c);
        *result = SPK_STEP_RAN;
        return false;
    }
    if (abort_epoch != c->epoch) {
        flush(c, SPK_E_ABORTED, abort_epoch);
        c->epoch = abort_epoch;
        atomic_store(&c->epoch_seen, abort_epoch);
        link_new_epoch(c);
        *result = SPK_STEP_RAN;
        return false;
    }
    if (!c->run.active && !start_next(c))
        return false;
    if (plant != SPK_PLANT_HANG)
        return true;
    /* A hung card holds work, does nothing, and is not polled for it; it waits for nobody. */
    atomic_store(&c->waiting_for, -1);
    return false;
}

int spk_card_skip(struct spk_card *c)
{
    int result;
    if (!has_work(c, &result))
        return result;
    complete(c, SPK_OK);
    return SPK_STEP_RAN;
}

int spk_card_fail(struct spk_card *c, int status)
{
    int result;
    if (!has_work(c, &result))
        return result;
    complete(c, status);
    flush_behind(c);
    return SPK_STEP_RAN;
}

/* Whether the step has got to where a fault was planted, which happens now. */
static bool take_planted(struct spk_card *c, uint64_t planted)
{
    const struct execution *run = &c->run;
    uint32_t at = (uint32_t)planted, commands = run->submission.program->header.commands;
    bool begins = !run->cursor && !run->cursor2 && !run->held;
    bool due = at == SPK_COMMAND_ANY || (run->pc == commands ? at >= commands : run->pc == at && begins);
    if (!due || !atomic_compare_exchange_strong(&c->planted, &planted, 0))
        return false;
    plant_fault(c, (int)(planted >> 32));
    return true;
}

/* Whether a slow card still rests from what it has done. */
static bool rests(struct spk_card *c, uint64_t now)
{
    uint64_t until = c->rests_until_ns;
    if (now >= until || !atomic_load_explicit(&c->slowness, memory_order_relaxed)) {
        c->rests_until_ns = 0;
        return false;
    }
    atomic_store_explicit(&c->wake_ns, until - now < REST_MAX_NS ? until : now + REST_MAX_NS,
                          memory_order_relaxed);
    atomic_fetch_add(&c->progress, 1);
    return true;
}

int spk_card_step(struct spk_card *c)
{
    int result;
    if (!has_work(c, &result))
        return result;

    uint64_t begin = now_ns(), end = begin, owed = 0;
    uint64_t slices = 0, slowness = atomic_load_explicit(&c->slowness, memory_order_relaxed);
    if (c->rests_until_ns && rests(c, begin))
        return SPK_STEP_PACED;
    result = SPK_STEP_RAN;
    if (!c->run.command_begin_ns)
        c->run.command_begin_ns = begin;
    for (;;) {
        struct execution *run = &c->run;
        uint64_t planted = atomic_load_explicit(&c->planted, memory_order_relaxed);
        if (planted && take_planted(c, planted))
            break;
        if (run->pc == run->submission.program->header.commands) {
            if (c->pace && !pace_end_ns(c, run->pc, end)) {
                slices++; /* the model's time passes */
                result = SPK_STEP_PACED;
                break;
            }
            count_busy(c, end - begin);
            atomic_fetch_add(&c->progress, slices + 1);
            complete(c, SPK_OK);
            return SPK_STEP_RAN;
        }
        bool done = false, waiting = false;
        int status = SPK_OK;
        if (run->held)
            done = true;
        else
            status = execute_slice(c, &done, &waiting);
        if (status != SPK_OK) {
            /* A meeting fails before anybody works on anything. */
            meeting_left(c);
            complete(c, status);
            flush_behind(c);
            return SPK_STEP_RAN;
        }
        if (waiting) {
            result = slices ? SPK_STEP_RAN : SPK_STEP_WAITING;
            break;
        }
        slices++;
        end = now_ns();
        if (slowness)
            owed = (uint64_t)((double)(end - begin) * (double)slowness / 65536);
        uint64_t told = end + owed; /* when the command ended */
        if (done && c->pace) {
            told = pace_end_ns(c, run->pc, end);
            run->held = !told;
            if (run->held) {
                result = SPK_STEP_PACED;
                break;
            }
        }
        if (done) {
            if (c->trace.capacity)
                trace_command(c, told);
            run->command_begin_ns = told;
            atomic_fetch_add(&c->commands, 1);
            run->pc++;
            run->cursor = run->cursor2 = 0;
            atomic_store(&c->command, run->pc);
            atomic_store(&c->waiting_for, -1);
        }
        if (slowness) {
            c->rests_until_ns = end + owed;
            result = rests(c, end) ? SPK_STEP_PACED : SPK_STEP_RAN;
            break;
        }
        if (end - begin > STEP_BUDGET_NS)
            break;
    }
    count_busy(c, end - begin + owed);
    atomic_fetch_add(&c->progress, slices);
    return result;
}
