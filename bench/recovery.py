# SPDX-License-Identifier: Apache-2.0
"""How long a generation stands still when a card fails, and whether it comes out the same.

    python bench/recovery.py --cards 4 --points 200 --faults kill,hang --seed 1 --json out.json

At each point a fresh fleet loads the model, tensor parallel, and generates greedily; one card,
drawn from the seed, fails after a number of tokens that is drawn, too.  Tokens and all logits must
be those of a run without failures.  `still` is the time between the last token before the failure
and the next one after it; a hang is noticed after `--hang-timeout` without progress.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import report
import trio
from roofline import find_model

import spanker
from spanker.events import Replanned
from spanker.testing import hang, kill

FAULTS: dict[str, Callable[[spanker.Fleet, int], None]] = {"kill": kill, "hang": hang}
PROMPT = "Once upon a time"


@attrs.frozen
class Run:
    """One generation: what came out, and how long it stood still at its failure (s)."""

    ids: tuple[int, ...]
    logits_sha256: str
    still_s: float
    recovery_s: float | None
    plan: str


async def generate(
    path: str,
    cards: int,
    tokens: int,
    hang_timeout_s: float,
    fault: tuple[str, int, int] | None = None,
) -> Run:
    """One run; `fault` is what happens to which card after how many tokens."""
    async with spanker.open_fleet(cards, plan="tp", hang_timeout_s=hang_timeout_s) as fleet:
        model = await fleet.load(path, ctx=512, kv_tokens=512)
        digest, ids, still = hashlib.sha256(), [], 0.0
        struck: float | None = None
        generation = model.generate(PROMPT, max_tokens=tokens, ignore_eos=True, logits=True)
        async for token in generation:
            if token.id is None or token.logits is None:
                continue
            if struck is not None and fleet.events.history and not still:
                still = time.perf_counter() - struck
            if struck is not None and not fleet.events.history:
                struck = time.perf_counter()  # what had been computed before the failure
            ids.append(token.id)
            digest.update(token.logits.tobytes())
            if fault is not None and len(ids) == fault[2]:
                FAULTS[fault[0]](fleet, fault[1])
                struck = time.perf_counter()
        moves = [e.seconds for e in fleet.events.history if isinstance(e, Replanned)]
        recovery_s = moves[0] if moves else None
        return Run(tuple(ids), digest.hexdigest(), still, recovery_s, model.plan.name)


async def measure(options: argparse.Namespace, path: str) -> dict[str, Any]:
    expected = await generate(path, options.cards, options.tokens, options.hang_timeout)
    draw = random.Random(options.seed)
    points: list[dict[str, Any]] = []
    for number in range(options.points):
        fault = draw.choice(options.faults)
        # After the last token there is nothing left to be late.
        card, after = draw.randrange(options.cards), draw.randrange(1, options.tokens - 8)
        run = await generate(
            path, options.cards, options.tokens, options.hang_timeout, (fault, card, after)
        )
        same = (run.ids, run.logits_sha256) == (expected.ids, expected.logits_sha256)
        points.append(
            {
                "fault": fault,
                "card": card,
                "after_tokens": after,
                "same": same,
                "still_s": run.still_s,
                "recovery_s": run.recovery_s,
                "plan": run.plan,
            }
        )
        print(
            f"point {number + 1} of {options.points}: {fault} card {card} after {after} tokens: "
            f"{'same bits' if same else 'OTHER OUTPUT'}, still for {run.still_s:.3f} s",
            file=sys.stderr,
        )
    return {
        "machine": report.describe_machine(),
        "model": path.rsplit("/", 1)[-1],
        "cards": options.cards,
        "tokens": options.tokens,
        "seed": options.seed,
        "hang_timeout_s": options.hang_timeout,
        "logits_sha256": expected.logits_sha256,
        "points": points,
    }


def show(record: dict[str, Any]) -> int:
    """The table; the number of runs whose output was another one."""
    rows = []
    for fault in sorted({point["fault"] for point in record["points"]}):
        of = [point for point in record["points"] if point["fault"] == fault]
        still = [point["still_s"] for point in of]
        again = [point["recovery_s"] for point in of if point["recovery_s"] is not None]
        rows.append(
            (
                fault,
                len(of),
                sum(point["same"] for point in of),
                statistics.median(still),
                max(still),
                statistics.median(again) if again else None,
            )
        )
    columns = ("fault", "points", "same bits", "still, median s", "worst", "of which reloading")
    report.show_table(f"{record['model']} on {record['cards']} cards", columns, rows)
    return sum(not point["same"] for point in record["points"])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])

    def faults(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := [name for name in chosen if name not in FAULTS]:
            raise argparse.ArgumentTypeError(
                f"no fault {unknown[0]!r}: expected some of {','.join(FAULTS)}"
            )
        return chosen

    parser.add_argument("--model", default="smollm2", help="name or path (default: smollm2)")
    parser.add_argument("--cards", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--faults", type=faults, default=tuple(FAULTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hang-timeout", type=float, default=0.5, help="seconds (default: 0.5)")
    parser.add_argument("--json", help="write the record here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    record = trio.run(measure, options, find_model(options.model))
    wrong = show(record)
    if options.json:
        report.save_json(options.json, record)
    if wrong:
        print(f"{wrong} runs gave another output", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
