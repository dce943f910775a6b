// SPDX-License-Identifier: GPL-2.0-only
/*
 * The registers of a card, and its state: ready, failed, gone.
 *
 * Registers are touched under card->queue_lock alone, and not once the card is gone.  A card whose
 * registers read as all ones has been pulled out; one that says or shows that it is broken has
 * failed, and a reset ends that.
 */
#include <linux/delay.h>
#include <linux/ktime.h>

#include "spanker.h"
#include "trace.h"

#define SPANKER_ALL_ONES 0xffffffffu
#define SPANKER_RESET_MS 5000	/* far more than a card needs */

u32 spanker_read32(struct spanker_card *card, u32 reg)
{
	return readl(card->regs + reg);
}

void spanker_write32(struct spanker_card *card, u32 reg, u32 value)
{
	writel(value, card->regs + reg);
}

/* Of a counter: the lower half keeps what the upper one was. */
u64 spanker_read64(struct spanker_card *card, u32 reg)
{
	u32 lo = readl(card->regs + reg);

	return (u64)readl(card->regs + reg + 4) << 32 | lo;
}

void spanker_write64(struct spanker_card *card, u32 reg, u64 value)
{
	writel(lower_32_bits(value), card->regs + reg);
	writel(upper_32_bits(value), card->regs + reg + 4);
}

static void spanker_read_text(struct spanker_card *card, u32 reg, char *text)
{
	unsigned int i;
	u32 word;

	for (i = 0; i < SAIL_TEXT_BYTES; i += sizeof(word)) {
		word = readl(card->regs + reg + i);
		text[i] = word;
		text[i + 1] = word >> 8;
		text[i + 2] = word >> 16;
		text[i + 3] = word >> 24;
	}
	/* People see it: in sysfs, in logs. */
	for (i = 0; i < SAIL_TEXT_BYTES; i++)
		if (text[i] && (text[i] < ' ' || text[i] > '~'))
			text[i] = '?';
}

int spanker_card_identify(struct spanker_card *card)
{
	struct device *dev = &card->pci->dev;
	u32 magic = spanker_read32(card, SAIL_REG_MAGIC);

	if (magic != SAIL_MAGIC) {
		dev_err(dev, "not a Sail: magic number %#x instead of %#x\n", magic, SAIL_MAGIC);
		return -ENODEV;
	}
	card->version = spanker_read32(card, SAIL_REG_VERSION);
	if (card->version >> 16 != SAIL_VERSION_MAJOR ||
	    (card->version & 0xffff) < SAIL_VERSION_MINOR) {
		dev_err(dev, "interface version %u.%u of the card, the module needs %d.%d or a later %d.x\n",
			card->version >> 16, card->version & 0xffff, SAIL_VERSION_MAJOR,
			SAIL_VERSION_MINOR, SAIL_VERSION_MAJOR);
		return -ENODEV;
	}
	card->capabilities = spanker_read32(card, SAIL_REG_CAPABILITIES);
	card->serial = spanker_read64(card, SAIL_REG_SERIAL_LO);
	card->ddr_bytes = spanker_read64(card, SAIL_REG_DDR_LO);
	card->semantics = spanker_read32(card, SAIL_REG_SEMANTICS);
	card->programs = spanker_read32(card, SAIL_REG_PROGRAMS);
	card->links = spanker_read32(card, SAIL_REG_LINKS);
	spanker_read_text(card, SAIL_REG_SKU, card->sku);
	spanker_read_text(card, SAIL_REG_NAME, card->name);
	spanker_read_text(card, SAIL_REG_ISA, card->isa);
	card->mappable = min3(spanker_read64(card, SAIL_REG_APERTURE_LO), card->ddr_bytes,
			      (u64)pci_resource_len(card->pci, SAIL_BAR_DDR));
	card->mappable = round_down(card->mappable, PAGE_SIZE);
	card->ddr_bytes = round_down(card->ddr_bytes, PAGE_SIZE);
	if (!card->ddr_bytes || card->ddr_bytes >> PAGE_SHIFT > ULONG_MAX || !card->programs ||
	    card->links > SAIL_LINKS_MAX) {
		dev_err(dev, "the card makes no sense: %llu bytes of DDR, %u programs, %u links\n",
			card->ddr_bytes, card->programs, card->links);
		return -ENODEV;
	}
	card->programs = min_t(u32, card->programs, SPANKER_PROGRAMS_MAX);
	return 0;
}

