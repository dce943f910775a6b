/* SPDX-License-Identifier: Apache-2.0 */
/* Mutated programs, parameter blocks and reads are refused, or run without touching a byte beyond
 * the card's buffers: under AddressSanitizer everything else in its DDR is poisoned. */
#include "card_test.h"

#define ROUNDS 20000
#define STEPS_PER_PROGRAM 3

/* Values that sizes, counts and numbers are likely to be compared with. */
static uint32_t interesting(struct rng *r)
{
    static const uint32_t values[] = {0,    1,    2,    3,     5,     6,      7,          8,
                                      15,   16,   17,   31,    32,    33,     40,         48,
                                      63,   64,   65,   128,   255,   256,    511,        640,
                                      4096, 4097, 8192, 65535, 65536, 1 << 20, 0x3ffffff, 0x7fffffff,
                                      1u << 31, 0xffff0000, 0xffffffe0, 0xffffffff};
    return rng_below(r, 4) ? values[rng_below(r, sizeof values / sizeof *values)]
                           : (uint32_t)rng_next(r);
}

static uint32_t nearby(struct rng *r, uint32_t value)
{
    static const int32_t steps[] = {-64, -32, -16, -4, -2, -1, 1, 2, 4, 16, 32, 64};
    switch (rng_below(r, 4)) {
    case 0: return interesting(r);
    case 1: return value ^ (1u << rng_below(r, 32));
    default: return value + (uint32_t)steps[rng_below(r, sizeof steps / sizeof *steps)];
    }
}

enum { WINDOW_BYTES = 96 };

/* The bench's program, then bulk operations and transfers, some on a window. */
static struct builder fuzz_program(const struct bench *b, uint32_t window)
{
    struct builder p = bench_program(b);
    const int elements[] = {SPK_F32, SPK_F16, SPK_BF16, SPK_I32};
    struct spk_command *c;
    c = append(&p, SPK_OP_EXCHANGE);
    c->arg[0] = 2;
    c = append(&p, SPK_OP_LINK_SEND);
    c->flags = SPK_FLAG_BULK;
    c->ref[0] = ref_at(window, 0, 0);
    c->arg[0] = !b->number, c->arg[1] = WINDOW_BYTES;
    c = append(&p, SPK_OP_LINK_RECV);
    c->flags = SPK_FLAG_BULK;
    c->ref[3] = bench_ref(b, RECEIVED, 0, 0);
    c->arg[0] = !b->number, c->arg[1] = WINDOW_BYTES;
    for (uint32_t i = 0; i < 4; i++) {
        c = append(&p, SPK_OP_REDUCE);
        c->format = (uint16_t)elements[i];
        c->ref[0] = bench_ref(b, RECEIVED, 0, 4 * i);
        c->ref[3] = ref_at(window, 0, 0);
        c->arg[0] = 11, c->arg[2] = i % SPK_REDUCE_COUNT;
        c = append(&p, SPK_OP_DIVIDE);
        c->format = (uint16_t)elements[i];
        c->ref[3] = ref_at(window, 0, 8);
        c->arg[0] = 9, c->arg[2] = 3;
    }
    c = append(&p, SPK_OP_COPY);
    c->format = SPK_F16;
    c->ref[0] = ref_at(window, 0, 0);
    c->ref[3] = bench_ref(b, HIDDEN, 0, 0);
    c->arg[0] = WINDOW_BYTES / 2;
    return p;
}

static void mutate_command(struct rng *r, struct builder *p)
{
    uint32_t count = p->header.commands < COMMANDS_MAX ? p->header.commands : COMMANDS_MAX;
    struct spk_command *c = &p->commands[rng_below(r, count)];
    struct spk_ref *ref = &c->ref[rng_below(r, 4)];
    uint32_t *arg = &c->arg[rng_below(r, 8)];
    switch (rng_below(r, 12)) {
    case 0: c->op = (uint16_t)rng_below(r, SPK_OP_DIVIDE + 2); break;
    case 1: c->format = (uint16_t)(rng_below(r, 2) ? rng_below(r, SPK_FORMAT_COUNT) : interesting(r)); break;
    case 2: c->flags ^= rng_below(r, 4) ? 1 + rng_below(r, 2) : interesting(r); break;
    case 3: ref->buffer = rng_below(r, 4) ? rng_below(r, 2 * BUFFERS + 2) : interesting(r); break;
    case 4: ref->stride = nearby(r, ref->stride); break;
    case 5: ref->offset = nearby(r, (uint32_t)ref->offset); break;
    case 6: ref->offset = (uint64_t)interesting(r) << rng_below(r, 33); break;
    case 7: { /* another place of the same buffer, or of another one of this program */
        const struct spk_command *other = &p->commands[rng_below(r, count)];
        *ref = other->ref[rng_below(r, 4)];
        break;
    }
    case 8: *c = p->commands[rng_below(r, count)]; break;
    default: *arg = nearby(r, *arg); break;
    }
}

