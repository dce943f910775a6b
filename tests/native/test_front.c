/* SPDX-License-Identifier: Apache-2.0 */
/* Registers and rings of a card, good use and every bad one: docs/api/card-registers.md.  The core is
 * stepped here, so that every case is the same each time. */
#include "front_test.h"

#define OFFSET(field) offsetof(struct sail_command, field)

/* Two linked cards that this thread steps. */
static void make_pair(struct rig **a, struct rig **b)
{
    *a = rig_core(), *b = rig_core();
    CHECK_EQUAL(spk_link_connect((*a)->core, 0, (*b)->core, 1, RING_BYTES), SPK_OK);
    rig_front(*a, 2, 0), rig_front(*b, 2, 1);
    settle(*a), settle(*b);
    start_rings(*a, 16), start_rings(*b, 16);
}

static void settle_both(struct rig *a, struct rig *b)
{
    for (int i = 0; i < 4; i++)
        settle(a), settle(b);
}

/* --- registers -------------------------------------------------------------------------------- */

static void test_identification(void)
{
    CASE("identification and reset values");
    struct rig *r = rig_core();
    rig_front(r, 0, 0);
    CHECK_EQUAL(get(r, SAIL_REG_STATUS), 0);
    settle(r);
    CHECK_EQUAL(get(r, SAIL_REG_STATUS), SAIL_STATUS_READY);
    CHECK_EQUAL(get(r, SAIL_REG_MAGIC), SAIL_MAGIC);
    CHECK_EQUAL(get(r, SAIL_REG_VERSION), 0x10000);
    CHECK_EQUAL(get(r, SAIL_REG_CAPABILITIES), 0xf);
    CHECK_EQUAL(get(r, SAIL_REG_SERIAL_LO), 0x12345678);
    CHECK_EQUAL(get(r, SAIL_REG_SERIAL_HI), 0x7ea00000);
    CHECK_EQUAL(get(r, SAIL_REG_DDR_LO), FRONT_DDR_BYTES);
    CHECK_EQUAL(get(r, SAIL_REG_DDR_HI), 0);
    CHECK_EQUAL(get(r, SAIL_REG_APERTURE_LO), FRONT_DDR_BYTES);
    CHECK_EQUAL(get(r, SAIL_REG_SEMANTICS), SPK_SEMANTICS_VERSION);
    CHECK_EQUAL(get(r, SAIL_REG_PROGRAMS), 64);
    CHECK_EQUAL(get(r, SAIL_REG_LINKS), 0);
    CHECK_EQUAL(get(r, SAIL_REG_SKU), 'P' | 'O' << 8 | 'P' << 16 | 'C' << 24);
    CHECK_EQUAL(get(r, SAIL_REG_SKU + 12), 0);
    CHECK_EQUAL(get(r, SAIL_REG_NAME + 12), 'i' | 's' << 8 | ' ' << 16 | 'l' << 24);
    CHECK_EQUAL(get(r, SAIL_REG_ISA), 's' | 'c' << 8 | 'a' << 16 | 'l' << 24);
    CHECK_EQUAL(get(r, SAIL_REG_WAITING), SAIL_NO_LINK);
    CHECK_EQUAL((int32_t)get(r, SAIL_REG_TEMPERATURE_MC), 45000);
    const uint32_t zero[] = {SAIL_REG_CONTROL,       SAIL_REG_GENERATION,    SAIL_REG_FAILURE,
                             SAIL_REG_WATCHDOG_MS,   SAIL_REG_RUNNING,       SAIL_REG_COMMAND,
                             SAIL_REG_EPOCH,         SAIL_REG_COMMAND_HEAD,  SAIL_REG_COMMAND_TAIL,
                             SAIL_REG_COMPLETION_TAIL, SAIL_REG_COMPLETION_HEAD, SAIL_REG_EVENTS,
                             SAIL_REG_EVENTS_MASK,   SAIL_REG_ECC_CORRECTED, SAIL_REG_STEPS_LO,
                             SAIL_REG_FAULT,         SAIL_REG_LINK(0),       0xfffc};
    for (size_t i = 0; i < sizeof zero / sizeof *zero; i++)
        CHECK_EQUAL(get(r, zero[i]), 0);
    rig_destroy(r);
}

static void test_accesses_that_are_none(void)
{
    CASE("accesses that are not to a whole register");
    struct rig *r = rig_create();
    const uint32_t sizes[] = {1, 2, 3, 5, 8, 0, 64};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        CHECK_EQUAL(spk_front_read(r->front, SAIL_REG_MAGIC, sizes[i]), 0);
        spk_front_write(r->front, SAIL_REG_WATCHDOG_MS, sizes[i], 7);
    }
    for (uint64_t at = 1; at < 4; at++) {
        CHECK_EQUAL(spk_front_read(r->front, SAIL_REG_MAGIC + at, 4), 0);
        spk_front_write(r->front, SAIL_REG_WATCHDOG_MS + at, 4, 7);
    }
    CHECK_EQUAL(spk_front_read(r->front, SAIL_REGISTERS_BYTES, 4), 0);
    CHECK_EQUAL(spk_front_read(r->front, UINT64_MAX - 3, 4), 0);
    spk_front_write(r->front, UINT64_MAX - 3, 4, 7);
    CHECK_EQUAL(get(r, SAIL_REG_WATCHDOG_MS), 0);
    CASE("writes to what is read only");
    for (uint32_t at = 0; at < 0x80; at += 4) {
        uint32_t before = get(r, at);
        set(r, at, ~before);
        CHECK_EQUAL(get(r, at), before);
    }
    CHECK_EQUAL(run(r, (struct sail_command){.op = SAIL_OP_NOP}).status, SAIL_OK);
    rig_destroy(r);
}

static void test_rings_are_set_up_once(void)
{
    CASE("bases and sizes hold still while the card runs");
    struct rig *r = rig_create();
    set_ring(r, SAIL_REG_COMMAND_BASE_LO, 64, 2);
    set_ring(r, SAIL_REG_COMPLETION_BASE_LO, 64, 2);
    CHECK_EQUAL(get(r, SAIL_REG_COMMAND_BASE_LO), COMMANDS_AT);
    CHECK_EQUAL(get(r, SAIL_REG_COMMAND_BASE_HI), HOST_BASE >> 32);
    CHECK_EQUAL(get(r, SAIL_REG_COMPLETION_BASE_LO), COMPLETIONS_AT);
    CHECK_EQUAL(get(r, SAIL_REG_COMPLETION_ENTRIES), 16);
    CHECK_EQUAL(run(r, (struct sail_command){.op = SAIL_OP_NOP}).status, SAIL_OK);
    CASE("the lower half of a base waits for the upper one");
    set(r, SAIL_REG_CONTROL, 0);
    set(r, SAIL_REG_COMMAND_BASE_LO, 0x40);
    CHECK_EQUAL(get(r, SAIL_REG_COMMAND_BASE_LO), COMMANDS_AT);
    set(r, SAIL_REG_COMMAND_BASE_HI, 0);
    CHECK_EQUAL(get(r, SAIL_REG_COMMAND_BASE_LO), 0x40);
    rig_destroy(r);
}