/* Resets the card and leaves it so: it does no more DMA.  ENODEV where it is gone, EIO where it
 * does not come back. */
int spanker_card_stop(struct spanker_card *card)
{
	ktime_t end = ktime_add_ms(ktime_get(), SPANKER_RESET_MS);
	u32 status;

	spanker_write32(card, SAIL_REG_CONTROL, SAIL_CONTROL_RESET);
	for (;;) {
		bool late = ktime_after(ktime_get(), end);

		status = spanker_read32(card, SAIL_REG_STATUS);
		if (status == SPANKER_ALL_ONES)
			return -ENODEV;
		if (status & SAIL_STATUS_READY)
			return 0;
		if (late)
			return -EIO;
		usleep_range(200, 1000);
	}
}

/* Resets the card and sets it to work. */
int spanker_card_start(struct spanker_card *card)
{
	unsigned int i;
	u32 status;
	int ret;

	lockdep_assert_held(&card->queue_lock);
	ret = spanker_card_stop(card);
	if (ret)
		return ret;
	memset(card->completions, 0, SPANKER_RING_ENTRIES * sizeof(*card->completions));
	card->command_tail = 0;
	card->completion_head = 0;
	card->epoch = 0;
	memset(card->slots, 0, sizeof(card->slots));

	spanker_write64(card, SAIL_REG_COMMAND_BASE_LO, card->commands_dma);
	spanker_write32(card, SAIL_REG_COMMAND_ENTRIES, SPANKER_RING_ENTRIES);
	spanker_write64(card, SAIL_REG_COMPLETION_BASE_LO, card->completions_dma);
	spanker_write32(card, SAIL_REG_COMPLETION_ENTRIES, SPANKER_RING_ENTRIES);
	spanker_write32(card, SAIL_REG_WATCHDOG_MS, spanker_watchdog_ms);
	spanker_write32(card, SAIL_REG_CONTROL, SAIL_CONTROL_ENABLE);
	status = spanker_read32(card, SAIL_REG_STATUS);
	if (status == SPANKER_ALL_ONES)
		return -ENODEV;
	if (!(status & SAIL_STATUS_RUNNING)) {
		dev_err(&card->pci->dev, "does not start: status %#x, failure %u\n", status,
			spanker_read32(card, SAIL_REG_FAILURE));
		return -EIO;
	}
	/* First: what comes up after it is seen below, or interrupts. */
	spanker_write32(card, SAIL_REG_EVENTS, SAIL_EVENT_ALL);
	for (i = 0; i < card->links; i++)
		card->link_state[i] = spanker_read32(card, SAIL_REG_LINK(i) + SAIL_LINK_STATE);
	spanker_write32(card, SAIL_REG_EVENTS_MASK, SAIL_EVENT_ALL);
	card->state = SPANKER_READY;
	return 0;
}

int spanker_card_usable(struct spanker_card *card)
{
	lockdep_assert_held(&card->queue_lock);
	switch (card->state) {
	case SPANKER_READY:
		return 0;
	case SPANKER_FAILED:
		return -EIO;
	default:
		return -ENODEV;
	}
}

int spanker_card_reset(struct spanker_card *card, struct list_head *finished)
{
	int ret;

	lockdep_assert_held(&card->queue_lock);
	ret = spanker_card_start(card);
	if (ret == -ENODEV) {
		spanker_card_gone(card, finished);
		goto out;
	}
	/* First the generation, so that who is woken by the rest finds the file stale. */
	WRITE_ONCE(card->generation, card->generation + 1);
	/* A card that does not come back may still write to what it was given. */
	spanker_queue_flush(card, -ENODEV, ret != 0, finished);
	if (ret) {
		card->state = SPANKER_FAILED;
		dev_err(&card->pci->dev, "reset: the card does not come back\n");
	} else {
		spanker_limbo_free(card);
	}
	spanker_event_post(card, SPANKER_EVENT_RESET, 0, card->generation);
	spanker_files_wake(card);
out:
	trace_spanker_reset(card->number, card->generation, ret);
	return ret;
}

/* What is queued has no hope any more; the card is left alone until it is reset. */
void spanker_card_fail(struct spanker_card *card, u32 failure, struct list_head *finished)
{
	lockdep_assert_held(&card->queue_lock);
	if (card->state != SPANKER_READY)
		return;
	dev_err(&card->pci->dev, "%s has failed: failure %u, %u commands outstanding\n",
		dev_name(&card->dev), failure, card->inflight_count);
	WRITE_ONCE(card->state, SPANKER_FAILED);
	spanker_queue_flush(card, -EIO, true, finished);
	spanker_event_post(card, SPANKER_EVENT_FAILED, 0, failure);
	spanker_files_wake(card);
}

