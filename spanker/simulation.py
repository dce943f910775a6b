# SPDX-License-Identifier: Apache-2.0
"""Simulating a fleet: the real coordinator and card actors on virtual cards, in virtual time.

    result = spanker.simulate(Scenario(shape="llama-70b", cards=64, plan="tp8xpp8"))
    result.decode_tokens_per_second

Nothing here depends on the machine that it runs on: the same scenario gives the same result, and
the same trace byte for byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import trio

from spanker.actors.virtual_time import now_ps, run_virtual
from spanker.device.soft import DEFAULT_DDR_BYTES
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.device.virtual.units import PS_PER_S, to_s
from spanker.errors import ConfigError
from spanker.fleet import (
    Fleet,
    Generation,
    Model,
    Usage,
    describe_share,
    open_fleet,
)
from spanker.ggml import catalog
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.sched.bandwidth import REV_A, Profile
from spanker.sched.limits import (
    DEFAULT_CONTEXT,
    DEFAULT_PROMPT_CHUNK,
    PAGE_POSITIONS,
    step_limits,
)
from spanker.sched.plan import FleetPlan, ModelShape, Plan
from spanker.sched.planner import plan_for
from spanker.sched.planning import Request
from spanker.sched.shapes import named_shape
from spanker.sched.topology import Topology

BATCH_MAX = 64
# Long steps are no hung cards: a prompt of a large model takes minutes.  What waits for what never
# comes is told of all the same.
HANG_TIMEOUT_S = 600.0

Progress = Callable[[str, int, int], None]


@attrs.frozen
class Scenario:
    """What to simulate: `model`, a name or file as for `Fleet.load`, or `shape`, a name or a value
    as for `Fleet.load_shape`, on `cards` cards of `ddr_bytes` each and the speeds of `profile`.

    `batch` sequences of `prompt_tokens` each generate `tokens` tokens side by side, spread over the
    replicas of the plan, a name as for `Fleet.load` or a value.  `ctx` is the positions per
    sequence (default: as `Fleet.load`, or what they need); `topology` as for `open_fleet`.  With
    `arithmetic` the cards compute what soft cards would; that takes as long as it takes, and
    changes no time in the result.  `seed` decides in what order the host does what it could do at
    the same time.
    """

    model: str | None = None
    shape: str | ModelShape | None = None
    cards: int = 1
    profile: Profile = REV_A
    plan: str | Plan | FleetPlan = "auto"
    prompt_tokens: int = 128
    tokens: int = 32
    batch: int = 1
    ctx: int | None = None
    prompt_chunk: int = DEFAULT_PROMPT_CHUNK
    ddr_bytes: int = DEFAULT_DDR_BYTES
    topology: Topology | None = None
    arithmetic: bool = False
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise ConfigError("simulate either a model or a shape")
        for name in ("cards", "prompt_tokens", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.batch <= BATCH_MAX:
            raise ConfigError(f"a batch has 1 to {BATCH_MAX} sequences, got {self.batch}")


@attrs.frozen
class CardTime:
    """How a card spent the decoding, as parts of it: computing, and in exchanges by the card that
    came last (its own number: its own sends did).  The rest it was idle."""

    card: int
    share: str
    replica: int | None
    ddr_used_bytes: int
    busy: float
    waiting: dict[int, float]

    @property
    def idle(self) -> float:
        return max(1.0 - self.busy - sum(self.waiting.values()), 0.0)


@attrs.frozen
class LinkTime:
    """What a directed link carried during the decoding, and the part of the time that it did."""

    source: int
    target: int
    nbytes: int
    busy: float


@attrs.frozen
class HostLinkTime:
    """Bytes over the host link during the decoding, and the part of the time that they took; 0
    where the profile does not model it."""

    bytes_to_cards: int
    bytes_to_host: int
    busy_to_cards: float
    busy_to_host: float


@attrs.frozen
class Simulation:
    """What came out.  Seconds are modelled.

    `first_token_s` is from the request to the first token of the last sequence to have one;
    decoding is from there to the last token, and `decode_tokens_per_second` counts the tokens of
    all sequences in it (None where there are none).  `sequence_rates`: tokens per second of each
    sequence from its own first token to its last, of which unlike replicas have unlike ones.
    `steps` is how many all of it took.
    """

    scenario: Scenario
    model: str
    context: int
    plan: FleetPlan
    load_s: float
    first_token_s: float
    decode_s: float
    decode_tokens: int
    steps: int
    token_ids: tuple[tuple[int, ...], ...]
    sequence_rates: tuple[float | None, ...]
    cards: tuple[CardTime, ...]
    links: tuple[LinkTime, ...]
    host_link: HostLinkTime

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.scenario.batch * self.scenario.prompt_tokens / self.first_token_s

    @property
    def decode_tokens_per_second(self) -> float | None:
        return self.decode_tokens / self.decode_s if self.decode_s else None


def simulate(scenario: Scenario, *, trace: str | None = None) -> Simulation:
    """Simulate a scenario; `trace` is where to write what every card did when.

    Blocks for as long as it takes to compute.  Raises what `open_fleet` and `Fleet.load` raise.
    """
    return run_virtual(functools.partial(run, scenario, trace=trace), seed=scenario.seed)


async def run(
    scenario: Scenario, *, trace: str | None = None, progress: Progress | None = None
) -> Simulation:
    """The same within `run_virtual`.  `progress(what, done, total)` counts bytes of "loading" and
    tokens of "generating"."""
    report = progress or (lambda what, done, total: None)
    spec = VirtualCardSpec(ddr_bytes=scenario.ddr_bytes, hollow=not scenario.arithmetic)
    async with open_fleet(
        [spec] * scenario.cards,
        profile=scenario.profile,
        hang_timeout_s=HANG_TIMEOUT_S,
        topology=scenario.topology,
    ) as fleet:
        begin = now_ps()
        model = await _load(fleet, scenario, functools.partial(report, "loading"))
        load_ps = now_ps() - begin
        generating = _Generating(fleet, model, scenario, functools.partial(report, "generating"))
        if trace is None:
            await generating.run()
        else:
            async with fleet.trace(trace):
                await generating.run()
        ddr_used = [card.ddr_used_bytes for card in (await fleet.stats()).cards]
        assert generating.decoding is not None and generating.done is not None
        spent = _Spent(generating.decoding, generating.done)
        return Simulation(
            scenario=scenario,
            model=model.name,
            context=model.context,
            plan=model.plan,
            load_s=to_s(load_ps),
            first_token_s=to_s(generating.first_ps),
            decode_s=to_s(generating.last_ps - generating.first_ps),
            decode_tokens=generating.decode_tokens,
            steps=model.stats.steps,
            token_ids=tuple(tuple(ids) for ids in generating.ids),
            sequence_rates=generating.rates(),
            cards=spent.by_cards(model.plan, ddr_used),
            links=spent.by_links(),
            host_link=spent.by_host_link(scenario.profile),
        )


async def _load(fleet: Fleet, scenario: Scenario, report: Callable[[int, int], None]) -> Model:
    length = scenario.prompt_tokens + scenario.tokens
    context = scenario.ctx or max(length, DEFAULT_CONTEXT)
    plan = _plan(scenario, context)
    # The most that one replica gets.
    sequences = -(-scenario.batch // len(plan.replicas))
    options: dict[str, Any] = {
        "plan": plan,
        # Otherwise the fleet's default, which a model may not have.
        "ctx": context if scenario.ctx or length > DEFAULT_CONTEXT else None,
        "prompt_chunk": scenario.prompt_chunk,
        # Whole pages for each sequence.
        "kv_tokens": max(context, sequences * -(-length // PAGE_POSITIONS) * PAGE_POSITIONS),
        "progress": report,
    }
    if scenario.shape is not None:
        return await fleet.load_shape(scenario.shape, **options)
    assert scenario.model is not None
    return await fleet.load(scenario.model, **options)


def _plan(scenario: Scenario, context: int) -> FleetPlan:
    if not isinstance(scenario.plan, str):
        return FleetPlan.of(scenario.plan) if isinstance(scenario.plan, Plan) else scenario.plan
    shape = _shape(scenario)
    limits = step_limits(shape, scenario.ctx or min(context, shape.context), scenario.prompt_chunk)
    request = Request(
        shape,
        scenario.profile,
        scenario.topology or Topology.with_mock(scenario.cards),
        (scenario.ddr_bytes,) * scenario.cards,
        limits,
        batch=scenario.batch,
        # In the middle of the decoding.
        position=min(scenario.prompt_tokens + scenario.tokens // 2, limits.context),
    )
    return plan_for(scenario.plan, request)


def _shape(scenario: Scenario) -> ModelShape:
    if isinstance(scenario.shape, str):
        return named_shape(scenario.shape)
    if scenario.shape is not None:
        return scenario.shape
    assert scenario.model is not None
    with GGUFFile(catalog.resolve(scenario.model)) as gguf:
        return llama.read_model(gguf).shape


class _Generating:
    """All sequences of a scenario, and what was used when the decoding began and ended."""

    def __init__(
        self,
        fleet: Fleet,
        model: Model,
        scenario: Scenario,
        report: Callable[[int, int], None],
    ) -> None:
        self.ids: list[list[int]] = [[] for _ in range(scenario.batch)]
        # Of each sequence, when its first token came and its newest.
        self._spans: list[tuple[int, int]] = [(0, 0)] * scenario.batch
        self.first_ps = self.last_ps = 0
        self.decode_tokens = 0
        self.decoding: Usage | None = None
        self.done: Usage | None = None
        self._fleet = fleet
        self._model = model
        self._scenario = scenario
        self._report = report
        self._begin_ps = 0

    async def run(self) -> None:
        """Generate; raises what a generation raises."""
        scenario, vocabulary = self._scenario, self._model.vocabulary
        self._begin_ps = now_ps()
        self._report(0, scenario.batch * scenario.tokens)
        # All are there before the first step is made.
        generations = [
            self._model.generate(
                [(number + i) % vocabulary for i in range(scenario.prompt_tokens)],
                max_tokens=scenario.tokens,
                ignore_eos=True,
            )
            for number in range(scenario.batch)
        ]
        async with trio.open_nursery() as nursery:
            for number, generation in enumerate(generations):
                nursery.start_soon(self._take, number, generation)

    async def _take(self, number: int, generation: Generation) -> None:
        async for token in generation:
            if token.id is not None:
                self.ids[number].append(token.id)
                now = now_ps()
                first = self._spans[number][0] if len(self.ids[number]) > 1 else now
                self._spans[number] = first, now
                self._count()

    def rates(self) -> tuple[float | None, ...]:
        """Tokens per second of each sequence behind its first token."""
        return tuple(
            (len(ids) - 1) / to_s(last - first) if last > first else None
            for ids, (first, last) in zip(self.ids, self._spans, strict=True)
        )

    def _count(self) -> None:
        """One token more has come."""
        done, spent_ps = sum(map(len, self.ids)), now_ps() - self._begin_ps
        total = self._scenario.batch * self._scenario.tokens
        if self.decoding is not None:
            self.decode_tokens += 1
        elif all(self.ids):
            self.first_ps, self.decoding = spent_ps, self._fleet.usage()
        if done == total:
            self.last_ps, self.done = spent_ps, self._fleet.usage()
        self._report(done, total)


@attrs.frozen
class _Spent:
    """What was used between two readings."""

    before: Usage
    after: Usage

    def part(self, ps: float) -> float:
        spent = self.after.fleet.now - self.before.fleet.now
        return ps / spent if spent else 0.0

    def by_cards(self, plan: FleetPlan, ddr_used: Sequence[int]) -> tuple[CardTime, ...]:
        return tuple(
            CardTime(
                card=card,
                share=describe_share(plan, card),
                replica=plan.replica_of(card),
                ddr_used_bytes=ddr_used[card],
                busy=self.part(b.busy_ps - a.busy_ps),
                waiting={
                    peer: self.part(ps - a.waiting_ps.get(peer, 0))
                    for peer, ps in sorted(b.waiting_ps.items())
                    if ps > a.waiting_ps.get(peer, 0)
                },
            )
            for card, (a, b) in enumerate(
                zip(self.before.fleet.cards, self.after.fleet.cards, strict=True)
            )
        )

    def by_links(self) -> tuple[LinkTime, ...]:
        earlier = {(link.source, link.target): link for link in self.before.fleet.links}
        found = []
        for link in self.after.fleet.links:
            was = earlier.get((link.source, link.target))
            nbytes = link.nbytes - (was.nbytes if was else 0)
            busy = self.part(link.busy_ps - (was.busy_ps if was else 0))
            found.append(LinkTime(link.source, link.target, nbytes, busy))
        return tuple(found)

    def by_host_link(self, profile: Profile) -> HostLinkTime:
        down = self.after.bytes_to_cards - self.before.bytes_to_cards
        up = self.after.bytes_to_host - self.before.bytes_to_host
        rate = profile.host_link_bytes_per_s
        ps_per_byte = PS_PER_S / rate if rate else 0.0
        return HostLinkTime(down, up, self.part(down * ps_per_byte), self.part(up * ps_per_byte))
