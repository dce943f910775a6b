# SPDX-License-Identifier: Apache-2.0
"""What must hold, whatever happens: right answers or an error that has its reason, and nothing
left.

Each function looks at a World and tells it of violations.  What of, a person reads.
"""

from __future__ import annotations

import trio

from spanker.actors.client import CardClient
from spanker.actors.steps import LoadedModel
from spanker.device.spec import parse_fleet
from spanker.device.virtual.card import VirtualCard
from spanker.errors import (
    CardCommandError,
    CardHungError,
    CardLinkDownError,
    CardLinkError,
    CardLostError,
    CardMemoryError,
    ConfigError,
    PlanError,
    SpankerError,
)
from spanker.fleet import Model
from spanker.sched.layout import card_bytes
from spanker.testing.misfortune.answers import (
    answer_to,
    number_of_model,
    question_of,
    stopped_after,
)
from spanker.testing.misfortune.outcome import Got
from spanker.testing.misfortune.scenario import Client, Deed, Scenario, What
from spanker.testing.misfortune.world import World

# With so much any card holds both models.
PLENTY_BYTES = 8 << 20
_ANY_CARDS = ("auto", "tp", "pp")


# --- errors -----------------------------------------------------------------------------------


def _is_plenty(scenario: Scenario) -> bool:
    return min(spec.ddr_bytes for spec in parse_fleet(scenario.cards)) >= PLENTY_BYTES


def _nothing_left(world: World) -> bool:
    """Whether no card need have been usable at some time by now; one that joins may have come too
    late."""
    every = set(range(len(parse_fleet(world.scenario.cards))))
    return every <= world.drained.union(world.ever_struck)


def _may_fail_with(world: World, error: SpankerError) -> bool:
    """Whether a request may get this error: it has its reason in what has happened by now."""
    changed = world.ever_struck or world.drained or What.CUT in world.done
    if isinstance(error, CardMemoryError):
        return bool(changed) and (What.STARVE in world.done or not _is_plenty(world.scenario))
    if isinstance(error, CardLinkDownError):
        return What.CUT in world.done
    if isinstance(error, CardLinkError):
        return What.CORRUPT in world.done
    if isinstance(error, CardLostError | CardHungError):
        return _nothing_left(world) or bool(world.ever_struck and not world.scenario.recover)
    return False


def _may_not_load(world: World, error: SpankerError, plan: str) -> bool:
    if _may_fail_with(world, error):
        return True
    if isinstance(error, CardMemoryError):
        return What.STARVE in world.done or not _is_plenty(world.scenario)
    if plan in _ANY_CARDS:
        return False
    struck = bool(world.ever_struck)
    out = struck or bool(world.drained) or What.CUT in world.done
    return (struck and isinstance(error, CardLostError | CardHungError)) or (
        out and isinstance(error, PlanError)
    )


def check_load(world: World, error: SpankerError, plan: str) -> None:
    """A model could not be loaded."""
    if not _may_not_load(world, error, plan):
        world.violate(f"load: {type(error).__name__} without a reason: {error}")


def check_deed(world: World, deed: Deed, error: SpankerError) -> None:
    """A wish was not granted."""
    if deed.what is What.LOAD:
        check_load(world, error, "auto")
        return
    fine = _may_fail_with(world, error)
    if isinstance(error, CardLostError | CardHungError):
        fine = bool(world.ever_struck) or _nothing_left(world)
    if deed.what is What.ADMIT:
        # Neither drained nor lost, or a card that cannot be opened again.
        fine = fine or isinstance(error, ConfigError | CardCommandError)
    if not fine:
        world.violate(f"{deed.what.value}: {type(error).__name__} without a reason: {error}")


def check_drained(world: World, card: int) -> None:
    """A card is said to be drained, unless somebody has admitted it meanwhile."""
    if card not in world.fleet._coordinator.drained:
        return
    for model in filter(None, world.models):
        if model._replicas.alive and card in model.plan.cards:
            world.violate(f"card {card} is drained, but a model is on it: {model.plan.cards}")


