/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A card: DDR, a resumable command processor, a bounded in-order queue and links to peers.
 *
 * The host side (alloc, write, load, submit, completion) may be called from any one thread while
 * workers step the card; write and place also from others beside it, as long as nothing is freed.
 * `spk_card_step` is the whole engine: it never blocks, so that one thread can drive any number of
 * cards.  docs/architecture.md has the picture.
 */
#ifndef SPK_CARD_H
#define SPK_CARD_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
#define SPK_PROGRAM_MAGIC 0x474b5053u /* "SPKG" */
#define SPK_PROGRAM_VERSION 1
#define SPK_STEP_MAGIC 0x504b5053u /* "SPKP" */
#define SPK_STEP_VERSION 1

#define SPK_CARDS_MAX 256
#define SPK_BUFFERS_MAX 65536
#define SPK_PROGRAMS_MAX 64
#define SPK_COMMANDS_MAX 65536
#define SPK_QUEUE_MAX 8
#define SPK_STEP_BYTES_MAX 4194304
#define SPK_DDR_ALIGN 64
#define SPK_TOKENS_MAX 65536
#define SPK_READS_MAX 8 /* pieces of memory that a step brings back */
#define SPK_WINDOWS_MAX 4 /* windows that a program names */
#define SPK_LENT_ALIGN 32 /* of what spk_card_lend takes: packed weights are read so */
#define SPK_RESULT_BYTES_MAX 1073741824
#define SPK_TRACE_EVENTS_MAX 16777216

/* Operations.  ref[] and arg[] of each are listed in spanker/kernels/program.py. */
#define SPK_OP_EMBED 1
#define SPK_OP_RMSNORM 2
#define SPK_OP_QUANTIZE 3
#define SPK_OP_MATMUL 4
#define SPK_OP_ROPE 5
#define SPK_OP_KV_APPEND 6
#define SPK_OP_ATTENTION 7
#define SPK_OP_SWIGLU 8
#define SPK_OP_ADD 9
#define SPK_OP_SELECT 10
#define SPK_OP_LOGIT_STATS 11
#define SPK_OP_TOP_K 12
#define SPK_OP_EXCHANGE 13
#define SPK_OP_LINK_SEND 14
#define SPK_OP_LINK_RECV 15
#define SPK_OP_BEST 16
#define SPK_OP_CHOOSE 17
#define SPK_OP_REDUCE 18
#define SPK_OP_COPY 19
#define SPK_OP_DIVIDE 20
#define SPK_OP_ALL_REDUCE 21

/* In place of a token id: the token that CHOOSE left for output i of an earlier step.  So a step
 * can be queued before anyone has seen the token it begins with. */
#define SPK_TOKEN_CHOSEN 0x80000000u

#define SPK_FLAG_OUTPUTS 1u /* rows are the step's outputs, not its tokens */
#define SPK_FLAG_BULK 2u    /* of a transfer: once per step, arg[1] + arg[2] * 2^32 bytes at the ref */
#define SPK_FLAG_HOST 4u    /* of a transfer: over the host, not over the link: spk_card_relay_take */

/* Row t of an operand starts at buffer + offset + t*stride (bytes). */
struct spk_ref {
    uint32_t buffer;
    uint32_t stride;
    uint64_t offset;
};

struct spk_command {
    uint16_t op;
    uint16_t format;
    uint32_t flags;
    struct spk_ref ref[4];
    uint32_t arg[14];
};

struct spk_program_header {
    uint32_t magic;
    uint32_t version;
    uint32_t commands;
    uint32_t tokens_max;
    uint32_t outputs_max;
    uint32_t positions_max;
    uint32_t reserved[2];
};

/* A step's parameters: this header, then u32 token_id[tokens], position[tokens],
 * sequence[tokens], output_token[outputs], f32 inv_temperature[outputs],
 * u32 first_page[sequences + 1], page[pages]. */
