// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/spankerN: open files, their calls, and what becomes of everything when they are closed.
 *
 * Each call is copied in, checked, done, copied out; locks are held only in between.
 */
#include <linux/poll.h>
#include <linux/sched.h>
#include <linux/uaccess.h>

#include "spanker.h"

static_assert(sizeof(struct spanker_version) == 8);
static_assert(sizeof(struct spanker_info) == 152);
static_assert(sizeof(struct spanker_buffer_create) == 40);
static_assert(sizeof(struct spanker_buffer_destroy) == 8);
static_assert(sizeof(struct spanker_program_load) == 48);
static_assert(sizeof(struct spanker_program_unload) == 8);
static_assert(sizeof(struct spanker_read) == 24);
static_assert(sizeof(struct spanker_submit) == 40);
static_assert(sizeof(struct spanker_collect) == 56);
static_assert(sizeof(struct spanker_wait) == 24);
static_assert(sizeof(struct spanker_abort) == 8);
static_assert(sizeof(struct spanker_link) == 40);
static_assert(sizeof(struct spanker_link_control) == 8);
static_assert(sizeof(struct spanker_telemetry) == 104);
static_assert(sizeof(struct spanker_image) == 24);

/* 0, or why the file can only be closed. */
int spanker_file_check(struct spanker_file *file)
{
	if (spanker_state(file->card) == SPANKER_GONE)
		return -ENODEV;
	return spanker_stale(file) ? -ESTALE : 0;
}

/* The card's state has changed. */
void spanker_files_wake(struct spanker_card *card)
{
	struct spanker_file *file;

	mutex_lock(&card->files_lock);
	list_for_each_entry(file, &card->files, node)
		wake_up_all(&file->wait);
	mutex_unlock(&card->files_lock);
}

/* --- calls that only ask ----------------------------------------------------------------------- */

static int spanker_call_info(struct spanker_file *file, void *data, void __user *to, bool nonblock)
{
	struct spanker_card *card = file->card;
	struct spanker_info *info = data;

	memset(info, 0, sizeof(*info));
	info->number = card->number;
	info->serial = card->serial;
	info->ddr_bytes = card->ddr_bytes;
	info->mappable = card->mappable;
	info->card_major = card->version >> 16;
	info->card_minor = card->version & 0xffff;
	info->semantics = card->semantics;
	info->programs = card->programs;
	info->links = card->links;
	info->queue_max = spanker_queue_max;
	memcpy(info->sku, card->sku, sizeof(info->sku));
	memcpy(info->name, card->name, sizeof(info->name));
	memcpy(info->isa, card->isa, sizeof(info->isa));
	if (card->capabilities & SAIL_CAP_EMULATED)
		info->flags |= SPANKER_INFO_EMULATED;

	mutex_lock(&card->queue_lock);
	info->generation = card->generation;
	info->epoch = card->epoch;
	if (card->state == SPANKER_FAILED)
		info->flags |= SPANKER_INFO_FAILED;
	if (card->state == SPANKER_GONE)
		info->flags |= SPANKER_INFO_GONE;
	mutex_unlock(&card->queue_lock);
	mutex_lock(&card->ddr_lock);
	info->ddr_free = card->ddr_bytes - (card->ddr.used << PAGE_SHIFT);
	mutex_unlock(&card->ddr_lock);
	return 0;
}

/* Runs `ask` where the card has registers, and does not believe one that answers all ones. */
static int spanker_ask(struct spanker_file *file,
		       void (*ask)(struct spanker_card *card, void *data), void *data)
{
	struct spanker_card *card = file->card;
	LIST_HEAD(finished);
	int ret;

	mutex_lock(&card->queue_lock);
	ret = spanker_file_check(file);
	if (!ret && card->away)
		ret = -EIO;
	if (!ret) {
		ask(card, data);
		if (spanker_read32(card, SAIL_REG_STATUS) == U32_MAX) {
			spanker_card_gone(card, &finished);
			ret = -ENODEV;
		}
	}
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
	return ret;
}

