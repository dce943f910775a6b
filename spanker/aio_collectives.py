# SPDX-License-Identifier: Apache-2.0
"""Collectives for asyncio programs: those of spanker/collectives.py, called in the fleet's thread.

The public names are in `spanker.aio`.  Until a call returns nobody else may touch its arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy.typing as npt

from spanker import card_arrays, collectives
from spanker.card_arrays import Array
from spanker.collectives import DType
from spanker.sched.collectives.plan import ReduceOp

if TYPE_CHECKING:
    from spanker.aio import Fleet

T = TypeVar("T")


class CardArrays:
    """One array on each card of a fleet, as `spanker.CardArrays`; made by `Fleet.arrays`."""

    def __init__(self, fleet: Fleet, arrays: card_arrays.CardArrays) -> None:
        self._fleet = fleet
        self._arrays = arrays

    @property
    def shape(self) -> tuple[int, ...]:
        return self._arrays.shape

    @property
    def shared(self) -> bool:
        """Whether `arrays[i]` is there: host and cards work on the same memory."""
        return self._arrays.shared

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, card: int) -> Array:
        return self._arrays[card]

    async def read(self, card: int) -> Array:
        """A copy of card `card`'s array."""
        return await self._fleet._portal.call(self._arrays.read, card)

    async def write(self, card: int, data: npt.ArrayLike) -> None:
        """Fill card `card`'s array; `data` is broadcast to its shape."""
        await self._fleet._portal.call(self._arrays.write, card, data)

    async def aclose(self) -> None:
        """Give the arrays back to the cards.  Idempotent."""
        await self._fleet._portal.call(self._arrays.aclose)

    async def __aenter__(self) -> CardArrays:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


Arrays = Sequence[Array] | CardArrays


async def _call(
    fleet: Fleet, function: Callable[..., Awaitable[T]], *args: object, **options: object
) -> T:
    """In the fleet's thread, with the arrays that belong there."""
    there = [_there(argument) for argument in args]
    options = {name: _there(option) for name, option in options.items()}
    return await fleet._portal.call(functools.partial(function, fleet._fleet, *there, **options))


def _there(argument: object) -> object:
    return argument._arrays if isinstance(argument, CardArrays) else argument


async def all_reduce(
    fleet: Fleet, arrays: Arrays, op: str | ReduceOp = "sum", *, dtype: DType = None
) -> None:
    """As `spanker.all_reduce`."""
    await _call(fleet, collectives.all_reduce, arrays, op, dtype=dtype)


async def broadcast(fleet: Fleet, arrays: Arrays, root: int = 0, *, dtype: DType = None) -> None:
    """As `spanker.broadcast`."""
    await _call(fleet, collectives.broadcast, arrays, root, dtype=dtype)


async def all_gather(
    fleet: Fleet,
    arrays: Arrays,
    *,
    out: Sequence[Array] | None = None,
    in_place: bool = False,
    dtype: DType = None,
) -> list[Array]:
    """As `spanker.all_gather`."""
    options = {"out": out, "in_place": in_place, "dtype": dtype}
    return await _call(fleet, collectives.all_gather, arrays, **options)


async def reduce_scatter(
    fleet: Fleet,
    arrays: Arrays,
    op: str | ReduceOp = "sum",
    *,
    out: Sequence[Array] | None = None,
    in_place: bool = False,
    dtype: DType = None,
) -> list[Array]:
    """As `spanker.reduce_scatter`."""
    options = {"out": out, "in_place": in_place, "dtype": dtype}
    return await _call(fleet, collectives.reduce_scatter, arrays, op, **options)


async def all_to_all(
    fleet: Fleet,
    arrays: Arrays,
    *,
    out: Sequence[Array] | CardArrays | None = None,
    dtype: DType = None,
) -> list[Array]:
    """As `spanker.all_to_all`."""
    return await _call(fleet, collectives.all_to_all, arrays, out=out, dtype=dtype)


async def barrier(fleet: Fleet) -> None:
    """As `spanker.barrier`."""
    await _call(fleet, collectives.barrier)