static void expect_failure(struct rig *r, uint32_t failure)
{
    settle(r);
    CHECK_EQUAL(get(r, SAIL_REG_STATUS), SAIL_STATUS_READY | SAIL_STATUS_FAILED);
    CHECK_EQUAL(get(r, SAIL_REG_FAILURE), failure);
    CHECK(get(r, SAIL_REG_EVENTS) & SAIL_EVENT_FAILED);
    uint64_t accesses = r->host.accesses;
    set(r, SAIL_REG_COMMAND_TAIL, get(r, SAIL_REG_COMMAND_HEAD) + 1);
    settle(r);
    CHECK_EQUAL(r->host.accesses, accesses);
    reset_rig(r);
    start_rings(r, 16);
    CHECK_EQUAL(run(r, (struct sail_command){.op = SAIL_OP_NOP}).status, SAIL_OK);
}

static void test_bad_rings(void)
{
    static const struct {
        uint64_t command, completion;
        uint32_t command_entries, completion_entries;
    } bad[] = {
        {HOST_BASE + 32, HOST_BASE, 16, 16}, {HOST_BASE, HOST_BASE + 8, 16, 16},
        {HOST_BASE, HOST_BASE, 0, 16},       {HOST_BASE, HOST_BASE, 16, 0},
        {HOST_BASE, HOST_BASE, 1, 16},       {HOST_BASE, HOST_BASE, 16, 1},
        {HOST_BASE, HOST_BASE, 24, 16},      {HOST_BASE, HOST_BASE, 16, 2048},
        {UINT64_MAX - 63, HOST_BASE, 2, 2},  {HOST_BASE, UINT64_MAX - 63, 16, 4},
        {HOST_BASE, HOST_BASE, 0x80000000, 16},
    };
    struct rig *r = rig_create();
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CASE("bad ring %zu", i);
        set(r, SAIL_REG_CONTROL, 0);
        set_ring(r, SAIL_REG_COMMAND_BASE_LO, bad[i].command, bad[i].command_entries);
        set_ring(r, SAIL_REG_COMPLETION_BASE_LO, bad[i].completion, bad[i].completion_entries);
        set(r, SAIL_REG_CONTROL, SAIL_CONTROL_ENABLE);
        expect_failure(r, SAIL_FAILURE_RING);
    }
    CASE("a tail further than the ring is long");
    set(r, SAIL_REG_COMMAND_TAIL, r->tail + 17);
    expect_failure(r, SAIL_FAILURE_RING);
    CASE("a tail that goes back");
    set(r, SAIL_REG_COMMAND_TAIL, r->tail - 1);
    expect_failure(r, SAIL_FAILURE_RING);
    CASE("a completion taken before it is there");
    set(r, SAIL_REG_COMPLETION_HEAD, r->taken + 1);
    expect_failure(r, SAIL_FAILURE_RING);
    CASE("a completion given back");
    set(r, SAIL_REG_COMPLETION_HEAD, r->taken - 1);
    expect_failure(r, SAIL_FAILURE_RING);
    CASE("a tail that was too far when the card was enabled");
    set(r, SAIL_REG_CONTROL, 0);
    set(r, SAIL_REG_COMMAND_TAIL, 17);
    set(r, SAIL_REG_CONTROL, SAIL_CONTROL_ENABLE);
    expect_failure(r, SAIL_FAILURE_RING);
    CASE("a command ring that cannot be reached");
    set(r, SAIL_REG_CONTROL, 0);
    set_ring(r, SAIL_REG_COMMAND_BASE_LO, HOST_BASE + HOST_BYTES - 64, 16);
    set(r, SAIL_REG_CONTROL, SAIL_CONTROL_ENABLE);
    set(r, SAIL_REG_COMMAND_TAIL, 2);
    expect_failure(r, SAIL_FAILURE_DMA);
    CASE("a completion ring that cannot be reached");
    set(r, SAIL_REG_CONTROL, 0);
    set_ring(r, SAIL_REG_COMPLETION_BASE_LO, HOST_BASE + HOST_BYTES, 16);
    set(r, SAIL_REG_CONTROL, SAIL_CONTROL_ENABLE);
    r->tail = 0;
    put(r, (struct sail_command){.op = SAIL_OP_NOP, .fence = 1000});
    doorbell(r);
    r->fence = 1000;
    expect_failure(r, SAIL_FAILURE_DMA);
    rig_destroy(r);
}

/* --- rings ------------------------------------------------------------------------------------- */

static void test_rings_go_round(void)
{
    struct rig *r = rig_create();
    for (uint32_t entries = 2; entries <= SAIL_RING_ENTRIES_MAX; entries *= 8) {
        CASE("rings of %u", entries);
        reset_rig(r);
        start_rings(r, entries);
        for (uint32_t i = 0; i < 3 * entries + 1; i++) {
            uint32_t burst = 1 + i % entries;
            uint64_t first = r->fence + 1;
            for (uint32_t j = 0; j < burst; j++)
                put(r, (struct sail_command){.op = SAIL_OP_NOP});
            uint32_t interrupts = r->host.interrupts[SAIL_VECTOR_COMPLETION];
            doorbell(r);
            CHECK(r->host.interrupts[SAIL_VECTOR_COMPLETION] > interrupts);
            for (uint32_t j = 0; j < burst; j++) {
                struct sail_completion c = take(r);
                CHECK_EQUAL(c.fence, first + j);
                CHECK_EQUAL(c.status, SAIL_OK);
            }
            if (entries > 128)
                i += 101;
        }
        CHECK_EQUAL(get(r, SAIL_REG_COMMAND_HEAD), r->tail);
        CHECK_EQUAL(get(r, SAIL_REG_COMPLETION_TAIL), r->tail);
    }
    rig_destroy(r);
}

static void test_completions_wait_for_room(void)
{
    CASE("a host that takes no completions");
    struct rig *r = rig_core();
    rig_front(r, 0, 0);
    settle(r);
    set_ring(r, SAIL_REG_COMMAND_BASE_LO, HOST_BASE + COMMANDS_AT, 64);
    set_ring(r, SAIL_REG_COMPLETION_BASE_LO, HOST_BASE + COMPLETIONS_AT, 4);
    set(r, SAIL_REG_WATCHDOG_MS, 1);
    set(r, SAIL_REG_CONTROL, SAIL_CONTROL_ENABLE);
    r->entries = 64;
    for (int i = 0; i < 60; i++)
        put(r, (struct sail_command){.op = SAIL_OP_NOP});
    doorbell(r);
    r->entries = 4;
    sleep_ns(3000000);
    settle(r);
    CHECK_EQUAL(get(r, SAIL_REG_STATUS), SAIL_STATUS_READY | SAIL_STATUS_RUNNING);
    CHECK_EQUAL(get(r, SAIL_REG_COMPLETION_TAIL), 4);
    CHECK(get(r, SAIL_REG_COMMAND_HEAD) < 60);
    for (uint64_t i = 1; i <= 60; i++)
        CHECK_EQUAL(take(r).fence, i);
    rig_destroy(r);
}

/* --- commands ---------------------------------------------------------------------------------- */

