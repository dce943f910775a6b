/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of the module share: its objects, their lifetimes and their locks.
 *
 * Objects.  A card is a struct device, which counts its references; each open file holds one, so that
 * a card outlives its removal.  A file is counted, too: its buffers and its programs hold it, because
 * they may be needed (by a mapping, by the card) after it was closed.  A program holds its buffers,
 * and steps that are queued hold the program.  A job is a command for the card; the queue holds it until it
 * is complete.
 *
 * Locks, outermost first:
 *
 *   file->collect_lock, file->read_lock   one COLLECT, one read() of a file at a time
 *   card->plug         (rw)  held for reading by who allocates or frees memory of DMA; removal takes
 *                            it for writing, and from then on `unplugged` is set
 *   file->lock               the tables of buffers and programs, and its account
 *   card->queue_lock         registers, rings, jobs, the state and the generation
 *   card->files_lock         which files there are, and their events
 *   card->ddr_lock           who has which pages of the DDR
 *   card->map_lock     (rw)  held for reading where pages are put into a mapping; `revoked`
 *
 * Below them the kernel's own.  User memory is touched under none of them but the first two, which
 * no other path takes: so mmap and page faults, which come with mmap_lock held, may take any.
 * References are dropped under none of them: the last one may queue a command.
 */
#ifndef SPANKER_H
#define SPANKER_H

#include <linux/cdev.h>
#include <linux/completion.h>
#include <linux/device.h>
#include <linux/dma-mapping.h>
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/rwsem.h>
#include <linux/slab.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "space.h"
#include "spanker_card.h"
#include "uapi/spanker_ioctl.h"

#define SPANKER_MINORS 256
#define SPANKER_RING_ENTRIES 256	/* 16 KiB of commands, 8 KiB of completions */
#define SPANKER_OFFSET_FIRST 1		/* page; an offset of 0 means that there is none */
#define SPANKER_OFFSETS (1ULL << 31)	/* pages: as far as a 32-bit program can name them */
#define SPANKER_EVENTS 64		/* that a file may leave unread */
#define SPANKER_PROGRAMS_MAX 256	/* slots of a card that the module uses */
#define SPANKER_NO_SLOT U32_MAX
#define SPANKER_EPOCH_MAX 0xfffffffe	/* cards enter no higher one */

enum spanker_state {
	SPANKER_READY,
	SPANKER_FAILED,	/* until a reset */
	SPANKER_GONE,	/* for good */
};

/* Memory that the card reaches, of a job. */
struct spanker_block {
	void *cpu;
	dma_addr_t dma;
	size_t bytes;
};

struct spanker_card {
	struct device dev;
	struct cdev cdev;
	struct pci_dev *pci;
	struct list_head node;	/* of all cards */
	int number;		/* N of /dev/spankerN; below 0 before it has one */

	/* What the card says of itself: never changes. */
	u64 serial;
	u64 ddr_bytes;
	u64 mappable;
	u32 version;
	u32 capabilities;
	u32 semantics;
	u32 programs;
	u32 links;
	char sku[SAIL_TEXT_BYTES];
	char name[SAIL_TEXT_BYTES];
	char isa[SAIL_TEXT_BYTES];
	phys_addr_t aperture;

	struct rw_semaphore plug;
	bool unplugged;
	struct list_head host_buffers;	/* under plug and map_lock, both, to change */

	struct mutex queue_lock;
	void __iomem *regs;
	enum spanker_state state;	/* read without the lock where a late answer does no harm */
	u32 generation;			/* likewise */
	bool away;			/* the bus resets it: registers say nothing, all ones included */
	u32 epoch;
	struct sail_command *commands;
	struct sail_completion *completions;
	dma_addr_t commands_dma;
	dma_addr_t completions_dma;
	u32 command_tail;
	u32 completion_head;
	u64 fence;			/* of the last command that the card was given */
	u64 finished;			/* jobs, ever */
	u32 queued;			/* steps of all files */
	u32 streams;			/* that files were given */
	struct list_head pending;	/* jobs that wait for room in the ring */
	struct list_head inflight;	/* jobs that the card has */
	u32 inflight_count;
	struct list_head limbo;		/* jobs whose memory a failed card may yet write to */
	struct spanker_program *slots[SPANKER_PROGRAMS_MAX];
	u32 link_state[SAIL_LINKS_MAX];

