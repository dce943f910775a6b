# SPDX-License-Identifier: Apache-2.0
"""Instructions and cycles of a token on a RISC-V card: plain code beside vectors beside Xpop.

    python bench/instructions.py [--models smollm2,FILE.gguf] [--isas scalar,rvv,xpop] [--json FILE]

The firmware runs the model in QEMU, and what it executes is counted (bench/counting.py): a
generation of two tokens less one of one token is a decoded token, a prompt less one of a token is
prefill.  Counts are exact; cycles and seconds follow from them by assumptions about the first
board, which counting.py and docs/performance.md state.  No clock is read.

The rates are those of `sched.bandwidth.Profile`: work of docs/api/timing-model.md by cycles.
`tests/riscv/test_instruction_counts.py` counts SmolLM2 again and compares.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import attrs
import report
import trio
from counting import VLEN, Counter, CountError, Counts

from spanker.device.riscv.emulator import firmware_path
from spanker.device.riscv.spec import ISAS, RiscvCardSpec
from spanker.errors import SpankerError
from spanker.fleet import open_fleet
from spanker.ggml import catalog
from spanker.ggml.architectures.llama import read_model
from spanker.ggml.gguf import GGUFFile
from spanker.sched.bandwidth import REV_A
from spanker.sched.cost import commands as cost_commands
from spanker.sched.cost.machine import Machine
from spanker.sched.cost.phases import phases, stage_pieces
from spanker.sched.cost.rows import StepRows
from spanker.sched.limits import CANDIDATES
from spanker.sched.plan import ModelShape
from spanker.sched.planner import make_plan
from spanker.sched.topology import Topology

RESULTS = report.RESULTS / "instructions.json"
CYCLES_PER_S = 100e6
DDR_BYTES_PER_CYCLE = REV_A.local_ddr_bytes_per_s / CYCLES_PER_S
DDR_BYTES = 2 << 30
#: Token ids that every vocabulary has.
FIRST_ID = 5
# In the emulator a step of a large model takes minutes.
PATIENCE_S = 3600.0

# --- functions ----------------------------------------------------------------------------

GROUPS = ("int8", "float", "elements", "commands")
_RATES = {
    cost_commands.INT8: "int8",
    cost_commands.FLOAT: "float",
    cost_commands.ELEMENTS: "elements",
}
#: Which of the profile's rates a function works for, the first pattern that matches.  The rest is
#: the process around the card, the emulation of Xpop, and waiting, which differs from run to run:
#: it is not counted.  Nor are memcpy and memset, since the process copies more than its card.
_FUNCTIONS = (
    (r"matmul_\w+_q8__\w+", "int8"),
    (r"(matmul_\w+__\w+|attention__\w+|softmax_numerators)", "float"),
    (
        r"\w+__(scalar|rvv|xpop)|spk_dequantize_packed_row|spk_packed_bytes|spk_row_bytes",
        "elements",
    ),
    (r"\w+_slice|step_check|step_bind|spk_\w+_bytes", "commands"),
)


def group_of(function: str) -> str | None:
    """The group a function of the firmware is counted in; None for one that is not the card's."""
    for pattern, group in _FUNCTIONS:
        if re.fullmatch(pattern, function):
            return group
    return None


def by_group(functions: Mapping[str, Counts]) -> dict[str, Counts]:
    """Counts of what the card does, by group."""
    parts: dict[str, list[Counts]] = {group: [] for group in GROUPS}
    for function, counts in functions.items():
        if group := group_of(function):
            parts[group].append(counts)
    return {group: Counts.total(counts) for group, counts in parts.items()}


# --- runs ---------------------------------------------------------------------------------


def generate(
    counter: Counter, isa: str, model: Path, prompt: int, tokens: int
) -> dict[str, Counts]:
    """What a RISC-V card executes, by group, on which a model is loaded and generates `tokens`
    tokens greedily after a prompt of `prompt` tokens; with none of them it is only loaded."""

    async def main() -> None:
        spec = RiscvCardSpec(isa, counter.vlen, DDR_BYTES)
        async with open_fleet([spec], hang_timeout_s=PATIENCE_S) as fleet:
            loaded = await fleet.load(model)
            if tokens:
                ids = [FIRST_ID + i for i in range(prompt)]
                async for _ in loaded.generate(ids, max_tokens=tokens):
                    pass

    with mock.patch.dict(os.environ, counter.environment):
        trio.run(main)
    return by_group(counter.counts())


@attrs.frozen
class Part:
    """What one group of commands takes: instructions and cycles as counted, and what the timing
    model says of the same commands: their work, the cycles of their bytes in DDR, how many."""

    scalar: int
    vector: int
    xpop: int
    cycles: int
    work: int
    ddr_cycles: int

    @property
    def bound_cycles(self) -> int:
        """Computing and reading overlap within a command: the longer of both counts."""
        return max(self.cycles, self.ddr_cycles)

    @property
    def rate(self) -> float:
        """Work a second at the first board's clock."""
        return self.work / self.cycles * CYCLES_PER_S if self.cycles else 0.0


@attrs.frozen
class Measured:
    """A step on one card: a token decoded at `position`, or a prompt of `prompt` tokens."""

    model: str
    isa: str
    position: int
    prompt: int
    commands: int
    parts: dict[str, Part]

    @property
    def cycles(self) -> int:
        return sum(part.bound_cycles for part in self.parts.values())

    @property
    def bound(self) -> str:
        """What most cycles are spent on."""
        name, part = max(self.parts.items(), key=lambda item: item[1].bound_cycles)
        return "DDR" if part.ddr_cycles >= part.cycles else f"{name}: arithmetic"


