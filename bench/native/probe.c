/* SPDX-License-Identifier: Apache-2.0 */
/* What the machine can do at most: bytes read per second, int8 multiply-adds per second.
 *
 * Built and called by bench/probe.py alone.  Measurements only: no kernel of Spanker is run here,
 * so that a kernel can be compared with something that does nothing but read or multiply.
 *
 * Threads are pinned to the given CPUs and started together by a barrier before each pass; a pass
 * lasts from the first thread's start to the last one's end; the shortest pass counts, because
 * whatever disturbs a pass only makes it longer.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#else
#define X86 0
#endif

#define EXPORT __attribute__((visibility("default")))
#define THREADS_MAX 256
#define STREAMS_MAX 8
/* A whole number of loads of every variant, per stream and step. */
#define STEP_BYTES 256
#define HUGE_PAGE ((size_t)2 << 20)

EXPORT const char *probe_read_isa(void);
EXPORT const char *probe_int8_isa(void);
EXPORT int probe_read(size_t bytes, int threads, const int *cpus, int streams, int repeats,
                      int passes, double *seconds);
EXPORT int probe_int8(int threads, const int *cpus, long steps, int passes, double *seconds,
                      double *multiply_adds);

/* --- reading ------------------------------------------------------------------------- */

/* Reads `streams` runs of `bytes` each (a multiple of STEP_BYTES), side by side: the prefetcher
 * follows each by itself.  The result depends on every byte. */
typedef uint64_t read_fn(const uint8_t *data, size_t bytes, int streams);

#if !X86
static uint64_t read_plain(const uint8_t *data, size_t bytes, int streams) {
  uint64_t sum = 0;
  for (size_t at = 0; at < bytes; at += STEP_BYTES) {
    for (int s = 0; s < streams; s++) {
      const uint8_t *p = data + (size_t)s * bytes + at;
      uint64_t part[STEP_BYTES / 8];
      memcpy(part, p, STEP_BYTES);
      for (int i = 0; i < STEP_BYTES / 8; i++) sum += part[i];
    }
  }
  return sum;
}
#else
__attribute__((target("sse2"))) static uint64_t read_sse2(const uint8_t *data, size_t bytes,
                                                          int streams) {
  __m128i sum[4];
  for (int i = 0; i < 4; i++) sum[i] = _mm_setzero_si128();
  for (size_t at = 0; at < bytes; at += STEP_BYTES) {
    for (int s = 0; s < streams; s++) {
      const __m128i *p = (const __m128i *)(data + (size_t)s * bytes + at);
      for (int i = 0; i < STEP_BYTES / 16; i++)
        sum[i % 4] = _mm_add_epi64(sum[i % 4], _mm_load_si128(p + i));
    }
  }
  sum[0] = _mm_add_epi64(_mm_add_epi64(sum[0], sum[1]), _mm_add_epi64(sum[2], sum[3]));
  uint64_t lane[2];
  _mm_storeu_si128((__m128i *)lane, sum[0]);
  return lane[0] + lane[1];
}

__attribute__((target("avx2"))) static uint64_t read_avx2(const uint8_t *data, size_t bytes,
                                                          int streams) {
  __m256i sum[4];
  for (int i = 0; i < 4; i++) sum[i] = _mm256_setzero_si256();
  for (size_t at = 0; at < bytes; at += STEP_BYTES) {
    for (int s = 0; s < streams; s++) {
      const __m256i *p = (const __m256i *)(data + (size_t)s * bytes + at);
      for (int i = 0; i < STEP_BYTES / 32; i++)
        sum[i % 4] = _mm256_add_epi64(sum[i % 4], _mm256_load_si256(p + i));
    }
  }
  sum[0] = _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
  uint64_t lane[4];
  _mm256_storeu_si256((__m256i *)lane, sum[0]);
  return lane[0] + lane[1] + lane[2] + lane[3];
}

__attribute__((target("avx512f"))) static uint64_t read_avx512(const uint8_t *data, size_t bytes,
                                                               int streams) {
  __m512i sum[4];
  for (int i = 0; i < 4; i++) sum[i] = _mm512_setzero_si512();
  for (size_t at = 0; at < bytes; at += STEP_BYTES) {
    for (int s = 0; s < streams; s++) {
      const uint8_t *p = data + (size_t)s * bytes + at;
      for (int i = 0; i < STEP_BYTES / 64; i++)
        sum[i] = _mm512_add_epi64(sum[i], _mm512_load_si512((const void *)(p + 64 * i)));
    }
  }
  sum[0] = _mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3]));
  uint64_t lane[8];
  _mm512_storeu_si512(lane, sum[0]);
  uint64_t total = 0;
  for (int i = 0; i < 8; i++) total += lane[i];
  return total;
}
#endif

