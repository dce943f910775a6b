/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "session.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define PROTOCOL_MINOR 1
/* A client that takes no answers for so long is gone. */
#define SEND_TIMEOUT_S 10

/* --- interrupts ------------------------------------------------------------------------------ */

/* An eventfd whose counter is full would block, and says all there is to say already. */
static void signal_eventfd(int fd)
{
    struct pollfd room = {.fd = fd, .events = POLLOUT};
    uint64_t one = 1;
    if (poll(&room, 1, 0) == 1 && room.revents & POLLOUT) {
        ssize_t n = write(fd, &one, sizeof one);
        (void)n;
    }
}

static void interrupt(void *context, uint32_t vector)
{
    struct session *s = context;
    if (s->vectors[vector] < 0)
        s->pending |= 1u << vector;
    else
        signal_eventfd(s->vectors[vector]);
}

static void set_vector(struct session *s, uint32_t vector, int fd)
{
    if (s->vectors[vector] >= 0)
        close(s->vectors[vector]);
    s->vectors[vector] = fd;
    if (fd >= 0 && s->pending & 1u << vector) {
        s->pending &= ~(1u << vector);
        signal_eventfd(fd);
    }
}

/* Anything else might block whoever writes to it. */
static bool is_eventfd(int fd)
{
    char path[32], target[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, target, sizeof target - 1);
    if (n < 0)
        return false;
    target[n] = 0;
    return strcmp(target, "anon_inode:[eventfd]") == 0;
}

/* --- the host's memory ----------------------------------------------------------------------- */

static bool host_read(void *context, uint64_t address, void *to, uint64_t nbytes)
{
    const struct session *s = context;
    return pci_is_master(&s->pci) && dma_read(&s->dma, address, to, nbytes);
}

static bool host_write(void *context, uint64_t address, const void *from, uint64_t nbytes)
{
    const struct session *s = context;
    return pci_is_master(&s->pci) && dma_write(&s->dma, address, from, nbytes);
}

struct spk_front_host session_host(struct session *s)
{
    return (struct spk_front_host){
        .context = s, .read = host_read, .write = host_write, .interrupt = interrupt};
}

/* --- regions --------------------------------------------------------------------------------- */

static uint64_t region_bytes(const struct session *s, uint32_t region)
{
    switch (region) {
    case VFU_PCI_BAR0 + SAIL_BAR_REGISTERS:
        return SAIL_REGISTERS_BYTES;
    case VFU_PCI_BAR0 + SAIL_BAR_DDR:
        return s->ddr_bytes;
    case VFU_PCI_BAR0 + SAIL_BAR_MSIX:
        return PCI_MSIX_BAR_BYTES;
    case VFU_PCI_CONFIG:
        return PCI_SPACE_BYTES;
    default:
        return 0;
    }
}

static void read_registers(struct session *s, uint64_t offset, uint8_t *to, uint32_t count)
{
    uint32_t value = spk_front_read(s->front, offset, count);
    memset(to, spk_front_is_gone(s->front) ? 0xff : 0, count);
    if (count == sizeof value)
        memcpy(to, &value, sizeof value);
}

static void read_msix(const struct session *s, uint64_t offset, uint8_t *to, uint32_t count)
{
    uint8_t bar[PCI_MSIX_BAR_BYTES] = {0};
    memcpy(bar, s->msix_table, sizeof s->msix_table);
    memcpy(bar + PCI_MSIX_PBA, &s->pending, sizeof s->pending);
    memcpy(to, bar + offset, count);
}

static void read_region(struct session *s, uint32_t region, uint64_t offset, uint8_t *to,
                        uint32_t count)
{
    if (region == SAIL_BAR_REGISTERS)
        read_registers(s, offset, to, count);
    else if (spk_front_is_gone(s->front))
        memset(to, 0xff, count);
    else if (region == VFU_PCI_CONFIG)
        pci_read(&s->pci, offset, to, count);
    else if (region == SAIL_BAR_DDR)
        memcpy(to, s->ddr + offset, count);
    else
        read_msix(s, offset, to, count);
}

static void write_registers(struct session *s, uint64_t offset, const uint8_t *from, uint32_t count)
{
    uint32_t value;
    if (count != sizeof value)
        return;
    memcpy(&value, from, sizeof value);
    spk_front_write(s->front, offset, count, value);
}

