# SPDX-License-Identifier: Apache-2.0
"""Predictions beside a throttled fleet in real time.

    python bench/prediction.py
    python bench/prediction.py --case tinyllama-q4_0:2/tp/4/rev-a --rounds 3 --json out.json

The cost model, the simulator, and soft cards that do the real arithmetic at a modelled machine's
pace: all three by docs/api/timing-model.md.  A case is MODEL:LAYERS/PLAN/CARDS/PROFILE: a model of
bench/make_model.py cut to so many layers, so that this machine is well ahead of the modelled one, a
plan, and a profile by name or file.  Times are the host's wall clock, medians of a few generations.
`behind` is how much later than in the model steps ended, as a part of what they take: a step that
ends too late delays the one after the next, so where it is much the machine was too busy, and the
case counts for nothing.  A prediction is missing where nothing can make it yet.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import make_model
import report
import trio
from engines import made_up_prompt

import spanker
from spanker.device.throttle import Pace
from spanker.errors import SpankerError
from spanker.fleet import Fleet, Model
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.sched import cost, profiles
from spanker.sched.bandwidth import Profile
from spanker.sched.plan import Plan
from spanker.sched.planner import make_plan
from spanker.sched.topology import Topology
from spanker.simulation import Scenario, simulate

MODELS = Path("build/bench")
# The largest difference between a prediction and the throttled fleet that is no failure.
TOLERANCE = 0.10
BEHIND_MAX = 0.2
PROMPT_TOKENS, CHUNK, DECODE_TOKENS = 96, 32, 24
DEFAULT_CASES = (
    "smollm2-q4_1:6/tp/1/rev-a",
    "smollm2-q4_1:6/tp/2/rev-a",
    "smollm2-q4_1:6/tp/4/rev-a",
    "smollm2-q4_1:6/pp/2/rev-a",
    "tinyllama-q4_0:2/tp/2/rev-a",
    "tinyllama-q4_0:2/tp/4/rev-b",
    "tinyllama-q4_0:2/tp2xpp2/4/rev-b",
)


@attrs.frozen
class Case:
    """What is measured and predicted."""

    model: str
    layers: int
    plan: str
    cards: int
    profile: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """MODEL:LAYERS/PLAN/CARDS/PROFILE; a profile may be a path.  ValueError."""
        try:
            shape, plan, cards, profile = text.split("/", 3)
            model, layers = shape.split(":")
            make_model.parse_name(model)
            return cls(model, int(layers), plan, int(cards), profile)
        except ValueError as error:
            raise ValueError(
                f"no case {text!r}: expected MODEL:LAYERS/PLAN/CARDS/PROFILE, such as "
                f"{DEFAULT_CASES[0]} ({error})"
            ) from None

    def __str__(self) -> str:
        return f"{self.model}:{self.layers}/{self.plan}/{self.cards}/{self.profile}"

    def path(self) -> Path:
        """The model's file, written if it is not there."""
        return make_model.ensure_model(self.model, MODELS, layers=self.layers)


@attrs.frozen
class Rates:
    """Tokens per second: of a prompt until the first token is at the host, and of decoding."""

    prefill: float
    decode: float


# --- in real time -----------------------------------------------------------------------


async def throttled(case: Case, rounds: int) -> tuple[Rates, float]:
    """What a throttled fleet does, and how far behind the model it was, of its time."""
    profile = profiles.find(case.profile)
    async with spanker.open_fleet(case.cards, profile=profile, throttle=True) as fleet:
        model = await fleet.load(
            case.path(), plan=case.plan, ctx=256, kv_tokens=256, prompt_chunk=CHUNK
        )
        found = [await _generate(fleet, model) for _ in range(rounds)]
    rates = Rates(
        statistics.median(rates.prefill for rates, _ in found),
        statistics.median(rates.decode for rates, _ in found),
    )
    return rates, statistics.median(behind for _, behind in found)


async def _generate(fleet: Fleet, model: Model) -> tuple[Rates, float]:
    times: list[float] = []
    begin = time.perf_counter()
    before = _paces(fleet)
    prompt = made_up_prompt(PROMPT_TOKENS)
    async with model.generate(prompt, max_tokens=DECODE_TOKENS, ignore_eos=True) as generation:
        async for token in generation:
            if token.id is not None:
                times.append(time.perf_counter())
    decode_s = times[-1] - times[0]
    behind = max(
        (after.late_s - earlier.late_s) / (after.modelled_s - earlier.modelled_s)
        for earlier, after in zip(before, _paces(fleet), strict=True)
        if after.steps > earlier.steps
    )
    return Rates(PROMPT_TOKENS / (times[0] - begin), (len(times) - 1) / decode_s), behind


