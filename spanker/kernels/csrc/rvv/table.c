/* SPDX-License-Identifier: Apache-2.0 */
#define SPK_TABLE rvv
#define SPK_TABLE_ISA SPK_ISA_RVV
#include "../table.inc.h"
