// SPDX-License-Identifier: GPL-2.0-only
/*
 * Buffers: pieces of the card's DDR, and memory of the host that the card reaches; and what of them
 * a process has mapped.
 *
 * Pages come into a mapping one fault after the other, never beforehand, so that there is one place
 * that asks whether the card is still there.
 */
#include <linux/mm.h>
#include <linux/overflow.h>

#include "compat.h"
#include "spanker.h"

/* Pages that one fault brings at most: whoever touches one touches its neighbours. */
#define SPANKER_FAULT_PAGES 512

static void spanker_buffer_release(struct kref *ref)
{
	struct spanker_buffer *buffer = container_of(ref, struct spanker_buffer, ref);
	struct spanker_file *file = buffer->file;
	struct spanker_card *card = file->card;

	if (buffer->ddr.count) {
		mutex_lock(&card->ddr_lock);
		spanker_range_give(&card->ddr, &buffer->ddr);
		mutex_unlock(&card->ddr_lock);
	}
	if (buffer->kind == SPANKER_BUFFER_HOST) {
		down_read(&card->plug);
		down_write(&card->map_lock);
		list_del(&buffer->node);
		up_write(&card->map_lock);
		if (buffer->cpu)
			dma_free_coherent(&card->pci->dev, buffer->bytes, buffer->cpu,
					  buffer->dma);
		up_read(&card->plug);
		atomic64_sub(buffer->bytes, &file->host_bytes);
		kvfree(buffer->pfns);
	}
	kfree(buffer);
	spanker_file_put(file);
}

void spanker_buffer_put(struct spanker_buffer *buffer)
{
	kref_put(&buffer->ref, spanker_buffer_release);
}

/* At removal, with card->plug held for writing: buffers stay, without memory. */
void spanker_host_buffers_free(struct spanker_card *card)
{
	struct spanker_buffer *buffer;

	list_for_each_entry(buffer, &card->host_buffers, node) {
		dma_free_coherent(&card->pci->dev, buffer->bytes, buffer->cpu, buffer->dma);
		buffer->cpu = NULL;
	}
}

/* --- DDR --------------------------------------------------------------------------------------- */

static int spanker_ddr_alloc(struct spanker_buffer *buffer)
{
	struct spanker_card *card = buffer->file->card;
	struct spanker_job *job;
	int ret;

	job = spanker_job_new(card, SAIL_OP_FILL);
	if (!job)
		return -ENOMEM;
	mutex_lock(&card->ddr_lock);
	ret = spanker_range_take(&card->ddr, &buffer->ddr, buffer->bytes >> PAGE_SHIFT);
	mutex_unlock(&card->ddr_lock);
	if (ret)
		goto put;

	/* What others have left there is nobody's business. */
	job->command.result = cpu_to_le64(buffer->ddr.first << PAGE_SHIFT);
	job->command.data_bytes = cpu_to_le64(buffer->bytes);
	job->command.result_bytes = cpu_to_le64(buffer->bytes);
	kref_get(&buffer->ref);
	job->buffer = buffer;
	ret = spanker_queue(job);
	if (ret)
		spanker_buffer_put(buffer);
	else
		ret = spanker_job_wait(job);
put:
	spanker_job_put(job);
	return ret;
}

/* --- host memory --------------------------------------------------------------------------------- */

static int spanker_host_pages(struct spanker_buffer *buffer)
{
	struct device *dev = &buffer->file->card->pci->dev;
	size_t count = buffer->bytes >> PAGE_SHIFT, i = 0;
	struct sg_page_iter iter;
	struct sg_table table;
	int ret;

	buffer->pfns = kvmalloc_array(count, sizeof(*buffer->pfns), GFP_KERNEL_ACCOUNT);
	if (!buffer->pfns)
		return -ENOMEM;
	ret = dma_get_sgtable(dev, &table, buffer->cpu, buffer->dma, buffer->bytes);
	if (ret)
		return ret;
	for_each_sgtable_page(&table, &iter, 0) {
		if (i == count)
			break;
		buffer->pfns[i++] = page_to_pfn(sg_page_iter_page(&iter));
	}
	sg_free_table(&table);
	return i == count ? 0 : -EIO;
}

