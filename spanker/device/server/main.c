/* SPDX-License-Identifier: Apache-2.0 */
/*
 * spanker-card-server: emulated cards behind vfio-user sockets, for QEMU's vfio-user-pci.
 *
 * One process has all cards, since they are linked to each other; each has a thread for its socket,
 * and as many workers as there are cores step them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "session.h"
#include "spk_kernels.h"

#define DDR_BYTES ((uint64_t)512 << 20)
#define DDR_BYTES_MIN ((uint64_t)1 << 20)
#define DDR_BYTES_MAX ((uint64_t)1 << 38)
#define SERIAL_FIRST ((uint64_t)0x7ea00001)
/* Of both rings of all links together, and of one. */
#define RINGS_BYTES ((uint64_t)64 << 20)
#define RING_BYTES_MAX ((uint64_t)2 << 20)
#define RING_BYTES_MIN ((uint64_t)132 << 10)

static const char *const isa_names[SPK_ISA_COUNT] = {
    [SPK_ISA_SCALAR] = "scalar",
    [SPK_ISA_AVX2] = "avx2",
    [SPK_ISA_AVX512VNNI] = "avx512vnni",
    [SPK_ISA_NEON] = "neon",
    [SPK_ISA_RVV] = "rvv",
    [SPK_ISA_XPOP] = "xpop",
};

struct options {
    const char *directory;
    uint32_t cards;
    uint64_t ddr_bytes, serial;
    int isa;
    bool faults;
};

struct card {
    struct session session;
    struct sockaddr_un address;
    bool bound;
    pthread_t thread;
    bool started;
};

struct server {
    struct options options;
    struct card cards[SAIL_LINKS_MAX];
    struct spk_pool *pool;
    int stop_fd;
};

