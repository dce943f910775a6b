// SPDX-License-Identifier: GPL-2.0-only
/* /sys/class/spanker/spankerN: what a card is, and how it is. */
#include <linux/sysfs.h>

#include "spanker.h"

static ssize_t serial_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%016llx\n", to_spanker_card(dev)->serial);
}
static DEVICE_ATTR_RO(serial);

static ssize_t sku_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%.16s\n", to_spanker_card(dev)->sku);
}
static DEVICE_ATTR_RO(sku);

static ssize_t name_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%.16s\n", to_spanker_card(dev)->name);
}
static DEVICE_ATTR_RO(name);

static ssize_t isa_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%.16s\n", to_spanker_card(dev)->isa);
}
static DEVICE_ATTR_RO(isa);

static ssize_t version_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	u32 version = to_spanker_card(dev)->version;

	return sysfs_emit(buf, "%u.%u\n", version >> 16, version & 0xffff);
}
static DEVICE_ATTR_RO(version);

static ssize_t ddr_bytes_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", to_spanker_card(dev)->ddr_bytes);
}
static DEVICE_ATTR_RO(ddr_bytes);

static ssize_t ddr_used_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct spanker_card *card = to_spanker_card(dev);
	u64 used;

	mutex_lock(&card->ddr_lock);
	used = card->ddr.used << PAGE_SHIFT;
	mutex_unlock(&card->ddr_lock);
	return sysfs_emit(buf, "%llu\n", used);
}
static DEVICE_ATTR_RO(ddr_used);

static ssize_t generation_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", READ_ONCE(to_spanker_card(dev)->generation));
}
static DEVICE_ATTR_RO(generation);

static ssize_t state_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	static const char * const names[] = {
		[SPANKER_READY] = "ready",
		[SPANKER_FAILED] = "failed",
		[SPANKER_GONE] = "gone",
	};

	return sysfs_emit(buf, "%s\n", names[spanker_state(to_spanker_card(dev))]);
}
static DEVICE_ATTR_RO(state);

/* Thousandths of a degree Celsius, as everywhere in sysfs. */
static ssize_t temperature_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct spanker_card *card = to_spanker_card(dev);
	s32 value = 0;
	int ret = 0;

	mutex_lock(&card->queue_lock);
	if (card->state == SPANKER_GONE)
		ret = -ENODEV;
	else
		value = spanker_read32(card, SAIL_REG_TEMPERATURE_MC);
	mutex_unlock(&card->queue_lock);
	return ret ?: sysfs_emit(buf, "%d\n", value);
}
static DEVICE_ATTR_RO(temperature);

/* A line for each link: its number, its state, the serial number at the other end. */
static ssize_t links_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	static const char * const names[] = {
		[SAIL_LINK_DOWN] = "down",
		[SAIL_LINK_TRAINING] = "training",
		[SAIL_LINK_UP] = "up",
		[SAIL_LINK_ERROR] = "error",
	};
	struct spanker_card *card = to_spanker_card(dev);
	int at = 0, ret = 0;
	u32 i, state;
	u64 peer;

	mutex_lock(&card->queue_lock);
	if (card->state == SPANKER_GONE)
		ret = -ENODEV;
	for (i = 0; !ret && i < card->links; i++) {
		state = spanker_read32(card, SAIL_REG_LINK(i) + SAIL_LINK_STATE);
		peer = spanker_read64(card, SAIL_REG_LINK(i) + SAIL_LINK_PEER_LO);
		at += sysfs_emit_at(buf, at, "%u %s %016llx\n", i,
				    state < ARRAY_SIZE(names) ? names[state] : "unknown", peer);
	}
	mutex_unlock(&card->queue_lock);
	return ret ?: at;
}
static DEVICE_ATTR_RO(links);

static struct attribute *spanker_attrs[] = {
	&dev_attr_serial.attr,
	&dev_attr_sku.attr,
	&dev_attr_name.attr,
	&dev_attr_isa.attr,
	&dev_attr_version.attr,
	&dev_attr_ddr_bytes.attr,
	&dev_attr_ddr_used.attr,
	&dev_attr_generation.attr,
	&dev_attr_state.attr,
	&dev_attr_temperature.attr,
	&dev_attr_links.attr,
	NULL
};

static const struct attribute_group spanker_group = {
	.attrs = spanker_attrs,
};

const struct attribute_group *spanker_groups[] = {
	&spanker_group,
	NULL
};
