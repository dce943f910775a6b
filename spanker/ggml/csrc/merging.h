/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Merging the symbols of a word pair by pair: the heart of every byte-pair encoding.
 *
 * The lowest rank merges first, of equal ones the leftmost: n log n for n symbols, by a heap of
 * (rank, position).  An entry counts as long as the pair at its position has its rank.  Every
 * merge takes one entry and adds at most two, so 2n is room enough.
 */
#ifndef MERGING_H
#define MERGING_H

#include <stdlib.h>

#include "vocabulary_internal.h"

#define NO_RANK SPK_NO_TOKEN
#define NO_SYMBOL 0xffffffffu
#define FEW_SYMBOLS 64 /* most words have no more, and need no memory but the stack's */

struct symbol {
    uint32_t start, nbytes; /* within the word */
    uint32_t id;            /* or SPK_NO_TOKEN */
    uint32_t next, previous;
    uint32_t rank, joined; /* of the pair with the next one */
};

struct scratch {
    struct symbol *symbols;
    uint64_t *heap;
    size_t capacity;
    void *owned;
    struct symbol few_symbols[FEW_SYMBOLS];
    uint64_t few_heap[2 * FEW_SYMBOLS];
};

static inline void scratch_init(struct scratch *s)
{
    s->symbols = s->few_symbols;
    s->heap = s->few_heap;
    s->capacity = FEW_SYMBOLS;
    s->owned = NULL;
}

/* What was in it is gone. */
static inline int scratch_reserve(struct scratch *s, size_t symbols)
{
    if (symbols <= s->capacity)
        return 1;
    const size_t capacity = symbols + symbols / 2;
    free(s->owned);
    s->owned = malloc(capacity * (2 * sizeof *s->heap + sizeof *s->symbols));
    if (!s->owned) {
        scratch_init(s);
        return 0;
    }
    s->heap = s->owned;
    s->symbols = (struct symbol *)(s->heap + 2 * capacity);
    s->capacity = capacity;
    return 1;
}

static inline void scratch_free(struct scratch *s)
{
    free(s->owned);
}

static inline void sift_up(uint64_t *heap, size_t i)
{
    const uint64_t entry = heap[i];
    for (; i && heap[(i - 1) / 2] > entry; i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = entry;
}

static inline void sift_down(uint64_t *heap, size_t count, size_t i)
{
    const uint64_t entry = heap[i];
    for (size_t child; (child = 2 * i + 1) < count; i = child) {
        if (child + 1 < count && heap[child + 1] < heap[child])
            child++;
        if (heap[child] >= entry)
            break;
        heap[i] = heap[child];
    }
    heap[i] = entry;
}

/* The rank of two neighbours, and the id that they join to; NO_RANK if they do not merge. */
typedef uint32_t (*rank_pair)(const void *context, const struct symbol *left,
                              const struct symbol *right, uint32_t *joined);

/* The symbols have start, nbytes and id; what is left of them is the list from symbol 0. */
static inline __attribute__((always_inline)) void merge_symbols(struct scratch *s, size_t count,
                                                                rank_pair rank, const void *context)
{
    struct symbol *at = s->symbols;
    uint64_t *heap = s->heap;
    size_t entries = 0;
    for (size_t i = 0; i < count; i++) {
        at[i].next = i + 1 < count ? (uint32_t)(i + 1) : NO_SYMBOL;
        at[i].previous = (uint32_t)i - 1;
        at[i].rank = NO_RANK;
        if (i + 1 < count)
            at[i].rank = rank(context, &at[i], &at[i + 1], &at[i].joined);
        if (at[i].rank != NO_RANK)
            heap[entries++] = (uint64_t)at[i].rank << 32 | i;
    }
    for (size_t i = entries / 2; i-- > 0;)
        sift_down(heap, entries, i);
    while (entries) {
        const uint32_t i = (uint32_t)heap[0], found = (uint32_t)(heap[0] >> 32);
        heap[0] = heap[--entries];
        sift_down(heap, entries, 0);
        /* Either may have been merged with another meanwhile. */
        if (at[i].rank != found)
            continue;
        struct symbol *left = &at[i], *right = &at[left->next];
        left->nbytes += right->nbytes;
        left->id = left->joined;
        left->next = right->next;
        left->rank = right->rank = NO_RANK;
        if (left->next != NO_SYMBOL) {
            at[left->next].previous = i;
            left->rank = rank(context, left, &at[left->next], &left->joined);
            if (left->rank != NO_RANK) {
                heap[entries] = (uint64_t)left->rank << 32 | i;
                sift_up(heap, entries++);
            }
        }
        if (left->previous != NO_SYMBOL) {
            struct symbol *before = &at[left->previous];
            before->rank = rank(context, before, left, &before->joined);
            if (before->rank != NO_RANK) {
                heap[entries] = (uint64_t)before->rank << 32 | left->previous;
                sift_up(heap, entries++);
            }
        }
    }
}

#endif
