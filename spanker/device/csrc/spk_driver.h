/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What Python calls of the system to speak with the kernel module: each returns 0 or what is asked
 * for, or -errno.  The module's structures come from driver/include/uapi/spanker_ioctl.h, so that
 * the compiler lays them out.  Only the cffi module includes this.
 */
#ifndef SPK_DRIVER_H
#define SPK_DRIVER_H

#ifdef __has_include
#if !__has_include(<linux/ioctl.h>) || !__has_include(<linux/types.h>)
#error "the headers of the Linux kernel are missing: install linux-libc-dev (or kernel-headers)"
#endif
#endif

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "spanker_ioctl.h"

/* cffi: begin */
static int spk_driver_ioctl(int fd, uint32_t request, void *argument);
/* Memory of a buffer, shared with the card.  Where the card is gone, whoever touches it goes on with
 * memory of no meaning instead, and is to ask the file afterwards whether the card is there. */
static int spk_driver_map(int fd, uint64_t offset, uint64_t nbytes, void **at);
static int spk_driver_unmap(void *at, uint64_t nbytes);
/* What poll(2) says at once of POLLIN, POLLPRI, POLLERR and POLLHUP. */
static int spk_driver_poll(int fd);
/* cffi: end */

static int spk_driver_ioctl(int fd, uint32_t request, void *argument)
{
    int result;
    do
        result = ioctl(fd, request, argument);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}

/* What is mapped.  Nodes are used again and never freed: the handler of SIGBUS walks along them
 * without a lock, in any thread.  `begin` is 0 where there is nothing. */
struct spk_mapped {
    _Atomic(uintptr_t) begin;
    _Atomic(size_t) nbytes;
    struct spk_mapped *next;
};

static _Atomic(struct spk_mapped *) spk_mapped;
static pthread_mutex_t spk_mapped_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction spk_bus_before;

static void spk_on_bus_error(int number, siginfo_t *info, void *context)
{
    (void)context;
    int saved = errno;
    uintptr_t at = (uintptr_t)info->si_addr;
    for (struct spk_mapped *m = atomic_load(&spk_mapped); m; m = m->next) {
        uintptr_t begin = atomic_load(&m->begin);
        size_t nbytes = atomic_load(&m->nbytes);
        if (!begin || at < begin || at - begin >= nbytes)
            continue;
        void *p = mmap((void *)begin, nbytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
        errno = saved;
        if (p != MAP_FAILED)
            return;
    }
    /* Not ours: it is to happen again, to whoever was there before. */
    sigaction(number, &spk_bus_before, NULL);
    if (info->si_code <= 0) /* it was sent */
        raise(number);
    errno = saved;
}

/* With the mutex held. */
static int spk_catch_bus_errors(void)
{
    static bool caught;
    struct sigaction action = {.sa_sigaction = spk_on_bus_error,
                               .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    if (!caught && sigaction(SIGBUS, &action, &spk_bus_before))
        return -errno;
    caught = true;
    return 0;
}

static int spk_note_mapping(void *at, size_t nbytes)
{
    int status = spk_catch_bus_errors();
    if (status)
        return status;
    struct spk_mapped *m = atomic_load(&spk_mapped);
    while (m && atomic_load(&m->begin))
        m = m->next;
    if (!m) {
        m = calloc(1, sizeof *m);
        if (!m)
            return -ENOMEM;
        m->next = atomic_load(&spk_mapped);
        atomic_store(&spk_mapped, m);
    }
    atomic_store(&m->nbytes, nbytes);
    atomic_store(&m->begin, (uintptr_t)at);
    return 0;
}

static int spk_driver_map(int fd, uint64_t offset, uint64_t nbytes, void **at)
{
    if (nbytes > SIZE_MAX || (uint64_t)(off_t)offset != offset || (off_t)offset < 0)
        return -EOVERFLOW;
    void *p = mmap(NULL, (size_t)nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    if (p == MAP_FAILED)
        return -errno;
    pthread_mutex_lock(&spk_mapped_mutex);
    int status = spk_note_mapping(p, (size_t)nbytes);
    pthread_mutex_unlock(&spk_mapped_mutex);
    if (status) {
        munmap(p, (size_t)nbytes);
        return status;
    }
    *at = p;
    return 0;
}

static int spk_driver_unmap(void *at, uint64_t nbytes)
{
    pthread_mutex_lock(&spk_mapped_mutex);
    for (struct spk_mapped *m = atomic_load(&spk_mapped); m; m = m->next)
        if (atomic_load(&m->begin) == (uintptr_t)at)
            atomic_store(&m->begin, 0);
    pthread_mutex_unlock(&spk_mapped_mutex);
    return munmap(at, (size_t)nbytes) ? -errno : 0;
}

static int spk_driver_poll(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN | POLLPRI};
    int n = poll(&p, 1, 0);
    return n < 0 ? -errno : n ? p.revents : 0;
}

#endif
