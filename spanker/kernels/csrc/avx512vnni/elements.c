/* SPDX-License-Identifier: Apache-2.0 */
#include "lanes.h"
#define SPK_ISA avx512vnni
#include "../lanes/elements.inc.h"