def _paces(fleet: Fleet) -> list[Pace]:
    return [pace for device in fleet.devices if (pace := device.pace) is not None]


# --- predicted --------------------------------------------------------------------------


def _shape_and_plan(case: Case, profile: Profile) -> tuple[llama.LlamaModel, Plan]:
    with GGUFFile(case.path()) as gguf:
        model = llama.read_model(gguf)
    return model, make_plan(case.plan, model.shape, case.cards).replicas[0]


def cost_model(case: Case) -> Rates:
    """What the cost model says: one expression per step."""
    profile = profiles.find(case.profile)
    model, plan = _shape_and_plan(case, profile)
    topology = Topology.with_mock(case.cards)
    # In the middle of the decoding; a token more costs a position more of attention.
    context = PROMPT_TOKENS + DECODE_TOKENS // 2
    decode = cost.decode(model.shape, plan, profile, topology, batch=1, context=context)
    prefill = cost.prefill(model.shape, plan, profile, topology, tokens=PROMPT_TOKENS, chunk=CHUNK)
    return Rates(prefill.tokens_per_second, decode.tokens_per_second)


def simulator(case: Case) -> Rates | None:
    """What a fleet of virtual cards does: the real coordinator, event by event."""
    result = simulate(
        Scenario(
            model=str(case.path()),
            cards=case.cards,
            profile=profiles.find(case.profile),
            plan=case.plan,
            prompt_tokens=PROMPT_TOKENS,
            tokens=DECODE_TOKENS,
            prompt_chunk=CHUNK,
        )
    )
    decode = result.decode_tokens_per_second
    return None if decode is None else Rates(result.prefill_tokens_per_second, decode)


PREDICTIONS = {"cost model": cost_model, "simulator": simulator}


# --- side by side -----------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One case as a record."""
    rates, behind = trio.run(functools.partial(throttled, case, rounds))
    predicted: dict[str, Any] = {}
    for name, predict in PREDICTIONS.items():
        made = predict(case)
        if made is None:
            predicted[name] = None
            continue
        predicted[name] = attrs.asdict(made) | {
            "prefill_error": rates.prefill / made.prefill - 1,
            "decode_error": rates.decode / made.decode - 1,
        }
    return {
        "case": str(case),
        "throttled": attrs.asdict(rates),
        "behind": behind,
        "counts": behind <= BEHIND_MAX,
        "predicted": predicted,
    }


def failures(records: Sequence[dict[str, Any]]) -> list[str]:
    """Predictions that are off by more than the tolerance, in words."""
    return [
        f"{record['case']}: {name}, {part}: off by {made[f'{part}_error']:+.1%}"
        for record in records
        if record["counts"]
        for name, made in record["predicted"].items()
        if made is not None
        for part in ("prefill", "decode")
        if abs(made[f"{part}_error"]) > TOLERANCE
    ]


def show(records: Sequence[dict[str, Any]]) -> None:
    """The records as tables: throttled tokens per second, and what it is beside each prediction."""
    for part in ("decode", "prefill"):
        rows = []
        for record in records:
            row: list[object] = [record["case"], record["throttled"][part]]
            for name in PREDICTIONS:
                made = record["predicted"].get(name)
                row += ["-", "-"] if made is None else [made[part], f"{made[f'{part}_error']:+.1%}"]
            rows.append([*row, f"{record['behind']:.2%}"])
        columns = ["case", "throttled"]
        for name in PREDICTIONS:
            columns += [name, "throttled is"]
        report.show_table(f"{part}, tokens/s", (*columns, "behind"), rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", action="append", dest="cases", metavar="CASE", default=None)
    parser.add_argument("--rounds", type=int, default=3, help="generations, default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    options = parser.parse_args(arguments)
    try:
        cases = [Case.parse(text) for text in options.cases or DEFAULT_CASES]
    except ValueError as error:
        parser.error(str(error))
    records = []
    for case in cases:
        try:
            records.append(measure(case, options.rounds))
        except SpankerError as error:
            print(f"prediction: {case}: {error}", file=sys.stderr)
            return 1
    show(records)
    if options.json:
        record = {"machine": report.describe_machine(), "cases": records}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    wrong = failures(records)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
