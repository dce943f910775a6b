/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The layout of a program, as far as the module looks into it: a header, then commands.  What they
 * mean is between user space and the card; the module sees to it that they name buffers of the file
 * and begin inside of them.  The card's side of it is spk_card.h.
 */
#ifndef SPANKER_STREAM_H
#define SPANKER_STREAM_H

#include <linux/build_bug.h>
#include <linux/types.h>

#define SPANKER_STREAM_MAGIC 0x474b5053	/* "SPKG" */
#define SPANKER_STREAM_VERSION 1
#define SPANKER_STREAM_OPERANDS 4

struct spanker_stream_header {
	__le32 magic;
	__le32 version;
	__le32 commands;
	__le32 tokens_max;
	__le32 outputs_max;
	__le32 positions_max;
	__le32 reserved[2];
};
static_assert(sizeof(struct spanker_stream_header) == 32);

/* All zeros where the command has no such operand. */
struct spanker_stream_operand {
	__le32 buffer;
	__le32 stride;
	__le64 offset;
};
static_assert(sizeof(struct spanker_stream_operand) == 16);

struct spanker_stream_command {
	__le16 op;
	__le16 format;
	__le32 flags;
	struct spanker_stream_operand operand[SPANKER_STREAM_OPERANDS];
	__le32 arg[14];
};
static_assert(sizeof(struct spanker_stream_command) == 128);

#endif
