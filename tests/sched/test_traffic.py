# SPDX-License-Identifier: Apache-2.0
"""Traffic between cards: the hardware project's table, and what our plans move, by hand."""

from __future__ import annotations

import pytest

from spanker.errors import PlanError
from spanker.sched import traffic
from spanker.sched.plan import tensor_pipeline
from spanker.sched.shapes import named_shape

# Printed there, MB/s a link at 30 tokens/s.
TABLE = {
    "tinyllama": (2.7, 4.0, 4.7),
    "llama-7b": (7.7, 11.5, 13.4),
    "llama-70b": (38.6, 57.9, 67.5),
}


def test_payloads_are_those_of_the_table() -> None:
    kilobytes = [traffic.payload_bytes(named_shape(name)) / 1e3 for name in traffic.MODELS]
    assert kilobytes == pytest.approx([180, 524, 2621], rel=0.002)


@pytest.mark.parametrize("name", traffic.MODELS)
def test_the_table_is_reproduced(name: str) -> None:
    shape = named_shape(name)
    found = [traffic.table_bytes_per_s(shape, cards) / 1e6 for cards in traffic.CARDS]
    assert found == pytest.approx(TABLE[name], rel=0.03)


def test_a_ring_moves_twice_that() -> None:
    shape = named_shape("llama-7b")
    payload = 2 * 4096 * 32 * 2
    assert traffic.ring_bytes_per_s(shape, 4, 10.0) == payload * 10 * 2 * 3 / 4
    assert traffic.table_bytes_per_s(shape, 4, 10.0) == payload * 10 * 3 / 4
    assert traffic.ring_bytes_per_s(shape, 1) == 0


def test_no_cards_are_an_error() -> None:
    with pytest.raises(PlanError, match="at least 1 card"):
        traffic.table_bytes_per_s(named_shape("tinyllama"), 0)


def test_gathers_of_a_layer() -> None:
    shape = named_shape("llama-7b")
    h, f = shape.hidden, shape.ffn
    layer = h * 34 // 32 + 4 * h + f * 34 // 32 + 4 * h
    found = traffic.moved(shape, tensor_pipeline(shape, 4, 1))
    # And the embedding's row once.
    assert found.row_bytes == 32 * layer + 4 * h
    # Each row goes to three others, each card's best token of 8 bytes too.
    assert sum(found.sent.values()) == 3 * found.row_bytes + 4 * 3 * 8
    # The FFN's 344 blocks are not divisible by 4 without a rest, all else is.
    assert found.link_most == (32 * layer + 4 * h) // 4 + 8


def test_a_pipeline_hands_rows_over() -> None:
    shape = named_shape("tinyllama")
    found = traffic.moved(shape, tensor_pipeline(shape, 1, 3), batch=2)
    row = 2 * 2048 * 4
    assert found.row_bytes == 0
    assert found.sent == {0: row, 1: row, 2: 2 * 8}
    assert found.link_most == row


def test_one_card_moves_nothing() -> None:
    shape = named_shape("tinyllama")
    found = traffic.moved(shape, tensor_pipeline(shape, 1, 1))
    assert found == traffic.Moved({0: 0}, 0, 0)