static void write_msix(struct session *s, uint64_t offset, const uint8_t *from, uint32_t count)
{
    for (uint32_t i = 0; i < count && offset + i < sizeof s->msix_table; i++)
        s->msix_table[offset + i] = from[i];
}

static void write_region(struct session *s, uint32_t region, uint64_t offset, const uint8_t *from,
                         uint32_t count)
{
    if (region == SAIL_BAR_REGISTERS) {
        write_registers(s, offset, from, count);
    } else if (spk_front_is_gone(s->front)) {
        return;
    } else if (region == VFU_PCI_CONFIG) {
        if (pci_write(&s->pci, offset, from, count)) {
            pci_reset(&s->pci);
            spk_front_reset(s->front);
        }
    } else if (region == SAIL_BAR_DDR) {
        memcpy(s->ddr + offset, from, count);
    } else {
        write_msix(s, offset, from, count);
    }
}

/* --- messages -------------------------------------------------------------------------------- */

/* What a command leads to: an answer of so many bytes in `answer` and perhaps a descriptor beside it,
 * an errno, or the end of the client. */
struct outcome {
    int error;
    size_t nbytes;
    int fd;
    bool broken;
};

static struct outcome failed(int error)
{
    return (struct outcome){.error = error, .fd = -1};
}

static struct outcome answered(size_t nbytes)
{
    return (struct outcome){.nbytes = nbytes, .fd = -1};
}

static struct outcome broken(void)
{
    return (struct outcome){.broken = true, .fd = -1};
}

static int take_fd(struct session *s)
{
    if (!s->fd_count)
        return -1;
    int fd = s->fds[0];
    s->fd_count--;
    memmove(s->fds, s->fds + 1, s->fd_count * sizeof *s->fds);
    return fd;
}

static struct outcome greet(struct session *s, const uint8_t *payload, size_t nbytes)
{
    struct vfu_version v;
    char json[160];
    if (s->greeted || nbytes < sizeof v)
        return broken();
    memcpy(&v, payload, sizeof v);
    if (v.major != 0)
        return failed(EINVAL);
    /* What the client can is of no interest: nothing is ever sent to it but answers. */
    s->greeted = true;
    v.minor = v.minor < PROTOCOL_MINOR ? v.minor : PROTOCOL_MINOR;
    int n = snprintf(json, sizeof json,
                     "{\"capabilities\":{\"max_msg_fds\":%d,\"max_data_xfer_size\":%zu,"
                     "\"max_dma_maps\":%d,\"pgsizes\":4096}}",
                     SESSION_FDS_MAX, SESSION_DATA_MAX, DMA_REGIONS_MAX);
    memcpy(s->answer, &v, sizeof v);
    memcpy(s->answer + sizeof v, json, (size_t)n + 1);
    return answered(sizeof v + (size_t)n + 1);
}

static struct outcome map(struct session *s, const uint8_t *payload, size_t nbytes)
{
    struct vfu_dma_map m;
    if (nbytes != sizeof m)
        return failed(EINVAL);
    memcpy(&m, payload, sizeof m);
    if (m.flags & ~(VFU_DMA_READ | VFU_DMA_WRITE))
        return failed(EINVAL);
    return failed(dma_map(&s->dma, (struct dma_region){.address = m.address,
                                                       .nbytes = m.size,
                                                       .offset = m.offset,
                                                       .fd = take_fd(s),
                                                       .readable = m.flags & VFU_DMA_READ,
                                                       .writable = m.flags & VFU_DMA_WRITE}));
}

static struct outcome unmap(struct session *s, const uint8_t *payload, size_t nbytes)
{
    struct vfu_dma_unmap m;
    if (nbytes < sizeof m)
        return failed(EINVAL);
    memcpy(&m, payload, sizeof m);
    if (m.flags & ~VFU_DMA_UNMAP_ALL)
        return failed(ENOTSUP);
    if (m.flags) {
        if (m.address || m.size)
            return failed(EINVAL);
        dma_clear(&s->dma);
    } else {
        int error = dma_unmap(&s->dma, m.address, m.size);
        if (error)
            return failed(error);
    }
    memcpy(s->answer, &m, sizeof m);
    return answered(sizeof m);
}

static struct outcome device_info(struct session *s)
{
    struct vfu_device_info info = {.argsz = sizeof info,
                                   .flags = VFU_DEVICE_PCI | VFU_DEVICE_RESETS,
                                   .regions = VFU_PCI_REGIONS,
                                   .irqs = VFU_PCI_IRQS};
    memcpy(s->answer, &info, sizeof info);
    return answered(sizeof info);
}

