# SPDX-License-Identifier: Apache-2.0
"""What a prompt takes until its first token is at the host: chunks, two ahead, through the stages.

A stage begins a chunk when it is done with the one before, has the message, and has the row from
the stage before; the host submits a chunk when all answers of the second last one are in.  Only a
chunk with outputs waits for the choice of a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from spanker.errors import PlanError
from spanker.sched.bandwidth import Profile
from spanker.sched.cost.decoding import STEPS_AHEAD, check_fits, handovers
from spanker.sched.cost.host import HostMessages, step_messages
from spanker.sched.cost.machine import Exchanges, Machine
from spanker.sched.cost.phases import Bound, StagePrice, price_stage, stage_pieces
from spanker.sched.cost.pieces import Pieces
from spanker.sched.cost.rows import StepRows
from spanker.sched.limits import CANDIDATES, OUTPUTS_MAX
from spanker.sched.plan import ModelShape, Plan
from spanker.sched.topology import Topology
from spanker.values import Value, lazy_frozen


@lazy_frozen
class PrefillCost(Value):
    """`seconds` from the request to the last sequence's first token at the host, for `tokens` of
    all prompts in `steps` steps.  `stages`: how long each stage computes and exchanges in it;
    `bound`: what takes most of the busiest stage, or the host link if it is not busy half the
    time."""

    seconds: float
    tokens: int
    steps: int
    stages: tuple[float, ...]
    bound: Bound

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@lazy_frozen
class _Step(Value):
    """One step's prices."""

    stages: list[StagePrice]
    handovers: list[Exchanges]
    choose_s: float
    host: HostMessages
    chooses: bool


def prefill(
    shape: ModelShape,
    plan: Plan,
    profile: Profile,
    topology: Topology,
    *,
    tokens: int,
    chunk: int,
    batch: int = 1,
    candidates: int = CANDIDATES,
    beside: Sequence[int] = (),
    kv_copies: int = 0,
) -> PrefillCost:
    """`batch` prompts of `tokens` each, in steps of up to `chunk` prompt tokens; `beside` and
    `kv_copies` as for `decode`.

    Raises PlanError for a plan that does not fit the model or the topology, and unless all three
    are at least 1.
    """
    if min(tokens, chunk, batch) < 1:
        raise PlanError(
            f"a prefill needs tokens, a chunk and a batch of at least 1, got {tokens}, {chunk}, "
            f"{batch}"
        )
    return prefill_unlike(
        shape,
        plan,
        profile,
        topology,
        lengths=(tokens,) * batch,
        chunk=chunk,
        candidates=candidates,
        beside=beside,
        kv_copies=kv_copies,
    )


def prefill_unlike(
    shape: ModelShape,
    plan: Plan,
    profile: Profile,
    topology: Topology,
    *,
    lengths: Sequence[int],
    chunk: int,
    computed: Sequence[int] = (),
    decoding: Sequence[int] = (),
    candidates: int = CANDIDATES,
    beside: Sequence[int] = (),
    kv_copies: int = 0,
) -> PrefillCost:
    """As `prefill`, of prompts of unlike `lengths`, of which so many positions are `computed` (or
    none), beside sequences that are `decoding` at these positions and have their token in every
    step."""
    if min((*lengths, *decoding, chunk), default=0) < 1 or not lengths:
        raise PlanError(
            f"a prefill needs prompts and a chunk of at least 1 token, got {tuple(lengths)} beside "
            f"{tuple(decoding)} and {chunk}"
        )
    if computed and not all(0 <= done < n for done, n in zip(computed, lengths, strict=True)):
        raise PlanError(
            f"of prompts of {tuple(lengths)} tokens {tuple(computed)} cannot be computed: the last "
            f"one of each is what its next token comes from"
        )
    machine = Machine(profile, topology)
    check_fits(shape, plan, machine)
    candidates = min(candidates, shape.vocabulary)
    steps: list[_Step] = []
    for size in _steps(lengths, computed or (0,) * len(lengths), decoding, chunk):
        # What follows a chunk with outputs waits for its tokens.
        follows = bool(steps) and not steps[-1].chooses
        steps.append(_price(shape, plan, machine, size, follows, candidates, beside, kv_copies))
    seconds = _run(profile, steps)
    stages = tuple(sum(step.stages[n].seconds for step in steps) for n in range(len(plan.stages)))
    busiest = stages.index(max(stages))
    spent = {bound: sum(step.stages[busiest].spent[bound] for step in steps) for bound in Bound}
    bound = max(spent, key=spent.__getitem__)
    if len(stages) == 1 and stages[0] < seconds / 2:
        bound = Bound.HOST_LINK
    return PrefillCost(seconds, sum(lengths) - sum(computed), len(steps), stages, bound)


