# SPDX-License-Identifier: Apache-2.0
"""Tensor parallel or model parallel, decided per matrix product from two bandwidths.

Pure arithmetic over a `TileShape`.  The rule is kept exactly as the hardware project stated it;
what to make of many answers together is the planner's business.

The operand of `m x k` is the weights, as in GGML's matrix products: m = output features,
n = tokens, k = input features.  The hardware project's own example fed one decode step of
TinyLlama as m = 1 (the token), n = 5632, k = 2048: that counts a single row of weights against
1 x 5632 activations, and answers MODEL_PARALLEL.  The same product in the convention above is
m = 5632, n = 1, k = 2048: all 5632 rows of weights against one column of activations, and the
answer is TENSOR_PARALLEL.  The runtime always asks the second way, because the weights really
read in a decode step are m*k.
"""

from __future__ import annotations

import enum
import math

import attrs

from spanker.errors import PlanError
from spanker.sched.bandwidth import (
    INTERCARD_BW_BYTES_PER_SEC,
    LOCAL_DDR_BW_BYTES_PER_SEC,
    Profile,
)
from spanker.sched.plan import ModelShape, WeightShape
from spanker.values import Value

# The driver's ABI counts bytes in 64 bits; larger products stop there instead of wrapping.
U64_MAX = 2**64 - 1


class Strategy(enum.Enum):
    """How one matrix product is spread over the cards."""

    TENSOR_PARALLEL = "tensor-parallel"
    MODEL_PARALLEL = "model-parallel"


@attrs.frozen(eq=False, repr=False)
class TileShape(Value):
    """A matrix product: weights `m x k`, activations of `n` tokens, `bytes_per_element` each.

    Raises PlanError when any of them is negative.
    """

    m: int
    n: int
    k: int
    bytes_per_element: int

    def __attrs_post_init__(self) -> None:
        if min(self.m, self.n, self.k, self.bytes_per_element) < 0:
            raise PlanError(f"a tile has no negative dimensions, got {self}")

    @property
    def weight_bytes(self) -> int:
        """m * k * bytes_per_element, at most 2**64 - 1."""
        return min(self.m * self.k * self.bytes_per_element, U64_MAX)

    @property
    def activation_bytes(self) -> int:
        """m * n * bytes_per_element, at most 2**64 - 1."""
        return min(self.m * self.n * self.bytes_per_element, U64_MAX)


def pick_strategy(
    tile: TileShape,
    n_sails: int,
    local_bw: float = LOCAL_DDR_BW_BYTES_PER_SEC,
    intercard_bw: float = INTERCARD_BW_BYTES_PER_SEC,
) -> Strategy:
    """The cheaper strategy for `tile` on `n_sails` cards; a draw goes to TENSOR_PARALLEL.

    Tensor parallel cuts the time to read the weights by n and pays the whole activation over the
    links; model parallel reads all weights and pays 1/n of the activation.  Bandwidths are in
    bytes per second; over a zero bandwidth anything takes forever.  None or one card is always
    TENSOR_PARALLEL.  Raises PlanError for a negative or NaN bandwidth.
    """
    weight_s = _seconds(tile.weight_bytes, local_bw)
    activation_s = _seconds(tile.activation_bytes, intercard_bw)
    n = max(n_sails, 1)
    if n == 1:
        return Strategy.TENSOR_PARALLEL
    tensor_parallel_s = weight_s / n + activation_s
    model_parallel_s = weight_s + activation_s / n
    if tensor_parallel_s <= model_parallel_s:
        return Strategy.TENSOR_PARALLEL
    return Strategy.MODEL_PARALLEL


def _seconds(size_bytes: int, bandwidth_bytes_per_s: float) -> float:
    if not bandwidth_bytes_per_s >= 0:
        raise PlanError(f"expected a bandwidth of 0 bytes/s or more, got {bandwidth_bytes_per_s}")
    if bandwidth_bytes_per_s == 0:
        return math.inf
    # float() first: int / int would round the exact quotient, and so differ from plain float64.
    return float(size_bytes) / float(bandwidth_bytes_per_s)


# --- a whole model ---------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class Decision(Value):
    """What `pick_strategy` answered for one matrix (or several alike) at one token."""

    name: str
    m: int
    k: int
    weight_bytes: int
    count: int
    strategy: Strategy


def decide(shape: ModelShape, cards: int, profile: Profile) -> tuple[Decision, ...]:
    """Ask `pick_strategy` for every matmul of the model at n = 1, m = output features.

    Matrices of the same role and size are one entry with their count.  Bytes per element are
    those of float32 activations, 4, as the rule of the hardware project has it.
    """
    found: dict[tuple[str, int, int], list[int]] = {}

    def ask(role: str, w: WeightShape) -> None:
        entry = found.setdefault((role, w.rows, w.k), [0, 0])
        entry[0] += w.rows * w.row_bytes
        entry[1] += 1

    for layer in shape.layers:
        for field, matrix in zip(attrs.fields(type(layer)), layer.matrices, strict=True):
            ask(field.name, matrix)
    ask("output", shape.output)
    return tuple(
        Decision(
            role,
            rows,
            k,
            nbytes,
            count,
            pick_strategy(
                TileShape(rows, 1, k, 4),
                cards,
                profile.local_ddr_bytes_per_s,
                profile.intercard_bytes_per_s,
            ),
        )
        for (role, rows, k), (nbytes, count) in found.items()
    )