static struct outcome region_info(struct session *s, const uint8_t *payload, size_t nbytes)
{
    struct vfu_region_info info;
    if (nbytes < offsetof(struct vfu_region_info, cap_offset))
        return failed(EINVAL);
    memcpy(&info, payload, offsetof(struct vfu_region_info, cap_offset));
    if (info.index >= VFU_PCI_REGIONS)
        return failed(EINVAL);
    info = (struct vfu_region_info){
        .argsz = sizeof info, .index = info.index, .size = region_bytes(s, info.index)};
    if (info.size)
        info.flags = VFU_REGION_READS | VFU_REGION_WRITES;
    struct outcome o = answered(sizeof info);
    if (info.index == SAIL_BAR_DDR) {
        info.flags |= VFU_REGION_MAPS;
        o.fd = s->ddr_fd;
    }
    memcpy(s->answer, &info, sizeof info);
    return o;
}

static struct outcome irq_info(struct session *s, const uint8_t *payload, size_t nbytes)
{
    struct vfu_irq_info info;
    if (nbytes < offsetof(struct vfu_irq_info, count))
        return failed(EINVAL);
    memcpy(&info, payload, offsetof(struct vfu_irq_info, count));
    if (info.index >= VFU_PCI_IRQS)
        return failed(EINVAL);
    bool msix = info.index == VFU_PCI_MSIX;
    info.argsz = sizeof info;
    info.flags = msix ? VFU_IRQ_EVENTFD | VFU_IRQ_NORESIZE : 0;
    info.count = msix ? SAIL_VECTORS : 0;
    memcpy(s->answer, &info, sizeof info);
    return answered(sizeof info);
}

static struct outcome set_eventfds(struct session *s, const struct vfu_irq_set *set)
{
    if (s->fd_count && s->fd_count != set->count)
        return failed(EINVAL);
    for (size_t i = 0; i < s->fd_count; i++)
        if (!is_eventfd(s->fds[i]))
            return failed(EINVAL);
    for (uint32_t i = 0; i < set->count; i++)
        set_vector(s, set->start + i, take_fd(s)); /* none: nobody listens any more */
    return answered(0);
}

static struct outcome set_irqs(struct session *s, const uint8_t *payload, size_t nbytes)
{
    struct vfu_irq_set set;
    if (nbytes < sizeof set)
        return failed(EINVAL);
    memcpy(&set, payload, sizeof set);
    const uint8_t *data = payload + sizeof set;
    if (set.index >= VFU_PCI_IRQS)
        return failed(EINVAL);
    uint32_t have = set.index == VFU_PCI_MSIX ? SAIL_VECTORS : 0;
    if (set.start > have || set.count > have - set.start)
        return failed(EINVAL);
    switch (set.flags) {
    case VFU_IRQ_DATA_EVENTFD | VFU_IRQ_TRIGGER:
        return set_eventfds(s, &set);
    case VFU_IRQ_DATA_NONE | VFU_IRQ_TRIGGER:
        for (uint32_t i = 0; !set.count && i < have; i++)
            set_vector(s, i, -1);
        for (uint32_t i = 0; i < set.count; i++)
            interrupt(s, set.start + i);
        return answered(0);
    case VFU_IRQ_DATA_BOOL | VFU_IRQ_TRIGGER:
        if (nbytes != sizeof set + set.count)
            return failed(EINVAL);
        for (uint32_t i = 0; i < set.count; i++)
            if (data[i])
                interrupt(s, set.start + i);
        return answered(0);
    default:
        return failed(EINVAL); /* masking is the host's own business */
    }
}

/* The access, where its bytes are all within a region. */
static bool take_access(const struct session *s, const uint8_t *payload, size_t nbytes,
                        struct vfu_region_access *access)
{
    if (nbytes < sizeof *access)
        return false;
    memcpy(access, payload, sizeof *access);
    uint64_t have = region_bytes(s, access->region);
    return access->count <= SESSION_DATA_MAX && access->offset <= have &&
           access->count <= have - access->offset;
}

static struct outcome region_read(struct session *s, const uint8_t *payload, size_t nbytes)
{
    struct vfu_region_access access;
    if (!take_access(s, payload, nbytes, &access) || nbytes != sizeof access)
        return failed(EINVAL);
    memcpy(s->answer, &access, sizeof access);
    read_region(s, access.region, access.offset, s->answer + sizeof access, access.count);
    return answered(sizeof access + access.count);
}

