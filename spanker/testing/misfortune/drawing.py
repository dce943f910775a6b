# SPDX-License-Identifier: Apache-2.0
"""Draws scenarios: a pure function of a seed.

What is rare in life is not rare here: small pages and queues, clients who leave, two faults at one
moment, a fault while the last one is dealt with.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import attrs

from spanker.sched.layout import card_bytes
from spanker.sched.limits import step_limits
from spanker.sched.plan import ModelShape, Plan, tensor_pipeline
from spanker.testing.misfortune.knobs import turned
from spanker.testing.misfortune.models import MODELS, shape_of
from spanker.testing.misfortune.scenario import (
    FATAL,
    Client,
    Deed,
    Knobs,
    Moment,
    Scenario,
    Way,
    What,
)

CARDS_MAX = 5
CLIENTS_MAX = 6
FAULTS_MAX = 4


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(f"misfortune {seed}")
    cards = rng.choices(range(1, CARDS_MAX + 1), (3, 8, 6, 2, 1))[0]
    model = rng.choice([name for name in MODELS if name != "blocks"])
    profile = rng.choices(("instant", "distant", "native", "rev-a", "straggler"), (10, 5, 2, 1, 1))[
        0
    ]
    plan = _plan(rng, cards, shape_of(model))
    knobs = _knobs(rng)
    ctx = rng.choice((32, 48, 96, 128))
    chunk = rng.choice((5, 16, 64)) if knobs.outputs_max < 64 else rng.choice((16, 64))
    step_s = 1e-3 if profile in ("instant", "distant") else 0.2e-3
    clients = tuple(
        _client(rng, ctx, step_s)
        for _ in range(rng.choices((1, 2, 3, 4, CLIENTS_MAX), (5, 6, 4, 2, 1))[0])
    )
    deeds = _deeds(rng, cards, clients, step_s)
    if any(deed.what is What.LOAD for deed in deeds):
        late = rng.randrange(len(clients))
        clients = tuple(
            attrs.evolve(client, model=1) if number == late else client
            for number, client in enumerate(clients)
        )
    spec = f"virtual:{cards}:16MiB"
    kv_tokens = rng.choice((None, ctx, 2 * ctx, 3 * ctx))
    if rng.random() < 0.3:
        spec = _tight(rng, cards, shape_of(model), plan, ctx, chunk, knobs)
        kv_tokens = None
    made = Scenario(
        seed=seed,
        cards=spec,
        profile=profile,
        model=model,
        plan=plan,
        ctx=ctx,
        kv_tokens=kv_tokens,
        prompt_chunk=chunk,
        hang_timeout_s=rng.choice((0.5, 1.0, 5.0)),
        recover=rng.random() < 0.93,
        knobs=knobs,
        clients=clients,
        deeds=deeds,
    )
    # Drawn for itself, so that what is above stays what it was when something is added here.
    return _more(random.Random(f"more misfortune {seed}"), made, cards, step_s)


def _more(rng: random.Random, made: Scenario, cards: int, step_s: float) -> Scenario:
    """How cards are linked, what is computed again, stop strings, cards that join, and what
    happens to several cards at once."""
    roomy = made.cards == f"virtual:{cards}:16MiB"
    if cards > 1 and rng.random() < 0.15:
        made = attrs.evolve(made, links=rng.choice(("line", "ring", "none", "none")))
    if roomy and not made.plan.endswith("pp2") and made.plan != "pp" and rng.random() < 0.08:
        made = attrs.evolve(made, model="blocks")
    if rng.random() < 0.15:
        made = attrs.evolve(made, audit_every=rng.choice((1, 2, 5)))
    if rng.random() < 0.15:
        made = attrs.evolve(made, rebalance=True)
    # Its own, for the same reason.
    copies = random.Random(f"copied misfortune {made.seed}")
    if roomy and cards > 1 and _keeps_copies(made.plan, cards) and copies.random() < 0.4:
        made = attrs.evolve(made, kv_copies=1)
    clients = [
        attrs.evolve(client, stop_at=rng.randrange(client.tokens_max))
        if client.tokens_max and rng.random() < 0.15
        else client
        for client in made.clients
    ]
    items = sum(client.tokens_max or 2 for client in clients)
    deeds = list(made.deeds)
    if rng.random() < 0.15:
        at = _moment(rng, items, step_s, events=bool(deeds))
        deeds.append(Deed(at, What.JOIN))
        if rng.random() < 0.4:
            # At once, or a while later, perhaps to the new one.
            then_s = round(at.then_s + rng.choice((0.0, rng.random() * 10 * step_s)), 6)
            card = rng.randrange(cards + 1)
            deeds.append(Deed(attrs.evolve(at, then_s=then_s), What.KILL, card))
    if rng.random() < 0.12:
        at = _moment(rng, items, step_s, events=bool(deeds))
        deeds.append(Deed(at, What.INJECT, text=_of_several(rng, cards)))
    return attrs.evolve(made, clients=tuple(clients), deeds=tuple(deeds))


def _keeps_copies(plan: str, cards: int) -> bool:
    """Whether a plan of so many cards, one of `_plan`, has two or more in each stage."""
    return plan in ("tp", "auto") or (plan.startswith(("tp", "dp2xtp")) and cards > 3)


def _of_several(rng: random.Random, cards: int) -> str:
    """A fault of a fault plan that is not about one channel."""
    some = ",".join(map(str, sorted(rng.sample(range(cards), rng.randint(1, cards)))))
    lasts_s = rng.choice(("0.002", "0.3", "9"))
    texts = [
        f"stall host@token:1 for {lasts_s}s",
        f"partition {some}@token:1 for {lasts_s}s",
        f"wrong-completion {rng.randrange(cards)}@token:1",
    ]
    if cards > 1:
        a, b = rng.sample(range(cards), 2)
        away_s = rng.choice(("0.002", "0.3", "1.5"))
        texts.append(f"flap {a}-{b}@token:1 for {away_s}s {rng.randint(1, 3)} times")
    return rng.choice(texts)


def _plan(rng: random.Random, cards: int, shape: ModelShape) -> str:
    plans = ["tp"] * 4 + ["auto"] * 2 + [f"dp{cards}"]
    if cards <= len(shape.layers):
        plans += ["pp"]
    if cards % 2 == 0:
        plans += [f"dp2xtp{cards // 2}"]
        if len(shape.layers) > 1:
            plans += [f"tp{cards // 2}xpp2"] * 2
    return rng.choice(plans)


def _knobs(rng: random.Random) -> Knobs:
    if rng.random() < 0.25:
        return Knobs()
    return Knobs(
        run_ahead=rng.choice((1, 2, 4, 64)),
        score_ahead=rng.choice((1, 2, 4)),
        page_positions=rng.choice((16, 32, 64)),
        outputs_max=rng.choice((1, 2, 4, 64)),
        candidates=rng.choice((1, 4, 64)),
        steps_ahead=rng.choice((1, 2, 2)),
    )


def _moment(rng: random.Random, items: int, step_s: float, *, events: bool = False) -> Moment:
    """Anywhere in a run that brings so many items; within a step, at its end, or a while later."""
    then_s = rng.choice((0.0, rng.random() * step_s, rng.random() * 10 * step_s))
    if events and rng.random() < 0.25:
        return Moment(events=rng.randint(1, 3), then_s=round(then_s, 6))
    come = 0 if rng.random() < 0.15 else rng.randrange(items + 1)
    if not come:
        # While models are loaded, too.
        then_s = rng.choice((0.0, rng.random() * 20 * step_s, rng.random() * 5e-3))
    return Moment(come, 0, round(then_s, 6))


def _client(rng: random.Random, ctx: int, step_s: float) -> Client:
    score = rng.random() < 0.15
    length = rng.choice([n for n in (1, 2, 9, 17, 17, 40) if n < ctx])
    tokens = rng.choices((1, 2, 4, 6, 9, 18), (1, 2, 5, 5, 3, 1))[0]
    made = Client(
        start=Moment() if rng.random() < 0.7 else _moment(rng, 12, step_s),
        prompt_first=rng.choice((0, 100)),
        prompt_length=length,
        tokens_max=0 if score else tokens,
        logits=not score and rng.random() < 0.4,
        score=score,
    )
    if not score and rng.random() < 0.4:
        made = attrs.evolve(
            made,
            temperature=rng.choice((0.8, 2.0)),
            top_p=rng.choice((1.0, 0.9)),
            sampling_seed=rng.choice((0, 7)),
        )
    if rng.random() < 0.25:
        made = attrs.evolve(made, pause_s=round(rng.choice((0.5, 3, 50)) * step_s, 6))
    if rng.random() < 0.25:
        made = attrs.evolve(
            made,
            leave_after=rng.randrange(tokens + 1),
            leave_by=Way.CLOSE if score else rng.choice(list(Way)),
            leave_s=round(rng.random() * 3 * step_s, 6),
        )
    if rng.random() < 0.08:
        made = attrs.evolve(made, deadline_s=round(rng.random() * 30 * step_s, 6))
    return made


def _deeds(
    rng: random.Random, cards: int, clients: Sequence[Client], step_s: float
) -> tuple[Deed, ...]:
    items = sum(client.tokens_max or 2 for client in clients)
    deeds: list[Deed] = []
    for _ in range(rng.choices(range(FAULTS_MAX + 1), (4, 9, 4, 2, 1))[0]):
        at = _moment(rng, items, step_s, events=bool(deeds))
        if deeds and rng.random() < 0.2:
            at = deeds[-1].at
        deeds.append(_fault(rng, at, cards, step_s))
        if deeds[-1].what in FATAL and rng.random() < 0.25:
            back = Moment(at.items, at.events + 1, round(rng.random() * 50 * step_s, 6))
            deeds.append(Deed(back, What.ADMIT, deeds[-1].card))
    if rng.random() < 0.3:
        card = rng.randrange(cards)
        at = _moment(rng, items, step_s)
        deeds.append(Deed(at, What.DRAIN, card))
        if rng.random() < 0.6:
            more = attrs.evolve(at, items=at.items + rng.randrange(6), then_s=at.then_s + step_s)
            deeds.append(Deed(more, What.ADMIT, card))
    if rng.random() < 0.12:
        # Clients wait for it, so that it must not wait for their items.
        deeds.append(Deed(_moment(rng, 0, step_s), What.LOAD))
    return tuple(deeds)


def _fault(rng: random.Random, at: Moment, cards: int, step_s: float) -> Deed:
    card = rng.randrange(cards)
    peer = rng.choice([c for c in range(cards) if c != card]) if cards > 1 else 0
    what = rng.choices((*_ONE_CARD, *_LINKS), (6, 6, 2, 2, 2, 2, 2, 3, 3))[0]
    if what in _LINKS and cards == 1:
        what = What.KILL
    if what is What.SLOW:
        return Deed(at, what, card, value=rng.choice((2, 20)))
    if what is What.STARVE:
        return Deed(at, what, card, value=rng.choice((1, 3)))
    if what is What.CORRUPT:
        return Deed(at, what, card, peer, value=rng.choice((1, 5, 30)))
    if what is What.CUT:
        for_s = rng.choice((None, round(rng.random() * 5 * step_s, 6), 0.7, 5.0))
        return Deed(at, what, card, peer, for_s=for_s)
    if what is What.INJECT:
        words, lasts = rng.choice(_CHANNELS)
        lasts = lasts.format(rng.choice(("0.002", "0.3", "9")))
        return Deed(at, what, card, text=f"{words} channel:{card}@token:1{lasts}")
    return Deed(at, what, card)


_ONE_CARD = (
    What.KILL,
    What.HANG,
    What.RESET,
    What.ECC,
    What.SLOW,
    What.STARVE,
    What.INJECT,
)
_LINKS = (What.CUT, What.CORRUPT)
_CHANNELS = (
    ("stall", " for {}s"),
    ("drop", ""),
    ("duplicate", ""),
    ("reorder", ""),
    ("disconnect", ""),
)


def _tight(
    rng: random.Random,
    cards: int,
    shape: ModelShape,
    plan: str,
    ctx: int,
    chunk: int,
    knobs: Knobs,
) -> str:
    """Cards that hold the model by its plan, but perhaps not when there are fewer; one of them may
    have room for all."""
    need = _least_bytes(shape, plan, cards, ctx, chunk, knobs)
    some = round(need * rng.choice((1.02, 1.3, 1.8)))
    if cards > 1 and rng.random() < 0.4:
        return f"virtual:{cards - 1}:{some},virtual:1:16MiB"
    return f"virtual:{cards}:{some}"


@functools.lru_cache(1024)
def _least_bytes(
    shape: ModelShape, plan: str, cards: int, ctx: int, chunk: int, knobs: Knobs
) -> int:
    """What the card takes that takes most, with KV for one context."""
    with turned(knobs):
        limits = step_limits(shape, ctx, chunk)
    limits = attrs.evolve(limits, kv_pages=-(-ctx // limits.page_positions))
    made = _replica(shape, plan, cards)
    return max(card_bytes(shape, made, card, limits) for card in made.cards)


def _replica(shape: ModelShape, plan: str, cards: int) -> Plan:
    """One replica of the plan; of `auto` that which takes least of each card."""
    if plan == f"dp{cards}":
        return tensor_pipeline(shape, 1, 1)
    if plan.startswith("dp2"):
        return tensor_pipeline(shape, cards // 2, 1)
    if plan == "pp":
        return tensor_pipeline(shape, 1, cards)
    if plan.endswith("xpp2"):
        return tensor_pipeline(shape, cards // 2, 2)
    return tensor_pipeline(shape, cards, 1)
