// SPDX-License-Identifier: GPL-2.0-only
/*
 * The queue of a card: commands in the order in which they were given, through the command ring, and
 * their completions.
 *
 * A job is pending until the ring has room, then in flight until its completion has come, then
 * finished.  The card answers in order, and a completion that is not the one of the oldest job in
 * flight means that the card is broken.  Memory that the card writes to is given back when the job
 * has finished; what it wrote is kept in memory of the kernel's own, so that results which nobody
 * collects hold no memory of DMA and survive the card.
 */
#include <linux/sched/signal.h>

#include "spanker.h"
#include "trace.h"

/* Jobs whose data, table and result are no more than this share one piece of memory. */
#define SPANKER_PACKED_BYTES (256 << 10)

struct spanker_job *spanker_job_new(struct spanker_card *card, u32 op)
{
	struct spanker_job *job = kzalloc(sizeof(*job), GFP_KERNEL_ACCOUNT);

	if (!job)
		return NULL;
	kref_init(&job->ref);
	INIT_LIST_HEAD(&job->node);
	INIT_LIST_HEAD(&job->step_node);
	INIT_LIST_HEAD(&job->limbo_node);
	job->card = card;
	job->command.op = cpu_to_le32(op);
	init_completion(&job->done);
	return job;
}

static void spanker_job_release(struct kref *ref)
{
	struct spanker_job *job = container_of(ref, struct spanker_job, ref);

	kvfree(job->result);
	kfree(job);
}

void spanker_job_put(struct spanker_job *job)
{
	kref_put(&job->ref, spanker_job_release);
}

/* --- memory that the card reaches -------------------------------------------------------------- */

static int spanker_block_alloc(struct spanker_card *card, struct spanker_block *block, size_t bytes)
{
	block->cpu = dma_alloc_coherent(&card->pci->dev, bytes, &block->dma,
					GFP_KERNEL | __GFP_NOWARN);
	if (!block->cpu)
		return -ENOMEM;
	block->bytes = bytes;
	return 0;
}

static void spanker_blocks_free(struct spanker_job *job)
{
	struct spanker_block *block;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(job->blocks); i++) {
		block = &job->blocks[i];
		if (block->cpu)
			dma_free_coherent(&job->card->pci->dev, block->bytes, block->cpu,
					  block->dma);
		block->cpu = NULL;
	}
}

/* A job whose blocks cannot be freed yet stays with them. */
void spanker_limbo_free(struct spanker_card *card)
{
	struct spanker_job *job, *next;

	list_for_each_entry_safe(job, next, &card->limbo, limbo_node) {
		list_del_init(&job->limbo_node);
		spanker_blocks_free(job);
		spanker_job_put(job);
	}
}

/* --- what goes in ------------------------------------------------------------------------------- */

static bool spanker_is_step(struct spanker_job *job)
{
	return job->command.op == cpu_to_le32(SAIL_OP_RUN);
}

void spanker_queue_add(struct spanker_job *job)
{
	struct spanker_card *card = job->card;
	struct spanker_file *file = job->file;

	lockdep_assert_held(&card->queue_lock);
	kref_get(&job->ref);
	list_add_tail(&job->node, &card->pending);
	if (job->loader) {
		kref_get(&job->loader->ref);
		job->loader->load_bytes += job->charged;
	}
	if (!spanker_is_step(job))
		return;
	card->queued++;
	job->program->queued++;
	kref_get(&job->ref);
	list_add_tail(&job->step_node, &file->steps);
	file->step_count++;
	file->step_bytes += job->charged;
	file->queued++;
	job->user_fence = ++file->submitted;
}

/* What alone is more than the limit may go on, but alone. */
static bool spanker_too_much(size_t bytes, size_t more)
{
	return bytes && bytes + more > (size_t)spanker_queue_mib << 20;
}

/* Whether the file may have one more step queued, or one more program or image on its way. */
static int spanker_room(struct spanker_job *job)
{
	struct spanker_file *file = job->file;

	if (job->loader && spanker_too_much(job->loader->load_bytes, job->charged))
		return -EBUSY;
	if (file && (file->step_count >= spanker_queue_max ||
		     spanker_too_much(file->step_bytes, job->charged)))
		return -EBUSY;
	return 0;
}

/* The queue holds the job, and what the job names, until it has finished; on an error nothing. */
int spanker_queue(struct spanker_job *job)
{
	struct spanker_card *card = job->card;
	LIST_HEAD(finished);
	int ret;

	mutex_lock(&card->queue_lock);
	ret = spanker_card_usable(card);
	/* A slot means another program after a reset, or none. */
	if (!ret && job->program && job->program->generation != card->generation)
		ret = -ESTALE;
	if (!ret && job->loader && spanker_stale(job->loader))
		ret = -ESTALE;
	if (!ret)
		ret = spanker_room(job);
	if (!ret) {
		spanker_queue_add(job);
		spanker_queue_pump(card, &finished);
	}
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
	return ret;
}

