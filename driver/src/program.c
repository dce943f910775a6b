// SPDX-License-Identifier: GPL-2.0-only
/*
 * Programs: checked, loaded, run, forgotten; and firmware images.
 *
 * What user space hands over is copied before it is looked at, and the copy is what the card gets.
 */
#include <linux/string.h>
#include <linux/uaccess.h>

#include "spanker.h"
#include "stream.h"

static_assert(sizeof(struct sail_command) == 64);
static_assert(sizeof(struct sail_buffer) == 16);
static_assert(sizeof(struct sail_read) == 24);
static_assert(sizeof(struct sail_completion) == 32);
static_assert(SPANKER_WHY_BYTES == SAIL_WHY_BYTES);
static_assert(SPANKER_READS_MAX == SAIL_READS_MAX);
static_assert(SPANKER_PROGRAM_BYTES_MAX <= SAIL_PROGRAM_BYTES_MAX);
static_assert(SPANKER_PARAMETERS_BYTES_MAX <= SAIL_PARAMETERS_BYTES_MAX);

/* --- lifetime -------------------------------------------------------------------------------------- */

/*
 * The last reference.  What is queued from here on comes after the UNLOAD, and memory is cleared by a
 * command before anybody else sees it: so slot and buffers are free at once.
 */
static void spanker_program_release(struct kref *ref)
{
	struct spanker_program *program = container_of(ref, struct spanker_program, ref);
	struct spanker_card *card = program->file->card;
	LIST_HEAD(finished);
	u32 i;

	mutex_lock(&card->queue_lock);
	/* A reset has emptied all slots, and another program may have this. */
	if (program->slot != SPANKER_NO_SLOT && card->slots[program->slot] == program) {
		card->slots[program->slot] = NULL;
		/* A card that has failed forgets it in its reset. */
		if (program->loaded && !spanker_card_usable(card)) {
			program->unload->command.program = cpu_to_le32(program->slot);
			spanker_queue_add(program->unload);
			spanker_queue_pump(card, &finished);
		}
	}
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);

	for (i = 0; i < program->count; i++)
		spanker_buffer_put(program->buffers[i]);
	spanker_job_put(program->unload);
	spanker_file_put(program->file);
	kvfree(program);
}

void spanker_program_put(struct spanker_program *program)
{
	kref_put(&program->ref, spanker_program_release);
}

/* --- load ------------------------------------------------------------------------------------------ */

/* Takes a slot of the card. */
static int spanker_slot_take(struct spanker_program *program)
{
	struct spanker_card *card = program->file->card;
	u32 slot;
	int ret;

	mutex_lock(&card->queue_lock);
	ret = spanker_card_usable(card);
	if (!ret && spanker_stale(program->file))
		ret = -ESTALE;
	if (ret)
		goto unlock;
	ret = -ENOSPC;
	for (slot = 0; slot < card->programs; slot++) {
		if (card->slots[slot])
			continue;
		card->slots[slot] = program;
		program->slot = slot;
		program->generation = card->generation;
		ret = 0;
		break;
	}
unlock:
	mutex_unlock(&card->queue_lock);
	return ret;
}

/* Takes hold of the buffers that the handles name. */
static int spanker_program_name(struct spanker_program *program, const u32 *handles, u32 count)
{
	struct spanker_file *file = program->file;
	struct spanker_buffer *buffer;
	int ret = 0;
	u32 i;

	mutex_lock(&file->lock);
	for (i = 0; i < count; i++) {
		buffer = xa_load(&file->buffers, handles[i]);
		if (!buffer) {
			ret = -ENOENT;
			break;
		}
		if (buffer->kind != SPANKER_BUFFER_DDR) {
			ret = -EINVAL;
			break;
		}
		kref_get(&buffer->ref);
		buffer->programs++;
		program->buffers[program->count++] = buffer;
	}
	mutex_unlock(&file->lock);
	return ret;
}

