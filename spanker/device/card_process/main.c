/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A card that is a process of its own: on RISC-V the firmware of a card.
 *
 * Its host has started it with one socket for requests and one for completions
 * (docs/api/card-protocol.md), and gives it the files of its links over the first; nothing else is
 * opened.  One worker steps the card; this thread answers the host and passes completions on.  The
 * card ends with its host, whatever becomes of it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "answer.h"
#include "spk_kernels.h"
#if defined(__riscv)
#include "xpop_trap.h"
#endif

#define DDR_BYTES_MAX ((uint64_t)1 << 40)

struct process {
    int control, events; /* sockets */
    int isa;
    struct served own;
    uint8_t *body; /* room for SPK_WIRE_REQUEST_MAX bytes */
    struct reply reply;
    /* The completion that is being sent, and how far. */
    bool sending;
    struct completion_frame frame;
    struct spk_completion completion;
    uint64_t sent;
};

__attribute__((format(printf, 1, 2))) static bool complain(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("card: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return false;
}

/* --- input and output ---------------------------------------------------------------------- */

/* As recv; of the files that come with these bytes the last one is kept, in the place of `*file`. */
static ssize_t receive_some(int fd, void *to, size_t nbytes, int *file)
{
    union {
        struct cmsghdr first;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {.iov_base = to, .iov_len = nbytes};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};
    ssize_t n = recvmsg(fd, &message, 0);
    for (struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&message) : NULL; c;
         c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        for (size_t at = CMSG_LEN(0); at + sizeof *file <= c->cmsg_len; at += sizeof *file) {
            if (*file >= 0)
                close(*file);
            memcpy(file, (const char *)c + at, sizeof *file);
        }
    }
    return n;
}

/* False at the end of the stream, which `ends` says is no error where it is between two frames. */
static bool receive(int fd, void *to, size_t nbytes, bool *ends, int *file)
{
    uint8_t *at = to;
    while (nbytes) {
        ssize_t n = receive_some(fd, at, nbytes, file);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            *ends = n == 0 && at == to;
            return false;
        }
        at += n;
        nbytes -= (size_t)n;
    }
    return true;
}

