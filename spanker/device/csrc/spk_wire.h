/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a card that is a process of its own and its host say to each other: docs/api/card-protocol.md.
 *
 * Frames over two streams: on the first a request and its reply, in turn; on the second the card
 * tells of completions as they come.  All little-endian.  Nothing here does input or output.
 */
#ifndef SPK_WIRE_H
#define SPK_WIRE_H

#include <stdint.h>

/* cffi: begin */
#define SPK_WIRE_MAGIC 0x574b5053u /* "SPKW" */
#define SPK_WIRE_VERSION 2
#define SPK_WIRE_REPLY 0x8000u /* added to the kind that it answers */

/* Limits of a frame's body. */
#define SPK_WIRE_DATA_MAX 1048576     /* bytes of memory that one request writes or reads */
#define SPK_WIRE_REQUEST_MAX 8392704  /* of a request: the longest program, and a page */
#define SPK_WIRE_REPLY_MAX 1052672    /* of a reply: SPK_WIRE_DATA_MAX, and a page */
#define SPK_WIRE_TEXT_MAX 255         /* of a reply that refuses */
#define SPK_WIRE_EVENTS_MAX 16384     /* trace events that one request takes */

/* Kinds of frame; behind each what its body is, and that of a reply that does not refuse. */
#define SPK_WIRE_HELLO 1     /* u32 version: struct spk_wire_hello */
#define SPK_WIRE_ALLOC 2     /* u64 bytes: u32 buffer */
#define SPK_WIRE_FREE 3      /* u32 buffer: nothing */
#define SPK_WIRE_WRITE 4     /* struct spk_wire_range, and its bytes: nothing */
#define SPK_WIRE_READ 5      /* struct spk_wire_range: its bytes */
#define SPK_WIRE_LOAD 6      /* a program: u32 program */
#define SPK_WIRE_UNLOAD 7    /* u32 program: nothing */
#define SPK_WIRE_SUBMIT 8    /* struct spk_wire_submit, struct spk_read of each, parameters: u64 fence */
#define SPK_WIRE_ABORT 9     /* u32 epoch: nothing */
#define SPK_WIRE_COUNTERS 10 /* u32 cards: struct spk_counters, struct spk_wire_link of each */
#define SPK_WIRE_TRACE 11    /* u64 events: nothing */
#define SPK_WIRE_EVENTS 12   /* u32 most: u64 lost, struct spk_trace_event of each */
#define SPK_WIRE_PLANT 13    /* struct spk_wire_plant: nothing */
#define SPK_WIRE_LINK 14     /* struct spk_wire_want: nothing */
#define SPK_WIRE_ATTACH 15   /* struct spk_wire_attach, and with its header a file: nothing */
#define SPK_WIRE_DETACH 16   /* u32 peer: nothing */
#define SPK_WIRE_COMPLETION 64 /* on the second stream: struct spk_wire_completion, and its result */

struct spk_wire_header {
    uint32_t magic;
    uint16_t kind;
    uint16_t status;  /* of a reply: SPK_OK, or why it refuses, which its body is the text of */
    uint32_t command; /* of a refused program: which one is at fault */
    uint32_t nbytes;  /* of the body */
};

/* Texts end with a zero. */
struct spk_wire_hello {
    uint32_t version;
    uint16_t abi_major, abi_minor;
    uint32_t semantics;
    uint32_t programs_max;
    uint64_t serial;
    uint64_t ddr_bytes;
    char isa[32];
};

struct spk_wire_range {
    uint32_t buffer;
    uint32_t reserved; /* zero */
    uint64_t offset;
    uint64_t nbytes; /* of a write, those that follow */
};

struct spk_wire_submit {
    uint32_t program;
    uint32_t reads;
};

struct spk_wire_link {
    uint64_t tx_bytes, rx_bytes;
    uint32_t state; /* SPK_LINK_* */
    uint32_t reserved;
};

struct spk_wire_plant {
    uint32_t fault; /* SPK_PLANT_* */
    uint32_t at;    /* 0: at once; 1: when the step gets to `command` */
    uint32_t command;
};

struct spk_wire_want {
    uint32_t peer;
    uint32_t up;
};

struct spk_wire_attach {
    uint32_t peer;
    uint32_t end; /* 1 or 2 */
    uint64_t ring_bytes;
};

struct spk_wire_completion {
    uint64_t fence;
    uint64_t busy_ns;
    uint64_t result_bytes;
    uint32_t status;
    uint32_t command;
};
/* cffi: end */

#endif
