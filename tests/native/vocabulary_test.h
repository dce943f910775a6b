/* SPDX-License-Identifier: Apache-2.0 */
/* Arrays of strings for the tests of vocabularies, in buffers exactly as large as they are. */
#ifndef VOCABULARY_TEST_H
#define VOCABULARY_TEST_H

#include "native_test.h"
#include "spk_vocabulary.h"

struct strings {
    uint8_t *bytes;
    size_t nbytes, count;
};

static inline void add_string(struct strings *s, const void *text, size_t nbytes)
{
    uint8_t *bytes = exact(s->nbytes + 8 + nbytes);
    if (s->nbytes)
        memcpy(bytes, s->bytes, s->nbytes);
    for (int i = 0; i < 8; i++)
        bytes[s->nbytes + i] = (uint8_t)((uint64_t)nbytes >> 8 * i);
    if (nbytes)
        memcpy(bytes + s->nbytes + 8, text, nbytes);
    free(s->bytes);
    s->bytes = bytes;
    s->nbytes += 8 + nbytes;
    s->count++;
}

static inline void add_text(struct strings *s, const char *text)
{
    add_string(s, text, strlen(text));
}

static inline struct spk_vocabulary *vocabulary_of(struct rng *r, const struct strings *tokens)
{
    const uint64_t key[2] = {rng_next(r), rng_next(r)};
    struct spk_vocabulary *v;
    size_t where;
    CHECK_EQUAL(spk_vocabulary_create(tokens->bytes, tokens->nbytes, tokens->count, key, &v, &where),
                SPK_VOCABULARY_OK);
    return v;
}

#endif
