# SPDX-License-Identifier: Apache-2.0
"""All-reduces of float32 beside MPI over shared memory and gloo, everything in one alternating run.

    python bench/collectives.py --peer-python VENV/bin/python

In every round, for every size, each takes its turn with some tens of calls; the medians of the
turns, and of these over the rounds, count.  `program`: inside a card program, nothing of Python;
`api`: `await spanker.all_reduce(fleet, arrays)` on numpy arrays; `mpi` and `gloo`: one process a
rank.  All sum in place.  In the same rounds, what a call costs at least that sleeps until it is
done: `wake`, from the end of a card's work to the trio task that waits for it, and `round_trip`,
from just before a step of next to nothing is submitted to that task, which includes waking a
worker.  The peers run in an interpreter that has mpi4py (with an mpirun in the path) and torch;
whoever is missing is left out.

Prints a table and writes bench/results/collectives.json, the machine beside the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import report
import trio

import spanker
from spanker.actors.collective_programs import Work, build
from spanker.device.base import unpack_events
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.kernels.elements import Element
from spanker.kernels.program import Command, Program, Ref, add, copy, encode_step
from spanker.sched.collectives.plan import Kind, ReduceOp
from spanker.sched.topology import Topology

SIZES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
RANKS = (2, 4)
ENGINES = ("program", "api", "mpi", "gloo")
# A turn takes about so long, within these numbers of calls.
TURN_S = 0.1
CALLS_MIN, CALLS_MAX = 5, 300
LOOK_S = 0.5
WAKES = 100
# Long enough for trio's thread to sleep before it is done.
WAKE_BYTES = 4 << 20
PEER = Path(__file__).resolve().parent / "collective_peer.py"
STEP = encode_step([])

Turn = Callable[[int, int], list[float]]


# --- Spanker ---------------------------------------------------------------------------


class Programs:
    """All-reduces inside programs: a program of some of them is one sample, divided by as many."""

    def __init__(self, cards: int) -> None:
        self._rig = SoftRig([SoftCardSpec()] * cards)
        self._programs: dict[int, list[tuple[int, int, np.ndarray]]] = {}

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        self._rig.close()

    def _repeats(self, nbytes: int) -> int:
        return max(1, min(100, (32 << 20) // nbytes))

    def _prepare(self, nbytes: int) -> list[tuple[int, int, np.ndarray]]:
        work = Work(Kind.ALL_REDUCE, Element.F32, nbytes // 4, ReduceOp.SUM)
        made, works = [], build(work, Topology.with_mock(len(self._rig.cards)), meet=True)
        for card, one in zip(self._rig.cards, works, strict=True):
            window = card.window(nbytes)
            handles = {"data": window} | {n: card.alloc(b) for n, b in one.own_bytes.items()}
            commands = one.program.commands * self._repeats(nbytes)
            program = attrs.evolve(one.program, commands=commands).encode(handles)
            made.append((card.load_program(program), window, np.full(nbytes // 4, 0, np.float32)))
        return made

    def turn(self, nbytes: int, calls: int) -> list[float]:
        if nbytes not in self._programs:
            self._programs[nbytes] = self._prepare(nbytes)
        repeats = self._repeats(nbytes)
        samples = max(3, calls // repeats)
        self._run(nbytes)
        return [self._run(nbytes) / repeats for _ in range(samples)]

    def _run(self, nbytes: int) -> float:
        poll, left = select.poll(), len(self._rig.cards)
        for card in self._rig.cards:
            assert card.completion_fd is not None
            poll.register(card.completion_fd, select.POLLIN)
        begin = time.perf_counter()
        for card, (program, window, array) in zip(
            self._rig.cards, self._programs[nbytes], strict=True
        ):
            card.submit(program, STEP, lent=[(window, array.view(np.uint8).data)])
        while left:
            poll.poll()
            for card in self._rig.cards:
                for done in card.completions():
                    if done.error is not None:
                        raise done.error
                    left -= 1
        return time.perf_counter() - begin


async def api_turn(fleet: spanker.Fleet, nbytes: int, calls: int) -> list[float]:
    arrays = [np.full(nbytes // 4, 0, np.float32) for _ in fleet.cards]
    for _ in range(3):
        await spanker.all_reduce(fleet, arrays)
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        await spanker.all_reduce(fleet, arrays)
        times.append(time.perf_counter() - begin)
    return times


class Waiting:
    """A card whose steps a trio task waits for; its trace says when they were done."""

    def __init__(self) -> None:
        self._rig = SoftRig([SoftCardSpec()])
        self._card = self._rig.cards[0]
        handles = {name: self._card.alloc(WAKE_BYTES) for name in ("from", "into")}

        def load(command: Command) -> int:
            return self._card.load_program(Program((command,), 1, 1, 1).encode(handles))

        self._long = load(copy(Element.F32, Ref("into"), Ref("from"), count=WAKE_BYTES // 4))
        # Of no token there is nothing to add, but it is no bulk operation, which the submitting
        # thread might do itself.
        self._trivial = load(add(Ref("from"), Ref("into"), n=1))
        self._card.trace(16)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self._rig.close()

    async def wakes(self) -> list[float]:
        return [(woken - done) / 1e9 for _, done, woken in await self._turn(self._long)]

    async def round_trips(self) -> list[float]:
        return [(woken - begin) / 1e9 for begin, _, woken in await self._turn(self._trivial)]

    async def _turn(self, program: int) -> list[tuple[int, int, int]]:
        return [await self._run(program) for _ in range(WAKES)]

    async def _run(self, program: int) -> tuple[int, int, int]:
        """When it was submitted, when it was done, and when this task went on."""
        fd = self._card.completion_fd
        assert fd is not None
        begin_ns = time.monotonic_ns()
        self._card.submit(program, STEP)
        while True:
            await trio.lowlevel.wait_readable(fd)
            woken_ns = time.monotonic_ns()
            if done := self._card.completions():
                if done[0].error is not None:
                    raise done[0].error
                data, _ = self._card.trace_events(16)
                return begin_ns, unpack_events(data)[-1].end_ns, woken_ns


# --- the peers ---------------------------------------------------------------------------


class Peer:
    """Processes of one peer; rank 0 answers."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes
        self.about = self._answer()

    def turn(self, nbytes: int, calls: int) -> list[float]:
        self._tell(f"{nbytes} {calls}\n")
        return list(self._answer())

    def _tell(self, line: str) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.write(line)
                process.stdin.flush()

    def _answer(self) -> Any:
        out = self._processes[0].stdout
        assert out is not None
        line = out.readline()
        if not line:
            raise ChildProcessError("a peer has ended; run it by hand to see why")
        return json.loads(line)

    def close(self) -> None:
        with suppress(OSError):
            self._tell("\n")
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start(command: list[str], *, speaks: bool = True) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if speaks else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def peer(name: str, python: str, ranks: int) -> Iterator[Peer | None]:
    """MPI or gloo among so many processes; None where it is not installed."""
    module = {"mpi": "mpi4py.MPI", "gloo": "torch"}[name]
    there = subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0
    mpirun = shutil.which("mpirun")
    if not there or (name == "mpi" and mpirun is None):
        say(f"{name} is not installed for {python}: left out")
        yield None
        return
    if name == "mpi":
        assert mpirun is not None
        # Shared memory alone; where ranks outnumber cores, they must yield between their spins.
        options = ["--oversubscribe", "--mca", "btl", "self,vader"]
        crowded = ranks > len(os.sched_getaffinity(0))
        options += ["--mca", "mpi_yield_when_idle", str(int(crowded))]
        processes = [_start([mpirun, "-n", str(ranks), *options, python, str(PEER), "mpi"])]
    else:
        port = str(_free_port())
        processes = [
            _start([python, str(PEER), "gloo", str(rank), str(ranks), port], speaks=rank == 0)
            for rank in range(ranks)
        ]
    started = Peer(processes)
    try:
        yield started
    finally:
        started.close()


