/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The host interface of a Sail card: registers, rings, commands, completions, events.
 *
 * This is the one statement of it.  The kernel driver, the card model and its tests include it, and
 * docs/api/card-registers.md says what each part means and what a card does on bad input.  Everything
 * is little-endian; registers are 32 bits wide, aligned and accessed as such; of a pair _LO/_HI the
 * lower half is written first, and takes effect when the upper half is.
 */
#ifndef SPANKER_CARD_H
#define SPANKER_CARD_H

#include <linux/types.h>

/* --- version --------------------------------------------------------------------------------
 * A driver works with a card of its own major version whose minor version is its own or higher.  */
#define SAIL_VERSION_MAJOR 1
#define SAIL_VERSION_MINOR 0

/* --- PCI: placeholders until the boards have ids of their own --------------------------------- */
#define SAIL_PCI_VENDOR 0xDEAD
#define SAIL_PCI_DEVICE 0xBEEF
#define SAIL_PCI_CLASS 0x120000 /* processing accelerator */
#define SAIL_BAR_REGISTERS 0    /* 64 KiB */
#define SAIL_BAR_DDR 2          /* the aperture: the first bytes of the card's DDR */
#define SAIL_BAR_MSIX 4
#define SAIL_REGISTERS_BYTES 0x10000

/* MSI-X vectors. */
#define SAIL_VECTOR_COMPLETION 0
#define SAIL_VECTOR_EVENT 1
#define SAIL_VECTORS 2

/* --- identification, read only ------------------------------------------------------------------ */
#define SAIL_REG_MAGIC 0x000 /* "SAIL" */
#define SAIL_MAGIC 0x4c494153
#define SAIL_REG_VERSION 0x004 /* major << 16 | minor */
#define SAIL_REG_CAPABILITIES 0x008
#define SAIL_CAP_EMULATED 0x00000001 /* a program, no silicon */
#define SAIL_CAP_FAULTS 0x00000002   /* has the fault registers */
#define SAIL_CAP_ECC 0x00000004      /* counts errors of its DDR */
#define SAIL_CAP_IMAGE 0x00000008    /* takes a firmware image */
#define SAIL_REG_SERIAL_LO 0x010     /* unique, the same for ever */
#define SAIL_REG_SERIAL_HI 0x014
#define SAIL_REG_DDR_LO 0x018 /* bytes */
#define SAIL_REG_DDR_HI 0x01c
#define SAIL_REG_APERTURE_LO 0x020 /* bytes of the DDR that BAR 2 shows */
#define SAIL_REG_APERTURE_HI 0x024
#define SAIL_REG_SEMANTICS 0x028 /* version of the kernel semantics */
#define SAIL_REG_PROGRAMS 0x02c  /* program slots */
#define SAIL_REG_LINKS 0x030     /* links, and so peers, at most SAIL_LINKS_MAX */
#define SAIL_REG_SKU 0x040       /* 16 bytes of ASCII, zero-filled, e.g. "POPC_16A" */
#define SAIL_REG_NAME 0x050      /* 16 bytes, e.g. "InnerJib7EA" */
#define SAIL_REG_ISA 0x060       /* 16 bytes: what its kernels are compiled for */
#define SAIL_TEXT_BYTES 16
#define SAIL_LINKS_MAX 64

/* --- control ---------------------------------------------------------------------------------- */
#define SAIL_REG_CONTROL 0x080
#define SAIL_CONTROL_RESET 0x1  /* write 1: reset; reads as 0 */
#define SAIL_CONTROL_ENABLE 0x2 /* the rings are set up: work */
#define SAIL_REG_STATUS 0x084   /* read only */
#define SAIL_STATUS_READY 0x1   /* out of reset */
#define SAIL_STATUS_RUNNING 0x2 /* enabled, and the rings were good */
#define SAIL_STATUS_FAILED 0x4  /* a fault that only a reset ends; REG_FAILURE says which */
#define SAIL_REG_GENERATION 0x088 /* resets since power-on; read only */
#define SAIL_REG_FAILURE 0x08c    /* enum sail_failure; read only */
#define SAIL_REG_WATCHDOG_MS 0x090 /* a command that makes no progress for so long fails the card; 0: never */
#define SAIL_REG_PROGRESS 0x094    /* grows whenever anything gets done; read only */
#define SAIL_REG_RUNNING 0x098     /* lower 32 bits of the fence being executed, 0 when idle */
#define SAIL_REG_COMMAND 0x09c     /* index of the command being executed */
#define SAIL_REG_WAITING 0x0a0     /* the link that it waits for, or SAIL_NO_LINK */
#define SAIL_NO_LINK 0xffffffff
#define SAIL_REG_EPOCH 0x0a4       /* write a higher one: abort what is queued and enter it */

