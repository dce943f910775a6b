/* SPDX-License-Identifier: Apache-2.0 */
/* Where a page of keys and of values lies in a KV pool (spk_kernels.h has the layout). */
#ifndef SPK_KV_H
#define SPK_KV_H

#include "spk_kernels.h"

static inline uint16_t *spk_keys(const struct spk_kv *kv, uint32_t page, size_t kv_head)
{
    return kv->pool + (2 * kv_head * kv->pages + page) * kv->page_positions * kv->head_dim;
}

static inline uint16_t *spk_values(const struct spk_kv *kv, uint32_t page, size_t kv_head)
{
    return spk_keys(kv, page, kv_head) + kv->pages * kv->page_positions * kv->head_dim;
}

#endif