struct spk_step_header {
    uint32_t magic;
    uint32_t version;
    uint32_t tokens;
    uint32_t outputs;
    uint32_t sequences;
    uint32_t pages;
    uint32_t reserved[2];
};

/* Memory that a step brings back: copied when the step completes, before the next one starts. */
struct spk_read {
    uint32_t buffer;
    uint32_t reserved; /* zero */
    uint64_t offset;
    uint64_t nbytes;
};

/* Memory of the host's that a window shows from a step's start to its completion. */
struct spk_lent {
    uint32_t window;
    uint32_t reserved; /* zero */
    void *memory;
    uint64_t nbytes;
};

struct spk_completion {
    uint64_t fence;
    uint64_t busy_ns;
    int32_t status;
    uint32_t command;      /* where a fault happened */
    const uint8_t *result; /* the step's reads, one after the other; nothing unless it succeeded */
    uint64_t result_bytes;
};

/* One card's part in a run of several. */
struct spk_part {
    struct spk_card *card;
    uint32_t program;
    uint32_t lent_count;
    struct spk_lent lent[SPK_WINDOWS_MAX]; /* of each the memory is filled in with every run */
    uint64_t fence;                        /* out: 0 where nothing was submitted */
    struct spk_completion completion;      /* out: how it ended, where it is */
    uint32_t done;
};

/* One command of a step as it was executed; an exchange ends when its last message has come. */
struct spk_trace_event {
    uint64_t begin_ns; /* CLOCK_MONOTONIC */
    uint64_t end_ns;
    uint64_t fence;
    uint32_t command;
    uint16_t op;
    uint16_t format;
};

struct spk_counters {
    uint64_t commands;
    uint64_t steps;
    uint64_t ddr_read_bytes;
    uint64_t ddr_written_bytes;
    uint64_t busy_ns;
    uint64_t progress;       /* grows whenever the card gets anything done */
    uint64_t ddr_used_bytes;
    uint64_t ddr_total_bytes;
    uint32_t queued;         /* submissions not completed */
    int32_t waiting_for;     /* peer whose link the card waits on, -1 when it does not */
    uint32_t command;        /* command being executed */
    uint32_t epoch;
};

/* Results of spk_card_step. */
#define SPK_STEP_IDLE 0    /* nothing submitted */
#define SPK_STEP_RAN 1     /* did some work; more may be ready */
#define SPK_STEP_WAITING 2 /* waits for a link */
#define SPK_STEP_PACED 3   /* throttled, and ahead of its time: see spk_card_wake_ns */

/* Faults that a test can plant.  From SPK_PLANT_DIE on the card is lost: every fence completes with the
 * fault's status, and every call that uses the card answers that.  The first of these stays. */
#define SPK_PLANT_NONE 0
#define SPK_PLANT_HANG 1   /* the engine stops making progress */
#define SPK_PLANT_DIE 2    /* SPK_E_LOST */
#define SPK_PLANT_RESET 3  /* SPK_E_RESET */
#define SPK_PLANT_MEMORY 4 /* SPK_E_MEMORY */
#define SPK_COMMAND_ANY 0xffffffffu
#define SPK_SLOWEST 1000000

#define SPK_RELAY_BYTES 66560 /* four messages that a card sends */

#define SPK_LINK_NONE 0 /* nobody at the other end */
#define SPK_LINK_DOWN 1
#define SPK_LINK_WAITS 2 /* for the other end */
#define SPK_LINK_UP 3

/* The speed of a throttled card; a port is what it sends, or receives, over all links together.
 * Speeds may be infinite. */
struct spk_card_speed {
    double memory_bytes_per_s;
    double int8_madds_per_s;
    double float_madds_per_s;
    double elements_per_s;
    double port_bytes_per_s;
    double command_s;
    double step_s;
};

struct spk_link_speed {
    double bytes_per_s;
    double latency_s;
};

