/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Throttled cards: a clock of the machine that they stand for, by docs/api/timing-model.md.
 *
 * The clock runs beside the cards and does not look at what they compute: when a step was submitted
 * and what its commands cost says when each of them ends, on every card.  It is an event simulation
 * of all cards together, moved on by whichever worker asks, never further than AHEAD_NS beyond the
 * real time.  A card that has really done a command asks whether it may have ended; if not, it
 * waits.  So nothing adds up: who wakes up late has only that much less to wait for next time.
 *
 * Within a step a card may be AHEAD_NS early, which nobody outside can see: steps end on time, a
 * trace tells the modelled times, and what one card sends another takes up no earlier in the model.
 * That way cards sleep and wake a thousand times a second and not for every command, which takes a
 * few microseconds; and a core that is late by less is not late at all.
 *
 * What is simulated ahead is certain.  A card without a step gets its next one now at the earliest,
 * and then needs a while before it sends anything; until then it changes nothing for others.  And
 * cards whose programs never exchange anything, directly or through others, have clocks of their
 * own: replicas of a model do not wait for each other here either.
 *
 * Times are in nanoseconds since the throttle was made, as doubles: thousandths for months.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "card_internal.h"

/* How early a card may be within a step, and how early it wakes up to go on. */
#define AHEAD_NS 1e6
#define WAKE_AHEAD_NS 0.25e6
/* Longer sleeps are cut: whoever watches for progress sees some. */
#define SLEEP_MAX_NS 20e6
/* Events this close happen together, whatever the rounding of their times. */
#define SAME_NS 1e-2
#define ATTENTION_TOKENS 8 /* neighbours that share the reading of keys and values */

/* One submission in the model.  The engine reads `begin`, `end` and `known` without the lock. */
struct timeline {
    const struct program *program;
    uint32_t tokens, outputs, epoch;
    double seen_by_groups; /* positions read, over all groups of neighbouring tokens */
    double seen;           /* pairs of a token and a position that it sees */
    double arrived, start; /* start: when the card could begin */
    double begin;          /* when the first command begins */
    double busy;
    _Atomic bool begun;     /* `begin` is known */
    _Atomic uint32_t known; /* and the ends of so many commands */
    double end[];
};

/* A message that is leaving. */
struct flow {
    uint32_t peer;
    bool active; /* the first of its link */
    uint64_t bytes;
    double left, rate;
};

/* A message that has left. */
struct arrival {
    double time;
    uint64_t bytes;
    uint32_t epoch;
};

struct paced_link {
    double bytes_per_ns, latency;
    struct arrival *arrivals; /* a ring */
    uint32_t head, count, capacity;
    uint64_t need; /* bytes that the receiver's exchange still lacks */
};

struct pace {
    struct spk_throttle *throttle;
    struct spk_card *card;
    uint32_t number;
    uint32_t group; /* those that exchange anything with each other have the same */
    double byte_ns, int8_ns, float_ns, element_ns, command_ns, step_ns;
    double port; /* bytes per ns, in each direction */
    double lead; /* from the submission of a step to its first message, at least */
    double slowness; /* how many times longer it takes than it should, 1 unless a test says more */

    struct timeline *queue[SPK_QUEUE_MAX];
    uint32_t head, count;
    double free; /* when its last step ended */
    uint32_t pc; /* of the first submission in the queue: where it stands */
    double at;   /* when something happens by itself: it reaches an exchange, or its step's end */
    bool exchanging;
    bool hosted;               /* and what goes over the host has really to get there */
    double exchange_done;      /* as far as is known: the last send or arrival so far */
    uint32_t leaving, lacking; /* flows, and links with a need */
    struct flow *flows;
    uint32_t flow_count;

    /* While rates are shared: what is left of its port, and among how many. */
    double out, in;
    uint32_t outs, ins;
    bool out_full, in_full;

    struct spk_pace totals;
};

/* The clock of a group of cards. */
struct group {
    double time;  /* up to which the bytes of flows have moved */
    double leave; /* when the next flow has left, if nothing else happens */
    bool stale;   /* flows began or ended at `time`: rates are to be shared anew */
};

struct spk_throttle {
    pthread_mutex_t mutex;
    uint64_t base_ns;
    uint32_t count;
    bool ports; /* some are limited */
    struct group *groups;
    struct paced_link *links; /* from card i to card j at i * count + j */
    struct pace cards[];
};