static bool send_all(int fd, const void *from, size_t nbytes)
{
    const uint8_t *at = from;
    while (nbytes) {
        ssize_t n = send(fd, at, nbytes, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return false;
        at += n;
        nbytes -= (size_t)n;
    }
    return true;
}

/* Sends what the host's end takes without waiting; false when it is gone. */
static bool send_completion(struct process *p)
{
    uint64_t total = sizeof p->frame + p->completion.result_bytes;
    while (p->sent < total) {
        uint64_t done = p->sent < sizeof p->frame ? 0 : p->sent - sizeof p->frame;
        const uint8_t *at = p->completion.result + done;
        uint64_t nbytes = p->completion.result_bytes - done;
        if (p->sent < sizeof p->frame) {
            at = (const uint8_t *)&p->frame + p->sent;
            nbytes = sizeof p->frame - p->sent;
        }
        ssize_t n = send(p->events, at, nbytes, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN || complain("the host takes no completions any more");
        p->sent += (uint64_t)n;
    }
    p->sending = false;
    return true;
}

static bool pass_completions(struct process *p)
{
    do {
        if (!p->sending) {
            if (!spk_card_completion(p->own.card, &p->completion))
                return true;
            p->frame = tell(&p->completion);
            p->sent = 0;
            p->sending = true;
        }
        if (!send_completion(p))
            return false;
    } while (!p->sending);
    return true;
}

/* One request and its reply; false when the host is gone, or what it says makes no sense. */
static bool serve(struct process *p, bool *ends, int *file)
{
    struct spk_wire_header h;
    if (!receive(p->control, &h, sizeof h, ends, file))
        return *ends || complain("the host is gone");
    if (!header_is_good(&h, SPK_WIRE_REQUEST_MAX))
        return complain("no frame: magic %08x, kind %u, %u bytes", h.magic, h.kind, h.nbytes);
    bool cut;
    if (!receive(p->control, p->body, h.nbytes, &cut, file))
        return complain("the host is gone in the middle of a request");
    answer(&p->own, &h, p->body, *file, &p->reply);
    /* A step that is no longer queued by this reply is told of before it, as far as the host's end
     * takes that without waiting. */
    if (!pass_completions(p))
        return false;
    return send_all(p->control, p->reply.bytes, p->reply.nbytes) || complain("the host is gone");
}

static bool run(struct process *p)
{
    for (;;) {
        struct pollfd fds[] = {
            {.fd = p->control, .events = POLLIN},
            {.fd = p->sending ? -1 : spk_card_fd(p->own.card), .events = POLLIN},
            {.fd = p->sending ? p->events : -1, .events = POLLOUT},
        };
        if (poll(fds, 3, -1) < 0) {
            if (errno == EINTR)
                continue;
            return complain("poll: %s", strerror(errno));
        }
        if ((fds[1].revents || fds[2].revents) && !pass_completions(p))
            return false;
        bool ends = false;
        int file = -1;
        bool good = !fds[0].revents || serve(p, &ends, &file);
        if (file >= 0)
            close(file);
        if (!good || ends)
            return good;
    }
}

/* --- options --------------------------------------------------------------------------------- */

static bool number(const char *text, uint64_t low, uint64_t high, const char *what, uint64_t *out)
{
    char *end;
    errno = 0;
    *out = strtoull(text, &end, 10);
    if (errno || end == text || *end || text[0] == '-' || *out < low || *out > high)
        return complain("%s takes %llu to %llu, got %s", what, (unsigned long long)low,
                        (unsigned long long)high, text);
    return true;
}

/* By its name, or without one the last that this machine runs: what it only runs by trapping, which is
 * slow, must be asked for. */
static const struct spk_kernels *kernels_of(const char *name)
{
#if defined(__riscv)
    if (name && strcmp(name, "xpop") == 0 && spk_xpop_install_trap() == 0)
        spk_xpop_found();
#endif
    const struct spk_kernels *found = NULL;
    for (int isa = 0; isa < SPK_ISA_COUNT; isa++) {
        const struct spk_kernels *kernels = spk_kernels_get(isa);
        if (kernels && (!name || strcmp(kernels->name, name) == 0))
            found = kernels;
    }
    return found;
}

static const struct option known[] = {
    {"control", required_argument, NULL, 'c'}, {"events", required_argument, NULL, 'e'},
    {"serial", required_argument, NULL, 's'},  {"ddr", required_argument, NULL, 'm'},
    {"isa", required_argument, NULL, 'i'},     {NULL, 0, NULL, 0},
};

static bool prepare(struct process *p, int argc, char **argv)
{
    const char *isa = NULL;
    uint64_t value = 0, control = UINT64_MAX, events = UINT64_MAX;
    bool good = true;
    for (int c; good && (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (c) {
        case 'c':
            good = number(optarg, 0, 1 << 20, "--control", &control);
            break;
        case 'e':
            good = number(optarg, 0, 1 << 20, "--events", &events);
            break;
        case 's':
            good = number(optarg, 0, UINT64_MAX, "--serial", &p->own.serial);
            break;
        case 'm':
            good = number(optarg, SPK_DDR_ALIGN, DDR_BYTES_MAX, "--ddr", &value);
            p->own.ddr_bytes = value / SPK_DDR_ALIGN * SPK_DDR_ALIGN;
            break;
        case 'i':
            isa = optarg;
            break;
        default:
            good = false;
        }
    }
    if (!good)
        return false;
    if (optind != argc || control == UINT64_MAX || events == UINT64_MAX || !p->own.ddr_bytes)
        return complain("--control, --events and --ddr are needed, and nothing but options taken");
    p->control = (int)control;
    p->events = (int)events;
    const struct spk_kernels *kernels = kernels_of(isa);
    if (!kernels)
        return complain("this card has no kernels for %s", isa);
    p->own.isa = kernels->name;
    int status = SPK_OK;
    p->own.card = spk_card_create(p->own.ddr_bytes, kernels->isa, &status);
    if (!p->own.card)
        return complain("no card of %llu bytes: status %d", (unsigned long long)p->own.ddr_bytes,
                        status);
    p->own.pool = spk_pool_create(&p->own.card, 1, 1, &status);
    p->body = malloc(SPK_WIRE_REQUEST_MAX);
    return (p->own.pool && p->body) || complain("no worker: status %d", status);
}

static void end(struct process *p)
{
    spk_pool_destroy(p->own.pool);
    spk_card_destroy(p->own.card);
    free(p->body);
    free(p);
}

int main(int argc, char **argv)
{
    struct rlimit no_core = {0, 0};
    /* Also where it is stopped, or stuck. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || setrlimit(RLIMIT_CORE, &no_core) != 0)
        return !complain("cannot be set up: %s", strerror(errno));
    struct process *p = calloc(1, sizeof *p);
    if (!p)
        return !complain("no memory");
    bool good = prepare(p, argc, argv) && run(p);
    end(p);
    return good ? 0 : 1;
}
