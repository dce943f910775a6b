/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command processor: runs a slice of the current command.  A slice is some tens of
 * microseconds of work, so that an abort is noticed soon and the cards of a worker take turns.
 * `cursor` is where the command stands: a tile, a row, a token.
 */
#include <string.h>

#include "card_internal.h"

/* About 50 us of each kind of work on one core. */
#define SLICE_MULTIPLY_ADDS (1u << 21)
#define SLICE_ELEMENTS (1u << 15)
#define SLICE_BULK_BYTES (1u << 19)
#define ATTENTION_TOKENS 8   /* neighbouring tokens that share loads of keys and values */
#define ATTENTION_QUERIES 64

static float as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static float *row_f32(const struct spk_card *c, const struct spk_ref *ref, uint64_t row)
{
    return (float *)(card_at(c, ref) + row * ref->stride);
}

static void count_ddr(struct spk_card *c, uint64_t read, uint64_t written)
{
    atomic_fetch_add_explicit(&c->ddr_read, read, memory_order_relaxed);
    atomic_fetch_add_explicit(&c->ddr_written, written, memory_order_relaxed);
}

/* --- matmul --------------------------------------------------------------------------------- */

static void matmul_slice(struct spk_card *c, const struct spk_command *cmd, size_t tokens, bool *done)
{
    const struct spk_kernels *k = c->kernels;
    size_t rows = cmd->arg[0], depth = cmd->arg[1], tiles = (rows + 15) / 16;
    const uint8_t *w = card_at(c, &cmd->ref[0]), *x = card_at(c, &cmd->ref[1]);
    size_t x_stride = cmd->ref[1].stride, out_stride = cmd->ref[3].stride / 4;
    float *out = row_f32(c, &cmd->ref[3], 0);
    spk_matmul_f32 float_kernel = k->matmul_f32[cmd->format];
    struct spk_q8 q8 = {(const struct spk_q8_block *)c->scratch, depth / SPK_BLOCK};

    if (c->run.cursor == 0) {
        if (!float_kernel)
            k->expand_q8(x, x_stride, (struct spk_q8_block *)c->scratch, depth, tokens);
        count_ddr(c, spk_packed_bytes(cmd->format, rows, depth) +
                         tokens * (float_kernel ? depth * 4 : q8.blocks * SPK_Q8_BLOCK_BYTES),
                  tokens * rows * 4);
    }
    /* Kernels take tiles two at a time. */
    size_t per_pair = 32 * depth * tokens + 1;
    size_t begin = c->run.cursor, end = begin + 2 * (SLICE_MULTIPLY_ADDS / per_pair + 1);
    end = min_u64(end, tiles);
    if (float_kernel)
        float_kernel(w, (const float *)x, x_stride / 4, out, out_stride, rows, depth, tokens, begin,
                     end);
    else
        k->matmul_q8[cmd->format](w, &q8, out, out_stride, rows, tokens, begin, end);
    c->run.cursor = end;
    *done = end == tiles;
}

/* --- KV and attention ----------------------------------------------------------------------- */

static struct spk_kv kv_of(const struct spk_card *c, const struct spk_command *cmd, int ref)
{
    return (struct spk_kv){.pool = (uint16_t *)card_at(c, &cmd->ref[ref]),
                           .pages = cmd->arg[3],
                           .kv_heads = cmd->arg[0],
                           .head_dim = cmd->arg[1],
                           .page_positions = cmd->arg[2]};
}

static int kv_append(struct spk_card *c, const struct spk_command *cmd, size_t begin, size_t end)
{
    const struct execution *run = &c->run;
    struct spk_kv kv = kv_of(c, cmd, 3);
    int status = SPK_OK;
    for (size_t t = begin; t < end && status == SPK_OK; t++) {
        uint32_t position = run->position[t];
        uint32_t page = run->page[run->first_page[run->sequence[t]] + position / cmd->arg[2]];
        status = c->kernels->kv_append(&kv, page, position % cmd->arg[2],
                                       row_f32(c, &cmd->ref[0], t), row_f32(c, &cmd->ref[1], t));
    }
    size_t row = (size_t)cmd->arg[0] * cmd->arg[1];
    count_ddr(c, (end - begin) * row * 8, (end - begin) * row * 4);
    return status;
}

/* One KV head and up to ATTENTION_TOKENS neighbouring tokens of one sequence: cursor is the first
 * token, cursor2 the KV head. */
