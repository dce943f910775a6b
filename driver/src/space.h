/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Who has which pages of a space: of a card's DDR, of the offsets of a file.
 *
 * First fit, so that low pages are taken first: a small aperture shows as much as it can.  Giving
 * back needs no memory and cannot fail.  The caller locks.
 */
#ifndef SPANKER_SPACE_H
#define SPANKER_SPACE_H

#include <linux/rbtree.h>
#include <linux/types.h>

struct spanker_range {
	struct rb_node node;
	u64 first;
	u64 count;	/* 0: not taken */
};

struct spanker_space {
	struct rb_root taken;
	struct spanker_range *packed;	/* nothing is free before its end; NULL: not known of any */
	u64 first;
	u64 end;
	u64 used;
};

void spanker_space_init(struct spanker_space *space, u64 first, u64 count);
int spanker_range_take(struct spanker_space *space, struct spanker_range *range, u64 count);
void spanker_range_give(struct spanker_space *space, struct spanker_range *range);
struct spanker_range *spanker_range_find(struct spanker_space *space, u64 at);

#endif
