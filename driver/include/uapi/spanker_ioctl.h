/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * The user interface of the spanker kernel module: /dev/spankerctl and /dev/spanker0, 1, ...
 *
 * docs/api/uapi.md has the rules.  In short: every structure has the same layout for 32- and 64-bit
 * programs; padding and reserved fields are explicit and must be zero, else EINVAL; so must flags
 * that are not defined here; numbers are never used again for something else; a field is marked
 * [in], [out] or [in/out] with its unit.  Pointers are carried in __u64.
 */
#ifndef _UAPI_SPANKER_IOCTL_H
#define _UAPI_SPANKER_IOCTL_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define SPANKER_UAPI_MAJOR 0
#define SPANKER_UAPI_MINOR 2
#define SPANKER_UAPI_PATCH 0

#define SPANKER_IOC_MAGIC 0xE3

/* --- on /dev/spankerctl and on every card; the first two as they have always been ---------------- */

/* Does nothing: the module is there. */
#define SPANKER_IOC_PING _IO(SPANKER_IOC_MAGIC, 0x01)

struct spanker_version {
	__u16 major;    /* [out] another one than the caller's: do not go on */
	__u16 minor;    /* [out] */
	__u16 patch;    /* [out] */
	__u16 reserved; /* [out] 0 */
};
#define SPANKER_IOC_GET_VERSION _IOR(SPANKER_IOC_MAGIC, 0x02, struct spanker_version)

/* --- on a card ------------------------------------------------------------------------------------ */

#define SPANKER_TEXT_BYTES 16

/* Of struct spanker_info.flags. */
#define SPANKER_INFO_EMULATED 0x1 /* a program, no silicon */
#define SPANKER_INFO_FAILED 0x2   /* nothing works until a reset */
#define SPANKER_INFO_GONE 0x4     /* taken out: nothing will ever work */

struct spanker_info {
	__u32 number;      /* [out] N of /dev/spankerN */
	__u32 flags;       /* [out] SPANKER_INFO_* */
	__u64 serial;      /* [out] unique, the same for ever */
	__u64 ddr_bytes;   /* [out] memory of the card */
	__u64 ddr_free;    /* [out] bytes that nobody has taken; perhaps not in one piece */
	__u64 mappable;    /* [out] bytes of the DDR, from its beginning, that mmap can show */
	__u32 card_major;  /* [out] of the interface of the card (spanker_card.h) */
	__u32 card_minor;  /* [out] */
	__u32 semantics;   /* [out] version of the kernel semantics */
	__u32 programs;    /* [out] program slots of the card */
	__u32 links;       /* [out] links, numbered from 0 */
	__u32 generation;  /* [out] resets since the module found the card */
	__u32 queue_max;   /* [out] steps of one file that may be queued or uncollected */
	__u32 epoch;       /* [out] the last one entered */
	char sku[SPANKER_TEXT_BYTES];  /* [out] zero-filled; no zero at the end where it is full */
	char name[SPANKER_TEXT_BYTES]; /* [out] */
	char isa[SPANKER_TEXT_BYTES];  /* [out] what its kernels are compiled for */
	__u64 reserved[4]; /* [out] 0 */
};
#define SPANKER_IOC_INFO _IOR(SPANKER_IOC_MAGIC, 0x10, struct spanker_info)

/* Buffers live until they are destroyed or the file is closed, whoever has mapped them longer.  A
 * buffer is all zeros at first. */
#define SPANKER_BUFFER_DDR 0  /* memory of the card, below `mappable` while there is room */
#define SPANKER_BUFFER_HOST 1 /* memory of the host that the card reaches: for results and staging */

struct spanker_buffer_create {
	__u64 bytes;       /* [in] more than 0; taken in whole pages */
	__u32 kind;        /* [in] SPANKER_BUFFER_* */
	__u32 flags;       /* [in] 0 */
	__u32 handle;      /* [out] never 0 */
	__u32 reserved;    /* [in] 0 */
	__u64 mmap_offset; /* [out] for mmap of this file: all of the buffer; 0 where it cannot be */
	__u64 address;     /* [out] in the card's DDR, for people; 0 of host memory */
};
#define SPANKER_IOC_BUFFER_CREATE _IOWR(SPANKER_IOC_MAGIC, 0x11, struct spanker_buffer_create)

/* EBUSY while a program names it. */
struct spanker_buffer_destroy {
	__u32 handle; /* [in] */
	__u32 flags;  /* [in] 0 */
};
#define SPANKER_IOC_BUFFER_DESTROY _IOW(SPANKER_IOC_MAGIC, 0x12, struct spanker_buffer_destroy)

