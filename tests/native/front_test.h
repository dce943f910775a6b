/* SPDX-License-Identifier: Apache-2.0 */
/* A host for the tests of the front: memory that is checked byte by byte, interrupts that are
 * counted, and rings as a driver sets them up. */
#ifndef FRONT_TEST_H
#define FRONT_TEST_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "card_test.h"
#include "spk_front.h"

#define FRONT_DDR_BYTES ((uint64_t)1 << 20)
#define HOST_BASE ((uint64_t)1 << 40)
#define HOST_BYTES ((uint64_t)1 << 20)
#define SERIAL 0x7ea0000012345678u

/* Where things are in the host's memory. */
enum { COMMANDS_AT = 0, COMPLETIONS_AT = 0x10000, DATA_AT = 0x20000, TABLE_AT = 0x40000, RESULT_AT = 0x80000 };

struct host {
    uint8_t *memory;
    uint64_t accesses, writes;
    _Atomic uint32_t interrupts[SAIL_VECTORS];
};

struct rig {
    struct host host;
    void *ddr;
    struct spk_card *core;
    struct spk_front *front;
    uint32_t entries, tail, taken;
    uint64_t fence;
    bool pooled; /* others step the core */
};

static inline bool in_host(uint64_t at, uint64_t nbytes)
{
    return at >= HOST_BASE && at - HOST_BASE <= HOST_BYTES && nbytes <= HOST_BYTES - (at - HOST_BASE);
}

static inline bool rig_read(void *context, uint64_t at, void *to, uint64_t nbytes)
{
    struct rig *r = context;
    r->host.accesses++;
    if (!in_host(at, nbytes))
        return false;
    memcpy(to, r->host.memory + (at - HOST_BASE), nbytes);
    return true;
}

static inline bool rig_write(void *context, uint64_t at, const void *from, uint64_t nbytes)
{
    struct rig *r = context;
    r->host.accesses++;
    r->host.writes++;
    if (!in_host(at, nbytes))
        return false;
    memcpy(r->host.memory + (at - HOST_BASE), from, nbytes);
    return true;
}

static inline void rig_interrupt(void *context, uint32_t vector)
{
    struct rig *r = context;
    CHECK(vector < SAIL_VECTORS);
    atomic_fetch_add(&r->host.interrupts[vector], 1);
}

