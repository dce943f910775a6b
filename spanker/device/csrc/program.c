/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What may run.  A program is checked once against the buffers of its card for the largest step
 * it declares; a step's parameters are checked against its program.  After that the engine may
 * follow every reference without looking.
 */
#include <stdio.h>
#include <string.h>

#include "card_internal.h"

static const char *const op_names[] = {
    "?",      "embed", "rmsnorm", "quantize",    "matmul", "rope",     "kv_append", "attention",
    "swiglu", "add",   "select",  "logit_stats", "top_k",  "exchange", "link_send", "link_recv",
    "best",   "choose", "reduce", "copy",        "divide", "all_reduce",
};

/* Bit r: the operation has operand r. */
static const uint8_t refs_of[] = {0, 11, 11, 9, 11, 3, 11, 11, 11, 3, 9,
                                  9, 9,  0,  1, 8,  9, 9,  9,  9,  8, 8};

/* Whether an operation writes to that operand of its; in doubt it does. */
static bool writes(uint16_t op, int ref)
{
    return ref == 3 || !(op == SPK_OP_MATMUL || op == SPK_OP_EMBED || op == SPK_OP_RMSNORM ||
                         op == SPK_OP_LINK_SEND);
}

/* One operand: rows of row_bytes. */
struct operand {
    int ref;
    uint64_t rows, row_bytes;
    uint32_t align;
};

#define OPERANDS_MAX 3

/* Of all bulk operations and transfers of a program that a host thread may do itself: some 20 us. */
#define QUICK_BYTES (256u << 10)
/* The same of all arrays of a meeting, which one thread folds as fast as its cache is: some 40 us. */
#define QUICK_MEETING_BYTES (1u << 20)
/* Of the meetings of a program that a host thread stays for, beside workers: less than a ms. */
#define BRIEF_BYTES (16u << 20)

static bool mul(uint64_t a, uint64_t b, uint64_t *out)
{
    return !__builtin_mul_overflow(a, b, out) && *out < ((uint64_t)1 << 48);
}

static uint64_t floats(uint64_t n)
{
    return n * 4;
}

static int refuse(char *why, const char *op, const char *what)
{
    snprintf(why, 256, "%s: %s", op, what);
    return SPK_E_ARG;
}

uint32_t program_handle(const struct program *p, uint32_t buffer)
{
    if (!p->table)
        return buffer;
    return buffer < p->table_count ? p->table[buffer] : UINT32_MAX;
}

static int check_operand(struct spk_card *c, const struct program *p, const struct spk_command *cmd,
                         const struct operand *o, const char *op, char *why)
{
    const struct spk_ref *ref = &cmd->ref[o->ref];
    uint32_t handle = program_handle(p, ref->buffer);
    uint64_t span = 0;
    if (handle >= c->buffer_count || !c->buffers[handle].bytes) {
        snprintf(why, 256, "%s: operand %d names buffer %u, which does not exist", op, o->ref,
                 ref->buffer);
        return SPK_E_HANDLE;
    }
    if (ref->offset % o->align || (o->rows > 1 && ref->stride % o->align)) {
        snprintf(why, 256, "%s: operand %d must be aligned to %u bytes: offset %llu, stride %u",
                 op, o->ref, o->align, (unsigned long long)ref->offset, ref->stride);
        return SPK_E_ARG;
    }
    if (o->rows > 1 && ref->stride < o->row_bytes) {
        snprintf(why, 256, "%s: operand %d has rows of %llu bytes but a stride of %u", op, o->ref,
                 (unsigned long long)o->row_bytes, ref->stride);
        return SPK_E_ARG;
    }
    uint64_t have = c->buffers[handle].bytes;
    bool fits = o->rows == 0 || (mul(o->rows - 1, ref->stride, &span) &&
                                 ref->offset <= have && o->row_bytes <= have - ref->offset &&
                                 span <= have - ref->offset - o->row_bytes);
    if (!fits) {
        snprintf(why, 256,
                 "%s: operand %d needs %llu rows of %llu bytes at offset %llu, buffer %u ends at "
                 "%llu",
                 op, o->ref, (unsigned long long)o->rows, (unsigned long long)o->row_bytes,
                 (unsigned long long)ref->offset, ref->buffer, (unsigned long long)have);
        return SPK_E_BOUNDS;
    }
    return SPK_OK;
}

