// SPDX-License-Identifier: Apache-2.0
/*
 * Cards that fail, hang, are slow or are taken out, and processes that die, while others work.
 *
 *   faults [CARDS [qemu]]    with CARDS cards there are (1); those that have faults are emulated ones
 *
 * Faults are planted through the module's debugfs.  A card is taken out through sysfs, as the bus
 * sees it when somebody pulls it.  With `qemu` errors of the bus happen, too: whoever reads the lines
 * "MONITOR ..." of the console is to give them to QEMU, in which the card spankerN is behind the root
 * port rpN.  The last test ends the first card for good.
 */
#include "common.h"

#include <sys/time.h>

static int cards = 1;

/* The directory in sysfs of the PCI device that /dev/spankerN is. */
static bool pci_of(int number, char *path, size_t room)
{
    char link[64], target[256];
    snprintf(link, sizeof link, "/sys/class/spanker/spanker%d/device", number);
    ssize_t got = readlink(link, target, sizeof target - 1);
    if (got < 0)
        return false;
    target[got] = 0;
    snprintf(path, room, "/sys/bus/pci/devices/%s", strrchr(target, '/') + 1);
    return true;
}

static bool take_out(int number)
{
    char path[300];
    if (!pci_of(number, path, sizeof path - 8))
        return false;
    strcat(path, "/remove");
    return put(path, "1") == 0;
}

static bool put_in(void)
{
    return put("/sys/bus/pci/rescan", "1") == 0;
}

static bool state_is(int number, const char *state)
{
    char text[32] = "";
    attribute(number, "state", text, sizeof text);
    return !strncmp(text, state, strlen(state));
}

static bool next_event(int fd, uint32_t kind, int timeout_ms, struct spanker_event *event)
{
    int64_t end = now_ns() + timeout_ms * MS;
    while (now_ns() < end) {
        struct pollfd p = {.fd = fd, .events = POLLPRI};
        poll(&p, 1, 20);
        if (p.revents & POLLPRI && read(fd, event, sizeof *event) == sizeof *event &&
            event->kind == kind)
            return true;
    }
    return false;
}

static void reset(int number)
{
    int fd = open_card(number);
    IS(call(fd, SPANKER_IOC_RESET, NULL), 0);
    close(fd);
}

/* Something that runs on the other cards all the while, and must not notice. */
static pid_t neighbour;

static void neighbour_begin(void)
{
    if (cards < 2)
        return;
    fflush(stdout);
    neighbour = fork();
    if (neighbour)
        return;
    struct work w;
    bool good = work_begin(&w, 1, 2, 2 * PAGE);
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigaction(SIGBUS, &action, NULL);
    sigset_t term;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, NULL);
    struct timespec none = {0, 0};
    for (uint8_t i = 0; good && sigtimedwait(&term, NULL, &none) < 0; i++)
        good = work_once(&w, i);
    work_end(&w);
    _exit(good ? 0 : 1);
}

static void neighbour_end(void)
{
    int status = 0;
    if (cards < 2)
        return;
    kill(neighbour, SIGTERM);
    waitpid(neighbour, &status, 0);
    CHECK(status == 0);
}

/* --- processes that die ---------------------------------------------------------------------------- */

static uint64_t free_of(int number)
{
    struct spanker_info info = {0};
    int fd = open_card(number);
    info_of(fd, &info);
    close(fd);
    return info.ddr_free;
}

static bool comes_back(int number, uint64_t free)
{
    for (int i = 0; i < 1000; i++) {
        if (free_of(number) == free)
            return true;
        sleep_ms(10);
    }
    return false;
}

static void killed_in_the_middle_of_work(void)
{
    uint64_t before = free_of(0);
    neighbour_begin();
    for (int i = 0; i < 8; i++) {
        int ready[2];
        char byte;
        NEED(pipe(ready) == 0);
        pid_t child = fork();
        if (child == 0) {
            struct work w;
            bool good = work_begin(&w, 0, 2000, 1 << 20);
            for (int j = 0; good && j < 8; j++)
                good = submit(w.fd, w.program.program_id, NULL, 0, NULL) == 0;
            if (write(ready[1], good ? "y" : "n", 1) != 1)
                _exit(1);
            struct spanker_collect got;
            for (;;)
                collect(w.fd, -1, NULL, 0, &got);
        }
        CHECK(read(ready[0], &byte, 1) == 1 && byte == 'y');
        sleep_ms(i * 3);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        close(ready[0]);
        close(ready[1]);
    }
    CHECK(comes_back(0, before));
    CHECK(card_works(0));
    neighbour_end();
}