static inline struct rig *rig_core(void)
{
    struct rig *r = calloc(1, sizeof *r);
    int status;
    r->host.memory = exact(HOST_BYTES);
    r->ddr = mmap(NULL, FRONT_DDR_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(r->ddr != MAP_FAILED);
    r->core = spk_card_create_on(r->ddr, FRONT_DDR_BYTES, SPK_ISA_SCALAR, &status);
    CHECK_EQUAL(status, SPK_OK);
    return r;
}

static inline void rig_front(struct rig *r, uint32_t links, uint32_t number)
{
    struct spk_front_host host = {r, rig_read, rig_write, rig_interrupt};
    struct spk_front_identity identity = {.serial = SERIAL + number,
                                          .sku = "POPC_16A",
                                          .name = "a name that is longer than fits",
                                          .isa = "scalar",
                                          .faults = true,
                                          .links = links};
    int status;
    for (uint32_t i = 0; i < links; i++)
        identity.peers[i] = i == number ? 0 : SERIAL + i;
    r->front = spk_front_create(r->core, &identity, &host, &status);
    CHECK_EQUAL(status, SPK_OK);
}

static inline void rig_destroy(struct rig *r)
{
    spk_front_destroy(r->front);
    spk_card_destroy(r->core);
    munmap(r->ddr, FRONT_DDR_BYTES);
    free(r->host.memory);
    free(r);
}

static inline uint32_t get(struct rig *r, uint64_t reg)
{
    return spk_front_read(r->front, reg, 4);
}

static inline void set(struct rig *r, uint64_t reg, uint32_t value)
{
    spk_front_write(r->front, reg, 4, value);
}

/* Everything that can be done is done. */
static inline void settle(struct rig *r)
{
    spk_front_poll(r->front);
    while (!r->pooled && spk_card_step(r->core) == SPK_STEP_RAN)
        spk_front_poll(r->front);
    spk_front_poll(r->front);
}

static inline void until(struct rig *r, uint64_t reg, uint32_t mask, uint32_t value)
{
    for (int i = 0; (get(r, reg) & mask) != value; i++) {
        CHECK(i < 200000);
        settle(r);
        if (r->pooled)
            sleep_ns(50000);
    }
}

static inline void set_ring(struct rig *r, uint64_t first, uint64_t base, uint32_t entries)
{
    set(r, first, (uint32_t)base);
    set(r, first + 4, (uint32_t)(base >> 32));
    set(r, first + 8, entries);
}

static inline void start_rings(struct rig *r, uint32_t entries)
{
    r->entries = entries;
    r->tail = r->taken = 0;
    memset(r->host.memory + COMPLETIONS_AT, 0, entries * sizeof(struct sail_completion));
    set_ring(r, SAIL_REG_COMMAND_BASE_LO, HOST_BASE + COMMANDS_AT, entries);
    set_ring(r, SAIL_REG_COMPLETION_BASE_LO, HOST_BASE + COMPLETIONS_AT, entries);
    set(r, SAIL_REG_CONTROL, SAIL_CONTROL_ENABLE);
    settle(r);
    CHECK_EQUAL(get(r, SAIL_REG_STATUS), SAIL_STATUS_READY | SAIL_STATUS_RUNNING);
}

static inline void reset_rig(struct rig *r)
{
    set(r, SAIL_REG_CONTROL, SAIL_CONTROL_RESET);
    until(r, SAIL_REG_STATUS, ~0u, SAIL_STATUS_READY);
}

static inline struct rig *rig_create(void)
{
    struct rig *r = rig_core();
    rig_front(r, 0, 0);
    settle(r);
    start_rings(r, 16);
    return r;
}

static inline uint64_t place(struct rig *r, uint64_t at, const void *data, size_t nbytes)
{
    CHECK(at + nbytes <= HOST_BYTES);
    if (nbytes)
        memcpy(r->host.memory + at, data, nbytes);
    return HOST_BASE + at;
}

/* A fence of 0 stands for the next one. */
static inline uint64_t put(struct rig *r, struct sail_command c)
{
    if (!c.fence)
        c.fence = ++r->fence;
    place(r, COMMANDS_AT + r->tail % r->entries * sizeof c, &c, sizeof c);
    r->tail++;
    return c.fence;
}

static inline void doorbell(struct rig *r)
{
    set(r, SAIL_REG_COMMAND_TAIL, r->tail);
    settle(r);
}

static inline bool peek(struct rig *r, struct sail_completion *out)
{
    memcpy(out, r->host.memory + COMPLETIONS_AT + r->taken % r->entries * sizeof *out, sizeof *out);
    return out->index == r->taken + 1;
}

static inline struct sail_completion take(struct rig *r)
{
    struct sail_completion c;
    for (int i = 0; !peek(r, &c); i++) {
        CHECK(i < (r->pooled ? 200000 : 3));
        if (r->pooled)
            sleep_ns(50000);
        settle(r);
    }
    CHECK_EQUAL(c.reserved, 0);
    r->taken++;
    set(r, SAIL_REG_COMPLETION_HEAD, r->taken);
    return c;
}

static inline struct sail_completion run(struct rig *r, struct sail_command c)
{
    uint64_t fence = put(r, c);
    doorbell(r);
    struct sail_completion done = take(r);
    CHECK_EQUAL(done.fence, fence);
    return done;
}

/* --- programs --------------------------------------------------------------------------------- */

/* The table's buffers of the tests' programs: X at 4 KiB, Y at 8 KiB. */
enum { X_AT = 4096, Y_AT = 8192, N = 16 };

/* X += Y, a row of N floats for each of 4 tokens. */
static inline struct builder adding(void)
{
    struct builder b = new_program(4, 4, 64);
    struct spk_command *c = append(&b, SPK_OP_ADD);
    c->ref[0] = ref_at(0, 4 * N, 0);
    c->ref[1] = ref_at(1, 4 * N, 0);
    c->arg[0] = N;
    return b;
}

/* 64 bytes of X go to, or come from, a peer. */
static inline struct builder transferring(int op, uint32_t peer)
{
    struct builder b = new_program(1, 1, 64);
    append(&b, SPK_OP_EXCHANGE)->arg[0] = 1;
    struct spk_command *c = append(&b, op);
    c->ref[op == SPK_OP_LINK_SEND ? 0 : 3] = ref_at(0, 64, 0);
    c->arg[0] = peer, c->arg[1] = 64;
    return b;
}

static inline struct sail_command loading(struct rig *r, uint32_t slot, const struct builder *b)
{
    const struct sail_buffer table[] = {{X_AT, 4 * 4 * N}, {Y_AT, 4 * 4 * N}};
    size_t nbytes = sizeof b->header + b->header.commands * sizeof *b->commands;
    return (struct sail_command){.op = SAIL_OP_LOAD,
                                 .program = slot,
                                 .data = place(r, DATA_AT, b, nbytes),
                                 .data_bytes = nbytes,
                                 .table = place(r, TABLE_AT, table, sizeof table),
                                 .table_count = 2,
                                 .result = HOST_BASE + RESULT_AT,
                                 .result_bytes = SAIL_WHY_BYTES};
}

static inline void load_slot(struct rig *r, uint32_t slot, struct builder b)
{
    struct sail_completion done = run(r, loading(r, slot, &b));
    CHECK_EQUAL(done.status, SAIL_OK);
    CHECK_EQUAL(done.detail, 0);
}

static inline struct sail_command running(struct rig *r, uint32_t slot, uint32_t tokens)
{
    struct step s = new_step(tokens, 0, 0, 0, 0);
    return (struct sail_command){.op = SAIL_OP_RUN,
                                 .program = slot,
                                 .data = place(r, DATA_AT, &s, step_bytes(&s)),
                                 .data_bytes = step_bytes(&s),
                                 .result = HOST_BASE + RESULT_AT};
}

static inline void set_floats(struct rig *r, uint64_t at, float value)
{
    float *x = (float *)((uint8_t *)r->ddr + at);
    for (int i = 0; i < 4 * N; i++)
        x[i] = value;
}

static inline float float_at(struct rig *r, uint64_t at)
{
    return *(float *)((uint8_t *)r->ddr + at);
}

static inline void fault(struct rig *r, uint32_t kind, uint32_t argument)
{
    set(r, SAIL_REG_FAULT_ARG, argument);
    set(r, SAIL_REG_FAULT, kind);
    settle(r);
}

#endif