static int spanker_blocks_fill(struct spanker_job *job, const void *data, size_t data_bytes,
			       const void *table, size_t table_bytes)
{
	size_t table_at = ALIGN(data_bytes, 64);
	size_t result_at = table_at + ALIGN(table_bytes, 64);
	struct spanker_block *part[3];
	size_t at[3] = { 0 };
	unsigned int i;
	int ret;

	if (result_at + job->result_bytes <= SPANKER_PACKED_BYTES) {
		ret = spanker_block_alloc(job->card, &job->blocks[0],
					  result_at + job->result_bytes);
		if (ret)
			return ret;
		for (i = 0; i < 3; i++)
			part[i] = &job->blocks[0];
		at[1] = table_at;
		at[2] = result_at;
	} else {
		const size_t bytes[3] = { data_bytes, table_bytes, job->result_bytes };

		for (i = 0; i < 3; i++) {
			part[i] = &job->blocks[i];
			ret = bytes[i] ? spanker_block_alloc(job->card, part[i], bytes[i]) : 0;
			if (ret) {
				spanker_blocks_free(job);
				return ret;
			}
		}
	}

	memcpy(part[0]->cpu + at[0], data, data_bytes);
	job->command.data = cpu_to_le64(part[0]->dma + at[0]);
	job->command.data_bytes = cpu_to_le64(data_bytes);
	if (table_bytes) {
		memcpy(part[1]->cpu + at[1], table, table_bytes);
		job->command.table = cpu_to_le64(part[1]->dma + at[1]);
	}
	if (job->result_bytes) {
		job->written = part[2]->cpu + at[2];
		job->command.result = cpu_to_le64(part[2]->dma + at[2]);
		job->command.result_bytes = cpu_to_le64(job->result_bytes);
	}
	return 0;
}

/* The same for a job with data, which are copied, and a result of job->result_bytes. */
int spanker_queue_with(struct spanker_job *job, const void *data, size_t data_bytes,
		       const void *table, size_t table_bytes)
{
	struct spanker_card *card = job->card;
	int ret;

	if (job->result_bytes) {
		job->result = kvzalloc(job->result_bytes, GFP_KERNEL_ACCOUNT);
		if (!job->result)
			return -ENOMEM;
	}
	/* Until the queue has the blocks, nobody else knows of them. */
	down_read(&card->plug);
	ret = card->unplugged ? -ENODEV : 0;
	if (!ret)
		ret = spanker_blocks_fill(job, data, data_bytes, table, table_bytes);
	if (!ret) {
		ret = spanker_queue(job);
		if (ret)
			spanker_blocks_free(job);
	}
	up_read(&card->plug);
	return ret;
}

/* `limbo`: the card may yet write to the job's memory. */
static void spanker_job_finish(struct spanker_job *job, int error, bool limbo,
			       struct list_head *finished)
{
	struct spanker_card *card = job->card;
	struct spanker_file *file = job->file;
	u32 op = le32_to_cpu(job->command.op);

	lockdep_assert_held(&card->queue_lock);
	job->error = error;
	if (job->written && (!error || (op == SAIL_OP_LOAD && error == -ENOEXEC)))
		memcpy(job->result, job->written, job->result_bytes);
	else if (op == SAIL_OP_RUN)
		job->result_bytes = 0;
	job->written = NULL;
	if (limbo) {
		kref_get(&job->ref);
		list_add_tail(&job->limbo_node, &card->limbo);
	} else {
		spanker_blocks_free(job);
	}
	if (job->loader)
		job->loader->load_bytes -= job->charged;
	if (op == SAIL_OP_LOAD && !error)
		job->program->loaded = true;
	if (op == SAIL_OP_RUN)
		job->program->queued--;
	/* Who is woken below may unload or destroy them, and wants what they had to be free then.  The
	 * last reference is dropped without the lock. */
	if (job->program && refcount_dec_not_one(&job->program->ref.refcount))
		job->program = NULL;
	if (job->buffer && refcount_dec_not_one(&job->buffer->ref.refcount))
		job->buffer = NULL;
	trace_spanker_complete(card->number, op, job->fence, error, job->detail, job->busy_ns);
	card->finished++;
	job->finished = true;
	if (file) {
		card->queued--;
		file->queued--;
		WRITE_ONCE(file->completed, job->user_fence);
		wake_up_all(&file->wait);
	}
	list_move_tail(&job->node, finished);
}

