# SPDX-License-Identifier: Apache-2.0
"""Cutting a range (rows, heads, layers) into one contiguous share for each card.

Knows nothing of what is being cut.  The arithmetic is exact, so that every machine makes the same
plan from the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from spanker.errors import PlanError


@attrs.frozen
class Share:
    """The half-open range [start, stop); raises PlanError unless 0 <= start <= stop."""

    start: int
    stop: int

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise PlanError(f"a share needs 0 <= start <= stop, got {self.start} to {self.stop}")

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def empty(self) -> bool:
        return self.start == self.stop


def split(
    total: int, parts: int, *, unit: int = 1, weights: Sequence[float] | None = None
) -> tuple[Share, ...]:
    """`parts` shares in order that cover [0, total), cut only at multiples of `unit`.

    The last unit may be partial.  Without `weights` the shares differ by at most one unit, larger
    ones first.  With `weights` they are proportional by largest remainder, ties to the lowest
    index; a weight of zero gets nothing.  Shares may be empty.  Raises PlanError unless total >= 0,
    parts >= 1, unit >= 1, and there are `parts` weights, finite, >= 0, not all zero.
    """
    if total < 0 or parts < 1 or unit < 1:
        raise PlanError(
            f"split: expected total >= 0, parts >= 1, unit >= 1, got {total}, {parts}, {unit}"
        )
    if weights is None:
        weights = (1,) * parts
    if (
        len(weights) != parts
        or not all(math.isfinite(weight) and weight >= 0 for weight in weights)
        or not any(weights)
    ):
        raise PlanError(
            f"split: expected {parts} finite weights >= 0, not all zero, got {tuple(weights)}"
        )

    units = -(-total // unit)
    if len(set(weights)) == 1:
        counts = [units // parts + (part < units % parts) for part in range(parts)]
    else:
        counts = _by_largest_remainder(units, weights)

    shares: list[Share] = []
    done = 0
    for count in counts:
        start, done = done, done + count
        shares.append(Share(min(start * unit, total), min(done * unit, total)))
    return tuple(shares)


def _by_largest_remainder(units: int, weights: Sequence[float]) -> list[int]:
    # Equal weights need no fractions, whose module takes milliseconds to import.
    from fractions import Fraction

    exact = [Fraction(weight) for weight in weights]
    quotas = [units * weight / sum(exact) for weight in exact]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda part: counts[part] - quotas[part])
    for part in by_remainder[: units - sum(counts)]:
        counts[part] += 1
    return counts
