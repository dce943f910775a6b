/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The front of a card that a host sees through registers and rings: driver/include/spanker_card.h.
 *
 * A library without threads, clocks of its own or input and output: whoever owns the registers'
 * other side (a vfio-user server, a test, an RTL bench) calls it from one thread at a time and lends
 * it the host's memory and interrupts.  The work itself is done by a card of spk_card.h, which workers
 * step.  docs/api/card-registers.md says what it does, also with bad input.
 */
#ifndef SPK_FRONT_H
#define SPK_FRONT_H

#include <stdbool.h>
#include <stdint.h>

#include "spanker_card.h"
#include "spk_card.h"

/* What the front needs of the host.  The memory functions are false where any of the bytes cannot be
 * reached; of two writes the first is visible before the second. */
struct spk_front_host {
    void *context;
    bool (*read)(void *context, uint64_t address, void *to, uint64_t nbytes);
    bool (*write)(void *context, uint64_t address, const void *from, uint64_t nbytes);
    void (*interrupt)(void *context, uint32_t vector);
};

/* Texts are cut at SAIL_TEXT_BYTES.  Link i leads to the peer that the core knows by number i. */
struct spk_front_identity {
    uint64_t serial;
    const char *sku, *name, *isa;
    bool faults; /* it has the fault registers */
    uint32_t links;
    uint64_t peers[SAIL_LINKS_MAX]; /* their serial numbers, 0 where nobody is */
};

struct spk_front;

/* On a core made by spk_card_create_on, which nobody else uses and which outlives the front. */
struct spk_front *spk_front_create(struct spk_card *core, const struct spk_front_identity *identity,
                                   const struct spk_front_host *host, int *status);
/* Once nobody steps the core any more. */
void spk_front_destroy(struct spk_front *front);

/* BAR 0.  Accesses that are not to a whole register read as 0 and write nothing. */
uint32_t spk_front_read(struct spk_front *front, uint64_t offset, uint32_t size);
void spk_front_write(struct spk_front *front, uint64_t offset, uint32_t size, uint32_t value);
/* As writing SAIL_CONTROL_RESET: a reset of the function by PCI's own means. */
void spk_front_reset(struct spk_front *front);
/* Power off and on: what even a reset leaves is gone, too, and the DDR is all zeros. */
void spk_front_power_cycle(struct spk_front *front);
/* Whether the card has been taken out: reads answer all ones. */
bool spk_front_is_gone(const struct spk_front *front);
/* The card is out of reset, and nothing of before it is left in the core. */
bool spk_front_is_ready(const struct spk_front *front);

/* Does what there is to do: after writes, whenever the core's fd is readable, and at the time
 * (CLOCK_MONOTONIC, ns) that it returned, UINT64_MAX for none. */
uint64_t spk_front_poll(struct spk_front *front);

#endif