static double now_of(const struct spk_throttle *th, uint64_t now_ns)
{
    return (double)(int64_t)(now_ns - th->base_ns);
}

static uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static struct paced_link *link_of(struct spk_throttle *th, uint32_t from, uint32_t to)
{
    return &th->links[(size_t)from * th->count + to];
}

/* --- what a command costs ------------------------------------------------------------------- */

static double q8_bytes(double k)
{
    return k / SPK_BLOCK * SPK_Q8_BLOCK_BYTES;
}

static double ceil_to(double n, double unit)
{
    return ceil(n / unit) * unit;
}

/* The table of the page, row by row. */
static double command_ns(const struct pace *p, const struct timeline *t,
                         const struct spk_command *cmd)
{
    const uint32_t *arg = cmd->arg;
    bool by_output = cmd->flags & SPK_FLAG_OUTPUTS || cmd->op == SPK_OP_SELECT;
    double rows = by_output ? t->outputs : t->tokens, n = arg[0];
    double bytes = 0, work = 0, each = p->element_ns;

    if (is_bulk(cmd)) {
        work = (double)bulk_count(cmd, 0);
        bytes = work * (double)spk_element_bytes(cmd->format) * (cmd->op == SPK_OP_REDUCE ? 3 : 2);
        work = cmd->op == SPK_OP_COPY ? 0 : work;
        rows = 1;
    }
    if (rows == 0)
        return p->command_ns;
    switch (cmd->op) {
    case SPK_OP_EMBED:
        bytes = rows * ((double)spk_row_bytes(cmd->format, arg[0]) + 4 * n);
        work = rows * n;
        break;
    case SPK_OP_RMSNORM:
        bytes = rows * n * 8 + 4 * n;
        work = rows * n;
        break;
    case SPK_OP_QUANTIZE:
        bytes = rows * (4 * n + q8_bytes(n));
        work = rows * n;
        break;
    case SPK_OP_MATMUL: {
        bool floats = spk_block_weights(cmd->format) == 1;
        double k = arg[1], x = floats ? 4 * k : q8_bytes(k);
        bytes = (double)spk_packed_bytes(cmd->format, arg[0], arg[1]) + rows * x + rows * n * 4;
        work = ceil_to(n, 16) * k * rows;
        each = floats ? p->float_ns : p->int8_ns;
        break;
    }
    case SPK_OP_ROPE:
        bytes = rows * n * arg[1] * 8;
        work = rows * n * arg[1];
        break;
    case SPK_OP_KV_APPEND:
        bytes = rows * n * arg[1] * 12;
        work = rows * n * arg[1] * 2;
        break;
    case SPK_OP_ATTENTION: {
        double dim = arg[1], heads = arg[4];
        bytes = t->seen_by_groups * n * dim * 4 + rows * 8 * heads * dim;
        work = 2 * dim * heads * t->seen;
        each = p->float_ns;
        break;
    }
    case SPK_OP_SWIGLU:
    case SPK_OP_ADD:
        bytes = rows * n * 12;
        work = rows * n;
        break;
    case SPK_OP_SELECT:
        bytes = rows * n * 8;
        work = rows * n;
        break;
    case SPK_OP_LOGIT_STATS:
        bytes = rows * n * 4 + rows * ceil(n / SPK_LOGIT_CHUNK) * 8;
        work = rows * n;
        break;
    case SPK_OP_TOP_K:
        bytes = rows * n * 4 + rows * arg[1] * 8;
        work = rows * n;
        break;
    case SPK_OP_BEST:
        bytes = rows * 16;
        work = rows;
        break;
    case SPK_OP_CHOOSE:
        bytes = rows * (8 * n + 4);
        work = rows * n;
        break;
    default:
        break;
    }
    double moving = bytes * p->byte_ns, working = work * each;
    return p->command_ns + (moving > working ? moving : working);
}

/* What attention will see of a step; the same for all of its commands. */
static void count_positions(struct timeline *t, const uint32_t *position, const uint32_t *sequence)
{
    for (uint32_t i = 0, in_group = 0; i < t->tokens; i++) {
        bool last = i + 1 == t->tokens || sequence[i + 1] != sequence[i];
        t->seen += position[i] + 1.0;
        if (++in_group == ATTENTION_TOKENS || last) {
            t->seen_by_groups += position[i] + 1.0;
            in_group = 0;
        }
    }
}

