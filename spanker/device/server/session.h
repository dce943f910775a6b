/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One card at its socket: a client after the other, each of which finds the card as after power-on.
 *
 * A session belongs to one thread, which sleeps until the client, the card or the clock wants
 * something.  What a client sends is checked against limits before anything is done with it; whoever
 * breaks the protocol, instead of asking for something that cannot be, is disconnected.
 */
#ifndef SERVER_SESSION_H
#define SERVER_SESSION_H

#include <stdint.h>

#include "dma.h"
#include "pci.h"
#include "spk_front.h"
#include "vfio_user.h"

#define SESSION_DATA_MAX ((size_t)1 << 20) /* bytes of a region that one message may carry */
#define SESSION_MESSAGE_MAX (SESSION_DATA_MAX + 4096)
#define SESSION_FDS_MAX 8

struct session {
    struct spk_card *core;
    struct spk_front *front;
    uint8_t *ddr;
    uint64_t ddr_bytes;
    int ddr_fd;
    int listener;
    int stop_fd; /* readable: the thread returns */

    int client; /* -1: none */
    bool greeted;
    struct pci pci;
    uint8_t msix_table[16 * SAIL_VECTORS];
    int vectors[SAIL_VECTORS]; /* eventfds, or -1 */
    uint32_t pending;          /* vectors that nobody was there for */
    struct dma dma;

    uint8_t *message; /* room for SESSION_MESSAGE_MAX */
    size_t received;
    int fds[SESSION_FDS_MAX];
    size_t fd_count;
    uint8_t *answer;
};

/* Of a card that has no front yet: it asks for the host that `session_host` is. */
bool session_init(struct session *s);
struct spk_front_host session_host(struct session *s);
/* Returns once `stop_fd` is readable. */
void session_run(struct session *s);
void session_destroy(struct session *s);

#endif
