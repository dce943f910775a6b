# SPDX-License-Identifier: Apache-2.0
"""Arrays as collectives take them: the caller's own, checked, or ones that belong to the cards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import trio

from spanker.actors.collectives import Collectives, Resident
from spanker.errors import CollectiveError
from spanker.kernels.elements import Element

Array = npt.NDArray[Any]

_NAMES: dict[str, Element] = {
    "float32": Element.F32,
    "f32": Element.F32,
    "float16": Element.F16,
    "f16": Element.F16,
    "bfloat16": Element.BF16,
    "bf16": Element.BF16,
    "int32": Element.I32,
    "i32": Element.I32,
}
# Where the name need not be made first, which takes longer than all other checks of an array.
_DTYPES = {element.dtype: element for element in Element if element is not Element.BF16}
KNOWN = "float32, float16, bfloat16 or int32"


def element_of(dtype: npt.DTypeLike, said: str | npt.DTypeLike | None = None) -> Element:
    """The kind of element of an array's dtype, or what the caller `said` that it is.

    uint16 is bf16 only where that is said.  Raises CollectiveError.
    """
    if said is not None:
        name = said if isinstance(said, str) else np.dtype(said).name
        if name not in _NAMES:
            raise CollectiveError(f"dtype {name!r}: expected {KNOWN}")
        return _NAMES[name]
    found = np.dtype(dtype)
    if found in _DTYPES:
        return _DTYPES[found]
    name = found.name
    if name not in _NAMES:
        hint = "; say dtype='bfloat16' if that is what it holds" if name == "uint16" else ""
        raise CollectiveError(f"an array of {name}: expected {KNOWN}{hint}")
    return _NAMES[name]


class CardArrays:
    """One array on each card of a fleet, all of the same shape; made by `Fleet.arrays`.

    Collectives take it in place of a list of arrays.  `arrays[i]` is card i's as a numpy array
    where the host shares memory with the cards (`shared`): look at it and change it between
    collectives.  `write` and `read` work everywhere.
    """

    def __init__(
        self,
        collectives: Collectives,
        cards: int,
        shape: tuple[int, ...],
        element: Element,
        views: tuple[Array, ...] | None,
        resident: Resident | None,
    ) -> None:
        self._cards = cards
        self.shape = shape
        self.element = element
        self.collectives = collectives
        self._views = views
        self._resident = resident
        self._closed = False

    @classmethod
    async def allocate(
        cls,
        collectives: Collectives,
        shape: int | Sequence[int],
        dtype: npt.DTypeLike,
    ) -> CardArrays:
        """As `Fleet.arrays`."""
        said = dtype if isinstance(dtype, str) else None
        element = element_of(np.float32 if said else dtype, said)
        dims = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        if any(n < 0 for n in dims):
            raise CollectiveError(f"arrays of shape {dims}: expected sizes of 0 or more")
        await trio.lowlevel.checkpoint()
        cards = collectives.cards
        if collectives.lends:
            views = tuple(np.zeros(dims, element.dtype) for _ in range(cards))
            return cls(collectives, cards, dims, element, views, None)
        nbytes = math.prod(dims) * element.nbytes
        if not nbytes:
            return cls(collectives, cards, dims, element, None, None)
        resident = await collectives.allocate(nbytes)
        return cls(collectives, len(resident.handles), dims, element, None, resident)

    @property
    def size(self) -> int:
        """Elements of one card's array."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype; uint16 for bf16."""
        return self.element.dtype

    @property
    def shared(self) -> bool:
        """Whether `arrays[i]` is there: host and cards work on the same memory."""
        return self._views is not None

    @property
    def views(self) -> tuple[Array, ...] | None:
        """The arrays themselves, where they are shared."""
        self._check_open()
        return self._views

    @property
    def resident(self) -> Resident | None:
        """The buffers on the cards, where the arrays are not shared and not empty."""
        self._check_open()
        return self._resident

    def __len__(self) -> int:
        return self._cards

    def __getitem__(self, card: int) -> Array:
        self._check_open()
        if self._views is None:
            raise CollectiveError(
                "these arrays are in the cards' own memory, which the host does not see: "
                "await arrays.read(card)"
            )
        return self._views[card]

    async def read(self, card: int) -> Array:
        """A copy of card `card`'s array."""
        self._check_open()
        self._check_card(card)
        if self._views is not None:
            await trio.lowlevel.checkpoint()
            return self._views[card].copy()
        out = np.zeros(self.shape, self.dtype)
        if self._resident is not None:
            await self.collectives.read(self._resident, card, flat(out))
        return out

    async def write(self, card: int, data: npt.ArrayLike) -> None:
        """Fill card `card`'s array; `data` is broadcast to its shape."""
        self._check_open()
        self._check_card(card)
        try:
            if self._views is not None:
                await trio.lowlevel.checkpoint()
                self._views[card][...] = data
                return
            whole = np.empty(self.shape, self.dtype)
            whole[...] = data
        except ValueError as error:
            raise CollectiveError(f"card {card}: an array of shape {self.shape}: {error}") from None
        if self._resident is not None:
            await self.collectives.write(self._resident, card, flat(whole))

    async def aclose(self) -> None:
        """Give the arrays back to the cards.  Idempotent; numpy arrays that were shared stay."""
        if self._closed:
            return
        self._closed = True
        if self._resident is not None:
            await self.collectives.forget(self._resident)
        await trio.lowlevel.checkpoint()

    async def __aenter__(self) -> CardArrays:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise CollectiveError("these arrays have been closed; ask the fleet for new ones")

    def _check_card(self, card: int) -> None:
        if not 0 <= card < len(self):
            raise CollectiveError(f"no card {card}: the fleet has cards 0 to {len(self) - 1}")


def flat(array: Array) -> memoryview:
    """The bytes of a C-contiguous array."""
    if array.ndim and array.size and array.dtype.isnative:
        return array.data.cast("B")  # a fifth of the time
    return array.reshape(-1).view(np.uint8).data
