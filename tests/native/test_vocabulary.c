/* SPDX-License-Identifier: Apache-2.0 */
/* Vocabularies find their tokens, refuse what is wrong at the right place, and encode as the rule
 * of merging says; no contents of a file or a text make them touch a byte of another's. */
#include "vocabulary_test.h"

#define MERGES 40
#define WORD 60

static uint8_t *copy_of(const void *bytes, size_t nbytes)
{
    uint8_t *copy = exact(nbytes);
    if (nbytes)
        memcpy(copy, bytes, nbytes);
    return copy;
}

static uint32_t find(const struct spk_vocabulary *v, const void *text, size_t nbytes)
{
    uint8_t *copy = copy_of(text, nbytes);
    uint32_t id = spk_vocabulary_find(v, copy, nbytes);
    free(copy);
    return id;
}

static void test_finding(void)
{
    struct rng r = {.state = 1};
    struct strings tokens = {0};
    char text[80];
    CASE("tokens of every length");
    add_text(&tokens, "");
    for (int n = 1; n < 70; n++)
        for (int last = 'a'; last <= 'c'; last++) {
            memset(text, 'x', sizeof text);
            text[n - 1] = (char)last;
            text[0] = n > 1 ? (char)last : text[0];
            add_string(&tokens, text, (size_t)n);
        }
    struct spk_vocabulary *v = vocabulary_of(&r, &tokens);
    for (size_t id = 0, at = 0; id < tokens.count; id++) {
        const size_t n = tokens.bytes[at];
        const struct spk_token token = spk_vocabulary_token(v, (uint32_t)id);
        if (n) {
            CHECK_EQUAL(find(v, tokens.bytes + at + 8, n), id);
            CHECK_EQUAL(token.nbytes, n);
            CHECK(!memcmp(token.text, tokens.bytes + at + 8, n));
        }
        at += 8 + n;
    }
    CHECK_EQUAL(find(v, "[EMPTY_0]", 9), 0);
    CHECK_EQUAL(find(v, "", 0), SPK_NO_TOKEN);
    CHECK_EQUAL(find(v, "x", 1), SPK_NO_TOKEN);
    CHECK_EQUAL(find(v, "axxd", 4), SPK_NO_TOKEN);
    memset(text, 'x', sizeof text);
    CHECK_EQUAL(find(v, text, sizeof text), SPK_NO_TOKEN);
    spk_vocabulary_destroy(v);
    free(tokens.bytes);
}

static void refused(const struct strings *tokens, size_t nbytes, int status, size_t where)
{
    static const uint64_t key[2] = {1, 2};
    struct spk_vocabulary *v;
    size_t found;
    uint8_t *bytes = copy_of(tokens->bytes, nbytes);
    CHECK_EQUAL(spk_vocabulary_create(bytes, nbytes, tokens->count, key, &v, &found), status);
    CHECK_EQUAL(found, where);
    CHECK(!v);
    free(bytes);
}