static void test_a_step(void)
{
    CASE("load, run, unload");
    struct rig *r = rig_create();
    set_floats(r, X_AT, 1.0f), set_floats(r, Y_AT, 0.5f);
    load_slot(r, 7, adding());
    const struct sail_read reads[] = {{0, 0, 4, 8}, {1, 0, 0, 0}, {1, 0, 252, 4}};
    struct sail_command c = running(r, 7, 3);
    c.table = place(r, TABLE_AT, reads, sizeof reads);
    c.table_count = 3;
    c.result_bytes = 12;
    struct sail_completion done = run(r, c);
    CHECK_EQUAL(done.status, SAIL_OK);
    CHECK_EQUAL(done.detail, 0);
    CHECK(done.busy_ns > 0);
    const float *result = (const float *)(r->host.memory + RESULT_AT);
    CHECK(result[0] == 1.5f && result[1] == 1.5f && result[2] == 0.5f);
    CHECK_EQUAL(r->host.memory[RESULT_AT + 12], 0xa5);
    CHECK(float_at(r, X_AT + 4 * 2 * N) == 1.5f);
    CHECK(float_at(r, X_AT + 4 * 3 * N) == 1.0f);
    CHECK_EQUAL(get(r, SAIL_REG_STEPS_LO), 1);
    CHECK_EQUAL(get(r, SAIL_REG_STEPS_HI), 0);
    CHECK_EQUAL(get(r, SAIL_REG_COMMANDS_LO), 1);
    CHECK_EQUAL(get(r, SAIL_REG_DDR_WRITTEN_LO), 3 * 4 * N);
    CHECK(get(r, SAIL_REG_BUSY_NS_LO) > 0);
    CHECK_EQUAL(run(r, (struct sail_command){.op = SAIL_OP_UNLOAD, .program = 7}).status, SAIL_OK);
    done = run(r, running(r, 7, 1));
    CHECK_EQUAL(done.status, SAIL_E_INVALID);
    CHECK_EQUAL(done.detail, OFFSET(program));
    rig_destroy(r);
}

static void expect(struct rig *r, struct sail_command c, uint32_t status, size_t detail)
{
    struct sail_completion done = run(r, c);
    CHECK_EQUAL(done.status, status);
    CHECK_EQUAL(done.detail, detail);
}

static void test_commands_that_make_no_sense(void)
{
    struct rig *r = rig_create();
    struct builder b = adding();
    load_slot(r, 0, b);
    struct sail_command c;

    CASE("operations");
    expect(r, (struct sail_command){.op = 6}, SAIL_E_INVALID, OFFSET(op));
    expect(r, (struct sail_command){.op = UINT32_MAX}, SAIL_E_INVALID, OFFSET(op));
    CASE("fences");
    expect(r, (struct sail_command){.fence = r->fence}, SAIL_E_INVALID, OFFSET(fence));
    expect(r, (struct sail_command){.fence = 1}, SAIL_E_INVALID, OFFSET(fence));
    CASE("streams of other commands");
    expect(r, (struct sail_command){.op = SAIL_OP_NOP, .stream = 1}, SAIL_E_INVALID, OFFSET(stream));

    CASE("LOAD");
    c = loading(r, 64, &b), expect(r, c, SAIL_E_INVALID, OFFSET(program));
    c = loading(r, UINT32_MAX, &b), expect(r, c, SAIL_E_INVALID, OFFSET(program));
    c = loading(r, 0, &b), expect(r, c, SAIL_E_INVALID, OFFSET(program)); /* taken */
    c = loading(r, 1, &b), c.data_bytes = 0, expect(r, c, SAIL_E_INVALID, OFFSET(data_bytes));
    c.data_bytes = SAIL_PROGRAM_BYTES_MAX + 1ull, expect(r, c, SAIL_E_INVALID, OFFSET(data_bytes));
    c.data_bytes = UINT64_MAX, expect(r, c, SAIL_E_INVALID, OFFSET(data_bytes));
    c = loading(r, 1, &b), c.table_count = SAIL_TABLE_MAX + 1;
    expect(r, c, SAIL_E_INVALID, OFFSET(table_count));
    const struct sail_buffer bad[] = {{X_AT + 32, 64},
                                      {X_AT, 0},
                                      {FRONT_DDR_BYTES, 64},
                                      {FRONT_DDR_BYTES - 64, 128},
                                      {UINT64_MAX - 63, 128},
                                      {0, UINT64_MAX}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CASE("LOAD with bad buffer %zu", i);
        c = loading(r, 1, &b);
        place(r, TABLE_AT + sizeof *bad, &bad[i], sizeof *bad);
        expect(r, c, SAIL_E_INVALID, OFFSET(table));
    }
    CASE("LOAD from nowhere");
    c = loading(r, 1, &b), c.data = HOST_BASE + HOST_BYTES, expect(r, c, SAIL_E_DMA, 0);
    c.data = UINT64_MAX - 8, expect(r, c, SAIL_E_DMA, 0);
    c = loading(r, 1, &b), c.table = 0, expect(r, c, SAIL_E_DMA, 0);
    b.commands[0].ref[0].buffer = 9;
    c = loading(r, 1, &b), c.result = 0, expect(r, c, SAIL_E_DMA, 0);

    CASE("UNLOAD");
    c = (struct sail_command){.op = SAIL_OP_UNLOAD, .program = 1};
    expect(r, c, SAIL_E_INVALID, OFFSET(program));
    c.program = UINT32_MAX, expect(r, c, SAIL_E_INVALID, OFFSET(program));

    CASE("FILL");
    c = (struct sail_command){.op = SAIL_OP_FILL, .result = FRONT_DDR_BYTES + 1};
    expect(r, c, SAIL_E_INVALID, OFFSET(result));
    c.result = UINT64_MAX, c.data_bytes = 2, expect(r, c, SAIL_E_INVALID, OFFSET(result));
    c.result = FRONT_DDR_BYTES - 1, expect(r, c, SAIL_E_INVALID, OFFSET(data_bytes));
    c.data_bytes = UINT64_MAX, expect(r, c, SAIL_E_INVALID, OFFSET(data_bytes));
    c.data_bytes = 1, expect(r, c, SAIL_OK, 0);
    c.result = FRONT_DDR_BYTES, c.data_bytes = 0, expect(r, c, SAIL_OK, 0);

    CASE("IMAGE");
    c = (struct sail_command){.op = SAIL_OP_IMAGE, .data = HOST_BASE};
    expect(r, c, SAIL_E_INVALID, OFFSET(data_bytes));
    c.data_bytes = SAIL_PROGRAM_BYTES_MAX + 1ull, expect(r, c, SAIL_E_INVALID, OFFSET(data_bytes));
    c.data_bytes = HOST_BYTES + 1, expect(r, c, SAIL_E_DMA, 0);
    c.data_bytes = HOST_BYTES, expect(r, c, SAIL_OK, 0);
    c.data_bytes = 1, expect(r, c, SAIL_OK, 0);

    CASE("RUN");
    c = running(r, 1, 1), expect(r, c, SAIL_E_INVALID, OFFSET(program));
    c = running(r, 64, 1), expect(r, c, SAIL_E_INVALID, OFFSET(program));
    c = running(r, 0, 1), c.data_bytes = SAIL_PARAMETERS_BYTES_MAX + 1ull;
    expect(r, c, SAIL_E_INVALID, OFFSET(data_bytes));
    c = running(r, 0, 1), c.table_count = SAIL_READS_MAX + 1;
    expect(r, c, SAIL_E_INVALID, OFFSET(table_count));
    c = running(r, 0, 5), expect(r, c, SAIL_E_PARAMETERS, 0);
    c = running(r, 0, 1), c.data_bytes--, expect(r, c, SAIL_E_PARAMETERS, 0);
    c = running(r, 0, 1), c.data_bytes = 0, expect(r, c, SAIL_E_PARAMETERS, 0);
    c = running(r, 0, 1), c.data = 0, expect(r, c, SAIL_E_DMA, 0);
    const struct sail_read reads[] = {
        {2, 0, 0, 1}, {0, 1, 0, 1}, {0, 0, 257, 0}, {0, 0, 0, 257}, {0, 0, UINT64_MAX, 2},
        {0, 0, 2, UINT64_MAX}, {UINT32_MAX, 0, 0, 1},
    };
    for (size_t i = 0; i < sizeof reads / sizeof *reads; i++) {
        CASE("RUN with bad read %zu", i);
        c = running(r, 0, 1);
        c.table = place(r, TABLE_AT, &reads[i], sizeof *reads);
        c.table_count = 1, c.result_bytes = UINT64_MAX;
        expect(r, c, SAIL_E_PARAMETERS, 0);
    }
    CASE("RUN with too little room");
    const struct sail_read good[] = {{0, 0, 0, 8}, {1, 0, 0, 8}};
    c = running(r, 0, 1), c.table = place(r, TABLE_AT, good, sizeof good), c.table_count = 2;
    c.result_bytes = 15, expect(r, c, SAIL_E_INVALID, OFFSET(result_bytes));
    CASE("RUN with a result nowhere");
    c.result_bytes = 16, c.result = HOST_BASE + HOST_BYTES - 15, expect(r, c, SAIL_E_DMA, 0);
    c.result = HOST_BASE + HOST_BYTES - 16, expect(r, c, SAIL_OK, 0);
    CASE("RUN with reads nowhere");
    c.table = HOST_BASE + HOST_BYTES - 47, expect(r, c, SAIL_E_DMA, 0);
    rig_destroy(r);
}