static void killed_while_the_card_hangs(void)
{
    uint64_t before = free_of(0);
    pid_t child = fork();
    if (child == 0) {
        struct work w;
        struct spanker_collect got;
        if (work_begin(&w, 0, 1, PAGE) && plant(0, SAIL_FAULT_HANG, 0) == 0 &&
            submit(w.fd, w.program.program_id, NULL, 0, NULL) == 0)
            collect(w.fd, -1, NULL, 0, &got);
        _exit(1);
    }
    sleep_ms(300);
    int64_t begin = now_ns();
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    CHECK(now_ns() - begin < 2 * SECOND);
    reset(0);
    CHECK(comes_back(0, before));
    CHECK(card_works(0));
}

/* --- slow and hung ----------------------------------------------------------------------------------- */

/* Real work: thousands of copies, each of which is progress. */
static void slow_is_not_hung(void)
{
    struct spanker_collect got;
    struct work w;
    uint64_t fence;
    NEED(work_begin(&w, 0, 4000, 1 << 20));
    for (int i = 0; i < 4; i++)
        IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), 0);
    IS(wait_slow(w.fd, fence, 50 * MS), -ETIME);
    for (int i = 0; i < 4; i++) {
        IS(collect(w.fd, 120 * SECOND, NULL, 0, &got), 0);
        CHECK(got.error == 0 && got.busy_ns > 0);
    }
    work_end(&w);
}

static void late_completions_come(void)
{
    struct spanker_collect got;
    struct work w;
    uint64_t fence;
    NEED(work_begin(&w, 0, 1, PAGE));
    IS(plant(0, SAIL_FAULT_SLOW, 500000), 0);
    int64_t begin = now_ns();
    IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), 0);
    long result = wait_fence(w.fd, fence, 100 * MS);
    CHECK(result == -ETIME || result == -ETIMEDOUT);
    IS(collect(w.fd, 30 * SECOND, NULL, 0, &got), 0);
    CHECK(got.error == 0 && now_ns() - begin >= 500 * MS);
    IS(plant(0, SAIL_FAULT_NONE, 0), 0);
    CHECK(work_once(&w, 1));
    work_end(&w);
}

static void hung_is_told_and_reset(void)
{
    struct spanker_collect got;
    struct work w;
    uint64_t fence;
    neighbour_begin();
    NEED(work_begin(&w, 0, 1, PAGE));
    int other = open_card(0);
    IS(plant(0, SAIL_FAULT_HANG, 0), 0);
    for (int i = 0; i < 3; i++)
        IS(submit(w.fd, w.program.program_id, NULL, 0, &fence), 0);
    IS(wait_fence(w.fd, fence, 200 * MS), -ETIMEDOUT);
    IS(collect(w.fd, 100 * MS, NULL, 0, &got), -EAGAIN);
    struct spanker_abort abort = {.epoch = 5};
    IS(call(other, SPANKER_IOC_ABORT, &abort), -EBUSY);
    IS(call(other, SPANKER_IOC_RESET, NULL), 0);
    for (uint64_t i = 1; i <= 3; i++) {
        IS(collect(w.fd, 0, NULL, 0, &got), 0);
        CHECK(got.fence == i && got.error == -ENODEV);
    }
    IS(collect(w.fd, 0, NULL, 0, &got), -ESTALE);
    IS(wait_fence(w.fd, fence, 0), -ESTALE);
    close(other);
    work_end(&w);
    CHECK(card_works(0));
    neighbour_end();
}

static void on_alarm(int number)
{
    (void)number;
}