__attribute__((format(printf, 1, 2))) static bool complain(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("spanker-card-server: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return false;
}

/* --- options --------------------------------------------------------------------------------- */

static const char usage[] =
    "usage: spanker-card-server --dir DIR --cards N [--ddr BYTES] [--isa NAME] [--serial FIRST]\n"
    "                           [--faults]\n"
    "\n"
    "N emulated cards, linked to each other, at vfio-user sockets DIR/card0.sock and so on.\n"
    "\n"
    "  --ddr BYTES     memory of a card, a power of two (536870912)\n"
    "  --isa NAME      scalar, avx2, avx512vnni, neon or rvv (the best that this machine has)\n"
    "  --serial FIRST  serial number of the first card; the others count up (0x7ea00001)\n"
    "  --faults        with the registers that make a card fail\n";

static bool parse_number(const char *text, uint64_t low, uint64_t high, const char *what,
                         uint64_t *out)
{
    char *end;
    errno = 0;
    *out = strtoull(text, &end, 0);
    if (errno || end == text || *end || text[0] == '-' || *out < low || *out > high)
        return complain("%s takes %llu to %llu, got %s", what, (unsigned long long)low,
                        (unsigned long long)high, text);
    return true;
}

static bool parse_isa(const char *name, int *out)
{
    for (int i = 0; i < SPK_ISA_COUNT; i++) {
        if (strcmp(name, isa_names[i]) == 0) {
            *out = i;
            return spk_kernels_get(i) || complain("this machine cannot run %s", name);
        }
    }
    return complain("there is no instruction set %s", name);
}

static int best_isa(void)
{
    int best = SPK_ISA_SCALAR;
    for (int i = 0; i < SPK_ISA_COUNT; i++)
        if (spk_kernels_get(i))
            best = i;
    return best;
}

static bool parse_options(int argc, char **argv, struct options *o)
{
    static const struct option known[] = {
        {"dir", required_argument, NULL, 'd'},    {"cards", required_argument, NULL, 'n'},
        {"ddr", required_argument, NULL, 'm'},    {"isa", required_argument, NULL, 'i'},
        {"serial", required_argument, NULL, 's'}, {"faults", no_argument, NULL, 'f'},
        {"help", no_argument, NULL, 'h'},         {NULL, 0, NULL, 0},
    };
    uint64_t cards = 0;
    bool good = true;
    *o = (struct options){.ddr_bytes = DDR_BYTES, .serial = SERIAL_FIRST, .isa = best_isa()};
    for (int c; good && (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (c) {
        case 'd':
            o->directory = optarg;
            break;
        case 'n':
            good = parse_number(optarg, 1, SAIL_LINKS_MAX, "--cards", &cards);
            break;
        case 'm':
            good = parse_number(optarg, DDR_BYTES_MIN, DDR_BYTES_MAX, "--ddr", &o->ddr_bytes);
            break;
        case 'i':
            good = parse_isa(optarg, &o->isa);
            break;
        case 's':
            good = parse_number(optarg, 1, INT64_MAX, "--serial", &o->serial);
            break;
        case 'f':
            o->faults = true;
            break;
        case 'h':
            fputs(usage, stdout);
            exit(0);
        default:
            good = false;
        }
    }
    o->cards = (uint32_t)cards;
    if (good && (optind != argc || !o->directory || !cards))
        good = complain("--dir and --cards are needed, and nothing but options is taken");
    if (good && o->ddr_bytes & (o->ddr_bytes - 1))
        good = complain("--ddr takes a power of two, got %llu", (unsigned long long)o->ddr_bytes);
    if (!good)
        fputs(usage, stderr);
    return good;
}

/* --- cards ----------------------------------------------------------------------------------- */

/* Sealed: no client that maps it can make it shorter under the card. */
static bool make_ddr(struct session *s, uint64_t nbytes)
{
    s->ddr_bytes = nbytes;
    s->ddr_fd = memfd_create("spanker-card-ddr", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (s->ddr_fd < 0 || ftruncate(s->ddr_fd, (off_t)nbytes) != 0 ||
        fcntl(s->ddr_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
        return complain("no memory for a card: %s", strerror(errno));
    s->ddr = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, s->ddr_fd, 0);
    if (s->ddr == MAP_FAILED) {
        s->ddr = NULL;
        return complain("no memory for a card: %s", strerror(errno));
    }
    return true;
}

/* A socket that nobody serves any more is in the way; one that somebody serves stays. */
static bool clear_path(const struct sockaddr_un *address)
{
    struct stat status;
    if (lstat(address->sun_path, &status) != 0)
        return errno == ENOENT || complain("%s: %s", address->sun_path, strerror(errno));
    if (!S_ISSOCK(status.st_mode))
        return complain("%s is there, and no socket", address->sun_path);
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    bool served = probe >= 0 && (connect(probe, (const struct sockaddr *)address,
                                         sizeof *address) == 0 || errno == EAGAIN);
    if (probe >= 0)
        close(probe);
    if (served)
        return complain("%s: another server is there", address->sun_path);
    if (unlink(address->sun_path) != 0)
        return complain("%s: %s", address->sun_path, strerror(errno));
    return true;
}

static bool make_listener(struct card *c, const char *directory, uint32_t number)
{
    c->address.sun_family = AF_UNIX;
    int n = snprintf(c->address.sun_path, sizeof c->address.sun_path, "%s/card%u.sock", directory,
                     number);
    if (n < 0 || (size_t)n >= sizeof c->address.sun_path)
        return complain("%s is too long for a socket's path", directory);
    if (!clear_path(&c->address))
        return false;
    c->session.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->session.listener < 0 ||
        bind(c->session.listener, (struct sockaddr *)&c->address, sizeof c->address) != 0)
        return complain("%s: %s", c->address.sun_path, strerror(errno));
    c->bound = true;
    if (listen(c->session.listener, 1) != 0)
        return complain("%s: %s", c->address.sun_path, strerror(errno));
    return true;
}

static bool make_core(struct server *server, uint32_t number)
{
    const struct options *o = &server->options;
    struct session *s = &server->cards[number].session;
    int status;
    if (!make_ddr(s, o->ddr_bytes))
        return false;
    s->core = spk_card_create_on(s->ddr, s->ddr_bytes, o->isa, &status);
    return s->core || complain("no memory for a card");
}

/* Of a core that is linked. */
static bool make_card(struct server *server, uint32_t number)
{
    const struct options *o = &server->options;
    struct card *c = &server->cards[number];
    struct session *s = &c->session;
    struct spk_front_identity identity = {.serial = o->serial + number,
                                          .sku = "POPC_16A",
                                          .name = "InnerJib7EA",
                                          .isa = isa_names[o->isa],
                                          .faults = o->faults,
                                          .links = o->cards};
    int status;
    if (!session_init(s))
        return complain("no memory for a card");
    for (uint32_t i = 0; i < o->cards; i++)
        identity.peers[i] = i == number ? 0 : o->serial + i;
    struct spk_front_host host = session_host(s);
    s->stop_fd = server->stop_fd;
    s->front = spk_front_create(s->core, &identity, &host, &status);
    if (!s->front)
        return complain("no memory for a card");
    return make_listener(c, o->directory, number);
}

static bool connect_cards(struct server *server)
{
    uint32_t n = server->options.cards;
    uint64_t rings = n > 1 ? (uint64_t)n * (n - 1) : 1, nbytes = RINGS_BYTES / rings / 64 * 64;
    nbytes = nbytes > RING_BYTES_MAX ? RING_BYTES_MAX : nbytes;
    nbytes = nbytes < RING_BYTES_MIN ? RING_BYTES_MIN : nbytes;
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = i + 1; j < n; j++)
            if (spk_link_connect(server->cards[i].session.core, i, server->cards[j].session.core, j,
                                 nbytes) != SPK_OK)
                return complain("no memory for links");
    return true;
}

static void *run_card(void *argument)
{
    struct card *c = argument;
    session_run(&c->session);
    return NULL;
}

static bool start(struct server *server)
{
    uint32_t n = server->options.cards;
    struct spk_card *cores[SAIL_LINKS_MAX];
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    int status;
    for (uint32_t i = 0; i < n; i++)
        if (!make_core(server, i))
            return false;
    if (!connect_cards(server))
        return false;
    for (uint32_t i = 0; i < n; i++)
        if (!make_card(server, i))
            return false;
    for (uint32_t i = 0; i < n; i++)
        cores[i] = server->cards[i].session.core;
    server->pool = spk_pool_create(cores, n, cpus < 1 ? 1 : cpus < (long)n ? (size_t)cpus : n,
                                   &status);
    if (!server->pool)
        return complain("no threads");
    for (uint32_t i = 0; i < n; i++) {
        struct card *c = &server->cards[i];
        c->started = pthread_create(&c->thread, NULL, run_card, c) == 0;
        if (!c->started)
            return complain("no threads");
    }
    return true;
}

static void stop(struct server *server)
{
    uint64_t one = 1;
    ssize_t written = write(server->stop_fd, &one, sizeof one);
    (void)written;
    for (uint32_t i = 0; i < server->options.cards; i++)
        if (server->cards[i].started)
            pthread_join(server->cards[i].thread, NULL);
    spk_pool_destroy(server->pool);
    for (uint32_t i = 0; i < server->options.cards; i++) {
        struct card *c = &server->cards[i];
        struct session *s = &c->session;
        if (c->bound)
            unlink(c->address.sun_path);
        if (s->listener >= 0)
            close(s->listener);
        session_destroy(s);
        spk_front_destroy(s->front);
        spk_card_destroy(s->core);
        if (s->ddr)
            munmap(s->ddr, s->ddr_bytes);
        if (s->ddr_fd >= 0)
            close(s->ddr_fd);
    }
    close(server->stop_fd);
}

/* Each piece of memory that a client shares is a descriptor. */
static void allow_descriptors(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int main(int argc, char **argv)
{
    static struct server server;
    sigset_t signals;
    int signal_number;

    if (!parse_options(argc, argv, &server.options))
        return 2;
    /* Blocked in all threads: this one takes them when everything runs. */
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    umask(077);
    allow_descriptors();
    for (uint32_t i = 0; i < SAIL_LINKS_MAX; i++) {
        struct session *s = &server.cards[i].session;
        s->listener = s->ddr_fd = s->client = -1;
        for (uint32_t v = 0; v < SAIL_VECTORS; v++)
            s->vectors[v] = -1;
    }
    server.stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    bool started = server.stop_fd >= 0 && start(&server);
    if (started) {
        printf("ready: %u cards in %s\n", server.options.cards, server.options.directory);
        fflush(stdout);
        sigwait(&signals, &signal_number);
    }
    stop(&server);
    return started ? 0 : 1;
}