static void expect_refused(struct rig *r, struct builder b, uint32_t command, const char *why)
{
    struct sail_completion done = run(r, loading(r, 1, &b));
    CHECK_EQUAL(done.status, SAIL_E_REFUSED);
    CHECK_EQUAL(done.detail, command);
    CHECK(strstr((const char *)r->host.memory + RESULT_AT, why));
}

static void test_programs_that_are_refused(void)
{
    struct rig *r = rig_create();
    struct builder b;
    CASE("the reason names the host's own numbers");
    /* Another program's buffers come first in the core. */
    load_slot(r, 0, adding());
    b = adding(), append(&b, SPK_OP_ADD)->arg[0] = N;
    b.commands[1].ref[0] = ref_at(1, 4 * N, 0), b.commands[1].ref[1] = ref_at(1, 4 * N, 4);
    expect_refused(r, b, 1, "buffer 1 ends at 256");
    b.commands[1].ref[1] = ref_at(2, 4 * N, 0);
    expect_refused(r, b, 1, "names buffer 2, which");
    CASE("not a program");
    b = adding(), b.header.magic = 0, expect_refused(r, b, 0, "version");
    b = adding(), b.header.commands = 0;
    struct sail_command c = loading(r, 1, &b);
    c.data_bytes = 5;
    CHECK_EQUAL(run(r, c).status, SAIL_E_REFUSED);
    CASE("no room for a reason");
    b = adding(), b.commands[0].op = 99;
    memset(r->host.memory + RESULT_AT, 0xa5, SAIL_WHY_BYTES);
    c = loading(r, 1, &b), c.result_bytes = 4;
    CHECK_EQUAL(run(r, c).status, SAIL_E_REFUSED);
    CHECK_EQUAL(r->host.memory[RESULT_AT + 3], 'n');
    CHECK_EQUAL(r->host.memory[RESULT_AT + 4], 0xa5);
    CASE("different buffers that are the same memory");
    b = new_program(1, 1, 64);
    struct spk_command *copy = append(&b, SPK_OP_COPY);
    copy->format = SPK_F32;
    copy->ref[0] = ref_at(0, 0, 0), copy->ref[3] = ref_at(1, 0, 0), copy->arg[0] = 8;
    c = loading(r, 1, &b);
    const struct sail_buffer table[] = {{X_AT, 256}, {X_AT, 128}};
    place(r, TABLE_AT, table, sizeof table);
    CHECK_EQUAL(run(r, c).status, SAIL_E_REFUSED);
    CHECK(strstr((const char *)r->host.memory + RESULT_AT, "overlap"));
    copy->ref[3].offset = 32;
    c = loading(r, 1, &b);
    place(r, TABLE_AT, table, sizeof table);
    CHECK_EQUAL(run(r, c).status, SAIL_OK);
    CASE("an empty table");
    b = adding(), c = loading(r, 2, &b), c.table_count = 0, c.table = 0;
    CHECK_EQUAL(run(r, c).status, SAIL_E_REFUSED);
    rig_destroy(r);
}

static void test_buffers_run_out(void)
{
    CASE("two programs with tables that are too large together");
    struct rig *r = rig_create();
    struct builder b = adding();
    struct sail_command c = loading(r, 0, &b);
    const struct sail_buffer entry = {X_AT, 256};
    c.table_count = 40000;
    c.table = HOST_BASE + HOST_BYTES - c.table_count * sizeof entry;
    for (uint32_t i = 0; i < c.table_count; i++)
        place(r, c.table - HOST_BASE + i * sizeof entry, &entry, sizeof entry);
    uint64_t fence = put(r, c);
    doorbell(r);
    struct sail_completion done = take(r);
    CHECK_EQUAL(done.fence, fence);
    CHECK_EQUAL(done.status, SAIL_OK);
    c.program = 1;
    done = run(r, c);
    CHECK_EQUAL(done.status, SAIL_E_NO_MEMORY);
    CHECK_EQUAL(run(r, (struct sail_command){.op = SAIL_OP_UNLOAD}).status, SAIL_OK);
    CHECK_EQUAL(run(r, c).status, SAIL_OK);
    rig_destroy(r);
}

static void test_fill_clears_exactly(void)
{
    struct rig *r = rig_create();
    const struct {
        uint64_t at, nbytes;
    } cases[] = {{0, 1}, {4095, 2}, {4096, 4096}, {100, 12345}, {4096, 12289}, {0, FRONT_DDR_BYTES}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        CASE("fill %zu", i);
        uint8_t *ddr = r->ddr;
        uint64_t at = cases[i].at, end = at + cases[i].nbytes;
        memset(ddr, 0x5a, FRONT_DDR_BYTES);
        CHECK_EQUAL(run(r, (struct sail_command){.op = SAIL_OP_FILL,
                                                 .result = at,
                                                 .data_bytes = cases[i].nbytes})
                        .status,
                    SAIL_OK);
        for (uint64_t j = 0; j < FRONT_DDR_BYTES; j++)
            CHECK_EQUAL(ddr[j], j >= at && j < end ? 0 : 0x5a);
    }
    rig_destroy(r);
}

/* --- order, aborts, faults of steps -------------------------------------------------------------- */

static void test_commands_wait_for_steps_before_them(void)
{
    CASE("FILL behind a step that waits");
    struct rig *a, *b;
    make_pair(&a, &b);
    load_slot(a, 0, transferring(SPK_OP_LINK_RECV, 1));
    load_slot(b, 0, transferring(SPK_OP_LINK_SEND, 0));
    set_floats(b, X_AT, 3.0f);
    put(a, running(a, 0, 1));
    put(a, (struct sail_command){.op = SAIL_OP_FILL, .result = X_AT, .data_bytes = 4});
    put(a, (struct sail_command){.op = SAIL_OP_UNLOAD});
    put(a, running(a, 0, 1));
    doorbell(a);
    struct sail_completion done;
    CHECK(!peek(a, &done));
    CHECK_EQUAL(get(a, SAIL_REG_RUNNING), a->fence - 3);
    CHECK_EQUAL(get(a, SAIL_REG_WAITING), 1);
    CHECK_EQUAL(get(a, SAIL_REG_COMMAND), 0);
    CHECK_EQUAL(run(b, running(b, 0, 1)).status, SAIL_OK);
    settle_both(a, b);
    CHECK_EQUAL(take(a).status, SAIL_OK);
    CHECK(float_at(a, X_AT) == 0.0f && float_at(a, X_AT + 4) == 3.0f);
    CHECK_EQUAL(take(a).status, SAIL_OK);
    CHECK_EQUAL(take(a).status, SAIL_OK);
    CHECK_EQUAL(take(a).status, SAIL_E_INVALID);
    CHECK_EQUAL(get(a, SAIL_REG_RUNNING), 0);
    CHECK_EQUAL(get(a, SAIL_REG_WAITING), SAIL_NO_LINK);
    CHECK_EQUAL(get(a, SAIL_REG_LINK(1) + SAIL_LINK_RX_LO), 64);
    CHECK_EQUAL(get(a, SAIL_REG_LINK(1) + SAIL_LINK_RX_HI), 0);
    CHECK_EQUAL(get(b, SAIL_REG_LINK(0) + SAIL_LINK_TX_LO), 64);
    rig_destroy(a), rig_destroy(b);
}

