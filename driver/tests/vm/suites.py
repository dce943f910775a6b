# SPDX-License-Identifier: Apache-2.0
"""What runs in the machines: the C programs of driver/tests, the conformance suite, a model.

Each suite is one boot with cards of its own.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import debug_kernel
import disk
import kernels
import qemu
import spanker_in_guest
from host import DRIVER, ROOT, WORK, Failure, remove, run, say
from qemu import MIB, Guest, boot, file_entry

PROGRAMS = WORK / "bin"
TESTS = DRIVER / "tests"
COMPILE = ["gcc", "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
COMPAT = {"abi"}  # also built for 32 bit
COMPILE += [f"-I{DRIVER}/include", f"-I{DRIVER}/include/uapi"]

FUZZ_SEED = 20260101
FUZZ_COUNT = 10_000
DEBUG_FACTOR = 8  # the debug kernel under emulation against an ordinary one

PROMPT = "The capital of France is"
CARDS = 2
CONFORMANCE_CARDS = 5  # the most that a test of the suite takes


# --- programs -------------------------------------------------------------------------------------


def build_programs() -> None:
    """The card server, and each driver/tests/*.c as a static program."""
    run(["make", "--no-print-directory", "build/spanker-card-server"], cwd=ROOT)
    if not qemu.SERVER.exists():
        raise Failure(f"make build/spanker-card-server made no {qemu.SERVER}")
    remove(PROGRAMS)
    PROGRAMS.mkdir(parents=True)
    sources = sorted(TESTS.glob("*.c"))
    for source in sources:
        run([*COMPILE, source, "-o", PROGRAMS / source.stem])
        if source.stem in COMPAT:
            run([*COMPILE, *_compat(), source, "-o", PROGRAMS / f"{source.stem}32"])
    say(f"{qemu.SERVER.name}, {', '.join(path.name for path in sorted(PROGRAMS.iterdir()))}")


def _compat() -> list[str]:
    """What 32-bit programs add; the kernel's headers for them are those of this machine."""
    return ["-m32", f"-I/usr/include/{run(['gcc', '-print-multiarch']).strip()}"]


def check_layout() -> None:
    """No hole or padding that the interface does not name, by the debugging information."""
    source = WORK / "layout.c"
    headers = ["spanker_card.h", "uapi/spanker_ioctl.h"]
    names = [
        name
        for header in headers
        for name in re.findall(
            r"^struct (\w+) \{", (DRIVER / "include" / header).read_text(), re.MULTILINE
        )
    ]
    text = [f'#include "{header}"' for header in headers]
    text += [f"struct {name} the_{name};" for name in names]
    source.write_text("\n".join(text) + "\n")
    found = {}
    for width, options in (("-m64", []), ("-m32", _compat())):
        compiled = source.with_name(f"layout{width}.o")
        command = ["gcc", "-g", "-c", f"-I{DRIVER}/include", *options]
        run([*command, source, "-o", compiled])
        shown = run(["pahole", compiled])
        found[width] = sizes = dict(
            re.findall(r"struct (\w+) \{.*?/\* size: (\d+)", shown, re.DOTALL)
        )
        bad = [line for line in shown.splitlines() if re.search(r"XXX|/\* padding|holes", line)]
        if bad or not set(names) <= set(sizes):
            raise Failure(f"{width}: holes or missing structures:\n{shown}")
    differ = [name for name in names if found["-m64"][name] != found["-m32"][name]]
    if differ:
        raise Failure(f"not the same size for 32-bit programs: {', '.join(differ)}")
    say(f"{len(names)} structures without holes, the same for 64- and 32-bit programs")


def _programs() -> dict[str, tuple[int, bytes, float]]:
    return {f"bin/{path.name}": file_entry(path) for path in sorted(PROGRAMS.iterdir())}


def _module(path: Path) -> dict[str, tuple[int, bytes, float]]:
    return {"spanker.ko": file_entry(path, 0o644)}


@functools.cache
def _kernel(line: str) -> kernels.Kernel:
    return kernels.kernel(line)


def _built(line: str) -> Path:
    target = WORK / f"module-{_kernel(line).release}"
    if target.exists():
        built = kernels.module_in(target)
        if not kernels.has_changed_since(built.stat().st_mtime):
            return built
    return kernels.build_module(_kernel(line))


# --- the interface, in C --------------------------------------------------------------------------


ONE_CARD = f"""
step load insmod /spanker.ko
step abi abi 1
step "abi, 32 bit" abi32 1
step fuzz fuzz {FUZZ_SEED} {FUZZ_COUNT} 1
step "abi after the fuzzer" abi 1
step "no unload while a file is open" sh -c "rmmod spanker 3<>/dev/spanker0 2>&1 | grep unavailable"
step unload rmmod spanker
step "load again" insmod /spanker.ko
step faults faults 1 qemu
step unload rmmod spanker
"""
# The last test of `faults` takes the first card off the bus's answers for good.
TWO_CARDS = f"""
step load insmod /spanker.ko
step abi abi 2
step "abi, 32 bit" abi32 2
step fuzz fuzz {FUZZ_SEED + 1} {FUZZ_COUNT // 10} 2
step faults faults 2 qemu
step unload rmmod spanker
"""


def one_card() -> None:
    _boot_c("one-card", kernels.OWN, ONE_CARD, cards=1)


def two_cards() -> None:
    _boot_c("two-cards", kernels.OWN, TWO_CARDS, cards=2)


def other_kernels() -> None:
    for line in kernels.TREES:
        _boot_c(f"two-cards-{line}", line, TWO_CARDS, cards=2)


def _boot_c(name: str, line: str, script: str, *, cards: int) -> None:
    kernel = _kernel(line)
    files = {**_programs(), **_module(_built(line))}
    boot(Guest(name, kernel.image, script, cards=cards, files=files))


# --- Python ---------------------------------------------------------------------------------------


def _boot_python(
    name: str, script: str, *, cards: int, ddr_bytes: int, timeout_s: float
) -> list[str]:
    kernel = _kernel(kernels.OWN)
    begin = spanker_in_guest.environment(disk.facts()["executable"])
    return boot(
        Guest(
            name,
            kernel.image,
            begin + script,
            cards=cards,
            ddr_bytes=ddr_bytes,
            memory_bytes=2048 * MIB,
            timeout_s=timeout_s,
            disk=disk.disk(),
            modules=kernels.with_dependencies(kernel, "virtio_pci", "virtio_blk"),
            files={**_module(_built(kernels.OWN)), **spanker_in_guest.files()},
        )
    )


def conformance() -> None:
    script = f"""
step load insmod /spanker.ko
cd /src
export SPANKER_TEST_KERNEL_CARDS={CONFORMANCE_CARDS}
step conformance python -m pytest -q -p spanker.testing.plugin -p no:cacheprovider \
  --color=no tests/device/test_conformance*.py
step "cards come back" python -m pytest -v -p spanker.testing.plugin -p no:cacheprovider \
  --color=no tests/device/test_kernel_returns.py
step unload rmmod spanker
"""
    _boot_python("conformance", script, cards=CONFORMANCE_CARDS, ddr_bytes=64 * MIB, timeout_s=1200)


def model() -> None:
    """The same prompt here on emulated cards and there through the module."""
    arguments = (
        f'run "{PROMPT}" --max-tokens 8 --temperature 0 --logits-hash --json --model smollm2'
    )
    script = f"""
step load insmod /spanker.ko
step info python -m spanker info
model() {{
  python -m spanker {arguments} --cards kernel:{CARDS} >/tmp/out 2>/tmp/err || {{
    tail -c 4000 /tmp/err
    return 1
  }}
  echo "REPORT $(cat /tmp/out)"
}}
step model model
step unload rmmod spanker
"""
    here = _report_here()
    lines = _boot_python("model", script, cards=CARDS, ddr_bytes=512 * MIB, timeout_s=800)
    reports = [line.removeprefix("REPORT ") for line in lines if line.startswith("REPORT ")]
    there = json.loads(reports[0])
    for field in ("tokens", "logits_sha256"):
        if here[field] != there[field]:
            raise Failure(
                f"{field} on kernel:{CARDS} in the machine {there[field]}, "
                f"on soft:{CARDS} here {here[field]}: they must be the same"
            )
    say(f"tokens {there['tokens']}, logits {there['logits_sha256']}: the same on both")


def _report_here() -> dict:
    command = [disk.python(), "-m", "spanker", "run", PROMPT, "--model", disk.model()]
    command += ["--max-tokens", "8", "--temperature", "0", "--logits-hash", "--json"]
    output = run([*command, "--cards", f"soft:{CARDS}"], cwd=ROOT, timeout_s=300)
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


# --- under the debug kernel -----------------------------------------------------------------------


# Whatever the kernel itself leaked while it booted is none of ours.
BEFORE = """
echo clear >/sys/kernel/debug/kmemleak
"""
# An object counts once it is some seconds old and two scans have not found it.
AFTER = """
leaks() {
  sleep 6
  for round in 1 2; do
    echo scan >/sys/kernel/debug/kmemleak
    sleep 1
  done
  cat /sys/kernel/debug/kmemleak
  ! grep -q unreferenced /sys/kernel/debug/kmemleak
}
step "no leaks" leaks
"""


def debug_one_card() -> None:
    _boot_debug("debug-one-card", ONE_CARD, cards=1)


def debug_two_cards() -> None:
    _boot_debug("debug-two-cards", TWO_CARDS, cards=2)


def debug_failures() -> None:
    """Each allocation of each call, and of a card's probe, fails once; then all works as before."""
    # Where the kernel could not make /proc/irq/N, it warns when it removes it.
    script = """
expected='fs/proc/generic.c:.* remove_proc_entry'
for kind in failslab fail_page_alloc; do
  echo 0 >/sys/kernel/debug/$kind/verbose
  echo N >/sys/kernel/debug/$kind/ignore-gfp-wait
done
echo N >/sys/kernel/debug/fail_page_alloc/ignore-gfp-highmem
echo 0 >/sys/kernel/debug/fail_page_alloc/min-order
step load insmod /spanker.ko
step "allocations of the calls fail" failures 2
for card in /sys/bus/pci/drivers/spanker/0000:*; do
  step "allocations of the probe fail" failures probe ${card##*/}
done
step "abi afterwards" abi 2
step unload rmmod spanker
"""
    _boot_debug("debug-failures", script, cards=2)


def _boot_debug(name: str, script: str, *, cards: int) -> None:
    files = {**_programs(), **_module(debug_kernel.build_module())}
    boot(
        Guest(
            name,
            debug_kernel.image(),
            BEFORE + script + AFTER,
            cards=cards,
            memory_bytes=1024 * MIB,
            timeout_s=180 * DEBUG_FACTOR,
            files=files,
        )
    )