static void test_refusing(void)
{
    static const struct {
        const char *text;
        int valid;
    } texts[] = {
        {"\x7f", 1}, {"\x80", 0}, {"\xc1\xbf", 0}, {"\xc2\x80", 1}, {"\xdf\xbf", 1}, {"\xc2", 0},
        {"\xc2\x41", 0}, {"\xe0\x9f\xbf", 0}, {"\xe0\xa0\x80", 1}, {"\xed\x9f\xbf", 1},
        {"\xed\xa0\x80", 0}, {"\xee\x80\x80", 1}, {"\xe2\x82", 0}, {"\xf0\x8f\xbf\xbf", 0},
        {"\xf0\x90\x80\x80", 1}, {"\xf4\x8f\xbf\xbf", 1}, {"\xf4\x90\x80\x80", 0},
        {"\xf5\x80\x80\x80", 0}, {"\xf1\x80\x80", 0}, {"a\xff", 0}, {"\xc3\xa9\xa9", 0},
    };
    struct rng r = {.state = 2};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        struct strings tokens = {0};
        CASE("UTF-8 %zu", i);
        add_text(&tokens, "first");
        add_text(&tokens, texts[i].text);
        add_text(&tokens, "last");
        if (texts[i].valid)
            spk_vocabulary_destroy(vocabulary_of(&r, &tokens));
        else
            refused(&tokens, tokens.nbytes, SPK_VOCABULARY_E_UTF8, 1);
        free(tokens.bytes);
    }
    CASE("a character of two tokens");
    struct strings split = {0};
    add_text(&split, "\xc3");
    add_text(&split, "\xa9");
    refused(&split, split.nbytes, SPK_VOCABULARY_E_UTF8, 0);
    free(split.bytes);

    CASE("a token twice");
    struct strings twice = {0};
    add_text(&twice, "[EMPTY_2]");
    add_text(&twice, "a");
    add_text(&twice, "");
    refused(&twice, twice.nbytes, SPK_VOCABULARY_E_TWICE, 2);
    for (size_t n = 0; n < twice.nbytes; n++) {
        CASE("only %zu bytes", n);
        refused(&twice, n, SPK_VOCABULARY_E_BOUNDS, n < 17 ? 0 : n < 26 ? 1 : 2);
    }
    CASE("a length beyond all memory");
    memset(twice.bytes, 0xff, 8);
    refused(&twice, twice.nbytes, SPK_VOCABULARY_E_BOUNDS, 0);
    twice.count = SPK_TOKENS_VOCABULARY_MAX + 1;
    refused(&twice, twice.nbytes, SPK_VOCABULARY_E_BOUNDS, 0);
    free(twice.bytes);
}

static void test_merges_that_are_refused(void)
{
    static const char *const wrong[] = {"ab", " ab", "ab ", "a c", "c a", "b a", "a b a", "",
                                        "aaaaaaaaaaaaaaaaaa b"};
    struct rng r = {.state = 3};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        for (size_t before = 0; before < 40; before += 13) {
            struct strings tokens = {0}, merges = {0};
            size_t where;
            CASE("merge %zu after %zu", i, before);
            add_text(&tokens, "a"), add_text(&tokens, "b"), add_text(&tokens, "ab");
            for (size_t n = 0; n < before; n++)
                add_text(&merges, "a b");
            add_text(&merges, wrong[i]);
            add_text(&merges, "a b");
            struct spk_vocabulary *v = vocabulary_of(&r, &tokens);
            CHECK_EQUAL(spk_vocabulary_add_merges(v, merges.bytes, merges.nbytes, merges.count,
                                                  &where),
                        SPK_VOCABULARY_E_MERGE);
            CHECK_EQUAL(where, before);
            CHECK_EQUAL(spk_vocabulary_add_merges(v, merges.bytes, 0, 0, &where),
                        SPK_VOCABULARY_E_BOUNDS);
            spk_vocabulary_destroy(v);
            free(tokens.bytes), free(merges.bytes);
        }
}

/* --- the rule ---------------------------------------------------------------------------- */

/* Of each merge: its halves and what they join to. */
struct made {
    uint32_t left[MERGES], right[MERGES], joined[MERGES];
    size_t count;
};

static size_t rule(const struct made *made, uint32_t *ids, size_t count)
{
    for (;;) {
        size_t best = made->count, at = 0;
        for (size_t i = 0; i + 1 < count; i++)
            for (size_t rank = 0; rank < best; rank++)
                if (made->left[rank] == ids[i] && made->right[rank] == ids[i + 1])
                    best = rank, at = i;
        if (best == made->count)
            return count;
        ids[at] = made->joined[best];
        memmove(ids + at + 1, ids + at + 2, (count - at - 2) * sizeof *ids);
        count--;
    }
}

