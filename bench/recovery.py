# SPDX-License-Identifier: Apache-2.0
"""How long a generation stands still when something fails, and whether it comes out the same.

    python bench/recovery.py --cards 4 --points 210 --seed 1 --json out.json

At each point a fresh fleet loads the model, tensor parallel, and generates greedily.  After a
number of tokens that is drawn from the seed a card dies, hangs, is reset, finds an uncorrected
memory error or becomes eight times slower, or a link damages a message or is cut: which card or
link, and at which command of a step, is drawn, too.  Tokens and all logits must be those of a run
without failures.  `still` is the longest wait for a token from then on; a hang is noticed after
`--hang-timeout` without progress, a cut link after a quarter of it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import attrs
import report
import trio
from roofline import find_model

import spanker
from spanker.events import Replanned, Rerouted

# The steps of SmolLM2 have some 600 commands.
COMMANDS = 600
SLOWER = 8.0


@attrs.frozen
class Strike:
    """A fault: what happens, to which card, after how many tokens, at which command of the step
    that is under way or next, and, of a link, the card at its other end."""

    fault: str
    card: int
    after: int
    command: int
    peer: int

    def strike(self, fleet: spanker.Fleet) -> None:
        """Let it happen."""
        device: Any = fleet.devices[self.card]
        if self.fault in ("kill", "hang", "reset"):
            getattr(device, self.fault)(self.command)
        elif self.fault == "ecc":
            device.fail_memory(self.command)
        elif self.fault == "corrupt":
            device.corrupt(self.peer)
        elif self.fault == "slow":
            device.slow(SLOWER)
        else:
            device.cut(self.peer)

    def __str__(self) -> str:
        where = f"link {self.card}-{self.peer}" if self.fault in LINKS else f"card {self.card}"
        return f"{self.fault} {where} after {self.after} tokens"


LINKS = ("corrupt", "cut")
FAULTS = ("kill", "hang", "reset", "ecc", "corrupt", "slow", "cut")
PROMPT = "Once upon a time"


@attrs.frozen
class Run:
    """One generation: what came out, the longest wait for a token from its fault on (s), what the
    fleet told of, and how long a recovery of it took (s)."""

    ids: tuple[int, ...]
    logits_sha256: str
    still_s: float
    recovery_s: float | None
    plan: str
    events: tuple[str, ...]


async def generate(
    path: str, cards: int, tokens: int, hang_timeout_s: float, strike: Strike | None = None
) -> Run:
    """One run, in which something happens or nothing does."""
    async with spanker.open_fleet(cards, plan="tp", hang_timeout_s=hang_timeout_s) as fleet:
        model = await fleet.load(path, ctx=512, kv_tokens=512)
        digest, ids, still = hashlib.sha256(), [], 0.0
        last: float | None = None
        generation = model.generate(PROMPT, max_tokens=tokens, ignore_eos=True, logits=True)
        async for token in generation:
            if token.id is None or token.logits is None:
                continue
            now = time.perf_counter()
            if last is not None:
                still, last = max(still, now - last), now
            ids.append(token.id)
            digest.update(token.logits.tobytes())
            if strike is not None and len(ids) == strike.after:
                strike.strike(fleet)
                last = time.perf_counter()
        moves = (Replanned, Rerouted)
        recoveries = [e.seconds for e in fleet.events.history if isinstance(e, moves)]
        events = tuple(type(event).__name__ for event in fleet.events.history)
        recovery_s = recoveries[0] if recoveries else None
        return Run(tuple(ids), digest.hexdigest(), still, recovery_s, model.plan.name, events)


async def measure(options: argparse.Namespace, path: str) -> dict[str, Any]:
    expected = await generate(path, options.cards, options.tokens, options.hang_timeout)
    draw = random.Random(options.seed)
    points: list[dict[str, Any]] = []
    for number in range(options.points):
        card, peer = draw.sample(range(options.cards), 2)
        # After the last token there is nothing left to be late.
        after, command = draw.randrange(1, options.tokens - 8), draw.randrange(COMMANDS)
        # As many of each, in turn.
        fault = options.faults[number % len(options.faults)]
        strike = Strike(fault, card, after, command, peer)
        run = await generate(path, options.cards, options.tokens, options.hang_timeout, strike)
        same = (run.ids, run.logits_sha256) == (expected.ids, expected.logits_sha256)
        points.append(
            {
                **attrs.asdict(strike),
                "same": same,
                "still_s": run.still_s,
                "recovery_s": run.recovery_s,
                "plan": run.plan,
                "events": run.events,
            }
        )
        print(
            f"point {number + 1} of {options.points}: {strike}: "
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
    columns = ("fault", "points", "same bits", "still, median s", "worst", "of which re-planning")
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
    parser.add_argument("--faults", type=faults, default=FAULTS)
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
