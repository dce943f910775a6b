# SPDX-License-Identifier: Apache-2.0
"""What a test asserts of a fleet that things happen to: nothing is left behind, and the answers are
the same."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import trio

from spanker.errors import SpankerError
from spanker.testing.fault_plan import FaultPlan
from spanker.testing.injection import Injection, faulty_fleet
from spanker.testing.watching import WatchedModel
from spanker.values import Value

if TYPE_CHECKING:
    from spanker.fleet import Fleet, Model

T = TypeVar("T")

# How long what ends may take to end.
SETTLE_S = 2.0
_LOOK_S = 0.001

MakeFleet = Callable[[FaultPlan], AbstractAsyncContextManager[tuple["Fleet", Injection]]]


# --- leaks --------------------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class Held(Value):
    """What the process holds, and what is on the cards of a fleet beyond its models' plans."""

    tasks: int
    threads: frozenset[int | None]
    native_threads: int
    descriptors: frozenset[str]
    card_bytes: tuple[tuple[int, int], ...] = ()
    kv_pages: int = 0
    sequences: int = 0


async def held(fleet: Fleet | None = None) -> Held:
    """What is held now; with a fleet, on its cards too.  Bytes on a card are what it has in use
    less what the plans of the fleet's models take of it, as models move when cards are lost."""
    card_bytes: tuple[tuple[int, int], ...] = ()
    kv_pages = sequences = 0
    if fleet is not None:
        card_bytes = await _unplanned(fleet)
        for model in fleet._models:
            stats = model.stats
            kv_pages += stats.kv_pages_used
            sequences += stats.running + stats.waiting
    return Held(
        tasks=trio.lowlevel.current_statistics().tasks_living,
        threads=frozenset(thread.ident for thread in threading.enumerate()),
        native_threads=len(os.listdir("/proc/self/task")),
        descriptors=open_descriptors(),
        card_bytes=card_bytes,
        kv_pages=kv_pages,
        sequences=sequences,
    )


async def assert_nothing_leaked(before: Held, fleet: Fleet | None = None) -> None:
    """AssertionError, saying what, if more is held than before: tasks, threads, descriptors, and
    with a fleet bytes on its cards, KV pages and sequences.  Waits SETTLE_S at most for what is
    just ending."""
    deadline = trio.current_time() + SETTLE_S
    left = _left(before, await held(fleet))
    if left:
        gc.collect()
    while left and trio.current_time() < deadline:
        await trio.sleep(_LOOK_S)
        left = _left(before, await held(fleet))
    if left:
        raise AssertionError("left behind: " + "; ".join(left))


@contextlib.asynccontextmanager
async def nothing_leaked(fleet: Fleet | None = None) -> AsyncIterator[None]:
    """AssertionError if what happens within the block leaves anything behind, as
    `assert_nothing_leaked`: around the opening of fleets, or, given an open one, around its use.
    An error of the block itself is raised unchanged."""
    before = await held(fleet)
    yield
    await assert_nothing_leaked(before, fleet)


def _left(before: Held, now: Held) -> list[str]:
    """In words, what there is more of."""
    left = []
    if now.tasks > before.tasks:
        left.append(f"{now.tasks - before.tasks} tasks")
    threads = [t.name for t in threading.enumerate() if t.ident in now.threads - before.threads]
    if threads:
        left.append(f"threads {', '.join(threads)}")
    elif now.native_threads > before.native_threads:
        left.append(f"{now.native_threads - before.native_threads} native threads")
    descriptors = sorted(now.descriptors - before.descriptors)
    if len(now.descriptors) > len(before.descriptors):
        left.append(f"descriptors {', '.join(descriptors)}")
    known = dict(before.card_bytes)
    for card, nbytes in now.card_bytes:
        if nbytes > known.get(card, 0):
            left.append(f"{nbytes - known.get(card, 0):,} bytes on card {card}")
    if now.kv_pages > before.kv_pages:
        left.append(f"{now.kv_pages - before.kv_pages} KV pages")
    if now.sequences > before.sequences:
        left.append(f"{now.sequences - before.sequences} sequences")
    return left


