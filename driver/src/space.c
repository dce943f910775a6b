// SPDX-License-Identifier: GPL-2.0-only
/* Who has which pages of a space: space.h says what for. */
#include <linux/errno.h>

#include "space.h"

static struct spanker_range *to_range(struct rb_node *node)
{
	return rb_entry_safe(node, struct spanker_range, node);
}

void spanker_space_init(struct spanker_space *space, u64 first, u64 count)
{
	space->taken = RB_ROOT;
	space->packed = NULL;
	space->first = first;
	space->end = first + count;
	space->used = 0;
}

static void spanker_range_insert(struct spanker_space *space, struct spanker_range *range)
{
	struct rb_node **link = &space->taken.rb_node, *parent = NULL;

	while (*link) {
		parent = *link;
		link = to_range(parent)->first < range->first ? &parent->rb_right :
								&parent->rb_left;
	}
	rb_link_node(&range->node, parent, link);
	rb_insert_color(&range->node, &space->taken);
}

/* ENOSPC where no piece of that size is free. */
int spanker_range_take(struct spanker_space *space, struct spanker_range *range, u64 count)
{
	struct spanker_range *next, *packed = space->packed;
	u64 at = packed ? packed->first + packed->count : space->first;

	next = to_range(packed ? rb_next(&packed->node) : rb_first(&space->taken));
	while (next && next->first - at < count) {
		at = next->first + next->count;
		next = to_range(rb_next(&next->node));
	}
	if (space->end - at < count)
		return -ENOSPC;
	range->first = at;
	range->count = count;
	spanker_range_insert(space, range);
	space->used += count;

	next = packed ? to_range(rb_next(&packed->node)) : to_range(rb_first(&space->taken));
	at = packed ? packed->first + packed->count : space->first;
	while (next && next->first == at) {
		space->packed = next;
		at = next->first + next->count;
		next = to_range(rb_next(&next->node));
	}
	return 0;
}

void spanker_range_give(struct spanker_space *space, struct spanker_range *range)
{
	if (space->packed && range->first <= space->packed->first)
		space->packed = to_range(rb_prev(&range->node));
	rb_erase(&range->node, &space->taken);
	space->used -= range->count;
	range->count = 0;
}

/* The range that `at` is in, or NULL. */
struct spanker_range *spanker_range_find(struct spanker_space *space, u64 at)
{
	struct rb_node *node = space->taken.rb_node;
	struct spanker_range *range;

	while (node) {
		range = to_range(node);
		if (at < range->first)
			node = node->rb_left;
		else if (at - range->first >= range->count)
			node = node->rb_right;
		else
			return range;
	}
	return NULL;
}
