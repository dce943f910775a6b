// SPDX-License-Identifier: Apache-2.0
/*
 * The whole interface of the module, good and bad, on cards that work.
 *
 *   abi [CARDS]    with CARDS cards there are (1), /dev/spanker0 and up
 *
 * Each test says how it went on a line; the last line is RESULT ok or RESULT failed N.
 */
#include "common.h"

static int cards = 1;

static const struct {
    const char *name;
    unsigned long request;
} calls[] = {
    {"INFO", SPANKER_IOC_INFO},
    {"BUFFER_CREATE", SPANKER_IOC_BUFFER_CREATE},
    {"BUFFER_DESTROY", SPANKER_IOC_BUFFER_DESTROY},
    {"PROGRAM_LOAD", SPANKER_IOC_PROGRAM_LOAD},
    {"PROGRAM_UNLOAD", SPANKER_IOC_PROGRAM_UNLOAD},
    {"SUBMIT", SPANKER_IOC_SUBMIT},
    {"COLLECT", SPANKER_IOC_COLLECT},
    {"WAIT", SPANKER_IOC_WAIT},
    {"ABORT", SPANKER_IOC_ABORT},
    {"LINK", SPANKER_IOC_LINK},
    {"LINK_CONTROL", SPANKER_IOC_LINK_CONTROL},
    {"TELEMETRY", SPANKER_IOC_TELEMETRY},
    {"IMAGE", SPANKER_IOC_IMAGE},
};
#define CALLS (sizeof calls / sizeof calls[0])

/* --- the calls that have always been there --------------------------------------------------------- */

static void check_original(int fd)
{
    struct spanker_version version = {9, 9, 9, 9};
    IS(call(fd, SPANKER_IOC_PING, NULL), 0);
    IS(call(fd, SPANKER_IOC_GET_VERSION, &version), 0);
    CHECK(version.major == SPANKER_UAPI_MAJOR && version.minor == SPANKER_UAPI_MINOR &&
          version.patch == SPANKER_UAPI_PATCH && version.reserved == 0);
    CHECK(SPANKER_IOC_PING == 0xE301 && SPANKER_IOC_GET_VERSION == 0x8008E302u);
    IS(call(fd, SPANKER_IOC_GET_VERSION, NULL), -EFAULT);
    IS(call(fd, SPANKER_IOC_GET_VERSION, (void *)8), -EFAULT);
    IS(call(fd, SPANKER_IOC_GET_VERSION, at_the_end(7)), -EFAULT);
    IS(call(fd, SPANKER_IOC_GET_VERSION, at_the_end(8)), 0);
    IS(call(fd, _IO(0xE4, 1), NULL), -ENOTTY);
    IS(call(fd, _IO(0xE3, 0), NULL), -ENOTTY);
    IS(call(fd, _IO(0xE3, 3), NULL), -ENOTTY);
    IS(call(fd, _IO(0xE3, 0xff), NULL), -ENOTTY);
    IS(call(fd, _IOR(0xE3, 1, int), &version), -ENOTTY);
    IS(call(fd, _IOR(0xE3, 2, int), &version), -ENOTTY);
    IS(call(fd, _IOW(0xE3, 2, struct spanker_version), &version), -ENOTTY);
    IS(call(fd, 0, NULL), -ENOTTY);
    IS(call(fd, 0xffffffffu, NULL), -ENOTTY);
}

static void control_answers_as_ever(void)
{
    struct spanker_info info;
    int fd = open("/dev/spankerctl", O_RDWR);
    NEED(fd >= 0);
    check_original(fd);
    for (size_t i = 0; i < CALLS; i++)
        IS(call(fd, calls[i].request, &info), -ENOTTY);
    IS(call(fd, SPANKER_IOC_RESET, NULL), -ENOTTY);
    close(fd);
    fd = open("/dev/spankerctl", O_RDONLY);
    NEED(fd >= 0);
    IS(call(fd, SPANKER_IOC_PING, NULL), 0);
    close(fd);
}

static void card_answers_as_ever(void)
{
    int fd = open_card(0);
    NEED(fd >= 0);
    check_original(fd);
    close(fd);
}

/* --- every call -------------------------------------------------------------------------------------- */

static void bad_pointers_are_efault(void)
{
    int fd = open_card(0);
    NEED(fd >= 0);
    for (size_t i = 0; i < CALLS; i++) {
        size_t size = _IOC_SIZE(calls[i].request);
        long null = call(fd, calls[i].request, NULL);
        long low = call(fd, calls[i].request, (void *)16);
        long end = call(fd, calls[i].request, at_the_end(size - 1));
        if (null != -EFAULT || low != -EFAULT || end != -EFAULT)
            wrong(__LINE__, "%s: %ld, %ld, %ld", calls[i].name, null, low, end);
        /* All of it at the end of a page: zeros, which are good or EINVAL or ENOENT, not EFAULT. */
        long fits = call(fd, calls[i].request, memset(at_the_end(size), 0, size));
        if (fits == -EFAULT)
            wrong(__LINE__, "%s: EFAULT although all of it is there", calls[i].name);
    }
    close(fd);
}

static void read_only_memory_is_efault(void)
{
    int fd = open_card(0);
    void *page = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    NEED(fd >= 0 && page != MAP_FAILED);
    IS(call(fd, SPANKER_IOC_INFO, page), -EFAULT);
    IS(call(fd, SPANKER_IOC_TELEMETRY, page), -EFAULT);
    struct spanker_info info;
    IS(info_of(fd, &info), 0);
    IS(call(fd, SPANKER_IOC_LINK, page), info.links ? -EFAULT : -EINVAL);
    close(fd);
}

/* A buffer that nobody was told of does not stay. */
static void failed_answers_leave_nothing(void)
{
    struct spanker_buffer_create *create;
    struct spanker_info before, after;
    int fd = open_card(0);
    NEED(fd >= 0);
    create = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    create->bytes = 1 << 20;
    mprotect(create, PAGE, PROT_READ);
    IS(info_of(fd, &before), 0);
    for (int i = 0; i < 10; i++)
        IS(call(fd, SPANKER_IOC_BUFFER_CREATE, create), -EFAULT);
    IS(info_of(fd, &after), 0);
    CHECK(before.ddr_free == after.ddr_free);
    munmap(create, PAGE);
    close(fd);
}

