/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the test programs share: cards, calls, programs that a card can run, and lines that say how
 * each test went.  They run as root on a machine with the module loaded and its cards idle.
 */
#ifndef COMMON_H
#define COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "spanker_card.h"
#include "uapi/spanker_ioctl.h"

#define PAGE 4096u
#define MS 1000000ll
#define SECOND 1000000000ll

_Static_assert(sizeof(struct spanker_version) == 8, "version");
_Static_assert(sizeof(struct spanker_info) == 152, "info");
_Static_assert(sizeof(struct spanker_buffer_create) == 40, "buffer_create");
_Static_assert(sizeof(struct spanker_buffer_destroy) == 8, "buffer_destroy");
_Static_assert(sizeof(struct spanker_program_load) == 48, "program_load");
_Static_assert(sizeof(struct spanker_program_unload) == 8, "program_unload");
_Static_assert(sizeof(struct spanker_read) == 24, "read");
_Static_assert(sizeof(struct spanker_submit) == 40, "submit");
_Static_assert(sizeof(struct spanker_collect) == 56, "collect");
_Static_assert(sizeof(struct spanker_wait) == 24, "wait");
_Static_assert(sizeof(struct spanker_abort) == 8, "abort");
_Static_assert(sizeof(struct spanker_link) == 40, "link");
_Static_assert(sizeof(struct spanker_link_control) == 8, "link_control");
_Static_assert(sizeof(struct spanker_telemetry) == 104, "telemetry");
_Static_assert(sizeof(struct spanker_image) == 24, "image");
_Static_assert(sizeof(struct spanker_event) == 24, "event");

/* --- tests ------------------------------------------------------------------------------------- */

static const char *test_name;
static int test_wrong, tests_failed, tests_run;

__attribute__((format(printf, 2, 3))) static inline void wrong(int line, const char *format, ...)
{
    va_list arguments;
    printf("  line %d: ", line);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
    test_wrong++;
}

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition))                                                                          \
            wrong(__LINE__, "not so: %s", #condition);                                             \
    } while (0)

/* What a call answers: 0 or more, or the errno below 0. */
#define IS(call, expected)                                                                         \
    do {                                                                                           \
        long is_got = (call), is_expected = (expected);                                            \
        if (is_got != is_expected)                                                                 \
            wrong(__LINE__, "%s is %ld (%s), expected %ld (%s)", #call, is_got,                    \
                  is_got < 0 ? strerror((int)-is_got) : "", is_expected,                           \
                  is_expected < 0 ? strerror((int)-is_expected) : "");                             \
    } while (0)

/* What everything after it needs. */
#define NEED(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            wrong(__LINE__, "needed: %s (errno %d, %s)", #condition, errno, strerror(errno));      \
            return;                                                                                \
        }                                                                                          \
    } while (0)

static inline int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * SECOND + t.tv_nsec;
}

static inline void sleep_ms(int ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000l};
    nanosleep(&t, NULL);
}

static inline void run_test(const char *name, void (*test)(void))
{
    int64_t begin = now_ns();
    test_name = name;
    test_wrong = 0;
    test();
    tests_run++;
    tests_failed += test_wrong != 0;
    printf("%-7s%s (%lld ms)\n", test_wrong ? "FAILED" : "ok", name,
           (long long)((now_ns() - begin) / MS));
    fflush(stdout);
}

#define TEST(name) run_test(#name, name)

static inline int tests_end(void)
{
    if (tests_failed)
        printf("RESULT failed %d\n", tests_failed);
    else
        printf("RESULT ok\n");
    return tests_failed != 0;
}

/* --- cards ------------------------------------------------------------------------------------- */

static inline int open_flags(int number, int flags)
{
    char path[32];
    snprintf(path, sizeof path, "/dev/spanker%d", number);
    return open(path, O_RDWR | O_CLOEXEC | flags);
}

static inline int open_card(int number)
{
    return open_flags(number, 0);
}

/* After removal and rescan it takes a moment until the device is there. */
static inline int open_card_soon(int number)
{
    int fd = -1;
    for (int i = 0; fd < 0 && i < 500; i++) {
        fd = open_card(number);
        if (fd < 0)
            sleep_ms(10);
    }
    return fd;
}

static inline long call(int fd, unsigned long request, void *argument)
{
    long result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

/* Into a file of sysfs or debugfs; 0 or -errno. */
static inline long put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    long result = write(fd, text, strlen(text)) < 0 ? -errno : 0;
    close(fd);
    return result;
}

