// SPDX-License-Identifier: GPL-2.0-only
/* What happens to a card, told to whoever has it open: read(2) of /dev/spankerN. */
#include <linux/ktime.h>
#include <linux/uaccess.h>

#include "spanker.h"

static_assert(sizeof(struct spanker_event) == 24);
static_assert((SPANKER_EVENTS & (SPANKER_EVENTS - 1)) == 0);

/* May be called with card->queue_lock held. */
void spanker_event_post(struct spanker_card *card, u32 kind, u32 subject, u32 detail)
{
	struct spanker_event event = {
		.time_ns = ktime_get_ns(),
		.kind = kind,
		.subject = subject,
		.detail = detail,
	};
	struct spanker_event *oldest, *next;
	struct spanker_file *file;

	mutex_lock(&card->files_lock);
	list_for_each_entry(file, &card->files, node) {
		if (file->event_tail - file->event_head == SPANKER_EVENTS) {
			oldest = &file->events[file->event_head % SPANKER_EVENTS];
			next = &file->events[(file->event_head + 1) % SPANKER_EVENTS];
			next->lost += oldest->lost + 1;
			WRITE_ONCE(file->event_head, file->event_head + 1);
		}
		file->events[file->event_tail % SPANKER_EVENTS] = event;
		WRITE_ONCE(file->event_tail, file->event_tail + 1);
		wake_up_all(&file->wait);
	}
	mutex_unlock(&card->files_lock);
}

bool spanker_event_ready(struct spanker_file *file)
{
	return READ_ONCE(file->event_tail) != READ_ONCE(file->event_head);
}

/* The oldest event, and its number; false where there is none. */
static bool spanker_event_peek(struct spanker_file *file, u64 *number, struct spanker_event *event)
{
	struct spanker_card *card = file->card;
	bool ready;

	mutex_lock(&card->files_lock);
	ready = spanker_event_ready(file);
	if (ready) {
		*number = file->event_head;
		*event = file->events[file->event_head % SPANKER_EVENTS];
	}
	mutex_unlock(&card->files_lock);
	return ready;
}

static void spanker_event_take(struct spanker_file *file, u64 number, u32 lost)
{
	struct spanker_card *card = file->card;

	mutex_lock(&card->files_lock);
	if (file->event_head == number)
		WRITE_ONCE(file->event_head, number + 1);
	else /* it has been pushed out meanwhile, and counted as lost with those it told of */
		file->events[file->event_head % SPANKER_EVENTS].lost -= lost + 1;
	mutex_unlock(&card->files_lock);
}

ssize_t spanker_event_read(struct file *filp, char __user *to, size_t bytes, loff_t *pos)
{
	struct spanker_file *file = filp->private_data;
	struct spanker_event event;
	ssize_t done = 0, ret;
	u64 number;

	if (bytes < sizeof(event))
		return -EINVAL;
	for (;;) {
		if (!spanker_event_ready(file)) {
			/* What has been told is told, but nothing comes any more. */
			ret = spanker_file_check(file);
			if (ret) {
				/* The last ones are posted before this lock is given up. */
				mutex_lock(&file->card->queue_lock);
				mutex_unlock(&file->card->queue_lock);
				if (spanker_event_ready(file))
					continue;
				return ret;
			}
			if (filp->f_flags & O_NONBLOCK)
				return -EAGAIN;
			if (wait_event_interruptible(file->wait, spanker_event_ready(file) ||
						     spanker_file_check(file)))
				return -ERESTARTSYS;
		}
		if (mutex_lock_interruptible(&file->read_lock))
			return -ERESTARTSYS;
		ret = 0;
		while (bytes - done >= sizeof(event) && spanker_event_peek(file, &number, &event)) {
			if (copy_to_user(to + done, &event, sizeof(event))) {
				ret = -EFAULT;
				break;
			}
			spanker_event_take(file, number, event.lost);
			done += sizeof(event);
		}
		mutex_unlock(&file->read_lock);
		if (done)
			return done;
		if (ret)
			return ret;
	}
}