enum sail_failure {
	SAIL_FAILURE_NONE = 0,
	SAIL_FAILURE_RING = 1,     /* a ring's address, size or index made no sense */
	SAIL_FAILURE_DMA = 2,      /* the host's memory could not be reached */
	SAIL_FAILURE_ECC = 3,      /* an error of the DDR that could not be corrected */
	SAIL_FAILURE_WATCHDOG = 4,
	SAIL_FAILURE_INTERNAL = 5,
};

/* --- rings ----------------------------------------------------------------------------------------
 * Both lie in the host's memory.  Indices count up and wrap at 2**32; entry i is at i % entries.
 * Bases and sizes may be written only while CONTROL_ENABLE is 0.  */
#define SAIL_REG_COMMAND_BASE_LO 0x100 /* a multiple of 64 */
#define SAIL_REG_COMMAND_BASE_HI 0x104
#define SAIL_REG_COMMAND_ENTRIES 0x108 /* a power of two, 2 to SAIL_RING_ENTRIES_MAX */
#define SAIL_REG_COMMAND_TAIL 0x10c    /* doorbell: entries written by the host */
#define SAIL_REG_COMMAND_HEAD 0x110    /* entries fetched by the card; read only */
#define SAIL_REG_COMPLETION_BASE_LO 0x118
#define SAIL_REG_COMPLETION_BASE_HI 0x11c
#define SAIL_REG_COMPLETION_ENTRIES 0x120
#define SAIL_REG_COMPLETION_HEAD 0x124 /* entries taken by the host */
#define SAIL_REG_COMPLETION_TAIL 0x128 /* entries written by the card; read only */
#define SAIL_RING_ENTRIES_MAX 1024

/* --- interrupts of the event vector ------------------------------------------------------------ */
#define SAIL_REG_EVENTS 0x180      /* causes; write 1 to clear */
#define SAIL_REG_EVENTS_MASK 0x184 /* causes that interrupt */
#define SAIL_EVENT_FAILED 0x1
#define SAIL_EVENT_LINK 0x2
#define SAIL_EVENT_ECC 0x4
#define SAIL_EVENT_HOT 0x8
#define SAIL_EVENT_ALL 0xf

/* --- telemetry, read only; 64-bit counters since the last reset --------------------------------- */
#define SAIL_REG_TEMPERATURE_MC 0x200 /* of the chip, thousandths of a degree Celsius, signed */
#define SAIL_REG_ECC_CORRECTED 0x204
#define SAIL_REG_ECC_UNCORRECTED 0x208
#define SAIL_REG_STEPS_LO 0x210
#define SAIL_REG_STEPS_HI 0x214
#define SAIL_REG_COMMANDS_LO 0x218
#define SAIL_REG_COMMANDS_HI 0x21c
#define SAIL_REG_BUSY_NS_LO 0x220
#define SAIL_REG_BUSY_NS_HI 0x224
#define SAIL_REG_DDR_READ_LO 0x228
#define SAIL_REG_DDR_READ_HI 0x22c
#define SAIL_REG_DDR_WRITTEN_LO 0x230
#define SAIL_REG_DDR_WRITTEN_HI 0x234

/* --- links: a block for each, at SAIL_REG_LINK(i) ------------------------------------------------ */
#define SAIL_REG_LINK(i) (0x1000 + 0x40 * (i))
#define SAIL_LINK_STATE 0x00   /* enum sail_link_state; read only */
#define SAIL_LINK_CONTROL 0x04 /* write: 1 bring it up, 0 take it down */
#define SAIL_LINK_PEER_LO 0x08 /* serial number at the other end, 0 where nobody is */
#define SAIL_LINK_PEER_HI 0x0c
#define SAIL_LINK_TX_LO 0x10 /* bytes */
#define SAIL_LINK_TX_HI 0x14
#define SAIL_LINK_RX_LO 0x18
#define SAIL_LINK_RX_HI 0x1c
#define SAIL_LINK_ERRORS 0x20 /* messages that failed their check */

/* As in the original system. */
enum sail_link_state {
	SAIL_LINK_DOWN = 0,
	SAIL_LINK_TRAINING = 1,
	SAIL_LINK_UP = 2,
	SAIL_LINK_ERROR = 3,
};