static struct outcome region_write(struct session *s, const uint8_t *payload, size_t nbytes)
{
    struct vfu_region_access access;
    if (!take_access(s, payload, nbytes, &access) || nbytes != sizeof access + access.count)
        return failed(EINVAL);
    write_region(s, access.region, access.offset, payload + sizeof access, access.count);
    memcpy(s->answer, &access, sizeof access);
    return answered(sizeof access);
}

static struct outcome reset(struct session *s)
{
    pci_reset(&s->pci);
    spk_front_reset(s->front);
    return answered(0);
}

static struct outcome handle(struct session *s, const struct vfu_header *h, const uint8_t *payload)
{
    size_t nbytes = h->size - sizeof *h;
    if ((h->flags & VFU_TYPE_MASK) != VFU_TYPE_COMMAND)
        return broken();
    if (!s->greeted && h->command != VFU_VERSION)
        return broken();
    switch (h->command) {
    case VFU_VERSION:
        return greet(s, payload, nbytes);
    case VFU_DMA_MAP:
        return map(s, payload, nbytes);
    case VFU_DMA_UNMAP:
        return unmap(s, payload, nbytes);
    case VFU_DEVICE_GET_INFO:
        return device_info(s);
    case VFU_DEVICE_GET_REGION_INFO:
        return region_info(s, payload, nbytes);
    case VFU_DEVICE_GET_IRQ_INFO:
        return irq_info(s, payload, nbytes);
    case VFU_DEVICE_SET_IRQS:
        return set_irqs(s, payload, nbytes);
    case VFU_REGION_READ:
        return region_read(s, payload, nbytes);
    case VFU_REGION_WRITE:
        return region_write(s, payload, nbytes);
    case VFU_DEVICE_RESET:
        return reset(s);
    default:
        return failed(ENOTSUP);
    }
}

/* --- the socket ------------------------------------------------------------------------------ */

static void close_fds(struct session *s)
{
    while (s->fd_count)
        close(s->fds[--s->fd_count]);
}

static bool send_all(int client, const void *data, size_t nbytes, int fd)
{
    const uint8_t *at = data;
    while (nbytes) {
        struct iovec piece = {.iov_base = (void *)(uintptr_t)at, .iov_len = nbytes};
        union {
            struct cmsghdr header;
            char room[CMSG_SPACE(sizeof(int))];
        } control = {0};
        struct msghdr m = {.msg_iov = &piece, .msg_iovlen = 1};
        if (fd >= 0) {
            m.msg_control = &control;
            m.msg_controllen = sizeof control.room;
            struct cmsghdr *c = CMSG_FIRSTHDR(&m);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(sizeof fd);
            memcpy(CMSG_DATA(c), &fd, sizeof fd);
        }
        ssize_t sent = sendmsg(client, &m, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return false;
        fd = -1;
        at += sent;
        nbytes -= (size_t)sent;
    }
    return true;
}

static bool reply(struct session *s, const struct vfu_header *command, const struct outcome *o)
{
    struct vfu_header *h = (struct vfu_header *)(s->answer - sizeof *h);
    size_t nbytes = o->error ? 0 : o->nbytes;
    *h = (struct vfu_header){.id = command->id,
                             .command = command->command,
                             .size = (uint32_t)(sizeof *h + nbytes),
                             .flags = VFU_TYPE_REPLY | (o->error ? VFU_ERROR : 0),
                             .error = (uint32_t)o->error};
    return send_all(s->client, h, sizeof *h + nbytes, o->error ? -1 : o->fd);
}

/* Descriptors that came with some bytes; false where there were more than a message may have. */
static bool keep_fds(struct session *s, struct msghdr *m)
{
    bool good = !(m->msg_flags & MSG_CTRUNC);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (s->fd_count < SESSION_FDS_MAX) {
                s->fds[s->fd_count++] = fd;
            } else {
                close(fd);
                good = false;
            }
        }
    }
    return good;
}