/* Notes that the program needs memory lent for a window, aligned like its operands. */
static int enter_window(struct program *p, uint32_t window, uint32_t align, const char *op,
                        char *why)
{
    uint32_t w = 0;
    while (w < p->window_count && p->window[w] != window)
        w++;
    if (w == SPK_WINDOWS_MAX)
        return refuse(why, op, "names more windows than a program may");
    if (w == p->window_count) {
        p->window[w] = window;
        p->window_align[w] = 1;
        p->window_count++;
    }
    if (p->window_align[w] < align)
        p->window_align[w] = align;
    return SPK_OK;
}

/* Each KV command of a program must agree, so that one check of a step's pages covers all. */
static int check_kv(struct program *p, const struct spk_command *cmd, const char *op, char *why,
                    uint64_t *pool_bytes)
{
    uint32_t heads = cmd->arg[0], dim = cmd->arg[1], page = cmd->arg[2], pages = cmd->arg[3];
    if (!heads || !dim || !pages || !page || page % 16 || dim > 65536 || page > 65536)
        return refuse(why, op, "needs heads, a head size, pages, and pages of 16n positions");
    if (p->kv_pages && (p->kv_pages != pages || p->page_positions != page))
        return refuse(why, op, "disagrees with an earlier command about the KV pages");
    p->kv_pages = pages;
    p->page_positions = page;
    if (!mul((uint64_t)4 * dim * page, (uint64_t)heads * pages, pool_bytes))
        return refuse(why, op, "has a KV pool beyond any card");
    return SPK_OK;
}

static int check_matmul_format(const struct spk_command *cmd, uint64_t *x_bytes)
{
    uint64_t k = cmd->arg[1];
    if (spk_block_weights(cmd->format) == 1)
        *x_bytes = floats(k);
    else if (spk_row_bytes(cmd->format, k) == 0)
        return SPK_E_ARG;
    else
        *x_bytes = k / SPK_BLOCK * SPK_Q8_BLOCK_BYTES;
    return SPK_OK;
}

/* One operand of so many elements, and what a bulk operation asks of its other arguments. */
static int check_bulk(const struct spk_command *cmd, const char *op, char *why, uint64_t *bytes,
                      uint32_t *align)
{
    *align = (uint32_t)spk_element_bytes(cmd->format);
    if (!*align)
        return refuse(why, op, "has an unknown kind of element");
    if (!mul(bulk_count(cmd, 0), *align, bytes))
        return refuse(why, op, "has more elements than any card");
    if (cmd->op == SPK_OP_REDUCE && cmd->arg[2] >= SPK_REDUCE_COUNT)
        return refuse(why, op, "folds in no known way");
    if (cmd->op == SPK_OP_DIVIDE && (!cmd->arg[2] || cmd->arg[2] > 65536))
        return refuse(why, op, "divides by 1 to 65536");
    if (cmd->op == SPK_OP_DIVIDE)
        return SPK_OK;
    const struct spk_ref *from = &cmd->ref[0], *into = &cmd->ref[3];
    if (from->buffer == into->buffer && from->offset < into->offset + *bytes &&
        into->offset < from->offset + *bytes)
        return refuse(why, op, "has operands that overlap");
    return SPK_OK;
}

/* All cards that are linked take part in a meeting, so that all of them count meetings alike. */
static int check_meeting(const struct spk_card *c, const struct spk_command *cmd, const char *op,
                         char *why, uint64_t *bytes, uint32_t *align)
{
    uint32_t cards = cmd->arg[4], own = cmd->arg[5];
    *align = (uint32_t)spk_element_bytes(cmd->format);
    if (!*align)
        return refuse(why, op, "has an unknown kind of element");
    if (!mul(bulk_count(cmd, 0), *align, bytes))
        return refuse(why, op, "has more elements than any card");
    if (cmd->arg[2] >= SPK_REDUCE_COUNT)
        return refuse(why, op, "folds in no known way");
    if (!cmd->arg[3] || cmd->arg[3] > 65536)
        return refuse(why, op, "divides by 1 to 65536");
    if (cmd->flags)
        return refuse(why, op, "runs once per step and takes no flags");
    if (c->pace)
        return refuse(why, op, "takes no time in the model of a throttled card");
    if (cards > SPK_CARDS_MAX || own >= cards)
        return refuse(why, op, "needs the card's number among at most 256");
    for (uint32_t i = 0; i < SPK_CARDS_MAX; i++)
        if ((c->links[i].direct.tx != NULL) != (i < cards && i != own))
            return refuse(why, op, "is done by all cards together, each linked to all others");
    return SPK_OK;
}