# --- the run -------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def calls_for(last: Sequence[float]) -> int:
    """How many calls a turn has, after what they have taken in the turn before."""
    middle = report.median(last)
    if not middle:
        return CALLS_MIN
    return max(CALLS_MIN, min(CALLS_MAX, round(TURN_S / middle)))


async def measure(
    ranks: int, rounds: int, sizes: Sequence[int], python: str | None, out: dict[str, Any]
) -> None:
    """All engines, size by size, round by round."""
    turns: dict[int, dict[str, list[float]]] = {size: {} for size in sizes}
    out["ranks"], out["peers"] = ranks, {}
    bystanders, seen = report.Bystanders(), list[dict[str, float]]()
    with ExitStack() as stack:
        programs = stack.enter_context(Programs(ranks))
        waiting = stack.enter_context(Waiting())
        trips: dict[str, list[float]] = {"wake": [], "round_trip": []}
        peers: dict[str, Turn] = {}
        for name in ("mpi", "gloo") if python else ():
            started = stack.enter_context(peer(name, str(python), ranks))
            if started is not None:
                peers[name] = started.turn
                out["peers"][name] = started.about["library"]
        async with spanker.open_fleet(ranks) as fleet:
            last: dict[tuple[int, str], list[float]] = {}
            for number in range(rounds + 1):  # round 0 warms up
                measured = {
                    "wake": await waiting.wakes(),
                    "round_trip": await waiting.round_trips(),
                }
                for name, times in measured.items():
                    middle = report.median(times)
                    assert middle is not None
                    trips[name] += [middle * 1e6] if number else []
                for size in sizes:
                    calls = {name: calls_for(last.get((size, name), ())) for name in ENGINES}
                    found = {"program": programs.turn(size, calls["program"])}
                    found["api"] = await api_turn(fleet, size, calls["api"])
                    for name, turn in peers.items():
                        found[name] = turn(size, calls[name])
                    for name, times in found.items():
                        last[size, name] = times
                        if number:
                            middle = report.median(times)
                            assert middle is not None
                            turns[size].setdefault(name, []).append(middle * 1e6)
                # Between rounds everybody's processes wait: who works now does not belong to this.
                bystanders.cores()
                await trio.sleep(LOOK_S)
                if number:
                    seen.append(bystanders.cores())
                    say(f"  {ranks} ranks, round {number} of {rounds}: {seen[-1]}")
    out["bystanders"] = seen
    for name, us in trips.items():
        out[f"{name}_us"] = {"median": report.median(us), "best": min(us), "turns": us}
    out["sizes"] = {
        str(size): {
            "median_us": {name: report.median(times) for name, times in turns[size].items()},
            "best_us": {name: min(times) for name, times in turns[size].items()},
            "turns_us": turns[size],
        }
        for size in sizes
    }


