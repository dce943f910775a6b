/* SPDX-License-Identifier: Apache-2.0 */
#define SPK_TABLE xpop
#define SPK_TABLE_REST rvv
#define SPK_TABLE_ISA SPK_ISA_XPOP
#include "../table.inc.h"