/* Reads up to `most` bytes behind those that are there.  1, 0 where there are none now, -1 at the end. */
static int receive(struct session *s, size_t most)
{
    struct iovec piece = {.iov_base = s->message + s->received, .iov_len = most};
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(SESSION_FDS_MAX * sizeof(int))];
    } control;
    struct msghdr m = {.msg_iov = &piece,
                       .msg_iovlen = 1,
                       .msg_control = &control,
                       .msg_controllen = sizeof control.room};
    ssize_t n = recvmsg(s->client, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return 0;
    if (n < 0)
        return -1;
    if (!keep_fds(s, &m) || n == 0)
        return -1;
    s->received += (size_t)n;
    return 1;
}

/* False where the client is to go, or has gone. */
static bool serve(struct session *s)
{
    struct vfu_header h;
    for (;;) {
        size_t want = sizeof h;
        if (s->received >= sizeof h) {
            memcpy(&h, s->message, sizeof h);
            if (h.size < sizeof h || h.size > SESSION_MESSAGE_MAX)
                return false;
            want = h.size;
        }
        if (s->received < want) {
            int got = receive(s, want - s->received);
            if (got <= 0)
                return got == 0;
            continue;
        }
        struct outcome o = handle(s, &h, s->message + sizeof h);
        s->received = 0;
        close_fds(s);
        if (o.broken)
            return false;
        if (!(h.flags & VFU_NO_REPLY) && !reply(s, &h, &o))
            return false;
        return true; /* the card's turn */
    }
}

/* --- clients, one after the other ------------------------------------------------------------ */

static void forget_host(struct session *s)
{
    close_fds(s);
    dma_clear(&s->dma);
    s->pending = 0;
    for (uint32_t i = 0; i < SAIL_VECTORS; i++)
        set_vector(s, i, -1);
    memset(s->msix_table, 0, sizeof s->msix_table);
    for (uint32_t i = 0; i < SAIL_VECTORS; i++)
        s->msix_table[16 * i + 12] = 1; /* masked */
    pci_reset(&s->pci);
    s->received = 0;
    s->greeted = false;
}

static void disconnect(struct session *s)
{
    if (s->client >= 0)
        close(s->client);
    s->client = -1;
    forget_host(s);
    spk_front_power_cycle(s->front);
}

static void welcome(struct session *s)
{
    struct timeval patience = {.tv_sec = SEND_TIMEOUT_S};
    int client = accept4(s->listener, NULL, NULL, SOCK_CLOEXEC);
    if (client < 0) {
        /* It may be out of descriptors, and would be asked again at once. */
        struct timespec pause = {.tv_nsec = 10000000};
        nanosleep(&pause, NULL);
        return;
    }
    setsockopt(client, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    s->client = client;
}

static struct timespec time_left(uint64_t until_ns)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t now_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    uint64_t left = until_ns > now_ns ? until_ns - now_ns : 0;
    return (struct timespec){.tv_sec = (time_t)(left / 1000000000u),
                             .tv_nsec = (long)(left % 1000000000u)};
}

void session_run(struct session *s)
{
    for (;;) {
        uint64_t until = spk_front_poll(s->front);
        bool may_accept = s->client < 0 && spk_front_is_ready(s->front);
        struct pollfd fds[] = {
            {.fd = s->stop_fd, .events = POLLIN},
            {.fd = spk_card_fd(s->core), .events = POLLIN},
            {.fd = s->client >= 0 ? s->client : may_accept ? s->listener : -1, .events = POLLIN},
        };
        struct timespec left = time_left(until);
        if (ppoll(fds, 3, until == UINT64_MAX ? NULL : &left, NULL) <= 0)
            continue;
        if (fds[0].revents)
            return;
        if (!fds[2].revents)
            continue;
        if (s->client < 0)
            welcome(s);
        else if (!serve(s))
            disconnect(s);
    }
}

bool session_init(struct session *s)
{
    s->client = -1;
    for (uint32_t i = 0; i < SAIL_VECTORS; i++)
        s->vectors[i] = -1;
    s->message = malloc(SESSION_MESSAGE_MAX);
    /* The header of an answer stands in front of it. */
    uint8_t *answer = malloc(SESSION_MESSAGE_MAX);
    s->answer = answer ? answer + sizeof(struct vfu_header) : NULL;
    pci_init(&s->pci, s->ddr_bytes);
    forget_host(s);
    return s->message && s->answer;
}

void session_destroy(struct session *s)
{
    if (s->client >= 0)
        close(s->client);
    forget_host(s);
    if (s->answer)
        free(s->answer - sizeof(struct vfu_header));
    free(s->message);
}