# --- answers ------------------------------------------------------------------------------------


def check_clients(world: World) -> None:
    """Every client has got what it asked for, or a part of that and a reason."""
    for number, (client, got) in enumerate(zip(world.scenario.clients, world.got, strict=True)):
        for what in _wrong(world, client, got):
            world.violate(f"client {number}: {what}")


def _wrong(world: World, client: Client, got: Got) -> list[str]:
    if got.ended_s is None:
        return ["was never answered" if got.began_s is not None else "never began"]
    found = []
    right = answer_to(question_of(world.scenario, client))
    first = 0 if client.score else client.prompt_length
    if got.positions != [*range(first, first + len(got.positions))]:
        found.append(f"positions {got.positions}")
    if not client.score:
        for place, (token, expected) in enumerate(zip(got.ids, right.ids, strict=False)):
            if token != expected:
                found.append(f"token {place} is {token}, expected {expected}")
                break
    for place, (mine, its) in enumerate(zip(got.logits, right.logits, strict=False)):
        if mine != its:
            found.append(f"the logits of item {place} differ")
            break
    wants = wanted(world.scenario, client)
    if len(got.positions) > wants:
        found.append(f"{len(got.positions)} items, asked for {wants}")
    if got.error is not None:
        if not _may_fail_with(world, got.error) and not _is_of_load(world, client, got.error):
            found.append(f"{type(got.error).__name__} without a reason: {got.error}")
    elif got.left is None:
        if len(got.positions) != wants:
            found.append(f"ended ({got.finish}) after {len(got.positions)} items of {wants}")
        elif got.finish != _finish(world.scenario, client):
            found.append(f"ended because of {got.finish}")
    return found


def _is_of_load(world: World, client: Client, error: SpankerError) -> bool:
    """Whether its model is not there: `check_load` has seen to the reason."""
    return world.models[number_of_model(world.scenario, client)] is None


def wanted(scenario: Scenario, client: Client) -> int:
    """How many items a client gets that stays."""
    if client.score:
        return client.prompt_length
    most = min(client.tokens_max, scenario.ctx - client.prompt_length)
    stopped = stopped_after(scenario, client)
    return most if stopped is None else min(most, stopped)


def _finish(scenario: Scenario, client: Client) -> str:
    stopped = stopped_after(scenario, client)
    if stopped is not None and stopped <= wanted(scenario, client):
        return "stop"
    if client.score or client.tokens_max <= scenario.ctx - client.prompt_length:
        return "length"
    return "context"


# --- nothing left -------------------------------------------------------------------------------


def is_idle(world: World) -> bool:
    """Whether nothing is under way or held for a sequence."""
    coordinator = world.fleet._coordinator
    return (
        all(
            not (session.stats.running or session.stats.waiting or session.stats.kv_pages_used)
            for model in filter(None, world.models)
            for session in model._replicas.sessions
        )
        and not coordinator._locks._taken
        and not _loading(world)
        and not any(client._waiting for client in _clients(world))
    )


def _clients(world: World) -> list[CardClient]:
    """Those of cards that nothing has happened to: what others were asked may have got lost."""
    clients = world.fleet._coordinator.clients
    return [client for client in clients if client.number not in world.ever_struck]


def _loading(world: World) -> bool:
    """Whether a model is being put somewhere."""
    return world.fleet._coordinator._load_lock.locked() or world.fleet._load_lock.locked()


def check_idle(world: World) -> None:
    """Everybody has gone, and has taken everything along."""
    coordinator = world.fleet._coordinator
    for model in filter(None, world.models):
        stats = model.stats
        if stats.running or stats.waiting or stats.kv_pages_used:
            world.violate(f"nobody asks for anything, but {stats}")
        for session in model._replicas.sessions:
            if sorted(session.pool._free) != [*range(session.pool.total)]:
                world.violate(f"free KV pages: {sorted(session.pool._free)}")
    locks = coordinator._locks
    if locks._taken or locks._waiters:
        world.violate(f"cards {sorted(locks._taken)} are locked, {locks._waiters} wait")
    if _loading(world):
        world.violate("a lock of loads is held")
    for client in _clients(world):
        if client._waiting or client._unwritten:
            world.violate(f"card {client.number} has requests without replies")


