# SPDX-License-Identifier: Apache-2.0
"""Collective operations on the cards of a live fleet, on numpy arrays.

    grads = [np.random.randn(1 << 20).astype(np.float32) for _ in fleet.cards]
    await spanker.all_reduce(fleet, grads, "avg")          # every array now holds the average
    wholes = await spanker.all_gather(fleet, grads)        # a new array for each card

`arrays[i]` is card i's: C-contiguous, all of the same length and dtype, in memory of their own; or
what `Fleet.arrays` gives.  float32, float16, int32, and bfloat16 as uint16 where `dtype` says so.
Any length, zero too.

Sums and averages of floats are folded in the order of the cards, one rounding for each: their bits
do not depend on how the data travel, nor on the kind of card.  Integers wrap, and their average is
rounded towards zero; -0 is smaller than +0, and a NaN makes a NaN (docs/api/kernel-semantics.md).

As in MPI, NCCL and torch.distributed, all_reduce and broadcast work in place, and the others leave
what they are given alone and return new arrays, or fill `out`; with `in_place` all_gather and
reduce_scatter work within arrays of the full length.  In `Fleet.arrays` everything is in place.

A call takes turns with the models of the fleet and with other calls, and is a checkpoint.
Cancelled or failed, it leaves what it was to write undefined.  Raises TopologyMismatchError,
ShapeMismatchError, CollectiveError; CardMemoryError; CardLostError, CardHungError.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from spanker.actors import collective_programs
from spanker.card_arrays import Array, CardArrays, element_of, flat
from spanker.errors import CollectiveError, ShapeMismatchError, TopologyMismatchError
from spanker.fleet import Fleet
from spanker.kernels.elements import Element
from spanker.sched.collectives.plan import Kind, ReduceOp

Arrays = Sequence[Array] | CardArrays
DType = npt.DTypeLike | None

# The same few again and again: making one and its hash takes longer than looking it up.
Work = functools.lru_cache(maxsize=256)(collective_programs.Work)
_OPS: dict[object, ReduceOp] = {op: op for op in ReduceOp} | {op.value: op for op in ReduceOp}


async def all_reduce(
    fleet: Fleet, arrays: Arrays, op: str | ReduceOp = "sum", *, dtype: DType = None
) -> None:
    """Fold all arrays, element by element, into every one of them.

    `op` is sum, avg, max or min.
    """
    given = _Given(fleet, arrays, dtype)
    await given.run(Work(Kind.ALL_REDUCE, given.element, given.size, _op(op)), given)


async def broadcast(fleet: Fleet, arrays: Arrays, root: int = 0, *, dtype: DType = None) -> None:
    """Fill every array with the array of card `root`."""
    given = _Given(fleet, arrays, dtype)
    if not 0 <= root < given.cards:
        raise CollectiveError(
            f"no card {root} to broadcast from: the fleet has cards 0 to {given.cards - 1}"
        )
    await given.run(Work(Kind.BROADCAST, given.element, given.size, root=root), given)


async def all_gather(
    fleet: Fleet,
    arrays: Arrays,
    *,
    out: Sequence[Array] | None = None,
    in_place: bool = False,
    dtype: DType = None,
) -> list[Array]:
    """For each card all arrays, one after the other along their first axis.

    `in_place`: the arrays have the full length, card i has filled its share of it, and they are
    returned.  Shares are those of `numpy.array_split`.
    """
    given = _Given(fleet, arrays, dtype)
    if in_place or given.resident_or_shared:
        _refuse_out(out)
        await given.run(Work(Kind.ALL_GATHER, given.element, given.size), given)
        return given.arrays
    first = given.arrays[0]
    rows = first.shape[0] if first.ndim else 1
    made = given.outputs(out, (rows * given.cards, *first.shape[1:]))
    work = Work(Kind.ALL_GATHER, given.element, given.size * given.cards, in_place=False)
    await given.run(work, given, made)
    return made.arrays


async def reduce_scatter(
    fleet: Fleet,
    arrays: Arrays,
    op: str | ReduceOp = "sum",
    *,
    out: Sequence[Array] | None = None,
    in_place: bool = False,
    dtype: DType = None,
) -> list[Array]:
    """For each card its share of the arrays folded; one-dimensional.

    Shares are those of `numpy.array_split`: of equal length, or one longer for the first cards.
    `in_place`: the share is a view of the card's own array, the rest of which is left undefined.
    """
    given = _Given(fleet, arrays, dtype)
    work = Work(Kind.REDUCE_SCATTER, given.element, given.size, _op(op))
    shares = work.shares(given.cards)
    if in_place or given.resident_or_shared:
        _refuse_out(out)
        await given.run(work, given)
        pairs = zip(given.arrays, shares, strict=False)
        return [array.reshape(-1)[share.start : share.stop] for array, share in pairs]
    work = Work(Kind.REDUCE_SCATTER, given.element, given.size, _op(op), in_place=False)
    made = given.outputs(out, *((share.size,) for share in shares))
    await given.run(work, given, made)
    return made.arrays


async def all_to_all(
    fleet: Fleet,
    arrays: Arrays,
    *,
    out: Sequence[Array] | CardArrays | None = None,
    dtype: DType = None,
) -> list[Array]:
    """Cut each array into one part a card; card i gets the i-th part of every array, in card order.

    The length must be a multiple of the number of cards; results have the shape of the arrays.
    """
    given = _Given(fleet, arrays, dtype)
    if given.size % given.cards:
        raise ShapeMismatchError(
            f"all_to_all among {given.cards} cards: expected a multiple of {given.cards} elements, "
            f"got {given.size:,}; pad the arrays",
            sail=0,
            expected=-(-given.size // given.cards) * given.cards,
            actual=given.size,
        )
    made: _Given | _Outputs
    if isinstance(out, CardArrays):
        made = _Given(fleet, out, None)
        made.must_be(given.element, given.size)
    elif given.is_resident:
        raise CollectiveError("all_to_all of the cards' own arrays needs others of them as `out`")
    else:
        made = given.outputs(out, given.shape)
    await given.run(Work(Kind.ALL_TO_ALL, given.element, given.size), given, made)
    return made.arrays


async def barrier(fleet: Fleet) -> None:
    """Return when every card has heard of every other: whatever was called before is done."""
    await fleet._collectives.run(Work(Kind.BARRIER, Element.F32, 0))


# --- what is given ------------------------------------------------------------------------


class _Given:
    """Arrays, one a card, that have passed the checks."""

    plain = False

    def __init__(self, fleet: Fleet, arrays: Arrays, dtype: DType) -> None:
        self._collectives = fleet._collectives
        self.cards = self._collectives.cards
        self.resident_or_shared = False
        if len(arrays) != self.cards:
            raise TopologyMismatchError(
                f"expected an array for each of {self.cards} cards, got {len(arrays)}",
                expected=self.cards,
                actual=len(arrays),
            )
        if isinstance(arrays, CardArrays):
            if arrays.collectives is not self._collectives:
                raise CollectiveError("these arrays belong to another fleet")
            self.resident_or_shared = True
            views, self._resident = arrays.views, arrays.resident
            self.element, self.shape, self.size = arrays.element, arrays.shape, arrays.size
            self.arrays: list[Array] = [] if views is None else list(views)
            self.is_resident = views is None
            return
        self._resident, self.is_resident = None, False
        self.arrays = list(arrays)
        self.plain = _are_plain(self.arrays)
        if not self.plain:
            self.arrays = [_checked(array, sail) for sail, array in enumerate(arrays)]
        first = self.arrays[0]
        self.element = element_of(first.dtype, dtype)
        self.shape, self.size = first.shape, first.size
        if dtype is not None and first.dtype.itemsize != self.element.nbytes:
            raise CollectiveError(
                f"arrays of {first.dtype} hold no {self.element.name.lower()}: expected elements "
                f"of {self.element.nbytes} bytes"
            )
        if not self.plain:
            self._refuse_unlike(first)

    def _refuse_unlike(self, first: Array) -> None:
        for sail, array in enumerate(self.arrays):
            if array.dtype != first.dtype:
                raise ShapeMismatchError(
                    f"array of card {sail}: expected dtype {first.dtype} like card 0's, got "
                    f"{array.dtype}",
                    sail=sail,
                    expected=first.dtype,
                    actual=array.dtype,
                )
            if array.size != first.size:
                raise ShapeMismatchError(
                    f"array of card {sail}: expected {first.size:,} elements like card 0's, got "
                    f"{array.size:,}",
                    sail=sail,
                    expected=first.size,
                    actual=array.size,
                )

    def must_be(self, element: Element, size: int) -> None:
        """Of the arrays of `out`."""
        if self.element is not element or self.size != size:
            raise ShapeMismatchError(
                f"out: expected arrays of {size:,} {element.name.lower()}, got {self.size:,} "
                f"{self.element.name.lower()}",
                sail=0,
                expected=size,
                actual=self.size,
            )

    def outputs(self, out: Sequence[Array] | None, *shapes: tuple[int, ...]) -> _Outputs:
        """Arrays of these shapes, of one shape or one for each card: new ones, or `out`."""
        shapes = shapes if len(shapes) == self.cards else shapes * self.cards
        dtype = self.arrays[0].dtype
        if out is None:
            return _Outputs([np.empty(shape, dtype) for shape in shapes])
        if len(out) != self.cards:
            raise TopologyMismatchError(
                f"out: expected an array for each of {self.cards} cards, got {len(out)}",
                expected=self.cards,
                actual=len(out),
            )
        checked = [_checked(array, sail) for sail, array in enumerate(out)]
        for sail, (array, shape) in enumerate(zip(checked, shapes, strict=True)):
            if array.shape != shape or array.dtype != dtype:
                raise ShapeMismatchError(
                    f"out of card {sail}: expected shape {shape} of {dtype}, got {array.shape} of "
                    f"{array.dtype}",
                    sail=sail,
                    expected=shape,
                    actual=array.shape,
                )
        return _Outputs(checked)

    async def run(self, work: collective_programs.Work, *sides: _Given | _Outputs) -> None:
        """Do it on the arrays of the sides, in the order that the work names them."""
        if work.elements == 0:
            await trio.lowlevel.checkpoint()
            return
        if self.is_resident:
            resident = [side._resident for side in sides if isinstance(side, _Given)]
            await self._collectives.run(work, resident=resident)
            return
        inputs_too = len(sides) == 1
        if inputs_too and self.plain:
            await self._collectives.run(work, [self.arrays])
            return
        # Only what is written must be writable; a card takes nothing that is not.
        used: list[list[Array]] = []
        for place, side in enumerate(sides):
            written = inputs_too or place > 0
            used.append([_usable(a, written, sail) for sail, a in enumerate(side.arrays)])
        _refuse_shared_memory(used)
        memory = [[flat(a) if a.size else None for a in rows] for rows in used]
        await self._collectives.run(work, memory)


class _Outputs:
    """Arrays to be filled."""

    def __init__(self, arrays: list[Array]) -> None:
        self.arrays = arrays
        self._resident = None


def _are_plain(arrays: Sequence[Any]) -> bool:
    """Whether arrays are what they nearly always are: alike, contiguous, writable, aligned, of
    several native elements, each with memory of its own.  Then there is nothing to refuse or to
    copy, and their memory is `data`; of others, what is wrong is found out one by one."""
    first = arrays[0]
    if type(first) is not np.ndarray or first.size < 2 or not first.dtype.isnative:
        return False
    dtype, size = first.dtype, first.size
    for array in arrays:
        # numpy has one object for each of its own dtypes.
        if type(array) is not np.ndarray or array.dtype is not dtype or array.size != size:
            return False
        flags = array.flags
        if not (flags.carray and flags.owndata):
            return False
    return len(set(map(id, arrays))) == len(arrays)


def _checked(array: Any, sail: int) -> Array:
    if not isinstance(array, np.ndarray):
        raise CollectiveError(
            f"array of card {sail}: expected a numpy array, got {type(array).__name__}"
        )
    if not array.flags.c_contiguous:
        raise CollectiveError(
            f"array of card {sail}: expected C-contiguous memory, got shape {array.shape} with "
            f"strides {array.strides}; use numpy.ascontiguousarray"
        )
    return array


def _usable(array: Array, written: bool, sail: int) -> Array:
    """An array that a card may work on, or a copy of it."""
    if not array.flags.writeable and array.size:
        if written:
            raise CollectiveError(f"array of card {sail} is read-only, and would be written to")
        array = array.copy()
    if not array.flags.aligned and array.size:
        raise CollectiveError(
            f"array of card {sail}: expected elements aligned to {array.itemsize} bytes; copy it"
        )
    return array


def _refuse_shared_memory(used: Sequence[Sequence[Array]]) -> None:
    """Two cards that write to the same memory would undo each other's work."""
    every = [array for rows in used for array in rows]
    # Arrays with memory of their own are apart; where others are costs more to find out.
    if all(array.flags.owndata for array in every) and len({*map(id, every)}) == len(every):
        return
    spans = sorted(
        (int(array.__array_interface__["data"][0]), array.nbytes, sail)
        for rows in used
        for sail, array in enumerate(rows)
        if array.size
    )
    for (at, nbytes, sail), (next_at, _, other) in itertools.pairwise(spans):
        if at + nbytes > next_at:
            raise CollectiveError(
                f"arrays of cards {sail} and {other} share memory: each card needs its own"
            )


def _refuse_out(out: object) -> None:
    if out is not None:
        raise CollectiveError("out makes no sense for what is done in place: leave it away")


def _op(op: str | ReduceOp) -> ReduceOp:
    try:
        return _OPS[op]
    except (KeyError, TypeError):
        known = ", ".join(o.value for o in ReduceOp)
        raise CollectiveError(f"no reduction {op!r}: expected one of {known}") from None
