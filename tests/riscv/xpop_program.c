/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What becomes of a program that uses Xpop_matmul by the emulation alone, without handlers of its own.
 * The argument says what it does; test_xpop_programs.py says how it must end.
 */
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xpop/spk_xpop.h"
#include "xpop_trap.h"

#define RUNS 200

static int8_t tile[512] __attribute__((aligned(16)));
static uint8_t activations[2][48] __attribute__((aligned(16)));

/* Two tokens against bytes, over and over: 0 where every result is right. */
static void *multiply(void *unused)
{
    int32_t results[2][16] __attribute__((aligned(256)));
    (void)unused;
    for (int run = 0; run < RUNS; run++) {
        memset(results, 0xa5, sizeof results);
        SPK_POP_DOT(SPK_POP_S8, 2, results, tile, activations);
        for (int t = 0; t < 2; t++)
            for (int r = 0; r < 16; r++) {
                int32_t sum = 0;
                for (int k = 0; k < 32; k++)
                    sum += tile[64 * (k / 4) + 4 * r + k % 4] * (int8_t)activations[t][k];
                if (results[t][r] != sum)
                    return (void *)1;
            }
    }
    return NULL;
}

static int threads(void)
{
    pthread_t thread[3];
    void *wrong = NULL;
    for (int i = 0; i < 3; i++)
        if (pthread_create(&thread[i], NULL, multiply, NULL))
            return 1;
    int failed = multiply(NULL) != NULL;
    for (int i = 0; i < 3; i++) {
        pthread_join(thread[i], &wrong);
        failed |= wrong != NULL;
    }
    return failed;
}

int main(int count, char **arguments)
{
    const char *what = count > 1 ? arguments[1] : "";
    float results[16] __attribute__((aligned(256))) = {0};
    for (int i = 0; i < 512; i++)
        tile[i] = (int8_t)(i * 37 + 11);
    for (int i = 0; i < 64; i++)
        activations[i / 32][i % 32] = (uint8_t)(i * 91 + 5);
    if (strcmp(what, "without") != 0 && (spk_xpop_install_trap() || spk_xpop_install_trap()))
        return 1;
    if (strcmp(what, "ignored") == 0)
        signal(SIGBUS, SIG_IGN);
    if (strcmp(what, "threads") == 0 || strcmp(what, "without") == 0)
        return threads();
    if (strcmp(what, "reserved") == 0)
        SPK_POP_STEP(SPK_POP_Q4_K, 2, 1, results, tile, activations);
    if (strcmp(what, "other") == 0)
        __asm__ volatile(".insn r CUSTOM_1, 0, 0, a0, a0, a0" : : : "memory");
    if (strcmp(what, "short") == 0)
        __asm__ volatile(".2byte 0" : : : "memory"); /* the defined illegal instruction */
    if (strcmp(what, "misaligned") == 0 || strcmp(what, "ignored") == 0)
        SPK_POP_STEP(SPK_POP_Q4_0, 1, 1, results, tile + 8, activations);
    if (strcmp(what, "null") == 0)
        __asm__ volatile(".insn r CUSTOM_0, 0, 0, zero, zero, zero" : : : "memory");
    return 1; /* nothing above returns */
}
