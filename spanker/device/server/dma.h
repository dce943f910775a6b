/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host's memory, as a vfio-user client shares it: pieces of files by address.
 *
 * Bytes are moved by pread and pwrite, not through a mapping: a client that makes its file shorter
 * then gets an error, where a mapping would end the whole process.  It costs a third of a
 * microsecond, beside some fifty for a message.
 */
#ifndef SERVER_DMA_H
#define SERVER_DMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DMA_REGIONS_MAX 4096

struct dma_region {
    uint64_t address, nbytes, offset;
    int fd; /* -1: of memory that is not shared */
    bool readable, writable;
};

struct dma {
    struct dma_region *regions; /* by address; they do not overlap */
    size_t count, room;
};

/* Takes the descriptor in any case.  0 or an errno. */
int dma_map(struct dma *dma, struct dma_region region);
/* Every region that lies within the range; one in part only is EINVAL, and nothing happens. */
int dma_unmap(struct dma *dma, uint64_t address, uint64_t nbytes);
void dma_clear(struct dma *dma);
bool dma_read(const struct dma *dma, uint64_t address, void *to, uint64_t nbytes);
bool dma_write(const struct dma *dma, uint64_t address, const void *from, uint64_t nbytes);

#endif
