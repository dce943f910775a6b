# SPDX-License-Identifier: Apache-2.0
"""Programs of collectives as values: what stands in them, and what they leave alone."""

from __future__ import annotations

import itertools

import pytest

from spanker.actors.collective_programs import TILE_BYTES, TILES_MAX, Work, build, plans
from spanker.kernels.elements import Element
from spanker.kernels.program import Op
from spanker.sched.collectives.plan import Kind, ReduceOp
from spanker.sched.topology import Topology

REDUCING = (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER)


def works(elements: int) -> list[Work]:
    made = [
        Work(kind, element, elements, op, in_place=in_place)
        for kind in REDUCING
        for element in (Element.F32, Element.F16, Element.I32)
        for op in ReduceOp
        for in_place in ((True,) if kind is Kind.ALL_REDUCE else (True, False))
    ]
    made += [Work(Kind.ALL_GATHER, Element.F16, elements, in_place=p) for p in (True, False)]
    made += [Work(Kind.BROADCAST, Element.BF16, elements, root=0)]
    return made


@pytest.mark.parametrize("cards", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("elements", [1, 7, 4096, 200_003])
def test_both_ends_of_every_link_expect_the_same_bytes(cards: int, elements: int) -> None:
    """In the same exchange, in the same order: or the cards would wait for each other for ever."""
    for work in works(elements):
        moved: dict[tuple[int, int, bool], list[int]] = {}
        exchanges: dict[int, list[int]] = {card: [] for card in range(cards)}
        for card, made in enumerate(build(work, Topology.with_mock(cards))):
            for command in made.program.commands:
                if command.op is Op.EXCHANGE:
                    exchanges[card].append(command.args[0])
                if command.op in (Op.LINK_SEND, Op.LINK_RECV):
                    assert command.bulk
                    peer, low, high = command.args
                    send = command.op is Op.LINK_SEND
                    ends = (card, peer) if send else (peer, card)
                    moved.setdefault((*ends, send), []).append(low + (high << 32))
        for (source, target, send), sizes in moved.items():
            if send:
                assert moved[source, target, False] == sizes, work


def test_an_input_that_is_no_output_is_never_written() -> None:
    for cards, elements in itertools.product((2, 3, 5), (5, 1000)):
        for work in works(elements):
            if "in" not in work.arrays:
                continue
            for made in build(work, Topology.with_mock(cards)):
                for command in made.program.commands:
                    assert all(ref.buffer != "in" for slot, ref in command.refs if slot == 3)


def test_only_arrays_and_scratch_that_are_there_are_named() -> None:
    for cards, elements in itertools.product((1, 2, 5), (1, 7, 1000)):
        for work in works(elements):
            for card, made in enumerate(build(work, Topology.with_mock(cards))):
                sizes = made.own_bytes | made.array_bytes
                named = {ref.buffer for c in made.program.commands for _, ref in c.refs}
                assert named == sizes.keys() and all(sizes.values())
                for name, nbytes in made.array_bytes.items():
                    assert nbytes == work.array_elements(name, card, cards) * work.element.nbytes


def test_a_large_all_reduce_is_cut_into_tiles_that_cover_it() -> None:
    for elements in (TILE_BYTES // 4, TILE_BYTES // 2 + 1, 10_000_000, 1 << 32):
        work = Work(Kind.ALL_REDUCE, Element.F32, elements, ReduceOp.SUM)
        at = 0
        for base, plan in plans(work, Topology.with_mock(2)):
            assert base == at
            at += plan.elements
        assert at == elements
        assert len(list(plans(work, Topology.with_mock(2)))) <= TILES_MAX
    assert (
        len(
            list(
                plans(
                    Work(Kind.ALL_REDUCE, Element.F32, 1 << 26, ReduceOp.SUM),
                    Topology.with_mock(16),
                )
            )
        )
        < 10
    )
    tmp = build(
        Work(Kind.ALL_REDUCE, Element.F32, 10_000_000, ReduceOp.SUM), Topology.with_mock(2)
    )[0].own_bytes["tmp"]
    assert tmp <= TILE_BYTES


def test_cards_that_meet_do_an_all_reduce_as_one_command() -> None:
    for reduction, by in ((ReduceOp.SUM, 1), (ReduceOp.AVG, 3), (ReduceOp.MAX, 1)):
        work = Work(Kind.ALL_REDUCE, Element.F16, 1000, reduction)
        for card, made in enumerate(build(work, Topology.with_mock(3), meet=True)):
            (command,) = made.program.commands
            assert command.op is Op.ALL_REDUCE and command.format is Element.F16
            assert command.args[0] == 1000 and command.args[3:] == (by, 3, card)
            assert made.array_bytes == {"data": 2000} and not made.own_bytes
    for other in works(1000):
        for cards in (1, 3):
            if cards == 1 or other.kind is not Kind.ALL_REDUCE:
                topology = Topology.with_mock(cards)
                assert build(other, topology, meet=True) == build(other, topology)


def test_floats_are_summed_in_order_and_nothing_else_must_be() -> None:
    for element, op in itertools.product(Element, ReduceOp):
        work = Work(Kind.ALL_REDUCE, element, 10, op)
        assert work.ordered == (element.is_float and op in (ReduceOp.SUM, ReduceOp.AVG))
