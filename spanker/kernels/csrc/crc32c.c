/* SPDX-License-Identifier: Apache-2.0 */
/* CRC32C (Castagnoli, RFC 3720 appendix B.4), with the x86 instruction where there is one. */
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

#if defined(__x86_64__)
#include <nmmintrin.h>

__attribute__((target("sse4.2"))) static uint32_t crc_sse42(uint32_t crc, const uint8_t *p,
                                                            size_t n)
{
    uint64_t c = crc, word;
    for (; n >= 8; n -= 8, p += 8) {
        memcpy(&word, p, 8);
        c = _mm_crc32_u64(c, word);
    }
    for (; n; n--, p++)
        c = _mm_crc32_u8((uint32_t)c, *p);
    return (uint32_t)c;
}
#endif

uint32_t spk_crc32c(uint32_t crc, const void *data, size_t nbytes)
{
    crc = ~crc;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return ~crc_sse42(crc, data, nbytes);
#endif
    return ~crc_plain(crc, data, nbytes);
}
