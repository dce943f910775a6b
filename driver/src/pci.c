// SPDX-License-Identifier: GPL-2.0-only
/*
 * A card on the PCI bus: it comes, interrupts, has errors, and goes.
 *
 * Removal may come at any time, with files open, memory mapped and the card dead or alive.  What
 * outlives it is the struct spanker_card alone: all that belongs to the device is given back here.
 */
#include <linux/interrupt.h>
#include <linux/module.h>
#include <linux/pci.h>

#include "spanker.h"
#include "trace.h"

static irqreturn_t spanker_irq_completion(int irq, void *data)
{
	struct spanker_card *card = data;
	LIST_HEAD(finished);

	trace_spanker_irq(card->number, SAIL_VECTOR_COMPLETION, 0);
	mutex_lock(&card->queue_lock);
	spanker_queue_completions(card, &finished);
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
	return IRQ_HANDLED;
}

static irqreturn_t spanker_irq_event(int irq, void *data)
{
	struct spanker_card *card = data;
	LIST_HEAD(finished);

	mutex_lock(&card->queue_lock);
	spanker_card_events(card, &finished);
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
	return IRQ_HANDLED;
}

static void spanker_release(struct device *dev)
{
	struct spanker_card *card = to_spanker_card(dev);

	mutex_destroy(&card->queue_lock);
	mutex_destroy(&card->files_lock);
	mutex_destroy(&card->ddr_lock);
	pci_dev_put(card->pci);
	kfree(card);
}

static struct spanker_card *spanker_card_new(struct pci_dev *pci)
{
	struct spanker_card *card = kzalloc(sizeof(*card), GFP_KERNEL);

	if (!card)
		return NULL;
	card->pci = pci_dev_get(pci);
	card->number = -1;
	card->state = SPANKER_FAILED;
	init_rwsem(&card->plug);
	init_rwsem(&card->map_lock);
	mutex_init(&card->queue_lock);
	mutex_init(&card->files_lock);
	mutex_init(&card->ddr_lock);
	INIT_LIST_HEAD(&card->node);
	INIT_LIST_HEAD(&card->host_buffers);
	INIT_LIST_HEAD(&card->pending);
	INIT_LIST_HEAD(&card->inflight);
	INIT_LIST_HEAD(&card->limbo);
	INIT_LIST_HEAD(&card->files);
	INIT_DELAYED_WORK(&card->health, spanker_card_health);
	device_initialize(&card->dev);
	card->dev.parent = &pci->dev;
	card->dev.class = &spanker_class;
	card->dev.groups = spanker_groups;
	card->dev.release = spanker_release;
	return card;
}

static int spanker_rings_alloc(struct spanker_card *card)
{
	struct device *dev = &card->pci->dev;

	card->commands = dma_alloc_coherent(dev, SPANKER_RING_ENTRIES * sizeof(*card->commands),
					    &card->commands_dma, GFP_KERNEL);
	if (!card->commands)
		return -ENOMEM;
	card->completions = dma_alloc_coherent(dev,
					       SPANKER_RING_ENTRIES * sizeof(*card->completions),
					       &card->completions_dma, GFP_KERNEL);
	if (!card->completions) {
		dma_free_coherent(dev, SPANKER_RING_ENTRIES * sizeof(*card->commands),
				  card->commands, card->commands_dma);
		return -ENOMEM;
	}
	return 0;
}

static void spanker_rings_free(struct spanker_card *card)
{
	struct device *dev = &card->pci->dev;

	dma_free_coherent(dev, SPANKER_RING_ENTRIES * sizeof(*card->completions),
			  card->completions, card->completions_dma);
	dma_free_coherent(dev, SPANKER_RING_ENTRIES * sizeof(*card->commands),
			  card->commands, card->commands_dma);
}

