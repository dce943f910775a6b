/* SPDX-License-Identifier: Apache-2.0 */
#define SPK_TABLE avx2
#define SPK_TABLE_ISA SPK_ISA_AVX2
#include "../table.inc.h"