/* --- flows ---------------------------------------------------------------------------------- */

struct cursor {
    uint32_t card, flow;
};

/* The next active flow of a group and the card that sends it; NULL after the last. */
static struct flow *next_active(struct spk_throttle *th, uint32_t group, struct cursor *at,
                                struct pace **source)
{
    for (; at->card < th->count; at->card++, at->flow = 0) {
        struct pace *p = &th->cards[at->card];
        if (p->group != group || !p->leaving)
            continue;
        while (at->flow < p->flow_count) {
            struct flow *f = &p->flows[at->flow++];
            if (f->active) {
                *source = p;
                return f;
            }
        }
    }
    return NULL;
}

#define FOR_EACH_ACTIVE(f, source, th, group)                                                      \
    for (struct cursor at_ = {0, 0}; ((f) = next_active((th), (group), &at_, &(source)));)

static double link_limit(struct spk_throttle *th, const struct pace *source, const struct flow *f)
{
    return link_of(th, source->number, f->peer)->bytes_per_ns;
}

static void move_flows(struct spk_throttle *th, uint32_t group, double time)
{
    double passed = time - th->groups[group].time;
    struct pace *source;
    struct flow *f;
    if (passed <= 0)
        return;
    FOR_EACH_ACTIVE(f, source, th, group)
        f->left -= f->rate * passed;
    th->groups[group].time = time;
}

static double share(double limit, uint32_t among)
{
    return among ? limit / among : INFINITY;
}

/* Max-min fairness: the tightest limit is shared equally by whom it binds, then the next. */
static void fill_ports(struct spk_throttle *th, uint32_t group)
{
    struct pace *source;
    struct flow *f;
    uint32_t left = 0;
    for (uint32_t c = 0; c < th->count; c++) {
        struct pace *p = &th->cards[c];
        p->out = p->in = p->port;
        p->outs = p->ins = 0;
    }
    FOR_EACH_ACTIVE(f, source, th, group) {
        f->rate = -1;
        source->outs++;
        th->cards[f->peer].ins++;
        left++;
    }
    while (left) {
        double level = INFINITY;
        FOR_EACH_ACTIVE(f, source, th, group) {
            const struct pace *target = &th->cards[f->peer];
            if (f->rate >= 0)
                continue;
            level = fmin(level, link_limit(th, source, f));
            level = fmin(level, share(source->out, source->outs));
            level = fmin(level, share(target->in, target->ins));
        }
        double bound = level * (1 + 1e-9);
        for (uint32_t c = 0; c < th->count; c++) {
            struct pace *p = &th->cards[c];
            p->out_full = share(p->out, p->outs) <= bound;
            p->in_full = share(p->in, p->ins) <= bound;
        }
        FOR_EACH_ACTIVE(f, source, th, group) {
            struct pace *target = &th->cards[f->peer];
            bool met = source->out_full || target->in_full || link_limit(th, source, f) <= bound;
            if (f->rate >= 0 || !met)
                continue;
            f->rate = level;
            source->out -= level, target->in -= level;
            source->outs--, target->ins--;
            left--;
        }
    }
}

static void share_rates(struct spk_throttle *th, uint32_t group)
{
    struct group *g = &th->groups[group];
    struct pace *source;
    struct flow *f;
    if (th->ports) {
        fill_ports(th, group);
    } else {
        FOR_EACH_ACTIVE(f, source, th, group)
            f->rate = link_limit(th, source, f);
    }
    g->leave = INFINITY;
    FOR_EACH_ACTIVE(f, source, th, group)
        g->leave = fmin(g->leave, g->time + fmax(f->left, 0) / f->rate);
    g->stale = false;
}

static void activate_next(struct pace *p, uint32_t peer)
{
    for (uint32_t i = 0; i < p->flow_count; i++) {
        struct flow *f = &p->flows[i];
        if (f->peer == peer && f->left > 0) {
            f->active = true;
            return;
        }
    }
}

/* Messages of an epoch that the sender has left behind are of no use to anyone. */
static void drop_stale_arrivals(struct paced_link *l, uint32_t epoch)
{
    while (l->count && l->arrivals[l->head].epoch < epoch) {
        l->head = (l->head + 1) % l->capacity;
        l->count--;
    }
}

