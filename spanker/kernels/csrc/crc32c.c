/* SPDX-License-Identifier: Apache-2.0 */
/*
 * CRC32C (Castagnoli, RFC 3720 appendix B.4), with the instruction of the machine where there is
 * one, alone or of bytes that are being copied.
 *
 * The x86 instruction takes 8 bytes a cycle but answers after three, so three streams run side by
 * side: 10 GB/s become 26 at 3.7 GHz, and the copy beside them costs next to nothing.
 */
#include <string.h>

#include "spk_kernels.h"

static uint32_t step_bit(uint32_t crc)
{
    return (crc >> 1) ^ (0x82f63b78u & (0u - (crc & 1u)));
}

static uint32_t crc_plain(uint32_t crc, const uint8_t *p, size_t n)
{
    /* Nibble table on the stack: 16 entries, no global state to initialise. */
    uint32_t table[16];
    for (uint32_t i = 0; i < 16; i++)
        table[i] = step_bit(step_bit(step_bit(step_bit(i))));
    for (; n; n--, p++) {
        crc ^= *p;
        crc = (crc >> 4) ^ table[crc & 15];
        crc = (crc >> 4) ^ table[crc & 15];
    }
    return crc;
}

static uint32_t copy_plain(uint32_t crc, uint8_t *to, const uint8_t *p, size_t n)
{
    memcpy(to, p, n);
    return crc_plain(crc, p, n);
}

#if defined(__x86_64__)
#include <immintrin.h>

#define HARDWARE_TARGET __attribute__((target("sse4.2,pclmul,prfchw")))

/* Bytes of one stream; three of them are a round. */
#define STREAM ((size_t)512)
/* x^(8*STREAM - 33) and x^(16*STREAM - 33) modulo the polynomial, bit 31 being x^0: the product
 * with a CRC, which the instruction reduces, is that CRC with so many zeros behind it. */
#define BEHIND_ONE 0xdd7e3b0c
#define BEHIND_TWO 0x170076fa

/* The factors that move 128 bits so many bits ahead: of their first half, of their second. */
#define AHEAD_2048 0xdcb17aa4, 0xb9e02b86
#define AHEAD_512 0x740eef02, 0x9e4addf8

static int has_hardware(void)
{
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

static int has_wide(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
}

static inline uint64_t word_at(const uint8_t *p)
{
    uint64_t word;
    memcpy(&word, p, sizeof word);
    return word;
}

HARDWARE_TARGET static inline uint64_t followed_by_zeros(uint64_t crc, uint32_t factor)
{
    __m128i product =
        _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)crc), _mm_cvtsi32_si128((int)factor), 0);
    return _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

HARDWARE_TARGET static uint32_t crc_tail(uint64_t crc, const uint8_t *p, size_t n)
{
    for (; n >= 8; n -= 8, p += 8)
        crc = _mm_crc32_u64(crc, word_at(p));
    for (; n; n--, p++)
        crc = _mm_crc32_u8((uint32_t)crc, *p);
    return (uint32_t)crc;
}

/* One line of each stream of the next round: memory that another core has touched last comes in
 * time only if it is asked for early.  Beyond the end it is a hint about nothing. */
#define prefetch_round(at, write)                          \
    do {                                                   \
        __builtin_prefetch((at), (write));                 \
        __builtin_prefetch((at) + STREAM, (write));        \
        __builtin_prefetch((at) + 2 * STREAM, (write));    \
    } while (0)

HARDWARE_TARGET static uint32_t crc_hardware(uint32_t crc, const uint8_t *p, size_t n)
{
    uint64_t a = crc;
    for (; n >= 3 * STREAM; n -= 3 * STREAM, p += 3 * STREAM) {
        uint64_t b = 0, c = 0;
        for (size_t j = 0; j < STREAM; j += 64) {
            prefetch_round(p + 3 * STREAM + j, 0);
            for (size_t i = j; i < j + 64; i += 8) {
                a = _mm_crc32_u64(a, word_at(p + i));
                b = _mm_crc32_u64(b, word_at(p + STREAM + i));
                c = _mm_crc32_u64(c, word_at(p + 2 * STREAM + i));
            }
        }
        a = followed_by_zeros(a, BEHIND_TWO) ^ followed_by_zeros(b, BEHIND_ONE) ^ c;
    }
    return crc_tail(a, p, n);
}

HARDWARE_TARGET static inline uint64_t copy_16(uint64_t crc, uint8_t *to, const uint8_t *p)
{
    memcpy(to, p, 16);
    return _mm_crc32_u64(_mm_crc32_u64(crc, word_at(p)), word_at(p + 8));
}