static void calls_that_need_a_hung_card_can_be_interrupted(void)
{
    struct sigaction action = {.sa_handler = on_alarm};
    struct spanker_buffer_create buffer;
    struct work w;
    NEED(work_begin(&w, 0, 1, PAGE));
    IS(plant(0, SAIL_FAULT_HANG, 0), 0);
    IS(submit(w.fd, w.program.program_id, NULL, 0, NULL), 0);
    sigaction(SIGALRM, &action, NULL);
    alarm(1);
    IS(buffer_create(w.fd, PAGE, SPANKER_BUFFER_DDR, &buffer), -EINTR);
    alarm(0);
    signal(SIGALRM, SIG_DFL);
    reset(0);
    work_end(&w);
    CHECK(card_works(0));
}

/* What the card was given stays with it, and so its file answers for it. */
static void images_that_were_given_up_count_until_they_end(void)
{
    enum { BYTES = 2 << 20 };
    struct sigaction action = {.sa_handler = on_alarm};
    /* Again and again: the first signal may come before the call waits. */
    struct itimerval often = {{0, 50000}, {0, 50000}}, never = {0};
    struct spanker_image image = {.image_bytes = BYTES};
    struct spanker_collect got;
    char text[16] = "";
    struct work w;
    NEED(get("/sys/module/spanker/parameters/queue_mib", text, sizeof text) > 0);
    NEED(work_begin(&w, 0, 1, PAGE));
    image.image = (uintptr_t)calloc(1, BYTES);
    IS(plant(0, SAIL_FAULT_HANG, 0), 0);
    IS(submit(w.fd, w.program.program_id, NULL, 0, NULL), 0);
    sigaction(SIGALRM, &action, NULL);
    int given_up = 0;
    long result;
    setitimer(ITIMER_REAL, &often, NULL);
    while ((result = call(w.fd, SPANKER_IOC_IMAGE, &image)) == -EINTR && given_up < 1000)
        given_up++;
    setitimer(ITIMER_REAL, &never, NULL);
    signal(SIGALRM, SIG_DFL);
    IS(result, -EBUSY);
    IS(given_up, (atoi(text) << 20) / BYTES);
    IS(plant(0, SAIL_FAULT_NONE, 0), 0);
    IS(collect(w.fd, 60 * SECOND, NULL, 0, &got), 0);
    CHECK(work_once(&w, 1));
    IS(call(w.fd, SPANKER_IOC_IMAGE, &image), 0);
    free((void *)(uintptr_t)image.image);
    work_end(&w);
}

static void an_abort_ends_what_is_queued(void)
{
    struct spanker_info info;
    struct spanker_collect got;
    struct work w;
    NEED(work_begin(&w, 0, 4000, 1 << 20));
    int other = open_card(0);
    IS(info_of(w.fd, &info), 0);
    struct spanker_abort abort = {.epoch = info.epoch};
    IS(call(w.fd, SPANKER_IOC_ABORT, &abort), -EINVAL);
    abort.epoch = info.epoch + 3;
    for (int i = 0; i < 20; i++)
        IS(submit(w.fd, w.program.program_id, NULL, 0, NULL), 0);
    IS(call(w.fd, SPANKER_IOC_ABORT, &abort), 0);
    int cancelled = 0;
    for (uint64_t i = 1; i <= 20; i++) {
        IS(collect(w.fd, 60 * SECOND, NULL, 0, &got), 0);
        CHECK(got.fence == i && (got.error == 0 || got.error == -ECANCELED));
        cancelled += got.error != 0;
    }
    CHECK(cancelled > 0);
    IS(info_of(w.fd, &info), 0);
    CHECK(info.epoch == abort.epoch);
    IS(call(w.fd, SPANKER_IOC_ABORT, &abort), -EINVAL);
    /* What comes after it works as ever. */
    struct spanker_read read = {.handle = w.into.handle, .bytes = PAGE};
    uint8_t results[PAGE];
    w.memory[1] = 77;
    IS(submit(w.fd, w.program.program_id, &read, 1, NULL), 0);
    IS(collect(w.fd, 60 * SECOND, results, sizeof results, &got), 0);
    CHECK(got.error == 0 && results[1] == 77);
    close(other);
    work_end(&w);
}

/* --- cards that fail ----------------------------------------------------------------------------------- */