def check_counters(world: World) -> None:
    """What is counted is what was done."""
    for number, model in enumerate(world.models):
        if model is None:
            continue
        mine = [
            (client, got)
            for client, got in zip(world.scenario.clients, world.got, strict=True)
            if number_of_model(world.scenario, client) == number
        ]
        made = sum(len(got.ids) for _, got in mine)
        stats = model.stats
        if stats.generated_tokens < made:
            world.violate(f"{stats.generated_tokens} tokens counted, {made} delivered")
        # What is generated behind a stop string nobody takes.
        if all(got.left is None and client.stop_at is None for client, got in mine):
            if stats.generated_tokens != made:
                world.violate(f"{stats.generated_tokens} tokens counted, {made} delivered")
            prompts = sum(client.prompt_length for client, _ in mine)
            complete = all(got.error is None for _, got in mine)
            if stats.prompt_tokens > prompts or (complete and stats.prompt_tokens != prompts):
                world.violate(f"{stats.prompt_tokens} prompt tokens counted, {prompts} given")
        if stats.steps < max((len(got.ids) for _, got in mine), default=0):
            world.violate(f"{stats.steps} steps for so many tokens")
    health = world.fleet.health()
    if {card for card, _ in health.lost} != set(world.lost):
        world.violate(f"lost by events {sorted(world.lost)}, by health {health.lost}")


async def check_memory(world: World) -> None:
    """Cards hold what their models take, and nothing once these are unloaded."""
    coordinator, fleet = world.fleet._coordinator, world.fleet
    out = world.ever_struck.union(world.lost)
    whole = [card for card in coordinator._every_card if card not in out]
    held = dict.fromkeys(whole, 0)
    replicas = [
        replica
        for model in filter(None, world.models)
        for replica in _placed(model)
        if replica is not None
    ]
    for replica in replicas:
        for card in replica.plan.cards:
            if card in held:
                held[card] += card_bytes(
                    replica.model.shape,
                    replica.plan,
                    card,
                    replica.limits,
                    granule=coordinator.cards[card].ddr_granule,
                )
    for card in whole:
        counters = fleet.devices[card].counters()
        if counters.ddr_used_bytes != held[card]:
            world.violate(
                f"card {card} has {counters.ddr_used_bytes:,} bytes in use, its models take "
                f"{held[card]:,}"
            )
        if counters.queued:
            world.violate(f"card {card} has {counters.queued} steps queued")
    for replica in replicas:
        await coordinator.unload(replica)
    for card in whole:
        device = fleet.devices[card]
        left = device.counters().ddr_used_bytes
        programs = len(device._programs) if isinstance(device, VirtualCard) else 0
        if left or programs:
            world.violate(f"card {card}, all unloaded: {left:,} bytes and {programs} programs")


def _placed(model: Model) -> list[LoadedModel | None]:
    placement = model._replicas.sessions[0]._placement
    return [] if placement is None else list(placement.replicas)


def check_always(world: World) -> None:
    """What holds between any two turns of the scheduler: no KV page has two owners, and none that a
    step under way writes is free."""
    for model in filter(None, world.models):
        for session in model._replicas.sessions:
            free = session.pool._free
            held = [page for sequence in session._running for page in sequence.pages]
            if len(set(held).union(free)) != len(held) + len(free):
                world.violate(f"KV pages with two owners: held {held}, free {free}")
            for batch in session._flights:
                for sequence, step in batch:
                    if not set(step.pages) <= set(sequence.pages):
                        world.violate(f"a step is under way on KV pages {step.pages}, given back")


async def settle(world: World, within_s: float) -> None:
    """Wait until everything that goes by itself has gone."""
    with trio.move_on_after(within_s):
        while not is_idle(world):  # noqa: ASYNC110
            await trio.sleep(0.01)