/* Keep a program on the card.  Its commands name buffers by their index in `handles`: the module
 * checks that each is a DDR buffer of this file and that every operand begins inside of it, the card
 * that it ends there.  ENOEXEC where the card refuses, with `command` and `why`. */
#define SPANKER_WHY_BYTES 256

struct spanker_program_load {
	__u64 program;       /* [in] pointer to the program's bytes */
	__u64 program_bytes; /* [in] at most SPANKER_PROGRAM_BYTES_MAX */
	__u64 handles;       /* [in] pointer to __u32[handle_count] */
	__u32 handle_count;  /* [in] */
	__u32 flags;         /* [in] 0 */
	__u64 why;           /* [in] pointer to SPANKER_WHY_BYTES of text that is filled, or 0 */
	__u32 program_id;    /* [out] never 0 */
	__u32 command;       /* [out] where it was refused: the command's index */
};
#define SPANKER_IOC_PROGRAM_LOAD _IOWR(SPANKER_IOC_MAGIC, 0x13, struct spanker_program_load)
#define SPANKER_PROGRAM_BYTES_MAX (4 << 20)

/* EBUSY while it is queued. */
struct spanker_program_unload {
	__u32 program_id; /* [in] */
	__u32 flags;      /* [in] 0 */
};
#define SPANKER_IOC_PROGRAM_UNLOAD _IOW(SPANKER_IOC_MAGIC, 0x14, struct spanker_program_unload)

/* Bytes of a DDR buffer of this file that a step brings back, copied when it completes. */
struct spanker_read {
	__u32 handle; /* [in] named by the program's `handles` */
	__u32 reserved; /* [in] 0 */
	__u64 offset; /* [in] bytes */
	__u64 bytes;  /* [in] */
};

/* Queue a step of a program behind those before it.  Never waits: EBUSY where the queue is full. */
struct spanker_submit {
	__u32 program_id;       /* [in] */
	__u32 flags;            /* [in] 0 */
	__u64 parameters;       /* [in] pointer to the step's parameters */
	__u32 parameters_bytes; /* [in] at most SPANKER_PARAMETERS_BYTES_MAX */
	__u32 read_count;       /* [in] at most SPANKER_READS_MAX */
	__u64 reads;            /* [in] pointer to struct spanker_read[read_count] */
	__u64 fence;            /* [out] counts up from 1 for each file */
};
#define SPANKER_IOC_SUBMIT _IOWR(SPANKER_IOC_MAGIC, 0x15, struct spanker_submit)
#define SPANKER_PARAMETERS_BYTES_MAX (1 << 20)
#define SPANKER_READS_MAX 8
#define SPANKER_READ_BYTES_MAX (4 << 20) /* of all reads of a step together */

/* Take the oldest completion of this file, in the order of submission.  EAGAIN where none is there
 * within the time; ESHUTDOWN once the file can have no more, because the card is gone and all has
 * been taken. */
struct spanker_collect {
	__s64 timeout_ns;     /* [in] 0: do not wait; below 0: for ever */
	__u64 results;        /* [in] pointer to where the bytes of the step's reads go */
	__u64 results_bytes;  /* [in] room there; [out] their number.  ENOSPC where it is too little, and
			       * nothing is taken */
	__u64 fence;          /* [out] */
	__u64 busy_ns;        /* [out] time that the card worked on it */
	__s32 error;          /* [out] 0; or -EINVAL, -EIO, -EDOM, -ERANGE, -ECANCELED, -ENODEV, -EBADMSG */
	__u32 command;        /* [out] with an error: the index of the command */
	__u32 flags;          /* [in] 0 */
	__u32 reserved;       /* [in] 0 */
};
#define SPANKER_IOC_COLLECT _IOWR(SPANKER_IOC_MAGIC, 0x16, struct spanker_collect)

/* Wait until a fence of this file is complete, without taking anything.  ETIME says that the step is
 * slow: it made progress within the time; ETIMEDOUT that it is hung: it made none.  EAGAIN where the
 * time was over before it had begun. */
struct spanker_wait {
	__u64 fence;      /* [in] */
	__s64 timeout_ns; /* [in] below 0: for ever */
	__u32 flags;      /* [in] 0 */
	__u32 reserved;   /* [in] 0 */
};
#define SPANKER_IOC_WAIT _IOW(SPANKER_IOC_MAGIC, 0x17, struct spanker_wait)