static void spanker_ask_telemetry(struct spanker_card *card, void *data)
{
	struct spanker_telemetry *telemetry = data;

	telemetry->temperature_mc = spanker_read32(card, SAIL_REG_TEMPERATURE_MC);
	telemetry->ecc_corrected = spanker_read32(card, SAIL_REG_ECC_CORRECTED);
	telemetry->ecc_uncorrected = spanker_read32(card, SAIL_REG_ECC_UNCORRECTED);
	telemetry->waiting_for = spanker_read32(card, SAIL_REG_WAITING);
	telemetry->steps = spanker_read64(card, SAIL_REG_STEPS_LO);
	telemetry->commands = spanker_read64(card, SAIL_REG_COMMANDS_LO);
	telemetry->busy_ns = spanker_read64(card, SAIL_REG_BUSY_NS_LO);
	telemetry->ddr_read_bytes = spanker_read64(card, SAIL_REG_DDR_READ_LO);
	telemetry->ddr_written_bytes = spanker_read64(card, SAIL_REG_DDR_WRITTEN_LO);
	telemetry->progress = spanker_read32(card, SAIL_REG_PROGRESS);
	telemetry->queued = card->queued;
}

static int spanker_call_telemetry(struct spanker_file *file, void *data, void __user *to,
				  bool nonblock)
{
	struct spanker_telemetry *telemetry = data;
	struct spanker_card *card = file->card;

	memset(telemetry, 0, sizeof(*telemetry));
	mutex_lock(&card->ddr_lock);
	telemetry->ddr_used = card->ddr.used << PAGE_SHIFT;
	mutex_unlock(&card->ddr_lock);
	return spanker_ask(file, spanker_ask_telemetry, telemetry);
}

static void spanker_ask_link(struct spanker_card *card, void *data)
{
	struct spanker_link *link = data;
	u32 at = SAIL_REG_LINK(link->link);

	link->state = spanker_read32(card, at + SAIL_LINK_STATE);
	link->errors = spanker_read32(card, at + SAIL_LINK_ERRORS);
	link->peer = spanker_read64(card, at + SAIL_LINK_PEER_LO);
	link->tx_bytes = spanker_read64(card, at + SAIL_LINK_TX_LO);
	link->rx_bytes = spanker_read64(card, at + SAIL_LINK_RX_LO);
}

static int spanker_call_link(struct spanker_file *file, void *data, void __user *to, bool nonblock)
{
	struct spanker_link *link = data;

	if (link->flags || link->link >= file->card->links)
		return -EINVAL;
	return spanker_ask(file, spanker_ask_link, link);
}

/* --- calls that change the card ----------------------------------------------------------------- */

static void spanker_ask_link_control(struct spanker_card *card, void *data)
{
	struct spanker_link_control *control = data;

	spanker_write32(card, SAIL_REG_LINK(control->link) + SAIL_LINK_CONTROL, control->up);
}

static int spanker_call_link_control(struct spanker_file *file, void *data, void __user *to,
				     bool nonblock)
{
	struct spanker_link_control *control = data;

	if (control->up > 1 || control->link >= file->card->links)
		return -EINVAL;
	return spanker_ask(file, spanker_ask_link_control, control);
}

static int spanker_call_abort(struct spanker_file *file, void *data, void __user *to, bool nonblock)
{
	const struct spanker_abort *abort = data;
	struct spanker_card *card = file->card;
	LIST_HEAD(finished);
	int ret;

	if (abort->flags || abort->epoch > SPANKER_EPOCH_MAX)
		return -EINVAL;
	mutex_lock(&card->queue_lock);
	ret = spanker_card_usable(card);
	if (!ret && spanker_stale(file))
		ret = -ESTALE;
	if (!ret && abort->epoch <= card->epoch)
		ret = -EINVAL;
	if (!ret && card->queued != file->queued)
		ret = -EBUSY;
	if (!ret)
		spanker_queue_abort(card, abort->epoch, &finished);
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
	return ret;
}

static int spanker_call_reset(struct spanker_file *file)
{
	struct spanker_card *card = file->card;
	LIST_HEAD(finished);
	int ret;

	mutex_lock(&card->queue_lock);
	ret = spanker_file_check(file);
	if (!ret && card->away)
		ret = -EIO;
	if (!ret)
		ret = spanker_card_reset(card, &finished);
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
	return ret;
}

/* --- calls of other files ------------------------------------------------------------------------ */

static int spanker_call_buffer_create(struct spanker_file *file, void *data, void __user *to,
				      bool nonblock)
{
	return spanker_buffer_create(file, data);
}

static void spanker_undo_buffer_create(struct spanker_file *file, const void *data)
{
	const struct spanker_buffer_create *create = data;
	const struct spanker_buffer_destroy destroy = { .handle = create->handle };

	spanker_buffer_destroy(file, &destroy);
}

static int spanker_call_buffer_destroy(struct spanker_file *file, void *data, void __user *to,
				       bool nonblock)
{
	return spanker_buffer_destroy(file, data);
}

