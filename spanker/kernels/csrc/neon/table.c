/* SPDX-License-Identifier: Apache-2.0 */
#define SPK_TABLE neon
#define SPK_TABLE_ISA SPK_ISA_NEON
#include "../table.inc.h"