static int spanker_probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	struct spanker_card *card;
	int ret;

	card = spanker_card_new(pci);
	if (!card)
		return -ENOMEM;

	ret = pci_enable_device_mem(pci);
	if (ret)
		goto put_card;
	ret = pci_request_mem_regions(pci, "spanker");
	if (ret)
		goto disable;
	ret = -ENODEV;
	if (pci_resource_len(pci, SAIL_BAR_REGISTERS) < SAIL_REGISTERS_BYTES) {
		dev_err(&pci->dev, "BAR %d has %llu bytes, not %d\n", SAIL_BAR_REGISTERS,
			(u64)pci_resource_len(pci, SAIL_BAR_REGISTERS), SAIL_REGISTERS_BYTES);
		goto release_regions;
	}
	ret = dma_set_mask_and_coherent(&pci->dev, DMA_BIT_MASK(64));
	if (ret)
		goto release_regions;
	card->regs = pci_iomap(pci, SAIL_BAR_REGISTERS, SAIL_REGISTERS_BYTES);
	ret = -ENOMEM;
	if (!card->regs)
		goto release_regions;
	card->aperture = pci_resource_start(pci, SAIL_BAR_DDR);
	/* So that mappings of the aperture can combine writes; without it they are only slower. */
	if (pci_resource_len(pci, SAIL_BAR_DDR))
		arch_io_reserve_memtype_wc(card->aperture, pci_resource_len(pci, SAIL_BAR_DDR));
	ret = spanker_rings_alloc(card);
	if (ret)
		goto unmap;
	pci_set_master(pci);
	pci_save_state(pci);

	mutex_lock(&card->queue_lock);
	ret = spanker_card_identify(card);
	mutex_unlock(&card->queue_lock);
	if (ret)
		goto clear_master;
	spanker_space_init(&card->ddr, 0, card->ddr_bytes >> PAGE_SHIFT);

	ret = pci_alloc_irq_vectors(pci, SAIL_VECTORS, SAIL_VECTORS, PCI_IRQ_MSIX);
	if (ret < 0)
		goto clear_master;
	ret = request_threaded_irq(pci_irq_vector(pci, SAIL_VECTOR_COMPLETION), NULL,
				   spanker_irq_completion, IRQF_ONESHOT, "spanker-completion",
				   card);
	if (ret)
		goto free_vectors;
	ret = request_threaded_irq(pci_irq_vector(pci, SAIL_VECTOR_EVENT), NULL,
				   spanker_irq_event, IRQF_ONESHOT, "spanker-event", card);
	if (ret)
		goto free_completion;

	pci_set_drvdata(pci, card);
	mutex_lock(&card->queue_lock);
	ret = spanker_card_start(card);
	mutex_unlock(&card->queue_lock);
	if (ret)
		goto free_event;
	ret = spanker_publish(card);
	if (ret)
		goto stop;
	schedule_delayed_work(&card->health, msecs_to_jiffies(spanker_poll_ms));
	return 0;

stop:
	mutex_lock(&card->queue_lock);
	spanker_card_stop(card);
	mutex_unlock(&card->queue_lock);
free_event:
	free_irq(pci_irq_vector(pci, SAIL_VECTOR_EVENT), card);
free_completion:
	free_irq(pci_irq_vector(pci, SAIL_VECTOR_COMPLETION), card);
free_vectors:
	pci_free_irq_vectors(pci);
clear_master:
	pci_clear_master(pci);
	spanker_rings_free(card);
unmap:
	if (pci_resource_len(pci, SAIL_BAR_DDR))
		arch_io_free_memtype_wc(card->aperture, pci_resource_len(pci, SAIL_BAR_DDR));
	pci_iounmap(pci, card->regs);
release_regions:
	pci_release_mem_regions(pci);
disable:
	pci_disable_device(pci);
put_card:
	put_device(&card->dev);
	return ret;
}

