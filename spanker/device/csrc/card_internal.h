/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the card share: the card itself and the steps of its engine. */
#ifndef SPK_CARD_INTERNAL_H
#define SPK_CARD_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "spk_card.h"
#include "spk_kernels.h"

struct buffer {
    uint64_t offset, bytes; /* bytes is what was asked for; 0 marks a free slot */
    uint32_t users;         /* programs that refer to it, and steps that will read it */
};

struct program {
    struct spk_command *commands;
    struct spk_program_header header;
    uint32_t vocabulary;     /* token ids must be below; 0 when nothing embeds */
    uint32_t kv_pages;       /* page numbers must be below; 0 when nothing attends */
    uint32_t page_positions;
    uint32_t users;          /* submissions queued or running */
};

/* A link's ring: one producer, one consumer, positions grow without wrapping. */
struct ring {
    uint64_t capacity;
    _Alignas(64) _Atomic uint64_t head; /* consumer */
    _Alignas(64) _Atomic uint64_t tail; /* producer */
    _Alignas(64) uint8_t data[];
};

struct link {
    struct ring *tx, *rx;
    struct spk_card *peer;
    _Atomic uint32_t *refs; /* cards that still use the pair of rings */
    uint64_t tx_sequence, rx_sequence;
    _Atomic uint64_t tx_bytes, rx_bytes;
};

struct submission {
    struct program *program;
    uint8_t *params; /* owned */
    uint8_t *result; /* owned: room for what `reads` bring back */
    struct spk_read reads[SPK_READS_MAX];
    uint32_t read_count;
    uint64_t fence;
    uint32_t epoch; /* an abort that came before the submission spares it */
};

/* The step being executed: pointers into its parameter block, and where it stands. */
struct execution {
    struct submission submission;
    bool active;
    uint32_t tokens, outputs;
    const uint32_t *token_id, *position, *sequence, *output_token, *first_page, *page;
    const float *inv_temperature;
    uint32_t pc;
    uint64_t cursor, cursor2;
    uint64_t busy_ns;
    uint64_t command_begin_ns; /* when the current command began */
    int32_t waiting_for;
};

/* Executed commands for whoever asked: written by the engine, read by the host. */
struct trace {
    struct spk_trace_event *events;
    uint64_t capacity;
    _Atomic uint64_t written, read, lost;
};

/* Progress of one LINK_SEND or LINK_RECV within an exchange. */
struct transfer {
    uint64_t done_bytes;
};

struct spk_card {
    const struct spk_kernels *kernels;
    uint8_t *mapping; /* what was mapped; `ddr` is its first multiple of a huge page */
    uint8_t *ddr;
    uint64_t ddr_bytes;
    _Atomic uint64_t ddr_used;
    int event_fd;

    pthread_mutex_t mutex; /* guards the tables, the queue and the completions */
    struct buffer *buffers;
    uint32_t buffer_count;
    struct program *programs[SPK_PROGRAMS_MAX];
    struct submission queue[SPK_QUEUE_MAX];
    uint32_t queue_head, queue_count; /* the running submission stays in the queue */
    struct spk_completion completions[SPK_QUEUE_MAX];
    uint32_t completion_head, completion_count;
    uint8_t *taken_result; /* of the completion that was collected last */
    uint64_t next_fence;
    uint64_t known_from; /* fences from here on were given out once the last step had completed */

    /* Touched only by whoever steps the card. */
    struct execution run;
    struct transfer transfers[2 * SPK_CARDS_MAX];
    struct trace trace;
    uint8_t *scratch;
    size_t scratch_bytes;

    struct link *links; /* SPK_CARDS_MAX of them, by peer number */
    uint32_t epoch;
    _Atomic uint32_t abort_epoch; /* above `epoch`: an abort is wanted */
    _Atomic int plant;
    _Atomic int stepping; /* taken by the worker that steps the card */
    _Atomic int ready;    /* a hint that a step would find work */
    struct worker *owner; /* the worker that polls the card, or NULL */

    _Atomic uint64_t commands, steps, ddr_read, ddr_written, busy_ns, progress;
    _Atomic int32_t waiting_for;
    _Atomic uint32_t command, epoch_seen;
};

static inline uint8_t *card_at(const struct spk_card *c, const struct spk_ref *ref)
{
    return c->ddr + c->buffers[ref->buffer].offset + ref->offset;
}

/* program.c */
int program_check(struct spk_card *c, struct program *p, uint32_t *bad_command, char *why);
int step_check(const struct program *p, const uint8_t *params, size_t nbytes, char *why);
void step_bind(struct execution *run);
size_t program_scratch_bytes(const struct program *p);
void program_count_users(struct spk_card *c, const struct program *p, int delta);

/* execute.c: one slice of the current command.  Returns SPK_OK or a fault; *done says whether
 * the command is finished and *waiting whether it could not move. */
int execute_slice(struct spk_card *c, bool *done, bool *waiting);

/* link.c */
int link_exchange(struct spk_card *c, bool *done, bool *waiting);
void link_new_epoch(struct spk_card *c);
void link_release(struct spk_card *c);

/* pool.c: wakes the card's worker if it sleeps. */
void pool_notify(struct spk_card *c);

#endif
