/* SPDX-License-Identifier: Apache-2.0 */
/* The table-driven CRC32C, which machines with the instruction never run, equals the other. */
#include "native_test.h"
#include "spk_kernels.h"

/* A second copy of the file under other names, to reach its static functions. */
#define spk_crc32c again_crc32c
#include "../../spanker/kernels/csrc/crc32c.c"
#undef spk_crc32c

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
    puts("ok crc32c");
    return 0;
}
