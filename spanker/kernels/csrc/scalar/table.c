/* SPDX-License-Identifier: Apache-2.0 */
#define SPK_TABLE scalar
#define SPK_TABLE_ISA SPK_ISA_SCALAR
#include "../table.inc.h"