static int attention_slice(struct spk_card *c, const struct spk_command *cmd, bool *done)
{
    struct execution *run = &c->run;
    size_t dim = cmd->arg[1], heads = cmd->arg[4], first = cmd->arg[5], group = cmd->arg[6];
    size_t t0 = run->cursor, kv_head = run->cursor2, t1 = t0;
    const float *q[ATTENTION_QUERIES];
    float *out[ATTENTION_QUERIES];
    uint32_t visible[ATTENTION_QUERIES];
    int status = SPK_OK;

    while (t1 < run->tokens && t1 - t0 < ATTENTION_TOKENS && run->sequence[t1] == run->sequence[t0])
        t1++;
    /* Local query heads whose KV head is the kv_head-th of this card. */
    size_t lo = (first / group + kv_head) * group, hi = lo + group;
    lo = lo > first ? lo - first : 0;
    hi = min_u64(hi - first, heads);
    struct spk_attention a = {.kv = kv_of(c, cmd, 1),
                              .pages = run->page + run->first_page[run->sequence[t0]],
                              .kv_head = kv_head,
                              .q = q,
                              .out = out,
                              .visible = visible,
                              .scale = as_float(cmd->arg[7]),
                              .scratch = (float *)c->scratch};
    for (size_t t = t0; t < t1; t++) {
        for (size_t h = lo; h < hi && status == SPK_OK; h++) {
            q[a.queries] = row_f32(c, &cmd->ref[0], t) + h * dim;
            out[a.queries] = row_f32(c, &cmd->ref[3], t) + h * dim;
            visible[a.queries] = run->position[t] + 1;
            if (++a.queries == ATTENTION_QUERIES) {
                status = c->kernels->attention(&a);
                a.queries = 0;
            }
        }
    }
    if (status == SPK_OK)
        status = c->kernels->attention(&a);
    count_ddr(c, (uint64_t)(run->position[t1 - 1] + 1) * dim * 4, (t1 - t0) * (hi - lo) * dim * 4);
    if (++run->cursor2 == (first + heads - 1) / group - first / group + 1) {
        run->cursor2 = 0;
        run->cursor = t1;
    }
    *done = run->cursor == run->tokens;
    return status;
}

/* --- the rest: independent rows ------------------------------------------------------------- */

static int rows_slice(struct spk_card *c, const struct spk_command *cmd, size_t begin, size_t end)
{
    const struct spk_kernels *k = c->kernels;
    const struct execution *run = &c->run;
    const struct spk_ref *r = cmd->ref;
    size_t n = cmd->arg[0], rows = end - begin;
    float *in = row_f32(c, &r[0], begin), *out = row_f32(c, &r[3], begin);
    int status = SPK_OK;

    switch (cmd->op) {
    case SPK_OP_EMBED:
        for (size_t t = begin; t < end && status == SPK_OK; t++) {
            uint32_t id = run->token_id[t];
            if (id & SPK_TOKEN_CHOSEN)
                memcpy(&id, row_f32(c, &r[1], id ^ SPK_TOKEN_CHOSEN), sizeof id);
            if (id >= cmd->arg[1])
                return SPK_E_PARAMS; /* no earlier step has chosen */
            if (cmd->arg[2])
                spk_dequantize_packed_row(cmd->format, card_at(c, &r[0]), id, cmd->arg[2],
                                          cmd->arg[3], n, row_f32(c, &r[3], t));
            else
                status = k->dequantize_row(cmd->format,
                                           card_at(c, &r[0]) + (uint64_t)id * r[0].stride,
                                           row_f32(c, &r[3], t), n);
        }
        count_ddr(c, rows * spk_row_bytes(cmd->format, n), rows * n * 4);
        return status;
    case SPK_OP_RMSNORM:
        count_ddr(c, (rows + 1) * n * 4, rows * n * 4);
        return k->rmsnorm(in, r[0].stride / 4, row_f32(c, &r[1], 0), out, r[3].stride / 4, n, rows,
                          as_float(cmd->arg[1]));
    case SPK_OP_QUANTIZE:
        count_ddr(c, rows * n * 4, rows * n / SPK_BLOCK * SPK_Q8_BLOCK_BYTES);
        return k->quantize_q8(in, r[0].stride / 4, (uint8_t *)out, r[3].stride, n, rows);
    case SPK_OP_ROPE:
        k->rope(in, r[0].stride / 4, n, cmd->arg[1], cmd->arg[2], row_f32(c, &r[1], 0),
                run->position + begin, rows);
        count_ddr(c, rows * (n * cmd->arg[1] + cmd->arg[2]) * 4, rows * n * cmd->arg[1] * 4);
        return SPK_OK;
    case SPK_OP_KV_APPEND:
        return kv_append(c, cmd, begin, end);
    case SPK_OP_SWIGLU:
        k->swiglu(in, r[0].stride / 4, row_f32(c, &r[1], begin), r[1].stride / 4, out,
                  r[3].stride / 4, n, rows);
        count_ddr(c, rows * n * 8, rows * n * 4);
        return SPK_OK;
    case SPK_OP_ADD:
        k->add(in, r[0].stride / 4, row_f32(c, &r[1], begin), r[1].stride / 4, n, rows);
        count_ddr(c, rows * n * 8, rows * n * 4);
        return SPK_OK;
    case SPK_OP_SELECT:
        for (size_t i = begin; i < end; i++)
            memmove(row_f32(c, &r[3], i), row_f32(c, &r[0], run->output_token[i]), n * 4);
        count_ddr(c, rows * n * 4, rows * n * 4);
        return SPK_OK;
    case SPK_OP_LOGIT_STATS:
        for (size_t i = begin; i < end && status == SPK_OK; i++)
            status = k->logit_stats(row_f32(c, &r[0], i), n, run->inv_temperature[i],
                                    row_f32(c, &r[3], i));
        count_ddr(c, rows * n * 4, rows * ((n + 255) / 256) * 8);
        return status;
    case SPK_OP_TOP_K:
        for (size_t i = begin; i < end; i++) {
            uint32_t *ids = (uint32_t *)row_f32(c, &r[3], i);
            float *values = (float *)(ids + cmd->arg[1]);
            size_t held = k->top_k(row_f32(c, &r[0], i), n, cmd->arg[1], ids, values);
            for (size_t j = 0; j < held; j++)
                ids[j] += cmd->arg[2];
            for (size_t j = held; j < cmd->arg[1]; j++) {
                ids[j] = UINT32_MAX;
                values[j] = -3.0e38f;
            }
        }
        count_ddr(c, rows * n * 4, rows * cmd->arg[1] * 8);
        return SPK_OK;
    case SPK_OP_BEST:
        for (size_t i = begin; i < end; i++) {
            const uint32_t *ids = (const uint32_t *)row_f32(c, &r[0], i);
            uint32_t *pair = (uint32_t *)row_f32(c, &r[3], i);
            pair[0] = ids[0];
            pair[1] = ids[n]; /* the first value stands behind the ids */
        }
        count_ddr(c, rows * 8, rows * 8);
        return SPK_OK;
    case SPK_OP_CHOOSE:
        for (size_t i = begin; i < end; i++) {
            const uint32_t *pair = (const uint32_t *)row_f32(c, &r[0], i);
            size_t best = 0;
            /* Cards stand in order of their ids: of equals the first has the lowest. */
            for (size_t j = 1; j < n; j++)
                if (as_float(pair[2 * j + 1]) > as_float(pair[2 * best + 1]))
                    best = j;
            *(uint32_t *)row_f32(c, &r[3], i) = pair[2 * best];
        }
        count_ddr(c, rows * n * 8, rows * 4);
        return SPK_OK;
    default:
        return SPK_E_ARG;
    }
}