static void other_sizes_and_directions_are_enotty(void)
{
    uint64_t room[64] = {0};
    int fd = open_card(0);
    NEED(fd >= 0);
    for (size_t i = 0; i < CALLS; i++) {
        unsigned long r = calls[i].request;
        unsigned long dir = _IOC_DIR(r), nr = _IOC_NR(r), size = _IOC_SIZE(r);
        IS(call(fd, _IOC(dir, 0xE3, nr, size + 8), room), -ENOTTY);
        IS(call(fd, _IOC(dir, 0xE3, nr, size - 4), room), -ENOTTY);
        IS(call(fd, _IOC(dir, 0xE3, nr, 0), room), -ENOTTY);
        IS(call(fd, _IOC(dir ^ _IOC_READ, 0xE3, nr, size), room), -ENOTTY);
        IS(call(fd, _IOC(dir, 0xE2, nr, size), room), -ENOTTY);
    }
    IS(call(fd, _IOR(0xE3, 0x19, int), room), -ENOTTY);
    IS(call(fd, _IO(0xE3, 0x1e), room), -ENOTTY);
    close(fd);
}

#define REFUSED(request, type, ...)                                                                \
    do {                                                                                           \
        type argument = __VA_ARGS__;                                                               \
        IS(call(fd, request, &argument), -EINVAL);                                                 \
    } while (0)

static void flags_and_reserved_must_be_zero(void)
{
    static uint8_t bytes[64];
    uint64_t at = (uintptr_t)bytes;
    int fd = open_card(0);
    NEED(fd >= 0);
    REFUSED(SPANKER_IOC_BUFFER_CREATE, struct spanker_buffer_create, {.bytes = 4096, .flags = 1});
    REFUSED(SPANKER_IOC_BUFFER_CREATE, struct spanker_buffer_create,
            {.bytes = 4096, .reserved = 1});
    REFUSED(SPANKER_IOC_BUFFER_CREATE, struct spanker_buffer_create, {.bytes = 4096, .kind = 2});
    REFUSED(SPANKER_IOC_BUFFER_CREATE, struct spanker_buffer_create,
            {.bytes = 4096, .kind = ~0u});
    REFUSED(SPANKER_IOC_BUFFER_CREATE, struct spanker_buffer_create, {.bytes = 0});
    REFUSED(SPANKER_IOC_BUFFER_DESTROY, struct spanker_buffer_destroy, {.handle = 1, .flags = 1});
    REFUSED(SPANKER_IOC_PROGRAM_LOAD, struct spanker_program_load,
            {.program = at, .program_bytes = 64, .flags = 1});
    REFUSED(SPANKER_IOC_PROGRAM_LOAD, struct spanker_program_load, {.program = at});
    REFUSED(SPANKER_IOC_PROGRAM_LOAD, struct spanker_program_load,
            {.program = at, .program_bytes = SPANKER_PROGRAM_BYTES_MAX + 1});
    REFUSED(SPANKER_IOC_PROGRAM_LOAD, struct spanker_program_load,
            {.program = at, .program_bytes = 64, .handles = at, .handle_count = 65537});
    REFUSED(SPANKER_IOC_PROGRAM_UNLOAD, struct spanker_program_unload,
            {.program_id = 1, .flags = 1});
    REFUSED(SPANKER_IOC_SUBMIT, struct spanker_submit,
            {.program_id = 1, .flags = 1, .parameters = at, .parameters_bytes = 36});
    REFUSED(SPANKER_IOC_SUBMIT, struct spanker_submit, {.program_id = 1, .parameters = at});
    REFUSED(SPANKER_IOC_SUBMIT, struct spanker_submit,
            {.parameters = at, .parameters_bytes = SPANKER_PARAMETERS_BYTES_MAX + 1});
    REFUSED(SPANKER_IOC_SUBMIT, struct spanker_submit,
            {.parameters = at, .parameters_bytes = 36, .read_count = SPANKER_READS_MAX + 1});
    REFUSED(SPANKER_IOC_COLLECT, struct spanker_collect, {.flags = 1});
    REFUSED(SPANKER_IOC_COLLECT, struct spanker_collect, {.reserved = 1});
    REFUSED(SPANKER_IOC_WAIT, struct spanker_wait, {.flags = 1});
    REFUSED(SPANKER_IOC_WAIT, struct spanker_wait, {.reserved = 1});
    REFUSED(SPANKER_IOC_WAIT, struct spanker_wait, {.fence = 0});
    REFUSED(SPANKER_IOC_WAIT, struct spanker_wait, {.fence = 1});
    REFUSED(SPANKER_IOC_ABORT, struct spanker_abort, {.epoch = 1, .flags = 1});
    REFUSED(SPANKER_IOC_ABORT, struct spanker_abort, {.epoch = 0});
    REFUSED(SPANKER_IOC_LINK, struct spanker_link, {.link = 0, .flags = 1});
    REFUSED(SPANKER_IOC_LINK, struct spanker_link, {.link = 64});
    REFUSED(SPANKER_IOC_LINK, struct spanker_link, {.link = ~0u});
    REFUSED(SPANKER_IOC_LINK_CONTROL, struct spanker_link_control, {.link = 0, .up = 2});
    REFUSED(SPANKER_IOC_LINK_CONTROL, struct spanker_link_control, {.link = 1000, .up = 1});
    REFUSED(SPANKER_IOC_IMAGE, struct spanker_image, {.image = at});
    REFUSED(SPANKER_IOC_IMAGE, struct spanker_image, {.image = at, .image_bytes = 8, .flags = 1});
    REFUSED(SPANKER_IOC_IMAGE, struct spanker_image,
            {.image = at, .image_bytes = 8, .reserved = 1});
    REFUSED(SPANKER_IOC_IMAGE, struct spanker_image,
            {.image = at, .image_bytes = SPANKER_IMAGE_BYTES_MAX + 1});
    close(fd);
}

static void wrong_handles_are_enoent(void)
{
    struct spanker_buffer_create buffer;
    struct spanker_program_load load;
    uint32_t handle = 12345;
    struct program *p = copies(1, PAGE);
    int fd = open_card(0), other = open_card(0);
    NEED(fd >= 0 && other >= 0);
    IS(buffer_destroy(fd, 0), -ENOENT);
    IS(buffer_destroy(fd, 1), -ENOENT);
    IS(buffer_destroy(fd, ~0u), -ENOENT);
    IS(program_unload(fd, 0), -ENOENT);
    IS(program_unload(fd, ~0u), -ENOENT);
    IS(submit(fd, 1, NULL, 0, NULL), -ENOENT);
    IS(program_load(fd, p, program_bytes(p), &handle, 1, &load, NULL), -ENOENT);
    /* Handles are a file's own. */
    IS(buffer_create(fd, PAGE, SPANKER_BUFFER_DDR, &buffer), 0);
    IS(buffer_destroy(other, buffer.handle), -ENOENT);
    IS(program_load(other, p, program_bytes(p), &buffer.handle, 1, &load, NULL), -ENOENT);
    IS(buffer_destroy(fd, buffer.handle), 0);
    IS(buffer_destroy(fd, buffer.handle), -ENOENT);
    free(p);
    close(fd);
    close(other);
}

