/* SPDX-License-Identifier: Apache-2.0 */
/* The AVX-512 kernels, emulated, equal the plain ones.  Built by tools/check_avx512.sh. */
#include "../kernel_compare.h"

int main(void)
{
    compare_kernels(&spk_kernels__avx512vnni);
    puts("ok avx512 (emulated)");
    return 0;
}
