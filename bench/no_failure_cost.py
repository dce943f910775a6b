# SPDX-License-Identifier: Apache-2.0
"""What surviving failures costs while nothing fails: decoding speed of two trees, side by side.

    python bench/no_failure_cost.py --cards 2 --rounds 11 --json out.json
    python bench/no_failure_cost.py --beside ../older --json out.json

The other tree is a checkout of Spanker that is built in place, an older one for instance; without
one it is this tree, with `recover=False`.  Each run is a fresh process that loads the model, warms
up and times the tokens after the first.  Runs alternate, and so does who is first, so that what
drifts meets both alike: the ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from roofline import find_model

HERE = Path(__file__).resolve().parent.parent
RUN_TIMEOUT_S = 600.0

# In a process of its own, by the oldest interface there is; prints tokens/s and a hash of the ids.
_RUN = """
import hashlib, json, sys, time
import spanker, trio

async def main(path, cards, tokens, options):
    async with spanker.open_fleet(cards, **options) as fleet:
        model = await fleet.load(path, ctx=tokens + 32, kv_tokens=tokens + 32)
        for count in (8, tokens):
            ids, times = [], []
            async for token in model.generate("Once upon", max_tokens=count, ignore_eos=True):
                if token.id is not None:
                    ids.append(token.id)
                    times.append(time.perf_counter())
        rate = (len(times) - 1) / (times[-1] - times[0])
        print(json.dumps({
            "tokens_per_s": rate,
            "ids_sha256": hashlib.sha256(repr(ids).encode()).hexdigest(),
            "spanker": spanker.__file__,
        }))

trio.run(main, *json.loads(sys.argv[1]))
"""


def run(tree: Path, path: str, cards: int, tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    """One generation by the Spanker of a tree; raises RuntimeError where it cannot."""
    done = subprocess.run(
        (sys.executable, "-c", _RUN, json.dumps([path, cards, tokens, options])),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )
    if done.returncode:
        raise RuntimeError(f"the run in {tree} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    if not Path(found["spanker"]).is_relative_to(tree):
        raise RuntimeError(f"expected the Spanker of {tree}, got {found['spanker']}")
    return found


def measure(options: argparse.Namespace, path: str) -> dict[str, Any]:
    """All rounds, and what they come to."""
    other = HERE if options.beside is None else Path(options.beside).resolve()
    sides: tuple[tuple[Path, dict[str, Any]], ...] = (
        (HERE, {}),
        (other, {"recover": False} if options.beside is None else {}),
    )
    rates: tuple[list[float], list[float]] = ([], [])
    answers = set()
    bystanders = report.Bystanders()
    for number in range(options.rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            tree, settings = sides[side]
            found = run(tree, path, options.cards, options.tokens, settings)
            rates[side].append(found["tokens_per_s"])
            answers.add(found["ids_sha256"])
        print(
            f"round {number + 1} of {options.rounds}: {rates[0][-1]:.1f} tokens/s, beside "
            f"{rates[1][-1]:.1f}",
            file=sys.stderr,
        )
    return {
        "machine": report.describe_machine(),
        **bystanders.cores(),
        "model": path.rsplit("/", 1)[-1],
        "cards": options.cards,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "beside": "recover=False" if options.beside is None else str(other),
        "same_tokens": len(answers) == 1,
        "tokens_per_s": {
            "here": {"median": statistics.median(rates[0]), "runs": rates[0]},
            "beside": {"median": statistics.median(rates[1]), "runs": rates[1]},
        },
        "ratio": report.paired_ratio(*rates),
        "spread": report.spread([a / b for a, b in zip(*rates, strict=True)]),
    }


def show(record: dict[str, Any]) -> None:
    rates = record["tokens_per_s"]
    report.show_table(
        f"{record['model']} on {record['cards']} cards, beside {record['beside']}",
        ("decoding", "tokens/s, median", "ratio", "spread"),
        [
            ("here", rates["here"]["median"], record["ratio"], report.percent(record["spread"])),
            ("beside", rates["beside"]["median"], None, None),
        ],
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="name or path (default: smollm2)")
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--beside", metavar="DIR", help="another tree, built in place")
    parser.add_argument("--json", help="write the record here")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    record = measure(options, str(Path(find_model(options.model)).resolve()))
    show(record)
    if options.json:
        report.save_json(options.json, record)
    if not record["same_tokens"]:
        print("the runs gave different tokens", file=sys.stderr)
    return 0 if record["same_tokens"] else 1


if __name__ == "__main__":
    sys.exit(main())