static void test_more_steps_than_the_core_queues(void)
{
    CASE("15 steps at once");
    struct rig *r = rig_create();
    load_slot(r, 0, adding());
    set_floats(r, X_AT, 0.0f), set_floats(r, Y_AT, 1.0f);
    uint64_t first = r->fence + 1;
    for (int i = 0; i < 15; i++)
        put(r, running(r, 0, 1));
    doorbell(r);
    for (uint64_t i = 0; i < 15; i++) {
        struct sail_completion done = take(r);
        CHECK_EQUAL(done.fence, first + i);
        CHECK_EQUAL(done.status, SAIL_OK);
    }
    CHECK(float_at(r, X_AT) == 15.0f);
    rig_destroy(r);
}

static void test_an_epoch_aborts_steps_alone(void)
{
    struct rig *a, *b;
    make_pair(&a, &b);
    load_slot(a, 0, transferring(SPK_OP_LINK_RECV, 1));
    CASE("steps in the core, in the list and in the ring");
    for (int i = 0; i < 12; i++)
        put(a, running(a, 0, 1));
    put(a, (struct sail_command){.op = SAIL_OP_FILL, .result = X_AT, .data_bytes = 4});
    put(a, running(a, 0, 1));
    doorbell(a);
    set_floats(a, X_AT, 1.0f);
    set(a, SAIL_REG_EPOCH, 5);
    settle(a);
    for (int i = 0; i < 14; i++) {
        struct sail_completion done = take(a);
        CHECK_EQUAL(done.status, i == 12 ? SAIL_OK : SAIL_E_ABORTED);
        CHECK_EQUAL(done.busy_ns > 0, i == 0 && done.busy_ns > 0);
    }
    CHECK(float_at(a, X_AT) == 0.0f);
    CHECK_EQUAL(get(a, SAIL_REG_EPOCH), 5);
    CASE("what comes behind it is not aborted");
    put(a, running(a, 0, 1));
    doorbell(a);
    CHECK_EQUAL(get(a, SAIL_REG_WAITING), 1);
    CASE("epochs that are none");
    const uint32_t none[] = {0, 4, 5, UINT32_MAX};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        set(a, SAIL_REG_EPOCH, none[i]);
        settle(a);
        CHECK_EQUAL(get(a, SAIL_REG_EPOCH), 5);
        CHECK_EQUAL(get(a, SAIL_REG_WAITING), 1);
    }
    CASE("a message of the same epoch ends it");
    load_slot(b, 0, transferring(SPK_OP_LINK_SEND, 0));
    set(b, SAIL_REG_EPOCH, 5);
    CHECK_EQUAL(run(b, running(b, 0, 1)).status, SAIL_OK);
    settle_both(a, b);
    CHECK_EQUAL(take(a).status, SAIL_OK);
    rig_destroy(a), rig_destroy(b);
}

static struct sail_command in_stream(struct sail_command c, uint32_t stream)
{
    c.stream = stream;
    return c;
}

/* A NaN in the rows of a norm fails the step. */
static struct builder failing(void)
{
    struct builder b = adding();
    struct spk_command *c = append(&b, SPK_OP_RMSNORM);
    c->ref[0] = ref_at(0, 4 * N, 0), c->ref[1] = ref_at(1, 0, 0), c->ref[3] = ref_at(0, 4 * N, 0);
    c->arg[0] = N, c->arg[1] = 0x3f800000u;
    return b;
}

static void test_a_failed_step_aborts_its_stream(void)
{
    CASE("a failed step, and others around it");
    struct rig *r = rig_create();
    load_slot(r, 0, adding());
    load_slot(r, 1, failing());
    set_floats(r, X_AT, 0.0f), set_floats(r, Y_AT, 0.0f);
    *(uint32_t *)((uint8_t *)r->ddr + X_AT) = 0x7fc00000;
    put(r, in_stream(running(r, 0, 1), 1));
    put(r, in_stream(running(r, 1, 1), 1));
    put(r, in_stream(running(r, 0, 1), 2));
    put(r, (struct sail_command){.op = SAIL_OP_FILL, .result = 0, .data_bytes = 4});
    for (int i = 0; i < 9; i++)
        put(r, in_stream(running(r, 0, 1), 1 + i % 2));
    doorbell(r);
    CHECK_EQUAL(take(r).status, SAIL_OK);
    struct sail_completion done = take(r);
    CHECK_EQUAL(done.status, SAIL_E_NUMERIC);
    CHECK_EQUAL(done.detail, 1);
    CHECK_EQUAL(take(r).status, SAIL_OK);
    CHECK_EQUAL(take(r).status, SAIL_OK);
    for (int i = 0; i < 9; i++)
        CHECK_EQUAL(take(r).status, i % 2 ? SAIL_OK : SAIL_E_ABORTED);
    CASE("once it is known, the stream goes on");
    CHECK_EQUAL(run(r, in_stream(running(r, 0, 1), 1)).status, SAIL_OK);
    CASE("one stream fails again and again");
    for (int i = 0; i < 12; i++)
        put(r, in_stream(running(r, 1, 1), 3));
    doorbell(r);
    CHECK_EQUAL(take(r).status, SAIL_E_NUMERIC);
    for (int i = 1; i < 12; i++)
        CHECK_EQUAL(take(r).status, SAIL_E_ABORTED);
    rig_destroy(r);
}

/* --- reset and disabling ------------------------------------------------------------------------ */

static void test_reset_in_the_middle_of_work(void)
{
    struct rig *a, *b;
    make_pair(&a, &b);
    for (uint32_t round = 0; round < 8; round++) {
        CASE("reset after %u polls", round);
        load_slot(a, 0, transferring(SPK_OP_LINK_RECV, 1));
        for (uint32_t i = 0; i < 2 * round; i++)
            put(a, running(a, 0, 1));
        put(a, (struct sail_command){.op = SAIL_OP_NOP});
        set(a, SAIL_REG_COMMAND_TAIL, a->tail);
        for (uint32_t i = 0; i < round % 4; i++) {
            spk_front_poll(a->front);
            spk_card_step(a->core);
        }
        set(a, SAIL_REG_CONTROL, SAIL_CONTROL_RESET);
        CHECK_EQUAL(get(a, SAIL_REG_CONTROL), 0);
        CHECK_EQUAL(get(a, SAIL_REG_STATUS), 0);
        CHECK_EQUAL(get(a, SAIL_REG_EPOCH), 0);
        uint64_t accesses = a->host.accesses;
        uint32_t interrupts = a->host.interrupts[0];
        until(a, SAIL_REG_STATUS, ~0u, SAIL_STATUS_READY);
        settle_both(a, b);
        CHECK_EQUAL(a->host.accesses, accesses);
        CHECK_EQUAL(a->host.interrupts[0], interrupts);
        CHECK_EQUAL(get(a, SAIL_REG_GENERATION), round + 1);
        CHECK_EQUAL(get(a, SAIL_REG_COMMAND_ENTRIES), 0);
        CHECK_EQUAL(get(a, SAIL_REG_STEPS_LO), 0);
        a->fence = 0;
        start_rings(a, 16);
        CHECK_EQUAL(run(a, running(a, 0, 1)).status, SAIL_E_INVALID); /* programs are gone */
    }
    rig_destroy(a), rig_destroy(b);
}