static void check_failed(int fd, struct work *w)
{
    struct spanker_buffer_create buffer;
    struct spanker_collect got;
    struct spanker_info info;
    struct pollfd p = {.fd = w->fd, .events = 0};
    CHECK(state_is(0, "failed"));
    IS(info_of(fd, &info), 0);
    CHECK(info.flags & SPANKER_INFO_FAILED);
    IS(submit(w->fd, w->program.program_id, NULL, 0, NULL), -EIO);
    IS(buffer_create(fd, PAGE, SPANKER_BUFFER_DDR, &buffer), -EIO);
    CHECK(poll(&p, 1, 0) == 1 && p.revents & POLLERR);
    while (collect(w->fd, 0, NULL, 0, &got) == 0)
        CHECK(got.error == -EIO);
    IS(collect(w->fd, -1, NULL, 0, &got), -EIO);
}

static void an_uncorrected_error_fails_the_card(void)
{
    struct spanker_event event;
    struct spanker_telemetry telemetry;
    struct work w;
    neighbour_begin();
    NEED(work_begin(&w, 0, 1, PAGE));
    int watcher = open_card(0);
    IS(plant(0, SAIL_FAULT_CORRECTED, 3), 0);
    CHECK(next_event(watcher, SPANKER_EVENT_ECC, 3000, &event) && event.detail == 3 &&
          event.subject == 0 && event.time_ns > 0);
    CHECK(work_once(&w, 1));
    IS(call(watcher, SPANKER_IOC_TELEMETRY, &telemetry), 0);
    CHECK(telemetry.ecc_corrected == 3 && telemetry.ecc_uncorrected == 0);
    IS(plant(0, SAIL_FAULT_UNCORRECTED, 1), 0);
    CHECK(next_event(watcher, SPANKER_EVENT_FAILED, 3000, &event) &&
          event.detail == SAIL_FAILURE_ECC);
    check_failed(watcher, &w);
    IS(call(watcher, SPANKER_IOC_RESET, NULL), 0);
    CHECK(next_event(watcher, SPANKER_EVENT_RESET, 1000, &event));
    CHECK(state_is(0, "ready"));
    close(watcher);
    work_end(&w);
    CHECK(card_works(0));
    neighbour_end();
}

/* Makes `strike` happen to the first card at work: it fails, is reset, and works as before. */
static void check_strike(void (*strike)(void))
{
    struct spanker_event event;
    struct work w;
    neighbour_begin();
    NEED(work_begin(&w, 0, 1, PAGE));
    int watcher = open_card(0);
    IS(plant(0, SAIL_FAULT_HANG, 0), 0);
    for (int i = 0; i < 3; i++)
        IS(submit(w.fd, w.program.program_id, NULL, 0, NULL), 0);
    strike();
    CHECK(next_event(watcher, SPANKER_EVENT_FAILED, 10000, &event));
    check_failed(watcher, &w);
    /* Until the bus is done with the card it cannot be reset. */
    long result = -EIO;
    for (int i = 0; result == -EIO && i < 1000; i++) {
        result = call(watcher, SPANKER_IOC_RESET, NULL);
        if (result)
            sleep_ms(10);
    }
    IS(result, 0);
    CHECK(state_is(0, "ready"));
    close(watcher);
    work_end(&w);
    CHECK(card_works(0));
    neighbour_end();
}

static void reset_by_sysfs(void)
{
    char path[300];
    NEED(pci_of(0, path, sizeof path - 8));
    strcat(path, "/reset");
    IS(put(path, "1"), 0);
}

static void a_reset_of_the_function_fails_the_card(void)
{
    check_strike(reset_by_sysfs);
}

static void fatal_error(void)
{
    printf("\nMONITOR pcie_aer_inject_error rp0 DLP\n");
}

/* The link is reset, and with it the card behind it. */
static void a_fatal_error_of_the_bus_fails_the_card(void)
{
    check_strike(fatal_error);
}

static void nonfatal_error(void)
{
    printf("\nMONITOR pcie_aer_inject_error rp0 COMP_TIME\n");
}

static void an_error_of_the_bus_fails_the_card(void)
{
    check_strike(nonfatal_error);
}