static void pointers_in_arguments_are_checked(void)
{
    struct spanker_program_load load = {.program_bytes = 160, .program = 4096};
    struct spanker_image image = {.image = 4096, .image_bytes = 100};
    struct spanker_read read = {.handle = 0};
    char why[SPANKER_WHY_BYTES];
    struct work w;
    NEED(work_begin(&w, 0, 1, PAGE));
    IS(call(w.fd, SPANKER_IOC_PROGRAM_LOAD, &load), -EFAULT);
    load.program = (uintptr_t)at_the_end(159);
    IS(call(w.fd, SPANKER_IOC_PROGRAM_LOAD, &load), -EFAULT);
    load.program = (uintptr_t)at_the_end(160);
    load.handle_count = 2;
    load.handles = (uintptr_t)at_the_end(7);
    IS(call(w.fd, SPANKER_IOC_PROGRAM_LOAD, &load), -EFAULT);
    load.handle_count = 0;
    load.why = 8;
    IS(call(w.fd, SPANKER_IOC_PROGRAM_LOAD, &load), -EFAULT);
    load.why = (uintptr_t)why;
    IS(call(w.fd, SPANKER_IOC_PROGRAM_LOAD, &load), -ENOEXEC);
    IS(call(w.fd, SPANKER_IOC_IMAGE, &image), -EFAULT);
    IS(submit(w.fd, w.program.program_id, (void *)4096, 1, NULL), -EFAULT);
    IS(submit(w.fd, w.program.program_id, &read, 1, NULL), -ENOENT);
    struct spanker_submit submission = {.program_id = w.program.program_id,
                                        .parameters = 4096,
                                        .parameters_bytes = sizeof no_tokens};
    IS(call(w.fd, SPANKER_IOC_SUBMIT, &submission), -EFAULT);
    submission.parameters = (uintptr_t)at_the_end(sizeof no_tokens - 1);
    IS(call(w.fd, SPANKER_IOC_SUBMIT, &submission), -EFAULT);
    work_end(&w);
}

/* --- asking --------------------------------------------------------------------------------------- */

static void info_says_what_the_card_is(void)
{
    struct spanker_info info, first = {0};
    char text[64];
    for (int i = 0; i < cards; i++) {
        int fd = open_card(i);
        NEED(fd >= 0);
        memset(&info, 0xff, sizeof info);
        IS(info_of(fd, &info), 0);
        CHECK(info.number == (uint32_t)i);
        CHECK(info.serial != 0 && info.ddr_bytes >= 1 << 20 && info.ddr_bytes % PAGE == 0);
        CHECK(info.ddr_free == info.ddr_bytes && info.mappable <= info.ddr_bytes);
        CHECK(info.card_major == SAIL_VERSION_MAJOR && info.programs > 0 && info.queue_max > 0);
        CHECK(!(info.flags & (SPANKER_INFO_FAILED | SPANKER_INFO_GONE)));
        CHECK(info.sku[0] && info.name[0] && info.isa[0]);
        CHECK(!info.reserved[0] && !info.reserved[1] && !info.reserved[2] && !info.reserved[3]);
        /* Numbered by ascending serial number. */
        if (i > 0)
            CHECK(info.serial > first.serial);
        first = info;
        CHECK(attribute(i, "serial", text, sizeof text) > 0);
        CHECK(strtoull(text, NULL, 16) == info.serial);
        CHECK(attribute(i, "ddr_bytes", text, sizeof text) > 0);
        CHECK(strtoull(text, NULL, 10) == info.ddr_bytes);
        CHECK(attribute(i, "ddr_used", text, sizeof text) > 0 && !strcmp(text, "0\n"));
        CHECK(attribute(i, "state", text, sizeof text) > 0 && !strcmp(text, "ready\n"));
        CHECK(attribute(i, "temperature", text, sizeof text) > 0 && atoi(text) > 0);
        CHECK(attribute(i, "sku", text, sizeof text) > 0 &&
              !strncmp(text, info.sku, strlen(text) - 1));
        CHECK(attribute(i, "generation", text, sizeof text) > 0 &&
              strtoul(text, NULL, 10) == info.generation);
        CHECK(attribute(i, "links", text, sizeof text) >= 0);
        close(fd);
    }
    char path[32];
    snprintf(path, sizeof path, "/dev/spanker%d", cards);
    CHECK(access(path, F_OK) != 0);
}

static void telemetry_counts(void)
{
    struct spanker_telemetry before, after;
    struct work w;
    NEED(work_begin(&w, 0, 3, PAGE));
    IS(call(w.fd, SPANKER_IOC_TELEMETRY, &before), 0);
    CHECK(work_once(&w, 1));
    IS(call(w.fd, SPANKER_IOC_TELEMETRY, &after), 0);
    CHECK(after.steps == before.steps + 1 && after.commands >= before.commands + 3);
    CHECK(after.progress != before.progress && after.queued == 0);
    CHECK(after.ddr_used == 2 * PAGE && after.temperature_mc > 0);
    CHECK(!after.reserved[0] && !after.reserved[1] && !after.reserved[2] && !after.reserved[3]);
    work_end(&w);
}

static void links_lead_to_the_other_cards(void)
{
    struct spanker_info info, other;
    int fd = open_card(0);
    NEED(fd >= 0);
    IS(info_of(fd, &info), 0);
    for (uint32_t i = 0; i < info.links; i++) {
        struct spanker_link link = {.link = i};
        IS(call(fd, SPANKER_IOC_LINK, &link), 0);
        CHECK(link.state <= SPANKER_LINK_ERROR && link.peer != info.serial);
    }
    struct spanker_link beyond = {.link = info.links};
    IS(call(fd, SPANKER_IOC_LINK, &beyond), -EINVAL);
    if (cards > 1) {
        bool found = false;
        int peer = open_card(1);
        IS(info_of(peer, &other), 0);
        for (uint32_t i = 0; i < info.links; i++) {
            struct spanker_link link = {.link = i};
            IS(call(fd, SPANKER_IOC_LINK, &link), 0);
            found |= link.peer == other.serial && link.state == SPANKER_LINK_UP;
        }
        CHECK(found);
        close(peer);
    }
    close(fd);
}

static void an_image_is_taken(void)
{
    static uint8_t bytes[70000];
    struct spanker_image image = {.image = (uintptr_t)bytes, .image_bytes = sizeof bytes};
    int fd = open_card(0);
    NEED(fd >= 0);
    long result = call(fd, SPANKER_IOC_IMAGE, &image);
    CHECK(result == 0 || result == -ENODEV);
    close(fd);
}

/* --- buffers --------------------------------------------------------------------------------------- */

static bool is_zero(const uint8_t *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (bytes[i])
            return false;
    return true;
}