static int spanker_call_program_load(struct spanker_file *file, void *data, void __user *to,
				     bool nonblock)
{
	return spanker_program_load(file, data);
}

static void spanker_undo_program_load(struct spanker_file *file, const void *data)
{
	const struct spanker_program_load *load = data;
	const struct spanker_program_unload unload = { .program_id = load->program_id };

	spanker_program_unload(file, &unload);
}

static int spanker_call_program_unload(struct spanker_file *file, void *data, void __user *to,
				       bool nonblock)
{
	return spanker_program_unload(file, data);
}

static int spanker_call_submit(struct spanker_file *file, void *data, void __user *to,
			       bool nonblock)
{
	return spanker_submit(file, data);
}

static int spanker_call_collect(struct spanker_file *file, void *data, void __user *to,
				bool nonblock)
{
	return spanker_collect(file, data, to, nonblock);
}

static int spanker_call_wait(struct spanker_file *file, void *data, void __user *to, bool nonblock)
{
	return spanker_wait(file, data, nonblock);
}

static int spanker_call_image(struct spanker_file *file, void *data, void __user *to,
			      bool nonblock)
{
	return spanker_image(file, data);
}

/* The argument is copied by the dispatcher: of _IOW before, of _IOR afterwards.  What cannot be told
 * is undone; but a step that was submitted stays queued, and the caller finds it when it collects. */
static const struct spanker_call {
	unsigned int cmd;
	int (*run)(struct spanker_file *file, void *data, void __user *to, bool nonblock);
	void (*undo)(struct spanker_file *file, const void *data);
	int tells;		/* an error with which there is something to copy back, too */
	bool when_gone;		/* answers although the card is gone */
	bool when_stale;	/* answers although the card has been reset */
	bool copies;		/* back by itself what is [out] */
} spanker_calls[] = {
	{ SPANKER_IOC_INFO, spanker_call_info, .when_gone = true },
	{ SPANKER_IOC_BUFFER_CREATE, spanker_call_buffer_create, spanker_undo_buffer_create },
	{ SPANKER_IOC_BUFFER_DESTROY, spanker_call_buffer_destroy },
	{ SPANKER_IOC_PROGRAM_LOAD, spanker_call_program_load, spanker_undo_program_load,
	  .tells = -ENOEXEC },
	{ SPANKER_IOC_PROGRAM_UNLOAD, spanker_call_program_unload },
	{ SPANKER_IOC_SUBMIT, spanker_call_submit },
	{ SPANKER_IOC_COLLECT, spanker_call_collect, .when_gone = true, .when_stale = true,
	  .copies = true },
	{ SPANKER_IOC_WAIT, spanker_call_wait },
	{ SPANKER_IOC_ABORT, spanker_call_abort },
	{ SPANKER_IOC_LINK, spanker_call_link },
	{ SPANKER_IOC_LINK_CONTROL, spanker_call_link_control },
	{ SPANKER_IOC_TELEMETRY, spanker_call_telemetry },
	{ SPANKER_IOC_IMAGE, spanker_call_image },
};

static long spanker_card_ioctl(struct file *filp, unsigned int cmd, unsigned long arg)
{
	struct spanker_file *file = filp->private_data;
	bool nonblock = filp->f_flags & O_NONBLOCK;
	void __user *user = (void __user *)arg;
	u64 data[sizeof(struct spanker_info) / sizeof(u64)];
	const struct spanker_call *call = NULL;
	unsigned int i;
	int ret;

	if (cmd == SPANKER_IOC_RESET)
		return spanker_call_reset(file);
	for (i = 0; i < ARRAY_SIZE(spanker_calls); i++)
		if (spanker_calls[i].cmd == cmd)
			call = &spanker_calls[i];
	if (!call)
		return spanker_common_ioctl(cmd, user);

	ret = spanker_file_check(file);
	if ((ret == -ENODEV && !call->when_gone) || (ret == -ESTALE && !call->when_stale))
		return ret;
	if (_IOC_DIR(cmd) & _IOC_WRITE && copy_from_user(data, user, _IOC_SIZE(cmd)))
		return -EFAULT;
	ret = call->run(file, data, user, nonblock);
	if ((ret && ret != call->tells) || !(_IOC_DIR(cmd) & _IOC_READ) || call->copies)
		return ret;
	if (copy_to_user(user, data, _IOC_SIZE(cmd))) {
		if (!ret && call->undo)
			call->undo(file, data);
		ret = -EFAULT;
	}
	return ret;
}

