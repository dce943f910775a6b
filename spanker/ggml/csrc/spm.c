/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SentencePiece BPE: the characters of a word merge as long as they make a token, the one with the
 * highest score first; what is no token in the end is written byte by byte.
 *
 * Words are cut where no token reaches across, which changes no id: it keeps what is merged at a
 * time in the cache.
 */
#include "merging.h"

static const uint8_t SPACE[3] = {0xe2, 0x96, 0x81}; /* U+2581 */

static inline int is_space(const uint8_t *p, size_t n)
{
    return n >= sizeof SPACE && !memcmp(p, SPACE, sizeof SPACE);
}

/* The character that begins at p and its bytes, at most n; any number for what is no UTF-8. */
static inline uint32_t character_at(const uint8_t *p, size_t n, size_t *bytes)
{
    uint32_t character = *p;
    *bytes = utf8_bytes(*p);
    if (*bytes > n)
        *bytes = n;
    if (*bytes > 1) {
        character &= 0x7fu >> *bytes;
        for (size_t i = 1; i < *bytes; i++)
            character = character << 6 | (p[i] & 0x3f);
    }
    return character & 0x1fffff;
}

static inline int has(const uint8_t *characters, uint32_t character)
{
    return character < 8 * SPK_CHARACTERS_BYTES && characters[character / 8] >> character % 8 & 1;
}

void spk_spm_before_space(const struct spk_vocabulary *v, uint8_t *characters)
{
    for (uint32_t id = 0; id < v->count; id++) {
        const struct spk_token token = spk_vocabulary_token(v, id);
        for (size_t i = 1; i < token.nbytes; i++) {
            const uint8_t *space = token.text + i;
            size_t back = 1, bytes;
            if (*space != SPACE[0] || !is_space(space, token.nbytes - i))
                continue;
            while (back < i && (*(space - back) & 0xc0) == 0x80)
                back++;
            const uint32_t before = character_at(space - back, back, &bytes);
            if (!is_space(space - back, back))
                characters[before / 8] |= (uint8_t)(1u << before % 8);
        }
    }
}

struct context {
    const struct spk_vocabulary *v;
    const struct spk_spm *spm;
    const uint8_t *word;
};

/* The token of this text, if it is one that may come out. */
static inline uint32_t token_of(const struct context *c, uint32_t start, uint32_t nbytes)
{
    const uint32_t id = spk_vocabulary_find(c->v, c->word + start, nbytes);
    if (id == SPK_NO_TOKEN || !(c->spm->kinds >> (c->spm->types[id] & 31) & 1))
        return SPK_NO_TOKEN;
    return id;
}

/* The higher the score, the lower the rank; never NO_RANK, which would be that of a NaN. */
static inline uint32_t rank_of_score(float score)
{
    uint32_t bits;
    score += 0.0f; /* -0 is as good as 0 */
    memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? bits : ~(bits | 0x80000000u);
}

static uint32_t rank_of(const void *context, const struct symbol *left, const struct symbol *right,
                        uint32_t *joined)
{
    const struct context *c = context;
    *joined = token_of(c, left->start, left->nbytes + right->nbytes);
    return *joined == SPK_NO_TOKEN ? NO_RANK : rank_of_score(c->spm->scores[*joined]);
}

static size_t write_bytes(const struct spk_spm *spm, const uint8_t *p, size_t n, uint32_t *ids)
{
    for (size_t i = 0; i < n; i++) {
        ids[i] = spm->byte_ids[p[i]];
        if (ids[i] == SPK_NO_TOKEN) {
            ids[0] = spm->unknown_id;
            return 1;
        }
    }
    return n;
}

/* Where the word that begins at `at` ends: before the first space that follows a character which no
 * token has before a space. */
static size_t word_end(const struct spk_spm *spm, const uint8_t *text, size_t nbytes, size_t at,
                       size_t *characters)
{
    uint32_t before = 0;
    int after_character = 0;
    *characters = 0;
    for (size_t bytes; at < nbytes; at += bytes, ++*characters) {
        const int space = is_space(text + at, nbytes - at);
        if (space && after_character && !has(spm->before_space, before))
            break;
        before = character_at(text + at, nbytes - at, &bytes);
        after_character = !space;
    }
    return at;
}

int spk_spm_encode(const struct spk_vocabulary *v, const struct spk_spm *spm, const uint8_t *text,
                   size_t nbytes, uint32_t *ids, size_t *id_count)
{
    struct scratch s;
    size_t done = 0, characters;
    int status = SPK_VOCABULARY_OK;
    *id_count = 0;
    if (nbytes > SPK_ENCODED_BYTES_MAX)
        return SPK_VOCABULARY_E_BOUNDS;
    scratch_init(&s);
    for (size_t at = 0, end; at < nbytes; at = end) {
        const struct context c = {v, spm, text + at};
        end = word_end(spm, text, nbytes, at, &characters);
        if (!scratch_reserve(&s, characters)) {
            status = SPK_VOCABULARY_E_NOMEM;
            break;
        }
        for (size_t i = 0, start = 0, bytes; i < characters; i++, start += bytes) {
            character_at(text + at + start, end - at - start, &bytes);
            s.symbols[i].start = (uint32_t)start;
            s.symbols[i].nbytes = (uint32_t)bytes;
            s.symbols[i].id = token_of(&c, (uint32_t)start, (uint32_t)bytes);
        }
        merge_symbols(&s, characters, rank_of, &c);
        for (uint32_t i = 0; i != NO_SYMBOL; i = s.symbols[i].next) {
            const struct symbol *symbol = &s.symbols[i];
            if (symbol->id != SPK_NO_TOKEN)
                ids[done++] = symbol->id;
            else
                done += write_bytes(spm, c.word + symbol->start, symbol->nbytes, ids + done);
        }
    }
    scratch_free(&s);
    *id_count = done;
    return status;
}
