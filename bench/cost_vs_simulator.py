# SPDX-License-Identifier: Apache-2.0
"""The cost model beside the simulator: decode, prefill and load of many machines, models and plans.

    python bench/cost_vs_simulator.py [--only WORD] [--json FILE]

One computes in closed form, the other event by event, and they share nothing but a profile's
constants and the ways around missing links.  Nothing here depends on the machine it runs on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs

from spanker.sched import cost
from spanker.sched.bandwidth import NATIVE, REV_A, REV_B, CardSpeed, LinkSpeed, Profile
from spanker.sched.limits import step_limits
from spanker.sched.plan import (
    CardShare,
    FleetPlan,
    Limits,
    ModelShape,
    Plan,
    Stage,
    dimensions,
)
from spanker.sched.planner import make_plan
from spanker.sched.shapes import Dimensions, named_shape, shape_of
from spanker.sched.shares import Share, split
from spanker.sched.topology import Topology
from spanker.simulation import Scenario, simulate

RESULTS = Path(__file__).resolve().parent / "results" / "cost_vs_simulator.json"
# The largest difference that is none.
TOLERANCE = 0.03
PARTS = ("decode", "prefill", "load")

# --- shapes and plans --------------------------------------------------------------------

# Small, with heads, rows and vocabularies that do not divide evenly.
SMALL = shape_of(Dimensions(4, 576, 9, 3, 1536, 12288, 8192, tied=True))
GROUPED = shape_of(Dimensions(4, 1024, 16, 4, 2816, 8000, 4096))
FLOATS = shape_of(Dimensions(3, 512, 8, 8, 1408, 5000, 4096), "f16")
# Two layers of a model of 70 billion weights.
WIDE = shape_of(Dimensions(2, 8192, 64, 8, 28672, 32000, 4096), "q4_k", "q6_k")
_Q8 = shape_of(Dimensions(6, 768, 12, 4, 2048, 6000, 4096), "q8_0")
_Q4 = shape_of(Dimensions(6, 768, 12, 4, 2048, 6000, 4096), "q4_1")
# Every other layer in another format.
MIXED = attrs.evolve(
    _Q4, layers=tuple((_Q8 if i % 2 else _Q4).layers[i] for i in range(len(_Q4.layers)))
)
SHAPES = {"small": SMALL, "grouped": GROUPED, "floats": FLOATS, "wide": WIDE, "mixed": MIXED}


def shape(name: str) -> ModelShape:
    """One of the above, or a well-known one."""
    return SHAPES.get(name) or named_shape(name)


def weighted_plan(model: ModelShape, stages: Sequence[Sequence[float]]) -> Plan:
    """A stage for each list of weights, of equal layers; its cards' shares by the weights."""
    layers, made, card = split(len(model.layers), len(stages)), [], 0
    for number, weights in enumerate(stages):
        parts = {
            name: split(total, len(weights), unit=unit, weights=weights)
            if total
            else (Share(0, 0),) * len(weights)
            for name, unit, total in dimensions(model, number == 0, number == len(stages) - 1)
        }
        shares = tuple(
            CardShare(card + i, **{name: part[i] for name, part in parts.items()})
            for i in range(len(weights))
        )
        made.append(Stage(layers[number], shares))
        card += len(weights)
    name = "+".join(":".join(f"{w:g}" for w in weights) for weights in stages)
    return Plan(name, tuple(made))


def _without(a: int, b: int) -> Callable[[int], Topology]:
    """A mesh in which these two cards have no link."""
    return lambda n: Topology.of_pairs(
        n, [ends for ends in itertools.combinations(range(n), 2) if ends != (a, b)]
    )


# Over other cards where links lead there; what cards exchange goes over the host where none do.
TOPOLOGIES: dict[str, Callable[[int], Topology]] = {
    "mesh": Topology.with_mock,
    "none": lambda n: Topology.of_pairs(n, []),
    "pairs": lambda n: Topology.of_pairs(n, [(a, a + 1) for a in range(0, n - 1, 2)]),
    "line": Topology.line,
    "ring": Topology.ring,
    "star": lambda n: Topology.of_pairs(n, [(0, a) for a in range(1, n)]),
    "one cut": _without(0, 1),
    "last cut": _without(1, 2),
}

# --- cases -------------------------------------------------------------------------------