static void buffers_are_zero_at_first(void)
{
    for (uint32_t kind = SPANKER_BUFFER_DDR; kind <= SPANKER_BUFFER_HOST; kind++) {
        for (int round = 0; round < 3; round++) {
            struct spanker_buffer_create buffer;
            int fd = open_card(0);
            NEED(fd >= 0);
            IS(buffer_create(fd, 5 * PAGE + 1, kind, &buffer), 0);
            CHECK(buffer.handle != 0 && buffer.mmap_offset != 0 &&
                  buffer.mmap_offset % PAGE == 0);
            uint8_t *memory = mmap(NULL, 6 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                                   (off_t)buffer.mmap_offset);
            NEED(memory != MAP_FAILED);
            CHECK(is_zero(memory, 6 * PAGE));
            memset(memory, 0xa5, 6 * PAGE);
            CHECK(memory[5 * PAGE] == 0xa5);
            munmap(memory, 6 * PAGE);
            close(fd);
        }
    }
}

static void memory_comes_back(void)
{
    struct spanker_info before, during, after;
    struct spanker_buffer_create buffer[16];
    int fd = open_card(0), watcher = open_card(0);
    NEED(fd >= 0 && watcher >= 0);
    IS(info_of(watcher, &before), 0);
    for (int i = 0; i < 16; i++)
        IS(buffer_create(fd, (uint64_t)(i + 1) * PAGE, SPANKER_BUFFER_DDR, &buffer[i]), 0);
    IS(info_of(watcher, &during), 0);
    CHECK(during.ddr_free == before.ddr_free - 136 * PAGE);
    for (int i = 0; i < 16; i += 2)
        IS(buffer_destroy(fd, buffer[i].handle), 0);
    for (int i = 0; i < 16; i++)
        for (int j = 1; j < 16; j += 2)
            if (i % 2 && i < j)
                CHECK(buffer[i].address + (uint64_t)(i + 1) * PAGE <= buffer[j].address);
    close(fd);
    IS(info_of(watcher, &after), 0);
    CHECK(after.ddr_free == before.ddr_free);
    close(watcher);
}

static void a_full_card_is_enospc(void)
{
    struct spanker_buffer_create buffer, all;
    struct spanker_info info;
    int fd = open_card(0);
    NEED(fd >= 0);
    IS(info_of(fd, &info), 0);
    IS(buffer_create(fd, info.ddr_bytes + 1, SPANKER_BUFFER_DDR, &buffer), -ENOSPC);
    IS(buffer_create(fd, UINT64_MAX, SPANKER_BUFFER_DDR, &buffer), -ENOSPC);
    IS(buffer_create(fd, UINT64_MAX - 4094, SPANKER_BUFFER_DDR, &buffer), -ENOSPC);
    IS(buffer_create(fd, info.ddr_bytes, SPANKER_BUFFER_DDR, &all), 0);
    IS(buffer_create(fd, 1, SPANKER_BUFFER_DDR, &buffer), -ENOSPC);
    IS(buffer_destroy(fd, all.handle), 0);
    IS(buffer_create(fd, 1, SPANKER_BUFFER_DDR, &buffer), 0);
    IS(buffer_create(fd, info.ddr_bytes, SPANKER_BUFFER_DDR, &all), -ENOSPC);
    close(fd);
}

static void host_memory_has_a_limit(void)
{
    struct spanker_buffer_create buffer;
    int fd = open_card(0), made = 0;
    long result = 0;
    NEED(fd >= 0);
    IS(buffer_create(fd, UINT64_MAX, SPANKER_BUFFER_HOST, &buffer), -EDQUOT);
    while (!result && made < 100) {
        result = buffer_create(fd, 1 << 20, SPANKER_BUFFER_HOST, &buffer);
        made += !result;
    }
    CHECK(made > 0 && (result == -EDQUOT || result == -ENOMEM));
    close(fd);
    fd = open_card(0);
    IS(buffer_create(fd, 1 << 20, SPANKER_BUFFER_HOST, &buffer), 0);
    close(fd);
}

/* --- mappings ---------------------------------------------------------------------------------------- */

static bool maps(int fd, uint64_t offset, size_t bytes, int flags)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, (off_t)offset);
    if (memory == MAP_FAILED)
        return false;
    munmap(memory, bytes);
    return true;
}

static void mappings_stay_inside(void)
{
    struct spanker_buffer_create a, b;
    int fd = open_card(0), other = open_card(0);
    NEED(fd >= 0 && other >= 0);
    IS(buffer_create(fd, 4 * PAGE, SPANKER_BUFFER_DDR, &a), 0);
    IS(buffer_create(fd, 4 * PAGE, SPANKER_BUFFER_HOST, &b), 0);
    for (int i = 0; i < 2; i++) {
        uint64_t at = i ? b.mmap_offset : a.mmap_offset;
        CHECK(maps(fd, at, 4 * PAGE, MAP_SHARED));
        CHECK(maps(fd, at, 1, MAP_SHARED));
        CHECK(maps(fd, at + PAGE, 3 * PAGE, MAP_SHARED));
        CHECK(maps(fd, at + 3 * PAGE, PAGE, MAP_SHARED));
        CHECK(!maps(fd, at, 5 * PAGE, MAP_SHARED));
        CHECK(!maps(fd, at + PAGE, 4 * PAGE, MAP_SHARED));
        CHECK(!maps(fd, at, 1 << 30, MAP_SHARED));
        CHECK(!maps(fd, at, PAGE, MAP_PRIVATE));
        CHECK(!maps(other, at, PAGE, MAP_SHARED));
    }
    CHECK(!maps(fd, 0, PAGE, MAP_SHARED));
    CHECK(!maps(fd, 1ull << 40, PAGE, MAP_SHARED));
    IS(buffer_destroy(fd, a.handle), 0);
    CHECK(!maps(fd, a.mmap_offset, PAGE, MAP_SHARED));
    close(fd);
    close(other);
}

static void mappings_show_the_same_memory(void)
{
    struct spanker_buffer_create buffer;
    for (uint32_t kind = SPANKER_BUFFER_DDR; kind <= SPANKER_BUFFER_HOST; kind++) {
        int fd = open_card(0);
        NEED(fd >= 0);
        IS(buffer_create(fd, 700 * PAGE, kind, &buffer), 0);
        volatile uint8_t *all = buffer_map(fd, &buffer);
        volatile uint8_t *part = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                                      (off_t)(buffer.mmap_offset + 599 * PAGE));
        NEED(all != MAP_FAILED && part != MAP_FAILED);
        for (uint32_t i = 0; i < 700; i++)
            *(volatile uint32_t *)(all + i * PAGE) = i;
        CHECK(*(volatile uint32_t *)part == 599 && *(volatile uint32_t *)(part + PAGE) == 600);
        part[5] = 77;
        CHECK(all[599 * PAGE + 5] == 77);
        /* A child has them, too, and what it writes is seen. */
        pid_t child = fork();
        if (child == 0) {
            all[3] = part[5];
            _exit(0);
        }
        int status = -1;
        waitpid(child, &status, 0);
        CHECK(status == 0 && all[3] == 77);
        /* Splitting and taking away. */
        munmap((void *)(all + 10 * PAGE), 5 * PAGE);
        CHECK(*(volatile uint32_t *)(all + 9 * PAGE) == 9 &&
              *(volatile uint32_t *)(all + 15 * PAGE) == 15);
        munmap((void *)all, 700 * PAGE);
        CHECK(part[5] == 77);
        munmap((void *)part, 2 * PAGE);
        close(fd);
    }
}