/* --- multiplying --------------------------------------------------------------------- */

/* Runs `steps` steps of ACCUMULATORS independent dot-product updates in registers: enough to hide
 * the latency of each. */
#define ACCUMULATORS 12
typedef void int8_fn(long steps);

#if X86
/* A variable for each accumulator, because compilers leave arrays of them in memory.  The empty asm
 * makes each operand look new, so that no product is shared between updates, or used, so that none
 * is left out. */
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define DECLARE(i) sum##i = a,
#define STEP(i)                                 \
  __asm__ volatile("" : "+v"(a), "+v"(sum##i)); \
  sum##i = UPDATE(sum##i);
#define USE(i) __asm__ volatile("" : : "v"(sum##i));

__attribute__((target("avx512f,avx512bw,avx512vnni"))) static void int8_avx512vnni(long steps) {
  __m512i a = _mm512_set1_epi8(3), EACH(DECLARE) b = _mm512_set1_epi8(5);
#define UPDATE(sum) _mm512_dpbusd_epi32(sum, a, b)
  for (long n = 0; n < steps; n++) { EACH(STEP) }
#undef UPDATE
  EACH(USE)
}

__attribute__((target("avx512f,avx512bw"))) static void int8_avx512(long steps) {
  __m512i a = _mm512_set1_epi8(3), EACH(DECLARE) b = _mm512_set1_epi8(5);
  __m512i ones = _mm512_set1_epi16(1);
#define UPDATE(sum) _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), ones))
  for (long n = 0; n < steps; n++) { EACH(STEP) }
#undef UPDATE
  EACH(USE)
}

__attribute__((target("avx2"))) static void int8_avx2(long steps) {
  __m256i a = _mm256_set1_epi8(3), EACH(DECLARE) b = _mm256_set1_epi8(5);
  __m256i ones = _mm256_set1_epi16(1);
#define UPDATE(sum) _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones))
  for (long n = 0; n < steps; n++) { EACH(STEP) }
#undef UPDATE
  EACH(USE)
}
#endif

/* Without vector instructions of our own: what the compiler makes of a dot product in cache. */
#define PLAIN_MULTIPLY_ADDS 1024
static void int8_plain(long steps) {
  int8_t a[PLAIN_MULTIPLY_ADDS], b[PLAIN_MULTIPLY_ADDS];
  int32_t total = 0;
  memset(a, 3, sizeof a);
  memset(b, 5, sizeof b);
  for (long n = 0; n < steps; n++) {
    __asm__ volatile("" : : "r"(a), "r"(b) : "memory");
    for (int i = 0; i < PLAIN_MULTIPLY_ADDS; i++) total += a[i] * b[i];
  }
  __asm__ volatile("" : : "r"(total));
}

/* --- what this CPU has --------------------------------------------------------------- */

struct reader {
  const char *isa;
  read_fn *run;
};

struct multiplier {
  const char *isa;
  int8_fn *run;
  double multiply_adds_per_step;
};

static struct reader reader(void) {
#if X86
  if (__builtin_cpu_supports("avx512f")) return (struct reader){"avx512", read_avx512};
  if (__builtin_cpu_supports("avx2")) return (struct reader){"avx2", read_avx2};
  return (struct reader){"sse2", read_sse2};
#else
  return (struct reader){"plain C", read_plain};
#endif
}

static struct multiplier multiplier(void) {
#if X86
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw"))
    return (struct multiplier){"avx512 vpdpbusd", int8_avx512vnni, ACCUMULATORS * 64};
  if (__builtin_cpu_supports("avx512bw"))
    return (struct multiplier){"avx512 vpmaddubsw", int8_avx512, ACCUMULATORS * 64};
  if (__builtin_cpu_supports("avx2"))
    return (struct multiplier){"avx2 vpmaddubsw", int8_avx2, ACCUMULATORS * 32};
#endif
  return (struct multiplier){"plain C", int8_plain, PLAIN_MULTIPLY_ADDS};
}

const char *probe_read_isa(void) { return reader().isa; }
const char *probe_int8_isa(void) { return multiplier().isa; }

/* --- threads ------------------------------------------------------------------------- */

struct job {
  pthread_barrier_t *barrier;
  int cpu, passes;
  double *begin, *end; /* per pass, seconds of the monotonic clock */
  int error;
  volatile uint64_t sum; /* keeps the reads from being left out */
  /* reading */
  const uint8_t *data;
  size_t stream_bytes;
  int streams, repeats;
  /* multiplying */
  long steps;
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void *work(void *argument) {
  struct job *job = argument;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((size_t)job->cpu, &set);
  job->error = pthread_setaffinity_np(pthread_self(), sizeof set, &set);
  for (int pass = 0; pass < job->passes; pass++) {
    pthread_barrier_wait(job->barrier);
    job->begin[pass] = now();
    if (job->data)
      for (int i = 0; i < job->repeats; i++)
        job->sum += reader().run(job->data, job->stream_bytes, job->streams);
    else
      multiplier().run(job->steps);
    job->end[pass] = now();
  }
  return NULL;
}

/* Runs the jobs to their end; the shortest pass in *seconds.  0 or an errno. */
static int run(struct job *jobs, int threads, const int *cpus, int passes, double *seconds) {
  pthread_t ids[THREADS_MAX];
  static pthread_barrier_t barrier;
  int error = pthread_barrier_init(&barrier, NULL, (unsigned)threads);
  if (error) return error;
  for (int t = 0; t < threads; t++) {
    jobs[t].barrier = &barrier;
    jobs[t].cpu = cpus[t];
    jobs[t].passes = passes;
    error = pthread_create(&ids[t], NULL, work, &jobs[t]);
    /* Those that run wait at the barrier for ever; the process ends with the error message. */
    if (error) return error;
  }
  for (int t = 0; t < threads; t++) {
    pthread_join(ids[t], NULL);
    if (jobs[t].error) error = jobs[t].error;
  }
  pthread_barrier_destroy(&barrier);
  *seconds = 0;
  for (int pass = 0; pass < passes; pass++) {
    double begin = jobs[0].begin[pass], end = jobs[0].end[pass];
    for (int t = 1; t < threads; t++) {
      if (jobs[t].begin[pass] < begin) begin = jobs[t].begin[pass];
      if (jobs[t].end[pass] > end) end = jobs[t].end[pass];
    }
    if (!pass || end - begin < *seconds) *seconds = end - begin;
  }
  return error;
}

#define PASSES_MAX 64

/* `bytes` are divided over the threads, and each part over the streams; every pass reads all of
 * it `repeats` times.  bytes must be a multiple of threads * streams * STEP_BYTES. */
int probe_read(size_t bytes, int threads, const int *cpus, int streams, int repeats, int passes,
               double *seconds) {
  static double times[2][THREADS_MAX][PASSES_MAX];
  static struct job jobs[THREADS_MAX];
  if (threads < 1 || threads > THREADS_MAX || streams < 1 || streams > STREAMS_MAX ||
      repeats < 1 || passes < 1 || passes > PASSES_MAX || !bytes ||
      bytes % ((size_t)threads * (size_t)streams * STEP_BYTES))
    return EINVAL;
  size_t mapped = (bytes + 2 * HUGE_PAGE) / HUGE_PAGE * HUGE_PAGE;
  uint8_t *map =
      mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return errno;
  uint8_t *data = (uint8_t *)(((uintptr_t)map + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
  madvise(data, mapped - HUGE_PAGE, MADV_HUGEPAGE);
  memset(data, 1, bytes);
  for (int t = 0; t < threads; t++) {
    size_t part = bytes / (size_t)threads;
    jobs[t] = (struct job){.begin = times[0][t],
                           .end = times[1][t],
                           .data = data + (size_t)t * part,
                           .stream_bytes = part / (size_t)streams,
                           .streams = streams,
                           .repeats = repeats};
  }
  int error = run(jobs, threads, cpus, passes, seconds);
  munmap(map, mapped);
  return error;
}

/* Each thread does `steps` steps a pass; *multiply_adds are those of all threads in a pass. */
int probe_int8(int threads, const int *cpus, long steps, int passes, double *seconds,
               double *multiply_adds) {
  static double times[2][THREADS_MAX][PASSES_MAX];
  static struct job jobs[THREADS_MAX];
  if (threads < 1 || threads > THREADS_MAX || steps < 1 || passes < 1 || passes > PASSES_MAX)
    return EINVAL;
  for (int t = 0; t < threads; t++)
    jobs[t] = (struct job){.begin = times[0][t], .end = times[1][t], .steps = steps};
  *multiply_adds = (double)threads * (double)steps * multiplier().multiply_adds_per_step;
  return run(jobs, threads, cpus, passes, seconds);
}