static void a_wrong_completion_fails_the_card(void)
{
    struct spanker_event event;
    struct work w;
    NEED(work_begin(&w, 0, 1, PAGE));
    int watcher = open_card(0);
    IS(plant(0, SAIL_FAULT_COMPLETION, 0), 0);
    IS(submit(w.fd, w.program.program_id, NULL, 0, NULL), 0);
    CHECK(next_event(watcher, SPANKER_EVENT_FAILED, 3000, &event));
    check_failed(watcher, &w);
    IS(call(watcher, SPANKER_IOC_RESET, NULL), 0);
    close(watcher);
    work_end(&w);
    CHECK(card_works(0));
}

static void heat_is_told(void)
{
    struct spanker_event event;
    char text[32];
    int fd = open_card(0);
    NEED(fd >= 0);
    IS(plant(0, SAIL_FAULT_HOT, 97000), 0);
    CHECK(next_event(fd, SPANKER_EVENT_HOT, 3000, &event) && event.detail == 97000);
    CHECK(attribute(0, "temperature", text, sizeof text) > 0 && atoi(text) == 97000);
    close(fd);
    reset(0);
}

static void links_that_flap_are_told(void)
{
    struct spanker_event event;
    struct spanker_info info;
    int fd = open_card(0);
    NEED(fd >= 0);
    IS(info_of(fd, &info), 0);
    struct spanker_link link = {.state = SPANKER_LINK_DOWN};
    /* After a reset they train for a moment. */
    for (int tries = 0; tries < 300 && cards > 1 && link.state != SPANKER_LINK_UP; tries++) {
        for (uint32_t i = 0; i < info.links && link.state != SPANKER_LINK_UP; i++) {
            link = (struct spanker_link){.link = i};
            IS(call(fd, SPANKER_IOC_LINK, &link), 0);
        }
        if (link.state != SPANKER_LINK_UP)
            sleep_ms(10);
    }
    /* A card alone has none that is up. */
    CHECK(cards == 1 || link.state == SPANKER_LINK_UP);
    if (link.state == SPANKER_LINK_UP) {
        struct spanker_link_control control = {.link = link.link, .up = 0};
        IS(call(fd, SPANKER_IOC_LINK_CONTROL, &control), 0);
        CHECK(next_event(fd, SPANKER_EVENT_LINK, 3000, &event) && event.subject == link.link &&
              event.detail != SPANKER_LINK_UP);
        IS(call(fd, SPANKER_IOC_LINK, &link), 0);
        CHECK(link.state != SPANKER_LINK_UP);
        control.up = 1;
        IS(call(fd, SPANKER_IOC_LINK_CONTROL, &control), 0);
        bool up = false;
        while (!up && next_event(fd, SPANKER_EVENT_LINK, 3000, &event))
            up = event.subject == link.link && event.detail == SPANKER_LINK_UP;
        CHECK(up);
        /* 10 ms: whether the module sees it down is a matter of luck. */
        IS(plant(0, SAIL_FAULT_FLAP, link.link), 0);
        sleep_ms(20);
        for (int i = 0; i < 300; i++) {
            IS(call(fd, SPANKER_IOC_LINK, &link), 0);
            if (link.state == SPANKER_LINK_UP)
                break;
            sleep_ms(10);
        }
        CHECK(link.state == SPANKER_LINK_UP);
    }
    close(fd);
}

static void events_that_nobody_reads_are_counted(void)
{
    struct spanker_event event;
    int fd = open_flags(0, O_NONBLOCK);
    NEED(fd >= 0);
    for (int i = 0; i < 100; i++) {
        IS(plant(0, SAIL_FAULT_HOT, 50000 + i), 0);
        sleep_ms(5);
    }
    sleep_ms(200);
    unsigned lost = 0, got = 0;
    uint32_t last = 0;
    while (read(fd, &event, sizeof event) == sizeof event) {
        lost += event.lost;
        got++;
        CHECK(event.kind == SPANKER_EVENT_HOT && event.detail > last);
        last = event.detail;
    }
    CHECK(got > 0 && got <= 100 && lost + got <= 100 && last == 50099);
    if (lost)
        CHECK(got == 64);
    close(fd);
    reset(0);
}

/* --- cards that are taken out ------------------------------------------------------------------------- */

static struct work removed;
static atomic_int collector_answer;

