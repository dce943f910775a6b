# SPDX-License-Identifier: Apache-2.0
"""Spanker beside the machine's limits and beside llama.cpp, everything measured in one run.

    make bench BENCH_ARGS="--rounds 5 --parts decode,prefill"
    python bench/roofline.py --models smollm2,tinyllama-q4_0,/path/to/model.gguf --cards 1,2

N cards, tensor parallel, against N threads of llama.cpp on the same file.  The engines and the
probe of the limits take turns in every round.  Medians over the rounds count, without rounds that
other processes disturbed where these are few; every sample is kept.  llama.cpp takes part where
this interpreter has it (pip install '.[peers]').

Parts: decode (128 tokens after a short prompt), prefill (512 tokens in one step), start (fresh
processes, file in the page cache), cards (8 cards on this machine beside 2), idle (CPU time of a
loaded fleet that does nothing), context (decode at later positions).

Models are GGUF files, names of `spanker pull`, or names of bench/make_model.py, whose files are
written into build/bench.  Ctrl-C ends the run; what was measured until then is saved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import engines
import figures
import kernels
import make_model
import probe
import report
import show
import trio

import spanker
from spanker.errors import SpankerError
from spanker.ggml import catalog
from spanker.kernels.native import NativeKernels
from spanker.native import isas

PARTS = ("decode", "prefill", "start", "cards", "idle", "context")
MODELS = ("smollm2", "tinyllama-q4_0", "tinyllama-q4_k_m")
MODEL_DIRECTORY = probe.BUILD
FIRST_TOKEN = Path(__file__).resolve().parent / "first_token.py"

START_RUNS = 7
# Caches of their own: one with packed copies, one that stays without.
PACKED_CACHE, EMPTY_CACHE = MODEL_DIRECTORY / "cache-packed", MODEL_DIRECTORY / "cache-empty"
CARDS_PAIR = (2, 8)
IDLE_S = 5.0
SETTLE_S_MAX = 30
CONTEXT_POSITIONS = (engines.PROMPT_TOKENS, 1000, 2000, 3000, 4000)
CONTEXT_TOKENS = 32
CONTEXT_ROUNDS_MAX = 3
PROBE_PASSES = 3

Record = dict[str, Any]


def find_model(name: str) -> str:
    """The file behind a name, fetched or written if it is not there yet."""
    if name in catalog.CATALOG:
        return str(catalog.pull(name))
    try:
        make_model.parse_name(name)
    except ValueError:
        return str(catalog.resolve(name))
    return str(make_model.ensure_model(name, MODEL_DIRECTORY))


# --- the parts -----------------------------------------------------------------------


@attrs.frozen
class Run:
    """The options, and the record of what has been found so far."""

    parts: tuple[str, ...]
    cards: tuple[int, ...]
    rounds: int
    peer: bool
    record: Record
    json_path: Path

    def save(self) -> None:
        report.save_json(self.json_path, self.record)

    @contextmanager
    def llama(self, path: str, threads: int, context: int) -> Iterator[engines.LlamaCpp | None]:
        """llama.cpp on a model, or None where it does not take part."""
        if not self.peer:
            yield None
            return
        try:
            peer = engines.LlamaCpp(path, threads, context)
        except ValueError as error:
            raise SpankerError(f"llama.cpp cannot load {path}: {error}") from None
        try:
            yield peer
        finally:
            peer.close()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def rates(run: Run, facts: figures.ModelFacts, cards: int, out: Record) -> None:
    """Decode and prefill of both engines, with the limits measured in every round."""
    parts = [part for part in ("decode", "prefill") if part in run.parts]
    samples: dict[str, list[float]] = {}
    out["samples"] = samples
    async with spanker.open_fleet(cards) as fleet:
        model = await fleet.load(facts.path, plan="tp", ctx=engines.CONTEXT)
        ours = engines.Spanker(model)
        out["plan"], out["card_weight_bytes"] = model.plan.name, model.weight_bytes
        out["isa"] = sorted({card.isa for card in fleet.cards})
        with run.llama(facts.path, cards, engines.CONTEXT) as peer:
            bystanders = report.Bystanders()
            # Round 0 warms up both.
            for number in range(run.rounds + 1):
                found: dict[str, float] = {}
                for part in parts:
                    decode = part == "decode"
                    found[f"spanker_{part}"] = await (ours.decode() if decode else ours.prefill())
                    await trio.sleep(engines.PAUSE_S)
                    if peer:
                        found[f"llama_cpp_{part}"] = peer.decode() if decode else peer.prefill()
                        await trio.sleep(engines.PAUSE_S)
                shown = ", ".join(f"{name} {rate:.1f}" for name, rate in found.items())
                limits = probe.limits(cards, PROBE_PASSES)
                found["read_gb_per_s"] = limits.read_gb_per_s
                found["int8_gmac_per_s"] = limits.int8_gmac_per_s
                found.update(bystanders.cores())
                if number:
                    for name, value in found.items():
                        samples.setdefault(name, []).append(value)
                    out.update(figures.rate_figures(facts, samples))
                say(f"  {cards} cards, round {number} of {run.rounds}: {shown}")


def starts(run: Run, facts: figures.ModelFacts, cards: int, out: Record) -> None:
    """Fresh processes: time to the first token, and memory; of Spanker from the GGUF and from its
    packed copy.  Files are in the page cache."""
    with open(facts.path, "rb") as file:
        while file.read(1 << 24):
            pass
    _new_process([sys.executable, "-m", "spanker", "pack", facts.path], PACKED_CACHE)
    found: dict[str, list[dict[str, float]]] = {}
    out["samples"] = found
    names = ("spanker", "spanker packed", "llama.cpp")[: 2 + run.peer]
    # The first one of each only has the interpreter keep what it compiles, and is not counted.
    for number, name in itertools.product(range(START_RUNS + 1), names):
        cache = PACKED_CACHE if name == "spanker packed" else EMPTY_CACHE
        command = [sys.executable, str(FIRST_TOKEN), name.split()[0], facts.path, str(cards)]
        begin_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        sample = json.loads(_new_process([*command, str(begin_ns)], cache))
        if not number:
            continue
        samples = found.setdefault(name.replace(".", "_").replace(" ", "_"), [])
        samples.append(sample)
        say(
            f"  {cards} cards, start {number} of {START_RUNS}, {name}: "
            f"first token after {sample['first_token_s']:.2f} s, {sample['peak_rss_mb']:.0f} MB"
        )
        out["medians"] = {
            engine: {key: report.median([s[key] for s in samples]) for key in sample}
            for engine, samples in found.items()
        }


def _new_process(command: list[str], cache: Path) -> str:
    """What it prints."""
    environment = os.environ | {"SPANKER_CACHE": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SpankerError(f"{' '.join(command)} ended with {done.returncode}: {last}")
    return done.stdout


async def crowd(run: Run, facts: figures.ModelFacts, out: Record) -> None:
    """Decode on many cards of this machine beside a few, taking turns."""
    few, many = CARDS_PAIR
    samples: dict[int, list[float]] = {few: [], many: []}
    out["cards"], out["samples"] = [few, many], [samples[few], samples[many]]
    async with spanker.open_fleet(few) as first, spanker.open_fleet(many) as second:
        fleets = {
            count: engines.Spanker(await fleet.load(facts.path, plan="tp", ctx=engines.CONTEXT))
            for count, fleet in ((few, first), (many, second))
        }
        for number in range(run.rounds + 1):
            for count, engine in fleets.items():
                rate = await engine.decode()
                await trio.sleep(engines.PAUSE_S)
                if number:
                    samples[count].append(rate)
                say(f"  {count} cards, round {number} of {run.rounds}: decode {rate:.1f}")
            out["decode_tokens_per_s"] = [report.median(rates) for rates in samples.values()]
            out["ratio"] = report.paired_ratio(samples[many], samples[few])


async def idle(facts: figures.ModelFacts, cards: int, out: Record) -> None:
    """CPU time and wake-ups of an open fleet with a model that has nothing to do."""
    async with spanker.open_fleet(cards) as fleet:
        model = await fleet.load(facts.path, plan="tp", ctx=engines.CONTEXT)
        await engines.Spanker(model).decode_at(engines.PROMPT_TOKENS, 8)
        # What spins after work goes to sleep, and memory is settled into huge pages.
        for _ in range(SETTLE_S_MAX):
            cpu = time.process_time()
            await trio.sleep(1)
            if time.process_time() - cpu < 0.001:
                break
        before, cpu = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
        begin = time.perf_counter()
        await trio.sleep(IDLE_S)
        wall = time.perf_counter() - begin
        after, cpu = resource.getrusage(resource.RUSAGE_SELF), time.process_time() - cpu
    out["wall_s"], out["cpu_s"], out["cpu_share"] = wall, cpu, cpu / wall
    out["wakeups_per_s"] = (after.ru_nvcsw - before.ru_nvcsw) / wall
    say(f"  {cards} cards idle: {cpu / wall:.3%} of a core")


async def contexts(run: Run, facts: figures.ModelFacts, cards: int, out: Record) -> None:
    """Decode at later positions, the furthest first: llama.cpp then prefills once a round."""
    rounds = min(run.rounds, CONTEXT_ROUNDS_MAX)
    last = min(facts.context, max(CONTEXT_POSITIONS) + CONTEXT_TOKENS + 64)
    positions = [p for p in CONTEXT_POSITIONS if p + CONTEXT_TOKENS + 1 <= last]
    ours_at: dict[int, list[float]] = {p: [] for p in positions}
    theirs_at: dict[int, list[float]] = {p: [] for p in positions}
    reading_at: dict[int, list[float]] = {p: [] for p in positions}
    attention: list[float] = []
    size = probe.memory_working_set_bytes()
    native = NativeKernels(isas()[-1])
    pages = -(-positions[-1] // kernels.PAGE_POSITIONS)
    pool = kernels.kv_pool(pages * kernels.PAGE_POSITIONS, facts.head_dim)
    async with spanker.open_fleet(cards) as fleet:
        model = await fleet.load(facts.path, plan="tp", ctx=last, kv_tokens=last)
        ours = engines.Spanker(model)
        with run.llama(facts.path, cards, last) as peer:
            for number in range(rounds):
                for position in reversed(positions):
                    rate = await ours.decode_at(position, CONTEXT_TOKENS)
                    ours_at[position].append(rate)
                    await trio.sleep(engines.PAUSE_S)
                    beside = ""
                    if peer:
                        theirs_at[position].append(peer.decode_at(position, CONTEXT_TOKENS))
                        await trio.sleep(engines.PAUSE_S)
                        beside = f", llama.cpp {theirs_at[position][-1]:.1f}"
                    reading_at[position].append(probe.read_bandwidth(cards, size, PROBE_PASSES))
                    say(
                        f"  {cards} cards, position {position}, round {number + 1} of {rounds}: "
                        f"spanker {rate:.1f}{beside}"
                    )
                alone = kernels.attention_of_one(
                    native, facts.path, facts.group, pool, positions[-1]
                )
                attention.append(alone.gb_per_s)
                out["positions"] = figures.context_figures(
                    facts,
                    model.plan.replicas[0],
                    positions,
                    CONTEXT_TOKENS,
                    ours_at,
                    theirs_at,
                    reading_at,
                    attention,
                )


# --- the run -------------------------------------------------------------------------


async def measure_model(run: Run, name: str, seen: set[tuple[int, ...]]) -> None:
    """All parts for one model, saving after each."""
    # Of a path only the name goes into the record: it says nothing on another machine.
    record: Record = {"name": os.path.basename(name).removesuffix(".gguf")}
    say(f"{record['name']}:")
    run.record["models"].append(record)
    facts = figures.model_facts(find_model(name))
    record["facts"] = attrs.asdict(facts) | {"path": os.path.basename(facts.path)}

    def begun(key: str, cards: int) -> Record:
        """Where a part puts what it finds, so that nothing is lost when it is interrupted."""
        out: Record = {"cards": cards}
        record.setdefault(key, []).append(out)
        return out

    for cards in run.cards:
        if "decode" in run.parts or "prefill" in run.parts:
            await rates(run, facts, cards, begun("rates", cards))
            run.save()
        if "start" in run.parts:
            starts(run, facts, cards, begun("start", cards))
            run.save()
        if "idle" in run.parts:
            await idle(facts, cards, begun("idle", cards))
            run.save()
    if "cards" in run.parts:
        await crowd(run, facts, begun("crowd", max(CARDS_PAIR)))
        run.save()
    # Another mix of the same shape would tell the same about attention.
    if "context" in run.parts and facts.shape_key not in seen:
        await contexts(run, facts, max(run.cards), begun("context", max(run.cards)))
        seen.add(facts.shape_key)
        run.save()


async def measure(run: Run, models: Sequence[str]) -> int:
    """Every model; the number of those that failed."""
    failed, seen = 0, set[tuple[int, ...]]()
    for name in models:
        try:
            await measure_model(run, name, seen)
        except SpankerError as error:
            failed += 1
            run.record["models"][-1]["error"] = str(error)
            say(f"{name}: {error}")
            run.save()
    return failed


# --- the command ---------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=f"parts: {', '.join(PARTS)}",
    )

    def parts(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if unknown := [part for part in chosen if part not in PARTS]:
            raise argparse.ArgumentTypeError(
                f"no part {unknown[0]!r}: expected some of {','.join(PARTS)}"
            )
        return chosen

    def rounds(text: str) -> int:
        if not text.isdigit() or not int(text):
            raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
        return int(text)

    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--cards", type=probe.thread_counts, default=[1, 2], help="e.g. 1,2")
    parser.add_argument("--parts", type=parts, default=PARTS)
    parser.add_argument("--rounds", type=rounds, default=7, help="default: %(default)s")
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        default=report.RESULTS / "roofline.json",
        help="the record; a plot of it is put beside it (default: %(default)s)",
    )
    parser.add_argument("--no-peer", action="store_true", help="leave llama.cpp out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    version = None if options.no_peer else engines.llama_cpp_version()
    if version is None and not options.no_peer:
        say(
            "llama.cpp does not take part: pip install '.[peers]' brings it; measuring Spanker only"
        )
    record: Record = {
        "time_utc": report.now_utc(),
        "complete": False,
        "machine": report.describe_machine(),
        "llama_cpp": version and {"version": version, "features": engines.llama_cpp_features()},
        "rounds": options.rounds,
        "parts": list(options.parts),
        "models": [],
    }
    run = Run(
        parts=tuple(options.parts),
        cards=tuple(options.cards),
        rounds=options.rounds,
        peer=version is not None,
        record=record,
        json_path=options.json,
    )
    code, bystanders = 0, report.Bystanders()
    try:
        record["limits"] = [attrs.asdict(probe.limits(cards)) for cards in run.cards]
        code = 1 if trio.run(measure, run, options.models) else 0
        record["complete"] = True
    except KeyboardInterrupt:
        say("interrupted; what was measured is saved")
        code = 130
    except probe.ProbeError as error:
        say(f"roofline: {error}")
        code = 1
    finally:
        record.update(bystanders.cores())
        run.save()
    show.tables(record)
    if record["other_cores"] >= figures.DISTURBED_CORES:
        say(f"others kept {record['other_cores']:.1f} cores busy meanwhile: measure again alone")
    picture = options.json.with_suffix(".png")
    say(f"written: {options.json}" + (f", {picture}" if show.plot(record, picture) else ""))
    sys.exit(code)


if __name__ == "__main__":
    main()