	struct mutex files_lock;
	struct list_head files;

	struct mutex ddr_lock;
	struct spanker_space ddr;	/* pages */

	struct rw_semaphore map_lock;
	bool revoked;

	struct delayed_work health;
	struct dentry *debugfs;
};

struct spanker_file {
	struct kref ref;
	struct spanker_card *card;
	struct address_space *mapping;
	struct list_head node;		/* in card->files */
	u32 generation;			/* of the card when it was opened */
	u32 stream;			/* its steps, to the card: never 0 */
	pid_t pid;			/* that opened it, for people */
	wait_queue_head_t wait;		/* completions, events, and the card's state */

	struct mutex lock;
	struct xarray buffers;
	struct xarray programs;
	struct spanker_space offsets;	/* pages of the file that mmap shows */
	u32 buffer_count;

	atomic64_t host_bytes;		/* of buffers, until they are really freed */

	/* Under card->queue_lock. */
	struct list_head steps;		/* not collected, oldest first */
	u32 step_count;
	u32 queued;			/* those that are not complete */
	size_t step_bytes;		/* that those take */
	size_t load_bytes;		/* of programs and images on their way, given up or not */
	u64 submitted;			/* fences */
	u64 completed;			/* read without the lock as well */
	u64 collected;			/* likewise */

	struct mutex collect_lock;
	struct mutex read_lock;

	/* Under card->files_lock. */
	struct spanker_event events[SPANKER_EVENTS];
	u64 event_head;			/* taken or lost; read without the lock as well */
	u64 event_tail;			/* posted; likewise */
};

struct spanker_buffer {
	struct kref ref;
	struct spanker_file *file;
	u32 kind;
	u32 handle;
	u32 programs;		/* that name it; under file->lock */
	size_t bytes;		/* whole pages */
	struct spanker_range offset;	/* where mmap shows it, if it does; under file->lock, but
					 * `first` stays the same after the handle is gone */
	struct spanker_range ddr;	/* its pages there; under card->ddr_lock */
	void *cpu;		/* host memory; NULL once the card is unplugged */
	dma_addr_t dma;
	unsigned long *pfns;
	struct list_head node;	/* in card->host_buffers */
};

struct spanker_program {
	struct kref ref;
	struct spanker_file *file;
	u32 id;
	u32 slot;
	u32 generation;		/* of the card that has it */
	u32 queued;		/* under card->queue_lock */
	bool loaded;		/* likewise */
	struct spanker_job *unload;	/* made beforehand: freeing must not fail */
	u32 count;
	struct spanker_buffer *buffers[];
};

struct spanker_job {
	struct kref ref;
	struct list_head node;		/* in card->pending or card->inflight, then in a list of the finished */
	struct list_head step_node;	/* in file->steps */
	struct list_head limbo_node;	/* in card->limbo */
	struct spanker_card *card;
	struct spanker_file *file;	/* whose step it is; NULL once that is closed */
	struct spanker_program *program;	/* that the queue holds */
	struct spanker_buffer *buffer;		/* likewise */
	struct spanker_file *loader;		/* likewise, of a program or an image */
	struct sail_command command;
	struct spanker_block blocks[3];
	void *written;			/* what command.result means, for us */
	void *result;			/* a copy of it, of the kernel's own memory */
	size_t result_bytes;
	size_t charged;			/* bytes that its file answers for */
	u64 fence;			/* the card's */
	u64 user_fence;
	u64 busy_ns;
	u32 detail;
	int error;
	bool cancelled;			/* an abort came before the card had it */
	bool finished;
	struct completion done;
};

/* main.c */
extern unsigned int spanker_queue_max;
extern unsigned int spanker_queue_mib;
extern unsigned int spanker_host_mib;
extern unsigned int spanker_buffers_max;
extern unsigned int spanker_watchdog_ms;
extern unsigned int spanker_stall_ms;
extern unsigned int spanker_poll_ms;
extern struct class spanker_class;
extern struct dentry *spanker_debugfs;
int spanker_publish(struct spanker_card *card);
void spanker_unpublish(struct spanker_card *card);
long spanker_common_ioctl(unsigned int cmd, void __user *arg);

