# SPDX-License-Identifier: Apache-2.0
"""Topology as a value, and the enumeration of device nodes."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from spanker.errors import ConfigError, PlanError
from spanker.sched import Link, LinkState, Topology


def test_link_states_have_the_numbers_of_the_hardware() -> None:
    assert [(state.name, int(state)) for state in LinkState] == [
        ("DOWN", 0),
        ("TRAINING", 1),
        ("UP", 2),
        ("ERROR", 3),
    ]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 16, 256])
def test_a_mock_is_fully_meshed_and_up(n: int) -> None:
    topology = Topology.with_mock(n)
    assert topology.cards == tuple(range(n))
    assert topology.shard_count() == n
    ends = {(link.local_sail, link.remote_sail) for link in topology.links}
    assert ends == {(a, b) for a in range(n) for b in range(n) if a != b}
    assert len(topology.links) == n * (n - 1)
    assert all(link.state is LinkState.UP for link in topology.links)


@pytest.mark.parametrize("n", [-1, 257, 300])
def test_a_mock_of_too_many_or_negative_cards_is_refused(n: int) -> None:
    with pytest.raises(ConfigError, match=f"0 to 256 cards, got {n}"):
        Topology.with_mock(n)


def test_link_is_looked_up_by_direction() -> None:
    down = Link(1, 0, LinkState.DOWN)
    topology = Topology((0, 1), (Link(0, 1, LinkState.UP), down))
    assert topology.link(1, 0) is down
    assert topology.link(0, 1).state is LinkState.UP


def test_a_missing_link_is_an_error_that_names_it() -> None:
    topology = Topology((0, 1, 2), (Link(0, 1, LinkState.UP),))
    with pytest.raises(PlanError, match="no link 1 -> 0"):
        topology.link(1, 0)
    with pytest.raises(PlanError, match="no link 0 -> 9"):
        topology.link(0, 9)


@pytest.mark.parametrize(
    ("cards", "links", "message"),
    [
        ((0, 0), (), "appears twice"),
        ((0, 1), (Link(0, 0, LinkState.UP),), "link 0 -> 0 must join"),
        ((0, 1), (Link(0, 2, LinkState.UP),), "link 0 -> 2 must join"),
        ((0, 1), (Link(0, 1, LinkState.UP), Link(0, 1, LinkState.DOWN)), "0 -> 1 appears twice"),
    ],
)
def test_nonsense_is_refused(cards: tuple[int, ...], links: tuple[Link, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Topology(cards, links)


def test_a_topology_is_an_immutable_value() -> None:
    topology = Topology.with_mock(3)
    assert topology == Topology.with_mock(3)
    assert hash(topology) == hash(Topology.with_mock(3))
    assert topology != Topology.with_mock(4)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        topology.cards = ()  # type: ignore[misc]
    assert attrs.evolve(topology, links=()).links == ()


def test_enumeration_stops_at_the_first_missing_device(tmp_path: Path) -> None:
    for name in ("spankerctl", "spanker0", "spanker1", "spanker2", "spanker4"):
        (tmp_path / name).touch()
    topology = Topology.enumerate(tmp_path)
    assert topology.cards == (0, 1, 2)
    assert {link.state for link in topology.links} == {LinkState.DOWN}


def test_enumeration_looks_no_further_than_card_255(tmp_path: Path) -> None:
    for n in range(260):
        (tmp_path / f"spanker{n}").touch()
    assert Topology.enumerate(tmp_path).shard_count() == 256


def test_enumeration_without_cards_says_so_and_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "spanker1").touch()
    with pytest.raises(ConfigError, match="no Sails") as caught:
        Topology.enumerate(tmp_path)
    assert str(tmp_path / "spanker0") in str(caught.value)
    assert "module is not loaded" in str(caught.value)
    (tmp_path / "spankerctl").touch()
    with pytest.raises(ConfigError, match="module is loaded, and has found no card"):
        Topology.enumerate(tmp_path)
