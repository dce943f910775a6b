// SPDX-License-Identifier: GPL-2.0-only
/*
 * /sys/kernel/debug/spanker/spankerN: what is queued, who has which memory, which programs the card
 * keeps; and `fault`, where a card of tests takes the faults of its fault registers ("number argument").
 */
#include <linux/debugfs.h>
#include <linux/seq_file.h>
#include <linux/uaccess.h>

#include "spanker.h"

static void spanker_ring_jobs(struct seq_file *m, const char *state, struct list_head *jobs)
{
	struct spanker_job *job;

	list_for_each_entry(job, jobs, node)
		seq_printf(m, "%s fence %llu op %u program %u pid %d\n", state, job->fence,
			   le32_to_cpu(job->command.op), le32_to_cpu(job->command.program),
			   job->file ? job->file->pid : 0);
}

static int ring_show(struct seq_file *m, void *unused)
{
	struct spanker_card *card = m->private;

	mutex_lock(&card->queue_lock);
	if (card->state != SPANKER_GONE) {
		seq_printf(m, "status %#x failure %u progress %u running %u command %u waiting %#x\n",
			   spanker_read32(card, SAIL_REG_STATUS),
			   spanker_read32(card, SAIL_REG_FAILURE),
			   spanker_read32(card, SAIL_REG_PROGRESS),
			   spanker_read32(card, SAIL_REG_RUNNING),
			   spanker_read32(card, SAIL_REG_COMMAND),
			   spanker_read32(card, SAIL_REG_WAITING));
		seq_printf(m, "commands tail %u head %u, completions tail %u head %u\n",
			   card->command_tail, spanker_read32(card, SAIL_REG_COMMAND_HEAD),
			   spanker_read32(card, SAIL_REG_COMPLETION_TAIL), card->completion_head);
		seq_printf(m, "epoch %u generation %u finished %llu steps %u\n", card->epoch,
			   card->generation, card->finished, card->queued);
	}
	spanker_ring_jobs(m, "inflight", &card->inflight);
	spanker_ring_jobs(m, "pending", &card->pending);
	mutex_unlock(&card->queue_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(ring);

static int buffers_show(struct seq_file *m, void *unused)
{
	struct spanker_card *card = m->private;
	struct spanker_buffer *buffer;
	struct rb_node *node;

	mutex_lock(&card->ddr_lock);
	for (node = rb_first(&card->ddr.taken); node; node = rb_next(node)) {
		buffer = rb_entry(node, struct spanker_buffer, ddr.node);
		seq_printf(m, "%#014llx %zu pid %d handle %u\n", buffer->ddr.first << PAGE_SHIFT,
			   buffer->bytes, buffer->file->pid, buffer->handle);
	}
	mutex_unlock(&card->ddr_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(buffers);

static int programs_show(struct seq_file *m, void *unused)
{
	struct spanker_card *card = m->private;
	struct spanker_program *program;
	u32 i;

	mutex_lock(&card->queue_lock);
	for (i = 0; i < card->programs; i++) {
		program = card->slots[i];
		if (program)
			seq_printf(m, "%u pid %d id %u buffers %u queued %u%s\n", i,
				   program->file->pid, program->id, program->count,
				   program->queued, program->loaded ? "" : " (not loaded)");
	}
	mutex_unlock(&card->queue_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(programs);

static ssize_t fault_write(struct file *filp, const char __user *from, size_t bytes, loff_t *pos)
{
	struct spanker_card *card = filp->private_data;
	u32 fault, argument = 0;
	char text[32] = "";
	ssize_t ret = bytes;

	if (bytes >= sizeof(text))
		return -EINVAL;
	if (copy_from_user(text, from, bytes))
		return -EFAULT;
	if (sscanf(text, "%u %u", &fault, &argument) < 1)
		return -EINVAL;
	mutex_lock(&card->queue_lock);
	if (card->state == SPANKER_GONE) {
		ret = -ENODEV;
	} else {
		spanker_write32(card, SAIL_REG_FAULT_ARG, argument);
		spanker_write32(card, SAIL_REG_FAULT, fault);
	}
	mutex_unlock(&card->queue_lock);
	return ret;
}

static const struct file_operations fault_fops = {
	.owner = THIS_MODULE,
	.open = simple_open,
	.write = fault_write,
};

void spanker_debugfs_add(struct spanker_card *card)
{
	card->debugfs = debugfs_create_dir(dev_name(&card->dev), spanker_debugfs);
	debugfs_create_file("ring", 0400, card->debugfs, card, &ring_fops);
	debugfs_create_file("buffers", 0400, card->debugfs, card, &buffers_fops);
	debugfs_create_file("programs", 0400, card->debugfs, card, &programs_fops);
	if (card->capabilities & SAIL_CAP_FAULTS)
		debugfs_create_file("fault", 0200, card->debugfs, card, &fault_fops);
}