static void memory_lives_as_long_as_a_mapping(void)
{
    struct spanker_buffer_create buffer, next;
    struct spanker_info before, after;
    for (uint32_t kind = SPANKER_BUFFER_DDR; kind <= SPANKER_BUFFER_HOST; kind++) {
        int fd = open_card(0), watcher = open_card(0);
        NEED(fd >= 0 && watcher >= 0);
        IS(info_of(watcher, &before), 0);
        IS(buffer_create(fd, 3 * PAGE, kind, &buffer), 0);
        volatile uint8_t *memory = buffer_map(fd, &buffer);
        NEED(memory != MAP_FAILED);
        memory[PAGE] = 42;
        IS(buffer_destroy(fd, buffer.handle), 0);
        IS(buffer_create(fd, 3 * PAGE, kind, &next), 0);
        volatile uint8_t *second = buffer_map(fd, &next);
        NEED(second != MAP_FAILED);
        CHECK(second[PAGE] == 0 && memory[PAGE] == 42);
        if (kind == SPANKER_BUFFER_DDR)
            CHECK(next.address != buffer.address);
        close(fd);
        CHECK(memory[PAGE] == 42 && memory[2 * PAGE] == 0);
        munmap((void *)memory, 3 * PAGE);
        munmap((void *)second, 3 * PAGE);
        IS(info_of(watcher, &after), 0);
        CHECK(after.ddr_free == before.ddr_free);
        close(watcher);
    }
}

/* --- programs ---------------------------------------------------------------------------------------- */

static void programs_are_checked(void)
{
    struct spanker_buffer_create a, b, host;
    struct spanker_program_load load;
    char why[SPANKER_WHY_BYTES];
    int fd = open_card(0);
    NEED(fd >= 0);
    IS(buffer_create(fd, 2 * PAGE, SPANKER_BUFFER_DDR, &a), 0);
    IS(buffer_create(fd, 2 * PAGE, SPANKER_BUFFER_DDR, &b), 0);
    IS(buffer_create(fd, 2 * PAGE, SPANKER_BUFFER_HOST, &host), 0);
    uint32_t good[2] = {a.handle, b.handle}, bad[2] = {a.handle, host.handle};
    struct program *p = copies(3, PAGE);
    size_t bytes = program_bytes(p);
#define REFUSES(at)                                                                                \
    do {                                                                                           \
        memset(why, 0, sizeof why);                                                                \
        IS(program_load(fd, p, bytes, good, 2, &load, why), -ENOEXEC);                             \
        CHECK(why[0] && memchr(why, 0, sizeof why) && load.command == (at));                       \
    } while (0)

    IS(program_load(fd, p, bytes, bad, 2, &load, why), -EINVAL);
    IS(program_load(fd, p, bytes, good, 1, &load, why), -ENOEXEC);
    IS(program_load(fd, p, bytes, NULL, 0, &load, why), -ENOEXEC);
    bytes -= 8;
    REFUSES(0);
    bytes += 16;
    REFUSES(0);
    bytes -= 8;
    p->header.magic++;
    REFUSES(0);
    p->header.magic--;
    p->header.version = 2;
    REFUSES(0);
    p->header.version = 1;
    p->header.commands = 0x02000003; /* times 128 it wraps to the right size */
    REFUSES(0);
    p->header.commands = 3;
    p->commands[2].ref[3].buffer = 2; /* the module's check */
    REFUSES(2);
    p->commands[2].ref[3].buffer = 1;
    p->commands[1].ref[0].offset = 2 * PAGE; /* where the buffer ends */
    REFUSES(1);
    CHECK(!!strstr(why, "operand 0 begins at 8192"));
    p->commands[1].ref[0].offset = 2 * PAGE + 4;
    REFUSES(1);
    p->commands[1].ref[0].offset = UINT64_MAX;
    REFUSES(1);
    p->commands[1].ref[0].offset = PAGE + 4; /* begins inside, ends outside: the card's */
    REFUSES(1);
    p->commands[1].ref[0].offset = 0;
    p->commands[2].op = 999;
    REFUSES(2);
    p->commands[2].op = OP_COPY;
    IS(program_load(fd, p, bytes, good, 2, &load, why), 0);
    CHECK(load.program_id != 0);
    IS(buffer_destroy(fd, a.handle), -EBUSY);
    IS(buffer_destroy(fd, b.handle), -EBUSY);
    IS(buffer_destroy(fd, host.handle), 0);
    IS(program_unload(fd, load.program_id), 0);
    IS(program_unload(fd, load.program_id), -ENOENT);
    IS(buffer_destroy(fd, a.handle), 0);
    IS(buffer_destroy(fd, b.handle), 0);
    free(p);
    close(fd);
}

static void slots_come_back(void)
{
    struct spanker_program_load load;
    struct spanker_info info;
    struct work w;
    NEED(work_begin(&w, 0, 1, PAGE));
    IS(info_of(w.fd, &info), 0);
    struct program *p = copies(1, PAGE);
    uint32_t handles[2] = {w.from.handle, w.into.handle};
    uint32_t ids[1024], count = 0;
    long result = 0;
    while (count < 1024 &&
           !(result = program_load(w.fd, p, program_bytes(p), handles, 2, &load, NULL)))
        ids[count++] = load.program_id;
    CHECK(result == -ENOSPC && count == info.programs - 1);
    /* Freeing one frees a slot, and all of its memory, at once. */
    for (int i = 0; i < 20; i++) {
        IS(program_unload(w.fd, ids[0]), 0);
        IS(program_load(w.fd, p, program_bytes(p), handles, 2, &load, NULL), 0);
        ids[0] = load.program_id;
    }
    for (uint32_t i = 0; i < count; i++)
        IS(program_unload(w.fd, ids[i]), 0);
    IS(program_unload(w.fd, w.program.program_id), 0);
    IS(buffer_destroy(w.fd, w.into.handle), 0);
    IS(buffer_create(w.fd, info.ddr_free + PAGE, SPANKER_BUFFER_DDR, &w.into), 0);
    free(p);
    work_end(&w);
    CHECK(card_works(0));
}

