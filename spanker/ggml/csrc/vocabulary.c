/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tokens and merges of a vocabulary: made once, checked, and found by what they are.
 */
#include <stdio.h>
#include <stdlib.h>

#include "vocabulary_internal.h"

/* --- hashing text --------------------------------------------------------------------- */

static inline uint64_t rotated(uint64_t x, int by)
{
    return (x << by) | (x >> (64 - by));
}

#define sip_round(a, b, c, d)                                            \
    do {                                                                 \
        a += b, b = rotated(b, 13), b ^= a, a = rotated(a, 32);          \
        c += d, d = rotated(d, 16), d ^= c;                              \
        a += d, d = rotated(d, 21), d ^= a;                              \
        c += b, b = rotated(b, 17), b ^= c, c = rotated(c, 32);          \
    } while (0)

/* SipHash-1-3 (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012), as Python hashes
 * its strings: who does not know the key cannot make texts that collide.  Of the last word's bytes
 * some are those of the one before; the length makes the message another one for each text. */
static uint32_t text_hash(const struct spk_vocabulary *v, const uint8_t *p, size_t n)
{
    uint64_t a = v->key[0] ^ 0x736f6d6570736575u, b = v->key[1] ^ 0x646f72616e646f6du;
    uint64_t c = v->key[0] ^ 0x6c7967656e657261u, d = v->key[1] ^ 0x7465646279746573u;
    uint64_t word = n;
    d ^= word;
    sip_round(a, b, c, d);
    a ^= word;
    for (size_t i = 0; i + 8 < n; i += 8) {
        word = little_endian_64(p + i);
        d ^= word;
        sip_round(a, b, c, d);
        a ^= word;
    }
    word = last_word(p, n);
    d ^= word;
    sip_round(a, b, c, d);
    a ^= word;
    c ^= 0xff;
    sip_round(a, b, c, d);
    sip_round(a, b, c, d);
    sip_round(a, b, c, d);
    return (uint32_t)((a ^ b ^ c ^ d) >> 32);
}

/* So many are looked up side by side, so that they wait for memory together. */
#define AHEAD 16

/* --- tables ------------------------------------------------------------------------------ */

/* At most half full. */
static int make_table(struct table *table, size_t count)
{
    size_t slots = 2;
    while (slots < 2 * count)
        slots *= 2;
    table->slots = calloc(slots, sizeof *table->slots);
    table->mask = (uint32_t)(slots - 1);
    return table->slots != NULL;
}

static inline uint32_t slot_of(uint32_t hash, uint32_t number)
{
    return (hash & ~NUMBER_MASK) | (number + 1);
}

static inline int is_text(const struct spk_vocabulary *v, uint32_t id, const uint8_t *text,
                          size_t nbytes)
{
    const uint32_t start = v->starts[id];
    return v->starts[id + 1] - start == nbytes && same_bytes(v->text + start, text, nbytes);
}

/* Where in the table the token with this text is, or the free slot where it would be. */
static inline uint32_t find_slot(const struct spk_vocabulary *v, uint32_t hash,
                                 const uint8_t *text, size_t nbytes)
{
    uint32_t i = hash & v->tokens.mask, slot;
    for (; (slot = v->tokens.slots[i]) != 0; i = (i + 1) & v->tokens.mask)
        if (!((slot ^ hash) >> NUMBER_BITS) && is_text(v, number_in(slot), text, nbytes))
            break;
    return i;
}

static inline uint32_t find_hashed(const struct spk_vocabulary *v, uint32_t hash,
                                   const uint8_t *text, size_t nbytes)
{
    const uint32_t slot = v->tokens.slots[find_slot(v, hash, text, nbytes)];
    return slot ? number_in(slot) : SPK_NO_TOKEN;
}

uint32_t spk_vocabulary_find(const struct spk_vocabulary *v, const uint8_t *text, size_t nbytes)
{
    if (!nbytes || nbytes > v->longest)
        return SPK_NO_TOKEN;
    return find_hashed(v, text_hash(v, text, nbytes), text, nbytes);
}

struct spk_token spk_vocabulary_token(const struct spk_vocabulary *v, uint32_t id)
{
    return (struct spk_token){v->text + v->starts[id], v->starts[id + 1] - v->starts[id]};
}

/* --- tokens ------------------------------------------------------------------------------ */

static int empty_name(char name[32], size_t id)
{
    return snprintf(name, 32, "[EMPTY_%zu]", id);
}