/* The card is no more: ends all that waits, and takes its memory out of every mapping. */
void spanker_card_gone(struct spanker_card *card, struct list_head *finished)
{
	struct spanker_file *file;

	lockdep_assert_held(&card->queue_lock);
	if (card->state == SPANKER_GONE)
		return;
	WRITE_ONCE(card->state, SPANKER_GONE);
	spanker_queue_flush(card, -ENODEV, true, finished);

	/* Faults that come later see `revoked`; what those before have mapped is taken out here. */
	down_write(&card->map_lock);
	card->revoked = true;
	up_write(&card->map_lock);
	mutex_lock(&card->files_lock);
	list_for_each_entry(file, &card->files, node)
		unmap_mapping_range(file->mapping, 0, 0, 1);
	mutex_unlock(&card->files_lock);

	spanker_event_post(card, SPANKER_EVENT_GONE, 0, 0);
	spanker_files_wake(card);
}

/* What the event vector says. */
void spanker_card_events(struct spanker_card *card, struct list_head *finished)
{
	u32 causes, state;
	unsigned int i, round;

	lockdep_assert_held(&card->queue_lock);
	/* More may come meanwhile, but a card that never ends must not keep the lock. */
	for (round = 0; round < 4 && card->state != SPANKER_GONE && !card->away; round++) {
		causes = spanker_read32(card, SAIL_REG_EVENTS);
		trace_spanker_irq(card->number, SAIL_VECTOR_EVENT, causes);
		if (causes == SPANKER_ALL_ONES) {
			spanker_card_gone(card, finished);
			return;
		}
		causes &= SAIL_EVENT_ALL;
		if (!causes)
			return;
		spanker_write32(card, SAIL_REG_EVENTS, causes);

		if (causes & SAIL_EVENT_ECC)
			spanker_event_post(card, SPANKER_EVENT_ECC,
					   spanker_read32(card, SAIL_REG_ECC_UNCORRECTED),
					   spanker_read32(card, SAIL_REG_ECC_CORRECTED));
		if (causes & SAIL_EVENT_HOT)
			spanker_event_post(card, SPANKER_EVENT_HOT, 0,
					   spanker_read32(card, SAIL_REG_TEMPERATURE_MC));
		for (i = 0; causes & SAIL_EVENT_LINK && i < card->links; i++) {
			state = spanker_read32(card, SAIL_REG_LINK(i) + SAIL_LINK_STATE);
			if (state == card->link_state[i])
				continue;
			card->link_state[i] = state;
			spanker_event_post(card, SPANKER_EVENT_LINK, i, state);
		}
		if (causes & SAIL_EVENT_FAILED) {
			/* What it had finished before counts. */
			spanker_queue_completions(card, finished);
			spanker_card_fail(card, spanker_read32(card, SAIL_REG_FAILURE), finished);
		}
	}
}

/* Now and then: is the card still there, and has an interrupt been lost? */
void spanker_card_health(struct work_struct *work)
{
	struct spanker_card *card = container_of(work, struct spanker_card, health.work);
	LIST_HEAD(finished);
	bool gone;
	u32 status;

	mutex_lock(&card->queue_lock);
	if (card->state != SPANKER_GONE && !card->away) {
		status = spanker_read32(card, SAIL_REG_STATUS);
		if (status == SPANKER_ALL_ONES) {
			dev_err(&card->pci->dev, "%s does not answer any more\n",
				dev_name(&card->dev));
			spanker_card_gone(card, &finished);
		} else {
			spanker_queue_completions(card, &finished);
			if (status & SAIL_STATUS_FAILED)
				spanker_card_fail(card, spanker_read32(card, SAIL_REG_FAILURE),
						  &finished);
			else if (!(status & SAIL_STATUS_RUNNING)) /* somebody else has reset it */
				spanker_card_fail(card, SAIL_FAILURE_INTERNAL, &finished);
		}
	}
	gone = card->state == SPANKER_GONE;
	mutex_unlock(&card->queue_lock);
	spanker_finish(&finished);
	if (!gone)
		schedule_delayed_work(&card->health, msecs_to_jiffies(spanker_poll_ms));
}