/* 65,536 entries of all programs together, on emulated cards. */
static void a_card_without_memory_for_a_table_is_enomem(void)
{
    struct spanker_program_load load;
    struct work w;
    NEED(work_begin(&w, 0, 1, PAGE));
    struct program *p = copies(1, PAGE);
    uint32_t *handles = malloc(40000 * sizeof *handles);
    for (uint32_t i = 0; i < 40000; i++)
        handles[i] = i % 2 ? w.into.handle : w.from.handle;
    IS(program_load(w.fd, p, program_bytes(p), handles, 40000, &load, NULL), 0);
    uint32_t first = load.program_id;
    IS(program_load(w.fd, p, program_bytes(p), handles, 40000, &load, NULL), -ENOMEM);
    IS(program_unload(w.fd, first), 0);
    IS(program_load(w.fd, p, program_bytes(p), handles, 40000, &load, NULL), 0);
    IS(program_unload(w.fd, load.program_id), 0);
    CHECK(work_once(&w, 1));
    free(handles);
    free(p);
    work_end(&w);
}

/* --- steps ----------------------------------------------------------------------------------------- */

static void steps_bring_back_what_they_read(void)
{
    struct work w;
    uint8_t results[3 * PAGE];
    struct spanker_collect got;
    uint64_t fence;
    NEED(work_begin(&w, 0, 1, 3 * PAGE));
    for (int i = 0; i < 20; i++)
        CHECK(work_once(&w, (uint8_t)i));
    IS(collect(w.fd, 0, results, sizeof results, &got), -EAGAIN);
    IS(collect(w.fd, 5 * MS, results, sizeof results, &got), -EAGAIN);

    /* Several pieces, odd ones, one after the other; none at all; empty ones. */
    struct spanker_read reads[4] = {
        {.handle = w.into.handle, .offset = 3, .bytes = 5},
        {.handle = w.from.handle, .offset = 3 * PAGE, .bytes = 0},
        {.handle = w.from.handle, .offset = 3 * PAGE - 1, .bytes = 1},
        {.handle = w.into.handle, .offset = 0, .bytes = 3 * PAGE - 6},
    };
    IS(submit(w.fd, w.program.program_id, reads, 4, &fence), 0);
    CHECK(fence == 21);
    memset(results, 0xee, sizeof results);
    IS(wait_fence(w.fd, fence, 10 * SECOND), 0);
    IS(wait_fence(w.fd, 1, 0), 0);
    IS(wait_fence(w.fd, 22, 0), -EINVAL);
    IS(collect(w.fd, 0, results, 3 * PAGE - 1, &got), -ENOSPC);
    CHECK(got.results_bytes == 3 * PAGE);
    IS(collect(w.fd, 0, (void *)64, 3 * PAGE, &got), -EFAULT);
    IS(collect(w.fd, 0, at_the_end(3 * PAGE - 1), 3 * PAGE, &got), -EFAULT);
    IS(collect(w.fd, 0, results, sizeof results, &got), 0);
    CHECK(got.fence == 21 && got.error == 0 && got.results_bytes == 3 * PAGE);
    CHECK(!memcmp(results, w.memory + 3, 5) && results[5] == w.memory[3 * PAGE - 1] &&
          !memcmp(results + 6, w.memory, 3 * PAGE - 6));
    IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), 0);
    IS(collect(w.fd, -1, NULL, 0, &got), 0);
    CHECK(got.fence == 22 && got.results_bytes == 0 && got.error == 0);

    struct spanker_read bad = {.handle = w.into.handle, .offset = 1, .bytes = 3 * PAGE};
    IS(submit(w.fd, w.program.program_id, &bad, 1, &fence), -EINVAL);
    bad.offset = UINT64_MAX;
    IS(submit(w.fd, w.program.program_id, &bad, 1, &fence), -EINVAL);
    bad = (struct spanker_read){.handle = w.into.handle, .bytes = UINT64_MAX};
    IS(submit(w.fd, w.program.program_id, &bad, 1, &fence), -EINVAL);
    bad = (struct spanker_read){.handle = w.into.handle, .reserved = 1};
    IS(submit(w.fd, w.program.program_id, &bad, 1, &fence), -EINVAL);
    /* One that no step can have seen does not count. */
    IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), 0);
    CHECK(fence == 23);
    IS(collect(w.fd, -1, NULL, 0, &got), 0);
    work_end(&w);
}

static void large_steps_work(void)
{
    struct work w;
    NEED(work_begin(&w, 0, 1, SPANKER_READ_BYTES_MAX));
    CHECK(work_once(&w, 9));
    struct spanker_read reads[2] = {{.handle = w.into.handle, .bytes = SPANKER_READ_BYTES_MAX},
                                    {.handle = w.into.handle, .bytes = 1}};
    IS(submit(w.fd, w.program.program_id, reads, 2, NULL), -EINVAL);
    work_end(&w);
}

static void bad_parameters_complete_with_einval(void)
{
    struct spanker_collect got;
    struct work w;
    struct step step = no_tokens;
    NEED(work_begin(&w, 0, 1, PAGE));
    struct spanker_read read = {.handle = w.into.handle, .bytes = PAGE};
    struct spanker_submit bad = {.program_id = w.program.program_id,
                                 .parameters = (uintptr_t)&step,
                                 .parameters_bytes = sizeof step,
                                 .reads = (uintptr_t)&read,
                                 .read_count = 1};
    step.magic = 7;
    IS(call(w.fd, SPANKER_IOC_SUBMIT, &bad), 0);
    IS(collect(w.fd, 10 * SECOND, NULL, 0, &got), 0);
    CHECK(got.error == -EINVAL && got.results_bytes == 0 && got.fence == bad.fence);
    CHECK(work_once(&w, 3));
    work_end(&w);
}

static void the_queue_has_an_end(void)
{
    struct spanker_collect got;
    struct spanker_info info;
    struct work w;
    uint64_t fence, last = 0;
    NEED(work_begin(&w, 0, 1, PAGE));
    IS(info_of(w.fd, &info), 0);
    for (uint32_t i = 0; i < info.queue_max; i++) {
        IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), 0);
        CHECK(fence == last + 1);
        last = fence;
    }
    IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), -EBUSY);
    IS(wait_fence(w.fd, last, 20 * SECOND), 0);
    /* Uncollected ones count, too. */
    IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), -EBUSY);
    IS(collect(w.fd, 0, NULL, 0, &got), 0);
    IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), 0);
    CHECK(fence == last + 1);
    for (uint64_t i = 2; i <= last + 1; i++) {
        IS(collect(w.fd, 10 * SECOND, NULL, 0, &got), 0);
        CHECK(got.fence == i && got.error == 0);
    }
    work_end(&w);
}