/* What a throttled card has done by the model's clock; aborted steps do not count. */
struct spk_pace {
    uint64_t steps;
    double modelled_ns;  /* of all steps, each from when the card could begin */
    double last_step_ns; /* of the last step alone */
    double last_end_ns;  /* when that ended, since the throttle was made */
    double late_ns;      /* how much later than in the model steps really ended, added up */
    double late_ns_max;
};

struct spk_card;
struct spk_pool;
struct spk_throttle;

struct spk_card *spk_card_create(uint64_t ddr_bytes, int isa, int *status);
void spk_card_destroy(struct spk_card *card);
int spk_card_alloc(struct spk_card *card, uint64_t nbytes, uint32_t *handle);
/* A buffer that takes nothing of the DDR: its memory is the host's, lent anew with every step of a
 * program that names it.  Bulk operations and transfers take windows, nothing else does. One that
 * is lent memory for good (spk_card_lend) can be an operand of any operation that only reads it. */
int spk_card_window(struct spk_card *card, uint64_t nbytes, uint32_t *handle);
int spk_card_free(struct spk_card *card, uint32_t handle);
/* From now on the bytes of a buffer are these, until it is freed: all of it, where nothing is queued
 * and no program refers to it.  It takes as much of the DDR as before, a window nothing.  The
 * memory is aligned to SPK_LENT_ALIGN and stays until then.  It is only read: where the host writes
 * to the buffer, or a program that may is loaded, its bytes move into the DDR; a window takes neither. */
int spk_card_lend(struct spk_card *card, uint32_t handle, const void *memory, uint64_t nbytes);
int spk_card_write(struct spk_card *card, uint32_t handle, uint64_t offset, const void *data,
                   uint64_t nbytes);
/* Where these bytes of a buffer are, until it is freed, for a host that writes all of them itself:
 * as after spk_card_write, what they were is lost. */
int spk_card_place(struct spk_card *card, uint32_t handle, uint64_t offset, uint64_t nbytes,
                   void **at);
/* The status that spk_card_read would return, without reading. */
int spk_card_can_read(struct spk_card *card, uint32_t handle, uint64_t offset, uint64_t nbytes);
int spk_card_read(struct spk_card *card, uint32_t handle, uint64_t offset, void *data,
                  uint64_t nbytes);
/* On refusal, *bad_command is the index of the command and `why` (256 bytes) says why. */
int spk_card_load_program(struct spk_card *card, const void *program, size_t nbytes,
                          uint32_t *handle, uint32_t *bad_command, char *why);
int spk_card_unload_program(struct spk_card *card, uint32_t handle);
int spk_card_submit(struct spk_card *card, uint32_t program, const void *params, size_t nbytes,
                    const struct spk_read *reads, size_t read_count, uint64_t *fence, char *why);
/* The same for a program with windows: memory for each of them, which stays where it is until the
 * completion has been collected or the pool has been destroyed. */
int spk_card_submit_lending(struct spk_card *card, uint32_t program, const void *params,
                            size_t nbytes, const struct spk_read *reads, size_t read_count,
                            const struct spk_lent *lent, size_t lent_count, uint64_t *fence,
                            char *why);
/* The same, and where the program is bulk operations on little the calling thread steps the cards
 * of the pool until they are done or wait: waking a worker takes longer than all of it. */
int spk_card_submit_helping(struct spk_card *card, uint32_t program, const void *params,
                            size_t nbytes, const struct spk_read *reads, size_t read_count,
                            const struct spk_lent *lent, size_t lent_count, uint64_t *fence,
                            char *why);
/* One submission to each of these cards of a pool, from the first on until one refuses or has not
 * collected what it was given before.  `memory` is that of all windows, part by part.  The calling
 * thread helps as above, once for all, and collects what is over by then, of which no fd tells.
 * Returns how many have succeeded. */
size_t spk_parts_run(struct spk_part *parts, size_t count, void *const *memory, const void *params,
                     size_t nbytes);