static void arrive(struct paced_link *l, double time, uint64_t bytes, uint32_t epoch)
{
    drop_stale_arrivals(l, epoch);
    if (l->count == l->capacity) {
        uint32_t capacity = l->capacity ? 2 * l->capacity : 4;
        struct arrival *grown = malloc(capacity * sizeof *grown);
        if (!grown && l->count) {
            /* Without memory: together with the one before it, which is only later. */
            struct arrival *last = &l->arrivals[(l->head + l->count - 1) % l->capacity];
            last->time = fmax(last->time, time);
            last->bytes += bytes;
            return;
        }
        if (!grown)
            return;
        for (uint32_t i = 0; i < l->count; i++)
            grown[i] = l->arrivals[(l->head + i) % l->capacity];
        free(l->arrivals);
        l->arrivals = grown;
        l->capacity = capacity;
        l->head = 0;
    }
    l->arrivals[(l->head + l->count++) % l->capacity] = (struct arrival){time, bytes, epoch};
}

/* --- cards ---------------------------------------------------------------------------------- */

static struct timeline *current(const struct pace *p)
{
    return p->count ? p->queue[p->head] : NULL;
}

/* Commands from `pc` on one after the other, to the next exchange or the end. */
static void run_commands(struct pace *p, double time)
{
    struct timeline *t = current(p);
    uint32_t commands = t->program->header.commands;
    for (; p->pc < commands; p->pc++) {
        const struct spk_command *cmd = &t->program->commands[p->pc];
        double takes = p->command_ns * p->slowness;
        if (cmd->op == SPK_OP_EXCHANGE) {
            t->busy += takes;
            time += takes;
            break;
        }
        if (is_transfer(cmd))
            takes = 0;
        else
            takes = command_ns(p, t, cmd) * p->slowness;
        t->busy += takes;
        time += takes;
        t->end[p->pc] = time;
    }
    p->at = time;
    atomic_store_explicit(&t->known, p->pc, memory_order_release);
}

static void begin_step(struct pace *p)
{
    struct timeline *t = current(p);
    if (!t) {
        p->at = INFINITY;
        return;
    }
    t->start = fmax(t->arrived, p->free);
    t->begin = t->start + p->step_ns * p->slowness;
    atomic_store_explicit(&t->begun, true, memory_order_release);
    p->pc = 0;
    run_commands(p, t->begin);
}

static void pop_step(struct pace *p, double time)
{
    p->head = (p->head + 1) % SPK_QUEUE_MAX;
    p->count--;
    p->free = time;
    begin_step(p);
}

static void take_arrivals(struct pace *p, struct paced_link *l)
{
    uint32_t epoch = current(p)->epoch;
    drop_stale_arrivals(l, epoch);
    while (l->need && l->count && l->arrivals[l->head].epoch == epoch) {
        struct arrival *a = &l->arrivals[l->head];
        uint64_t take = a->bytes < l->need ? a->bytes : l->need;
        p->exchange_done = fmax(p->exchange_done, a->time);
        l->need -= take;
        a->bytes -= take;
        if (!a->bytes) {
            l->head = (l->head + 1) % l->capacity;
            l->count--;
        }
        if (!l->need)
            p->lacking--;
    }
}

static void end_exchange(struct pace *p)
{
    struct timeline *t = current(p);
    uint32_t transfers = t->program->commands[p->pc].arg[0];
    p->exchanging = false;
    p->flow_count = 0;
    for (uint32_t i = 0; i <= transfers; i++)
        t->end[p->pc++] = p->exchange_done;
    run_commands(p, p->exchange_done);
}

static void maybe_end_exchange(struct pace *p)
{
    if (p->exchanging && !p->hosted && !p->leaving && !p->lacking)
        end_exchange(p);
}

static uint64_t transfer_bytes(const struct timeline *t, const struct spk_command *x)
{
    if (x->flags & SPK_FLAG_BULK)
        return bulk_count(x, 1);
    uint64_t rows = x->flags & SPK_FLAG_OUTPUTS ? t->outputs : t->tokens;
    return rows * x->arg[1];
}

