/* SPDX-License-Identifier: Apache-2.0 */
/* Runs every kernel of an instruction set beside the plain one, over awkward sizes, on buffers of
 * exactly the promised size, and compares all bytes of the outputs: results, gaps and all. */
#ifndef KERNEL_COMPARE_H
#define KERNEL_COMPARE_H

#include <math.h>

#include "native_test.h"
#include "spk_kernels.h"

#define PLAIN (&spk_kernels__scalar)

/* FNV-1a of all bytes that were compared: equal on every machine. */
static uint64_t compared_digest = 0xcbf29ce484222325u;

static inline void compare_bytes(const void *got, const void *expected, size_t n)
{
    const uint8_t *a = got, *b = expected;
    for (size_t i = 0; i < n; i++) {
        if (a[i] != b[i]) {
            fprintf(stderr, "byte %zu of %zu is %#x, expected %#x\n  case: %s\n", i, n, a[i], b[i],
                    test_case);
            exit(1);
        }
        compared_digest = (compared_digest ^ b[i]) * 0x100000001b3u;
    }
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

static const int quantised[] = {SPK_Q4_0, SPK_Q4_1, SPK_Q5_0, SPK_Q5_1,
                                SPK_Q8_0, SPK_Q4_K, SPK_Q5_K, SPK_Q6_K};
static const int unquantised[] = {SPK_F32, SPK_F16, SPK_BF16};

/* A finite f16, a twentieth of them subnormal. */
static inline uint16_t random_f16(struct rng *r)
{
    uint16_t h = (uint16_t)rng_next(r);
    return (h & 0x7c00u) == 0x7c00u ? (uint16_t)(h ^ 0x4000u) : h;
}

/* Every float but NaN and infinities, all exponents alike. */
static inline float any_finite(struct rng *r)
{
    uint32_t bits = (uint32_t)rng_next(r);
    float x;
    if ((bits & 0x7f800000u) == 0x7f800000u)
        bits ^= 0x40000000u;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Sets the f16 fields of all blocks of a row to `value`, or each to a random one. */
static inline void set_scales(struct rng *r, int format, uint8_t *row, size_t k,
                              const uint16_t *value)
{
    size_t block = spk_block_weights(format), bytes = spk_row_bytes(format, block);
    int two = format == SPK_Q4_1 || format == SPK_Q5_1 || format == SPK_Q4_K || format == SPK_Q5_K;
    for (size_t b = 0; b < k / block; b++, row += bytes)
        for (int i = 0; i < 1 + two; i++) {
            uint16_t h = value ? *value : random_f16(r);
            memcpy(row + (format == SPK_Q6_K ? 208 : 2 * i), &h, 2);
        }
}

static inline void random_row(struct rng *r, int format, uint8_t *row, size_t k)
{
    if (spk_block_weights(format) > 1) {
        for (size_t j = 0; j < spk_row_bytes(format, k); j++)
            row[j] = (uint8_t)rng_next(r);
        set_scales(r, format, row, k, NULL);
        return;
    }
    for (size_t j = 0; j < k; j++) {
        float x = rng_float(r);
        uint16_t h = random_f16(r);
        if (format == SPK_F32)
            memcpy(row + 4 * j, &x, 4);
        else if (format == SPK_F16)
            memcpy(row + 2 * j, &h, 2);
        else
            memcpy(row + 2 * j, (uint8_t *)&x + 2, 2);
    }
}

/* GGML rows with finite scales, packed. */
static inline uint8_t *random_packed(struct rng *r, int format, size_t rows, size_t k)
{
    size_t row_bytes = spk_row_bytes(format, k), row_stride = row_bytes + 3;
    uint8_t *raw = exact(span(rows, row_bytes, row_stride));
    uint8_t *packed = exact(spk_packed_bytes(format, rows, k));
    for (size_t i = 0; i < rows; i++)
        random_row(r, format, raw + i * row_stride, k);
    CHECK_EQUAL(spk_pack(format, raw, row_stride, packed, rows, k), SPK_OK);
    free(raw);
    return packed;
}

static inline void set_sums(struct spk_q8_block *x)
{
    x->minus_sum = x->minus_first = 0;
    for (int i = 0; i < SPK_BLOCK; i++) {
        x->minus_sum -= x->qs[i];
        x->minus_first -= i < 16 ? x->qs[i] : 0;
    }
    x->sum = (float)-x->minus_sum;
}

static inline void compare_matmul_q8(const struct spk_kernels *k, int format, size_t rows,
                                     size_t blocks, size_t tokens, size_t begin, size_t end)
{
    struct rng r = {.state = (uint64_t)format * 1000003 + rows * 10007 + blocks * 101 + tokens};
    CASE("%s matmul format %d, %zu rows, %zu blocks, %zu tokens, tiles %zu to %zu", k->name,
         format, rows, blocks, tokens, begin, end);
    size_t depth = blocks * spk_block_weights(format), count = tokens * depth / SPK_BLOCK;
    uint8_t *w = random_packed(&r, format, rows, depth);
    struct spk_q8_block *block = exact(count * sizeof *block);
    for (size_t i = 0; i < count; i++) {
        for (size_t j = 0; j < SPK_BLOCK; j++)
            block[i].qs[j] = (int8_t)((int)rng_below(&r, 255) - 127);
        block[i].d = rng_float(&r);
        set_sums(&block[i]);
    }
    struct spk_q8 x = {.block = block, .blocks = depth / SPK_BLOCK};
    size_t stride = rows + 5, bytes = span(tokens, rows, stride) * sizeof(float);
    float *got = exact(bytes), *expected = exact(bytes);
    k->matmul_q8[format](w, &x, got, stride, rows, tokens, begin, end);
    PLAIN->matmul_q8[format](w, &x, expected, stride, rows, tokens, begin, end);
    compare_bytes(got, expected, bytes);
    free(w), free(block), free(got), free(expected);
}

static inline void compare_matmul_float(const struct spk_kernels *k, int format, size_t rows,
                                        size_t depth, size_t tokens, size_t begin, size_t end)
{
    struct rng r = {.state = (uint64_t)format * 1000003 + rows * 10007 + depth * 101 + tokens};
    CASE("%s matmul format %d, %zu rows of %zu, %zu tokens, tiles %zu to %zu", k->name, format,
         rows, depth, tokens, begin, end);
    uint8_t *w = random_packed(&r, format, rows, depth);
    size_t x_stride = depth + 3, stride = rows + 5;
    float *x = exact_floats(&r, span(tokens, depth, x_stride));
    size_t bytes = span(tokens, rows, stride) * sizeof(float);
    float *got = exact(bytes), *expected = exact(bytes);
    k->matmul_f32[format](w, x, x_stride, got, stride, rows, depth, tokens, begin, end);
    PLAIN->matmul_f32[format](w, x, x_stride, expected, stride, rows, depth, tokens, begin, end);
    compare_bytes(got, expected, bytes);
    free(w), free(x), free(got), free(expected);
}

/* Groups of all sizes, pairs of tiles (they need many tokens), runs of blocks of both lengths. */
static inline void compare_matmuls(const struct spk_kernels *k)
{
    static const size_t rows[] = {0, 1, 15, 16, 17, 33}, blocks[] = {1, 2, 3, 5};
    static const size_t tokens[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 27};
    static const size_t depths[] = {0, 1, 7, 32, 33};
    for (int format = 0; format < SPK_FORMAT_COUNT; format++) {
        CASE("%s has kernels of format %d", k->name, format);
        CHECK_EQUAL(k->matmul_q8[format] != NULL, spk_block_weights(format) > 1);
        CHECK_EQUAL(k->matmul_f32[format] != NULL, spk_block_weights(format) == 1);
    }
    for (size_t a = 0; a < COUNT(rows); a++)
        for (size_t t = 0; t < COUNT(tokens); t++) {
            size_t tiles = (rows[a] + 15) / 16;
            for (size_t f = 0; f < COUNT(quantised); f++)
                for (size_t b = 0; b < COUNT(blocks); b++)
                    if (blocks[b] < 5 || spk_block_weights(quantised[f]) == SPK_BLOCK)
                        compare_matmul_q8(k, quantised[f], rows[a], blocks[b], tokens[t], 0, tiles);
            for (size_t f = 0; f < COUNT(unquantised); f++)
                for (size_t d = 0; d < COUNT(depths); d++)
                    compare_matmul_float(k, unquantised[f], rows[a], depths[d], tokens[t], 0,
                                         tiles);
        }
    for (size_t begin = 0; begin <= 3; begin++)
        for (size_t end = begin; end <= 3; end++) {
            for (size_t f = 0; f < COUNT(quantised); f++) {
                compare_matmul_q8(k, quantised[f], 41, 3, 6, begin, end);
                compare_matmul_q8(k, quantised[f], 41, 1, 25, begin, end);
            }
            for (size_t f = 0; f < COUNT(unquantised); f++)
                compare_matmul_float(k, unquantised[f], 41, 9, 6, begin, end);
        }
}

/* Integers as large as they get: nothing may wrap or saturate. */
static inline void compare_extreme_integers(const struct spk_kernels *k)
{
    static const uint8_t bytes[] = {0x00, 0x0f, 0x7f, 0x80, 0x81, 0xf0, 0xff};
    static const int activations[] = {127, -127};
    for (size_t f = 0; f < COUNT(quantised); f++)
        for (size_t i = 0; i < sizeof bytes; i++)
            for (size_t j = 0; j < COUNT(activations); j++) {
                int format = quantised[f];
                size_t depth = spk_block_weights(format), row = spk_row_bytes(format, depth);
                CASE("%s format %d, weights of %#x, activations of %d", k->name, format, bytes[i],
                     activations[j]);
                uint8_t *raw = exact(row), *w = exact(16 * row);
                memset(raw, bytes[i], row);
                set_scales(NULL, format, raw, depth, &(uint16_t){0x3c00});
                CHECK_EQUAL(spk_pack(format, raw, 0, w, 16, depth), SPK_OK);
                struct spk_q8_block block[8];
                for (size_t b = 0; b < depth / SPK_BLOCK; b++) {
                    memset(block[b].qs, activations[j], sizeof block[b].qs);
                    block[b].d = 1.0f;
                    set_sums(&block[b]);
                }
                struct spk_q8 x = {block, depth / SPK_BLOCK};
                float got[16], expected[16];
                k->matmul_q8[format](w, &x, got, 16, 16, 1, 0, 1);
                PLAIN->matmul_q8[format](w, &x, expected, 16, 16, 1, 0, 1);
                compare_bytes(got, expected, sizeof got);
                free(raw), free(w);
            }
}

static inline void compare_quantize(const struct spk_kernels *k)
{
    for (size_t width = 0; width <= 160; width += 32)
        for (size_t tokens = 0; tokens < 10; tokens += tokens < 6 ? 1 : 3)
            for (int kind = 0; kind < 3; kind++) {
                struct rng r = {.state = width * 7 + tokens * 3 + (uint64_t)kind};
                CASE("%s quantize, k %zu, %zu tokens, kind %d", k->name, width, tokens, kind);
                size_t blocks = width / 32, x_stride = width + 1, out_stride = blocks * 34 + 3;
                size_t count = span(tokens, width, x_stride);
                size_t bytes = span(tokens, blocks * 34, out_stride);
                float *x = exact_floats(&r, count);
                for (size_t i = 0; i < count; i++) {
                    if (kind == 1) /* scales over the whole range of f16 */
                        x[i] *= ldexpf(1.0f, (int)(i / 32 % 40) - 20);
                    if (kind == 2)
                        x[i] *= 0x1p-140f;
                }
                uint8_t *got = exact(bytes), *expected = exact(bytes);
                CHECK_EQUAL(k->quantize_q8(x, x_stride, got, out_stride, width, tokens), SPK_OK);
                CHECK_EQUAL(PLAIN->quantize_q8(x, x_stride, expected, out_stride, width, tokens),
                            SPK_OK);
                compare_bytes(got, expected, bytes);

                size_t expanded = tokens * blocks * sizeof(struct spk_q8_block);
                struct spk_q8_block *block[2] = {exact(expanded), exact(expanded)};
                k->expand_q8(got, out_stride, block[0], width, tokens);
                PLAIN->expand_q8(got, out_stride, block[1], width, tokens);
                compare_bytes(block[0], block[1], expanded);
                free(block[0]), free(block[1]);
                free(x), free(got), free(expected);
            }
}

static inline void compare_rows(const struct spk_kernels *k)
{
    static const size_t widths[] = {1, 7, 15, 16, 17, 31, 32, 33, 80};
    for (size_t a = 0; a < COUNT(widths); a++)
        for (size_t tokens = 0; tokens < 4; tokens++) {
            size_t n = widths[a], stride = n + 3, bytes = span(tokens, n, stride) * 4;
            struct rng r = {.state = n * 31 + tokens};
            CASE("%s rows of %zu, %zu tokens", k->name, n, tokens);
            float *x = exact_floats(&r, span(tokens, n, stride));
            float *y = exact_floats(&r, span(tokens, n, n)), *w = exact_floats(&r, n);
            float *got = exact(bytes), *expected = exact(bytes);
            CHECK_EQUAL(k->rmsnorm(x, stride, w, got, stride, n, tokens, 1e-5f), SPK_OK);
            CHECK_EQUAL(PLAIN->rmsnorm(x, stride, w, expected, stride, n, tokens, 1e-5f), SPK_OK);
            compare_bytes(got, expected, bytes);
            k->swiglu(x, stride, y, n, got, stride, n, tokens);
            PLAIN->swiglu(x, stride, y, n, expected, stride, n, tokens);
            compare_bytes(got, expected, bytes);
            k->add(got, stride, y, n, n, tokens);
            PLAIN->add(expected, stride, y, n, n, tokens);
            compare_bytes(got, expected, bytes);
            free(x), free(y), free(w), free(got), free(expected);
        }
    for (size_t dim = 2; dim <= 80; dim += 26)
        for (size_t part = 0; part <= dim; part += 2) {
            struct rng r = {.state = dim * 97 + part};
            size_t heads = 3, tokens = 3, stride = heads * dim + 1;
            size_t count = span(tokens, heads * dim, stride);
            uint32_t positions[] = {6, 0, 3};
            CASE("%s rope of %zu of %zu", k->name, part, dim);
            float *table = exact_floats(&r, 7 * part), *got = exact_floats(&r, count);
            float *expected = exact(count * sizeof *expected);
            memcpy(expected, got, count * sizeof *got);
            k->rope(got, stride, heads, dim, part, table, positions, tokens);
            PLAIN->rope(expected, stride, heads, dim, part, table, positions, tokens);
            compare_bytes(got, expected, count * sizeof *got);
            free(table), free(got), free(expected);
        }
}

/* swiglu over every magnitude: below -17 its result shows all bits of exp. */
static inline void compare_exp(const struct spk_kernels *k)
{
    enum { N = 1 << 16 };
    struct rng r = {.state = 11};
    float *x = exact(N * 4), *up = exact(N * 4), *got = exact(N * 4), *expected = exact(N * 4);
    CASE("%s exp", k->name);
    for (int i = 0; i < N; i++) {
        x[i] = i % 4 ? rng_float(&r) * 60.0f : any_finite(&r);
        up[i] = 1.5f;
    }
    k->swiglu(x, N, up, N, got, N, N, 1);
    PLAIN->swiglu(x, N, up, N, expected, N, N, 1);
    compare_bytes(got, expected, N * 4);
    free(x), free(up), free(got), free(expected);
}

static inline void compare_dequantize(const struct spk_kernels *k)
{
    for (int format = 0; format < SPK_FORMAT_COUNT; format++)
        for (size_t blocks = 0; spk_block_weights(format) && blocks < 4; blocks++) {
            struct rng r = {.state = (uint64_t)format * 1000 + blocks};
            CASE("%s dequantize format %d, %zu blocks", k->name, format, blocks);
            size_t weights = spk_block_weights(format), n = blocks * (weights > 1 ? weights : 33);
            uint8_t *row = exact(spk_row_bytes(format, n));
            random_row(&r, format, row, n);
            float *got = exact(n * 4), *expected = exact(n * 4);
            CHECK_EQUAL(k->dequantize_row(format, row, got, n), SPK_OK);
            CHECK_EQUAL(PLAIN->dequantize_row(format, row, expected, n), SPK_OK);
            compare_bytes(got, expected, n * 4);
            free(row), free(got), free(expected);
        }
    CASE("%s dequantize unknown format", k->name);
    CHECK_EQUAL(k->dequantize_row(10, NULL, NULL, 0), SPK_E_ARG);
    CHECK_EQUAL(k->dequantize_row(SPK_FORMAT_COUNT, NULL, NULL, 0), SPK_E_ARG);
}

static inline void compare_logits(const struct spk_kernels *k)
{
    static const size_t counts[] = {0, 1, 15, 16, 17, 255, 256, 257, 273, 600};
    static const size_t wanted[] = {0, 1, 3, 40, 700};
    for (size_t a = 0; a < COUNT(counts); a++)
        for (int ties = 0; ties < 2; ties++) {
            size_t n = counts[a], chunks = (n + 255) / 256;
            struct rng r = {.state = n * 2 + (uint64_t)ties};
            CASE("%s %zu logits%s", k->name, n, ties ? " with ties" : "");
            float *x = exact_floats(&r, n);
            for (size_t i = 0; ties && i < n; i++)
                x[i] = rintf(x[i]);
            float *got = exact(chunks * 8), *expected = exact(chunks * 8);
            CHECK_EQUAL(k->logit_stats(x, n, 1.25f, got), SPK_OK);
            CHECK_EQUAL(PLAIN->logit_stats(x, n, 1.25f, expected), SPK_OK);
            compare_bytes(got, expected, chunks * 8);
            free(got), free(expected);
            for (size_t b = 0; b < COUNT(wanted); b++) {
                size_t size = wanted[b] < n ? wanted[b] : n;
                uint32_t *ids[2] = {exact(size * 4), exact(size * 4)};
                float *values[2] = {exact(size * 4), exact(size * 4)};
                CHECK_EQUAL(k->top_k(x, n, wanted[b], ids[0], values[0]), size);
                CHECK_EQUAL(PLAIN->top_k(x, n, wanted[b], ids[1], values[1]), size);
                compare_bytes(ids[0], ids[1], size * 4);
                compare_bytes(values[0], values[1], size * 4);
                for (int i = 0; i < 2; i++)
                    free(ids[i]), free(values[i]);
            }
            free(x);
        }
}

static inline void compare_attention(const struct spk_kernels *k, size_t dim, size_t page_positions,
                                     size_t queries, size_t longest)
{
    struct rng r = {.state = dim * 100003 + page_positions * 1009 + queries * 101 + longest};
    size_t heads = 2, used = (longest + page_positions - 1) / page_positions, page_count = used + 1;
    size_t pool_bytes = page_count * heads * 2 * page_positions * dim * 2;
    size_t rounded = (longest + 15) / 16 * 16;
    CASE("%s attention, head size %zu, pages of %zu, %zu queries, %zu positions", k->name, dim,
         page_positions, queries, longest);
    uint16_t *pool[2] = {exact(pool_bytes), exact(pool_bytes)};
    float *scratch[2] = {exact(SPK_ATTENTION_ROWS * (rounded + dim) * 4),
                         exact(SPK_ATTENTION_ROWS * (rounded + dim) * 4)};
    for (size_t i = 0; i < pool_bytes / 2; i++)
        pool[0][i] = pool[1][i] = 0x7e00; /* NaN wherever nothing was stored */
    uint32_t *pages = exact(used * sizeof *pages);
    for (size_t i = 0; i < used; i++)
        pages[i] = (uint32_t)(used - i); /* in reverse, page 0 unused */
    struct spk_kv kv[2];
    for (int i = 0; i < 2; i++)
        kv[i] = (struct spk_kv){pool[i], page_count, page_positions, heads, dim};
    for (size_t p = 0; p < longest; p++) {
        float *key = exact_floats(&r, heads * dim), *value = exact_floats(&r, heads * dim);
        uint32_t page = pages[p / page_positions], at = (uint32_t)(p % page_positions);
        CHECK_EQUAL(k->kv_append(&kv[0], page, at, key, value), SPK_OK);
        CHECK_EQUAL(PLAIN->kv_append(&kv[1], page, at, key, value), SPK_OK);
        free(key), free(value);
    }
    compare_bytes(pool[0], pool[1], pool_bytes);
    const float **q = exact(queries * sizeof *q);
    float **out[2] = {exact(queries * sizeof **out), exact(queries * sizeof **out)};
    uint32_t *visible = exact(queries * sizeof *visible);
    for (size_t j = 0; j < queries; j++) {
        q[j] = exact_floats(&r, dim);
        out[0][j] = exact(dim * 4);
        out[1][j] = exact(dim * 4);
        visible[j] = (uint32_t)(j ? 1 + rng_below(&r, (uint32_t)longest) : longest);
    }
    for (int i = 0; i < 2; i++) {
        struct spk_attention a = {.kv = kv[i],
                                  .pages = pages,
                                  .kv_head = 1,
                                  .queries = queries,
                                  .q = q,
                                  .out = out[i],
                                  .visible = visible,
                                  .scale = 0.125f,
                                  .scratch = scratch[i]};
        CHECK_EQUAL((i ? PLAIN : k)->attention(&a), SPK_OK);
    }
    for (size_t j = 0; j < queries; j++) {
        compare_bytes(out[0][j], out[1][j], dim * 4);
        free((void *)(uintptr_t)q[j]), free(out[0][j]), free(out[1][j]);
    }
    for (int i = 0; i < 2; i++)
        free(out[i]), free(pool[i]), free(scratch[i]);
    free(q), free(visible), free(pages);
}

static inline void compare_attentions(const struct spk_kernels *k)
{
    static const size_t dims[] = {16, 24, 64, 80, 7}, lengths[] = {1, 15, 16, 17, 33, 100};
    for (size_t d = 0; d < COUNT(dims); d++)
        for (size_t n = 0; n < COUNT(lengths); n++)
            for (size_t queries = 1; queries <= 9; queries += queries < 5 ? 1 : 4) {
                compare_attention(k, dims[d], 16, queries, lengths[n]);
                compare_attention(k, dims[d], 48, queries, lengths[n]);
            }
}

static inline void compare_one_nonfinite(const struct spk_kernels *k, float bad, size_t at)
{
    enum { N = 300 };
    struct rng r = {.state = at};
    float *x = exact_floats(&r, N), *w = exact_floats(&r, N), *out = exact(N * 4);
    float stats[4];
    uint8_t *q8 = exact(288 / 32 * 34);
    CASE("%s with %g at %zu", k->name, (double)bad, at);
    x[at] = bad;
    CHECK_EQUAL(k->rmsnorm(x, N, w, out, N, N, 1, 1e-5f), SPK_E_NONFINITE);
    CHECK_EQUAL(k->logit_stats(x, N, 1.0f, stats), SPK_E_NONFINITE);
    CHECK_EQUAL(k->quantize_q8(x, 288, q8, 0, 288, 1), at < 288 ? SPK_E_NONFINITE : SPK_OK);
    k->swiglu(x, N, w, N, out, N, N, 1);
    CHECK(!isfinite(out[at])); /* nothing here reports it, so it must not vanish */

    uint16_t *pool = exact(2 * 16 * N * 2);
    struct spk_kv kv = {pool, 1, 16, 1, N};
    CHECK_EQUAL(k->kv_append(&kv, 0, 5, x, w), SPK_E_F16_RANGE);
    CHECK_EQUAL(k->kv_append(&kv, 0, 5, w, x), SPK_E_F16_RANGE);
    for (uint32_t p = 0; p < 16; p++)
        CHECK_EQUAL(k->kv_append(&kv, 0, p, w, w), SPK_OK);
    float *scratch = exact(SPK_ATTENTION_ROWS * (16 + N) * 4);
    for (uint32_t visible = 1; visible <= 16; visible += 5) {
        struct spk_attention a = {kv, &(uint32_t){0}, 0, 1, (const float *const[]){x},
                                  (float *[]){out}, &visible, 0.1f, scratch};
        CHECK_EQUAL(k->attention(&a), SPK_E_NONFINITE);
    }
    free(x), free(w), free(out), free(q8), free(pool), free(scratch);
}

static inline void compare_nonfinite(const struct spk_kernels *k)
{
    static const size_t at[] = {0, 15, 16, 255, 256, 287, 288, 299};
    for (size_t i = 0; i < COUNT(at); i++) {
        compare_one_nonfinite(k, NAN, at[i]);
        compare_one_nonfinite(k, INFINITY, at[i]);
        compare_one_nonfinite(k, -INFINITY, at[i]);
    }
}

/* Any bits at all, of which many are NaNs, infinities and subnormals. */
static inline void compare_elements(const struct spk_kernels *k)
{
    static const int elements[] = {SPK_F32, SPK_F16, SPK_BF16, SPK_I32};
    static const uint32_t divisors[] = {1, 2, 3, 7, 255, 65536};
    static const size_t lengths[] = {0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1000};
    for (size_t e = 0; e < COUNT(elements); e++)
        for (size_t l = 0; l < COUNT(lengths); l++) {
            size_t bytes = lengths[l] * spk_element_bytes(elements[e]);
            struct rng r = {.state = e * 1000 + lengths[l]};
            uint8_t *x = exact(bytes), *y = exact(bytes), *got = exact(bytes), *expected = exact(bytes);
            for (size_t i = 0; i < bytes; i++) {
                x[i] = (uint8_t)rng_next(&r);
                y[i] = rng_below(&r, 8) ? (uint8_t)rng_next(&r) : x[i];
            }
            for (int op = 0; op < SPK_REDUCE_COUNT; op++) {
                CASE("%s reduce %d of %zu elements of kind %d", k->name, op, lengths[l], elements[e]);
                if (bytes)
                    memcpy(got, x, bytes), memcpy(expected, x, bytes);
                k->reduce(elements[e], op, got, y, lengths[l]);
                PLAIN->reduce(elements[e], op, expected, y, lengths[l]);
                compare_bytes(got, expected, bytes);
            }
            for (size_t d = 0; d < COUNT(divisors); d++) {
                CASE("%s divide %zu elements of kind %d by %u", k->name, lengths[l], elements[e],
                     divisors[d]);
                if (bytes)
                    memcpy(got, x, bytes), memcpy(expected, x, bytes);
                k->divide(elements[e], got, divisors[d], lengths[l]);
                PLAIN->divide(elements[e], expected, divisors[d], lengths[l]);
                compare_bytes(got, expected, bytes);
            }
            free(x), free(y), free(got), free(expected);
        }
}

static inline void compare_kernels(const struct spk_kernels *k)
{
    compare_matmuls(k);
    compare_extreme_integers(k);
    compare_quantize(k);
    compare_rows(k);
    compare_exp(k);
    compare_dequantize(k);
    compare_logits(k);
    compare_attentions(k);
    compare_nonfinite(k);
    compare_elements(k);
}

#endif
