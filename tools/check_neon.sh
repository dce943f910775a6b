#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds all C files for aarch64 as the real build does, without a warning and without a fused
# multiply-add, and runs them in QEMU: the NEON kernels equal the plain ones, bit for bit, both equal
# the plain ones of this machine, and the card's own tests pass.  An aarch64 machine needs none of
# this: its `make test` and the rest of `make check` run these kernels natively.
# Debian and Ubuntu: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
set -euo pipefail
cd "$(dirname "$0")/.."

CC=${CC:-gcc}
PYTHON=${PYTHON:-python3}
CROSS=aarch64-linux-gnu-gcc
OUT=build/check/cross
FLAGS=(
  -std=gnu11 -O2 -fno-fast-math -ffp-contract=off -pthread -Wall -Wextra -Werror
  -Ispanker/kernels/csrc -Ispanker/device/csrc -Ispanker/ggml/csrc -Idriver/include
)

if [ "$(uname -m)" = aarch64 ]; then
  echo "check-neon: this machine is aarch64 itself: nothing to emulate"
  exit 0
fi
missing=()
command -v $CROSS >/dev/null || missing+=(gcc-aarch64-linux-gnu)
QEMU=$(command -v qemu-aarch64 || command -v qemu-aarch64-static) || missing+=(qemu-user)
if command -v $CROSS >/dev/null && ! echo '#include <stdlib.h>' | $CROSS -E -x c - >/dev/null 2>&1
then
  missing+=(libc6-dev-arm64-cross)
fi
if [ ${#missing[@]} -ne 0 ]; then
  echo "check-neon: not checked, as these are not installed: ${missing[*]}"
  exit 0
fi

# The plain kernels of this machine, by its own compiler, are what the digest is held to.
"$PYTHON" tools/check_native.py warnings --cc "$CC"
"$PYTHON" tools/check_native.py warnings --cc $CROSS --machine aarch64
"$PYTHON" tools/lint_fma.py build/check/$CROSS

mkdir -p "$OUT"
program() { # name, source, directory of the objects, compiler and flags
  local objects=()
  for source in spanker/{kernels,device,ggml}/csrc/*.c spanker/kernels/csrc/*/*.c; do
    [ ! -e "$3/${source%.c}.o" ] || objects+=("$3/${source%.c}.o")
  done
  "${@:4}" "${FLAGS[@]}" "$2" "${objects[@]}" -lm -o "$OUT/$1"
}
# $CC may be a command with arguments.
# shellcheck disable=SC2086
program native tests/native/cross/neon.c "build/check/$(basename "${CC%% *}")" $CC &
jobs=($!)
for source in tests/native/cross/neon.c tests/native/test_{c,f,threads_,v}*.c; do
  program "$(basename "$source" .c)" "$source" build/check/$CROSS $CROSS -static &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done

expected=$("$OUT/native")
got=$("$QEMU" -cpu max "$OUT/neon")
if [ "$got" != "$expected" ]; then
  echo "check-neon: the results have digest $got on aarch64, $expected on $(uname -m)" >&2
  exit 1
fi
echo "check-neon: NEON and plain C on aarch64 equal plain C on $(uname -m): digest $got"
# The Cortex-A53 lacks the dot products.
for machine in "max:scalar neon" "cortex-a53:scalar"; do
  isas=$("$QEMU" -cpu "${machine%%:*}" "$OUT/neon" isas | paste -sd ' ')
  if [ "$isas" != "${machine#*:}" ]; then
    echo "check-neon: ${machine%%:*} runs $isas, expected ${machine#*:}" >&2
    exit 1
  fi
done
for source in tests/native/test_{c,f,threads_,v}*.c; do
  "$QEMU" -cpu max "$OUT/$(basename "$source" .c)"
done