static void begin_exchange(struct pace *p, double time)
{
    struct spk_throttle *th = p->throttle;
    struct group *g = &th->groups[p->group];
    const struct timeline *t = current(p);
    const struct spk_command *cmd = &t->program->commands[p->pc];
    move_flows(th, p->group, time);
    p->exchanging = true;
    p->hosted = false;
    p->exchange_done = time;
    p->at = INFINITY;
    p->flow_count = p->leaving = p->lacking = 0;
    for (uint32_t i = 1; i <= cmd->arg[0]; i++) {
        const struct spk_command *x = &cmd[i];
        uint32_t peer = x->arg[0];
        uint64_t bytes = transfer_bytes(t, x);
        if (!bytes || peer >= th->count)
            continue;
        if (x->flags & SPK_FLAG_HOST) {
            p->hosted = true;
            continue;
        }
        if (x->op == SPK_OP_LINK_SEND) {
            p->flows[p->flow_count++] =
                (struct flow){.peer = peer, .bytes = bytes, .left = (double)bytes};
            p->leaving++;
        } else {
            struct paced_link *l = link_of(th, peer, p->number);
            p->lacking += !l->need;
            l->need += bytes;
        }
    }
    for (uint32_t peer = 0; peer < th->count; peer++)
        if (link_of(th, peer, p->number)->need)
            take_arrivals(p, link_of(th, peer, p->number));
    for (uint32_t peer = 0; peer < th->count && p->leaving; peer++)
        activate_next(p, peer);
    g->stale = g->stale || p->leaving;
    maybe_end_exchange(p);
}

/* A flow's last byte leaves at `time`. */
static void leave(struct pace *from, struct flow *f, double time)
{
    struct spk_throttle *th = from->throttle;
    struct pace *to = &th->cards[f->peer];
    struct paced_link *l = link_of(th, from->number, f->peer);
    f->active = false;
    f->left = 0;
    from->leaving--;
    from->exchange_done = fmax(from->exchange_done, time);
    arrive(l, time + l->latency, f->bytes, current(from)->epoch);
    if (to->exchanging && l->need) {
        take_arrivals(to, l);
        maybe_end_exchange(to);
    }
}

static void leave_all_due(struct spk_throttle *th, uint32_t group, double time)
{
    struct pace *source;
    struct flow *f;
    move_flows(th, group, time);
    FOR_EACH_ACTIVE(f, source, th, group) {
        uint32_t peer = f->peer;
        if (f->left > f->rate * SAME_NS)
            continue;
        leave(source, f, time);
        activate_next(source, peer);
    }
    /* Only now: the flows of a card stay where they are until all that are due have left. */
    for (uint32_t c = 0; c < th->count; c++)
        if (th->cards[c].group == group)
            maybe_end_exchange(&th->cards[c]);
    th->groups[group].stale = true;
}

/* --- the clock ------------------------------------------------------------------------------ */

static struct pace *next_card(struct spk_throttle *th, uint32_t group)
{
    struct pace *next = NULL;
    for (uint32_t c = 0; c < th->count; c++) {
        struct pace *p = &th->cards[c];
        if (p->group == group && (!next || p->at < next->at))
            next = p;
    }
    return next;
}

/* How far beyond the real time nothing new can happen to a group. */
static double certain_ns(const struct spk_throttle *th, uint32_t group)
{
    double certain = AHEAD_NS;
    for (uint32_t c = 0; c < th->count; c++)
        if (th->cards[c].group == group && !th->cards[c].count)
            certain = fmin(certain, th->cards[c].lead);
    return certain;
}

/* Lets the next thing happen to a group, unless it is later; returns when it happens. */
static double happen(struct spk_throttle *th, uint32_t group, double latest)
{
    struct group *g = &th->groups[group];
    struct pace *p = next_card(th, group);
    if (g->stale && p->at > g->time + SAME_NS)
        share_rates(th, group);
    bool leaving = !g->stale && g->leave <= p->at;
    double next = leaving ? g->leave : p->at;
    if (!(next <= latest))
        return next;
    if (leaving)
        leave_all_due(th, group, next);
    else if (p->pc < current(p)->program->header.commands)
        begin_exchange(p, next);
    else
        pop_step(p, next);
    return next;
}

/* Lets everything happen that will have happened by then; returns when the next thing will. */
static double advance(struct spk_throttle *th, uint32_t group, double now)
{
    for (;;) {
        double latest = now + certain_ns(th, group), next = happen(th, group, latest);
        if (!(next <= latest))
            return next;
    }
}