static inline long get(const char *path, char *text, size_t room)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t got = read(fd, text, room - 1);
    long result = got < 0 ? -errno : got;
    text[got < 0 ? 0 : got] = 0;
    close(fd);
    return result;
}

static inline long attribute(int number, const char *name, char *text, size_t room)
{
    char path[96];
    snprintf(path, sizeof path, "/sys/class/spanker/spanker%d/%s", number, name);
    return get(path, text, room);
}

static inline long plant(int number, enum sail_fault fault, unsigned argument)
{
    char path[96], text[32];
    snprintf(path, sizeof path, "/sys/kernel/debug/spanker/spanker%d/fault", number);
    snprintf(text, sizeof text, "%u %u", (unsigned)fault, argument);
    return put(path, text);
}

/* --- calls -------------------------------------------------------------------------------------- */

static inline long buffer_create(int fd, uint64_t bytes, uint32_t kind,
                                 struct spanker_buffer_create *out)
{
    *out = (struct spanker_buffer_create){.bytes = bytes, .kind = kind};
    return call(fd, SPANKER_IOC_BUFFER_CREATE, out);
}

static inline long buffer_destroy(int fd, uint32_t handle)
{
    struct spanker_buffer_destroy destroy = {.handle = handle};
    return call(fd, SPANKER_IOC_BUFFER_DESTROY, &destroy);
}

static inline void *buffer_map(int fd, const struct spanker_buffer_create *buffer)
{
    return mmap(NULL, buffer->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                (off_t)buffer->mmap_offset);
}

static inline long collect(int fd, int64_t timeout_ns, void *results, uint64_t room,
                           struct spanker_collect *out)
{
    *out = (struct spanker_collect){
        .timeout_ns = timeout_ns, .results = (uintptr_t)results, .results_bytes = room};
    return call(fd, SPANKER_IOC_COLLECT, out);
}

static inline long wait_fence(int fd, uint64_t fence, int64_t timeout_ns)
{
    struct spanker_wait wait = {.fence = fence, .timeout_ns = timeout_ns};
    return call(fd, SPANKER_IOC_WAIT, &wait);
}

/* Of a card that is slow: a machine that is emulated may stand still, and the card with it, for as
 * long as a timeout takes. */
static inline long wait_slow(int fd, uint64_t fence, int64_t timeout_ns)
{
    long result = -ETIMEDOUT;
    for (int i = 0; i < 20 && result == -ETIMEDOUT; i++)
        result = wait_fence(fd, fence, timeout_ns);
    return result;
}

static inline long info_of(int fd, struct spanker_info *info)
{
    return call(fd, SPANKER_IOC_INFO, info);
}

/* --- programs: the layout is that of spk_card.h ---------------------------------------------------- */

#define OP_COPY 19
#define FORMAT_F32 0
#define COMMANDS_MAX 4096

struct program_header {
    uint32_t magic, version, commands, tokens_max, outputs_max, positions_max, reserved[2];
};

struct program_command {
    uint16_t op, format;
    uint32_t flags;
    struct {
        uint32_t buffer, stride;
        uint64_t offset;
    } ref[4];
    uint32_t arg[14];
};
_Static_assert(sizeof(struct program_command) == 128, "a command");

struct program {
    struct program_header header;
    struct program_command commands[COMMANDS_MAX];
};

static inline size_t program_bytes(const struct program *p)
{
    return sizeof p->header + p->header.commands * sizeof p->commands[0];
}

/* `commands` times: buffer 1 becomes what buffer 0 is, `bytes` of it. */
static inline struct program *copies(uint32_t commands, uint32_t bytes)
{
    struct program *p = calloc(1, sizeof *p);
    p->header = (struct program_header){
        .magic = 0x474b5053, .version = 1, .commands = commands, .tokens_max = 1,
        .positions_max = 16};
    for (uint32_t i = 0; i < commands; i++) {
        p->commands[i].op = OP_COPY;
        p->commands[i].format = FORMAT_F32;
        p->commands[i].ref[0].buffer = 0;
        p->commands[i].ref[3].buffer = 1;
        p->commands[i].arg[0] = bytes / 4;
    }
    return p;
}

struct step {
    uint32_t magic, version, tokens, outputs, sequences, pages, reserved[2];
    uint32_t words[1];
};

/* A step of no tokens. */
static const struct step no_tokens = {.magic = 0x504b5053, .version = 1};