static void test_a_reset_loses_what_is_on_the_links(void)
{
    CASE("messages of before a reset never arrive");
    struct rig *a, *b;
    make_pair(&a, &b);
    for (int round = 0; round < 3; round++) {
        load_slot(a, 0, transferring(SPK_OP_LINK_RECV, 1));
        load_slot(b, 0, transferring(SPK_OP_LINK_SEND, 0));
        set(b, SAIL_REG_EPOCH, 50);
        set_floats(b, X_AT, 1.0f);
        CHECK_EQUAL(run(b, running(b, 0, 1)).status, SAIL_OK); /* nobody takes it */
        reset_rig(round == 1 ? b : a);
        reset_rig(round == 1 ? a : b);
        a->fence = b->fence = 0;
        start_rings(a, 16), start_rings(b, 16);
        load_slot(a, 0, transferring(SPK_OP_LINK_RECV, 1));
        load_slot(b, 0, transferring(SPK_OP_LINK_SEND, 0));
        put(a, running(a, 0, 1));
        doorbell(a);
        CHECK_EQUAL(get(a, SAIL_REG_WAITING), 1);
        set_floats(b, X_AT, 2.0f);
        CHECK_EQUAL(run(b, running(b, 0, 1)).status, SAIL_OK);
        settle_both(a, b);
        CHECK_EQUAL(take(a).status, SAIL_OK);
        CHECK(float_at(a, X_AT) == 2.0f);
        reset_rig(a), reset_rig(b);
        a->fence = b->fence = 0;
        start_rings(a, 16), start_rings(b, 16);
    }
    rig_destroy(a), rig_destroy(b);
}

static void test_disabling_stops_at_once(void)
{
    CASE("ENABLE is cleared while steps run");
    struct rig *a, *b;
    make_pair(&a, &b);
    load_slot(a, 0, transferring(SPK_OP_LINK_RECV, 1));
    for (int i = 0; i < 10; i++)
        put(a, running(a, 0, 1));
    doorbell(a);
    set(a, SAIL_REG_CONTROL, 0);
    uint64_t accesses = a->host.accesses;
    CHECK_EQUAL(get(a, SAIL_REG_STATUS), SAIL_STATUS_READY);
    CHECK_EQUAL(get(a, SAIL_REG_COMMAND_HEAD), 0);
    CHECK_EQUAL(get(a, SAIL_REG_COMMAND_TAIL), 0);
    set(a, SAIL_REG_EPOCH, 1);
    settle(a);
    CHECK_EQUAL(a->host.accesses, accesses);
    a->fence = 0;
    start_rings(a, 16);
    CASE("the programs are still there");
    put(a, running(a, 0, 1));
    doorbell(a);
    CHECK_EQUAL(get(a, SAIL_REG_WAITING), 1);
    CHECK_EQUAL(get(a, SAIL_REG_RUNNING), 1);
    rig_destroy(a), rig_destroy(b);
}

/* --- watchdog, events, links, faults --------------------------------------------------------------- */

static void test_watchdog(void)
{
    struct rig *a, *b;
    make_pair(&a, &b);
    CASE("waiting for a link is no hang");
    load_slot(a, 0, transferring(SPK_OP_LINK_RECV, 1));
    set(a, SAIL_REG_WATCHDOG_MS, 5);
    put(a, running(a, 0, 1));
    doorbell(a);
    sleep_ns(10000000);
    settle(a);
    CHECK_EQUAL(get(a, SAIL_REG_FAILURE), 0);
    CASE("a hang is");
    fault(a, SAIL_FAULT_HANG, 0);
    uint64_t wake = spk_front_poll(a->front);
    CHECK(wake != UINT64_MAX);
    uint32_t progress = get(a, SAIL_REG_PROGRESS);
    sleep_ns(10000000);
    settle(a);
    CHECK_EQUAL(get(a, SAIL_REG_PROGRESS), progress);
    expect_failure(a, SAIL_FAILURE_WATCHDOG);
    CASE("so is a command that is not a step");
    set(a, SAIL_REG_WATCHDOG_MS, 5);
    fault(a, SAIL_FAULT_HANG, 0);
    put(a, (struct sail_command){.op = SAIL_OP_NOP, .fence = 100});
    doorbell(a);
    CHECK_EQUAL(get(a, SAIL_REG_RUNNING), 100);
    sleep_ns(10000000);
    expect_failure(a, SAIL_FAILURE_WATCHDOG);
    CASE("an idle card is well");
    set(a, SAIL_REG_WATCHDOG_MS, 1);
    sleep_ns(3000000);
    CHECK_EQUAL(spk_front_poll(a->front), UINT64_MAX);
    CHECK_EQUAL(get(a, SAIL_REG_FAILURE), 0);
    rig_destroy(a), rig_destroy(b);
}

static void test_events(void)
{
    struct rig *r = rig_create();
    _Atomic uint32_t *told = &r->host.interrupts[SAIL_VECTOR_EVENT];
    CASE("masked causes do not interrupt");
    fault(r, SAIL_FAULT_CORRECTED, 3);
    CHECK_EQUAL(get(r, SAIL_REG_EVENTS), SAIL_EVENT_ECC);
    CHECK_EQUAL(get(r, SAIL_REG_ECC_CORRECTED), 3);
    CHECK_EQUAL(*told, 0);
    CASE("unmasking tells of what is there");
    set(r, SAIL_REG_EVENTS_MASK, UINT32_MAX);
    CHECK_EQUAL(get(r, SAIL_REG_EVENTS_MASK), SAIL_EVENT_ALL);
    CHECK_EQUAL(*told, 1);
    CASE("clearing some tells of the others");
    fault(r, SAIL_FAULT_HOT, 99000);
    CHECK_EQUAL(get(r, SAIL_REG_TEMPERATURE_MC), 99000);
    CHECK_EQUAL(*told, 2);
    set(r, SAIL_REG_EVENTS, SAIL_EVENT_ECC);
    CHECK_EQUAL(get(r, SAIL_REG_EVENTS), SAIL_EVENT_HOT);
    CHECK_EQUAL(*told, 3);
    set(r, SAIL_REG_EVENTS, UINT32_MAX);
    CHECK_EQUAL(get(r, SAIL_REG_EVENTS), 0);
    CHECK_EQUAL(*told, 3);
    CASE("an error that cannot be corrected fails the card");
    fault(r, SAIL_FAULT_UNCORRECTED, 1);
    CHECK_EQUAL(get(r, SAIL_REG_ECC_UNCORRECTED), 1);
    CHECK_EQUAL(get(r, SAIL_REG_EVENTS), SAIL_EVENT_ECC | SAIL_EVENT_FAILED);
    expect_failure(r, SAIL_FAILURE_ECC);
    CHECK_EQUAL(get(r, SAIL_REG_ECC_UNCORRECTED), 0);
    rig_destroy(r);
}