/* A way over the host is made when the first program needs it. */
static int check_way(struct spk_card *c, const struct spk_command *cmd, const char *op, char *why)
{
    uint32_t peer = cmd->arg[0];
    if (!(cmd->flags & SPK_FLAG_HOST))
        return peer < SPK_CARDS_MAX && c->links[peer].direct.tx
                   ? SPK_OK
                   : refuse(why, op, "names a peer without a link");
    if (peer >= SPK_CARDS_MAX)
        return refuse(why, op, "names a peer beyond the largest fleet");
    if (!c->mapping)
        return refuse(why, op, "goes over the host, where this card has no way");
    return link_host(c, peer) ? SPK_OK : SPK_E_SYSTEM;
}

static const uint8_t *operand_at(const struct spk_card *c, const struct program *p,
                                 const struct spk_ref *ref)
{
    return c->buffers[program_handle(p, ref->buffer)].memory + ref->offset;
}

static int check_command(struct spk_card *c, struct program *p, uint32_t i, char *why)
{
    const struct spk_command *cmd = &p->commands[i];
    const uint32_t *arg = cmd->arg;
    uint64_t rows = cmd->flags & SPK_FLAG_OUTPUTS ? p->header.outputs_max : p->header.tokens_max;
    uint64_t n = arg[0], bytes = 0, packed = 0, row = 0;
    struct operand o[OPERANDS_MAX];
    uint32_t align;
    int count = 0, status;

    if (cmd->op == 0 || cmd->op >= sizeof op_names / sizeof *op_names) {
        snprintf(why, 256, "unknown operation %u", cmd->op);
        return SPK_E_ARG;
    }
    const char *op = op_names[cmd->op];
    bool transfer = is_transfer(cmd);
    uint32_t flags = transfer ? cmd->flags & ~SPK_FLAG_HOST : cmd->flags;
    if (flags & ~SPK_FLAG_OUTPUTS && !(transfer && flags == SPK_FLAG_BULK))
        return refuse(why, op, "has unknown flags");
    if (is_bulk(cmd) && cmd->flags)
        return refuse(why, op, "runs once per step and takes no flags");
    /* A step may have more outputs than tokens: these read what it has of the one or the other. */
    bool by_token = cmd->op == SPK_OP_EMBED || cmd->op == SPK_OP_ROPE ||
                    cmd->op == SPK_OP_KV_APPEND || cmd->op == SPK_OP_ATTENTION;
    bool by_output = cmd->op == SPK_OP_LOGIT_STATS || cmd->op == SPK_OP_BEST ||
                     cmd->op == SPK_OP_CHOOSE;
    if (cmd->flags ? by_token : by_output)
        return refuse(why, op, by_token ? "has a row per token, not per output"
                                        : "has a row per output, not per token");
    switch (cmd->op) {
    case SPK_OP_EMBED:
        if (arg[1] == 0 || (p->vocabulary && p->vocabulary != arg[1]))
            return refuse(why, op, "disagrees with an earlier command about the vocabulary");
        p->vocabulary = arg[1];
        bytes = spk_row_bytes(cmd->format, n);
        if (n && !bytes)
            return refuse(why, op, "has an unknown format or a row that cuts a block");
        if (arg[2] && (!spk_row_bytes(cmd->format, arg[2]) ||
                       arg[3] % spk_block_weights(cmd->format)))
            return refuse(why, op, "has packed rows, or columns of them, that cut a block");
        if (arg[3] > arg[2] || (arg[2] && n > arg[2] - arg[3]))
            return refuse(why, op, "has columns beyond the packed row");
        if (!mul((uint64_t)arg[1] + 15, arg[2] ? spk_row_bytes(cmd->format, arg[2]) : bytes,
                 &packed))
            return refuse(why, op, "has weights beyond any card");
        o[count++] = (struct operand){0, arg[1], bytes, 1};
        if (arg[2])
            o[0] = (struct operand){0, 1, spk_packed_bytes(cmd->format, arg[1], arg[2]), 32};
        o[count++] = (struct operand){1, p->header.outputs_max, 4, 4};
        o[count++] = (struct operand){3, rows, floats(n), 4};
        break;
    case SPK_OP_RMSNORM:
        o[count++] = (struct operand){0, rows, floats(n), 4};
        o[count++] = (struct operand){1, 1, floats(n), 4};
        o[count++] = (struct operand){3, rows, floats(n), 4};
        break;
    case SPK_OP_QUANTIZE:
        if (n % SPK_BLOCK)
            return refuse(why, op, "needs whole blocks of 32");
        o[count++] = (struct operand){0, rows, floats(n), 4};
        o[count++] = (struct operand){3, rows, n / SPK_BLOCK * SPK_Q8_BLOCK_BYTES, 2};
        break;
    case SPK_OP_MATMUL:
        if (check_matmul_format(cmd, &bytes) != SPK_OK)
            return refuse(why, op, "has an unknown format or a k that cuts a block");
        /* Rows are padded to tiles: the product must not wrap before it is compared. */
        if (!mul(n + 15, spk_row_bytes(cmd->format, arg[1]), &packed))
            return refuse(why, op, "has weights beyond any card");
        o[count++] = (struct operand){0, 1, spk_packed_bytes(cmd->format, n, arg[1]), 32};
        o[count++] = (struct operand){1, rows, bytes,
                                      spk_block_weights(cmd->format) == 1 ? 4 : 2};
        o[count++] = (struct operand){3, rows, floats(n), 4};
        break;
    case SPK_OP_ROPE:
        if (arg[2] > arg[1] || arg[2] % 2 || !arg[1])
            return refuse(why, op, "needs a head and an even rotated part within it");
        if (!mul(p->header.positions_max, floats(arg[2]), &bytes) ||
            !mul(floats(n), arg[1], &row))
            return refuse(why, op, "has a table or rows beyond any card");
        o[count++] = (struct operand){0, rows, row, 4};
        o[count++] = (struct operand){1, 1, bytes, 4};
        break;
    case SPK_OP_KV_APPEND:
        status = check_kv(p, cmd, op, why, &bytes);
        if (status != SPK_OK)
            return status;
        o[count++] = (struct operand){0, rows, floats(n * arg[1]), 4};
        o[count++] = (struct operand){1, rows, floats(n * arg[1]), 4};
        o[count++] = (struct operand){3, 1, bytes, 2};
        break;
    case SPK_OP_ATTENTION:
        status = check_kv(p, cmd, op, why, &bytes);
        if (status != SPK_OK)
            return status;
        if (!arg[4] || !arg[6] || arg[4] > 65536 || arg[5] > 65536 ||
            (arg[5] + arg[4] - 1) / arg[6] - arg[5] / arg[6] >= n)
            return refuse(why, op, "has query heads without their KV head on this card");
        o[count++] = (struct operand){0, rows, floats((uint64_t)arg[4] * arg[1]), 4};
        o[count++] = (struct operand){1, 1, bytes, 2};
        o[count++] = (struct operand){3, rows, floats((uint64_t)arg[4] * arg[1]), 4};
        break;
    case SPK_OP_SWIGLU:
        o[count++] = (struct operand){0, rows, floats(n), 4};
        o[count++] = (struct operand){1, rows, floats(n), 4};
        o[count++] = (struct operand){3, rows, floats(n), 4};
        break;
    case SPK_OP_ADD:
        o[count++] = (struct operand){0, rows, floats(n), 4};
        o[count++] = (struct operand){1, rows, floats(n), 4};
        break;
    case SPK_OP_SELECT:
        o[count++] = (struct operand){0, p->header.tokens_max, floats(n), 4};
        o[count++] = (struct operand){3, p->header.outputs_max, floats(n), 4};
        break;
    case SPK_OP_LOGIT_STATS:
        o[count++] = (struct operand){0, rows, floats(n), 4};
        o[count++] = (struct operand){3, rows, (n + 255) / SPK_LOGIT_CHUNK * 8, 4};
        break;
    case SPK_OP_TOP_K:
        if (arg[1] == 0 || arg[1] > 4096)
            return refuse(why, op, "takes 1 to 4096 candidates");
        o[count++] = (struct operand){0, rows, floats(n), 4};
        o[count++] = (struct operand){3, rows, (uint64_t)arg[1] * 8, 4};
        break;
    case SPK_OP_BEST:
        if (arg[0] == 0 || arg[0] > 4096)
            return refuse(why, op, "takes 1 to 4096 candidates");
        o[count++] = (struct operand){0, rows, (uint64_t)n * 8, 4};
        o[count++] = (struct operand){3, rows, 8, 4};
        break;
    case SPK_OP_CHOOSE:
        if (arg[0] == 0 || arg[0] > SPK_CARDS_MAX)
            return refuse(why, op, "takes a pair from 1 to 256 cards");
        o[count++] = (struct operand){0, rows, (uint64_t)n * 8, 4};
        o[count++] = (struct operand){3, rows, 4, 4};
        break;
    case SPK_OP_EXCHANGE:
        if (n > 2 * SPK_CARDS_MAX || n > p->header.commands - i - 1)
            return refuse(why, op, "has more transfers than follow it");
        for (uint32_t t = i + 1; t <= i + n; t++)
            if (!is_transfer(&p->commands[t]))
                return refuse(why, op, "is followed by something that is no transfer");
        break;
    case SPK_OP_LINK_SEND:
    case SPK_OP_LINK_RECV:
        status = check_way(c, cmd, op, why);
        if (status != SPK_OK)
            return status;
        o[count++] = (struct operand){cmd->op == SPK_OP_LINK_SEND ? 0 : 3, rows, arg[1], 1};
        if (cmd->flags & SPK_FLAG_BULK) {
            bytes = bulk_count(cmd, 1);
            if (bytes >> 48)
                return refuse(why, op, "moves more bytes than any card has");
            o[0].rows = 1, o[0].row_bytes = bytes;
        }
        break;
    case SPK_OP_REDUCE:
    case SPK_OP_COPY:
    case SPK_OP_DIVIDE:
        status = check_bulk(cmd, op, why, &bytes, &align);
        if (status != SPK_OK)
            return status;
        if (cmd->op != SPK_OP_DIVIDE)
            o[count++] = (struct operand){0, 1, bytes, align};
        o[count++] = (struct operand){3, 1, bytes, align};
        break;
    case SPK_OP_ALL_REDUCE:
        status = check_meeting(c, cmd, op, why, &bytes, &align);
        if (status != SPK_OK)
            return status;
        o[count++] = (struct operand){3, 1, bytes, align};
        break;
    }
    for (int j = 0; j < count; j++) {
        status = check_operand(c, p, cmd, &o[j], op, why);
        if (status != SPK_OK)
            return status;
        const struct buffer *b = &c->buffers[program_handle(p, cmd->ref[o[j].ref].buffer)];
        if (b->window && b->lent && writes(cmd->op, o[j].ref))
            return refuse(why, op, "writes to a window that is only read");
        if (!b->window || b->lent)
            continue;
        if (!is_bulk(cmd) && !transfer && cmd->op != SPK_OP_ALL_REDUCE)
            return refuse(why, op, "takes no window");
        status = enter_window(p, cmd->ref[o[j].ref].buffer, o[j].align, op, why);
        if (status != SPK_OK)
            return status;
    }
    /* Of a front's card, different buffers may be the same memory. */
    if (!c->mapping && count == 2 && is_bulk(cmd)) {
        const uint8_t *from = operand_at(c, p, &cmd->ref[0]), *into = operand_at(c, p, &cmd->ref[3]);
        if (from < into + bytes && into < from + bytes)
            return refuse(why, op, "has operands that overlap");
    }
    return SPK_OK;
}