/* Enter a higher epoch: all that is queued on the card completes with ECANCELED, and its links drop
 * what belongs to earlier ones.  EBUSY where another file has steps queued: they would go, too. */
struct spanker_abort {
	__u32 epoch; /* [in] */
	__u32 flags; /* [in] 0 */
};
#define SPANKER_IOC_ABORT _IOW(SPANKER_IOC_MAGIC, 0x18, struct spanker_abort)

/* Reset the card.  All that is queued completes with ENODEV; programs and the contents of DDR buffers
 * are lost.  Files that were open before can only be closed: everything else is ESTALE. */
#define SPANKER_IOC_RESET _IO(SPANKER_IOC_MAGIC, 0x19)

/* As in the original system. */
#define SPANKER_LINK_DOWN 0
#define SPANKER_LINK_TRAINING 1
#define SPANKER_LINK_UP 2
#define SPANKER_LINK_ERROR 3

struct spanker_link {
	__u32 link;     /* [in] */
	__u32 flags;    /* [in] 0 */
	__u32 state;    /* [out] SPANKER_LINK_* */
	__u32 errors;   /* [out] messages that failed their check since the reset */
	__u64 peer;     /* [out] serial number at the other end, 0 where nobody is */
	__u64 tx_bytes; /* [out] since the reset */
	__u64 rx_bytes; /* [out] */
};
#define SPANKER_IOC_LINK _IOWR(SPANKER_IOC_MAGIC, 0x1a, struct spanker_link)

struct spanker_link_control {
	__u32 link; /* [in] */
	__u32 up;   /* [in] 1: bring it up, 0: take it down */
};
#define SPANKER_IOC_LINK_CONTROL _IOW(SPANKER_IOC_MAGIC, 0x1b, struct spanker_link_control)

struct spanker_telemetry {
	__s32 temperature_mc;    /* [out] thousandths of a degree Celsius */
	__u32 ecc_corrected;     /* [out] since the reset */
	__u32 ecc_uncorrected;   /* [out] */
	__u32 waiting_for;       /* [out] link that the running step waits for, or ~0 */
	__u64 steps;             /* [out] */
	__u64 commands;          /* [out] */
	__u64 busy_ns;           /* [out] */
	__u64 ddr_read_bytes;    /* [out] */
	__u64 ddr_written_bytes; /* [out] */
	__u32 progress;          /* [out] grows whenever the card gets anything done */
	__u32 queued;            /* [out] steps of all files that are not complete */
	__u64 ddr_used;          /* [out] bytes taken by all files */
	__u64 reserved[4];       /* [out] 0 */
};
#define SPANKER_IOC_TELEMETRY _IOR(SPANKER_IOC_MAGIC, 0x1c, struct spanker_telemetry)

/* Give the card a firmware image, which it keeps until a reset.  ENODEV where it takes none. */
struct spanker_image {
	__u64 image;       /* [in] pointer */
	__u64 image_bytes; /* [in] at most SPANKER_IMAGE_BYTES_MAX */
	__u32 flags;       /* [in] 0 */
	__u32 reserved;    /* [in] 0 */
};
#define SPANKER_IOC_IMAGE _IOW(SPANKER_IOC_MAGIC, 0x1d, struct spanker_image)
#define SPANKER_IMAGE_BYTES_MAX (4 << 20)

/* --- read(2): events ---------------------------------------------------------------------------------
 * Whole records, oldest first, of what happened since the file was opened; EINVAL for less room than
 * one.  Blocks unless O_NONBLOCK.  A file that does not read loses the oldest; `lost` counts them. */
#define SPANKER_EVENT_FAILED 1 /* the card needs a reset; detail: enum sail_failure */
#define SPANKER_EVENT_RESET 2  /* it has been reset; detail: the new generation */
#define SPANKER_EVENT_GONE 3
#define SPANKER_EVENT_LINK 4   /* subject: the link; detail: its state */
#define SPANKER_EVENT_ECC 5    /* detail: corrected errors; subject: uncorrected ones */
#define SPANKER_EVENT_HOT 6    /* detail: thousandths of a degree */

struct spanker_event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 kind;    /* SPANKER_EVENT_* */
	__u32 subject;
	__u32 detail;
	__u32 lost;    /* events before this one that the file has lost */
};

/* poll(2): POLLIN while COLLECT would find something, POLLPRI while read would, POLLERR once the card
 * has failed or the file is stale, POLLHUP once it is gone. */

#endif
