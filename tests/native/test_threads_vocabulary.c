/* SPDX-License-Identifier: Apache-2.0 */
/* Threads that share a vocabulary get the ids that one alone gets. */
#include <pthread.h>

#include "vocabulary_test.h"

#define THREADS 4
#define TEXT_BYTES 3000

static struct spk_vocabulary *vocabulary;
static struct spk_bpe bpe;
static uint8_t text[TEXT_BYTES];
static uint32_t words[TEXT_BYTES / 100], expected[TEXT_BYTES];
static size_t expected_count;

static void *encode(void *arg)
{
    for (int turn = 0; turn < 20; turn++) {
        uint32_t ids[TEXT_BYTES];
        size_t count;
        CHECK_EQUAL(spk_bpe_encode(vocabulary, &bpe, text, TEXT_BYTES, words, TEXT_BYTES / 100, ids,
                                   &count),
                    SPK_VOCABULARY_OK);
        CHECK_EQUAL(count, expected_count);
        CHECK(!memcmp(ids, expected, count * sizeof *ids));
    }
    return arg;
}

int main(void)
{
    struct rng r = {.state = 4};
    struct strings tokens = {0}, merges = {0};
    pthread_t threads[THREADS];
    size_t where;
    CASE("threads");
    add_text(&tokens, "a"), add_text(&tokens, "b"), add_text(&tokens, "ab");
    add_text(&tokens, "abab"), add_text(&tokens, "bb");
    add_text(&merges, "a b"), add_text(&merges, "ab ab"), add_text(&merges, "b b");
    vocabulary = vocabulary_of(&r, &tokens);
    CHECK_EQUAL(spk_vocabulary_add_merges(vocabulary, merges.bytes, merges.nbytes, merges.count,
                                          &where),
                SPK_VOCABULARY_OK);
    for (unsigned byte = 0; byte < 256; byte++)
        bpe.byte_ids[byte] = byte == 'a' ? 0 : byte == 'b' ? 1 : SPK_NO_TOKEN;
    for (size_t i = 0; i < TEXT_BYTES; i++)
        text[i] = (uint8_t)('a' + rng_below(&r, 2));
    for (size_t i = 0; i < TEXT_BYTES / 100; i++)
        words[i] = 100;
    CHECK_EQUAL(spk_bpe_encode(vocabulary, &bpe, text, TEXT_BYTES, words, TEXT_BYTES / 100, expected,
                               &expected_count),
                SPK_VOCABULARY_OK);
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_create(&threads[i], NULL, encode, NULL));
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_join(threads[i], NULL));
    spk_vocabulary_destroy(vocabulary);
    free(tokens.bytes), free(merges.bytes);
    puts("ok threads vocabulary");
    return 0;
}