static void spanker_program_unname(struct spanker_program *program)
{
	u32 i;

	lockdep_assert_held(&program->file->lock);
	for (i = 0; i < program->count; i++)
		program->buffers[i]->programs--;
}

/* That each command names buffers of the program and begins inside of them.  ENOEXEC with the
 * command's index and a reason. */
static int spanker_program_check(const struct spanker_program *program, const void *bytes,
				 size_t size, u32 *command, char *why)
{
	const struct spanker_stream_header *header = bytes;
	const struct spanker_stream_command *commands = bytes + sizeof(*header);
	u32 count, i, j;

	*command = 0;
	if (size < sizeof(*header) ||
	    le32_to_cpu(header->magic) != SPANKER_STREAM_MAGIC ||
	    le32_to_cpu(header->version) != SPANKER_STREAM_VERSION) {
		strscpy(why, "not a program of version 1", SPANKER_WHY_BYTES);
		return -ENOEXEC;
	}
	count = le32_to_cpu(header->commands);
	if (count != (size - sizeof(*header)) / sizeof(*commands) ||
	    size != sizeof(*header) + count * sizeof(*commands)) {
		snprintf(why, SPANKER_WHY_BYTES, "says it has %u commands, but has %zu bytes", count,
			 size);
		return -ENOEXEC;
	}
	for (i = 0; i < count; i++) {
		for (j = 0; j < SPANKER_STREAM_OPERANDS; j++) {
			const struct spanker_stream_operand *operand = &commands[i].operand[j];
			u32 buffer = le32_to_cpu(operand->buffer);
			u64 offset = le64_to_cpu(operand->offset);

			if (!buffer && !offset && !operand->stride)
				continue;
			if (buffer >= program->count)
				snprintf(why, SPANKER_WHY_BYTES,
					 "operand %u names buffer %u of %u", j, buffer,
					 program->count);
			else if (offset >= program->buffers[buffer]->bytes)
				snprintf(why, SPANKER_WHY_BYTES,
					 "operand %u begins at %llu, buffer %u ends at %zu", j,
					 offset, buffer, program->buffers[buffer]->bytes);
			else
				continue;
			*command = i;
			return -ENOEXEC;
		}
	}
	return 0;
}

static int spanker_program_send(struct spanker_program *program, const void *bytes, size_t size,
				u32 *command, char *why)
{
	struct spanker_card *card = program->file->card;
	struct sail_buffer *table;
	struct spanker_job *job;
	int ret = -ENOMEM;
	u32 i;

	table = kvmalloc_array(program->count, sizeof(*table), GFP_KERNEL_ACCOUNT);
	job = spanker_job_new(card, SAIL_OP_LOAD);
	if (!table || !job)
		goto free;
	for (i = 0; i < program->count; i++) {
		table[i].address = cpu_to_le64(program->buffers[i]->ddr.first << PAGE_SHIFT);
		table[i].bytes = cpu_to_le64(program->buffers[i]->bytes);
	}
	job->command.program = cpu_to_le32(program->slot);
	job->command.table_count = cpu_to_le32(program->count);
	job->result_bytes = SAIL_WHY_BYTES;
	job->loader = program->file;
	job->charged = size + program->count * sizeof(*table);
	kref_get(&program->ref);
	job->program = program;
	ret = spanker_queue_with(job, bytes, size, table, program->count * sizeof(*table));
	if (ret)
		kref_put(&program->ref, spanker_program_release);
	else
		ret = spanker_job_wait(job);
	if (ret == -ENOEXEC) {
		*command = job->detail;
		memcpy(why, job->result, SAIL_WHY_BYTES);
		why[SPANKER_WHY_BYTES - 1] = 0;
	}
free:
	if (job)
		spanker_job_put(job);
	kvfree(table);
	return ret;
}

static struct spanker_program *spanker_program_new(struct spanker_file *file, u32 count)
{
	struct spanker_program *program;