static void mutate_program(struct rng *r, struct builder *p)
{
    uint32_t mutations = 1 + rng_below(r, 4);
    for (uint32_t i = 0; i < mutations; i++) {
        if (rng_below(r, 8)) {
            mutate_command(r, p);
            continue;
        }
        switch (rng_below(r, 4)) {
        case 0: p->header.tokens_max = nearby(r, p->header.tokens_max); break;
        case 1: p->header.outputs_max = nearby(r, p->header.outputs_max); break;
        case 2: p->header.positions_max = nearby(r, p->header.positions_max); break;
        default: p->header.commands = rng_below(r, p->header.commands + 2); break;
        }
    }
}

static struct step random_step(struct rng *r)
{
    uint32_t tokens = rng_below(r, TOKENS_MAX + 1);
    uint32_t outputs = rng_below(r, (tokens < OUTPUTS_MAX ? tokens : OUTPUTS_MAX) + 1);
    struct step s = new_step(tokens, outputs, rng_below(r, 40), rng_below(r, 3), 3);
    if (rng_below(r, 3) == 0) {
        /* More outputs than tokens is allowed: the same token may be wanted twice. */
        s.header.outputs = rng_below(r, OUTPUTS_MAX + 1);
        uint32_t *index = s.words + 3 * tokens + 2 * s.header.outputs;
        for (uint32_t i = 0; i < 2 * s.header.outputs; i++)
            s.words[3 * tokens + i] = 0;
        index[0] = 0;
        if (tokens)
            index[1] = 3, index[2] = 1, index[3] = 2, index[4] = 0;
        s.header.pages = tokens ? 3 : 0;
    }
    /* Tokens that an earlier step has chosen, or that none has. */
    for (uint32_t t = 0; t < tokens; t++)
        if (rng_below(r, 6) == 0)
            s.words[t] = SPK_TOKEN_CHOSEN | rng_below(r, OUTPUTS_MAX + (rng_below(r, 8) == 0));
    for (uint32_t mutations = rng_below(r, 3); mutations; mutations--) {
        uint32_t words = (uint32_t)((step_bytes(&s) - sizeof s.header) / 4);
        uint32_t at = rng_below(r, words < STEP_WORDS_MAX ? words : STEP_WORDS_MAX);
        switch (rng_below(r, 6)) {
        case 0: s.header.tokens = rng_below(r, 8); break;
        case 1: s.header.outputs = rng_below(r, 6); break;
        case 2: s.header.sequences = rng_below(r, 4); break;
        case 3: s.header.pages = rng_below(r, 8); break;
        default: s.words[at] = nearby(r, s.words[at]); break;
        }
    }
    return s;
}

struct reads {
    struct spk_read read[SPK_READS_MAX + 1];
    size_t count;
};

static struct reads random_reads(struct rng *r, const struct bench *b)
{
    struct reads made = {.count = rng_below(r, 4) ? rng_below(r, 3) : rng_below(r, SPK_READS_MAX + 2)};
    for (size_t i = 0; i < made.count; i++) {
        uint32_t which = rng_below(r, BUFFERS), bytes = (uint32_t)b->bytes[which];
        struct spk_read *read = &made.read[i];
        read->buffer = b->buffer[which];
        read->offset = rng_below(r, bytes + 1);
        read->nbytes = rng_below(r, bytes - (uint32_t)read->offset + 1);
        switch (rng_below(r, 40)) {
        case 0: read->buffer = nearby(r, read->buffer); break;
        case 1: read->offset = nearby(r, (uint32_t)read->offset); break;
        case 2: read->offset = (uint64_t)interesting(r) << rng_below(r, 33); break;
        case 3: read->nbytes = nearby(r, (uint32_t)read->nbytes); break;
        case 4: read->nbytes = (uint64_t)interesting(r) << rng_below(r, 33); break;
        case 5: read->reserved = interesting(r); break;
        default: break;
        }
    }
    return made;
}

/* What came with a step that nothing has followed is what lies in memory now. */
static void check_result(struct spk_card *c, const struct spk_completion *done,
                         const struct reads *reads)
{
    uint64_t at = 0;
    for (size_t i = 0; done->status == SPK_OK && i < reads->count; i++) {
        const struct spk_read *read = &reads->read[i];
        uint8_t *now = exact(read->nbytes);
        CHECK_EQUAL(spk_card_read(c, read->buffer, read->offset, now, read->nbytes), SPK_OK);
        CHECK(read->nbytes == 0 || memcmp(done->result + at, now, read->nbytes) == 0);
        at += read->nbytes;
        free(now);
    }
    CHECK_EQUAL(done->result_bytes, at);
}

/* Takes events from time to time: those of one card are in order, whether or not some were lost. */
static void read_some_trace(struct rng *r, struct spk_card *c, uint64_t *last_ns)
{
    uint64_t most = rng_below(r, 20), lost;
    struct spk_trace_event *events = exact(most * sizeof *events);
    uint64_t got = spk_card_trace_read(c, events, most, &lost);
    CHECK(got <= most);
    for (uint64_t i = 0; i < got; i++) {
        CHECK(events[i].begin_ns >= *last_ns && events[i].end_ns >= events[i].begin_ns);
        CHECK(events[i].op && events[i].op <= SPK_OP_DIVIDE);
        *last_ns = events[i].end_ns;
    }
    free(events);
}