/* One clock for two groups from now on: that of the one which is ahead. */
static void join(struct spk_throttle *th, uint32_t into, uint32_t from)
{
    double time = fmax(th->groups[into].time, th->groups[from].time);
    while (happen(th, into, time) <= time)
        ;
    while (happen(th, from, time) <= time)
        ;
    move_flows(th, into, time);
    move_flows(th, from, time);
    for (uint32_t c = 0; c < th->count; c++)
        if (th->cards[c].group == from)
            th->cards[c].group = into;
    th->groups[into] = (struct group){.time = time, .leave = INFINITY, .stale = true};
}

/* Before its first message a card takes up the step and all commands that stand before it. */
static double lead_ns(const struct pace *p, const struct program *program)
{
    uint32_t before = 0;
    for (uint32_t i = 0; i < program->header.commands; i++) {
        const struct spk_command *x = &program->commands[i];
        if (x->op == SPK_OP_LINK_SEND && !(x->flags & SPK_FLAG_HOST))
            return p->step_ns + before * p->command_ns;
        before += !is_transfer(x);
    }
    return INFINITY;
}

/* What the programs of a card say of it: whom it exchanges with, and how soon. */
static void learn(struct pace *p, const struct program *submitted)
{
    struct spk_throttle *th = p->throttle;
    p->lead = INFINITY;
    for (int i = 0; i < SPK_PROGRAMS_MAX; i++)
        if (p->card->programs[i])
            p->lead = fmin(p->lead, lead_ns(p, p->card->programs[i]));
    for (uint32_t i = 0; i < submitted->header.commands; i++) {
        const struct spk_command *x = &submitted->commands[i];
        if (is_transfer(x) && !(x->flags & SPK_FLAG_HOST) && x->arg[0] < th->count && th->cards[x->arg[0]].group != p->group)
            join(th, p->group, th->cards[x->arg[0]].group);
    }
}

bool pace_submitted(struct spk_card *c, struct submission *s)
{
    struct pace *p = c->pace;
    struct spk_throttle *th = p->throttle;
    size_t commands = s->program->header.commands;
    struct timeline *t = calloc(1, sizeof *t + commands * sizeof t->end[0]);
    if (!t)
        return false;
    struct execution bound = {.submission = *s};
    step_bind(&bound);
    t->program = s->program;
    t->tokens = bound.tokens;
    t->outputs = bound.outputs;
    t->epoch = s->epoch;
    count_positions(t, bound.position, bound.sequence);
    s->timeline = t;
    pthread_mutex_lock(&th->mutex);
    learn(p, s->program);
    t->arrived = now_of(th, clock_ns());
    p->queue[(p->head + p->count++) % SPK_QUEUE_MAX] = t;
    if (p->count == 1)
        begin_step(p);
    pthread_mutex_unlock(&th->mutex);
    return true;
}

/* A step that ends otherwise than in the model: aborted, or by a fault. */
static void forget_step(struct pace *p, uint32_t place, double now)
{
    struct spk_throttle *th = p->throttle;
    if (place) {
        for (uint32_t i = place; i + 1 < p->count; i++)
            p->queue[(p->head + i) % SPK_QUEUE_MAX] = p->queue[(p->head + i + 1) % SPK_QUEUE_MAX];
        p->count--;
        return;
    }
    if (p->exchanging) {
        struct group *g = &th->groups[p->group];
        move_flows(th, p->group, fmax(now, g->time));
        /* What it was sending has been sent: a peer of the same epoch may have it already. */
        for (uint32_t i = 0; i < p->flow_count; i++)
            if (p->flows[i].left > 0)
                leave(p, &p->flows[i], g->time);
        p->exchanging = p->hosted = false;
        p->flow_count = p->leaving = p->lacking = 0;
        for (uint32_t peer = 0; peer < th->count; peer++)
            link_of(th, peer, p->number)->need = 0;
        g->stale = true;
    }
    pop_step(p, now);
}