int program_check(struct spk_card *c, struct program *p, uint32_t *bad, char *why)
{
    const struct spk_program_header *h = &p->header;
    if (!h->tokens_max || h->tokens_max > SPK_TOKENS_MAX || h->outputs_max > h->tokens_max ||
        !h->positions_max || h->positions_max > (1u << 24) || h->reserved[0] || h->reserved[1]) {
        snprintf(why, 256,
                 "the header needs 1 to %d tokens, no more outputs than tokens, 1 to 2^24 "
                 "positions and zero reserved words",
                 SPK_TOKENS_MAX);
        return SPK_E_ARG;
    }
    uint32_t transfers = 0; /* left of the exchange in progress */
    uint64_t bulk_bytes = 0, met_bytes = 0;
    bool only_meets = true;
    p->quick = true;
    for (uint32_t i = 0; i < h->commands; i++) {
        const struct spk_command *cmd = &p->commands[i];
        bool transfer = is_transfer(cmd);
        *bad = i;
        int status = check_command(c, p, i, why);
        if (status != SPK_OK)
            return status;
        /* What it does not take was not checked: the engine must not find anything there. */
        for (int r = 0; r < 4; r++)
            if (!(refs_of[cmd->op] >> r & 1))
                p->commands[i].ref[r] = (struct spk_ref){0};
        if (is_bulk(cmd))
            bulk_bytes += bulk_count(cmd, 0) * spk_element_bytes(cmd->format);
        else if (cmd->op == SPK_OP_ALL_REDUCE)
            met_bytes += bulk_count(cmd, 0) * spk_element_bytes(cmd->format) * cmd->arg[4];
        else if (transfer && cmd->flags & SPK_FLAG_BULK)
            bulk_bytes += bulk_count(cmd, 1);
        else if (cmd->op != SPK_OP_EXCHANGE)
            p->quick = false;
        p->quick &= bulk_bytes <= QUICK_BYTES && met_bytes <= QUICK_MEETING_BYTES;
        only_meets &= cmd->op == SPK_OP_ALL_REDUCE && met_bytes <= BRIEF_BYTES;
        if (transfer && !transfers)
            return refuse(why, op_names[cmd->op], "stands outside an exchange");
        transfers = transfer ? transfers - 1 : cmd->op == SPK_OP_EXCHANGE ? cmd->arg[0] : 0;
    }
    p->brief = only_meets;
    return SPK_OK;
}

