# SPDX-License-Identifier: Apache-2.0
"""Runs many seeds, in as many processes as there are to be; each is a fresh interpreter."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence

import attrs

from spanker.testing.misfortune.drawing import draw
from spanker.testing.misfortune.running import run

# Seeds that a process gets at a time: enough that handing them over costs nothing.
BATCH = 8
# Collecting is put off to here; within a run there is none.
COLLECT_EVERY = 40


@attrs.frozen
class Seen:
    """What came of one seed."""

    seed: int
    violations: tuple[str, ...]
    faults: int
    seconds: float
    turns: int


def parse_seeds(text: str) -> range:
    """`7` is one seed, `100:200` those from 100 on to 199."""
    first, colon, stop = text.partition(":")
    return range(int(first), int(stop)) if colon else range(int(first), int(first) + 1)


def run_seeds(seeds: Iterable[int]) -> Iterator[Seen]:
    """Run seeds one by one, here."""
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for count, seed in enumerate(seeds, 1):
            outcome = run(draw(seed))
            yield Seen(seed, outcome.violations, outcome.faults, outcome.seconds, outcome.turns)
            del outcome
            if count % COLLECT_EVERY == 0:
                gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()


def run_many(seeds: Sequence[int], jobs: int) -> Iterator[Seen]:
    """Run seeds in `jobs` processes; what comes of them comes as it does, in no order.  Leaving the
    iteration ends the processes."""
    if jobs == 1 or len(seeds) <= BATCH:
        yield from run_seeds(seeds)
        return
    batches = [list(seeds[i : i + BATCH]) for i in range(0, len(seeds), BATCH)]
    # Ctrl-C is for whoever waits for them, and ends them.
    with multiprocessing.get_context("spawn").Pool(jobs, _ignore_interrupts) as pool:
        for found in pool.imap_unordered(_run_batch, batches):
            yield from found


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_batch(seeds: list[int]) -> list[Seen]:
    return list(run_seeds(seeds))