static void plan(struct spk_bpe *bpe, const struct spk_vocabulary *v)
{
    for (unsigned byte = 0; byte < 256; byte++) {
        const uint8_t text = (uint8_t)byte;
        bpe->byte_ids[byte] = byte < 0x80 ? find(v, &text, 1) : SPK_NO_TOKEN;
        bpe->characters[byte] = (uint16_t)byte;
    }
}

static void test_merging(uint64_t seed)
{
    struct rng r = {.state = seed};
    struct strings tokens = {0}, merges = {0};
    struct made made = {.count = 0};
    char texts[MERGES + 3][WORD], pair[2 * WORD];
    size_t where;
    CASE("seed %llu", (unsigned long long)seed);
    for (size_t i = 0; i < 3; i++) {
        snprintf(texts[i], WORD, "%c", (char)('a' + i));
        add_text(&tokens, texts[i]);
    }
    for (size_t tries = 0; tries < MERGES; tries++) {
        const uint32_t left = rng_below(&r, (uint32_t)tokens.count);
        const uint32_t right = rng_below(&r, (uint32_t)tokens.count);
        uint32_t joined = 0;
        if (strlen(texts[left]) + strlen(texts[right]) > 12)
            continue;
        snprintf(pair, sizeof pair, "%s%s", texts[left], texts[right]);
        while (joined < tokens.count && strcmp(texts[joined], pair))
            joined++;
        if (joined == tokens.count) {
            memcpy(texts[joined], pair, strlen(pair) + 1);
            add_text(&tokens, pair);
        }
        snprintf(pair, sizeof pair, "%s %s", texts[left], texts[right]);
        add_text(&merges, pair);
        made.left[made.count] = left, made.right[made.count] = right;
        made.joined[made.count++] = joined;
    }
    struct spk_vocabulary *v = vocabulary_of(&r, &tokens);
    struct spk_bpe bpe = {.whole_words = 0};
    CHECK_EQUAL(spk_vocabulary_add_merges(v, merges.bytes, merges.nbytes, merges.count, &where),
                SPK_VOCABULARY_OK);
    plan(&bpe, v);
    for (int turn = 0; turn < 50; turn++) {
        const size_t words = rng_below(&r, 4);
        uint32_t lengths[4], expected[4 * 90];
        size_t nbytes = 0, want = 0, got;
        uint8_t *text = exact(4 * 90);
        for (size_t w = 0; w < words; w++) {
            lengths[w] = rng_below(&r, 90);
            for (size_t i = 0; i < lengths[w]; i++) {
                text[nbytes + i] = (uint8_t)('a' + rng_below(&r, 3));
                expected[want + i] = (uint32_t)(text[nbytes + i] - 'a');
            }
            want += rule(&made, expected + want, lengths[w]);
            nbytes += lengths[w];
        }
        uint8_t *whole = copy_of(text, nbytes);
        uint32_t *ids = exact(nbytes * sizeof *ids);
        CHECK_EQUAL(spk_bpe_encode(v, &bpe, whole, nbytes, lengths, words, ids, &got),
                    SPK_VOCABULARY_OK);
        CHECK_EQUAL(got, want);
        for (size_t i = 0; i < got; i++)
            CHECK_EQUAL(ids[i], expected[i]);
        free(text), free(whole), free(ids);
    }
    spk_vocabulary_destroy(v);
    free(tokens.bytes), free(merges.bytes);
}

static void test_words_beyond_the_text(void)
{
    struct rng r = {.state = 5};
    struct strings tokens = {0};
    const uint32_t words[] = {2, 2};
    uint32_t ids[3];
    size_t count, where;
    CASE("words beyond the text");
    add_text(&tokens, "a"), add_text(&tokens, "aa");
    struct spk_vocabulary *v = vocabulary_of(&r, &tokens);
    struct spk_bpe bpe = {.whole_words = 1};
    plan(&bpe, v);
    CHECK_EQUAL(spk_bpe_encode(v, &bpe, (const uint8_t *)"aaa", 3, words, 2, ids, &count),
                SPK_VOCABULARY_E_BOUNDS);
    CHECK_EQUAL(count, 1);
    CHECK_EQUAL(ids[0], 1);
    CASE("no merges at all");
    CHECK_EQUAL(spk_vocabulary_add_merges(v, NULL, 0, 0, &where), SPK_VOCABULARY_OK);
    bpe.whole_words = 0;
    CHECK_EQUAL(spk_bpe_encode(v, &bpe, (const uint8_t *)"aaa", 3, words, 1, ids, &count),
                SPK_VOCABULARY_OK);
    CHECK_EQUAL(count, 2);
    spk_vocabulary_destroy(v);
    free(tokens.bytes);
}