def show(record: dict[str, Any]) -> None:
    for result in record["results"]:
        rows = []
        for size, figures in result["sizes"].items():
            medians = figures["median_us"]
            rows.append([f"{int(size) >> 10} KiB", *(medians.get(name) for name in ENGINES)])
        report.show_table(
            f"all-reduce of float32, {result['ranks']} ranks, us a call (medians)",
            ["bytes", *ENGINES],
            rows,
        )
        wake_us, trip_us = (result[f"{name}_us"]["median"] for name in ("wake", "round_trip"))
        small = next(iter(result["sizes"].values()))["median_us"]
        print(
            f"One wake of trio by a native worker: {wake_us:.0f} us; to a worker and back: "
            f"{trip_us:.0f} us. The smallest call takes {small['api'] - small['program']:.0f} us "
            f"more than inside a program.\n"
        )


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="numbers of ranks")
    parser.add_argument("--peer-python", default=sys.executable, help="has mpi4py and torch")
    parser.add_argument("--json", default=str(report.RESULTS / "collectives.json"))
    options = parser.parse_args()
    record: dict[str, Any] = {
        "began": report.now_utc(),
        "machine": report.describe_machine(),
        "rounds": options.rounds,
        "results": [],
    }
    for ranks in map(int, options.ranks.split(",")):
        result: dict[str, Any] = {}
        await measure(ranks, options.rounds, SIZES, options.peer_python, result)
        record["results"].append(result)
        record["ended"] = report.now_utc()
        report.save_json(options.json, record)
    show(record)


if __name__ == "__main__":
    trio.run(main)
