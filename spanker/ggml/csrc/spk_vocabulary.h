/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model's tokens and merges as a compact, immutable object, and text to ids with it.
 *
 * Here live the tokens' text, finding a token by it, and the merging of a word's symbols.  How
 * text is cut into words, special tokens, and what a file's keys mean do not live here.
 *
 * An array of strings is what GGUF has: for each string its length (64 bits, little endian), then
 * its bytes.  Its contents are claims of a file and checked; so is what is given as text, save that
 * it may be no UTF-8: then the ids are some ids, and nothing outside of the arguments is touched.
 * Any number of threads may use a vocabulary that is complete.
 */
#ifndef SPK_VOCABULARY_H
#define SPK_VOCABULARY_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
#define SPK_TOKENS_VOCABULARY_MAX 2097152
#define SPK_MERGES_MAX 4194304
#define SPK_VOCABULARY_BYTES_MAX 1073741824 /* of all tokens' text */
#define SPK_ENCODED_BYTES_MAX 1073741824    /* of a text that is encoded at once */
#define SPK_CHARACTERS_BYTES 139264         /* of a bit for each character of Unicode */
#define SPK_NO_TOKEN 0xffffffffu

/* Statuses. */
#define SPK_VOCABULARY_OK 0
#define SPK_VOCABULARY_E_NOMEM 1
#define SPK_VOCABULARY_E_BOUNDS 2 /* too many, too long, or beyond the end of what was given */
#define SPK_VOCABULARY_E_UTF8 3
#define SPK_VOCABULARY_E_TWICE 4 /* a token is there already */
#define SPK_VOCABULARY_E_MERGE 5 /* not two tokens with a space between, which join to a third */

struct spk_vocabulary;

struct spk_token {
    const uint8_t *text;
    size_t nbytes;
};

/* Where each of `count` strings ends (unless `ends` is NULL) and, in *nbytes, all of them; on
 * entry *nbytes is how much may be read. */
int spk_strings_scan(const uint8_t *strings, size_t *nbytes, size_t count, int64_t *ends);

/* The tokens of an array of strings; token i that is empty becomes "[EMPTY_i]".  The key should be
 * random: it makes the time that a hostile file takes independent of its contents.  On an error
 * *where is the string that it is about. */
int spk_vocabulary_create(const uint8_t *strings, size_t nbytes, size_t count,
                          const uint64_t key[2], struct spk_vocabulary **out, size_t *where);
void spk_vocabulary_destroy(struct spk_vocabulary *v); /* NULL is fine */

/* Adds the merges, "left right", the ones to be done first at the front; once.  What joins two
 * tokens in two places counts where it stands first. */
int spk_vocabulary_add_merges(struct spk_vocabulary *v, const uint8_t *strings, size_t nbytes,
                              size_t count, size_t *where);

/* The id must be below the count of tokens. */
struct spk_token spk_vocabulary_token(const struct spk_vocabulary *v, uint32_t id);
/* The token with this text, or SPK_NO_TOKEN. */
uint32_t spk_vocabulary_find(const struct spk_vocabulary *v, const uint8_t *text, size_t nbytes);

/* Byte-level BPE: a word's symbols are its bytes. */
struct spk_bpe {
    uint32_t byte_ids[256];  /* the token of each byte, or SPK_NO_TOKEN: it vanishes */
    uint16_t characters[256]; /* that bytes are written with in tokens; below 0x800 */
    int whole_words;         /* a word that is a token is taken without merging */
};

/* The ids of a text of words, words[i] characters each.  There is room for nbytes ids. */
int spk_bpe_encode(const struct spk_vocabulary *v, const struct spk_bpe *bpe, const uint8_t *text,
                   size_t nbytes, const uint32_t *words, size_t count, uint32_t *ids,
                   size_t *id_count);

/* SentencePiece BPE: symbols are characters, and any two that together are a token merge. */
struct spk_spm {
    const float *scores;    /* of each token, none of them NaN; the highest merges first */
    const uint8_t *types;   /* of each token, below 32 */
    uint32_t kinds;         /* bit t: tokens of type t may come out */
    uint32_t unknown_id;    /* of a character that has no token, and not all of its bytes have */
    uint32_t byte_ids[256]; /* the token that stands for a byte, or SPK_NO_TOKEN */
    const uint8_t *before_space; /* as spk_spm_before_space left it */
};

/* Sets the bits of the characters that stand before a space (U+2581) within a token: only after
 * those, merges reach beyond the end of a word.  The rest must be zero. */
void spk_spm_before_space(const struct spk_vocabulary *v, uint8_t *characters);

/* The ids of a text with U+2581 for its spaces.  There is room for nbytes ids. */
int spk_spm_encode(const struct spk_vocabulary *v, const struct spk_spm *spm, const uint8_t *text,
                   size_t nbytes, uint32_t *ids, size_t *id_count);
/* cffi: end */

#endif
