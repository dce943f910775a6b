// SPDX-License-Identifier: GPL-2.0-only
/* Waiting for steps, and taking what they have brought. */
#include <linux/ktime.h>
#include <linux/uaccess.h>

#include "spanker.h"

/* Until when: of a timeout that is below 0 for ever. */
static ktime_t spanker_deadline(s64 timeout_ns)
{
	return timeout_ns < 0 ? KTIME_MAX : ktime_add_safe(ktime_get(), ns_to_ktime(timeout_ns));
}

static ktime_t spanker_left(ktime_t end)
{
	return end == KTIME_MAX ? KTIME_MAX : max_t(ktime_t, ktime_sub(end, ktime_get()), 0);
}

/* A signal: calls without a timeout may be made again, as if nothing had been. */
static int spanker_interrupted(ktime_t end)
{
	return end == KTIME_MAX ? -ERESTARTSYS : -EINTR;
}

/* 0, or why the file will never have another completion. */
static int spanker_no_more(struct spanker_file *file)
{
	enum spanker_state state = spanker_state(file->card);

	if (state == SPANKER_GONE)
		return -ESHUTDOWN;
	if (spanker_stale(file))
		return -ESTALE;
	return state == SPANKER_FAILED ? -EIO : 0;
}

static bool spanker_collectable(struct spanker_file *file)
{
	return READ_ONCE(file->completed) != READ_ONCE(file->collected);
}

/* With file->collect_lock held, so that the oldest step stays what it is: EAGAIN where it is not
 * complete. */
static int spanker_collect_oldest(struct spanker_file *file, struct spanker_collect *arg,
				  struct spanker_collect __user *to)
{
	struct spanker_card *card = file->card;
	struct spanker_job *job;

	mutex_lock(&card->queue_lock);
	job = list_first_entry_or_null(&file->steps, struct spanker_job, step_node);
	if (job && !job->finished)
		job = NULL;
	mutex_unlock(&card->queue_lock);
	if (!job)
		return -EAGAIN;

	if (job->result_bytes > arg->results_bytes) {
		arg->results_bytes = job->result_bytes;
		return copy_to_user(to, arg, sizeof(*arg)) ? -EFAULT : -ENOSPC;
	}
	arg->results_bytes = job->result_bytes;
	arg->fence = job->user_fence;
	arg->busy_ns = job->busy_ns;
	arg->error = job->error;
	arg->command = job->error ? job->detail : 0;
	if (job->result_bytes &&
	    copy_to_user(u64_to_user_ptr(arg->results), job->result, job->result_bytes))
		return -EFAULT;
	if (copy_to_user(to, arg, sizeof(*arg)))
		return -EFAULT;

	mutex_lock(&card->queue_lock);
	list_del_init(&job->step_node);
	file->step_count--;
	file->step_bytes -= job->charged;
	WRITE_ONCE(file->collected, job->user_fence);
	mutex_unlock(&card->queue_lock);
	spanker_job_put(job);
	return 0;
}

int spanker_collect(struct spanker_file *file, struct spanker_collect *arg,
		    struct spanker_collect __user *to, bool nonblock)
{
	ktime_t end = spanker_deadline(nonblock ? 0 : arg->timeout_ns);
	ktime_t left;
	int ret;

	if (arg->flags || arg->reserved)
		return -EINVAL;
	for (;;) {
		if (spanker_collectable(file)) {
			if (mutex_lock_interruptible(&file->collect_lock))
				return spanker_interrupted(end);
			ret = spanker_collect_oldest(file, arg, to);
			mutex_unlock(&file->collect_lock);
			if (ret != -EAGAIN)
				return ret;
			/* Another thread was faster. */
		}
		ret = spanker_no_more(file);
		if (ret) {
			/* What ends with the card is complete before this lock is given up. */
			mutex_lock(&file->card->queue_lock);
			mutex_unlock(&file->card->queue_lock);
			if (!spanker_collectable(file))
				return ret;
		}
		left = spanker_left(end);
		if (!left && !spanker_collectable(file))
			return -EAGAIN;
		ret = wait_event_interruptible_hrtimeout(file->wait,
							 spanker_collectable(file) ||
							 spanker_no_more(file), left);
		if (ret == -ERESTARTSYS)
			return spanker_interrupted(end);
	}
}

static u64 spanker_progress_now(struct spanker_card *card)
{
	u64 progress;

	mutex_lock(&card->queue_lock);
	progress = spanker_progress(card);
	mutex_unlock(&card->queue_lock);
	return progress;
}

static bool spanker_passed(struct spanker_file *file, u64 fence)
{
	return READ_ONCE(file->completed) >= fence;
}

int spanker_wait(struct spanker_file *file, const struct spanker_wait *arg, bool nonblock)
{
	struct spanker_card *card = file->card;
	ktime_t end = spanker_deadline(nonblock ? 0 : arg->timeout_ns);
	u64 submitted, before, after;
	int ret;

	if (arg->flags || arg->reserved || !arg->fence)
		return -EINVAL;
	mutex_lock(&card->queue_lock);
	submitted = file->submitted;
	mutex_unlock(&card->queue_lock);
	if (arg->fence > submitted)
		return -EINVAL;
	if (spanker_passed(file, arg->fence))
		return 0;
	if (!spanker_left(end))
		return -EAGAIN;
	before = spanker_progress_now(card);
	ret = wait_event_interruptible_hrtimeout(file->wait, spanker_passed(file, arg->fence),
						 spanker_left(end));
	if (ret == -ERESTARTSYS)
		return spanker_interrupted(end);
	if (spanker_state(card) == SPANKER_GONE)
		return -ENODEV;
	if (spanker_stale(file))
		return -ESTALE;
	if (spanker_passed(file, arg->fence))
		return 0;
	after = spanker_progress_now(card);
	return before == after ? -ETIMEDOUT : -ETIME;
}