static int spanker_host_alloc(struct spanker_buffer *buffer)
{
	struct spanker_file *file = buffer->file;
	struct spanker_card *card = file->card;
	u64 limit = (u64)spanker_host_mib << 20;
	int ret;

	/* Given back when the buffer is released, with or without memory. */
	if (atomic64_add_return(buffer->bytes, &file->host_bytes) > limit)
		return -EDQUOT;
	down_read(&card->plug);
	if (card->unplugged) {
		ret = -ENODEV;
		goto up;
	}
	buffer->cpu = dma_alloc_coherent(&card->pci->dev, buffer->bytes, &buffer->dma,
					 GFP_KERNEL | __GFP_NOWARN);
	ret = -ENOMEM;
	if (!buffer->cpu)
		goto up;
	ret = spanker_host_pages(buffer);
	if (ret) {
		dma_free_coherent(&card->pci->dev, buffer->bytes, buffer->cpu, buffer->dma);
		buffer->cpu = NULL;
		goto up;
	}
	down_write(&card->map_lock);
	list_add_tail(&buffer->node, &card->host_buffers);
	up_write(&card->map_lock);
up:
	up_read(&card->plug);
	return ret;
}

/* --- handles ------------------------------------------------------------------------------------- */

/* With the handle the buffer is anybody's who guesses it, and so is destroying it: what the caller is
 * told is taken down before the lock is. */
static int spanker_buffer_open(struct spanker_buffer *buffer, struct spanker_buffer_create *arg)
{
	struct spanker_file *file = buffer->file;
	u64 pages = buffer->bytes >> PAGE_SHIFT;
	int ret;

	mutex_lock(&file->lock);
	ret = -EDQUOT;
	if (file->buffer_count >= spanker_buffers_max)
		goto unlock;
	if (buffer->kind == SPANKER_BUFFER_HOST ||
	    (buffer->ddr.first + pages) << PAGE_SHIFT <= file->card->mappable) {
		ret = spanker_range_take(&file->offsets, &buffer->offset, pages);
		if (ret)
			goto unlock;
	}
	ret = xa_alloc(&file->buffers, &buffer->handle, buffer, XA_LIMIT(1, INT_MAX),
		       GFP_KERNEL_ACCOUNT);
	if (ret) {
		if (buffer->offset.count)
			spanker_range_give(&file->offsets, &buffer->offset);
		goto unlock;
	}
	file->buffer_count++;
	arg->handle = buffer->handle;
	arg->mmap_offset = buffer->offset.count ? buffer->offset.first << PAGE_SHIFT : 0;
	arg->address = buffer->ddr.count ? buffer->ddr.first << PAGE_SHIFT : 0;
unlock:
	mutex_unlock(&file->lock);
	return ret;
}

/* Takes the handle away, with file->lock held; the reference that it was is the caller's then. */
void spanker_buffer_close(struct spanker_buffer *buffer)
{
	struct spanker_file *file = buffer->file;

	lockdep_assert_held(&file->lock);
	xa_erase(&file->buffers, buffer->handle);
	if (buffer->offset.count)
		spanker_range_give(&file->offsets, &buffer->offset);
	file->buffer_count--;
}

int spanker_buffer_create(struct spanker_file *file, struct spanker_buffer_create *arg)
{
	struct spanker_card *card = file->card;
	struct spanker_buffer *buffer;
	int ret;

	if (arg->flags || arg->reserved || !arg->bytes)
		return -EINVAL;
	if (arg->kind != SPANKER_BUFFER_DDR && arg->kind != SPANKER_BUFFER_HOST)
		return -EINVAL;
	if (arg->kind == SPANKER_BUFFER_DDR && arg->bytes > card->ddr_bytes)
		return -ENOSPC;
	if (arg->kind == SPANKER_BUFFER_HOST && arg->bytes > (u64)spanker_host_mib << 20)
		return -EDQUOT;

	buffer = kzalloc(sizeof(*buffer), GFP_KERNEL_ACCOUNT);
	if (!buffer)
		return -ENOMEM;
	kref_init(&buffer->ref);
	INIT_LIST_HEAD(&buffer->node);
	kref_get(&file->ref);
	buffer->file = file;
	buffer->kind = arg->kind;
	buffer->bytes = PAGE_ALIGN(arg->bytes);

	if (buffer->kind == SPANKER_BUFFER_DDR)
		ret = spanker_ddr_alloc(buffer);
	else
		ret = spanker_host_alloc(buffer);
	if (!ret)
		ret = spanker_buffer_open(buffer, arg);
	if (ret)
		spanker_buffer_put(buffer);
	return ret;
}

