// SPDX-License-Identifier: Apache-2.0
/*
 * Every allocation of every call fails once: the first, then the second, and so on until a call goes
 * through untouched.  Needs a kernel with CONFIG_FAILSLAB, CONFIG_FAIL_PAGE_ALLOC and
 * /proc/thread-self/fail-nth, and cards that nobody else uses.
 *
 * A call that fails so has to say ENOMEM, or to succeed by other means, and must leave nothing behind:
 * that is for kmemleak and the sums at the end.  Usage: failures CARDS
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "uapi/spanker_ioctl.h"

#define FAILURES_MAX 2000

static int fail_nth = -1;
static int failing; /* which allocation of the probe */
static int still_armed;
static int bad;

/* --- a program that does nothing, and a step of it (spk_card.h) ---------------------------------- */

static const uint32_t program[8] = { 0x474b5053, 1, 0, 1, 1, 16, 0, 0 };
static const uint32_t step[9] = { 0x504b5053, 1, 0, 0, 0, 0, 0, 0, 0 };

static char why[SPANKER_WHY_BYTES];
static char results[65536];
static uint8_t image[65536];

/* --- what the calls work on ------------------------------------------------------------------------ */

struct state {
    const char *path;
    int fd;
    uint32_t buffer;
    uint32_t program;
    int opened; /* by the call under test */
    void *mapped;
};

static int create(struct state *s, uint32_t kind, uint32_t *handle, uint64_t *offset)
{
    struct spanker_buffer_create c = { .bytes = 40000, .kind = kind };

    if (ioctl(s->fd, SPANKER_IOC_BUFFER_CREATE, &c))
        return -1;
    *handle = c.handle;
    *offset = c.mmap_offset;
    return 0;
}

static int destroy(struct state *s, uint32_t handle)
{
    struct spanker_buffer_destroy d = { .handle = handle };

    return ioctl(s->fd, SPANKER_IOC_BUFFER_DESTROY, &d);
}

static int load(struct state *s, uint32_t *id)
{
    struct spanker_program_load l = {
        .program = (uintptr_t)program,
        .program_bytes = sizeof(program),
        .handles = (uintptr_t)&s->buffer,
        .handle_count = 1,
        .why = (uintptr_t)why,
    };

    if (ioctl(s->fd, SPANKER_IOC_PROGRAM_LOAD, &l))
        return -1;
    *id = l.program_id;
    return 0;
}

static int unload(struct state *s, uint32_t id)
{
    struct spanker_program_unload u = { .program_id = id };

    return ioctl(s->fd, SPANKER_IOC_PROGRAM_UNLOAD, &u);
}

static int submit(struct state *s)
{
    struct spanker_read read = { .handle = s->buffer, .bytes = 32768 };
    struct spanker_submit u = {
        .program_id = s->program,
        .parameters = (uintptr_t)step,
        .parameters_bytes = sizeof(step),
        .read_count = 1,
        .reads = (uintptr_t)&read,
    };

    return ioctl(s->fd, SPANKER_IOC_SUBMIT, &u);
}

static int collect(struct state *s, int64_t timeout_ns)
{
    struct spanker_collect c = {
        .timeout_ns = timeout_ns,
        .results = (uintptr_t)results,
        .results_bytes = sizeof(results),
    };

    return ioctl(s->fd, SPANKER_IOC_COLLECT, &c) ? -1 : c.error;
}

/* --- the calls under test: `run` may meet a failure, `undo` follows one that succeeded -------------- */

static int run_open(struct state *s)
{
    s->opened = open(s->path, O_RDWR | O_CLOEXEC);
    return s->opened < 0 ? -1 : 0;
}

static void undo_open(struct state *s)
{
    close(s->opened);
}

static uint32_t made;
static uint64_t made_offset;

static int run_create_ddr(struct state *s)
{
    return create(s, SPANKER_BUFFER_DDR, &made, &made_offset);
}

static int run_create_host(struct state *s)
{
    return create(s, SPANKER_BUFFER_HOST, &made, &made_offset);
}

