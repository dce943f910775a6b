# SPDX-License-Identifier: Apache-2.0
"""Embedding rows on a card, from a table of rows and from packed weights: the values of
reference.dequantize_row, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conformance_rigs import finish, make_program

from spanker.device.base import CardDevice
from spanker.errors import CardCommandError
from spanker.kernels import program as op
from spanker.kernels import reference
from spanker.kernels.formats import Format, pack, row_bytes
from spanker.kernels.program import Ref, SequenceStep, encode_step

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_cases import FORMATS, assert_same_bits, depths, seed_of, set_scales, weights

VOCABULARY = 41  # two whole tiles and a part of a third


def embedded(
    card: CardDevice,
    fmt: Format,
    rows: np.ndarray,
    k: int,
    ids: list[int],
    packed: bool,
    first: int = 0,
    columns: int | None = None,
) -> np.ndarray:
    """(len(ids), columns): what EMBED makes of GGML rows of k columns, which are packed first if
    `packed`; of those only the columns from `first` on."""
    columns = k - first if columns is None else columns
    data = pack(fmt, rows, k) if packed else rows
    handles = {"table": card.alloc(data.size), "x": card.alloc(len(ids) * columns * 4)}
    handles["chosen"] = card.alloc(len(ids) * 4)
    card.write(handles["table"], 0, data.tobytes())
    command = op.embed(
        fmt,
        Ref("table") if packed else Ref("table", row_bytes(fmt, k)),
        Ref("chosen", 4),
        Ref("x", columns * 4),
        columns=columns,
        vocabulary=rows.shape[0],
        packed_k=k if packed else 0,
        first=first,
    )
    made = make_program(command, tokens=len(ids), outputs=len(ids))
    program = card.load_program(made.encode(handles))
    card.submit(program, encode_step([SequenceStep(ids, 0, [])]))
    finish(card)
    out = np.frombuffer(card.read(handles["x"], 0, len(ids) * columns * 4), np.float32)
    card.unload_program(program)
    for handle in handles.values():
        card.free(handle)
    return out.reshape(len(ids), columns)


def cases(name: str, k: int) -> dict[str, np.ndarray]:
    """Rows whose scales are any finite f16, and rows whose values are zeros of either sign."""
    rng = np.random.default_rng(seed_of("embedding", name, k))
    out = {"any": weights(rng, name, VOCABULARY, k)}
    if Format[name.upper()].is_float:
        size = row_bytes(Format[name.upper()], k) // k
        signs = np.zeros((VOCABULARY, k, size), np.uint8)
        signs[..., -1] = rng.integers(0, 2, (VOCABULARY, k)) << 7
        out["zeros"] = signs.reshape(VOCABULARY, k * size)
        return out
    for what, scale in (("zeros", 0.0), ("smallest", 6e-8)):
        rows = weights(rng, name, VOCABULARY, k)
        blocks = k // Format[name.upper()].block
        signs = rng.choice((-scale, scale), (VOCABULARY, blocks))
        minima = rng.choice((-0.0, 0.0), (VOCABULARY, blocks))
        set_scales(name, rows, signs, minima)
        out[what] = rows
    return out


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_row_of_every_format_is_that_of_the_reference(
    card: CardDevice, name: str, packed: bool
) -> None:
    fmt = Format[name.upper()]
    # Odd and even numbers of blocks: tiles hold them in pairs.
    for k in (*depths(name, 1, 2, 3, 5), *((1, 7) if fmt.is_float else ())):
        for what, rows in cases(name, k).items():
            ids = [*range(VOCABULARY), 0, VOCABULARY - 1, 17, 17]
            expected = reference.dequantize_row(name, rows)[ids]
            got = embedded(card, fmt, rows, k, ids, packed)
            assert_same_bits(got, expected, name, k, what)


@pytest.mark.parametrize("name", FORMATS)
def test_columns_of_packed_rows_are_those_of_the_reference(card: CardDevice, name: str) -> None:
    fmt = Format[name.upper()]
    (k,) = depths(name, 5)
    unit = k // 5
    rows = weights(np.random.default_rng(seed_of("columns", name)), name, VOCABULARY, k)
    ids = [0, 15, 16, 17, VOCABULARY - 1]
    expected = reference.dequantize_row(name, rows)[ids]
    # Odd beginnings and ends too: tiles hold blocks in pairs, but for the last one.
    for first in range(0, k, unit):
        for stop in range(first + unit, k + 1, unit):
            got = embedded(card, fmt, rows, k, ids, True, first, stop - first)
            assert_same_bits(got, expected[:, first:stop], name, first, stop)


@pytest.mark.parametrize(
    ("packed_k", "first", "columns"),
    [(64, 32, 64), (64, 96, 32), (64, 16, 32), (48, 0, 32), (0, 32, 32), (64, 1 << 31, 32)],
)
def test_columns_that_a_packed_row_has_not_are_refused(
    card: CardDevice, packed_k: int, first: int, columns: int
) -> None:
    handles = {"table": card.alloc(48 * 64 * 4), "x": card.alloc(512), "chosen": card.alloc(4)}
    command = op.embed(
        Format.Q8_0,
        Ref("table", 64),
        Ref("chosen", 4),
        Ref("x", 256),
        columns=columns,
        vocabulary=VOCABULARY,
        packed_k=packed_k,
        first=first,
    )
    with pytest.raises(CardCommandError, match=r"embed: has (?:columns beyond|packed)"):
        card.load_program(make_program(command, tokens=1).encode(handles))


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_keep_their_signs(card: CardDevice, name: str) -> None:
    """The rows above must have both; a block of only one zero would prove nothing."""
    (k,) = depths(name, 3)
    rows = cases(name, k)["zeros"]
    got = embedded(card, Format[name.upper()], rows, k, list(range(VOCABULARY)), packed=True)
    assert not got.any()
    assert np.signbit(got).any() and not np.signbit(got).all()


@pytest.mark.parametrize("name", ["f32", "bf16", "q4_0", "q5_1", "q6_k"])
def test_a_packed_table_must_be_whole_tiles(card: CardDevice, name: str) -> None:
    fmt = Format[name.upper()]
    (k,) = depths(name, 1)
    size = 3 * 16 * row_bytes(fmt, k)
    x, chosen = card.alloc(k * 4), card.alloc(4)

    def load(table_bytes: int, offset: int = 0, kind: int = 1) -> None:
        table = card.alloc(table_bytes)
        command = op.embed(
            fmt,
            Ref("table", 0, offset),
            Ref("chosen", 4),
            Ref("x", k * 4),
            columns=k,
            vocabulary=VOCABULARY,
            packed_k=k,
        )
        if kind != 1:
            command = op.Command(op.Op.EMBED, command.refs, (k, VOCABULARY, kind), fmt)
        made = make_program(command, tokens=1)
        try:
            handles = {"table": table, "x": x, "chosen": chosen}
            card.unload_program(card.load_program(made.encode(handles)))
        finally:
            card.free(table)

    load(size)
    load(size + 32, 32)
    for arguments in ((size - 1,), (size + 31, 32), (size + 64, 16), (size, 0, 2)):
        with pytest.raises(CardCommandError, match="embed"):
            load(*arguments)


def test_a_packed_token_beyond_the_vocabulary_is_refused(card: CardDevice) -> None:
    """The rows that fill up the last tile are no words."""
    rows = np.ones((VOCABULARY, 32 * 4), np.uint8)
    for bad in (VOCABULARY, 47, 1 << 30):
        with pytest.raises(CardCommandError, match="refused"):
            embedded(card, Format.F32, rows, 32, [0, bad], packed=True)