static __poll_t spanker_poll(struct file *filp, poll_table *wait)
{
	struct spanker_file *file = filp->private_data;
	enum spanker_state state;
	__poll_t mask = 0;

	poll_wait(filp, &file->wait, wait);
	if (READ_ONCE(file->completed) != READ_ONCE(file->collected))
		mask |= EPOLLIN | EPOLLRDNORM;
	if (spanker_event_ready(file))
		mask |= EPOLLPRI;
	state = spanker_state(file->card);
	if (state == SPANKER_FAILED || spanker_stale(file))
		mask |= EPOLLERR;
	if (state == SPANKER_GONE)
		mask |= EPOLLHUP;
	return mask;
}

/* --- open and close ------------------------------------------------------------------------------ */

static void spanker_file_free(struct kref *ref)
{
	struct spanker_file *file = container_of(ref, struct spanker_file, ref);

	xa_destroy(&file->buffers);
	xa_destroy(&file->programs);
	mutex_destroy(&file->lock);
	mutex_destroy(&file->collect_lock);
	mutex_destroy(&file->read_lock);
	put_device(&file->card->dev);
	kfree(file);
}

void spanker_file_put(struct spanker_file *file)
{
	kref_put(&file->ref, spanker_file_free);
}

static int spanker_open(struct inode *inode, struct file *filp)
{
	struct spanker_card *card = container_of(inode->i_cdev, struct spanker_card, cdev);
	struct spanker_file *file;

	if (spanker_state(card) == SPANKER_GONE)
		return -ENODEV;
	file = kzalloc(sizeof(*file), GFP_KERNEL_ACCOUNT);
	if (!file)
		return -ENOMEM;
	kref_init(&file->ref);
	get_device(&card->dev);
	file->card = card;
	file->mapping = filp->f_mapping;
	file->generation = READ_ONCE(card->generation);
	file->pid = task_tgid_nr(current);
	init_waitqueue_head(&file->wait);
	mutex_init(&file->lock);
	mutex_init(&file->collect_lock);
	mutex_init(&file->read_lock);
	xa_init_flags(&file->buffers, XA_FLAGS_ALLOC1);
	xa_init_flags(&file->programs, XA_FLAGS_ALLOC1);
	spanker_space_init(&file->offsets, SPANKER_OFFSET_FIRST, SPANKER_OFFSETS);
	INIT_LIST_HEAD(&file->steps);
	filp->private_data = file;

	mutex_lock(&card->queue_lock);
	if (!++card->streams)
		card->streams++;
	file->stream = card->streams;
	mutex_unlock(&card->queue_lock);
	mutex_lock(&card->files_lock);
	list_add_tail(&file->node, &card->files);
	mutex_unlock(&card->files_lock);
	return nonseekable_open(inode, filp);
}

/*
 * Never waits.  Steps that the card has are of no use to anybody: where no other file has any, they
 * are aborted, else they run, and what they use lives until they have.
 */
static int spanker_release(struct inode *inode, struct file *filp)
{
	struct spanker_file *file = filp->private_data;
	struct spanker_card *card = file->card;
	struct spanker_program *program;
	struct spanker_buffer *buffer;
	struct spanker_job *job, *next;
	LIST_HEAD(finished);
	unsigned long index;
	LIST_HEAD(steps);

	mutex_lock(&card->files_lock);
	list_del(&file->node);
	mutex_unlock(&card->files_lock);

	mutex_lock(&card->queue_lock);
	if (card->state == SPANKER_READY && file->queued && file->queued == card->queued &&
	    card->epoch < SPANKER_EPOCH_MAX)
		spanker_queue_abort(card, card->epoch + 1, &finished);
	card->queued -= file->queued;
	list_for_each_entry(job, &file->steps, step_node)
		job->file = NULL;
	list_splice_init(&file->steps, &steps);
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
	list_for_each_entry_safe(job, next, &steps, step_node) {
		list_del_init(&job->step_node);
		spanker_job_put(job);
	}

	xa_for_each(&file->programs, index, program) {
		xa_erase(&file->programs, index);
		spanker_program_put(program);
	}
	xa_for_each(&file->buffers, index, buffer) {
		mutex_lock(&file->lock);
		spanker_buffer_close(buffer);
		mutex_unlock(&file->lock);
		spanker_buffer_put(buffer);
	}
	spanker_file_put(file);
	return 0;
}

const struct file_operations spanker_card_fops = {
	.owner = THIS_MODULE,
	.open = spanker_open,
	.release = spanker_release,
	.read = spanker_event_read,
	.poll = spanker_poll,
	.mmap = spanker_mmap,
	.unlocked_ioctl = spanker_card_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};
