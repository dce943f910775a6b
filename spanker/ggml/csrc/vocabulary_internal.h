/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The insides of a vocabulary, and strings as GGUF stores them.
 *
 * A token takes its text, 4 bytes for where that starts and 4 to 16 in the table; a merge 12 and 4
 * to 16: two megabytes for 49,152 tokens and as many merges.
 */
#ifndef VOCABULARY_INTERNAL_H
#define VOCABULARY_INTERNAL_H

#include <string.h>

#include "spk_vocabulary.h"

/* Open addressing: a slot is 0 or a number + 1 in its low bits, above them some of the hash, so
 * that nearly every look at what has the number finds it. */
#define NUMBER_BITS 23
#define NUMBER_MASK ((1u << NUMBER_BITS) - 1)

static inline uint32_t number_in(uint32_t slot)
{
    return (slot & NUMBER_MASK) - 1;
}

struct table {
    uint32_t *slots;
    uint32_t mask;
};

struct merge {
    uint32_t left, right, joined;
};

struct spk_vocabulary {
    uint64_t key[2], pair_key[2];
    uint8_t *text;
    uint32_t *starts; /* count + 1 */
    uint32_t count;
    uint32_t longest; /* bytes */
    uint32_t merge_count;
    struct merge *merges;
    struct table tokens, pairs;
};

static inline uint64_t little_endian_64(const uint8_t *p)
{
    uint64_t x;
    memcpy(&x, p, sizeof x);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    x = __builtin_bswap64(x);
#endif
    return x;
}

static inline uint32_t any_32(const uint8_t *p)
{
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* The last bytes of n, at most 8, some of them twice: for most texts that is all there is to read,
 * and takes neither a loop nor a jump that cannot be foretold. */
static inline uint64_t last_word(const uint8_t *p, size_t n)
{
    if (n >= 8)
        return little_endian_64(p + n - 8);
    if (n >= 4)
        return (uint64_t)any_32(p) << 32 | any_32(p + n - 4);
    return n ? (uint64_t)p[0] << 16 | (uint64_t)p[n / 2] << 8 | p[n - 1] : 0;
}

static inline int same_bytes(const uint8_t *p, const uint8_t *q, size_t n)
{
    for (size_t i = 0; i + 8 < n; i += 8)
        if (little_endian_64(p + i) != little_endian_64(q + i))
            return 0;
    return last_word(p, n) == last_word(q, n);
}

/* The string at *at, which moves behind it; 0 beyond the end. */
static inline int next_string(const uint8_t *strings, size_t nbytes, size_t *at,
                              struct spk_token *out)
{
    uint64_t length;
    if (nbytes - *at < 8)
        return 0;
    length = little_endian_64(strings + *at);
    if (length > nbytes - *at - 8)
        return 0;
    out->text = strings + *at + 8;
    out->nbytes = (size_t)length;
    *at += 8 + (size_t)length;
    return 1;
}

/* Whether bytes are UTF-8, by a machine with a row for each byte that has the next state's shift at
 * the shift of each state: no jump to be foretold, which half of most vocabularies' characters
 * would make wrong (Per Vognsen, "Shift-based DFAs", 2021). */
struct utf8_check {
    uint64_t rows[256];
};

void spk_utf8_init(struct utf8_check *check);
int spk_utf8_valid(const struct utf8_check *check, const uint8_t *p, size_t n);

/* Bytes of the character that begins with `lead`; 1 for what begins none. */
static inline size_t utf8_bytes(uint8_t lead)
{
    return lead < 0xc0 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf8 ? 4 : 1;
}

/* A product with random numbers, mixed because ids come in order: whatever pairs a file has, which
 * of them meet in the table is not up to it. */
static inline uint32_t pair_hash(const struct spk_vocabulary *v, uint32_t left, uint32_t right)
{
    uint64_t h = left * v->pair_key[0] + right * v->pair_key[1];
    h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9u;
    return (uint32_t)(h >> 32);
}

/* Where in the table a pair of tokens is, or the free slot where it would be. */
static inline uint32_t find_pair_slot(const struct spk_vocabulary *v, uint32_t hash, uint32_t left,
                                      uint32_t right)
{
    uint32_t i = hash & v->pairs.mask, slot;
    for (; (slot = v->pairs.slots[i]) != 0; i = (i + 1) & v->pairs.mask) {
        const struct merge *m = &v->merges[number_in(slot)];
        if (!((slot ^ hash) >> NUMBER_BITS) && m->left == left && m->right == right)
            break;
    }
    return i;
}

/* The rank of a pair of tokens and what they join to; SPK_NO_TOKEN without one. */
static inline uint32_t find_pair(const struct spk_vocabulary *v, uint32_t left, uint32_t right,
                                 uint32_t *joined)
{
    const uint32_t at = find_pair_slot(v, pair_hash(v, left, right), left, right);
    const uint32_t slot = v->pairs.slots[at];
    if (!slot)
        return SPK_NO_TOKEN;
    *joined = v->merges[number_in(slot)].joined;
    return number_in(slot);
}

#endif