static void undo_create(struct state *s)
{
    if (destroy(s, made)) {
        perror("destroy");
        bad = 1;
    }
}

static int run_destroy(struct state *s)
{
    uint32_t handle;
    uint64_t offset;

    /* Also what is given back must not need memory: the buffer has to be gone in any case. */
    if (create(s, SPANKER_BUFFER_DDR, &handle, &offset))
        return -1;
    return destroy(s, handle);
}

static int run_map(struct state *s)
{
    if (create(s, SPANKER_BUFFER_DDR, &made, &made_offset))
        return -1;
    s->mapped = mmap(NULL, 40000, PROT_READ | PROT_WRITE, MAP_SHARED, s->fd, made_offset);
    if (s->mapped == MAP_FAILED) {
        int error = errno;

        destroy(s, made);
        errno = error;
        return -1;
    }
    return 0;
}

static void undo_map(struct state *s)
{
    munmap(s->mapped, 40000);
    undo_create(s);
}

static int run_load(struct state *s)
{
    return load(s, &made);
}

static void undo_load(struct state *s)
{
    if (unload(s, made)) {
        perror("unload");
        bad = 1;
    }
}

static int run_submit(struct state *s)
{
    return submit(s);
}

static void undo_submit(struct state *s)
{
    int error = collect(s, 10000000000ll);

    if (error) {
        printf("a step that was submitted ends with %d (%s)\n", error, strerror(errno));
        bad = 1;
    }
}

static int run_collect(struct state *s)
{
    if (submit(s))
        return -1;
    /* Of a collect that fails nothing is taken. */
    if (collect(s, 10000000000ll)) {
        int error = errno;

        while (collect(s, 1000000000) == 0)
            ;
        errno = error;
        return -1;
    }
    return 0;
}

static int run_image(struct state *s)
{
    struct spanker_image i = { .image = (uintptr_t)image, .image_bytes = sizeof(image) };

    if (ioctl(s->fd, SPANKER_IOC_IMAGE, &i))
        return errno == ENODEV ? 0 : -1;
    return 0;
}

static int run_ask(struct state *s)
{
    struct spanker_info info;
    struct spanker_telemetry telemetry;
    struct spanker_link link = { 0 };

    if (ioctl(s->fd, SPANKER_IOC_INFO, &info) ||
        ioctl(s->fd, SPANKER_IOC_TELEMETRY, &telemetry))
        return -1;
    return info.links ? ioctl(s->fd, SPANKER_IOC_LINK, &link) : 0;
}

static int run_reset(struct state *s)
{
    int fd = open(s->path, O_RDWR | O_CLOEXEC);
    int ret, error;

    if (fd < 0)
        return -1;
    ret = ioctl(fd, SPANKER_IOC_RESET);
    error = errno;
    close(fd);
    errno = error;
    return ret;
}

static void undo_nothing(struct state *s)
{
    (void)s;
}

static const struct test {
    const char *name;
    int (*run)(struct state *s);
    void (*undo)(struct state *s);
} tests[] = {
    { "open", run_open, undo_open },
    { "info, telemetry, link", run_ask, undo_nothing },
    { "buffer create, DDR", run_create_ddr, undo_create },
    { "buffer create, host", run_create_host, undo_create },
    { "buffer destroy", run_destroy, undo_nothing },
    { "mmap", run_map, undo_map },
    { "program load", run_load, undo_load },
    { "submit", run_submit, undo_submit },
    { "collect", run_collect, undo_nothing },
    { "image", run_image, undo_nothing },
    { "reset", run_reset, undo_nothing }, /* the last one: the file is stale then */
};

/* --- failing one by one ----------------------------------------------------------------------------- */

static void arm(int n)
{
    char text[16];
    int length = snprintf(text, sizeof(text), "%d", n);

    if (pwrite(fail_nth, text, length, 0) != length) {
        perror("/proc/thread-self/fail-nth");
        exit(1);
    }
}

/* Whether the failure is still to come. */
static int armed(void)
{
    char text[16] = "";

    if (pread(fail_nth, text, sizeof(text) - 1, 0) < 0) {
        perror("/proc/thread-self/fail-nth");
        exit(1);
    }
    return atoi(text) != 0;
}

