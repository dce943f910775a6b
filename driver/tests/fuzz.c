// SPDX-License-Identifier: Apache-2.0
/*
 * Random calls that mean no good, reproducible: the same seed makes the same calls.
 *
 *   fuzz [SEED [COUNT [CARDS]]]    10,000 calls by default, of a seed from the clock
 *
 * Most are nearly right: real handles with wrong bounds, real structures with one bit turned, calls
 * of other sizes.  Now and then the card is reset, or a file closed.  Afterwards every card must
 * work, and have all of its memory.
 */
#include "common.h"

#include <sys/time.h>

#define FILES 4
#define REMEMBERED 16

static uint64_t state;

/* xorshift64*, by Vigna. */
static uint64_t any(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717ull;
}

static uint32_t below(uint32_t n)
{
    return (uint32_t)(any() >> 32) % n;
}

static bool one_in(uint32_t n)
{
    return below(n) == 0;
}

/* --- values that have a meaning --------------------------------------------------------------- */

struct open_file {
    int fd;
    struct spanker_buffer_create buffers[REMEMBERED];
    uint32_t programs[REMEMBERED];
    uint64_t fence;
};

static struct open_file files[FILES];
static int cards = 1;
static struct program *program;
static uint8_t *scratch; /* 8 MiB, readable and writable, nothing behind it */
static uint8_t *read_only;
#define SCRATCH (8u << 20)

static uint64_t number(void)
{
    static const uint64_t some[] = {0, 1, 2, 3, 7, 8, 63, 64, 65, 255, 256, 4095, 4096, 4097, 65535,
                                    65536, 65537, 0x7fffffff, 0x80000000, 0xffffffff,
                                    0x100000000, UINT64_MAX - 4095, UINT64_MAX - 1, UINT64_MAX};
    if (one_in(4))
        return any() >> below(64);
    return some[below(sizeof some / sizeof some[0])];
}

static uint64_t pointer(void)
{
    switch (below(12)) {
    case 0:
        return 0;
    case 1:
        return number();
    case 2:
        return (uintptr_t)(scratch + SCRATCH - below(200));
    case 3:
        return (uintptr_t)read_only + below(PAGE);
    case 4:
        return any();
    default:
        return (uintptr_t)(scratch + below(SCRATCH / 2));
    }
}

static uint32_t handle(const struct open_file *f)
{
    return one_in(5) ? (uint32_t)number() : f->buffers[below(REMEMBERED)].handle;
}

static uint32_t program_id(const struct open_file *f)
{
    return one_in(6) ? (uint32_t)number() : f->programs[below(REMEMBERED)];
}

static uint64_t bytes(void)
{
    return one_in(3) ? number() : 1 + below(300000);
}

/* Not so long that the fuzzer takes for ever, and never for ever. */
static int64_t timeout(void)
{
    return one_in(4) ? below(2000000) : 0;
}

/* --- calls ------------------------------------------------------------------------------------ */

static void fuzz_program(struct open_file *f, struct spanker_program_load *load)
{
    uint32_t count = one_in(20) ? below(COMMANDS_MAX) : below(6);
    uint32_t handles = 1 + below(4);
    uint32_t *named = (uint32_t *)(scratch + SCRATCH / 2);
    memset(program, 0, sizeof program->header + (count + 1) * sizeof program->commands[0]);
    program->header = (struct program_header){
        .magic = 0x474b5053, .version = 1, .commands = count, .tokens_max = 1, .positions_max = 16};
    for (uint32_t i = 0; i < count; i++) {
        struct program_command *c = &program->commands[i];
        c->op = one_in(4) ? (uint16_t)below(25) : OP_COPY;
        c->ref[0].buffer = one_in(8) ? (uint32_t)number() : below(handles);
        c->ref[0].offset = one_in(4) ? number() : 4 * below(300);
        c->ref[3].buffer = one_in(8) ? (uint32_t)number() : below(handles);
        c->ref[3].offset = one_in(4) ? number() : 4 * below(300);
        c->arg[0] = one_in(4) ? (uint32_t)number() : below(2000);
        if (one_in(10))
            ((uint8_t *)c)[below(sizeof *c)] ^= (uint8_t)(1u << below(8));
    }
    if (one_in(10))
        ((uint8_t *)program)[below(32)] ^= (uint8_t)(1u << below(8));
    for (uint32_t i = 0; i < handles; i++)
        named[i] = handle(f);
    load->program = one_in(8) ? pointer() : (uintptr_t)program;
    load->program_bytes = one_in(8) ? number() : program_bytes(program);
    if (load->program_bytes > sizeof *program && load->program_bytes <= SPANKER_PROGRAM_BYTES_MAX)
        load->program = (uintptr_t)scratch;
    load->handles = one_in(8) ? pointer() : (uintptr_t)named;
    load->handle_count = one_in(8) ? (uint32_t)number() : handles;
    load->why = one_in(2) ? pointer() : 0;
}