/* Gives the card what it has room for. */
void spanker_queue_pump(struct spanker_card *card, struct list_head *finished)
{
	u32 tail = card->command_tail;
	struct spanker_job *job;

	lockdep_assert_held(&card->queue_lock);
	while (card->state == SPANKER_READY && !list_empty(&card->pending)) {
		job = list_first_entry(&card->pending, struct spanker_job, node);
		if (job->cancelled) {
			/* Not before those that were aborted on the card: fences stay in order. */
			if (card->inflight_count)
				break;
			spanker_job_finish(job, -ECANCELED, false, finished);
			continue;
		}
		if (card->inflight_count == SPANKER_RING_ENTRIES)
			break;
		job->fence = ++card->fence;
		job->command.fence = cpu_to_le64(job->fence);
		card->commands[tail++ % SPANKER_RING_ENTRIES] = job->command;
		list_move_tail(&job->node, &card->inflight);
		card->inflight_count++;
		trace_spanker_submit(card->number, le32_to_cpu(job->command.op),
				     le32_to_cpu(job->command.program), job->fence,
				     card->inflight_count);
	}
	if (tail != card->command_tail) {
		card->command_tail = tail;
		/* Orders the ring before the doorbell. */
		spanker_write32(card, SAIL_REG_COMMAND_TAIL, tail);
	}
}

/* --- what comes back ----------------------------------------------------------------------------- */

/* What a status of an operation is to a program; one that the operation cannot have is EIO. */
static int spanker_error(u32 op, u32 status)
{
	switch (status) {
	case SAIL_OK:
		return 0;
	case SAIL_E_NO_MEMORY:
		return -ENOMEM;
	case SAIL_E_REFUSED:
		return op == SAIL_OP_LOAD ? -ENOEXEC : -EIO;
	}
	if (op != SAIL_OP_RUN)
		return -EIO;
	switch (status) {
	case SAIL_E_PARAMETERS:
		return -EINVAL;
	case SAIL_E_ABORTED:
		return -ECANCELED;
	case SAIL_E_NUMERIC:
		return -EDOM;
	case SAIL_E_RANGE:
		return -ERANGE;
	case SAIL_E_LINK:
		return -EBADMSG;
	default:
		return -EIO;
	}
}

/* Whether the card ends the steps of this stream that it has, too. */
static bool spanker_takes_others(struct spanker_job *job, u32 status)
{
	return spanker_is_step(job) && job->file &&
	       (status == SAIL_E_FAULT || status == SAIL_E_NUMERIC || status == SAIL_E_RANGE ||
		status == SAIL_E_LINK);
}

/* Steps that the card does not have yet: of a file, or all. */
static void spanker_queue_cancel(struct spanker_card *card, struct spanker_file *file)
{
	struct spanker_job *job;

	list_for_each_entry(job, &card->pending, node) {
		if (!spanker_is_step(job) || (file && job->file != file))
			continue;
		job->cancelled = true;
		/* It may wait for long for its turn to be told. */
		job->written = NULL;
		spanker_blocks_free(job);
	}
	/* Those that the card was given after it failed, but before anybody knew, it does run. */
	if (!file)
		return;
	list_for_each_entry(job, &card->inflight, node)
		if (job->file == file)
			job->cancelled = true;
}

/* Takes what the card has answered. */
void spanker_queue_completions(struct spanker_card *card, struct list_head *finished)
{
	u32 head = card->completion_head;
	struct sail_completion entry;
	struct spanker_job *job;
	int error;

	lockdep_assert_held(&card->queue_lock);
	while (card->state == SPANKER_READY) {
		struct sail_completion *at = &card->completions[head % SPANKER_RING_ENTRIES];

		/* 0 is no index, so that of all entries the last before the wrap has none. */
		if (head + 1 ? le32_to_cpu(READ_ONCE(at->index)) != head + 1 :
			       spanker_read32(card, SAIL_REG_COMPLETION_TAIL) == head)
			break;
		/* The rest of an entry is there once its index is. */
		dma_rmb();
		entry = *at;
		head++;

		job = list_first_entry_or_null(&card->inflight, struct spanker_job, node);
		if (!job || le64_to_cpu(entry.fence) != job->fence) {
			dev_err(&card->pci->dev,
				"%s: completion %u is of fence %llu instead of %llu\n",
				dev_name(&card->dev), head, le64_to_cpu(entry.fence),
				job ? job->fence : 0);
			spanker_card_fail(card, SAIL_FAILURE_INTERNAL, finished);
			break;
		}
		card->inflight_count--;
		job->busy_ns = le64_to_cpu(entry.busy_ns);
		job->detail = le32_to_cpu(entry.detail);
		error = job->cancelled ? -ECANCELED :
					 spanker_error(le32_to_cpu(job->command.op),
						       le32_to_cpu(entry.status));
		if (spanker_takes_others(job, le32_to_cpu(entry.status)))
			spanker_queue_cancel(card, job->file);
		spanker_job_finish(job, error, false, finished);
		if (error && job->command.op == cpu_to_le32(SAIL_OP_UNLOAD)) {
			/* The program's memory may be somebody else's already. */
			dev_err(&card->pci->dev, "%s: does not forget program %u: %d\n",
				dev_name(&card->dev), le32_to_cpu(job->command.program), error);
			spanker_card_fail(card, SAIL_FAILURE_INTERNAL, finished);
		}
	}
	if (card->state == SPANKER_READY && head != card->completion_head) {
		card->completion_head = head;
		spanker_write32(card, SAIL_REG_COMPLETION_HEAD, head);
		spanker_queue_pump(card, finished);
	}
}