static void *waiting_collector(void *unused)
{
    struct spanker_collect got;
    (void)unused;
    int errors = 0;
    long result;
    while ((result = collect(removed.fd, -1, NULL, 0, &got)) == 0)
        errors += got.error == -ENODEV;
    atomic_store(&collector_answer, errors);
    return (void *)result;
}

static void *waiting_reader(void *unused)
{
    struct spanker_event event = {0};
    (void)unused;
    while (read(removed.fd, &event, sizeof event) == sizeof event)
        ;
    return (void *)(long)-errno;
}

static void taken_out_while_in_use(void)
{
    static const unsigned long requests[] = {
        SPANKER_IOC_BUFFER_CREATE, SPANKER_IOC_BUFFER_DESTROY, SPANKER_IOC_PROGRAM_LOAD,
        SPANKER_IOC_PROGRAM_UNLOAD, SPANKER_IOC_SUBMIT, SPANKER_IOC_WAIT, SPANKER_IOC_ABORT,
        SPANKER_IOC_LINK, SPANKER_IOC_LINK_CONTROL, SPANKER_IOC_TELEMETRY, SPANKER_IOC_IMAGE,
        SPANKER_IOC_RESET};
    struct spanker_buffer_create host;
    struct spanker_collect got;
    struct spanker_info info;
    pthread_t collector, reader;
    uint64_t room[64];
    void *result;
    neighbour_begin();
    NEED(work_begin(&removed, 0, 1, 8 * PAGE));
    IS(buffer_create(removed.fd, 8 * PAGE, SPANKER_BUFFER_HOST, &host), 0);
    uint8_t *host_memory = buffer_map(removed.fd, &host);
    uint8_t *untouched = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, removed.fd,
                              (off_t)removed.into.mmap_offset);
    NEED(host_memory != MAP_FAILED && untouched != MAP_FAILED);
    host_memory[PAGE] = 1;
    CHECK(!is_gone(removed.memory) && !is_gone(host_memory + PAGE));
    IS(plant(0, SAIL_FAULT_HANG, 0), 0);
    for (int i = 0; i < 5; i++)
        IS(submit(removed.fd, removed.program.program_id, NULL, 0, NULL), 0);
    pthread_create(&collector, NULL, waiting_collector, NULL);
    pthread_create(&reader, NULL, waiting_reader, NULL);
    sleep_ms(100);

    CHECK(take_out(0));
    pthread_join(collector, &result);
    IS((long)result, -ESHUTDOWN);
    CHECK(atomic_load(&collector_answer) == 5);
    pthread_join(reader, &result);
    IS((long)result, -ENODEV);
    CHECK(is_gone(removed.memory) && is_gone(removed.memory + 7 * PAGE));
    CHECK(is_gone(host_memory) && is_gone(host_memory + PAGE) && is_gone(untouched));
    for (size_t i = 0; i < sizeof requests / sizeof requests[0]; i++) {
        memset(room, 0, sizeof room);
        long answer = call(removed.fd, requests[i], room);
        if (answer != -ENODEV)
            wrong(__LINE__, "request %#lx: %ld", requests[i], answer);
    }
    IS(collect(removed.fd, -1, NULL, 0, &got), -ESHUTDOWN);
    IS(call(removed.fd, SPANKER_IOC_PING, NULL), 0);
    IS(info_of(removed.fd, &info), 0);
    CHECK(info.flags & SPANKER_INFO_GONE);
    CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, removed.fd, (off_t)host.mmap_offset) ==
              MAP_FAILED && errno == ENODEV);
    struct pollfd p = {.fd = removed.fd, .events = 0};
    CHECK(poll(&p, 1, 0) == 1 && p.revents & POLLHUP);
    CHECK(access("/dev/spanker0", F_OK) != 0);

    /* It comes back under its number, whoever still has it open. */
    CHECK(put_in());
    int again = open_card_soon(0);
    CHECK(again >= 0);
    close(again);
    CHECK(card_works(0));
    IS(info_of(removed.fd, &info), 0);
    munmap(host_memory, 8 * PAGE);
    munmap(untouched, PAGE);
    work_end(&removed);
    CHECK(card_works(0));
    neighbour_end();
}

static atomic_int storm_stop;

