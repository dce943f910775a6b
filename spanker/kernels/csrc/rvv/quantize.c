/* SPDX-License-Identifier: Apache-2.0 */
#include "lanes.h"
#define SPK_ISA rvv
#include "../lanes/quantize.inc.h"