/* Ends all that is queued. */
void spanker_queue_flush(struct spanker_card *card, int error, bool limbo,
			 struct list_head *finished)
{
	struct spanker_job *job, *next;

	lockdep_assert_held(&card->queue_lock);
	list_for_each_entry_safe(job, next, &card->inflight, node)
		spanker_job_finish(job, error, limbo, finished);
	card->inflight_count = 0;
	list_for_each_entry_safe(job, next, &card->pending, node)
		spanker_job_finish(job, error, false, finished);
}

/* Ends all steps; the card says so of those that it has. */
void spanker_queue_abort(struct spanker_card *card, u32 epoch, struct list_head *finished)
{
	lockdep_assert_held(&card->queue_lock);
	spanker_queue_cancel(card, NULL);
	card->epoch = epoch;
	spanker_write32(card, SAIL_REG_EPOCH, epoch);
	spanker_queue_pump(card, finished);
}

void spanker_finish(struct list_head *finished)
{
	struct spanker_job *job, *next;

	list_for_each_entry_safe(job, next, finished, node) {
		struct spanker_program *program = job->program;
		struct spanker_buffer *buffer = job->buffer;
		struct spanker_file *loader = job->loader;

		list_del_init(&job->node);
		job->program = NULL;
		job->buffer = NULL;
		job->loader = NULL;
		complete_all(&job->done);
		if (program)
			spanker_program_put(program);
		if (buffer)
			spanker_buffer_put(buffer);
		if (loader)
			spanker_file_put(loader);
		spanker_job_put(job);
	}
}

/* --- waiting --------------------------------------------------------------------------------------- */

/* Another value whenever the card has got anything done. */
u64 spanker_progress(struct spanker_card *card)
{
	lockdep_assert_held(&card->queue_lock);
	if (card->state == SPANKER_GONE)
		return 0;
	return (u64)lower_32_bits(card->finished) << 32 | spanker_read32(card, SAIL_REG_PROGRESS);
}

/* Nobody waits for it any more: what the card does not have yet it does not get. */
static void spanker_job_withdraw(struct spanker_job *job)
{
	struct spanker_card *card = job->card;
	LIST_HEAD(finished);

	mutex_lock(&card->queue_lock);
	if (!job->finished && !job->fence)
		spanker_job_finish(job, -ECANCELED, false, &finished);
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
}

/* A reset ends what is queued with ENODEV; to a call that means ESTALE. */
static int spanker_job_error(struct spanker_job *job)
{
	if (job->error == -ENODEV && spanker_state(job->card) != SPANKER_GONE)
		return -ESTALE;
	return job->error;
}

/* Until the job has finished, however long the card works on what is before it; but not on a card
 * that does nothing. */
int spanker_job_wait(struct spanker_job *job)
{
	struct spanker_card *card = job->card;
	u64 before, after;
	long left;

	if (try_wait_for_completion(&job->done))
		return spanker_job_error(job);
	mutex_lock(&card->queue_lock);
	before = spanker_progress(card);
	mutex_unlock(&card->queue_lock);
	for (;;) {
		left = wait_for_completion_interruptible_timeout(&job->done,
								 msecs_to_jiffies(spanker_stall_ms));
		if (left < 0) {
			spanker_job_withdraw(job);
			return -ERESTARTSYS;
		}
		if (left > 0)
			return spanker_job_error(job);
		mutex_lock(&card->queue_lock);
		after = spanker_progress(card);
		mutex_unlock(&card->queue_lock);
		if (after == before) {
			spanker_job_withdraw(job);
			return -ETIMEDOUT;
		}
		before = after;
	}
}