/* pci.c */
extern struct pci_driver spanker_pci_driver;

/* card.c: all of it with card->queue_lock held */
u32 spanker_read32(struct spanker_card *card, u32 reg);
u64 spanker_read64(struct spanker_card *card, u32 reg);
void spanker_write32(struct spanker_card *card, u32 reg, u32 value);
void spanker_write64(struct spanker_card *card, u32 reg, u64 value);
int spanker_card_identify(struct spanker_card *card);
int spanker_card_start(struct spanker_card *card);
int spanker_card_stop(struct spanker_card *card);
int spanker_card_reset(struct spanker_card *card, struct list_head *finished);
void spanker_card_fail(struct spanker_card *card, u32 failure, struct list_head *finished);
void spanker_card_gone(struct spanker_card *card, struct list_head *finished);
int spanker_card_usable(struct spanker_card *card);
void spanker_card_events(struct spanker_card *card, struct list_head *finished);
/* this without */
void spanker_card_health(struct work_struct *work);

/* queue.c */
struct spanker_job *spanker_job_new(struct spanker_card *card, u32 op);
void spanker_job_put(struct spanker_job *job);
int spanker_queue(struct spanker_job *job);
int spanker_queue_with(struct spanker_job *job, const void *data, size_t data_bytes,
		       const void *table, size_t table_bytes);
int spanker_job_wait(struct spanker_job *job);
/* with card->queue_lock held; what has finished is put on the list */
u64 spanker_progress(struct spanker_card *card);
void spanker_queue_add(struct spanker_job *job);
void spanker_queue_pump(struct spanker_card *card, struct list_head *finished);
void spanker_queue_completions(struct spanker_card *card, struct list_head *finished);
void spanker_queue_flush(struct spanker_card *card, int error, bool limbo,
			 struct list_head *finished);
void spanker_queue_abort(struct spanker_card *card, u32 epoch, struct list_head *finished);
void spanker_limbo_free(struct spanker_card *card);
/* without it: drops what the queue held */
void spanker_finish(struct list_head *finished);

/* memory.c */
int spanker_buffer_create(struct spanker_file *file, struct spanker_buffer_create *arg);
int spanker_buffer_destroy(struct spanker_file *file, const struct spanker_buffer_destroy *arg);
void spanker_buffer_close(struct spanker_buffer *buffer);
void spanker_buffer_put(struct spanker_buffer *buffer);
void spanker_host_buffers_free(struct spanker_card *card);
int spanker_mmap(struct file *filp, struct vm_area_struct *vma);

/* program.c */
int spanker_program_load(struct spanker_file *file, struct spanker_program_load *arg);
int spanker_program_unload(struct spanker_file *file, const struct spanker_program_unload *arg);
void spanker_program_put(struct spanker_program *program);
int spanker_submit(struct spanker_file *file, struct spanker_submit *arg);
int spanker_image(struct spanker_file *file, const struct spanker_image *arg);

/* wait.c */
int spanker_collect(struct spanker_file *file, struct spanker_collect *arg,
		    struct spanker_collect __user *to, bool nonblock);
int spanker_wait(struct spanker_file *file, const struct spanker_wait *arg, bool nonblock);

/* file.c */
extern const struct file_operations spanker_card_fops;
int spanker_file_check(struct spanker_file *file);
void spanker_file_put(struct spanker_file *file);
void spanker_files_wake(struct spanker_card *card);

/* events.c */
void spanker_event_post(struct spanker_card *card, u32 kind, u32 subject, u32 detail);
bool spanker_event_ready(struct spanker_file *file);
ssize_t spanker_event_read(struct file *filp, char __user *to, size_t bytes, loff_t *pos);

/* sysfs.c */
extern const struct attribute_group *spanker_groups[];

/* debugfs.c */
void spanker_debugfs_add(struct spanker_card *card);

static inline struct spanker_card *to_spanker_card(struct device *dev)
{
	return container_of(dev, struct spanker_card, dev);
}

static inline enum spanker_state spanker_state(struct spanker_card *card)
{
	return READ_ONCE(card->state);
}

static inline bool spanker_stale(struct spanker_file *file)
{
	return file->generation != READ_ONCE(file->card->generation);
}

#endif