static void spanker_remove(struct pci_dev *pci)
{
	struct spanker_card *card = pci_get_drvdata(pci);
	LIST_HEAD(finished);

	spanker_unpublish(card);

	/* From here on nobody touches the registers, and all that waited has an answer. */
	mutex_lock(&card->queue_lock);
	if (card->state != SPANKER_GONE)
		spanker_card_stop(card);
	pci_clear_master(pci);
	spanker_card_gone(card, &finished);
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);

	cancel_delayed_work_sync(&card->health);
	free_irq(pci_irq_vector(pci, SAIL_VECTOR_EVENT), card);
	free_irq(pci_irq_vector(pci, SAIL_VECTOR_COMPLETION), card);
	pci_free_irq_vectors(pci);

	/* From here on nobody has memory of DMA. */
	down_write(&card->plug);
	card->unplugged = true;
	spanker_host_buffers_free(card);
	spanker_limbo_free(card);
	spanker_rings_free(card);
	up_write(&card->plug);

	if (pci_resource_len(pci, SAIL_BAR_DDR))
		arch_io_free_memtype_wc(card->aperture, pci_resource_len(pci, SAIL_BAR_DDR));
	pci_iounmap(pci, card->regs);
	pci_release_mem_regions(pci);
	pci_disable_device(pci);
	put_device(&card->dev);
}

/* At power off, and before another kernel starts: no more DMA. */
static void spanker_shutdown(struct pci_dev *pci)
{
	struct spanker_card *card = pci_get_drvdata(pci);
	LIST_HEAD(finished);

	mutex_lock(&card->queue_lock);
	if (card->state != SPANKER_GONE)
		spanker_card_stop(card);
	pci_clear_master(pci);
	spanker_card_gone(card, &finished);
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
}

static pci_ers_result_t spanker_error_detected(struct pci_dev *pci, pci_channel_state_t state)
{
	struct spanker_card *card = pci_get_drvdata(pci);
	pci_ers_result_t result = PCI_ERS_RESULT_NEED_RESET;
	LIST_HEAD(finished);

	mutex_lock(&card->queue_lock);
	if (state == pci_channel_io_perm_failure) {
		spanker_card_gone(card, &finished);
		result = PCI_ERS_RESULT_DISCONNECT;
	} else {
		card->away = true;
		spanker_card_fail(card, SAIL_FAILURE_DMA, &finished);
	}
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
	return result;
}

/* The link works again; the card itself waits for SPANKER_IOC_RESET. */
static pci_ers_result_t spanker_slot_reset(struct pci_dev *pci)
{
	struct spanker_card *card = pci_get_drvdata(pci);

	pci_restore_state(pci);
	/* Before 6.19 what has been restored is not there to be restored again. */
	pci_save_state(pci);
	pci_set_master(pci);
	mutex_lock(&card->queue_lock);
	card->away = false;
	mutex_unlock(&card->queue_lock);
	return PCI_ERS_RESULT_RECOVERED;
}

/* Somebody resets the function, as /sys/bus/pci/devices/.../reset does. */
static void spanker_reset_prepare(struct pci_dev *pci)
{
	struct spanker_card *card = pci_get_drvdata(pci);
	LIST_HEAD(finished);

	mutex_lock(&card->queue_lock);
	card->away = true;
	spanker_card_fail(card, SAIL_FAILURE_INTERNAL, &finished);
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
}

/* It waits for SPANKER_IOC_RESET, too. */
static void spanker_reset_done(struct pci_dev *pci)
{
	struct spanker_card *card = pci_get_drvdata(pci);

	/* The kernel has restored it, as above. */
	pci_save_state(pci);
	mutex_lock(&card->queue_lock);
	card->away = false;
	mutex_unlock(&card->queue_lock);
}

static const struct pci_error_handlers spanker_error_handlers = {
	.error_detected = spanker_error_detected,
	.slot_reset = spanker_slot_reset,
	.reset_prepare = spanker_reset_prepare,
	.reset_done = spanker_reset_done,
};

static const struct pci_device_id spanker_ids[] = {
	{ PCI_DEVICE(SAIL_PCI_VENDOR, SAIL_PCI_DEVICE) },
	{ }
};
MODULE_DEVICE_TABLE(pci, spanker_ids);

struct pci_driver spanker_pci_driver = {
	.name = "spanker",
	.id_table = spanker_ids,
	.probe = spanker_probe,
	.remove = spanker_remove,
	.shutdown = spanker_shutdown,
	.err_handler = &spanker_error_handlers,
	/* So that all cards are known when they are numbered. */
	.driver.probe_type = PROBE_FORCE_SYNCHRONOUS,
};
