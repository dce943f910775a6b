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
    bool window;            /* nothing of the DDR is its own */
    bool used;              /* the host has written to it, or a program has named it */
    bool lent;              /* its place in the DDR is empty: its bytes are the host's, to be read */
    bool entered;           /* its place in the DDR is a front's, which may have entered it twice */
    uint8_t *memory;        /* its bytes; a window's only while a step runs */
};

struct program {
    struct spk_command *commands;
    struct spk_program_header header;
    uint32_t vocabulary;     /* token ids must be below; 0 when nothing embeds */
    uint32_t kv_pages;       /* page numbers must be below; 0 when nothing attends */
    uint32_t page_positions;
    uint32_t users;          /* submissions queued or running */
    bool quick;              /* bulk operations on little: quicker done than handed to a worker */
    bool brief;              /* meetings alone, over in a millisecond: sooner than a host thread sleeps */
    uint32_t window[SPK_WINDOWS_MAX], window_align[SPK_WINDOWS_MAX], window_count;
    const uint32_t *table; /* while it is loaded: what its buffers are indices into, or NULL */
    size_t table_count;
};

/* A link's ring: one producer, one consumer, positions grow without wrapping. */
struct ring {
    _Alignas(64) _Atomic uint64_t head; /* consumer */
    _Alignas(64) _Atomic uint64_t tail; /* producer */
    _Atomic uint64_t forget;            /* what is before was sent before the producer's restart */
    _Alignas(64) uint8_t data[];
};

/* What both ends of a link share beside the rings. */
struct wire {
    _Atomic uint32_t down; /* ends that want it down */
};

/* A ring in each direction, and where this card is in the messages of both. */
struct way {
    struct ring *tx, *rx;
    uint64_t capacity; /* of each ring, in bytes */
    uint64_t tx_sequence, rx_sequence;
    _Atomic int full; /* somebody waits for room in `rx` */
};

struct link {
    struct way direct; /* no rings where there is no link */
    struct way host;   /* over the host, who is at the other end of both rings; none until needed */
    struct spk_card *peer; /* NULL where it is gone, or far */
    bool far;              /* the other end is in another process, and rings no doorbell */
    struct wire *wire;     /* where the mapping of it and of the direct rings begins */
    uint32_t end; /* 1 or 2: this card's bit in `down` */
    _Atomic uint32_t corrupt; /* so many messages are to leave with a flipped bit */
    _Atomic uint64_t tx_bytes, rx_bytes, errors;
};

/* What a card lets its peers see of the meeting that it is in: meeting.c. */
struct meeting {
    _Alignas(64) _Atomic uint64_t open; /* the key under which peers may work on `memory`, or 0 */
    _Atomic uint64_t done;              /* the key of the last meeting that it has done its share of */
    uint8_t *memory;
    const struct spk_command *work;
    uint32_t number; /* of meetings in this epoch */
    _Alignas(64) _Atomic uint32_t inside; /* it works on its peers' memory */
};

struct submission {
    struct program *program;
    uint8_t *params; /* owned */
    uint8_t *result; /* owned: room for what `reads` bring back */
    struct spk_read reads[SPK_READS_MAX];
    uint32_t read_count;
    struct timeline *timeline; /* of a throttled card: when it ends in the model */
    struct spk_lent lent[SPK_WINDOWS_MAX]; /* in the order of the program's windows */
    uint64_t fence;
    uint32_t epoch; /* an abort that came before the submission spares it */
};

