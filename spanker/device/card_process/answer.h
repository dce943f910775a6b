/* SPDX-License-Identifier: Apache-2.0 */
/* What the card answers to a request: from bytes to bytes, without input and output. */
#ifndef SPK_ANSWER_H
#define SPK_ANSWER_H

#include <stdbool.h>

#include "spk_card.h"
#include "spk_wire.h"

/* A card, who steps it, and what it says of itself beside what its core knows. */
struct served {
    struct spk_card *card;
    struct spk_pool *pool;
    uint64_t serial, ddr_bytes;
    const char *isa;
};

/* Room for the longest reply, header and all. */
struct reply {
    uint32_t nbytes; /* header included */
    _Alignas(16) uint8_t bytes[sizeof(struct spk_wire_header) + SPK_WIRE_REPLY_MAX];
};

/* Whether a header begins a frame of at most `most` bytes of body. */
bool header_is_good(const struct spk_wire_header *h, uint32_t most);
/* Answers a request whose header is good; whatever is wrong with it, the reply says so.  `file` is
 * what has come with it, -1 for none; it stays the caller's. */
void answer(const struct served *served, const struct spk_wire_header *h, const uint8_t *body,
            int file, struct reply *out);
/* The header and the first part of what tells of a completion; its result follows. */
struct completion_frame {
    struct spk_wire_header header;
    struct spk_wire_completion completion;
};
struct completion_frame tell(const struct spk_completion *c);

#endif