/* --- the parameters of a step --------------------------------------------------------------- */

static void bind(struct execution *run, const uint8_t *params)
{
    const struct spk_step_header *h = (const struct spk_step_header *)params;
    const uint32_t *at = (const uint32_t *)(h + 1);
    run->tokens = h->tokens;
    run->outputs = h->outputs;
    run->token_id = at;
    run->position = at += h->tokens;
    run->sequence = at += h->tokens;
    run->output_token = at += h->tokens;
    run->inv_temperature = (const float *)(at += h->outputs);
    run->first_page = at += h->outputs;
    run->page = at + h->sequences + 1;
}

void step_bind(struct execution *run)
{
    bind(run, run->submission.params);
    run->waiting_for = -1;
}

static int bad_step(char *why, const char *what, uint64_t index, uint64_t got, uint64_t limit)
{
    snprintf(why, 256, "%s %llu is %llu, must be below %llu", what, (unsigned long long)index,
             (unsigned long long)got, (unsigned long long)limit);
    return SPK_E_PARAMS;
}

int step_check(const struct program *p, const uint8_t *params, size_t nbytes, char *why)
{
    const struct spk_step_header *h = (const struct spk_step_header *)params;
    struct execution run;

    if (nbytes < sizeof *h || h->magic != SPK_STEP_MAGIC || h->version != SPK_STEP_VERSION ||
        h->reserved[0] || h->reserved[1]) {
        snprintf(why, 256, "not a version %d parameter block", SPK_STEP_VERSION);
        return SPK_E_PARAMS;
    }
    if (h->tokens > p->header.tokens_max || h->outputs > p->header.outputs_max ||
        h->sequences > h->tokens) {
        snprintf(why, 256,
                 "a step of %u tokens, %u outputs, %u sequences; the program takes %u tokens, %u "
                 "outputs, a token at least per sequence",
                 h->tokens, h->outputs, h->sequences, p->header.tokens_max,
                 p->header.outputs_max);
        return SPK_E_PARAMS;
    }
    uint64_t words = (uint64_t)3 * h->tokens + (uint64_t)2 * h->outputs + h->sequences + 1 +
                     (uint64_t)h->pages;
    if (nbytes != sizeof *h + words * 4) {
        snprintf(why, 256, "the parameter block has %zu bytes, its counts need %llu", nbytes,
                 (unsigned long long)(sizeof *h + words * 4));
        return SPK_E_PARAMS;
    }
    bind(&run, params);
    if (run.first_page[0] != 0 || run.first_page[h->sequences] != h->pages)
        return bad_step(why, "last entry of the page index", h->sequences,
                        run.first_page[h->sequences], (uint64_t)h->pages + 1);
    for (uint32_t s = 0; s < h->sequences; s++)
        if (run.first_page[s] > run.first_page[s + 1])
            return bad_step(why, "start of pages of sequence", s, run.first_page[s],
                            (uint64_t)run.first_page[s + 1] + 1);
    for (uint32_t i = 0; i < h->pages; i++)
        if (p->kv_pages && run.page[i] >= p->kv_pages)
            return bad_step(why, "page", i, run.page[i], p->kv_pages);
    for (uint32_t t = 0; t < h->tokens; t++) {
        uint32_t s = run.sequence[t];
        uint32_t id = run.token_id[t];
        if (p->vocabulary && id & SPK_TOKEN_CHOSEN) {
            if ((id ^ SPK_TOKEN_CHOSEN) >= p->header.outputs_max)
                return bad_step(why, "chosen output of token", t, id ^ SPK_TOKEN_CHOSEN,
                                p->header.outputs_max);
        } else if (p->vocabulary && id >= p->vocabulary) {
            return bad_step(why, "token id", t, id, p->vocabulary);
        }
        if (s >= h->sequences)
            return bad_step(why, "sequence of token", t, s, h->sequences);
        if (run.position[t] >= p->header.positions_max)
            return bad_step(why, "position of token", t, run.position[t],
                            p->header.positions_max);
        uint64_t covered =
            (uint64_t)(run.first_page[s + 1] - run.first_page[s]) * p->page_positions;
        if (p->kv_pages && run.position[t] >= covered)
            return bad_step(why, "position of token", t, run.position[t], covered);
    }
    for (uint32_t i = 0; i < h->outputs; i++) {
        if (run.output_token[i] >= h->tokens)
            return bad_step(why, "output token", i, run.output_token[i], h->tokens);
        if (!(run.inv_temperature[i] >= 0.0f && run.inv_temperature[i] <= 3.0e38f)) {
            snprintf(why, 256, "inverse temperature of output %u is %g, must be finite, 0 or more",
                     i, (double)run.inv_temperature[i]);
            return SPK_E_PARAMS;
        }
    }
    return SPK_OK;
}