def open_descriptors() -> frozenset[str]:
    """Those of this process, and where they lead: "3: /dev/null"."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.append(f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}")
    return frozenset(found)


async def _unplanned(fleet: Fleet) -> tuple[tuple[int, int], ...]:
    """By card that is not lost, the bytes in use beyond those of the models' plans."""
    from spanker.sched.layout import card_bytes

    # What collectives keep for next time is no leak.
    await fleet._make_room()
    planned: dict[int, int] = {}
    for session in fleet._sessions():
        loaded = session.loaded
        for card in loaded.plan.cards:
            planned[card] = planned.get(card, 0) + card_bytes(
                loaded.model.shape,
                loaded.plan,
                card,
                loaded.limits,
                granule=fleet.cards[card].ddr_granule,
            )
    lost = {card for card, _ in fleet.health().lost}
    return tuple(
        (stats.number, stats.ddr_used_bytes - planned.get(stats.number, 0))
        for stats in (await fleet.stats()).cards
        if stats.number not in lost
    )


# --- answers ------------------------------------------------------------------------------


async def assert_same_answer(
    make_fleet: MakeFleet | str | int,
    use: Callable[[Model], Awaitable[T]],
    faults: FaultPlan | str,
    *,
    model: str | os.PathLike[str],
    may_fail: bool = False,
    **options: Any,
) -> Injection:
    """Run `use` on a model of a fleet to which nothing happens, and of one to which faults happen;
    AssertionError where it returns something else, or where a token or a logit that was taken from
    the model differs in a bit.

    `make_fleet(faults)` opens a fleet, as `faulty_fleet` with the rest of its arguments; or it is
    the cards, and `options` are `open_fleet`'s.  Generations and scorings are compared in the order
    in which they were started; tokens of all of them count for `token:N`.  With `may_fail` the
    faults may end them with a SpankerError: then what came before it is compared.  Any other error
    is raised.  Returns what has happened.
    """
    parsed = FaultPlan.parse(faults) if isinstance(faults, str) else faults
    make = _maker(make_fleet, options)
    path = Path(model)
    expected, answers, _, error = await _run(make, use, FaultPlan(), path)
    if error is not None:
        raise error
    got, struck_answers, injection, error = await _run(make, use, parsed, path)
    happened = "\n".join(f"{time_s:10.6f} s  {line}" for time_s, line in injection.story)
    context = f"with the faults {parsed}\n{happened}"
    if error is not None and not (may_fail and isinstance(error, SpankerError)):
        raise error
    _compare(answers, struck_answers, context, whole=error is None)
    if error is None and got != expected:
        raise AssertionError(f"expected {expected!r}, got {got!r}, {context}")
    return injection


def _maker(make_fleet: MakeFleet | str | int, options: dict[str, Any]) -> MakeFleet:
    if callable(make_fleet):
        if options:
            raise TypeError(f"options go with cards, not with a function: {', '.join(options)}")
        return make_fleet
    # The best plan for a tiny model leaves cards idle, whose failure would show nothing.
    options.setdefault("plan", "tp")
    return lambda faults: faulty_fleet(make_fleet, faults, **options)


_Answers = Sequence[Sequence[tuple[int | None, bytes]]]


async def _run(
    make: MakeFleet, use: Callable[[Model], Awaitable[T]], plan: FaultPlan, path: Path
) -> tuple[T | None, _Answers, Injection, Exception | None]:
    async with make(plan) as (fleet, injection):
        watched: WatchedModel | None = None
        try:
            watched = WatchedModel(await fleet.load(path), injection.token)
            return await use(watched.face), watched.answers, injection, None
        except Exception as error:
            return None, watched.answers if watched else [], injection, error


def _compare(expected: _Answers, got: _Answers, context: str, *, whole: bool) -> None:
    if whole and len(got) != len(expected):
        raise AssertionError(f"expected {len(expected)} answers, got {len(got)}, {context}")
    for number, (want, have) in enumerate(zip(expected, got, strict=False)):
        for at, (one, other) in enumerate(zip(want, have, strict=False)):
            if one[0] != other[0]:
                raise AssertionError(
                    f"answer {number}, token {at}: expected {one[0]}, got {other[0]}, {context}"
                )
            if one[1] != other[1]:
                raise AssertionError(f"answer {number}, token {at}: its logits differ, {context}")
        if whole and len(want) != len(have):
            raise AssertionError(
                f"answer {number}: expected {len(want)} tokens, got {len(have)}, {context}"
            )