int spanker_buffer_destroy(struct spanker_file *file, const struct spanker_buffer_destroy *arg)
{
	struct spanker_buffer *buffer;
	int ret = 0;

	if (arg->flags)
		return -EINVAL;
	mutex_lock(&file->lock);
	buffer = xa_load(&file->buffers, arg->handle);
	if (!buffer)
		ret = -ENOENT;
	else if (buffer->programs)
		ret = -EBUSY;
	else
		spanker_buffer_close(buffer);
	mutex_unlock(&file->lock);
	if (!ret)
		spanker_buffer_put(buffer);
	return ret;
}

/* --- mappings ------------------------------------------------------------------------------------ */

static void spanker_vma_open(struct vm_area_struct *vma)
{
	struct spanker_buffer *buffer = vma->vm_private_data;

	kref_get(&buffer->ref);
}

static void spanker_vma_close(struct vm_area_struct *vma)
{
	spanker_buffer_put(vma->vm_private_data);
}

static unsigned long spanker_buffer_pfn(struct spanker_buffer *buffer, u64 page)
{
	if (buffer->kind == SPANKER_BUFFER_HOST)
		return buffer->pfns[page];
	return PHYS_PFN(buffer->file->card->aperture) + buffer->ddr.first + page;
}

static vm_fault_t spanker_fault(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	struct spanker_buffer *buffer = vma->vm_private_data;
	struct spanker_card *card = buffer->file->card;
	u64 page = vmf->pgoff - buffer->offset.first;
	unsigned long address = vmf->address & PAGE_MASK;
	vm_fault_t ret = VM_FAULT_SIGBUS;
	unsigned long at, end;

	down_read(&card->map_lock);
	if (card->revoked)
		goto up;
	ret = vmf_insert_pfn(vma, address, spanker_buffer_pfn(buffer, page));
	end = min(vma->vm_end, ALIGN(address + 1, SPANKER_FAULT_PAGES * PAGE_SIZE));
	for (at = address + PAGE_SIZE; ret == VM_FAULT_NOPAGE && at < end; at += PAGE_SIZE)
		if (vmf_insert_pfn(vma, at, spanker_buffer_pfn(buffer, ++page)) != VM_FAULT_NOPAGE)
			break;
up:
	up_read(&card->map_lock);
	return ret;
}

static const struct vm_operations_struct spanker_vm_ops = {
	.open = spanker_vma_open,
	.close = spanker_vma_close,
	.fault = spanker_fault,
};

/* A piece of one buffer.  mmap_lock is held. */
int spanker_mmap(struct file *filp, struct vm_area_struct *vma)
{
	struct spanker_file *file = filp->private_data;
	struct spanker_buffer *buffer = NULL;
	struct spanker_range *range;
	u64 pages = vma_pages(vma);
	int ret;

	/* Before all else: a file of a card that is gone has no offsets that mean anything. */
	ret = spanker_file_check(file);
	if (ret)
		return ret;
	/* A private copy could not be taken away from its process. */
	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;

	mutex_lock(&file->lock);
	range = spanker_range_find(&file->offsets, vma->vm_pgoff);
	if (range && pages <= range->first + range->count - vma->vm_pgoff) {
		buffer = container_of(range, struct spanker_buffer, offset);
		kref_get(&buffer->ref);
	}
	mutex_unlock(&file->lock);
	if (!buffer)
		return -EINVAL;

	spanker_vm_flags_set(vma, VM_IO | VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP);
	if (buffer->kind == SPANKER_BUFFER_DDR)
		vma->vm_page_prot = pgprot_writecombine(vma->vm_page_prot);
	vma->vm_private_data = buffer;
	vma->vm_ops = &spanker_vm_ops;
	return 0;
}