uint64_t pace_completed(struct spk_card *c, struct submission *s, bool succeeded)
{
    struct pace *p = c->pace;
    struct spk_throttle *th = p->throttle;
    struct timeline *t = s->timeline;
    double busy = 0;
    pthread_mutex_lock(&th->mutex);
    double now = now_of(th, clock_ns());
    /* All that ends by now leaves the queue by itself. */
    advance(th, p->group, now);
    for (uint32_t i = 0; i < p->count; i++)
        if (p->queue[(p->head + i) % SPK_QUEUE_MAX] == t) {
            forget_step(p, i, now);
            break;
        }
    if (succeeded) {
        uint32_t commands = t->program->header.commands;
        double end = commands ? t->end[commands - 1] : t->begin;
        p->totals.steps++;
        p->totals.last_step_ns = end - t->start;
        p->totals.modelled_ns += end - t->start;
        p->totals.last_end_ns = end;
        p->totals.late_ns += now - end;
        p->totals.late_ns_max = fmax(p->totals.late_ns_max, now - end);
        busy = t->busy;
    }
    pthread_mutex_unlock(&th->mutex);
    s->timeline = NULL;
    free(t);
    return (uint64_t)busy;
}

/* --- what the engine asks ------------------------------------------------------------------- */

static bool is_known(const struct timeline *t, uint32_t command)
{
    if (command == t->program->header.commands)
        command--;
    if (command == UINT32_MAX) /* of a program without commands */
        return atomic_load_explicit(&t->begun, memory_order_acquire);
    return command < atomic_load_explicit(&t->known, memory_order_acquire);
}

/* Whether what comes next leaves the model's time: the end of a step, and what goes over the host,
 * whose link is not modelled here. */
static bool is_followed_outside(const struct program *program, uint32_t command)
{
    uint32_t commands = program->header.commands;
    if (command == commands)
        return true;
    if (command + 1 >= commands || program->commands[command + 1].op != SPK_OP_EXCHANGE)
        return false;
    const struct spk_command *exchange = &program->commands[command + 1];
    for (uint32_t i = 1; i <= exchange->arg[0]; i++)
        if (exchange[i].flags & SPK_FLAG_HOST)
            return true;
    return false;
}

uint64_t pace_end_ns(struct spk_card *c, uint32_t command, uint64_t now_ns)
{
    struct pace *p = c->pace;
    struct spk_throttle *th = p->throttle;
    struct execution *run = &c->run;
    const struct timeline *t = run->submission.timeline;
    uint32_t commands = t->program->header.commands;
    bool strict = is_followed_outside(t->program, command);
    double now = now_of(th, now_ns), next = 0;

    if (!is_known(t, command)) {
        pthread_mutex_lock(&th->mutex);
        next = advance(th, p->group, now);
        if (current(p) == t && p->exchanging && p->hosted) {
            /* It has come by now. */
            p->hosted = false;
            p->exchange_done = fmax(p->exchange_done, now);
            maybe_end_exchange(p);
            next = advance(th, p->group, now);
        }
        /* The model waits for something that will not come, since a peer has failed half way:
         * what has really arrived decides. */
        if (!is_known(t, command) && !isfinite(next) && current(p) == t && p->exchanging) {
            for (uint32_t peer = 0; peer < th->count; peer++)
                link_of(th, peer, p->number)->need = 0;
            p->lacking = 0;
            p->exchange_done = fmax(p->exchange_done, now);
            maybe_end_exchange(p);
        }
        next -= fmin(WAKE_AHEAD_NS, certain_ns(th, p->group));
        pthread_mutex_unlock(&th->mutex);
    }
    if (is_known(t, command)) {
        double end = !commands ? t->begin : t->end[command == commands ? command - 1 : command];
        if (command == 0)
            run->command_begin_ns = th->base_ns + (uint64_t)t->begin;
        if (end <= now + (strict ? 0 : AHEAD_NS))
            return th->base_ns + (uint64_t)end;
        next = strict ? end : end - WAKE_AHEAD_NS;
    }
    next = fmin(next, now + SLEEP_MAX_NS);
    atomic_store_explicit(&c->wake_ns, th->base_ns + (uint64_t)fmax(ceil(next), 0),
                          memory_order_relaxed);
    return 0;
}

/* --- faults ---------------------------------------------------------------------------------- */

void pace_slow(struct spk_card *c, double factor)
{
    struct pace *p = c->pace;
    pthread_mutex_lock(&p->throttle->mutex);
    advance(p->throttle, p->group, now_of(p->throttle, clock_ns()));
    p->slowness = factor;
    pthread_mutex_unlock(&p->throttle->mutex);
}

