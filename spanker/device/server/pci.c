/* SPDX-License-Identifier: Apache-2.0 */
#include "pci.h"

#include <string.h>

#include "spanker_card.h"

/* Offsets and bits by the PCI and PCI Express specifications, named as in <linux/pci_regs.h>. */
enum {
    COMMAND = 0x04,
    STATUS = 0x06,
    BAR_0 = 0x10,
    BAR_2 = 0x18,
    BAR_4 = 0x20,
    CAPABILITY_LIST = 0x34,
    MSIX = 0x40,
    EXPRESS = 0x60,
};

#define COMMAND_MASTER 0x0004u
#define COMMAND_WRITABLE 0x0546u /* memory, master, parity, SERR, no INTx */
#define STATUS_CAPABILITIES 0x0010u
#define BAR_64_PREFETCHABLE 0xcu
#define DEVICE_CONTROL (EXPRESS + 0x08)
#define FUNCTION_LEVEL_RESET 0x8000u

static void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

static void put32(uint8_t *at, uint32_t value)
{
    put16(at, value);
    put16(at + 2, value >> 16);
}

static uint32_t get16(const uint8_t *at)
{
    return at[0] | (uint32_t)at[1] << 8;
}

void pci_init(struct pci *pci, uint64_t aperture_bytes)
{
    uint8_t *s = pci->space, *w = pci->writable;
    memset(pci, 0, sizeof *pci);
    put16(s, SAIL_PCI_VENDOR);
    put16(s + 2, SAIL_PCI_DEVICE);
    put16(s + STATUS, STATUS_CAPABILITIES);
    put16(w + COMMAND, COMMAND_WRITABLE);
    s[0x08] = SAIL_VERSION_MAJOR; /* revision */
    put16(s + 0x0a, SAIL_PCI_CLASS >> 8);
    w[0x0c] = w[0x0d] = 0xff; /* cache line, latency: without effect */
    put16(s + 0x2c, SAIL_PCI_VENDOR);
    put16(s + 0x2e, SAIL_PCI_DEVICE);
    s[CAPABILITY_LIST] = MSIX;
    w[0x3c] = 0xff; /* interrupt line */

    /* The bits that can be written tell the size. */
    put32(w + BAR_0, ~(uint32_t)(SAIL_REGISTERS_BYTES - 1));
    put32(s + BAR_2, BAR_64_PREFETCHABLE);
    put32(w + BAR_2, (uint32_t)~(aperture_bytes - 1) & ~0xfu);
    put32(w + BAR_2 + 4, (uint32_t)(~(aperture_bytes - 1) >> 32));
    put32(w + BAR_4, ~(uint32_t)(PCI_MSIX_BAR_BYTES - 1));

    s[MSIX] = 0x11;
    s[MSIX + 1] = EXPRESS;
    put16(s + MSIX + 2, SAIL_VECTORS - 1);
    put16(w + MSIX + 2, 0xc000); /* enable, mask all */
    put32(s + MSIX + 4, SAIL_BAR_MSIX);
    put32(s + MSIX + 8, PCI_MSIX_PBA | SAIL_BAR_MSIX);

    s[EXPRESS] = 0x10;
    put16(s + EXPRESS + 2, 0x0002);               /* version 2, endpoint */
    put32(s + EXPRESS + 0x04, 0x10008000);        /* function level reset, role-based errors */
    put16(w + DEVICE_CONTROL, 0x7fff);
    put32(s + EXPRESS + 0x0c, 0x00000012);        /* link: 5 GT/s, x1, as on the boards of rev-B */
    put16(w + EXPRESS + 0x10, 0x0fff);
    put16(s + EXPRESS + 0x12, 0x0012);
    put32(s + EXPRESS + 0x2c, 0x00000006);        /* link speeds: 2.5 and 5 GT/s */
    put16(w + EXPRESS + 0x28, 0xffff);
    put16(s + EXPRESS + 0x30, 0x0002);
    put16(w + EXPRESS + 0x30, 0xffff);
}

void pci_read(const struct pci *pci, size_t offset, void *to, size_t nbytes)
{
    memcpy(to, pci->space + offset, nbytes);
}

bool pci_write(struct pci *pci, size_t offset, const void *from, size_t nbytes)
{
    const uint8_t *bytes = from;
    bool reset = false;
    for (size_t i = 0; i < nbytes; i++) {
        size_t at = offset + i;
        uint8_t mask = pci->writable[at];
        pci->space[at] = (uint8_t)((pci->space[at] & ~mask) | (bytes[i] & mask));
        reset |= at == DEVICE_CONTROL + 1 && bytes[i] & FUNCTION_LEVEL_RESET >> 8;
    }
    return reset;
}

void pci_reset(struct pci *pci)
{
    for (size_t i = 0; i < PCI_SPACE_BYTES; i++)
        pci->space[i] &= (uint8_t)~pci->writable[i];
}

bool pci_is_master(const struct pci *pci)
{
    return get16(pci->space + COMMAND) & COMMAND_MASTER;
}
