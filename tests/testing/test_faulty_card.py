# SPDX-License-Identifier: Apache-2.0
"""What a card does that has no way of its own to fail: as the contract lets the host see it.

That a card around another one changes nothing else is the conformance suite's business.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spanker.device.base import Completion
from spanker.errors import (
    CardAbortedError,
    CardLinkError,
    CardLostError,
    CardMemoryError,
)
from spanker.testing.faulty_card import FaultyCard

sys.path.append(str(Path(__file__).parents[1] / "actors"))
from fake_device import FakeDevice


class Bench:
    """A card that computes nothing, within one that fails, and a clock by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[float, Callable[[], None]]] = []
        self.submitted: list[int] = []
        self.body = FakeDevice(3)
        self.card: Any = FaultyCard(
            self.body,
            lambda: self.now,
            lambda when, call: self.calls.append((when, call)),
            self.submitted.append,
        )

    def submit(self, count: int = 1) -> list[int]:
        return [self.card.submit(1, b"") for _ in range(count)]

    def pass_to(self, now: float) -> None:
        self.now = now
        for when, call in tuple(self.calls):
            if when <= now:
                self.calls.remove((when, call))
                call()

    @property
    def readable(self) -> bool:
        poll = select.poll()
        poll.register(self.card.completion_fd, select.POLLIN)
        return bool(poll.poll(0))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.card.close()


def test_nothing_is_changed_until_something_fails(bench: Bench) -> None:
    assert bench.submit(2) == [1, 2] and bench.submitted == [1, 2]
    assert not bench.readable and bench.card.completions() == []
    bench.body.finish()
    assert bench.readable
    assert bench.card.completions() == [Completion(1, 1000, None)]
    assert not bench.readable
    assert bench.card.counters() == bench.body.counters()
    assert bench.card.buffers is bench.body.buffers
    with pytest.raises(AttributeError):
        _ = bench.card.nothing_like_this


@pytest.mark.parametrize("fault", ["kill", "reset", "fail_memory"])
def test_a_lost_card_gives_back_what_it_held_and_does_nothing_more(
    bench: Bench, fault: str
) -> None:
    bench.submit(2)
    bench.body.finish()
    bench.card.fail_at(fault)
    assert bench.readable
    done = bench.card.completions()
    assert [(c.fence, type(c.error)) for c in done] == [(1, CardLostError), (2, CardLostError)]
    assert not bench.body.calls.count("alloc")
    for call in (
        lambda: bench.card.alloc(64),
        lambda: bench.card.submit(1, b""),
        lambda: bench.card.abort(2),
        lambda: bench.card.counters(),
        lambda: bench.card.completions(),
        lambda: bench.card.info,
        lambda: bench.card.trace(0),
    ):
        with pytest.raises(CardLostError, match="card 3"):
            call()


def test_a_hung_card_accepts_answers_and_does_nothing(bench: Bench) -> None:
    bench.submit(2)
    bench.card.hang()
    assert bench.submit() == [3]
    bench.body.finish()
    assert bench.card.completions() == []
    before = bench.card.counters()
    assert before.queued == 3 and before.waiting_for is None
    assert bench.card.counters().progress == before.progress
    assert bench.card.alloc(64) == 1
    # An abort brings all of it back, and what the body still does of it is nobody's.
    bench.card.abort(2)
    assert bench.readable
    done = bench.card.completions()
    assert [(c.fence, type(c.error)) for c in done] == [(n, CardAbortedError) for n in (1, 2, 3)]
    assert bench.card.completions() == []
    # It hangs as before.
    assert bench.submit() == [4] and bench.card.completions() == []


def test_a_slow_card_takes_so_much_longer_and_is_not_taken_for_hung(bench: Bench) -> None:
    bench.card.slow(3.0)
    bench.submit(2)
    bench.now = 1.0
    bench.body.finish()
    assert bench.card.completions() == []
    first, second = bench.card.counters(), bench.card.counters()
    assert second.progress > first.progress and second.queued == 2
    bench.pass_to(2.9)
    assert bench.card.completions() == []
    bench.pass_to(3.0)
    assert bench.readable and [c.fence for c in bench.card.completions()] == [1]
    # The second began when the first was done.
    bench.now = 4.0
    bench.body.finish()
    assert bench.card.completions() == []
    bench.pass_to(6.0)
    assert [c.fence for c in bench.card.completions()] == [2]
    bench.card.slow(1.0)
    bench.submit()
    bench.body.finish()
    assert [c.fence for c in bench.card.completions()] == [3]


def test_an_abort_does_not_wait_for_a_slow_card(bench: Bench) -> None:
    bench.card.slow(10.0)
    bench.submit()
    bench.now = 1.0
    bench.body.finish()
    assert bench.card.completions() == []
    bench.card.abort(2)
    assert bench.readable and [c.fence for c in bench.card.completions()] == [1]


def test_the_next_allocations_find_no_room(bench: Bench) -> None:
    bench.card.starve(2)
    for _ in range(2):
        with pytest.raises(CardMemoryError, match="card 3: no room for 64 bytes"):
            bench.card.alloc(64)
    assert bench.card.alloc(64) == 1


def test_a_completion_may_be_wrong_or_blame_a_link(bench: Bench) -> None:
    bench.submit(4)
    bench.card.complete_wrongly()
    bench.card.fail_links(2, 1)
    for _ in range(4):
        bench.body.finish()
    done = bench.card.completions()
    assert [c.fence for c in done] == [2, 2, 3, 4]
    assert [type(c.error) for c in done] == [type(None), CardLinkError, CardLinkError, type(None)]
    assert "from card 1" in str(done[1].error)


def test_it_is_told_what_its_body_can_do_itself() -> None:
    class Able(FakeDevice):
        def kill(self, command: int | None = None) -> None:
            self.calls.append(f"kill {command}")

    body = Able(1)
    card: Any = FaultyCard(body, float, lambda when, call: None)
    assert card.native("kill") and not card.native("hang") and card.has("hang")
    card.fail_at("kill", 7)
    card.fail_at("kill")
    assert body.calls == ["kill 7", "kill None"]
    card.close()


def test_a_card_that_is_away_cannot_be_reopened(bench: Bench) -> None:
    reopened = []
    bench.body.reopen = lambda: reopened.append(True)  # type: ignore[method-assign]
    bench.submit()
    bench.card.away = True
    bench.card.kill()
    bench.card.close()
    with pytest.raises(CardLostError, match="card 3 is away"):
        bench.card.reopen()
    bench.card.away = False
    bench.body._pipe = None
    bench.card.reopen()
    assert reopened == [True]
    assert bench.card.completions() == [] and bench.card.alloc(64) == 1