/* The text's size in *total. */
static int measure(const uint8_t *strings, size_t nbytes, size_t count, uint64_t *total,
                   size_t *where)
{
    struct spk_token token;
    size_t at = 0;
    char name[32];
    *total = 0;
    for (size_t i = 0; i < count; i++) {
        *where = i;
        if (!next_string(strings, nbytes, &at, &token))
            return SPK_VOCABULARY_E_BOUNDS;
        *total += token.nbytes ? token.nbytes : (size_t)empty_name(name, i);
        if (*total > SPK_VOCABULARY_BYTES_MAX)
            return SPK_VOCABULARY_E_BOUNDS;
    }
    return SPK_VOCABULARY_OK;
}

static void copy_tokens(struct spk_vocabulary *v, const uint8_t *strings, size_t nbytes)
{
    struct spk_token token;
    size_t at = 0;
    char name[32];
    v->starts[0] = 0;
    for (uint32_t i = 0; i < v->count && next_string(strings, nbytes, &at, &token); i++) {
        if (!token.nbytes) {
            token.nbytes = (size_t)empty_name(name, i);
            token.text = (const uint8_t *)name;
        }
        memcpy(v->text + v->starts[i], token.text, token.nbytes);
        v->starts[i + 1] = v->starts[i] + (uint32_t)token.nbytes;
        if (token.nbytes > v->longest)
            v->longest = (uint32_t)token.nbytes;
    }
}

/* All text at once, where no character may reach from a token into the next; only if that fails
 * token by token. */
static int check_utf8(const struct spk_vocabulary *v, size_t *where)
{
    struct utf8_check check;
    int valid;
    spk_utf8_init(&check);
    valid = spk_utf8_valid(&check, v->text, v->starts[v->count]);
    for (uint32_t i = 0; i < v->count; i++)
        valid &= (v->text[v->starts[i]] & 0xc0) != 0x80;
    for (uint32_t i = 0; i < v->count && !valid; i++) {
        const struct spk_token token = spk_vocabulary_token(v, i);
        *where = i;
        if (!spk_utf8_valid(&check, token.text, token.nbytes))
            return SPK_VOCABULARY_E_UTF8;
    }
    return SPK_VOCABULARY_OK;
}

static int enter_tokens(struct spk_vocabulary *v, size_t *where)
{
    uint32_t hashes[AHEAD];
    for (uint32_t first = 0; first < v->count; first += AHEAD) {
        const uint32_t group = v->count - first < AHEAD ? v->count - first : AHEAD;
        for (uint32_t i = 0; i < group; i++) {
            const struct spk_token token = spk_vocabulary_token(v, first + i);
            hashes[i] = text_hash(v, token.text, token.nbytes);
            __builtin_prefetch(&v->tokens.slots[hashes[i] & v->tokens.mask], 1);
        }
        for (uint32_t i = 0; i < group; i++) {
            const struct spk_token token = spk_vocabulary_token(v, first + i);
            uint32_t *slot = &v->tokens.slots[find_slot(v, hashes[i], token.text, token.nbytes)];
            *where = first + i;
            if (*slot)
                return SPK_VOCABULARY_E_TWICE;
            *slot = slot_of(hashes[i], first + i);
        }
    }
    return SPK_VOCABULARY_OK;
}

int spk_vocabulary_create(const uint8_t *strings, size_t nbytes, size_t count,
                          const uint64_t key[2], struct spk_vocabulary **out, size_t *where)
{
    struct spk_vocabulary *v;
    uint64_t total;
    int status;
    *out = NULL;
    *where = 0;
    if (count > SPK_TOKENS_VOCABULARY_MAX)
        return SPK_VOCABULARY_E_BOUNDS;
    status = measure(strings, nbytes, count, &total, where);
    if (status)
        return status;
    v = calloc(1, sizeof *v);
    if (!v)
        return SPK_VOCABULARY_E_NOMEM;
    v->key[0] = key[0], v->key[1] = key[1];
    for (uint32_t i = 0; i < 2; i++) {
        const uint8_t low = (uint8_t)(2 * i), high = (uint8_t)(2 * i + 1);
        v->pair_key[i] = ((uint64_t)text_hash(v, &high, 1) << 32 | text_hash(v, &low, 1)) | 1;
    }
    v->count = (uint32_t)count;
    v->text = malloc(total ? total : 1);
    v->starts = malloc((count + 1) * sizeof *v->starts);
    if (v->text && v->starts && make_table(&v->tokens, count)) {
        copy_tokens(v, strings, nbytes);
        status = check_utf8(v, where);
        if (!status)
            status = enter_tokens(v, where);
    } else {
        status = SPK_VOCABULARY_E_NOMEM;
    }
    if (status)
        spk_vocabulary_destroy(v);
    else
        *out = v;
    return status;
}

void spk_vocabulary_destroy(struct spk_vocabulary *v)
{
    if (!v)
        return;
    free(v->text);
    free(v->starts);
    free(v->merges);
    free(v->tokens.slots);
    free(v->pairs.slots);
    free(v);
}

/* --- merges ------------------------------------------------------------------------------ */