/* --- any bytes ------------------------------------------------------------------------------ */

static void test_texts_that_are_no_text(uint64_t seed)
{
    static const uint8_t bytes[] = {'a', 'b', 0xe2, 0x96, 0x81, 0xc3, 0xa9, 0xf0, 0x80, 0xff, 0xf4};
    struct rng r = {.state = seed};
    struct strings tokens = {0};
    CASE("any bytes, seed %llu", (unsigned long long)seed);
    add_text(&tokens, "a"), add_text(&tokens, "a\xe2\x96\x81"), add_text(&tokens, "\xc3\xa9");
    add_text(&tokens, "\xf4\x8f\xbf\xbf\xe2\x96\x81"), add_text(&tokens, "aa");
    struct spk_vocabulary *v = vocabulary_of(&r, &tokens);
    static const float scores[5] = {0, 1, -1, 0, 2};
    static const uint8_t types[5] = {1, 1, 1, 1, 3};
    uint8_t *before = calloc(1, SPK_CHARACTERS_BYTES);
    struct spk_spm spm = {.scores = scores, .types = types, .unknown_id = 1, .before_space = before};
    struct spk_bpe bpe = {.whole_words = (int)rng_below(&r, 2)};
    CHECK(before != NULL);
    plan(&bpe, v);
    spk_spm_before_space(v, before);
    size_t set = 0;
    for (size_t i = 0; i < SPK_CHARACTERS_BYTES; i++)
        set += (size_t)__builtin_popcount(before[i]);
    CHECK_EQUAL(set, 2);
    CHECK(before['a' / 8] >> 'a' % 8 & 1);
    CHECK(before[SPK_CHARACTERS_BYTES - 1] >> 7);
    for (int turn = 0; turn < 300; turn++) {
        const size_t nbytes = rng_below(&r, 40);
        const uint32_t words[2] = {rng_below(&r, 12), rng_below(&r, 12)};
        uint8_t *text = exact(nbytes);
        uint32_t *ids = exact(nbytes * sizeof *ids);
        size_t count;
        for (size_t i = 0; i < nbytes; i++)
            text[i] = bytes[rng_below(&r, sizeof bytes)];
        for (unsigned byte = 0; byte < 256; byte++)
            spm.byte_ids[byte] = rng_below(&r, 3) ? 4 : SPK_NO_TOKEN;
        spm.kinds = rng_below(&r, 2) ? 2 : 10;
        CHECK_EQUAL(spk_spm_encode(v, &spm, text, nbytes, ids, &count), SPK_VOCABULARY_OK);
        CHECK(count <= nbytes);
        for (size_t i = 0; i < count; i++)
            CHECK(ids[i] < 5);
        spk_bpe_encode(v, &bpe, text, nbytes, words, 2, ids, &count);
        CHECK(count <= nbytes);
        free(text), free(ids);
    }
    spk_vocabulary_destroy(v);
    free(before), free(tokens.bytes);
}

int main(void)
{
    test_finding();
    test_refusing();
    test_merges_that_are_refused();
    for (uint64_t seed = 10; seed < 40; seed++)
        test_merging(seed);
    test_words_beyond_the_text();
    for (uint64_t seed = 50; seed < 60; seed++)
        test_texts_that_are_no_text(seed);
    puts("ok vocabulary");
    return 0;
}
