# SPDX-License-Identifier: Apache-2.0
"""One int4 matrix product on one card, from bytes to bytes.

A synchronous call above the CardDevice contract, for those who want a product and no model.
"""

from __future__ import annotations

import operator
import select
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from spanker.device.axi import AxiRecorder
from spanker.device.base import Buffer, CardDevice, Completion
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.errors import (
    BadDimsError,
    CardCommandError,
    CardError,
    CardFaultError,
    CardHungError,
    ConfigError,
    MatmulError,
    OutputTooSmallError,
)
from spanker.kernels import program as op
from spanker.kernels.formats import Format, pack, packed_bytes, row_bytes
from spanker.kernels.program import Q8_BLOCK_BYTES, Program, Ref, SequenceStep, encode_step
from spanker.native import lib

QK_K = Format.Q4_K.block
# Columns of one step.
COLUMNS_MAX: int = lib.SPK_TOKENS_MAX
# Strides of commands are 32 bits.
_ROW_BYTES_MAX = (1 << 32) - 1
# poll() takes no more than 24 days.
_POLL_S_MAX = 3600.0

U8 = npt.NDArray[np.uint8]


def matmul_q4_k(
    a: Buffer | npt.NDArray[Any],
    b: Buffer | npt.NDArray[Any],
    out: bytearray | memoryview | npt.NDArray[Any],
    m: int,
    k: int,
    n: int,
    *,
    card: CardDevice | None = None,
    isa: str | None = None,
    hang_timeout_s: float = 10.0,
) -> None:
    """out = a · b for weights a (m x k) and b (k x n), computed on a card.

    `a` and `b` are GGML Q4_K rows along k: m rows of a, and n rows that are the columns of b, each
    of k/256 * 144 bytes.  `out` is float32 (m, n) in C order: a float32 array, or at least m*n*4
    writable bytes, of which the first are written.  All three are contiguous buffers.  Layout of
    a row: `block_q4_K` of ggml/src/ggml-common.h.

    b is dequantised to float32 and quantised as activations are; docs/api/kernel-semantics.md
    defines the rest, so that the result is the same bits on every card and instruction set.

    The card is `card`, which must have nothing queued and no completion waiting, or else a soft
    one made for this call: with instruction set `isa`, by default $SPANKER_ISA or the fastest, and
    as much DDR as needed.  a is written packed into tiles, which pads m to a multiple of 16; then
    b is written, one program runs, and out is read.  That repeats from b on for every 65,536
    columns.  Nothing stays on the card.  m = 0 or n = 0 leaves the card alone.

    Blocks the thread until the product is done.  Raises

    - BadDimsError (m, k, n, block): m or n negative, k not a positive multiple of 256, a or b not
      exactly as large as the sizes say;
    - OutputTooSmallError (have, need);
    - MatmulError, their base: a buffer that is not contiguous, an out that is read-only or holds
      anything but float32 or bytes;
    - CardFaultError: an infinite or NaN scale in a or b, or a column of b beyond Q8's range;
    - CardMemoryError, CardCommandError, CardLostError: what the card refuses;
    - CardHungError: a card that gets nothing done for `hang_timeout_s`.  It still holds the
      program and its buffers, as it does when the wait is interrupted: abort and close it;
    - ConfigError: an unknown instruction set, or one given together with a card; a hang timeout
      that is none.

    After an error out is undefined.
    """
    if not hang_timeout_s > 0:
        raise ConfigError(f"the hang timeout must be a positive time, got {hang_timeout_s}")
    m, k, n = operator.index(m), operator.index(k), operator.index(n)
    weights, columns, product = _checked(a, b, out, m, k, n)
    if card is not None and isa is not None:
        raise ConfigError(
            f"instruction set {isa!r} was asked for, but card {card.number} has {card.info.isa}: "
            f"give one of the two"
        )
    if m == 0 or n == 0:
        return
    sizes = _buffer_sizes(m, k, min(n, COLUMNS_MAX))
    if card is not None:
        _multiply(card, sizes, weights, columns, product, k, hang_timeout_s)
        return
    align = int(lib.SPK_DDR_ALIGN)
    ddr_bytes = sum(-(-nbytes // align) * align for nbytes in sizes.values())
    with SoftRig([SoftCardSpec(isa, ddr_bytes)]) as rig:
        _multiply(rig.cards[0], sizes, weights, columns, product, k, hang_timeout_s)


# --- what is multiplied -----------------------------------------------------------------


def _checked(
    a: Any, b: Any, out: Any, m: int, k: int, n: int
) -> tuple[U8, U8, npt.NDArray[np.float32]]:
    """Rows of a, columns of b, and out as (m, n) floats, once all is known to fit."""
    what = f"matmul_q4_k of {m} x {k} times {k} x {n}"

    def bad(why: str) -> BadDimsError:
        return BadDimsError(f"{what}: {why}", m=m, k=k, n=n, block=QK_K)

    if m < 0 or n < 0:
        raise bad("expected no negative size")
    if k <= 0 or k % QK_K:
        raise bad(f"k must be a positive multiple of {QK_K}; pad the rows with zeros")
    row = row_bytes(Format.Q4_K, k)
    found = []
    for name, buffer, rows in (("a", a, m), ("b", b, n)):
        data = _bytes_of(f"{what}: {name}", buffer)
        if data.nbytes != rows * row:
            raise bad(
                f"{name} needs {rows} rows of {row:,} bytes, {rows * row:,} in all, got "
                f"{data.nbytes:,}; give it as Q4_K rows along k"
            )
        found.append(data.reshape(rows, row))
    target, need = _bytes_of(f"{what}: out", out), 4 * m * n
    if target.nbytes < need:
        raise OutputTooSmallError(
            f"{what}: out has {target.nbytes:,} bytes, {need:,} are needed for {m} x {n} float32",
            have=target.nbytes,
            need=need,
        )
    kind = memoryview(out).format
    if need and kind not in ("f", "<f", "B", "b", "c"):
        raise MatmulError(f"{what}: out holds items of format {kind!r}; pass float32 or bytes")
    if need and not target.flags.writeable:
        raise MatmulError(f"{what}: out is read-only; pass a bytearray or a writable array")
    if need and 4 * max(m, k) > _ROW_BYTES_MAX:
        raise CardCommandError(
            f"{what}: rows of {4 * max(m, k):,} bytes, a command's stride is at most "
            f"{_ROW_BYTES_MAX:,}; multiply in parts"
        )
    return found[0], found[1], target[:need].view(np.float32).reshape(m, n)


def _bytes_of(what: str, buffer: Any) -> U8:
    """The bytes of a buffer, which are not copied."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise MatmulError(f"{what} is not contiguous; pass a copy in C order")
    return np.frombuffer(buffer, np.uint8) if view.nbytes else np.empty(0, np.uint8)


# --- on the card ------------------------------------------------------------------------


def _buffer_sizes(m: int, k: int, columns: int) -> dict[str, int]:
    """In order of allocation; the last two never cross the card's boundary."""
    return {
        "A": packed_bytes(Format.Q4_K, m, k),
        "B": columns * row_bytes(Format.Q4_K, k),
        "OUT": columns * m * 4,
        "floats": columns * k * 4,
        "q8": columns * (k // lib.SPK_BLOCK) * Q8_BLOCK_BYTES,
    }


def _program(m: int, k: int, columns: int) -> Program:
    """OUT[j] = A times column j of B, for the columns that a step names by its token ids."""
    b, floats = Ref("B", row_bytes(Format.Q4_K, k)), Ref("floats", 4 * k)
    q8, out = Ref("q8", k // lib.SPK_BLOCK * Q8_BLOCK_BYTES), Ref("OUT", 4 * m)
    nothing = Ref("OUT")  # no step refers to a token that an earlier one chose
    return Program(
        (
            op.embed(Format.Q4_K, b, nothing, floats, columns=k, vocabulary=columns),
            op.quantize(floats, q8, k=k),
            op.matmul(Format.Q4_K, Ref("A"), q8, out, rows=m, k=k),
        ),
        tokens_max=columns,
        outputs_max=0,
        positions_max=columns,
    )


def _multiply(
    card: CardDevice,
    sizes: Mapping[str, int],
    weights: U8,
    columns: U8,
    product: npt.NDArray[np.float32],
    k: int,
    hang_timeout_s: float,
) -> None:
    m, n = product.shape
    most = min(n, COLUMNS_MAX)
    _check_idle(card)
    with _buffers(card, sizes) as handles, _loaded(card, _program(m, k, most), handles) as program:
        card.write(handles["A"], 0, pack(Format.Q4_K, weights, k).data)
        for begin in range(0, n, most):
            part = columns[begin : begin + most]
            card.write(handles["B"], 0, part.reshape(-1).data)
            count = len(part)
            fence = card.submit(program, encode_step([SequenceStep(range(count), 0, ())]))
            completion = _wait(card, fence, hang_timeout_s)
            if completion.error is not None:
                raise completion.error
            data = card.read(handles["OUT"], 0, 4 * m * count)
            # The card has one column after the other.
            result = np.frombuffer(data, np.float32).reshape(count, m)
            if not np.isfinite(result).all():
                raise CardFaultError(
                    f"card {card.number}: the product of finite columns has a NaN or an infinity: "
                    f"a scale of a is not finite",
                    card=card.number,
                )
            product[:, begin : begin + count] = result.T


def _check_idle(card: CardDevice) -> None:
    """Nobody else's completion may be collected by this call, and the card's table of buffers may
    only change while nothing runs."""
    if card.outstanding:
        raise CardCommandError(
            f"card {card.number}: work of others is queued or not collected; wait for it and "
            f"collect its completions first",
            card=card.number,
        )


@contextmanager
def _buffers(card: CardDevice, sizes: Mapping[str, int]) -> Iterator[Mapping[str, int]]:
    """Handles by name."""
    handles: dict[str, int] = {}
    try:
        for name, nbytes in sizes.items():
            handles[name] = card.alloc(nbytes)
            if isinstance(card, AxiRecorder):
                card.label(handles[name], name)
        yield handles
    finally:
        for handle in handles.values():
            with suppress(CardError):  # a card that is lost, or hangs and keeps them
                card.free(handle)


@contextmanager
def _loaded(card: CardDevice, program: Program, handles: Mapping[str, int]) -> Iterator[int]:
    number = card.load_program(program.encode(handles))
    try:
        yield number
    finally:
        with suppress(CardError):  # as above
            card.unload_program(number)


def _readable(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _wait(card: CardDevice, fence: int, hang_timeout_s: float) -> Completion:
    """The completion of `fence`, for as long as the card gets anything done."""
    progress, deadline = -1, 0.0
    while True:
        for completion in card.completions():
            if completion.fence == fence:
                return completion
        fd, now = card.completion_fd, time.monotonic()
        if fd is None:
            raise CardError(
                f"card {card.number}: fence {fence} is not complete, and there is no descriptor to "
                f"wait for",
                card=card.number,
            )
        current = card.counters().progress
        if current != progress:
            progress, deadline = current, now + hang_timeout_s
        if now >= deadline:
            raise CardHungError(
                f"card {card.number}: no progress on a matrix product for {hang_timeout_s:g} s; "
                f"abort and close it",
                card=card.number,
            )
        _readable(fd, min(deadline - now, _POLL_S_MAX))