/* 1 and a completion, or 0 when there is none.  Its result stays until the next call.  The fd is
 * an eventfd that polls readable whenever completions wait, and now and then when none does. */
int spk_card_completion(struct spk_card *card, struct spk_completion *out);
int spk_card_fd(struct spk_card *card);
/* Completes everything queued with SPK_E_ABORTED and enters `epoch`; workers do it.  A
 * fault does the same to what is queued behind it, in the same epoch. */
int spk_card_abort(struct spk_card *card, uint32_t epoch);
void spk_card_counters(struct spk_card *card, struct spk_counters *out);
void spk_card_link_bytes(struct spk_card *card, uint32_t peer, uint64_t *tx, uint64_t *rx);
/* Record commands from now on, up to `events` that nobody has read; 0 stops.  Idle cards only. */
int spk_card_trace(struct spk_card *card, uint64_t events);
/* Take up to `most` recorded events, oldest first; how many were lost for want of room so far. */
uint64_t spk_card_trace_read(struct spk_card *card, struct spk_trace_event *out, uint64_t most,
                             uint64_t *lost);
void spk_card_plant(struct spk_card *card, int fault);
/* The same, when the step under way or the next one gets to a command, or to its end where it has
 * fewer; SPK_COMMAND_ANY: as soon as a step is under way.  There is one such fault: a later one takes
 * its place. */
void spk_card_plant_at(struct spk_card *card, int fault, uint32_t command);
/* SPK_OK, or the status with which the card is lost. */
int spk_card_lost(struct spk_card *card);
/* From now on all that the card does takes `factor` times as long, 1 to SPK_SLOWEST: of a throttled
 * card what the model says, of another what a worker takes, who does something else meanwhile. */
void spk_card_slow(struct spk_card *card, double factor);
/* So many more messages to this peer, the next ones, leave with a flipped bit that their CRC does not
 * know of. */
void spk_card_corrupt(struct spk_card *card, uint32_t peer, uint32_t messages);
/* This end of a link wants it up (they begin so) or down; it is up while both want it.  Messages wait
 * in a link that is down. */
void spk_card_link_want(struct spk_card *card, uint32_t peer, int up);
int spk_card_link_state(struct spk_card *card, uint32_t peer);
/* What the card has sent over the host: whole messages to one peer, up to SPK_RELAY_BYTES of them,
 * which that card is to have by spk_card_relay_put.  How many bytes, 0 where there are none; the
 * card's fd polls readable when there are more.  From one thread, which loads the programs, too. */
int spk_card_relays(struct spk_card *card); /* whether there can be any */
size_t spk_card_relay_take(struct spk_card *card, uint32_t *peer, void *messages);
/* Whole messages that a peer has sent over the host.  SPK_E_BUSY where there is no room for them: the
 * fd polls readable when there may be.  SPK_E_ARG where no program takes any from that peer, or for
 * what are no messages: then nothing has been taken. */
int spk_card_relay_put(struct spk_card *card, uint32_t peer, const void *messages, size_t nbytes);
/* As when it was created, whatever has become of it: no buffers, programs and submissions, epoch 1.
 * What was under way on its links is lost; its peers may be at work, and meet it again in an epoch
 * that none of them has been in.  For a card with memory of its own; no other call beside it.  After
 * SPK_E_SYSTEM the card is lost. */
int spk_card_reopen(struct spk_card *card);
/* For those who drive a card without a pool: from one thread, between spk_fp_enter and
 * spk_fp_leave. */
int spk_card_step(struct spk_card *card);
/* After SPK_STEP_PACED: when (CLOCK_MONOTONIC) there may be more to do, if nothing else happens. */
uint64_t spk_card_wake_ns(struct spk_card *card);
/* The same for a card that keeps no bytes: the oldest step completes without having been run. */
int spk_card_skip(struct spk_card *card);
/* The same, and the step fails: those behind it are aborted. */
int spk_card_fail(struct spk_card *card, int status);

/* Two rings between cards numbered number_a and number_b; before the pool starts, or while it is
 * paused. */
