/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What of the vfio-user protocol (version 0.x, as in QEMU's documentation) goes over the socket:
 * messages of a header and a payload, little-endian, and descriptors beside them.
 */
#ifndef SERVER_VFIO_USER_H
#define SERVER_VFIO_USER_H

#include <stdint.h>

enum vfu_command {
    VFU_VERSION = 1,
    VFU_DMA_MAP = 2,
    VFU_DMA_UNMAP = 3,
    VFU_DEVICE_GET_INFO = 4,
    VFU_DEVICE_GET_REGION_INFO = 5,
    VFU_DEVICE_GET_REGION_IO_FDS = 6,
    VFU_DEVICE_GET_IRQ_INFO = 7,
    VFU_DEVICE_SET_IRQS = 8,
    VFU_REGION_READ = 9,
    VFU_REGION_WRITE = 10,
    VFU_DEVICE_RESET = 13,
};

#define VFU_TYPE_MASK 0xfu
#define VFU_TYPE_COMMAND 0u
#define VFU_TYPE_REPLY 1u
#define VFU_NO_REPLY 0x10u
#define VFU_ERROR 0x20u

struct vfu_header {
    uint16_t id, command;
    uint32_t size; /* with this header */
    uint32_t flags;
    uint32_t error;
};

struct vfu_version {
    uint16_t major, minor; /* then JSON and a zero byte */
};

#define VFU_DMA_READ 0x1u
#define VFU_DMA_WRITE 0x2u

struct vfu_dma_map {
    uint32_t argsz, flags;
    uint64_t offset, address, size;
};

#define VFU_DMA_UNMAP_ALL 0x2u

struct vfu_dma_unmap {
    uint32_t argsz, flags;
    uint64_t address, size;
};

#define VFU_DEVICE_RESETS 0x1u
#define VFU_DEVICE_PCI 0x2u

struct vfu_device_info {
    uint32_t argsz, flags, regions, irqs;
};

#define VFU_REGION_READS 0x1u
#define VFU_REGION_WRITES 0x2u
#define VFU_REGION_MAPS 0x4u

struct vfu_region_info {
    uint32_t argsz, flags, index, cap_offset;
    uint64_t size, offset;
};

#define VFU_IRQ_EVENTFD 0x1u
#define VFU_IRQ_NORESIZE 0x8u

struct vfu_irq_info {
    uint32_t argsz, flags, index, count;
};

#define VFU_IRQ_DATA_NONE 0x1u
#define VFU_IRQ_DATA_BOOL 0x2u
#define VFU_IRQ_DATA_EVENTFD 0x4u
#define VFU_IRQ_TRIGGER 0x20u

struct vfu_irq_set {
    uint32_t argsz, flags, index, start, count;
};

struct vfu_region_access {
    uint64_t offset;
    uint32_t region, count; /* then `count` bytes */
};

/* Numbers that VFIO gives the regions and interrupts of a PCI device. */
enum { VFU_PCI_BAR0 = 0, VFU_PCI_CONFIG = 7, VFU_PCI_REGIONS = 9 };
enum { VFU_PCI_MSIX = 2, VFU_PCI_IRQS = 5 };

#endif
