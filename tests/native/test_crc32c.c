/* SPDX-License-Identifier: Apache-2.0 */
/* The table-driven CRC32C, which machines with the instruction never run, equals the others, and
 * none of them reads or writes a byte too many. */
#include "native_test.h"
#include "spk_kernels.h"

/* A second copy of the file under other names, to reach its static functions. */
#define spk_crc32c again_crc32c
#define spk_copy_crc32c again_copy_crc32c
#include "../../spanker/kernels/csrc/crc32c.c"
#undef spk_crc32c
#undef spk_copy_crc32c

int main(void)
{
    struct rng r = {.state = 3};
    CHECK_EQUAL(spk_crc32c(0, "123456789", 9), 0xe3069283);
    CHECK_EQUAL(~crc_plain(~0u, (const uint8_t *)"123456789", 9), 0xe3069283);
    for (size_t n = 0; n < 70; n++) {
        uint8_t *data = exact(n);
        uint32_t start = (uint32_t)rng_next(&r);
        for (size_t i = 0; i < n; i++)
            data[i] = (uint8_t)rng_next(&r);
        CASE("%zu bytes from %#x", n, start);
        CHECK_EQUAL(spk_crc32c(start, data, n), ~crc_plain(~start, data, n));
        free(data);
    }
    static const size_t lengths[] = {255, 256, 257, 511, 512, 1535, 1536, 1537, 4607, 4608, 9000};
    for (size_t l = 0; l < 70 + sizeof lengths / sizeof *lengths; l++) {
        size_t n = l < 70 ? l : lengths[l - 70];
        uint8_t *data = exact(n), *to = exact(n);
        uint32_t start = (uint32_t)rng_next(&r), want;
        for (size_t i = 0; i < n; i++)
            data[i] = (uint8_t)rng_next(&r);
        CASE("%zu bytes from %#x, copied too", n, start);
        want = ~crc_plain(~start, data, n);
        CHECK_EQUAL(spk_crc32c(start, data, n), want);
        CHECK_EQUAL(spk_copy_crc32c(start, to, data, n), want);
        CHECK(n == 0 || memcmp(to, data, n) == 0);
#if defined(__x86_64__)
        /* Both forms, whichever of them this machine takes. */
        if (has_hardware()) {
            CHECK_EQUAL(~crc_hardware(~start, data, n), want);
            CHECK_EQUAL(~copy_hardware(~start, to, data, n), want);
        }
        if (has_wide() && n >= WIDE_BYTES) {
            CHECK_EQUAL(~crc_wide(~start, data, n), want);
            CHECK_EQUAL(~copy_wide(~start, to, data, n), want);
        }
#endif
        CHECK(n == 0 || memcmp(to, data, n) == 0);
        free(data), free(to);
    }
    puts("ok crc32c");
    return 0;
}