static void *storm(void *unused)
{
    (void)unused;
    while (!atomic_load(&storm_stop)) {
        struct work w;
        struct spanker_collect got;
        if (work_begin(&w, 0, 20, PAGE)) {
            for (int i = 0; i < 5; i++)
                submit(w.fd, w.program.program_id, NULL, 0, NULL);
            while (collect(w.fd, 100 * MS, NULL, 0, &got) == 0)
                ;
        }
        if (w.fd < 0)
            sleep_ms(5);
        work_end(&w);
    }
    return NULL;
}

/* What the threads say while their card is gone is no news. */
static void taken_out_and_put_in_in_a_storm(void)
{
    pthread_t thread[3];
    uint64_t before = free_of(0);
    neighbour_begin();
    int out = dup(1), null = open("/dev/null", O_WRONLY);
    fflush(stdout);
    dup2(null, 1);
    atomic_store(&storm_stop, 0);
    for (int i = 0; i < 3; i++)
        pthread_create(&thread[i], NULL, storm, NULL);
    int failed = 0;
    for (int i = 0; i < 6; i++) {
        sleep_ms(60 + 23 * i);
        failed += !take_out(0);
        sleep_ms(10);
        failed += !put_in();
        int fd = open_card_soon(0);
        failed += fd < 0;
        close(fd);
    }
    atomic_store(&storm_stop, 1);
    for (int i = 0; i < 3; i++)
        pthread_join(thread[i], NULL);
    fflush(stdout);
    dup2(out, 1);
    close(out);
    close(null);
    CHECK(failed == 0);
    CHECK(comes_back(0, before));
    CHECK(card_works(0));
    neighbour_end();
}

static void the_module_stays_while_it_is_used(void)
{
    char text[64];
    int fd = open_card(0);
    NEED(fd >= 0);
    if (get("/sys/module/spanker/refcnt", text, sizeof text) > 0)
        CHECK(atoi(text) > 0);
    close(fd);
}

/* A card that does not answer any more, before the bus has noticed: the last test of this card. */
static void pulled_out_before_the_bus_knows(void)
{
    struct spanker_event event;
    struct spanker_collect got;
    struct work w;
    neighbour_begin();
    NEED(work_begin(&w, 0, 1, PAGE));
    int watcher = open_card(0);
    CHECK(!is_gone(w.memory));
    IS(plant(0, SAIL_FAULT_GONE, 0), 0);
    submit(w.fd, w.program.program_id, NULL, 0, NULL);
    CHECK(next_event(watcher, SPANKER_EVENT_GONE, 5000, &event));
    long result;
    while ((result = collect(w.fd, 0, NULL, 0, &got)) == 0)
        CHECK(got.error == -ENODEV);
    IS(result, -ESHUTDOWN);
    CHECK(is_gone(w.memory));
    CHECK(take_out(0));
    close(watcher);
    work_end(&w);
    neighbour_end();
    if (cards > 1)
        CHECK(card_works(1));
}

int main(int argc, char **argv)
{
    cards = argc > 1 ? atoi(argv[1]) : 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    TEST(killed_in_the_middle_of_work);
    TEST(killed_while_the_card_hangs);
    TEST(slow_is_not_hung);
    TEST(late_completions_come);
    TEST(hung_is_told_and_reset);
    TEST(calls_that_need_a_hung_card_can_be_interrupted);
    TEST(images_that_were_given_up_count_until_they_end);
    TEST(an_abort_ends_what_is_queued);
    TEST(an_uncorrected_error_fails_the_card);
    TEST(a_wrong_completion_fails_the_card);
    TEST(a_reset_of_the_function_fails_the_card);
    if (argc > 2 && !strcmp(argv[2], "qemu")) {
        TEST(a_fatal_error_of_the_bus_fails_the_card);
        TEST(an_error_of_the_bus_fails_the_card);
    }
    TEST(heat_is_told);
    TEST(links_that_flap_are_told);
    TEST(events_that_nobody_reads_are_counted);
    TEST(the_module_stays_while_it_is_used);
    TEST(taken_out_while_in_use);
    TEST(taken_out_and_put_in_in_a_storm);
    TEST(pulled_out_before_the_bus_knows);
    return tests_end();
}