static uint32_t state_of(struct rig *r, uint32_t link)
{
    return get(r, SAIL_REG_LINK(link) + SAIL_LINK_STATE);
}

static void test_links(void)
{
    struct rig *a, *b;
    make_pair(&a, &b);
    CASE("who is where");
    CHECK_EQUAL(get(a, SAIL_REG_LINKS), 2);
    CHECK_EQUAL(state_of(a, 0), SAIL_LINK_DOWN);
    CHECK_EQUAL(state_of(a, 1), SAIL_LINK_UP);
    CHECK_EQUAL(state_of(a, 2), 0);
    CHECK_EQUAL(get(a, SAIL_REG_LINK(0) + SAIL_LINK_PEER_LO), 0);
    CHECK_EQUAL(get(a, SAIL_REG_LINK(1) + SAIL_LINK_PEER_LO), get(b, SAIL_REG_SERIAL_LO));
    CHECK_EQUAL(get(a, SAIL_REG_LINK(1) + SAIL_LINK_PEER_HI), get(b, SAIL_REG_SERIAL_HI));
    CHECK_EQUAL(get(a, SAIL_REG_EVENTS), 0);
    CASE("down and up again");
    set(a, SAIL_REG_LINK(1) + SAIL_LINK_CONTROL, 0);
    settle_both(a, b);
    CHECK_EQUAL(state_of(a, 1), SAIL_LINK_DOWN);
    CHECK_EQUAL(state_of(b, 0), SAIL_LINK_TRAINING);
    CHECK_EQUAL(get(a, SAIL_REG_EVENTS), SAIL_EVENT_LINK);
    CHECK_EQUAL(get(b, SAIL_REG_EVENTS), SAIL_EVENT_LINK);
    set(a, SAIL_REG_LINK(1) + SAIL_LINK_CONTROL, 2); /* neither */
    CHECK_EQUAL(state_of(a, 1), SAIL_LINK_DOWN);
    CASE("messages wait");
    load_slot(a, 0, transferring(SPK_OP_LINK_RECV, 1));
    load_slot(b, 0, transferring(SPK_OP_LINK_SEND, 0));
    put(a, running(a, 0, 1)), doorbell(a);
    put(b, running(b, 0, 1)), doorbell(b);
    settle_both(a, b);
    CHECK_EQUAL(get(b, SAIL_REG_WAITING), 0);
    set(b, SAIL_REG_LINK(0) + SAIL_LINK_CONTROL, 0);
    set(a, SAIL_REG_LINK(1) + SAIL_LINK_CONTROL, 1);
    settle_both(a, b);
    CHECK_EQUAL(state_of(a, 1), SAIL_LINK_TRAINING);
    set(b, SAIL_REG_LINK(0) + SAIL_LINK_CONTROL, 1);
    settle_both(a, b);
    CHECK_EQUAL(take(a).status, SAIL_OK);
    CHECK_EQUAL(take(b).status, SAIL_OK);
    CASE("a link flaps");
    set(a, SAIL_REG_EVENTS, SAIL_EVENT_ALL);
    fault(a, SAIL_FAULT_FLAP, 1);
    CHECK_EQUAL(state_of(a, 1), SAIL_LINK_DOWN);
    CHECK(spk_front_poll(a->front) != UINT64_MAX);
    sleep_ns(11000000);
    settle_both(a, b);
    CHECK_EQUAL(state_of(a, 1), SAIL_LINK_UP);
    CHECK_EQUAL(state_of(b, 0), SAIL_LINK_UP);
    fault(a, SAIL_FAULT_FLAP, 2); /* no such link */
    CASE("a message that fails its check");
    CHECK_EQUAL(run(b, running(b, 0, 1)).status, SAIL_OK);
    struct way *way = &a->core->links[1].direct;
    uint64_t payload = way->rx->head + sizeof(struct { uint32_t a, b; uint64_t c; uint32_t d, e; });
    way->rx->data[payload % way->capacity] ^= 1;
    struct sail_completion done = run(a, running(a, 0, 1));
    CHECK_EQUAL(done.status, SAIL_E_LINK);
    CHECK_EQUAL(done.detail, 0);
    CHECK_EQUAL(state_of(a, 1), SAIL_LINK_ERROR);
    CHECK_EQUAL(get(a, SAIL_REG_LINK(1) + SAIL_LINK_ERRORS), 1);
    set(a, SAIL_REG_EPOCH, 1), set(b, SAIL_REG_EPOCH, 1);
    settle_both(a, b);
    CHECK_EQUAL(state_of(a, 1), SAIL_LINK_UP);
    CHECK_EQUAL(get(a, SAIL_REG_LINK(1) + SAIL_LINK_ERRORS), 1);
    CASE("a card that is taken out");
    fault(b, SAIL_FAULT_GONE, 0);
    settle_both(a, b);
    CHECK_EQUAL(state_of(a, 1), SAIL_LINK_TRAINING);
    rig_destroy(a), rig_destroy(b);
}

static void test_faults(void)
{
    struct rig *r = rig_create();
    struct sail_completion done;
    CASE("slow");
    fault(r, SAIL_FAULT_SLOW, 5000);
    put(r, (struct sail_command){.op = SAIL_OP_NOP});
    doorbell(r);
    CHECK(!peek(r, &done));
    CHECK(spk_front_poll(r->front) != UINT64_MAX);
    sleep_ns(6000000);
    settle(r);
    CHECK_EQUAL(take(r).status, SAIL_OK);
    CASE("a wrong fence, once");
    fault(r, SAIL_FAULT_NONE, 0);
    fault(r, SAIL_FAULT_COMPLETION, 0);
    uint64_t fence = put(r, (struct sail_command){.op = SAIL_OP_NOP});
    doorbell(r);
    CHECK(take(r).fence != fence);
    CHECK_EQUAL(run(r, (struct sail_command){.op = SAIL_OP_NOP}).status, SAIL_OK);
    CASE("hung, and well again");
    load_slot(r, 0, adding());
    fault(r, SAIL_FAULT_HANG, 0);
    put(r, running(r, 0, 1));
    put(r, (struct sail_command){.op = SAIL_OP_NOP});
    doorbell(r);
    CHECK(!peek(r, &done));
    fault(r, SAIL_FAULT_NONE, 0);
    CHECK_EQUAL(take(r).status, SAIL_OK);
    CHECK_EQUAL(take(r).status, SAIL_OK);
    CASE("hung, and aborted");
    fault(r, SAIL_FAULT_HANG, 0);
    put(r, running(r, 0, 1));
    doorbell(r);
    set(r, SAIL_REG_EPOCH, 1);
    settle(r);
    CHECK_EQUAL(take(r).status, SAIL_E_ABORTED);
    CASE("hung, and reset");
    put(r, running(r, 0, 1));
    doorbell(r);
    reset_rig(r);
    r->fence = 0;
    start_rings(r, 16);
    CHECK_EQUAL(run(r, (struct sail_command){.op = SAIL_OP_NOP}).status, SAIL_OK);
    CASE("gone");
    fault(r, SAIL_FAULT_GONE, 0);
    CHECK(spk_front_is_gone(r->front));
    CHECK_EQUAL(get(r, SAIL_REG_MAGIC), UINT32_MAX);
    CHECK_EQUAL(spk_front_read(r->front, 1, 2), UINT32_MAX);
    uint64_t accesses = r->host.accesses;
    put(r, (struct sail_command){.op = SAIL_OP_NOP});
    doorbell(r);
    set(r, SAIL_REG_CONTROL, SAIL_CONTROL_RESET);
    spk_front_reset(r->front);
    settle(r);
    CHECK_EQUAL(get(r, SAIL_REG_STATUS), UINT32_MAX);
    CHECK_EQUAL(r->host.accesses, accesses);
    CASE("power off and on");
    ((uint8_t *)r->ddr)[5000] = 1;
    spk_front_power_cycle(r->front);
    settle(r);
    CHECK_EQUAL(get(r, SAIL_REG_STATUS), SAIL_STATUS_READY);
    CHECK_EQUAL(get(r, SAIL_REG_GENERATION), 0);
    CHECK_EQUAL(((uint8_t *)r->ddr)[5000], 0);
    CASE("no such fault");
    fault(r, 77, 0);
    CHECK_EQUAL(get(r, SAIL_REG_FAULT), SAIL_FAULT_NONE);
    CASE("a hang that is planted during a reset does not keep the card in it");
    set(r, SAIL_REG_CONTROL, SAIL_CONTROL_RESET);
    set(r, SAIL_REG_FAULT, SAIL_FAULT_HANG);
    until(r, SAIL_REG_STATUS, ~0u, SAIL_STATUS_READY);
    rig_destroy(r);
}