static void fuzz_submit(struct open_file *f, struct spanker_submit *submit)
{
    struct spanker_read *reads = (struct spanker_read *)(scratch + SCRATCH / 2 + PAGE);
    struct step *step = (struct step *)(scratch + SCRATCH / 2 + 2 * PAGE);
    *step = no_tokens;
    if (one_in(6))
        ((uint8_t *)step)[below(sizeof *step)] ^= (uint8_t)(1u << below(8));
    submit->program_id = program_id(f);
    submit->parameters = one_in(10) ? pointer() : (uintptr_t)step;
    submit->parameters_bytes = one_in(8) ? (uint32_t)number() : sizeof *step;
    submit->read_count = one_in(8) ? (uint32_t)number() : below(SPANKER_READS_MAX + 1);
    for (uint32_t i = 0; i < SPANKER_READS_MAX; i++)
        reads[i] = (struct spanker_read){.handle = handle(f),
                                         .reserved = one_in(20) ? 1 : 0,
                                         .offset = one_in(4) ? number() : below(5000),
                                         .bytes = one_in(4) ? number() : below(5000)};
    submit->reads = one_in(10) ? pointer() : (uintptr_t)reads;
}

static void fuzz_reopen(struct open_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    memset(f, 0, sizeof *f);
    f->fd = open_flags((int)below((uint32_t)cards), one_in(2) ? O_NONBLOCK : 0);
}

static void fuzz_map(struct open_file *f)
{
    const struct spanker_buffer_create *b = &f->buffers[below(REMEMBERED)];
    uint64_t offset = one_in(3) ? number() & ~(uint64_t)(PAGE - 1) : b->mmap_offset;
    uint64_t size = one_in(3) ? bytes() % (64u << 20) : b->bytes;
    if (!size)
        return;
    uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, one_in(8) ? MAP_PRIVATE : MAP_SHARED,
                           f->fd, (off_t)offset);
    if (memory == MAP_FAILED)
        return;
    memory[0] = 1;
    memory[size - 1] = 2;
    if (one_in(4) && size > PAGE)
        mprotect(memory, PAGE, PROT_READ);
    munmap(memory, size);
}

/* An argument that is right but for what has been drawn, at `at`; the request to go with it. */
static unsigned long fuzz_argument(struct open_file *f, void *at)
{
    switch (below(14)) {
    case 0:
    case 1:
        *(struct spanker_buffer_create *)at =
            (struct spanker_buffer_create){.bytes = bytes(), .kind = one_in(6) ? below(5) : below(2)};
        return SPANKER_IOC_BUFFER_CREATE;
    case 2:
        *(struct spanker_buffer_destroy *)at = (struct spanker_buffer_destroy){.handle = handle(f)};
        return SPANKER_IOC_BUFFER_DESTROY;
    case 3:
    case 4:
        memset(at, 0, sizeof(struct spanker_program_load));
        fuzz_program(f, at);
        return SPANKER_IOC_PROGRAM_LOAD;
    case 5:
        *(struct spanker_program_unload *)at =
            (struct spanker_program_unload){.program_id = program_id(f)};
        return SPANKER_IOC_PROGRAM_UNLOAD;
    case 6:
    case 7:
        memset(at, 0, sizeof(struct spanker_submit));
        fuzz_submit(f, at);
        return SPANKER_IOC_SUBMIT;
    case 8:
        *(struct spanker_collect *)at =
            (struct spanker_collect){.timeout_ns = timeout(),
                                     .results = pointer(),
                                     .results_bytes = one_in(2) ? SCRATCH / 4 : number()};
        return SPANKER_IOC_COLLECT;
    case 9:
        *(struct spanker_wait *)at = (struct spanker_wait){
            .fence = one_in(3) ? number() : f->fence, .timeout_ns = timeout()};
        return SPANKER_IOC_WAIT;
    case 10:
        /* Epochs only grow: those that are drawn must not use them up. */
        *(struct spanker_abort *)at = (struct spanker_abort){.epoch = below(2000)};
        return SPANKER_IOC_ABORT;
    case 11:
        *(struct spanker_link *)at = (struct spanker_link){.link = (uint32_t)number()};
        return one_in(2) ? SPANKER_IOC_LINK : SPANKER_IOC_INFO;
    case 12:
        *(struct spanker_link_control *)at =
            (struct spanker_link_control){.link = (uint32_t)number(), .up = 1 + below(3)};
        return one_in(2) ? SPANKER_IOC_LINK_CONTROL : SPANKER_IOC_TELEMETRY;
    default:
        *(struct spanker_image *)at =
            (struct spanker_image){.image = pointer(), .image_bytes = bytes() % (SCRATCH / 8)};
        return SPANKER_IOC_IMAGE;
    }
}