/* --- bulk operations: once per step, whatever its tokens; cursor is an element ---------------- */

static void bulk_slice(struct spk_card *c, const struct spk_command *cmd, bool *done)
{
    struct execution *run = &c->run;
    uint64_t size = spk_element_bytes(cmd->format), count = bulk_count(cmd, 0);
    uint64_t begin = run->cursor, n = min_u64(count - begin, SLICE_BULK_BYTES / size);
    uint8_t *into = card_at(c, &cmd->ref[3]) + begin * size;

    switch (cmd->op) {
    case SPK_OP_REDUCE:
        c->kernels->reduce(cmd->format, (int)cmd->arg[2], into,
                           card_at(c, &cmd->ref[0]) + begin * size, n);
        count_ddr(c, 2 * n * size, n * size);
        break;
    case SPK_OP_COPY:
        memcpy(into, card_at(c, &cmd->ref[0]) + begin * size, n * size);
        count_ddr(c, n * size, n * size);
        break;
    default:
        c->kernels->divide(cmd->format, into, cmd->arg[2], n);
        count_ddr(c, n * size, n * size);
    }
    run->cursor = begin + n;
    *done = run->cursor == count;
}

int execute_slice(struct spk_card *c, bool *done, bool *waiting)
{
    struct execution *run = &c->run;
    const struct spk_command *cmd = &run->submission.program->commands[run->pc];
    bool outputs = cmd->flags & SPK_FLAG_OUTPUTS || cmd->op == SPK_OP_SELECT;
    size_t rows = outputs ? run->outputs : run->tokens;

    if (cmd->op == SPK_OP_EXCHANGE)
        return link_exchange(c, done, waiting);
    if (cmd->op == SPK_OP_ALL_REDUCE)
        return meet(c, cmd, done, waiting);
    if (is_bulk(cmd)) {
        bulk_slice(c, cmd, done);
        return SPK_OK;
    }
    if (is_transfer(cmd) || rows == 0) {
        *done = true; /* transfers ran with their exchange */
        return SPK_OK;
    }
    if (cmd->op == SPK_OP_MATMUL) {
        matmul_slice(c, cmd, rows, done);
        return SPK_OK;
    }
    if (cmd->op == SPK_OP_ATTENTION)
        return attention_slice(c, cmd, done);
    size_t begin = run->cursor, end = begin + SLICE_ELEMENTS / (cmd->arg[0] + 1) + 1;
    end = min_u64(end, rows);
    int status = rows_slice(c, cmd, begin, end);
    run->cursor = end;
    *done = end == rows;
    return status;
}
