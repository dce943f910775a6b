// SPDX-License-Identifier: GPL-2.0-only
/*
 * The module itself: its parameters, /dev/spankerctl, and the numbers of the cards.
 *
 * Cards found while the module loads are numbered by ascending serial number, so that names stay the
 * same from boot to boot whatever the order of the slots; one that comes later takes the lowest
 * number that is free.
 */
#include <linux/debugfs.h>
#include <linux/idr.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/uaccess.h>

#include "spanker.h"

unsigned int spanker_queue_max = 64;
module_param_named(queue_max, spanker_queue_max, uint, 0444);
MODULE_PARM_DESC(queue_max, "steps that one open file may have queued or uncollected");

unsigned int spanker_queue_mib = 64;
module_param_named(queue_mib, spanker_queue_mib, uint, 0444);
MODULE_PARM_DESC(queue_mib, "MiB of parameters and results of those steps");

unsigned int spanker_host_mib = 64;
module_param_named(host_mib, spanker_host_mib, uint, 0444);
MODULE_PARM_DESC(host_mib, "MiB of host buffers of one open file");

unsigned int spanker_buffers_max = SAIL_TABLE_MAX;
module_param_named(buffers_max, spanker_buffers_max, uint, 0444);
MODULE_PARM_DESC(buffers_max, "buffers of one open file");

unsigned int spanker_watchdog_ms;
module_param_named(watchdog_ms, spanker_watchdog_ms, uint, 0444);
MODULE_PARM_DESC(watchdog_ms, "a step that makes no progress for so long fails its card; 0: never");

unsigned int spanker_stall_ms = 10000;
module_param_named(stall_ms, spanker_stall_ms, uint, 0444);
MODULE_PARM_DESC(stall_ms, "calls that need the card give up once it has made no progress for so long");

unsigned int spanker_poll_ms = 500;
module_param_named(poll_ms, spanker_poll_ms, uint, 0444);
MODULE_PARM_DESC(poll_ms, "how often a card is looked at, whether it is still there");

struct dentry *spanker_debugfs;
static dev_t spanker_devt;
static DEFINE_IDA(spanker_numbers);

/* Cards by ascending serial number; until `spanker_numbering` they have no numbers. */
static DEFINE_MUTEX(spanker_cards_lock);
static LIST_HEAD(spanker_cards);
static bool spanker_numbering;

struct class spanker_class = {
	.name = "spanker",
};

/* What both kinds of device answer: the module's own calls, as they have always been. */
long spanker_common_ioctl(unsigned int cmd, void __user *arg)
{
	static const struct spanker_version version = {
		.major = SPANKER_UAPI_MAJOR,
		.minor = SPANKER_UAPI_MINOR,
		.patch = SPANKER_UAPI_PATCH,
	};

	switch (cmd) {
	case SPANKER_IOC_PING:
		return 0;
	case SPANKER_IOC_GET_VERSION:
		return copy_to_user(arg, &version, sizeof(version)) ? -EFAULT : 0;
	default:
		return -ENOTTY;
	}
}

static long spanker_ctl_ioctl(struct file *filp, unsigned int cmd, unsigned long arg)
{
	return spanker_common_ioctl(cmd, (void __user *)arg);
}

static int spanker_ctl_open(struct inode *inode, struct file *filp)
{
	return nonseekable_open(inode, filp);
}

static const struct file_operations spanker_ctl_fops = {
	.owner = THIS_MODULE,
	.open = spanker_ctl_open,
	.unlocked_ioctl = spanker_ctl_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};

static struct miscdevice spanker_ctl = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "spankerctl",
	.fops = &spanker_ctl_fops,
};

static int spanker_number(struct spanker_card *card)
{
	int number, ret;

	lockdep_assert_held(&spanker_cards_lock);
	number = ida_alloc_max(&spanker_numbers, SPANKER_MINORS - 1, GFP_KERNEL);
	if (number < 0)
		return number;
	ret = dev_set_name(&card->dev, "spanker%d", number);
	if (ret)
		goto free;
	card->dev.devt = MKDEV(MAJOR(spanker_devt), MINOR(spanker_devt) + number);
	card->number = number;
	cdev_init(&card->cdev, &spanker_card_fops);
	card->cdev.owner = THIS_MODULE;
	ret = cdev_device_add(&card->cdev, &card->dev);
	if (ret)
		goto unset;
	spanker_debugfs_add(card);
	dev_info(&card->pci->dev, "%s: %.16s %.16s, serial number %#llx, %llu MiB\n",
		 dev_name(&card->dev), card->sku, card->name, card->serial, card->ddr_bytes >> 20);
	return 0;
unset:
	card->number = -1;
free:
	ida_free(&spanker_numbers, number);
	return ret;
}

/* Makes a card that works visible, now or together with all that are found at the beginning. */
int spanker_publish(struct spanker_card *card)
{
	struct spanker_card *other;
	int ret = 0;

	mutex_lock(&spanker_cards_lock);
	if (spanker_numbering)
		ret = spanker_number(card);
	if (!ret) {
		list_for_each_entry(other, &spanker_cards, node)
			if (other->serial > card->serial)
				break;
		list_add_tail(&card->node, &other->node);
	}
	mutex_unlock(&spanker_cards_lock);
	return ret;
}

void spanker_unpublish(struct spanker_card *card)
{
	mutex_lock(&spanker_cards_lock);
	list_del_init(&card->node);
	if (card->number >= 0) {
		debugfs_remove_recursive(card->debugfs);
		cdev_device_del(&card->cdev, &card->dev);
		ida_free(&spanker_numbers, card->number);
	}
	mutex_unlock(&spanker_cards_lock);
}

static void spanker_number_all(void)
{
	struct spanker_card *card;
	int ret;

	mutex_lock(&spanker_cards_lock);
	spanker_numbering = true;
	list_for_each_entry(card, &spanker_cards, node) {
		ret = spanker_number(card);
		if (ret)
			dev_err(&card->pci->dev, "no device for this card: %d\n", ret);
	}
	mutex_unlock(&spanker_cards_lock);
}

static int __init spanker_init(void)
{
	int ret;

	ret = alloc_chrdev_region(&spanker_devt, 0, SPANKER_MINORS, "spanker");
	if (ret)
		return ret;
	ret = class_register(&spanker_class);
	if (ret)
		goto unregister_region;
	spanker_debugfs = debugfs_create_dir("spanker", NULL);
	ret = misc_register(&spanker_ctl);
	if (ret)
		goto remove_debugfs;
	ret = pci_register_driver(&spanker_pci_driver);
	if (ret)
		goto deregister_ctl;
	spanker_number_all();
	return 0;

deregister_ctl:
	misc_deregister(&spanker_ctl);
remove_debugfs:
	debugfs_remove_recursive(spanker_debugfs);
	class_unregister(&spanker_class);
unregister_region:
	unregister_chrdev_region(spanker_devt, SPANKER_MINORS);
	return ret;
}

static void __exit spanker_exit(void)
{
	pci_unregister_driver(&spanker_pci_driver);
	misc_deregister(&spanker_ctl);
	debugfs_remove_recursive(spanker_debugfs);
	class_unregister(&spanker_class);
	unregister_chrdev_region(spanker_devt, SPANKER_MINORS);
	ida_destroy(&spanker_numbers);
}

module_init(spanker_init);
module_exit(spanker_exit);

MODULE_DESCRIPTION("Driver of Sail accelerator cards");
MODULE_AUTHOR("The Spanker project");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.2.0");