/* The step being executed: pointers into its parameter block, and where it stands. */
struct execution {
    struct submission submission;
    bool active;
    bool held; /* the current command is done, and ends later in the model */
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
    uint8_t *mapping; /* what was mapped; `ddr` is its first multiple of a huge page.  NULL where the
                       * DDR is a front's */
    uint64_t mapping_bytes;
    uint8_t *ddr;
    uint64_t ddr_bytes;
    _Atomic uint8_t *page_state; /* pages.c, one for each huge page of DDR */
    uint64_t huge_pages;
    _Atomic int64_t pages_waited_ns;  /* for huge pages, more than they may take; less: below 0 */
    _Atomic uint64_t to_collapse;     /* so many pages are small and should be huge */
    _Atomic bool small_pages;         /* its weights are lent: what else it is given needs no huge ones */
    _Atomic uint64_t last_write_ns;   /* when a large write last began */
    _Atomic uint64_t ddr_used;
    int event_fd;

    pthread_mutex_t mutex; /* guards the tables, the queue and the completions */
    struct buffer *buffers;
    uint32_t buffer_count, buffer_room;
    struct program *programs[SPK_PROGRAMS_MAX];
    struct submission queue[SPK_QUEUE_MAX];
    uint32_t queue_head, queue_count; /* the running submission stays in the queue */
    struct spk_completion completions[SPK_QUEUE_MAX];
    uint32_t completion_head, completion_count;
    uint8_t *taken_result; /* of the completion that was collected last */
    bool awaited;          /* whoever submitted looks for the completion: it need not be signalled */
    uint64_t next_fence;
    uint64_t known_from; /* fences from here on were given out once the last step had completed */

    /* Touched only by whoever steps the card. */
    struct execution run;
    struct transfer transfers[2 * SPK_CARDS_MAX];
    struct trace trace;
    uint8_t *scratch;
    size_t scratch_bytes;

    struct link *links; /* SPK_CARDS_MAX of them, by peer number */
    uint32_t hosted;    /* so many have a way over the host */
    struct meeting *meeting;
    uint32_t epoch;
    _Atomic uint32_t abort_epoch; /* above `epoch`: an abort is wanted */
    _Atomic int plant;
    _Atomic uint64_t planted; /* spk_card_plant_at: a fault, and below it a command; mostly 0 */
    _Atomic uint64_t slowness; /* what a slow card takes longer, in 65536ths of what it took */
    uint64_t rests_until_ns;   /* and for what it has done; 0 when it does not rest */
    _Atomic int restarts; /* a restart is wanted */
    _Atomic int stepping; /* taken by the worker that steps the card */
    _Atomic int ready;    /* a hint that a step would find work */
    struct pace *pace;    /* its part of a throttle, or NULL */
    _Atomic uint64_t wake_ns; /* after SPK_STEP_PACED: when to try again */
    struct worker *owner; /* the worker that polls the card, or NULL */
    _Atomic bool waits_far; /* what the card waits for comes from another process */

    _Atomic uint64_t commands, steps, ddr_read, ddr_written, busy_ns, progress;
    _Atomic int32_t waiting_for;
    _Atomic uint32_t command, epoch_seen;
};

static inline bool is_transfer(const struct spk_command *cmd)
{
    return cmd->op == SPK_OP_LINK_SEND || cmd->op == SPK_OP_LINK_RECV;
}

static inline uint8_t *card_at(const struct spk_card *c, const struct spk_ref *ref)
{
    return c->buffers[ref->buffer].memory + ref->offset;
}

/* Operations on elements, which run once per step. */
static inline bool is_bulk(const struct spk_command *cmd)
{
    return cmd->op == SPK_OP_REDUCE || cmd->op == SPK_OP_COPY || cmd->op == SPK_OP_DIVIDE;
}

/* A count of 64 bits in two arguments, the lower half first. */
static inline uint64_t bulk_count(const struct spk_command *cmd, int arg)
{
    return cmd->arg[arg] | (uint64_t)cmd->arg[arg + 1] << 32;
}

/* card.c: whoever waits for its completions looks. */
void card_signal(struct spk_card *c);

/* program.c */
int program_check(struct spk_card *c, struct program *p, uint32_t *bad_command, char *why);
/* From indices into `table`, as the program came, to handles: for the check, whose messages tell the
 * host its own numbers, one by one; then for good. */