static inline long program_load(int fd, const void *program, size_t bytes, const uint32_t *handles,
                                uint32_t count, struct spanker_program_load *out, char *why)
{
    *out = (struct spanker_program_load){.program = (uintptr_t)program,
                                         .program_bytes = bytes,
                                         .handles = (uintptr_t)handles,
                                         .handle_count = count,
                                         .why = (uintptr_t)why};
    return call(fd, SPANKER_IOC_PROGRAM_LOAD, out);
}

static inline long program_unload(int fd, uint32_t id)
{
    struct spanker_program_unload unload = {.program_id = id};
    return call(fd, SPANKER_IOC_PROGRAM_UNLOAD, &unload);
}

static inline long submit(int fd, uint32_t program, const struct spanker_read *reads,
                          uint32_t count, uint64_t *fence)
{
    struct spanker_submit submit = {.program_id = program,
                                    .parameters = (uintptr_t)&no_tokens,
                                    .parameters_bytes = sizeof no_tokens,
                                    .reads = (uintptr_t)reads,
                                    .read_count = count};
    long result = call(fd, SPANKER_IOC_SUBMIT, &submit);
    if (fence)
        *fence = submit.fence;
    return result;
}

/* A file with two buffers and a program that copies the first to the second. */
struct work {
    int fd;
    uint32_t bytes;
    struct spanker_buffer_create from, into;
    struct spanker_program_load program;
    uint8_t *memory; /* of `from` */
};

static inline bool work_begin(struct work *w, int number, uint32_t commands, uint32_t bytes)
{
    char why[SPANKER_WHY_BYTES] = "";
    *w = (struct work){.fd = open_card(number), .bytes = bytes, .memory = MAP_FAILED};
    if (w->fd < 0 || buffer_create(w->fd, bytes, SPANKER_BUFFER_DDR, &w->from) ||
        buffer_create(w->fd, bytes, SPANKER_BUFFER_DDR, &w->into))
        return false;
    struct program *p = copies(commands, bytes);
    uint32_t handles[2] = {w->from.handle, w->into.handle};
    long result = program_load(w->fd, p, program_bytes(p), handles, 2, &w->program, why);
    free(p);
    if (result) {
        printf("  the program: %s: %s\n", strerror((int)-result), why);
        errno = (int)-result;
        return false;
    }
    w->memory = buffer_map(w->fd, &w->from);
    return w->memory != MAP_FAILED;
}

static inline void work_end(struct work *w)
{
    if (w->memory != MAP_FAILED)
        munmap(w->memory, w->bytes);
    if (w->fd >= 0)
        close(w->fd);
}

/* One step, whose result must be what was put in. */
static inline bool work_once(struct work *w, uint8_t seed)
{
    struct spanker_read read = {.handle = w->into.handle, .offset = 0, .bytes = w->bytes};
    struct spanker_collect got;
    uint8_t *results = malloc(w->bytes);
    bool good;
    for (uint32_t i = 0; i < w->bytes; i++)
        w->memory[i] = (uint8_t)(i * 7 + seed);
    good = submit(w->fd, w->program.program_id, &read, 1, NULL) == 0 &&
           collect(w->fd, 60 * SECOND, results, w->bytes, &got) == 0 && got.error == 0 &&
           got.results_bytes == w->bytes && !memcmp(results, w->memory, w->bytes);
    free(results);
    return good;
}

/* Whether a card does what it should, all over. */
static inline bool card_works(int number)
{
    struct work w;
    bool good = work_begin(&w, number, 2, 3 * PAGE) && work_once(&w, 1) && work_once(&w, 2);
    work_end(&w);
    return good;
}

/* --- memory that ends -------------------------------------------------------------------------- */

/* The last `bytes` of a page that nothing follows. */
static inline void *at_the_end(size_t bytes)
{
    uint8_t *pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(pages + PAGE, PAGE);
    return pages + PAGE - bytes;
}

static sigjmp_buf bus_jump;

static inline void on_bus_error(int number)
{
    (void)number;
    siglongjmp(bus_jump, 1);
}

/* Whether touching this byte ends in SIGBUS. */
static inline bool is_gone(volatile uint8_t *byte)
{
    struct sigaction action = {.sa_handler = on_bus_error}, before;
    bool gone = true;
    sigaction(SIGBUS, &action, &before);
    if (!sigsetjmp(bus_jump, 1)) {
        (void)*byte;
        gone = false;
    }
    sigaction(SIGBUS, &before, NULL);
    return gone;
}

#endif
