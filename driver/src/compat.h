/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the kernels that the module builds for: 6.1 to 7.x.  Nowhere else is there
 * an #if on a version.
 */
#ifndef SPANKER_COMPAT_H
#define SPANKER_COMPAT_H

#include <linux/mm.h>
#include <linux/version.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
static inline void spanker_vm_flags_set(struct vm_area_struct *vma, unsigned long flags)
{
	vma->vm_flags |= flags;
}
#else
#define spanker_vm_flags_set(vma, flags) vm_flags_set(vma, flags)
#endif

#endif