static void a_queued_program_is_busy(void)
{
    struct spanker_collect got;
    struct work w;
    NEED(work_begin(&w, 0, 400, 1 << 20));
    /* Several: a machine that is emulated may stand still for as long as one takes. */
    for (int i = 0; i < 6; i++)
        IS(submit(w.fd, w.program.program_id, NULL, 0, NULL), 0);
    IS(program_unload(w.fd, w.program.program_id), -EBUSY);
    for (int i = 0; i < 6; i++)
        IS(collect(w.fd, 60 * SECOND, NULL, 0, &got), 0);
    IS(program_unload(w.fd, w.program.program_id), 0);
    IS(submit(w.fd, w.program.program_id, NULL, 0, NULL), -ENOENT);
    work_end(&w);
}

static void slow_and_not_begun_are_told_apart(void)
{
    struct spanker_collect got;
    struct work w;
    uint64_t fence;
    NEED(work_begin(&w, 0, 4000, 1 << 20));
    IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), 0);
    IS(wait_fence(w.fd, fence, 0), -EAGAIN);
    long result = wait_slow(w.fd, fence, 30 * MS);
    CHECK(result == -ETIME || result == 0); /* it is fast where it is not slow */
    IS(collect(w.fd, -1, NULL, 0, &got), 0);
    work_end(&w);
}

/* --- poll and O_NONBLOCK ------------------------------------------------------------------------------ */

static short polled(int fd, int timeout_ms)
{
    struct pollfd p = {.fd = fd, .events = POLLIN | POLLPRI | POLLOUT};
    return poll(&p, 1, timeout_ms) < 0 ? -1 : p.revents;
}

static void poll_tells_of_completions(void)
{
    struct spanker_collect got;
    struct work w;
    NEED(work_begin(&w, 0, 50, 1 << 16));
    CHECK(polled(w.fd, 0) == 0);
    IS(submit(w.fd, w.program.program_id, NULL, 0, NULL), 0);
    CHECK(polled(w.fd, 10000) == POLLIN);
    CHECK(polled(w.fd, 0) == POLLIN);
    IS(collect(w.fd, 0, NULL, 0, &got), 0);
    CHECK(polled(w.fd, 0) == 0);
    work_end(&w);
}

static void nonblocking_files_never_wait(void)
{
    struct spanker_collect got;
    struct spanker_event event;
    int fd = open_flags(0, O_NONBLOCK);
    NEED(fd >= 0);
    int64_t begin = now_ns();
    IS(collect(fd, -1, NULL, 0, &got), -EAGAIN);
    IS(collect(fd, 100 * SECOND, NULL, 0, &got), -EAGAIN);
    CHECK(read(fd, &event, sizeof event) < 0 && errno == EAGAIN);
    CHECK(now_ns() - begin < 5 * SECOND);
    CHECK(read(fd, &event, sizeof event - 1) < 0 && errno == EINVAL);
    CHECK(read(fd, &event, 0) < 0 && errno == EINVAL);
    CHECK(write(fd, &event, sizeof event) < 0 && errno == EINVAL);
    CHECK(lseek(fd, 0, SEEK_SET) < 0 && errno == ESPIPE);
    close(fd);
}

static void on_alarm(int number)
{
    (void)number;
}

static void signals_interrupt(void)
{
    struct sigaction action = {.sa_handler = on_alarm};
    struct spanker_collect got;
    struct spanker_event event;
    int fd = open_card(0);
    NEED(fd >= 0);
    sigaction(SIGALRM, &action, NULL);
    alarm(1);
    IS(collect(fd, 30 * SECOND, NULL, 0, &got), -EINTR);
    alarm(1);
    CHECK(read(fd, &event, sizeof event) < 0 && errno == EINTR);
    alarm(0);
    signal(SIGALRM, SIG_DFL);
    close(fd);
}

/* --- several at once ---------------------------------------------------------------------------------- */

static void two_processes_share_a_card(void)
{
    pid_t child[4];
    for (int i = 0; i < 4; i++) {
        child[i] = fork();
        if (child[i] == 0) {
            struct work w;
            bool good = work_begin(&w, i % cards, 3, 2 * PAGE);
            for (int j = 0; good && j < 30; j++)
                good = work_once(&w, (uint8_t)(i * 50 + j));
            work_end(&w);
            _exit(good ? 0 : 1);
        }
    }
    for (int i = 0; i < 4; i++) {
        int status = -1;
        waitpid(child[i], &status, 0);
        CHECK(status == 0);
    }
}

#define COLLECTORS 4
#define COLLECTED 200
static struct work shared;
static atomic_int taken[COLLECTED + 1];

static void *collector(void *unused)
{
    (void)unused;
    struct spanker_collect got;
    long result;
    while ((result = collect(shared.fd, 2 * SECOND, NULL, 0, &got)) == 0)
        if (got.fence <= COLLECTED)
            atomic_fetch_add(&taken[got.fence], 1);
    return (void *)result;
}

static void each_completion_is_taken_once(void)
{
    pthread_t thread[COLLECTORS];
    void *result;
    NEED(work_begin(&shared, 0, 1, PAGE));
    for (int i = 0; i < COLLECTORS; i++)
        pthread_create(&thread[i], NULL, collector, NULL);
    for (int i = 0; i < COLLECTED; i++) {
        long submitted;
        while ((submitted = submit(shared.fd, shared.program.program_id, NULL, 0, NULL)) == -EBUSY)
            sleep_ms(1);
        IS(submitted, 0);
    }
    for (int i = 0; i < COLLECTORS; i++) {
        pthread_join(thread[i], &result);
        IS((long)result, -EAGAIN);
    }
    for (int i = 1; i <= COLLECTED; i++)
        CHECK(atomic_load(&taken[i]) == 1);
    work_end(&shared);
}

static atomic_int racing_fd, racing_stop;

static void *racer(void *unused)
{
    struct spanker_buffer_create buffer;
    struct spanker_collect got;
    struct spanker_info info;
    (void)unused;
    while (!atomic_load(&racing_stop)) {
        int fd = atomic_load(&racing_fd);
        info_of(fd, &info);
        if (buffer_create(fd, PAGE, SPANKER_BUFFER_DDR, &buffer) == 0) {
            void *memory = buffer_map(fd, &buffer);
            if (memory != MAP_FAILED) {
                *(volatile char *)memory = 1;
                munmap(memory, PAGE);
            }
            buffer_destroy(fd, buffer.handle);
        }
        collect(fd, MS, NULL, 0, &got);
        submit(fd, 1, NULL, 0, NULL);
        program_unload(fd, 1);
    }
    return NULL;
}

