/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Byte-level BPE: the bytes of a word merge in the order of the model's list of merges.
 */
#include "merging.h"

static uint32_t rank_of(const void *context, const struct symbol *left, const struct symbol *right,
                        uint32_t *joined)
{
    if (left->id == SPK_NO_TOKEN || right->id == SPK_NO_TOKEN)
        return NO_RANK;
    return find_pair(context, left->id, right->id, joined);
}

/* The token that the word is as a whole; `room` is for the longest token and one character. */
static uint32_t whole_word(const struct spk_vocabulary *v, const struct spk_bpe *bpe,
                           const uint8_t *word, size_t nbytes, uint8_t *room)
{
    size_t n = 0;
    for (size_t i = 0; i < nbytes && n <= v->longest; i++) {
        const unsigned character = bpe->characters[word[i]];
        if (character >= 0x80) {
            room[n++] = (uint8_t)(0xc0 | (character >> 6 & 0x1f));
            room[n++] = (uint8_t)(0x80 | (character & 0x3f));
        } else {
            room[n++] = (uint8_t)character;
        }
    }
    return spk_vocabulary_find(v, room, n);
}

static size_t merge_word(const struct spk_vocabulary *v, const struct spk_bpe *bpe,
                         const uint8_t *word, size_t nbytes, struct scratch *s, uint32_t *ids)
{
    size_t count = 0;
    for (size_t i = 0; i < nbytes; i++)
        s->symbols[i].id = bpe->byte_ids[word[i]];
    if (nbytes > 1 && v->merge_count)
        merge_symbols(s, nbytes, rank_of, v);
    else
        for (size_t i = 0; i < nbytes; i++)
            s->symbols[i].next = i + 1 < nbytes ? (uint32_t)(i + 1) : NO_SYMBOL;
    for (uint32_t i = 0; i != NO_SYMBOL; i = s->symbols[i].next)
        if (s->symbols[i].id != SPK_NO_TOKEN)
            ids[count++] = s->symbols[i].id;
    return count;
}

/* Where a word of so many characters ends; 0 if the text is shorter. */
static size_t word_end(const uint8_t *text, size_t nbytes, size_t at, uint32_t characters)
{
    for (; characters; characters--) {
        if (at == nbytes)
            return 0;
        at++;
        while (at < nbytes && (text[at] & 0xc0) == 0x80)
            at++;
    }
    return at;
}

int spk_bpe_encode(const struct spk_vocabulary *v, const struct spk_bpe *bpe, const uint8_t *text,
                   size_t nbytes, const uint32_t *words, size_t count, uint32_t *ids,
                   size_t *id_count)
{
    struct scratch s;
    uint8_t *room = NULL;
    size_t at = 0, done = 0;
    int status = SPK_VOCABULARY_OK;
    *id_count = 0;
    if (nbytes > SPK_ENCODED_BYTES_MAX)
        return SPK_VOCABULARY_E_BOUNDS;
    if (bpe->whole_words && !(room = malloc((size_t)v->longest + 2)))
        return SPK_VOCABULARY_E_NOMEM;
    scratch_init(&s);
    for (size_t i = 0; i < count && !status; i++) {
        if (!words[i])
            continue;
        const size_t end = word_end(text, nbytes, at, words[i]);
        uint32_t whole = SPK_NO_TOKEN;
        if (!end) {
            status = SPK_VOCABULARY_E_BOUNDS;
            break;
        }
        if (room)
            whole = whole_word(v, bpe, text + at, end - at, room);
        if (whole != SPK_NO_TOKEN)
            ids[done++] = whole;
        else if (scratch_reserve(&s, end - at))
            done += merge_word(v, bpe, text + at, end - at, &s, ids + done);
        else
            status = SPK_VOCABULARY_E_NOMEM;
        at = end;
    }
    scratch_free(&s);
    free(room);
    *id_count = done;
    return status;
}