void pace_renew(struct spk_card *c)
{
    struct pace *p = c->pace;
    struct spk_throttle *th = p->throttle;
    pthread_mutex_lock(&th->mutex);
    for (uint32_t peer = 0; peer < th->count; peer++) {
        struct paced_link *to = link_of(th, p->number, peer), *from = link_of(th, peer, p->number);
        to->count = from->count = 0;
        from->need = 0;
    }
    p->totals = (struct spk_pace){0};
    p->slowness = 1;
    pthread_mutex_unlock(&th->mutex);
}

void spk_card_pace(struct spk_card *c, struct spk_pace *out)
{
    *out = (struct spk_pace){0};
    if (!c->pace)
        return;
    pthread_mutex_lock(&c->pace->throttle->mutex);
    *out = c->pace->totals;
    pthread_mutex_unlock(&c->pace->throttle->mutex);
}

/* --- life ----------------------------------------------------------------------------------- */

static bool is_speed(double x)
{
    return x > 0;
}

static bool is_time(double x)
{
    return x >= 0 && isfinite(x);
}

struct spk_throttle *spk_throttle_create(struct spk_card **cards, size_t count,
                                         const struct spk_card_speed *speeds,
                                         const struct spk_link_speed *links, int *status)
{
    *status = SPK_E_ARG;
    if (!count || count > SPK_CARDS_MAX)
        return NULL;
    for (size_t i = 0; i < count; i++) {
        const struct spk_card_speed *s = &speeds[i];
        if (cards[i]->pace || !is_speed(s->memory_bytes_per_s) || !is_speed(s->int8_madds_per_s) ||
            !is_speed(s->float_madds_per_s) || !is_speed(s->elements_per_s) ||
            !is_speed(s->port_bytes_per_s) || !is_time(s->command_s) || !is_time(s->step_s))
            return NULL;
    }
    for (size_t i = 0; i < count * count; i++)
        if (i / count != i % count &&
            !(is_speed(links[i].bytes_per_s) && is_time(links[i].latency_s)))
            return NULL;
    *status = SPK_E_SYSTEM;
    struct spk_throttle *th = calloc(1, sizeof *th + count * sizeof th->cards[0]);
    if (!th)
        return NULL;
    pthread_mutex_init(&th->mutex, NULL);
    th->base_ns = clock_ns();
    th->count = (uint32_t)count;
    th->groups = calloc(count, sizeof *th->groups);
    th->links = calloc(count * count, sizeof *th->links);
    bool complete = th->groups && th->links;
    for (size_t i = 0; i < count && complete; i++) {
        struct pace *p = &th->cards[i];
        const struct spk_card_speed *s = &speeds[i];
        *p = (struct pace){.throttle = th,
                           .card = cards[i],
                           .number = (uint32_t)i,
                           .group = (uint32_t)i,
                           .byte_ns = 1e9 / s->memory_bytes_per_s,
                           .int8_ns = 1e9 / s->int8_madds_per_s,
                           .float_ns = 1e9 / s->float_madds_per_s,
                           .element_ns = 1e9 / s->elements_per_s,
                           .command_ns = 1e9 * s->command_s,
                           .step_ns = 1e9 * s->step_s,
                           .lead = 1e9 * s->step_s,
                           .slowness = 1,
                           .port = s->port_bytes_per_s / 1e9,
                           .at = INFINITY};
        p->flows = calloc(2 * SPK_CARDS_MAX, sizeof *p->flows);
        complete = p->flows != NULL;
        th->ports = th->ports || isfinite(p->port);
        th->groups[i].leave = INFINITY;
    }
    if (!complete) {
        spk_throttle_destroy(th);
        return NULL;
    }
    for (size_t i = 0; i < count * count; i++) {
        th->links[i].bytes_per_ns = links[i].bytes_per_s / 1e9;
        th->links[i].latency = links[i].latency_s * 1e9;
    }
    for (size_t i = 0; i < count; i++)
        cards[i]->pace = &th->cards[i];
    *status = SPK_OK;
    return th;
}

void spk_throttle_destroy(struct spk_throttle *th)
{
    if (!th)
        return;
    for (uint32_t i = 0; i < th->count; i++) {
        struct pace *p = &th->cards[i];
        if (p->card && p->card->pace == p)
            p->card->pace = NULL;
        free(p->flows);
    }
    for (size_t i = 0; th->links && i < (size_t)th->count * th->count; i++)
        free(th->links[i].arrivals);
    free(th->links);
    free(th->groups);
    pthread_mutex_destroy(&th->mutex);
    free(th);
}