/* Of a merge: its text, its halves and where in the table these are looked for. */
struct pair {
    struct spk_token left, right;
    uint32_t left_hash, right_hash;
};

/* 0 for what cannot be two tokens that join to a third. */
static int split_pair(const struct spk_vocabulary *v, const struct spk_token *text,
                      struct pair *out)
{
    const uint8_t *space = memchr(text->text, ' ', text->nbytes);
    if (!space || space == text->text || text->nbytes - 1 > v->longest)
        return 0;
    out->left = (struct spk_token){text->text, (size_t)(space - text->text)};
    out->right = (struct spk_token){space + 1, text->nbytes - 1 - out->left.nbytes};
    out->left_hash = text_hash(v, out->left.text, out->left.nbytes);
    out->right_hash = text_hash(v, out->right.text, out->right.nbytes);
    __builtin_prefetch(&v->tokens.slots[out->left_hash & v->tokens.mask]);
    __builtin_prefetch(&v->tokens.slots[out->right_hash & v->tokens.mask]);
    return 1;
}

/* Whether a token's text is that of both halves. */
static int is_joined(const struct spk_vocabulary *v, uint32_t id, const struct pair *pair)
{
    const struct spk_token token = spk_vocabulary_token(v, id);
    return token.nbytes == pair->left.nbytes + pair->right.nbytes &&
           same_bytes(token.text, pair->left.text, pair->left.nbytes) &&
           same_bytes(token.text + pair->left.nbytes, pair->right.text, pair->right.nbytes);
}

/* `guess` is looked at first, `room` is for the longest token. */
static int find_merge(const struct spk_vocabulary *v, const struct pair *pair, uint32_t guess,
                      uint8_t *room, struct merge *out)
{
    const struct spk_token *left = &pair->left, *right = &pair->right;
    out->left = find_hashed(v, pair->left_hash, left->text, left->nbytes);
    out->right = find_hashed(v, pair->right_hash, right->text, right->nbytes);
    if (out->left == SPK_NO_TOKEN || out->right == SPK_NO_TOKEN)
        return 0;
    if (guess < v->count && is_joined(v, guess, pair)) {
        out->joined = guess;
        return 1;
    }
    memcpy(room, left->text, left->nbytes);
    memcpy(room + left->nbytes, right->text, right->nbytes);
    out->joined = spk_vocabulary_find(v, room, left->nbytes + right->nbytes);
    return out->joined != SPK_NO_TOKEN;
}

static int add_merges(struct spk_vocabulary *v, const uint8_t *strings, size_t nbytes,
                      size_t count, uint8_t *room, size_t *where)
{
    struct spk_token text;
    struct pair pairs[AHEAD];
    uint32_t hashes[AHEAD], guess = 0;
    size_t at = 0;
    for (size_t first = 0; first < count; first += AHEAD) {
        const size_t group = count - first < AHEAD ? count - first : AHEAD;
        size_t sound = 0;
        for (; sound < group; sound++) {
            if (!next_string(strings, nbytes, &at, &text))
                return SPK_VOCABULARY_E_BOUNDS;
            if (!split_pair(v, &text, &pairs[sound]))
                break;
        }
        for (size_t i = 0; i < group; i++) {
            struct merge *m = &v->merges[first + i];
            *where = first + i;
            if (i == sound || !find_merge(v, &pairs[i], guess, room, m))
                return SPK_VOCABULARY_E_MERGE;
            /* Most vocabularies list what the merges make in the order of the merges. */
            guess = m->joined + 1;
            hashes[i] = pair_hash(v, m->left, m->right);
            __builtin_prefetch(&v->pairs.slots[hashes[i] & v->pairs.mask], 1);
        }
        for (size_t i = 0; i < group; i++) {
            const struct merge *m = &v->merges[first + i];
            uint32_t *slot = &v->pairs.slots[find_pair_slot(v, hashes[i], m->left, m->right)];
            if (!*slot)
                *slot = slot_of(hashes[i], (uint32_t)(first + i));
        }
    }
    v->merge_count = (uint32_t)count;
    return SPK_VOCABULARY_OK;
}

int spk_vocabulary_add_merges(struct spk_vocabulary *v, const uint8_t *strings, size_t nbytes,
                              size_t count, size_t *where)
{
    int status = SPK_VOCABULARY_E_NOMEM;
    *where = 0;
    if (count > SPK_MERGES_MAX || v->merges)
        return SPK_VOCABULARY_E_BOUNDS;
    uint8_t *room = malloc((size_t)v->longest + 1);
    v->merges = malloc((count ? count : 1) * sizeof *v->merges);
    if (room && v->merges && make_table(&v->pairs, count))
        status = add_merges(v, strings, nbytes, count, room, where);
    free(room);
    return status;
}