uint32_t program_handle(const struct program *p, uint32_t buffer);
void program_translate(struct program *p);
int step_check(const struct program *p, const uint8_t *params, size_t nbytes, char *why);
void step_bind(struct execution *run);
size_t program_scratch_bytes(const struct program *p);
void program_count_users(struct spk_card *c, const struct program *p, int delta);
/* The next buffer from *command on, and from *ref of it, that the program may write to, or NULL. */
struct buffer *program_next_written(struct spk_card *c, const struct program *p, uint32_t *command,
                                    int *ref);

/* execute.c: one slice of the current command.  Returns SPK_OK or a fault; *done says whether
 * the command is finished and *waiting whether it could not move. */
int execute_slice(struct spk_card *c, bool *done, bool *waiting);

/* link.c */
int link_exchange(struct spk_card *c, bool *done, bool *waiting);
void link_new_epoch(struct spk_card *c);
/* Nothing that is under way to the card or from it will ever arrive. */
void link_restart(struct spk_card *c);
/* And what it wants and has counted is forgotten. */
void link_renew(struct spk_card *c);
void link_release(struct spk_card *c);
/* The rings of a way to this peer over the host are there from now on; false without memory. */
bool link_host(struct spk_card *c, uint32_t peer);

/* meeting.c: one slice of an ALL_REDUCE, like execute_slice. */
int meet(struct spk_card *c, const struct spk_command *cmd, bool *done, bool *waiting);
/* Closes the card's memory to its peers; false as long as one of them may still work on it. */
bool meeting_left(struct spk_card *c);
/* Whether these cards are all in the same meeting, or have just been. */
bool meeting_is_on(struct spk_card *const *cards, size_t count);
/* The first so many arguments must be alike on all cards. */
#define MEETING_ARGS_ALIKE 5

/* pages.c */
#define SPK_HUGE_PAGE ((uint64_t)2 << 20)
bool pages_reserve(struct spk_card *c);
void pages_release(struct spk_card *c);
/* As after pages_reserve; false when the system has no more memory for it. */
bool pages_renew(struct spk_card *c);
/* Where anyone outside of the engine is about to write all bytes; threads may do so side by side,
 * as long as nothing is freed. */
void pages_before_write(struct spk_card *c, uint8_t *at, uint64_t nbytes);
/* These bytes have been cleared and belong to nobody. */
void pages_freed(struct spk_card *c, uint64_t offset, uint64_t nbytes);
/* From any thread: one of the pages that should be huge becomes it.  False when there is none. */
bool pages_collapse_one(struct spk_card *c);
/* throttle.c.  A step is told to the model when it is queued and when it completes, with the card's
 * mutex held; false without memory.  `pace_completed` returns how long the card computed. */
bool pace_submitted(struct spk_card *c, struct submission *s);
uint64_t pace_completed(struct spk_card *c, struct submission *s, bool succeeded);
/* The modelled end of a command of the running step that is done, or of the step where `command` is
 * behind the last; 0 and `wake_ns` when it is too early. */
uint64_t pace_end_ns(struct spk_card *c, uint32_t command, uint64_t now_ns);
void pace_slow(struct spk_card *c, double factor);
/* The card, which has nothing queued, begins anew, and nothing is under way to it or from it. */
void pace_renew(struct spk_card *c);

/* pool.c: wakes the card's worker if it sleeps. */
void pool_notify(struct spk_card *c);
/* The card has pages to collapse: its pool will see to it some time after the last large write. */
void pool_settle(struct spk_card *c);
/* Until `pool_help` no worker of the card's pool is woken or, `beside` workers, only others than the
 * card's own.  False where someone helps already. */
bool pool_hush(struct spk_card *c, bool beside);
/* Steps the cards of the pool that can be stepped, for a while, and wakes workers for the rest.
 * `beside` workers it stays until the meeting that is on is over. */
void pool_help(struct spk_card *c, bool beside);

#endif