static void closing_while_others_call(void)
{
    struct spanker_info before, after;
    pthread_t thread[3];
    int watcher = open_card(0);
    NEED(watcher >= 0);
    IS(info_of(watcher, &before), 0);
    atomic_store(&racing_stop, 0);
    atomic_store(&racing_fd, -1);
    for (int i = 0; i < 3; i++)
        pthread_create(&thread[i], NULL, racer, NULL);
    for (int i = 0; i < 60; i++) {
        struct work w;
        /* The racers may already be at it, since numbers of files come again, and in the way. */
        struct spanker_buffer_create buffer;
        w = (struct work){.fd = open_card(0), .memory = MAP_FAILED};
        NEED(w.fd >= 0);
        for (int j = 0; j < 4; j++)
            buffer_create(w.fd, PAGE, SPANKER_BUFFER_DDR, &buffer);
        atomic_store(&racing_fd, w.fd);
        sleep_ms(i % 5);
        work_end(&w);
        if (i % 4)
            continue;
        atomic_store(&racing_fd, -1);
        sleep_ms(20);
        if (work_begin(&w, 0, 2, PAGE)) {
            atomic_store(&racing_fd, w.fd);
            submit(w.fd, w.program.program_id, NULL, 0, NULL);
        }
        work_end(&w);
    }
    atomic_store(&racing_stop, 1);
    for (int i = 0; i < 3; i++)
        pthread_join(thread[i], NULL);
    /* What the last steps used goes once they are done. */
    for (int i = 0; i < 500; i++) {
        IS(info_of(watcher, &after), 0);
        if (after.ddr_free == before.ddr_free)
            break;
        sleep_ms(10);
    }
    CHECK(after.ddr_free == before.ddr_free);
    close(watcher);
    CHECK(card_works(0));
}

/* --- reset ------------------------------------------------------------------------------------------- */

static void after_a_reset_files_are_stale(void)
{
    struct spanker_info before, after;
    struct spanker_collect got;
    struct spanker_event event;
    uint64_t room[64];
    struct work w;
    NEED(work_begin(&w, 0, 1, PAGE));
    w.memory[0] = 1;
    IS(info_of(w.fd, &before), 0);
    int bystander = open_card(0);
    IS(call(bystander, SPANKER_IOC_RESET, NULL), 0);
    for (size_t i = 0; i < CALLS; i++) {
        memset(room, 0, sizeof room);
        long result = call(w.fd, calls[i].request, room);
        if (result != -ESTALE)
            wrong(__LINE__, "%s: %ld", calls[i].name, result);
    }
    IS(call(w.fd, SPANKER_IOC_RESET, NULL), -ESTALE);
    IS(call(bystander, SPANKER_IOC_RESET, NULL), -ESTALE);
    IS(call(w.fd, SPANKER_IOC_PING, NULL), 0);
    IS(submit(w.fd, w.program.program_id, NULL, 0, NULL), -ESTALE);
    IS(collect(w.fd, -1, NULL, 0, &got), -ESTALE);
    CHECK(polled(w.fd, 0) == (POLLERR | POLLPRI));
    CHECK(read(w.fd, &event, sizeof event) == sizeof event);
    CHECK(event.kind == SPANKER_EVENT_RESET && event.detail == before.generation + 1 &&
          event.lost == 0);
    CHECK(read(w.fd, &event, sizeof event) < 0 && errno == ESTALE);
    CHECK(polled(w.fd, 0) == POLLERR);
    /* What is mapped stays mapped; nothing more is. */
    w.memory[0] = 5;
    CHECK(w.memory[0] == 5);
    CHECK(!maps(w.fd, w.into.mmap_offset, PAGE, MAP_SHARED));
    close(bystander);
    int fresh = open_card(0);
    IS(info_of(fresh, &after), 0);
    CHECK(after.generation == before.generation + 1 && after.epoch == 0);
    close(fresh);
    CHECK(card_works(0));
    work_end(&w);
    CHECK(card_works(0));
}

static void reset_answers_those_who_wait(void)
{
    struct spanker_collect got;
    struct work w;
    uint64_t fence;
    NEED(work_begin(&w, 0, 4000, 1 << 20));
    for (int i = 0; i < 3; i++)
        IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), 0);
    pid_t child = fork();
    if (child == 0) {
        int fd = open_card(0);
        sleep_ms(50);
        _exit(call(fd, SPANKER_IOC_RESET, NULL) ? 1 : 0);
    }
    long waited = wait_fence(w.fd, fence, 60 * SECOND);
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(status == 0);
    CHECK(waited == -ESTALE || waited == 0);
    /* All are there, in their order, and then no more. */
    for (uint64_t i = 1; i <= 3; i++) {
        IS(collect(w.fd, 0, NULL, 0, &got), 0);
        CHECK(got.fence == i && (got.error == -ENODEV || got.error == 0));
    }
    IS(collect(w.fd, 0, NULL, 0, &got), -ESTALE);
    work_end(&w);
    CHECK(card_works(0));
}

int main(int argc, char **argv)
{
    cards = argc > 1 ? atoi(argv[1]) : 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    TEST(control_answers_as_ever);
    TEST(card_answers_as_ever);
    TEST(info_says_what_the_card_is);
    TEST(bad_pointers_are_efault);
    TEST(read_only_memory_is_efault);
    TEST(failed_answers_leave_nothing);
    TEST(other_sizes_and_directions_are_enotty);
    TEST(flags_and_reserved_must_be_zero);
    TEST(wrong_handles_are_enoent);
    TEST(pointers_in_arguments_are_checked);
    TEST(telemetry_counts);
    TEST(links_lead_to_the_other_cards);
    TEST(an_image_is_taken);
    TEST(buffers_are_zero_at_first);
    TEST(memory_comes_back);
    TEST(a_full_card_is_enospc);
    TEST(host_memory_has_a_limit);
    TEST(mappings_stay_inside);
    TEST(mappings_show_the_same_memory);
    TEST(memory_lives_as_long_as_a_mapping);
    TEST(programs_are_checked);
    TEST(slots_come_back);
    TEST(a_card_without_memory_for_a_table_is_enomem);
    TEST(steps_bring_back_what_they_read);
    TEST(large_steps_work);
    TEST(bad_parameters_complete_with_einval);
    TEST(the_queue_has_an_end);
    TEST(a_queued_program_is_busy);
    TEST(slow_and_not_begun_are_told_apart);
    TEST(poll_tells_of_completions);
    TEST(nonblocking_files_never_wait);
    TEST(signals_interrupt);
    TEST(two_processes_share_a_card);
    TEST(each_completion_is_taken_once);
    TEST(closing_while_others_call);
    TEST(after_a_reset_files_are_stale);
    TEST(reset_answers_those_who_wait);
    return tests_end();
}
