/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "dma.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The first region that ends behind the address. */
static size_t find(const struct dma *d, uint64_t address)
{
    size_t low = 0, high = d->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct dma_region *r = &d->regions[middle];
        if (r->address + (r->nbytes - 1) < address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static int check(const struct dma *d, const struct dma_region *r)
{
    struct stat status;
    if (!r->nbytes || r->address + (r->nbytes - 1) < r->address ||
        r->offset > INT64_MAX - r->nbytes)
        return EINVAL;
    size_t at = find(d, r->address);
    if (at < d->count && d->regions[at].address <= r->address + (r->nbytes - 1))
        return EEXIST;
    if (d->count == DMA_REGIONS_MAX)
        return ENOSPC;
    /* A file of another kind may block whoever reads it. */
    if (r->fd >= 0 && (fstat(r->fd, &status) != 0 || !S_ISREG(status.st_mode)))
        return EINVAL;
    return 0;
}

int dma_map(struct dma *d, struct dma_region region)
{
    int error = check(d, &region);
    if (!error && d->count == d->room) {
        size_t room = d->room ? 2 * d->room : 16;
        struct dma_region *grown = realloc(d->regions, room * sizeof *grown);
        if (grown) {
            d->regions = grown;
            d->room = room;
        } else {
            error = ENOMEM;
        }
    }
    if (error) {
        if (region.fd >= 0)
            close(region.fd);
        return error;
    }
    size_t at = find(d, region.address);
    memmove(&d->regions[at + 1], &d->regions[at], (d->count - at) * sizeof *d->regions);
    d->regions[at] = region;
    d->count++;
    return 0;
}

static void close_region(const struct dma_region *r)
{
    if (r->fd >= 0)
        close(r->fd);
}

int dma_unmap(struct dma *d, uint64_t address, uint64_t nbytes)
{
    if (!nbytes || address + (nbytes - 1) < address)
        return EINVAL;
    uint64_t last = address + (nbytes - 1);
    size_t begin = find(d, address), end = begin;
    for (; end < d->count && d->regions[end].address <= last; end++) {
        const struct dma_region *r = &d->regions[end];
        if (r->address < address || r->address + (r->nbytes - 1) > last)
            return EINVAL;
    }
    for (size_t i = begin; i < end; i++)
        close_region(&d->regions[i]);
    if (end > begin)
        memmove(&d->regions[begin], &d->regions[end], (d->count - end) * sizeof *d->regions);
    d->count -= end - begin;
    return 0;
}

void dma_clear(struct dma *d)
{
    for (size_t i = 0; i < d->count; i++)
        close_region(&d->regions[i]);
    free(d->regions);
    *d = (struct dma){0};
}

/* One of the two pointers is set. */
static bool move(const struct dma_region *r, uint64_t at, uint8_t *to, const uint8_t *from, size_t n)
{
    while (n) {
        off_t offset = (off_t)(r->offset + at);
        ssize_t moved = to ? pread(r->fd, to, n, offset) : pwrite(r->fd, from, n, offset);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0)
            return false;
        at += (uint64_t)moved;
        n -= (size_t)moved;
        if (to)
            to += moved;
        else
            from += moved;
    }
    return true;
}

static bool move_all(const struct dma *d, uint64_t address, uint8_t *to, const uint8_t *from,
                     uint64_t nbytes)
{
    if (nbytes && address + (nbytes - 1) < address)
        return false;
    for (size_t i = find(d, address); nbytes; i++) {
        const struct dma_region *r = &d->regions[i];
        if (i == d->count || r->address > address || r->fd < 0 ||
            !(to ? r->readable : r->writable))
            return false;
        uint64_t at = address - r->address, n = r->nbytes - at;
        n = n < nbytes ? n : nbytes;
        if (!move(r, at, to, from, n))
            return false;
        address += n;
        nbytes -= n;
        if (to)
            to += n;
        else
            from += n;
    }
    return true;
}

bool dma_read(const struct dma *d, uint64_t address, void *to, uint64_t nbytes)
{
    bool done = move_all(d, address, to, NULL, nbytes);
    atomic_thread_fence(memory_order_seq_cst);
    return done;
}

bool dma_write(const struct dma *d, uint64_t address, const void *from, uint64_t nbytes)
{
    atomic_thread_fence(memory_order_seq_cst);
    return move_all(d, address, NULL, from, nbytes);
}