HARDWARE_TARGET static uint32_t copy_hardware(uint32_t crc, uint8_t *to, const uint8_t *p, size_t n)
{
    uint64_t a = crc;
    for (; n >= 3 * STREAM; n -= 3 * STREAM, p += 3 * STREAM, to += 3 * STREAM) {
        uint64_t b = 0, c = 0;
        for (size_t j = 0; j < STREAM; j += 64) {
            prefetch_round(p + 3 * STREAM + j, 0);
            prefetch_round(to + 3 * STREAM + j, 1);
            for (size_t i = j; i < j + 64; i += 16) {
                a = copy_16(a, to + i, p + i);
                b = copy_16(b, to + STREAM + i, p + STREAM + i);
                c = copy_16(c, to + 2 * STREAM + i, p + 2 * STREAM + i);
            }
        }
        a = followed_by_zeros(a, BEHIND_TWO) ^ followed_by_zeros(b, BEHIND_ONE) ^ c;
    }
    memcpy(to, p, n);
    return crc_tail(a, p, n);
}

/* Where carry-less products are 512 bits wide, four registers of the message are kept and moved
 * ahead of themselves: 64 bytes take two products, and memory is all there is to wait for. */
#define WIDE_TARGET __attribute__((target("avx512f,vpclmulqdq,sse4.2,pclmul,prfchw")))
#define WIDE_BYTES ((size_t)256)

WIDE_TARGET static inline __m512i factors(uint32_t first, uint32_t second)
{
    return _mm512_set4_epi64(second, first, second, first);
}

WIDE_TARGET static inline __m512i ahead(__m512i x, __m512i factors, __m512i next)
{
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(x, factors, 0x00),
                                     _mm512_clmulepi64_epi128(x, factors, 0x11), next, 0x96);
}

WIDE_TARGET static inline __m512i take(uint8_t **to, const uint8_t *p)
{
    __m512i x = _mm512_loadu_si512(p);
    if (*to) {
        _mm512_storeu_si512(*to, x);
        *to += 64;
    }
    return x;
}

/* At least WIDE_BYTES; copies them where there is a place for them. */
WIDE_TARGET static inline __attribute__((always_inline)) uint32_t
wide(uint32_t crc, uint8_t *to, const uint8_t *p, size_t n)
{
    const __m512i by_2048 = factors(AHEAD_2048), by_512 = factors(AHEAD_512);
    __m512i a = _mm512_xor_si512(take(&to, p), _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    __m512i b = take(&to, p + 64), c = take(&to, p + 128), d = take(&to, p + 192);
    uint8_t left[64];
    for (n -= WIDE_BYTES, p += WIDE_BYTES; n >= WIDE_BYTES; n -= WIDE_BYTES, p += WIDE_BYTES) {
        for (int i = 0; i < 256; i += 64) {
            __builtin_prefetch(p + 1024 + i, 0);
            if (to)
                __builtin_prefetch(to + 1024 + i, 1);
        }
        a = ahead(a, by_2048, take(&to, p));
        b = ahead(b, by_2048, take(&to, p + 64));
        c = ahead(c, by_2048, take(&to, p + 128));
        d = ahead(d, by_2048, take(&to, p + 192));
    }
    d = ahead(ahead(ahead(a, by_512, b), by_512, c), by_512, d);
    _mm512_storeu_si512(left, d);
    crc = crc_tail(0, left, sizeof left);
    if (to)
        memcpy(to, p, n);
    return crc_tail(crc, p, n);
}

WIDE_TARGET static uint32_t crc_wide(uint32_t crc, const uint8_t *p, size_t n)
{
    return wide(crc, NULL, p, n);
}

WIDE_TARGET static uint32_t copy_wide(uint32_t crc, uint8_t *to, const uint8_t *p, size_t n)
{
    return wide(crc, to, p, n);
}

#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>

#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif

static int has_hardware(void)
{
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
}

__attribute__((target("+crc"))) static uint32_t crc_hardware(uint32_t crc, const uint8_t *p,
                                                             size_t n)
{
    uint64_t word;
    for (; n >= 8; n -= 8, p += 8) {
        memcpy(&word, p, 8);
        crc = __crc32cd(crc, word);
    }
    for (; n; n--, p++)
        crc = __crc32cb(crc, *p);
    return crc;
}

static uint32_t copy_hardware(uint32_t crc, uint8_t *to, const uint8_t *p, size_t n)
{
    memcpy(to, p, n);
    return crc_hardware(crc, p, n);
}

#else
#define has_hardware() 0
#define crc_hardware crc_plain
#define copy_hardware copy_plain
#endif

uint32_t spk_crc32c(uint32_t crc, const void *data, size_t nbytes)
{
#if defined(__x86_64__)
    if (nbytes >= WIDE_BYTES && has_wide())
        return ~crc_wide(~crc, data, nbytes);
#endif
    return ~(has_hardware() ? crc_hardware(~crc, data, nbytes) : crc_plain(~crc, data, nbytes));
}

uint32_t spk_copy_crc32c(uint32_t crc, void *to, const void *data, size_t nbytes)
{
#if defined(__x86_64__)
    if (nbytes >= WIDE_BYTES && has_wide())
        return ~copy_wide(~crc, to, data, nbytes);
#endif
    return ~(has_hardware() ? copy_hardware(~crc, to, data, nbytes)
                            : copy_plain(~crc, to, data, nbytes));
}