def prompt_steps(batch: int, tokens: int, chunk: int) -> Iterator[tuple[StepRows, int, int]]:
    """The steps until every prompt has its first token: rows, sequences in it, and the most
    positions that one of them sees.

    In each step those that decode have a token, and prompts fill it up in order; when not all
    sequences found room, the first one is last in the next.
    """
    yield from _steps((tokens,) * batch, (0,) * batch, (), chunk)


def _steps(
    lengths: Sequence[int], computed: Sequence[int], decoding: Sequence[int], chunk: int
) -> Iterator[tuple[StepRows, int, int]]:
    """The same of prompts of such lengths, of which so much is computed, beside and behind
    sequences that decode already."""
    known = (*decoding, *lengths)
    at = dict(enumerate((*decoding, *computed)))
    batch = len(known)
    order = deque(range(batch))
    while any(at[number] < known[number] for number in at):
        rows, sequences, most, room = StepRows(0, 0, 0, 0), 0, 0, chunk
        left = max(chunk, OUTPUTS_MAX)
        outputs = OUTPUTS_MAX
        for number in sorted(order, key=lambda n: at[n] < known[n]):
            first, tokens = at[number], known[number]
            decodes = first >= tokens
            count = 1 if decodes else min(tokens - first, room)
            count = min(count, left)
            if not count or not outputs:
                continue
            last = first + count >= tokens
            rows += StepRows.prefill(first, count, int(last))
            room -= 0 if decodes else count
            left -= count
            outputs -= last
            at[number] += count
            sequences, most = sequences + 1, max(most, at[number])
        if sequences < batch:
            order.rotate(-1)
        yield rows, sequences, most


def _price(
    shape: ModelShape,
    plan: Plan,
    machine: Machine,
    size: tuple[StepRows, int, int],
    follows: bool,
    candidates: int,
    beside: Sequence[int],
    kv_copies: int,
) -> _Step:
    """One step; `follows` the one before, which is still under way."""
    rows, sequences, context = size
    by_stage = stage_pieces(shape, plan, machine, rows, beside, kv_copies)
    stages = [price_stage(p, plan, n, candidates) for n, p in enumerate(by_stage)]
    if machine.contended and len(stages) > 1:
        stages = _beside_another(shape, plan, machine, rows, stages, follows, candidates, kv_copies)
    return _Step(
        stages=stages,
        handovers=handovers(by_stage, plan),
        choose_s=by_stage[-1].choose(plan.voters, plan.embedders),
        host=step_messages(plan, machine.profile, rows, sequences, context, candidates),
        chooses=rows.outputs > 0,
    )


def _beside_another(
    shape: ModelShape,
    plan: Plan,
    machine: Machine,
    rows: StepRows,
    alone: list[StagePrice],
    follows: bool,
    candidates: int,
    kv_copies: int,
) -> list[StagePrice]:
    """Prices of stages while another one has the other chunk: in the way of each for as much of the
    time as it computes.  A chunk that follows none is alone on its way in, and one that none can
    follow on its way out."""
    # How far apart chunks are: the slowest stage, or two of them take turns with all.
    times = [stage.seconds for stage in alone]
    apart_s = max(max(times), sum(times) / STEPS_AHEAD)
    prices = []
    for n, price in enumerate(alone):
        way_out = 2 * n >= len(alone)
        if rows.outputs if way_out else not follows:
            prices.append(price)
            continue
        parts = [0.0 if m == n else other.computing / apart_s for m, other in enumerate(alone)]
        most = max(sum(parts), 1.0)
        mixed = price
        for m, part in enumerate(parts):
            if part:
                both = plan.stages[n].cards + plan.stages[m].cards
                pieces = Pieces(shape, machine, rows, both, kv_copies)
                beside = price_stage(pieces, plan, n, candidates)
                mixed = mixed.plus(beside, part / most).plus(price, -part / most)
        prices.append(mixed)
    return prices


def _run(profile: Profile, steps: Sequence[_Step]) -> float:
    """When the answers of the last step are in."""
    rate = profile.host_link_bytes_per_s
    back: list[float] = []  # by step, when the host has its answers
    done = [0.0] * len(steps[0].stages)  # by stage, when its cards are done with a step
    link_free = 0.0
    for number, step in enumerate(steps):
        submitted = back[number - STEPS_AHEAD] if number >= STEPS_AHEAD else 0.0
        submitted = max(submitted, link_free)
        if rate:
            link_free = submitted + step.host.bytes_to_cards / rate
        begins = [
            max(before, submitted + message_s) + profile.step_s
            for before, message_s in zip(done, step.host.begin_s, strict=True)
        ]
        at = begins[0] + step.stages[0].seconds
        for n, handover in enumerate(step.handovers):
            # The senders are done when it has left.
            done[n] = at + handover.first_s - min(profile.intercard_latency_s, handover.first_s)
            at += handover.seconds
            at = max(at, begins[n + 1] + profile.command_s) + step.stages[n + 1].seconds
        done[-1] = at = at + step.choose_s
        if step.chooses:
            done[0] = at
        back.append(at + step.host.end_s)
    return back[-1]