static void remember(struct open_file *f, unsigned long request, const void *at)
{
    uint32_t slot = below(REMEMBERED);
    if (request == SPANKER_IOC_BUFFER_CREATE)
        f->buffers[slot] = *(const struct spanker_buffer_create *)at;
    if (request == SPANKER_IOC_PROGRAM_LOAD)
        f->programs[slot] = ((const struct spanker_program_load *)at)->program_id;
    if (request == SPANKER_IOC_SUBMIT)
        f->fence = ((const struct spanker_submit *)at)->fence;
}

static long fuzz_once(struct open_file *f)
{
    uint64_t argument[64] = {0};
    void *at = argument;
    unsigned long request = fuzz_argument(f, argument);
    size_t size = _IOC_SIZE(request);
    if (one_in(8))
        ((uint8_t *)argument)[below((uint32_t)size)] ^= (uint8_t)(1u << below(8));
    /* A timeout that a turned bit has made long would only be slow. */
    if (request == SPANKER_IOC_COLLECT)
        ((struct spanker_collect *)at)->timeout_ns &= 0x1fffff;
    if (request == SPANKER_IOC_WAIT)
        ((struct spanker_wait *)at)->timeout_ns &= 0x1fffff;
    /* Links stay up, for the tests that come after. */
    if (request == SPANKER_IOC_LINK_CONTROL && !((struct spanker_link_control *)at)->up)
        ((struct spanker_link_control *)at)->up = 2;
    if (one_in(12))
        request ^= 1ul << below(32);
    if (request == SPANKER_IOC_RESET && !one_in(4))
        request = SPANKER_IOC_PING;
    if (one_in(12))
        at = (void *)(uintptr_t)pointer();
    else if (one_in(12))
        at = memcpy(scratch + SCRATCH - size, argument, size);
    long result = call(f->fd, request, at);
    if (result == 0 && at == argument)
        remember(f, request, argument);
    return result;
}

/* A pointer to anywhere may find a timeout there that is for ever: calls end with EINTR then. */
static void nothing(int number)
{
    (void)number;
}

static void interrupt_every(int ms)
{
    struct sigaction action = {.sa_handler = nothing};
    struct itimerval timer = {{.tv_usec = ms * 1000}, {.tv_usec = ms * 1000}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
}

/* --- before and after --------------------------------------------------------------------------- */

static uint64_t free_before[16];

static void every_card_has_all_its_memory(void)
{
    for (int i = 0; i < cards; i++) {
        struct spanker_info info = {0};
        int fd = open_card(i);
        NEED(fd >= 0);
        for (int tries = 0; tries < 1000; tries++) {
            IS(info_of(fd, &info), 0);
            if (info.ddr_free == free_before[i])
                break;
            sleep_ms(10);
        }
        CHECK(info.ddr_free == free_before[i]);
        close(fd);
    }
}

/* A pointer to anywhere may find there that a link shall go down: not for the tests that come after. */
static void links_up(int number)
{
    struct spanker_info info = {0};
    int fd = open_card(number);
    info_of(fd, &info);
    for (uint32_t i = 0; i < info.links; i++) {
        struct spanker_link_control up = {.link = i, .up = 1};
        call(fd, SPANKER_IOC_LINK_CONTROL, &up);
    }
    close(fd);
}

static void every_card_works(void)
{
    for (int i = 0; i < cards; i++)
        CHECK(card_works(i));
}

int main(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : (uint64_t)now_ns();
    long count = argc > 2 ? atol(argv[2]) : 10000;
    long good = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    cards = argc > 3 ? atoi(argv[3]) : 1;
    if (cards < 1 || cards > 16)
        return 2;
    printf("seed %llu, %ld calls\n", (unsigned long long)seed, count);
    state = seed * 2 + 1;
    scratch = mmap(NULL, SCRATCH + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(scratch + SCRATCH, PAGE);
    read_only = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    program = calloc(1, sizeof *program);
    TEST(every_card_works);
    for (int i = 0; i < cards; i++) {
        struct spanker_info info = {0};
        int fd = open_card(i);
        info_of(fd, &info);
        free_before[i] = info.ddr_free;
        close(fd);
    }
    for (int i = 0; i < FILES; i++) {
        files[i].fd = -1;
        fuzz_reopen(&files[i]);
    }
    interrupt_every(100);
    for (long i = 0; i < count; i++) {
        struct open_file *f = &files[below(FILES)];
        if (one_in(200))
            fuzz_reopen(f);
        if (one_in(2000))
            call(f->fd, SPANKER_IOC_RESET, NULL);
        if (one_in(10))
            fuzz_map(f);
        long result = fuzz_once(f);
        good += result == 0;
        if (result == -ESTALE || result == -ESHUTDOWN)
            fuzz_reopen(f);
    }
    interrupt_every(0);
    printf("%ld of %ld calls were good\n", good, count);
    for (int i = 0; i < FILES; i++)
        close(files[i].fd);
    for (int i = 0; i < cards; i++)
        links_up(i);
    TEST(every_card_has_all_its_memory);
    TEST(every_card_works);
    return tests_end();
}
