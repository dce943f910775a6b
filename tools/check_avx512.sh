#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the AVX-512 kernels, emulated in plain C by SIMDe, against the plain kernels, bit for bit and
# under the sanitizers: any machine can check them.  Debian and Ubuntu: apt-get install libsimde-dev.
set -euo pipefail
cd "$(dirname "$0")/.."

CC=${CC:-gcc}
OUT=build/check/emulated
FLAGS=(
  -std=gnu11 -O1 -g -fno-fast-math -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror
  -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -Ispanker/kernels/csrc
)

if ! echo '#include <simde/simde-common.h>' | $CC -E -x c - >/dev/null 2>&1; then
  echo "check-avx512: SIMDe is not installed (libsimde-dev): not checked"
  exit 0
fi

mkdir -p "$OUT"
jobs=()
compile() { # object, source, flags
  $CC "${FLAGS[@]}" "${@:3}" -c "$2" -o "$OUT/$1" &
  jobs+=($!)
}
for source in spanker/kernels/csrc/avx512vnni/*.c; do
  # The directory's immintrin.h stands in for the compiler's; SIMDe's vectors have no ABI to keep.
  compile "avx512_$(basename "$source" .c).o" "$source" -Itests/native/emulated -Wno-psabi
done
for source in spanker/kernels/csrc/scalar/*.c; do
  compile "scalar_$(basename "$source" .c).o" "$source"
done
# Without the build's macros, dispatch.c knows the plain kernels only.
for name in pack dispatch; do
  compile $name.o spanker/kernels/csrc/$name.c
done
compile test.o tests/native/emulated/avx512.c
for job in "${jobs[@]}"; do wait "$job"; done
$CC "${FLAGS[@]}" "$OUT"/*.o -lm -o "$OUT/avx512"
"$OUT/avx512"