/* Steps both cards for a while; whatever still waits then is aborted. */
static void run_bounded(struct bench *pair, const struct reads *reads)
{
    struct spk_card *both[] = {pair[0].card, pair[1].card};
    struct spk_completion done;
    if (!run_cards(both, 2)) {
        uint32_t epoch = both[0]->epoch + 1;
        for (int i = 0; i < 2; i++)
            CHECK_EQUAL(spk_card_abort(both[i], epoch), SPK_OK);
        CHECK(run_cards(both, 2));
    }
    for (int i = 0; i < 2; i++) {
        struct spk_counters counters;
        static const struct reads none;
        while (spk_card_completion(both[i], &done)) {
            CHECK(done.status >= SPK_OK && done.status <= SPK_E_SYSTEM);
            check_result(both[i], &done, i ? &none : reads);
        }
        spk_card_counters(both[i], &counters);
        CHECK_EQUAL(counters.queued, 0);
    }
}

/* Arguments: another number of rounds, another seed. */
int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : ROUNDS;
    struct rng r = {.state = argc > 2 ? strtoull(argv[2], NULL, 0) : 2026};
    int accepted = 0, ran = 0, brought = 0;
    spk_fp_enter();
    for (int isa = 0; isa < SPK_ISA_COUNT; isa++) {
        if (!spk_kernels_get(isa))
            continue;
        struct bench pair[2] = {bench_create(0, isa), bench_create(1, isa)};
        uint32_t window[2];
        uint8_t *lent[2]; /* exactly as large as the window */
        for (int i = 0; i < 2; i++) {
            CHECK_EQUAL(spk_card_window(pair[i].card, WINDOW_BYTES, &window[i]), SPK_OK);
            lent[i] = exact(WINDOW_BYTES);
        }
        struct builder valid = fuzz_program(&pair[0], window[0]);
        struct builder peer = fuzz_program(&pair[1], window[1]);
        uint32_t handle, peer_handle, bad;
        uint64_t fence, last_ns = 0;
        char why[256];
        CHECK_EQUAL(spk_link_connect(pair[0].card, 0, pair[1].card, 1, RING_BYTES), SPK_OK);
        CHECK_EQUAL(load(pair[1].card, &peer, &peer_handle, &bad, why), SPK_OK);
        for (int round = 0; round < rounds; round++) {
            struct builder p = valid;
            CASE("isa %d, round %d, state %#llx", isa, round, (unsigned long long)r.state);
            mutate_program(&r, &p);
            int status = load(pair[0].card, &p, &handle, &bad, why);
            if (status != SPK_OK) {
                CHECK(strlen(why) < 255 && !strchr(why, '\n'));
                continue;
            }
            accepted++;
            if (rng_below(&r, 16) == 0)
                CHECK_EQUAL(spk_card_trace(pair[0].card, rng_below(&r, 50)), SPK_OK);
            for (int i = 0; i < STEPS_PER_PROGRAM; i++) {
                struct step s = random_step(&r);
                size_t n = step_bytes(&s) <= sizeof s ? step_bytes(&s) : sizeof s;
                struct reads reads = random_reads(&r, &pair[0]);
                struct spk_lent shown = {.window = window[0],
                                         .memory = lent[0],
                                         .nbytes = WINDOW_BYTES};
                struct spk_lent peers = {.window = window[1],
                                         .memory = lent[1],
                                         .nbytes = WINDOW_BYTES};
                /* A program may have lost its window to a mutation. */
                size_t windows = pair[0].card->programs[handle]->window_count;
                status = spk_card_submit_lending(pair[0].card, handle, &s, n, reads.read,
                                                 reads.count, &shown, windows, &fence, why);
                if (status != SPK_OK)
                    continue;
                ran++;
                brought += reads.count > 0;
                spk_card_submit_lending(pair[1].card, peer_handle, &s, n, NULL, 0, &peers, 1,
                                        &fence, why);
                run_bounded(pair, &reads);
                read_some_trace(&r, pair[0].card, &last_ns);
            }
            CHECK_EQUAL(spk_card_unload_program(pair[0].card, handle), SPK_OK);
            for (int i = 0; i < BUFFERS; i++)
                CHECK_EQUAL(pair[0].card->buffers[pair[0].buffer[i]].users, 0);
        }
        bench_destroy(&pair[0]), bench_destroy(&pair[1]);
        free(lent[0]), free(lent[1]);
    }
    /* A fuzzer of which nothing gets through tests nothing. */
    CHECK(accepted > rounds / 10 && ran > rounds / 10 && brought > rounds / 20);
    printf("ok card fuzz (%d programs accepted, %d steps run, %d with reads)\n", accepted, ran,
           brought);
    return 0;
}
