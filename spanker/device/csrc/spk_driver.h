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
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "spanker_ioctl.h"

/* cffi: begin */
static int spk_driver_ioctl(int fd, uint32_t request, void *argument);
/* Memory of a buffer, shared with the card. */
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

static int spk_driver_map(int fd, uint64_t offset, uint64_t nbytes, void **at)
{
    if (nbytes > SIZE_MAX || (uint64_t)(off_t)offset != offset || (off_t)offset < 0)
        return -EOVERFLOW;
    void *p = mmap(NULL, (size_t)nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    if (p == MAP_FAILED)
        return -errno;
    *at = p;
    return 0;
}

static int spk_driver_unmap(void *at, uint64_t nbytes)
{
    return munmap(at, (size_t)nbytes) ? -errno : 0;
}

static int spk_driver_poll(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN | POLLPRI};
    int n = poll(&p, 1, 0);
    return n < 0 ? -errno : n ? p.revents : 0;
}

#endif