static void all_fail(const struct test *test, struct state *s)
{
    int n, waiting, survived = 0;

    for (n = 1; n < FAILURES_MAX; n++) {
        int ret, error;

        arm(n);
        errno = 0;
        ret = test->run(s);
        error = errno;
        waiting = armed();
        arm(0);
        if (ret == 0) {
            test->undo(s);
            survived += !waiting;
        } else if (waiting || error != ENOMEM) {
            printf("%s: %s after failure %d%s\n", test->name, strerror(error), n,
                   waiting ? ", which had not come yet" : "");
            bad = 1;
        }
        if (waiting)
            break;
    }
    printf("%s: %d allocations, each failed once; %d did not matter\n", test->name, n - 1,
           survived);
    if (n == FAILURES_MAX) {
        printf("%s: there is no end to them\n", test->name);
        bad = 1;
    }
}

static uint64_t taken(const char *path)
{
    struct spanker_telemetry telemetry = { 0 };
    int fd = open(path, O_RDWR);

    if (fd < 0 || ioctl(fd, SPANKER_IOC_TELEMETRY, &telemetry)) {
        perror(path);
        bad = 1;
    }
    close(fd);
    return telemetry.ddr_used;
}

static void all_calls(const char *path)
{
    struct state s = { .path = path, .fd = open(path, O_RDWR) };
    uint64_t offset, before = taken(path);

    if (s.fd < 0 || create(&s, SPANKER_BUFFER_DDR, &s.buffer, &offset) || load(&s, &s.program)) {
        printf("%s: %s\n", path, strerror(errno));
        bad = 1;
        return;
    }
    for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++)
        all_fail(&tests[i], &s);
    close(s.fd);
    if (taken(path) != before) {
        printf("%s: %llu bytes of DDR are taken, before it were %llu\n", path,
               (unsigned long long)taken(path), (unsigned long long)before);
        bad = 1;
    }
}

/* --- the probe -------------------------------------------------------------------------------------- */

static int tell_driver(const char *verb, const char *address)
{
    char path[64];
    int fd, ret, error;

    snprintf(path, sizeof(path), "/sys/bus/pci/drivers/spanker/%s", verb);
    fd = open(path, O_WRONLY);
    if (fd < 0) {
        perror(path);
        exit(1);
    }
    /* The kernel probes within this very call. */
    arm(failing);
    ret = write(fd, address, strlen(address)) < 0 ? -1 : 0;
    error = errno;
    still_armed = armed();
    arm(0);
    close(fd);
    errno = error;
    return ret;
}

static void probe_fails(const char *address)
{
    int n, survived = 0;

    for (n = 1; n < FAILURES_MAX; n++) {
        failing = 0;
        if (tell_driver("unbind", address)) {
            perror("unbind");
            bad = 1;
            return;
        }
        failing = n;
        if (tell_driver("bind", address) == 0) {
            survived += !still_armed;
        } else {
            failing = 0;
            if (still_armed || tell_driver("bind", address)) {
                printf("probe: %s, failure %d\n", strerror(errno), n);
                bad = 1;
                return;
            }
            still_armed = 0;
        }
        if (still_armed)
            break;
    }
    printf("probe: %d allocations, each failed once; %d did not matter\n", n - 1, survived);
}

int main(int argc, char **argv)
{
    int cards = argc > 1 ? atoi(argv[1]) : 1;

    fail_nth = open("/proc/thread-self/fail-nth", O_RDWR);
    if (fail_nth < 0) {
        perror("/proc/thread-self/fail-nth");
        return 1;
    }
    /* Pages of their own before any call copies to or from them. */
    memset(why, 1, sizeof(why));
    memset(results, 1, sizeof(results));
    memset(image, 1, sizeof(image));
    if (argc > 2) {
        probe_fails(argv[2]);
        return bad;
    }
    for (int i = 0; i < cards; i++) {
        char path[32];

        snprintf(path, sizeof(path), "/dev/spanker%d", i);
        printf("%s\n", path);
        all_calls(path);
    }
    return bad;
}