	program = kvzalloc(struct_size(program, buffers, count), GFP_KERNEL_ACCOUNT);
	if (!program)
		return NULL;
	kref_init(&program->ref);
	program->unload = spanker_job_new(file->card, SAIL_OP_UNLOAD);
	if (!program->unload) {
		kvfree(program);
		return NULL;
	}
	kref_get(&file->ref);
	program->file = file;
	program->slot = SPANKER_NO_SLOT;
	return program;
}

int spanker_program_load(struct spanker_file *file, struct spanker_program_load *arg)
{
	struct spanker_program *program;
	u32 *handles = NULL;
	char *why = NULL;
	void *bytes;
	int ret;

	if (arg->flags)
		return -EINVAL;
	if (!arg->program_bytes || arg->program_bytes > SPANKER_PROGRAM_BYTES_MAX ||
	    arg->handle_count > SAIL_TABLE_MAX)
		return -EINVAL;
	bytes = vmemdup_user(u64_to_user_ptr(arg->program), arg->program_bytes);
	if (IS_ERR(bytes))
		return PTR_ERR(bytes);
	if (arg->handle_count) {
		handles = vmemdup_user(u64_to_user_ptr(arg->handles),
				       arg->handle_count * sizeof(*handles));
		if (IS_ERR(handles)) {
			ret = PTR_ERR(handles);
			handles = NULL;
			goto free;
		}
	}
	ret = -ENOMEM;
	why = kzalloc(SPANKER_WHY_BYTES, GFP_KERNEL_ACCOUNT);
	program = why ? spanker_program_new(file, arg->handle_count) : NULL;
	if (!program)
		goto free;

	ret = spanker_program_name(program, handles, arg->handle_count);
	if (!ret)
		ret = spanker_program_check(program, bytes, arg->program_bytes, &arg->command,
					    why);
	if (!ret) {
		ret = spanker_slot_take(program);
		if (!ret)
			ret = spanker_program_send(program, bytes, arg->program_bytes,
						   &arg->command, why);
	}
	mutex_lock(&file->lock);
	if (!ret)
		ret = xa_alloc(&file->programs, &program->id, program, XA_LIMIT(1, INT_MAX),
			       GFP_KERNEL_ACCOUNT);
	if (ret)
		spanker_program_unname(program);
	else /* without the lock another thread may unload it */
		arg->program_id = program->id;
	mutex_unlock(&file->lock);
	if (ret)
		spanker_program_put(program);
	if (ret == -ENOEXEC && arg->why &&
	    copy_to_user(u64_to_user_ptr(arg->why), why, SPANKER_WHY_BYTES))
		ret = -EFAULT;
free:
	kfree(why);
	kvfree(handles);
	kvfree(bytes);
	return ret;
}

int spanker_program_unload(struct spanker_file *file, const struct spanker_program_unload *arg)
{
	struct spanker_card *card = file->card;
	struct spanker_program *program;
	int ret = 0;

	if (arg->flags)
		return -EINVAL;
	mutex_lock(&file->lock);
	program = xa_load(&file->programs, arg->program_id);
	if (!program) {
		ret = -ENOENT;
		goto unlock;
	}
	mutex_lock(&card->queue_lock);
	if (program->queued)
		ret = -EBUSY;
	mutex_unlock(&card->queue_lock);
	if (ret)
		goto unlock;
	xa_erase(&file->programs, program->id);
	spanker_program_unname(program);
unlock:
	mutex_unlock(&file->lock);
	if (!ret)
		spanker_program_put(program);
	return ret;
}

/* --- run ------------------------------------------------------------------------------------------- */

/* The index of the buffer in the program's table, or below 0. */
static int spanker_program_find(const struct spanker_program *program, u32 handle)
{
	u32 i;

	for (i = 0; i < program->count; i++)
		if (program->buffers[i]->handle == handle)
			return i;
	return -1;
}

static int spanker_reads_check(const struct spanker_program *program,
			       const struct spanker_read *reads, u32 count,
			       struct sail_read *table, size_t *bytes)
{
	const struct spanker_buffer *buffer;
	u32 i;
	int at;

