/* SPDX-License-Identifier: Apache-2.0 */
#define SPK_TABLE avx512vnni
#define SPK_TABLE_ISA SPK_ISA_AVX512VNNI
#include "../table.inc.h"
