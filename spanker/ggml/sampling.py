# SPDX-License-Identifier: Apache-2.0
"""Choosing a token: a pure function of logits, parameters, seed and position.

It gives the same token from a card's best candidates as from all logits, or says that the
candidates do not suffice.  Temperature comes first, then top-k, top-p and min-p, each over what the
one before left.  Ties go to the lowest id.
"""

from __future__ import annotations

import math
import operator

import attrs
import numpy as np
import numpy.typing as npt

from spanker.errors import RequestError
from spanker.ggml.rope import log
from spanker.kernels import reference

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U32 = npt.NDArray[np.uint32]

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def whole(value: object) -> int:
    """A plain int from any kind of integer, numpy's too; RequestError for anything else."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"expected a whole number, got {value!r}") from None


def _real(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise RequestError(f"expected a number, got {value!r}") from None


@attrs.frozen
class SamplingParams:
    """How to choose.  Temperature 0 takes the best token and ignores the rest.

    `top_k` 0, `top_p` 1 and `min_p` 0 are off.  RequestError for values out of range.
    """

    temperature: float = attrs.field(default=0.0, converter=_real)
    top_k: int = attrs.field(default=0, converter=whole)
    top_p: float = attrs.field(default=1.0, converter=_real)
    min_p: float = attrs.field(default=0.0, converter=_real)
    seed: int = attrs.field(default=0, converter=whole)

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, which the cards know by themselves."""
        return self.temperature == 0

    def __attrs_post_init__(self) -> None:
        def need(good: bool, name: str, what: str) -> None:
            if not good:
                raise RequestError(f"{name} must be {what}, got {getattr(self, name)}")

        need(0 <= self.temperature <= 100, "temperature", "0 to 100")
        need(
            self.temperature == 0 or self.temperature >= 1e-3, "temperature", "0 or at least 0.001"
        )
        need(0 <= self.top_k <= 1 << 24, "top_k", "0 (off) or more")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(0 <= self.min_p <= 1, "min_p", "0 to 1")
        need(0 <= self.seed < 1 << 64, "seed", "0 to 2**64 - 1")

    @property
    def inv_temperature(self) -> float:
        """What the cards scale logits by, as float32; 1 for greedy."""
        return float(np.float32(1.0 / self.temperature)) if self.temperature else 1.0


@attrs.frozen
class Choice:
    """A token and the natural logarithm of its probability at the temperature."""

    id: int
    logprob: float


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., SC 2011): four random 32-bit words for a counter and a key."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A float64 in [0, 1) for a (seed, position)."""
    counter = (position & 0xFFFFFFFF, position >> 32 & 0xFFFFFFFF, 0, 0)
    high, low, _, _ = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return ((high << 32 | low) >> 11) * 2.0**-53


def order(ids: U32, values: F32, vocabulary: int, per_card: int | None = None) -> tuple[U32, F32]:
    """Tokens by logit descending, then id ascending; fillers dropped.

    With `per_card` they are the best so many of each card, card after card.  Behind the last one of
    a card there may be others of that card which nobody has sent: what comes after it is dropped,
    so that the result is always what the order of the whole vocabulary starts with.
    """
    last = np.zeros(ids.shape, np.bool_)
    if per_card:
        last[per_card - 1 :: per_card] = True
    real = ids < vocabulary
    ids, values, last = ids[real], values[real], last[real]
    by = np.lexsort((ids, -values))
    cut = np.flatnonzero(last[by])
    by = by[: int(cut[0]) + 1] if cut.size else by
    return ids[by], values[by]


def choose(
    params: SamplingParams, position: int, ids: U32, values: F32, stats: F32, vocabulary: int
) -> Choice | None:
    """The token for `position` from ordered candidates and all chunks' (max, sum of exp).

    `stats` (chunks, 2) must be made with the parameters' inverse temperature.  The candidates may
    be the whole vocabulary.  None: the candidates are too few to tell, ask again with all logits.
    """
    inv = np.float32(params.inv_temperature)
    top = values[0]
    scale = reference.exp((stats[:, 0] - top) * inv).astype(np.float64)
    # Folded in ascending chunk order, one rounding each: accumulate never reorders.
    total = float(np.add.accumulate(scale * stats[:, 1].astype(np.float64))[-1])
    complete = ids.shape[0] >= vocabulary
    if params.temperature == 0:
        return Choice(int(ids[0]), -log(total))
    index = _sample(params, position, values, top, inv, total, complete, vocabulary)
    if index is None:
        return None
    logprob = float((values[index] - top) * inv) - log(total)
    return Choice(int(ids[index]), logprob)


def _sample(
    params: SamplingParams,
    position: int,
    values: F32,
    top: np.float32,
    inv: np.float32,
    total: float,
    complete: bool,
    vocabulary: int,
) -> int | None:
    n = values.shape[0]
    keep: int | None = None  # None: the whole vocabulary
    if 0 < params.top_k < vocabulary:
        if params.top_k > n:
            return None
        keep = n = params.top_k
    weight = reference.exp((values[:n] - top) * inv).astype(np.float64)
    cumulative = np.add.accumulate(weight)
    mass = float(cumulative[-1]) if keep is not None else total
    if params.top_p < 1:
        reached = int(np.searchsorted(cumulative, params.top_p * mass, side="left"))
        if reached < n:
            keep = reached + 1
        elif not complete and keep is None:
            return None
    if params.min_p > 0:
        limit = n if keep is None else keep
        passing = int(np.count_nonzero(weight[:limit] >= params.min_p))
        if keep is None and passing == limit and not complete:
            return None
        if passing < limit or keep is not None:
            keep = passing
    if keep is not None:
        mass = float(cumulative[keep - 1])
    target = uniform(params.seed, position) * mass
    index = int(np.searchsorted(cumulative, target, side="right"))
    if keep is not None:
        return min(index, keep - 1)
    if index < n:
        return index
    return n - 1 if complete else None


def choose_from_logits(params: SamplingParams, position: int, logits: F32) -> Choice:
    """The same from all logits (vocabulary,)."""
    stats = reference.logit_stats(logits, params.inv_temperature)
    ids = np.arange(logits.shape[0], dtype=np.uint32)
    ids, values = order(ids, logits, logits.shape[0])
    choice = choose(params, position, ids, values, stats, logits.shape[0])
    assert choice is not None and math.isfinite(choice.logprob)
    return choice