	*bytes = 0;
	for (i = 0; i < count; i++) {
		if (reads[i].reserved)
			return -EINVAL;
		at = spanker_program_find(program, reads[i].handle);
		if (at < 0)
			return -ENOENT;
		buffer = program->buffers[at];
		if (reads[i].offset > buffer->bytes ||
		    reads[i].bytes > buffer->bytes - reads[i].offset)
			return -EINVAL;
		if (reads[i].bytes > SPANKER_READ_BYTES_MAX - *bytes)
			return -EINVAL;
		*bytes += reads[i].bytes;
		table[i].buffer = cpu_to_le32(at);
		table[i].reserved = 0;
		table[i].offset = cpu_to_le64(reads[i].offset);
		table[i].bytes = cpu_to_le64(reads[i].bytes);
	}
	return 0;
}

int spanker_submit(struct spanker_file *file, struct spanker_submit *arg)
{
	struct spanker_read reads[SPANKER_READS_MAX];
	struct sail_read table[SPANKER_READS_MAX];
	struct spanker_card *card = file->card;
	struct spanker_program *program;
	struct spanker_job *job;
	void *parameters;
	int ret;

	if (arg->flags || arg->read_count > SPANKER_READS_MAX)
		return -EINVAL;
	if (!arg->parameters_bytes || arg->parameters_bytes > SPANKER_PARAMETERS_BYTES_MAX)
		return -EINVAL;
	if (copy_from_user(reads, u64_to_user_ptr(arg->reads),
			   arg->read_count * sizeof(reads[0])))
		return -EFAULT;
	parameters = vmemdup_user(u64_to_user_ptr(arg->parameters), arg->parameters_bytes);
	if (IS_ERR(parameters))
		return PTR_ERR(parameters);

	mutex_lock(&file->lock);
	program = xa_load(&file->programs, arg->program_id);
	if (program)
		kref_get(&program->ref);
	mutex_unlock(&file->lock);
	ret = -ENOENT;
	if (!program)
		goto free;
	ret = -ENOMEM;
	job = spanker_job_new(card, SAIL_OP_RUN);
	if (!job)
		goto put;
	ret = spanker_reads_check(program, reads, arg->read_count, table, &job->result_bytes);
	if (ret)
		goto put_job;
	job->command.program = cpu_to_le32(program->slot);
	job->command.table_count = cpu_to_le32(arg->read_count);
	job->command.stream = cpu_to_le32(file->stream);
	job->charged = arg->parameters_bytes + job->result_bytes;
	job->file = file;
	job->program = program;
	ret = spanker_queue_with(job, parameters, arg->parameters_bytes, table,
				 arg->read_count * sizeof(table[0]));
	if (!ret) {
		program = NULL;	/* the queue's now */
		arg->fence = job->user_fence;
	}
put_job:
	spanker_job_put(job);
put:
	if (program)
		spanker_program_put(program);
free:
	kvfree(parameters);
	return ret;
}

/* --- firmware -------------------------------------------------------------------------------------- */

int spanker_image(struct spanker_file *file, const struct spanker_image *arg)
{
	struct spanker_card *card = file->card;
	struct spanker_job *job;
	void *bytes;
	int ret;

	if (arg->flags || arg->reserved)
		return -EINVAL;
	if (!arg->image_bytes || arg->image_bytes > SPANKER_IMAGE_BYTES_MAX)
		return -EINVAL;
	if (!(card->capabilities & SAIL_CAP_IMAGE))
		return -ENODEV;
	bytes = vmemdup_user(u64_to_user_ptr(arg->image), arg->image_bytes);
	if (IS_ERR(bytes))
		return PTR_ERR(bytes);
	job = spanker_job_new(card, SAIL_OP_IMAGE);
	ret = -ENOMEM;
	if (job) {
		job->loader = file;
		job->charged = arg->image_bytes;
		ret = spanker_queue_with(job, bytes, arg->image_bytes, NULL, 0);
		if (!ret)
			ret = spanker_job_wait(job);
		spanker_job_put(job);
	}
	kvfree(bytes);
	return ret;
}