def measure(counter: Counter, isa: str, model: Path, prompt: int) -> tuple[Measured, Measured]:
    """A prompt of `prompt` tokens, and the token decoded behind it and the first answer."""
    loaded = generate(counter, isa, model, 0, 0)
    one = generate(counter, isa, model, prompt, 1)
    two = generate(counter, isa, model, prompt, 2)
    shape = read_model(GGUFFile(model)).shape

    def step(rows: StepRows, more: Mapping[str, Counts], less: Mapping[str, Counts]) -> Measured:
        work, nbytes, commands = modelled(shape, rows)
        work["commands"] = commands
        parts = {}
        for group in GROUPS:
            c = more[group].less(less[group])
            ddr_cycles = round(nbytes.get(group, 0) / DDR_BYTES_PER_CYCLE)
            parts[group] = Part(
                c.scalar, c.vector, c.xpop, c.cycles, round(work[group]), ddr_cycles
            )
        at, of = (prompt + 1, 0) if more is two else (0, prompt)
        return Measured(model.stem, isa, at, of, commands, parts)

    return (
        step(StepRows.prefill(0, prompt, 1), one, loaded),
        step(StepRows.decode(1, prompt + 1), two, one),
    )


def modelled(shape: ModelShape, rows: StepRows) -> tuple[dict[str, float], dict[str, float], int]:
    """What the timing model says of a step on one card: work and bytes by group, and commands."""
    topology = Topology.with_mock(1)
    plan = make_plan("tp1", shape, 1).replicas[0]
    pieces = stage_pieces(shape, plan, Machine(REV_A, topology), rows)[0]
    work = dict.fromkeys(GROUPS[:3], 0.0)
    nbytes = dict.fromkeys(GROUPS[:3], 0.0)
    commands = 0
    for phase in phases(pieces, plan, 0, min(CANDIDATES, shape.vocabulary)):
        for amount, of_work, rate in phase.runs[0]:
            group = _RATES[rate]
            work[group] += of_work * phase.count
            nbytes[group] += amount * phase.count
            commands += phase.count
    return work, nbytes, commands


# --- tables and records ----------------------------------------------------------------------


def compiler() -> str:
    """The compiler that counts depend on, as the firmware's build finds it."""
    done = subprocess.run(["clang-19", "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def as_record(measured: Sequence[Measured]) -> dict[str, object]:
    return {
        "date": report.now_utc(),
        "versions": report.versions(),
        "compiler": compiler(),
        "vlen": VLEN,
        "cycles_per_s": CYCLES_PER_S,
        "ddr_bytes_per_cycle": DDR_BYTES_PER_CYCLE,
        "measured": [
            {
                **attrs.asdict(m),
                "cycles": m.cycles,
                "seconds": m.cycles / CYCLES_PER_S,
                "bound": m.bound,
                "rates": {group: part.rate for group, part in m.parts.items()},
            }
            for m in measured
        ],
    }


def show(measured: Sequence[Measured]) -> None:
    """Tables for people, as docs/performance.md has them."""
    print("| step | kernels | scalar | vector | Xpop | DDR | cycles | tokens/s | bound by |")
    print("|---|---|---|---|---|---|---|---|---|")
    for m in measured:
        total = {
            key: sum(getattr(part, key) for part in m.parts.values())
            for key in ("scalar", "vector", "xpop", "ddr_cycles")
        }
        what = f"prompt of {m.prompt}" if m.prompt else f"token {m.position}"
        rate = (m.prompt or 1) * CYCLES_PER_S / m.cycles
        counts = " | ".join(f"{n:,}" for n in total.values())
        print(f"| {m.model}, {what} | {m.isa} | {counts} | {m.cycles:,} | {rate:.3g} | {m.bound} |")
    print()
    print("| step | kernels | int8 madds/s | float madds/s | elements/s | cycles a command |")
    print("|---|---|---|---|---|---|")
    for m in measured:
        what = f"prompt of {m.prompt}" if m.prompt else f"token {m.position}"
        int8, floats, elements = (m.parts[group].rate / 1e6 for group in GROUPS[:3])
        each = m.parts["commands"].cycles / m.commands
        print(
            f"| {m.model}, {what} | {m.isa} | {int8:,.0f} M | {floats:,.1f} M | {elements:,.1f} M "
            f"| {each:,.0f} |"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="smollm2", help="names or GGUFs, by comma")
    parser.add_argument("--isas", default=",".join(ISAS), help="of the kernels, by comma")
    parser.add_argument("--prompt", type=int, default=8, help="tokens")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args(argv)
    measured: list[Measured] = []
    try:
        with Counter(firmware_path()) as counter:
            for name in options.models.split(","):
                model = Path(name) if name.endswith(".gguf") else catalog.pull(name)
                for isa in options.isas.split(","):
                    measured += measure(counter, isa, model, options.prompt)
                    print(f"{model.stem}, {isa}: counted", file=sys.stderr, flush=True)
    except (CountError, SpankerError) as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 1
    show(measured)
    if options.json:
        options.json.write_text(json.dumps(as_record(measured), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