static void test_a_card_without_faults(void)
{
    CASE("a card without fault registers");
    struct rig *r = rig_core();
    struct spk_front_host host = {r, rig_read, rig_write, rig_interrupt};
    struct spk_front_identity identity = {.sku = "", .name = "", .isa = ""};
    int status;
    r->front = spk_front_create(r->core, &identity, &host, &status);
    settle(r);
    fault(r, SAIL_FAULT_GONE, 7);
    CHECK_EQUAL(get(r, SAIL_REG_MAGIC), SAIL_MAGIC);
    CHECK_EQUAL(get(r, SAIL_REG_FAULT_ARG), 0);
    CHECK(!(get(r, SAIL_REG_CAPABILITIES) & SAIL_CAP_FAULTS));
    rig_destroy(r);
    CASE("cards that are none");
    CHECK(!spk_card_create_on(NULL, 4096, SPK_ISA_SCALAR, &status));
    CHECK_EQUAL(status, SPK_E_ARG);
    identity.links = SAIL_LINKS_MAX + 1;
    r = rig_core();
    CHECK(!spk_front_create(r->core, &identity, &host, &status));
    rig_destroy(r);
}

/* --- anything ------------------------------------------------------------------------------------- */

static uint64_t strange(struct rng *r)
{
    static const uint64_t values[] = {0, 1, 2, 63, 64, 4096, 1 << 16, FRONT_DDR_BYTES, UINT32_MAX,
                                      HOST_BASE, HOST_BASE + DATA_AT, HOST_BASE + HOST_BYTES - 8,
                                      UINT64_MAX, UINT64_MAX - 63, 1ull << 63};
    switch (rng_below(r, 4)) {
    case 0:
        return rng_next(r) >> rng_below(r, 64);
    case 1:
        return HOST_BASE + rng_below(r, HOST_BYTES);
    default:
        return values[rng_below(r, sizeof values / sizeof *values)];
    }
}

static struct sail_command random_command(struct rig *r, struct rng *rng)
{
    struct builder b = rng_below(rng, 2) ? adding() : failing();
    struct sail_command c;
    switch (rng_below(rng, 5)) {
    case 0:
        c = loading(r, rng_below(rng, 3), &b);
        break;
    case 1:
        c = (struct sail_command){.op = SAIL_OP_UNLOAD, .program = rng_below(rng, 3)};
        break;
    case 2:
        c = (struct sail_command){.op = SAIL_OP_FILL, .data_bytes = 64};
        break;
    default:
        c = running(r, rng_below(rng, 3), rng_below(rng, 6));
        c.stream = rng_below(rng, 3);
    }
    c.fence = ++r->fence;
    for (uint32_t n = rng_below(rng, 3); n; n--) {
        uint64_t value = strange(rng);
        size_t word = rng_below(rng, sizeof c / 8);
        memcpy((uint8_t *)&c + 8 * word, &value, 8);
    }
    return c;
}

static void test_anything(uint64_t seed)
{
    static const uint32_t registers[] = {
        SAIL_REG_CONTROL,       SAIL_REG_WATCHDOG_MS,     SAIL_REG_EPOCH,
        SAIL_REG_COMMAND_TAIL,  SAIL_REG_COMPLETION_HEAD, SAIL_REG_COMMAND_BASE_LO,
        SAIL_REG_COMMAND_ENTRIES, SAIL_REG_EVENTS,        SAIL_REG_EVENTS_MASK,
        SAIL_REG_FAULT_ARG,     SAIL_REG_FAULT,           SAIL_REG_LINK(0) + SAIL_LINK_CONTROL,
    };
    CASE("anything, seed %llu", (unsigned long long)seed);
    struct rig *r = rig_create();
    struct rng rng = {seed};
    for (int i = 0; i < 400; i++) {
        uint32_t what = rng_below(&rng, 16);
        if (what == 0) {
            spk_front_write(r->front, strange(&rng), 4, (uint32_t)strange(&rng));
        } else if (what == 1) {
            set(r, registers[rng_below(&rng, sizeof registers / 4)], (uint32_t)strange(&rng));
        } else if (what == 2) {
            spk_front_poll(r->front);
        } else if (what == 3) {
            (void)spk_front_read(r->front, strange(&rng) & 0xfffc, 4);
        } else {
            put(r, random_command(r, &rng));
            set(r, SAIL_REG_COMMAND_TAIL, r->tail);
            spk_front_poll(r->front);
            if (what & 1)
                settle(r);
            r->taken = get(r, SAIL_REG_COMPLETION_TAIL);
            set(r, SAIL_REG_COMPLETION_HEAD, r->taken);
        }
        if (i % 50 == 49 || get(r, SAIL_REG_STATUS) == UINT32_MAX) {
            spk_front_power_cycle(r->front);
            until(r, SAIL_REG_STATUS, SAIL_STATUS_READY, SAIL_STATUS_READY);
            r->fence = 0;
            start_rings(r, 16);
        }
    }
    spk_front_power_cycle(r->front);
    until(r, SAIL_REG_STATUS, ~0u, SAIL_STATUS_READY);
    r->fence = 0;
    start_rings(r, 16);
    load_slot(r, 0, adding());
    set_floats(r, X_AT, 1.0f), set_floats(r, Y_AT, 2.0f);
    CHECK_EQUAL(run(r, running(r, 0, 1)).status, SAIL_OK);
    CHECK(float_at(r, X_AT) == 3.0f);
    rig_destroy(r);
}

int main(void)
{
    uint64_t saved = spk_fp_enter();
    test_identification();
    test_accesses_that_are_none();
    test_rings_are_set_up_once();
    test_bad_rings();
    test_rings_go_round();
    test_completions_wait_for_room();
    test_a_step();
    test_commands_that_make_no_sense();
    test_programs_that_are_refused();
    test_buffers_run_out();
    test_fill_clears_exactly();
    test_commands_wait_for_steps_before_them();
    test_more_steps_than_the_core_queues();
    test_an_epoch_aborts_steps_alone();
    test_a_failed_step_aborts_its_stream();
    test_reset_in_the_middle_of_work();
    test_a_reset_loses_what_is_on_the_links();
    test_disabling_stops_at_once();
    test_watchdog();
    test_events();
    test_links();
    test_faults();
    test_a_card_without_faults();
    for (uint64_t seed = 1; seed <= 200; seed++)
        test_anything(seed);
    spk_fp_leave(saved);
    return 0;
}