int spk_link_connect(struct spk_card *a, uint32_t number_a, struct spk_card *b,
                     uint32_t number_b, uint64_t ring_bytes);
/* The same between two processes: a file of memory that both map, -1 when there is none to be had. */
int spk_link_create(uint64_t ring_bytes);
/* This card's end of it, 1 or 2: the other one is that of card `peer`.  What is left in the rings of
 * somebody who had this end before is forgotten.  The descriptor can be closed afterwards. */
int spk_link_attach(struct spk_card *card, uint32_t peer, int fd, uint32_t end, uint64_t ring_bytes);

/* The same undone: cards are as if they had never been linked.  Nobody steps them, and nothing is
 * queued.  This card's end of a link with another process: */
int spk_link_detach(struct spk_card *card, uint32_t peer);
/* Both ends of one within this process: */
void spk_link_disconnect(struct spk_card *a, uint32_t number_a, struct spk_card *b,
                         uint32_t number_b);

/* Slows cards down to these speeds, by docs/api/timing-model.md: `links[i * count + j]` is the link
 * from cards[i] to cards[j], which must be known to each other by these numbers.  Before the pool
 * starts; destroyed after the pool and before the cards, with nothing queued or never to be run. */
struct spk_throttle *spk_throttle_create(struct spk_card **cards, size_t count,
                                         const struct spk_card_speed *speeds,
                                         const struct spk_link_speed *links, int *status);
void spk_throttle_destroy(struct spk_throttle *throttle);
/* Zeros of a card that is not throttled. */
void spk_card_pace(struct spk_card *card, struct spk_pace *out);

/* `workers` native threads that step `count` cards; destroy stops and joins them. */
struct spk_pool *spk_pool_create(struct spk_card **cards, size_t count, size_t workers,
                                 int *status);
void spk_pool_destroy(struct spk_pool *pool);
/* Between these two no worker steps a card: cards may be linked and added.  For the thread that uses
 * the cards; the first waits for what workers are at, some milliseconds. */
void spk_pool_pause(struct spk_pool *pool);
void spk_pool_resume(struct spk_pool *pool);
/* One more card, stepped by one more worker while there are fewer than `workers`. */
int spk_pool_add(struct spk_pool *pool, struct spk_card *card, size_t workers);
/* cffi: end */

/* --- for a front: whoever lets a host lay out the DDR by itself ------------------------------ */

struct spk_range {
    uint64_t offset; /* in the DDR, a multiple of SPK_DDR_ALIGN */
    uint64_t nbytes;
};

/* A card whose DDR is this memory, which others may see and write, too: aligned to a page, and there
 * until the card has been destroyed.  Where a completion that has not been collected tells of a
 * fault, nothing more is submitted (SPK_E_BUSY): the front knows of it first. */
struct spk_card *spk_card_create_on(void *ddr, uint64_t ddr_bytes, int isa, int *status);
/* Buffers on these ranges, which may overlap and be entered often: all of them, or none.  Freeing them
 * leaves the bytes as they are. */
int spk_card_enter(struct spk_card *card, const struct spk_range *ranges, size_t count,
                   uint32_t *handles);
/* As spk_card_load_program, of a program that names buffers by their index in `table`. */
int spk_card_load_by_table(struct spk_card *card, const void *program, size_t nbytes,
                           const uint32_t *table, size_t table_count, uint32_t *handle,
                           uint32_t *bad_command, char *why);
/* As when it was made, as soon as it is stepped: everything queued completes with SPK_E_ABORTED, what is
 * under way on its links is lost, plants end, and the epoch is 0.  Programs, buffers and bytes stay.
 * Until the counters say `epoch` 0 and nothing queued, nothing else may be asked of the card. */
void spk_card_restart(struct spk_card *card);
/* Messages from this peer that failed their check. */
uint64_t spk_card_link_errors(struct spk_card *card, uint32_t peer);

#endif