@attrs.frozen
class Case:
    """A model on a machine; `plan` is a name, or the weights of the cards of each stage; `links`
    one of TOPOLOGIES.

    `batch` sequences of `prompt` tokens in chunks of `chunk`, then `tokens` each.
    """

    name: str
    shape: str
    cards: int
    plan: str | tuple[tuple[float, ...], ...]
    profile: Profile
    batch: int = 1
    prompt: int = 48
    chunk: int = 512
    tokens: int = 13
    links: str = "mesh"

    @property
    def topology(self) -> Topology:
        return TOPOLOGIES[self.links](self.cards)

    @property
    def context(self) -> int:
        """Positions per sequence; chunks are no longer than that."""
        return max(self.prompt + self.tokens, min(self.chunk, self.batch * self.prompt))

    @property
    def together(self) -> bool:
        """Whether all sequences begin to decode in the same step."""
        return self.batch == 1 or self.batch * self.prompt <= self.chunk

    def made_plan(self) -> FleetPlan:
        if isinstance(self.plan, str):
            return make_plan(self.plan, shape(self.shape), self.cards)
        return FleetPlan.of(weighted_plan(shape(self.shape), self.plan))

    def limits(self) -> Limits:
        """As `Fleet.load` has them for `Scenario.ctx`."""
        sequences = -(-self.batch // len(self.made_plan().replicas))
        limits = step_limits(shape(self.shape), self.context, self.chunk)
        pages = -(-self.context // limits.page_positions) * sequences
        return attrs.evolve(limits, kv_pages=pages)


def _cards(**speeds: tuple[float, float]) -> tuple[CardSpeed, ...]:
    return tuple(CardSpeed(int(n[1:]), *factors) for n, factors in speeds.items())


def _links(ends: Sequence[tuple[int, int]], bytes_per_s: float, latency_s: float) -> Any:
    return tuple(LinkSpeed(a, b, bytes_per_s, latency_s) for a, b in ends)


_NO_PORT = attrs.evolve(REV_A, name="no-port", port_bytes_per_s=None)
_NARROW = attrs.evolve(REV_A, name="narrow-port", port_bytes_per_s=120e6)
_SLOW_LINKS = attrs.evolve(REV_A, name="slow-links", intercard_bytes_per_s=20e6)
_FAR_LINKS = attrs.evolve(REV_A, name="far-links", intercard_latency_s=100e-6)
_SLOW_HOST = attrs.evolve(REV_A, name="slow-host", host_link_bytes_per_s=1e6)
_FAR_HOST = attrs.evolve(REV_A, name="far-host", host_link_latency_s=30e-3)
_FAST = attrs.evolve(
    REV_A,
    name="fast-cards",
    local_ddr_bytes_per_s=50e9,
    intercard_bytes_per_s=10e9,
    port_bytes_per_s=10e9,
    int8_madds_per_s=1e12,
    float_madds_per_s=1e12,
    elements_per_s=50e9,
    command_s=0.1e-6,
    step_s=1e-6,
    host_link_latency_s=1e-3,
)
_FAST_SLOW_HOST = attrs.evolve(
    _FAST, name="fast-slow-host", host_link_bytes_per_s=5e6, host_link_latency_s=1e-4
)
_STRAGGLER = attrs.evolve(REV_A, name="straggler", cards=_cards(c1=(0.5, 0.5)))
_SLOW_MEMORY = attrs.evolve(REV_A, name="slow-memory", cards=_cards(c0=(0.3, 1.0), c2=(0.8, 2.0)))
_SLOW_LINK = attrs.evolve(REV_A, name="slow-link", links=_links([(0, 1)], 60e6, 20e-6))
_TWO_BOARDS = attrs.evolve(
    REV_A,
    name="two-boards",
    links=_links([(a, b) for a in range(4) for b in range(4) if a // 2 != b // 2], 80e6, 30e-6),
)
_BOARDS_AND_PORTS = attrs.evolve(_TWO_BOARDS, name="two-boards-narrow", port_bytes_per_s=100e6)
_TWO_CORES = attrs.evolve(NATIVE, name="two-cores", cores=2)
_ONE_CORE = attrs.evolve(NATIVE, name="one-core", cores=1)
_SHARED = attrs.evolve(NATIVE, name="shared-memory", shared_bytes_per_s=20e9)
_CORES_AND_SHARED = attrs.evolve(
    NATIVE, name="cores-and-memory", cores=2, shared_bytes_per_s=20e9, command_s=2e-6
)
_NO_LATENCY = attrs.evolve(
    REV_A, name="no-overhead", intercard_latency_s=0.0, command_s=0.0, step_s=0.0
)
_INFINITE = attrs.evolve(REV_A, name="memory-only", int8_madds_per_s=math.inf)

CASES = (
    Case("one card", "small", 1, "tp", REV_A, prompt=70, chunk=32),
    Case("one card, native", "grouped", 1, "tp", NATIVE, prompt=300, chunk=128),
    Case("uneven heads", "small", 4, "tp", REV_A, prompt=70, chunk=16),
    Case("more cards than heads", "small", 12, "tp", REV_A),
    Case("two cards", "grouped", 2, "tp", REV_A, prompt=200, chunk=64),
    Case("eight cards", "grouped", 8, "tp", REV_B, prompt=100, chunk=40),
    Case("pipeline", "mixed", 3, "pp", REV_A, prompt=96, chunk=16),
    Case("pipeline of six", "mixed", 6, "pp", REV_B, prompt=160, chunk=16),
    Case("two by two", "mixed", 4, "tp2xpp2", REV_A, prompt=96, chunk=32),
    Case("four by two", "grouped", 8, "tp4xpp2", REV_A, prompt=64, chunk=64),
    Case("floats", "floats", 2, "tp", REV_A, prompt=64, chunk=24),
    Case("floats, pipeline", "floats", 3, "pp", NATIVE, prompt=64, chunk=24),
    Case("70b, two layers", "wide", 8, "tp", REV_A, prompt=16),
    Case("70b, two stages", "wide", 16, "tp8xpp2", REV_B, prompt=32, chunk=16),
    Case("a whole model", "smollm2-135m", 2, "tp", REV_A, prompt=32),
    Case("a whole model, pipeline", "tinyllama", 4, "pp", REV_A, prompt=64, chunk=16),
    Case("long context", "grouped", 2, "tp", REV_A, prompt=1500, chunk=512),
    Case("long context, pipeline", "small", 2, "pp", NATIVE, prompt=2000, chunk=256),
    Case("batch of 8", "grouped", 4, "tp", REV_A, batch=8, prompt=30),
    Case("batch of 64", "small", 2, "tp", REV_A, batch=64, prompt=8),
    Case("batch of 64, pipeline", "mixed", 3, "pp", REV_A, batch=64, prompt=8),
    Case("batch in chunks", "grouped", 4, "tp", REV_A, batch=5, prompt=50, chunk=32),
    Case("batch in chunks, pipeline", "mixed", 3, "pp", REV_B, batch=3, prompt=40, chunk=16),
    Case("no ports", "grouped", 6, "tp", _NO_PORT, batch=4),
    Case("narrow ports", "grouped", 6, "tp", _NARROW, batch=4),
    Case("narrow ports, uneven", "small", 4, "tp", _NARROW, batch=8),
    Case("slow links", "grouped", 4, "tp", _SLOW_LINKS, batch=4),
    Case("far links", "grouped", 4, "tp", _FAR_LINKS),
    Case("far links, uneven", "small", 4, "tp", _FAR_LINKS),
    Case("slow host link", "grouped", 4, "tp", _SLOW_HOST, tokens=9),
    Case("far host", "small", 2, "tp", _FAR_HOST, tokens=25),
    Case("cards that outrun the host", "small", 4, "tp", _FAST, tokens=41),
    Case("cards that outrun its link", "small", 4, "tp", _FAST_SLOW_HOST, batch=4, tokens=41),
    Case("host link, pipeline", "small", 4, "pp", _FAST, tokens=41),
    Case("a straggler", "grouped", 4, "tp", _STRAGGLER, prompt=64, chunk=32),
    Case("a straggler with half", "grouped", 4, ((2, 1, 2, 2),), _STRAGGLER, batch=4),
    Case("unequal memories", "mixed", 3, ((1, 2, 2),), _SLOW_MEMORY),
    Case("unequal cards, equal shares", "mixed", 3, "tp", _SLOW_MEMORY, batch=16, prompt=20),
    Case("unequal cards, pipeline", "mixed", 3, "pp", _SLOW_MEMORY, prompt=64, chunk=16),
    Case("a slow link", "grouped", 3, "tp", _SLOW_LINK, batch=4),
    Case("two boards", "grouped", 4, "tp", _TWO_BOARDS, batch=4),
    Case("two boards, a stage each", "grouped", 4, "tp2xpp2", _TWO_BOARDS, prompt=64, chunk=16),
    Case("two boards, narrow ports", "grouped", 4, "tp", _BOARDS_AND_PORTS, batch=16, prompt=20),
    Case("three cards, then two", "mixed", 5, ((1, 1, 1), (1, 1)), REV_A, prompt=64, chunk=16),
    Case("one card, then three", "mixed", 4, ((1,), (1, 1, 1)), REV_A, batch=4),
    Case("a card with nothing", "grouped", 3, ((1, 0, 1),), REV_A),
    Case("three to one", "grouped", 2, ((3, 1),), REV_A, batch=2),
    Case("two cores", "grouped", 4, "tp", _TWO_CORES, prompt=64, chunk=32),
    Case("shared memory", "grouped", 4, "tp", _SHARED),
    Case("cores and memory", "grouped", 8, "tp", _CORES_AND_SHARED, batch=2),
    Case("two cores, pipeline", "mixed", 3, "pp", _TWO_CORES, prompt=32, chunk=32),
    Case("one core, pipeline", "mixed", 3, "pp", _ONE_CORE, prompt=96, chunk=16),
    Case("two cores, two by two", "mixed", 4, "tp2xpp2", _TWO_CORES, prompt=96, chunk=16),
    Case("two cores, uneven heads", "small", 4, "tp", _TWO_CORES, batch=4),
    Case("shared memory, uneven heads", "small", 4, "tp", _SHARED, batch=4),
    Case("two cores, three to one", "grouped", 2, ((3, 1),), _ONE_CORE),
    Case("no overhead", "small", 3, "tp", _NO_LATENCY),
    Case("memory only", "mixed", 2, "tp", _INFINITE, batch=16, prompt=10),
    Case("two replicas", "grouped", 4, "dp2xtp2", REV_A, batch=2),
    Case("three replicas, seven sequences", "small", 6, "dp3xpp2", REV_A, batch=7),
    Case("four replicas, far host", "small", 4, "dp4", _FAR_HOST, batch=4),
    Case("replicas on two cores", "grouped", 4, "dp2xtp2", _TWO_CORES, batch=2),
    Case("replicas that share memory", "grouped", 4, "dp4", _SHARED, batch=4),
    Case("no links", "grouped", 2, "tp", REV_A, links="none"),
    Case("no links, long prompt", "grouped", 2, "tp", REV_A, prompt=200, chunk=64, links="none"),
    Case("no links, pipeline", "mixed", 3, "pp", REV_A, prompt=96, chunk=16, links="none"),
    Case("two pairs, a stage each", "mixed", 4, "tp2xpp2", REV_A, prompt=64, links="pairs"),
    Case("a whole model without a link", "smollm2-135m", 2, "tp", REV_A, prompt=32, links="none"),
    Case("a link cut", "grouped", 4, "tp", REV_A, prompt=200, chunk=64, links="one cut"),
    Case("a link cut, three cards", "grouped", 3, "tp", REV_A, batch=4, links="one cut"),
    Case("a link cut, uneven heads", "small", 4, "tp", REV_A, prompt=70, chunk=16, links="one cut"),
    Case("a link cut, far links", "grouped", 4, "tp", _FAR_LINKS, links="one cut"),
    Case("a link cut, slow links", "grouped", 4, "tp", _SLOW_LINKS, batch=4, links="one cut"),
    Case("a link cut, narrow ports", "grouped", 6, "tp", _NARROW, batch=4, links="one cut"),
    Case("a link cut, two cores", "grouped", 4, "tp", _TWO_CORES, batch=4, links="one cut"),
    Case("a link cut, a slow link", "grouped", 4, "tp", _TWO_BOARDS, batch=4, links="one cut"),
    Case("a link cut in a stage", "mixed", 4, "tp2xpp2", REV_A, prompt=96, links="one cut"),
    Case("a link cut between stages", "mixed", 4, "tp2xpp2", REV_A, prompt=96, links="last cut"),
    Case("a link cut in a pipeline", "mixed", 3, "pp", REV_A, prompt=96, links="one cut"),
    Case("a link cut, two replicas", "grouped", 4, "dp2xtp2", REV_A, batch=2, links="last cut"),
    Case("a line of three", "grouped", 3, "tp", REV_A, prompt=200, chunk=64, links="line"),
    Case("a line of five", "grouped", 5, "tp", REV_A, batch=4, links="line"),
    Case("a line, a stage each", "mixed", 4, "pp", REV_A, prompt=96, chunk=16, links="line"),
    Case("a line, two by two", "mixed", 4, "tp2xpp2", REV_A, prompt=96, links="line"),
    Case("a ring of six", "small", 6, "tp", REV_A, prompt=70, chunk=32, links="ring"),
    Case("a ring, two stages", "grouped", 6, "tp3xpp2", REV_A, batch=4, links="ring"),
    Case("a star", "grouped", 5, "tp", REV_A, prompt=100, chunk=40, links="star"),
    Case("three cards and one pair", "grouped", 3, "tp", REV_A, batch=4, links="pairs"),
    Case("two pairs, one stage", "small", 4, "tp", REV_A, prompt=70, links="pairs"),
    Case("a whole model, a link cut", "smollm2-135m", 4, "tp", REV_A, prompt=32, links="one cut"),
    Case("replicas of a whole model", "smollm2-135m", 4, "dp2xtp2", REV_B, batch=4),
)


# --- both --------------------------------------------------------------------------------


@attrs.frozen
class Figures:
    """Tokens per second of decoding, where all begin together, and of the prompts; seconds of the
    load, 0 without a host link."""

    decode: float | None
    prefill: float
    load: float


def closed_form(case: Case) -> Figures:
    """What the cost model says."""
    model, plan = shape(case.shape), case.made_plan()
    machine = case.profile, case.topology
    # In the middle of the decoding; a token more costs a position more of attention.
    context = case.prompt + case.tokens // 2
    decode = cost.decode_fleet(model, plan, *machine, batch=case.batch, context=context)
    prefill_s = max(
        cost.prefill(
            model,
            replica,
            *machine,
            tokens=case.prompt,
            chunk=case.chunk,
            batch=part.size,
            beside=sorted(set(plan.cards) - set(replica.cards)),
        ).seconds
        for replica, part in zip(plan.replicas, split(case.batch, len(plan.replicas)), strict=True)
    )
    return Figures(
        decode.tokens_per_second if case.together else None,
        case.batch * case.prompt / prefill_s,
        cost.load(model, plan, *machine, case.limits()).seconds,
    )


def event_by_event(case: Case) -> Figures:
    """What the simulator says."""
    scenario = Scenario(
        shape=shape(case.shape),
        cards=case.cards,
        profile=case.profile,
        plan=case.made_plan(),
        prompt_tokens=case.prompt,
        tokens=case.tokens,
        batch=case.batch,
        ctx=case.context,
        prompt_chunk=case.chunk,
        topology=case.topology,
    )
    found = simulate(scenario)
    rates = [rate for rate in found.sequence_rates if rate is not None]
    decode = sum(rates) if case.together else None
    return Figures(decode, found.prefill_tokens_per_second, found.load_s)


def errors(case: Case) -> tuple[Figures, Figures, dict[str, float | None]]:
    """Both, and by how much the cost model is off; None where there is nothing to compare."""
    model, events = closed_form(case), event_by_event(case)
    off: dict[str, float | None] = {}
    for part in PARTS:
        said, happened = getattr(model, part), getattr(events, part)
        off[part] = said / happened - 1 if happened else None
    return model, events, off


def compare(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """A record of each case."""
    for case in cases:
        model, events, off = errors(case)
        yield {
            "case": case.name,
            "shape": case.shape,
            "cards": case.cards,
            "plan": case.made_plan().name,
            "profile": case.profile.name,
            "batch": case.batch,
            "prompt": case.prompt,
            "chunk": case.chunk,
            "tokens": case.tokens,
            "links": case.links,
            "cost_model": _rounded(attrs.asdict(model)),
            "simulator": _rounded(attrs.asdict(events)),
            "error": {part: None if e is None else round(e, 6) for part, e in off.items()},
        }


def _rounded(figures: dict[str, float | None]) -> dict[str, float | None]:
    return {k: None if v is None else float(f"{v:.8g}") for k, v in figures.items()}


def worst(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The largest difference of each part, and where it is."""
    found = {}
    for part in PARTS:
        record = max(records, key=lambda r: abs(r["error"][part] or 0.0))
        found[part] = {"case": record["case"], "error": record["error"][part]}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their name")
    parser.add_argument("--json", default=None, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"no case has {options.only!r} in its name")
    records = []
    print(f"{'case':30}{'cards':>6} {'plan':14}{'profile':20}" + "".join(f"{p:>9}" for p in PARTS))
    for record in compare(cases):
        records.append(record)
        off = [record["error"][part] for part in PARTS]
        texts = "".join(f"{'-' if e is None else format(e, '+.2%'):>9}" for e in off)
        head = f"{record['case']:30}{record['cards']:6} {record['plan']:14}{record['profile']:20}"
        print(head + texts, flush=True)
    largest = worst(records)
    for part, entry in largest.items():
        print(f"worst {part}: {entry['error'] or 0:+.2%} ({entry['case']})")
    path = options.json or (None if options.only else RESULTS)
    if path:
        text = json.dumps({"worst": largest, "cases": records}, indent=1)
        Path(path).write_text(text + "\n")
    return int(any(abs(entry["error"] or 0.0) > TOLERANCE for entry in largest.values()))


if __name__ == "__main__":
    sys.exit(main())