/* --- faults: for tests, where SAIL_CAP_FAULTS is set ---------------------------------------------- */
#define SAIL_REG_FAULT 0xf000 /* write an enum sail_fault; a reset ends all but GONE */
#define SAIL_REG_FAULT_ARG 0xf004

enum sail_fault {
	SAIL_FAULT_NONE = 0,
	SAIL_FAULT_HANG = 1,       /* work is accepted and never done */
	SAIL_FAULT_SLOW = 2,       /* every completion comes ARG microseconds late */
	SAIL_FAULT_GONE = 3,       /* every read answers all ones, and nothing is done any more */
	SAIL_FAULT_CORRECTED = 4,  /* ARG corrected errors */
	SAIL_FAULT_UNCORRECTED = 5,
	SAIL_FAULT_COMPLETION = 6, /* the next completion has a wrong fence */
	SAIL_FAULT_FLAP = 7,       /* link ARG goes down, and up again after 10 ms */
	SAIL_FAULT_HOT = 8,        /* ARG thousandths of a degree */
};

/* --- commands -------------------------------------------------------------------------------------
 * Executed one after the other, each finished before the next begins; each has one completion.  */
enum sail_op {
	SAIL_OP_NOP = 0,
	SAIL_OP_LOAD = 1,   /* keep a program: check it against the buffers of its table */
	SAIL_OP_UNLOAD = 2,
	SAIL_OP_RUN = 3,    /* a step of a program */
	SAIL_OP_FILL = 4,   /* clear memory of the card */
	SAIL_OP_IMAGE = 5,  /* take a firmware image */
};

struct sail_command {
	__le32 op;
	__le32 program;      /* slot: LOAD, UNLOAD, RUN */
	__le64 fence;        /* comes back in the completion; higher than the one before, not 0 */
	__le64 data;         /* LOAD: the program; RUN: the parameters of the step; IMAGE: the image */
	__le64 data_bytes;   /* FILL: bytes of DDR from `result` on */
	__le64 table;        /* LOAD: struct sail_buffer[]; RUN: struct sail_read[] */
	__le32 table_count;
	__le32 stream;       /* RUN: where a step fails, those of its stream that are in the ring behind
			      * it are aborted; otherwise zero */
	__le64 result;       /* where the card writes: LOAD: 256 bytes of text saying why it refuses;
			      * RUN: what `table` reads, one after the other; FILL: the address in DDR */
	__le64 result_bytes;
};

/* A buffer that a program names by its index in the table. */
struct sail_buffer {
	__le64 address; /* in the card's DDR, a multiple of 64 */
	__le64 bytes;
};

/* Bytes of a table's buffer that a step brings back when it completes. */
struct sail_read {
	__le32 buffer;
	__le32 reserved;
	__le64 offset;
	__le64 bytes;
};

#define SAIL_TABLE_MAX 65536
#define SAIL_READS_MAX 8
#define SAIL_PROGRAM_BYTES_MAX (16 << 20)
#define SAIL_PARAMETERS_BYTES_MAX (4 << 20)
#define SAIL_WHY_BYTES 256

/* --- completions ----------------------------------------------------------------------------------- */
enum sail_status {
	SAIL_OK = 0,
	SAIL_E_INVALID = 1,  /* the command makes no sense; `detail` is the byte offset of the field */
	SAIL_E_REFUSED = 2,  /* LOAD: the program; `detail` is the index of its command at fault */
	SAIL_E_PARAMETERS = 3, /* RUN: the parameters, or a read outside of its buffer */
	SAIL_E_FAULT = 4,    /* RUN: command `detail` met a value that it cannot go on with */
	SAIL_E_ABORTED = 5,
	SAIL_E_DMA = 6,
	SAIL_E_NO_MEMORY = 7, /* of the card's own, or of its slots */
	SAIL_E_NUMERIC = 8,  /* RUN: command `detail` met a NaN or an infinity */
	SAIL_E_RANGE = 9,    /* RUN: command `detail`: a value does not fit into f16 */
	SAIL_E_LINK = 10,    /* RUN: command `detail`: a message failed its check, or came out of turn */
};

struct sail_completion {
	__le64 fence;
	__le64 busy_ns;  /* RUN: time spent working */
	__le32 status;
	__le32 detail;
	__le32 index;    /* of this entry: completions written before it, plus 1; never 0 */
	__le32 reserved;
};

#endif
