# SPDX-License-Identifier: Apache-2.0
"""What collectives must come to, computed on the host: pure functions on arrays, in card order.

They use no plan and no card, so they serve as the definition for those, and callers whose buffers
are on the host anyway.  docs/api/kernel-semantics.md: a sum rounds after each card; Max and Min put
-0 below +0; a NaN that takes part in any operation gives the one canonical NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from spanker.errors import CollectiveError, ShapeMismatchError, TopologyMismatchError
from spanker.sched.collectives.plan import ReduceOp
from spanker.sched.topology import Topology

F32 = npt.NDArray[np.float32]

_NAN = np.uint32(0x7FC00000).view(np.float32)


def all_reduce_f32(
    per_card: Sequence[F32], op: ReduceOp | str, topology: Topology | None = None
) -> list[F32]:
    """A new array for every card, each with all contributions folded in card order.

    `per_card`: one 1-D float32 array a card, equally long; length 0 is fine.  AVG divides the sum
    by the number of cards last.  Raises TopologyMismatchError where there are not as many arrays as
    `topology` has cards (or none at all), ShapeMismatchError where a length is unlike card 0's,
    CollectiveError for other types, shapes or operations.
    """
    try:
        op = ReduceOp(op)
    except ValueError:
        known = ", ".join(o.value for o in ReduceOp)
        raise CollectiveError(f"no reduction {op!r}: expected one of {known}") from None
    _check(per_card, topology)
    if not per_card:
        return []
    fold = _FOLDS[op]
    result = per_card[0].copy()
    with np.errstate(all="ignore"):
        for array in per_card[1:]:
            result = fold(result, array)
        if op is ReduceOp.AVG:
            result = _canonical(result / np.float32(len(per_card)))
    return [result.copy() for _ in per_card]


def all_gather_f32(per_card: Sequence[F32], topology: Topology | None = None) -> list[F32]:
    """A new array for every card, each with all arrays one after the other in card order.

    `per_card` and errors as for `all_reduce_f32`: the arrays are equally long.
    """
    _check(per_card, topology)
    if not per_card:
        return []
    result = np.concatenate(per_card)
    return [result.copy() for _ in per_card]


def _check(per_card: Sequence[F32], topology: Topology | None) -> None:
    cards = topology.shard_count() if topology is not None else max(1, len(per_card))
    if len(per_card) != cards:
        raise TopologyMismatchError(
            f"topology mismatch: expected {cards} buffers, one a card, got {len(per_card)}",
            expected=cards,
            actual=len(per_card),
        )
    for card, array in enumerate(per_card):
        if array.dtype != np.float32 or array.ndim != 1:
            raise CollectiveError(
                f"card {card}: expected a 1-D float32 array, got {array.dtype} of shape "
                f"{array.shape}"
            )
        expected, actual = len(per_card[0]), len(array)
        if actual != expected:
            raise ShapeMismatchError(
                f"shape mismatch on card {card}: expected {expected} elements as on card 0, got "
                f"{actual}",
                sail=card,
                expected=expected,
                actual=actual,
            )


def _canonical(x: F32) -> F32:
    x[np.isnan(x)] = _NAN
    return x


def _sum(a: F32, b: F32) -> F32:
    return _canonical(a + b)


def _ordered(x: F32) -> npt.NDArray[np.int32]:
    """Integers in the order of the floats, with -0 below +0."""
    bits = x.view(np.int32)
    return bits ^ (bits >> 31 & np.int32(0x7FFFFFFF))


def _max(a: F32, b: F32) -> F32:
    result = np.where(_ordered(a) > _ordered(b), a, b)
    result[np.isnan(a) | np.isnan(b)] = _NAN
    return result


def _min(a: F32, b: F32) -> F32:
    result = np.where(_ordered(a) < _ordered(b), a, b)
    result[np.isnan(a) | np.isnan(b)] = _NAN
    return result


_FOLDS: dict[ReduceOp, Callable[[F32, F32], F32]] = {
    ReduceOp.SUM: _sum,
    ReduceOp.AVG: _sum,
    ReduceOp.MAX: _max,
    ReduceOp.MIN: _min,
}