/* --- resources ------------------------------------------------------------------------------ */

static size_t align64(size_t n)
{
    return (n + 63) / 64 * 64;
}

size_t program_scratch_bytes(const struct program *p)
{
    size_t most = 64;
    for (uint32_t i = 0; i < p->header.commands; i++) {
        const struct spk_command *cmd = &p->commands[i];
        size_t rows = p->header.tokens_max, need = 0;
        if (cmd->flags & SPK_FLAG_OUTPUTS)
            rows = p->header.outputs_max;
        if (cmd->op == SPK_OP_MATMUL && spk_block_weights(cmd->format) != 1) {
            need = rows * (cmd->arg[1] / SPK_BLOCK) * sizeof(struct spk_q8_block);
        } else if (cmd->op == SPK_OP_ATTENTION) {
            need = SPK_ATTENTION_ROWS * sizeof(float) *
                   (((size_t)p->header.positions_max + 15) / 16 * 16 + cmd->arg[1]);
        }
        most = need > most ? need : most;
    }
    return align64(most);
}

void program_translate(struct program *p)
{
    for (uint32_t i = 0; i < p->header.commands; i++)
        for (int r = 0; r < 4; r++)
            if (refs_of[p->commands[i].op] & (1u << r))
                p->commands[i].ref[r].buffer = program_handle(p, p->commands[i].ref[r].buffer);
    p->table = NULL;
}

struct buffer *program_next_written(struct spk_card *c, const struct program *p, uint32_t *command,
                                    int *ref)
{
    for (; *command < p->header.commands; ++*command, *ref = 0) {
        const struct spk_command *cmd = &p->commands[*command];
        for (; *ref < 4; ++*ref)
            if (refs_of[cmd->op] >> *ref & 1 && writes(cmd->op, *ref))
                return &c->buffers[cmd->ref[(*ref)++].buffer];
    }
    return NULL;
}

void program_count_users(struct spk_card *c, const struct program *p, int delta)
{
    for (uint32_t i = 0; i < p->header.commands; i++)
        for (int r = 0; r < 4; r++)
            if (refs_of[p->commands[i].op] & (1u << r)) {
                struct buffer *b = &c->buffers[p->commands[i].ref[r].buffer];
                b->users += (uint32_t)delta;
                b->used = true;
            }
}
