/* SPDX-License-Identifier: Apache-2.0 */
/* The configuration space of a card: an endpoint with three BARs, MSI-X and reset of its function. */
#ifndef SERVER_PCI_H
#define SERVER_PCI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PCI_SPACE_BYTES 4096
#define PCI_MSIX_BAR_BYTES 4096
#define PCI_MSIX_PBA 0x800 /* in its BAR; the table is at the beginning */

struct pci {
    uint8_t space[PCI_SPACE_BYTES];
    uint8_t writable[PCI_SPACE_BYTES]; /* bits that a host may change */
};

/* `aperture_bytes`: of BAR 2, a power of two. */
void pci_init(struct pci *pci, uint64_t aperture_bytes);
/* Ranges are checked by the caller. */
void pci_read(const struct pci *pci, size_t offset, void *to, size_t nbytes);
/* True where the host asks for a reset of the function. */
bool pci_write(struct pci *pci, size_t offset, const void *from, size_t nbytes);
/* Everything that a host may change is as at power-on. */
void pci_reset(struct pci *pci);
/* Whether the host lets the card reach its memory. */
bool pci_is_master(const struct pci *pci);

#endif
