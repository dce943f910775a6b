# SPDX-License-Identifier: Apache-2.0
"""Choosing a plan: by name, or by what `pick_strategy` says of each matrix of the model."""

from __future__ import annotations

import re

import attrs

from spanker.errors import PlanError
from spanker.sched.bandwidth import Profile
from spanker.sched.decision import Strategy, TileShape, pick_strategy
from spanker.sched.plan import (
    FleetPlan,
    ModelShape,
    Plan,
    WeightShape,
    side_by_side,
    tensor_pipeline,
)

# dpD, tpA and ppB, in this order, at least one of them.
_NAMED = re.compile(
    r"(?!$)(?:dp(\d{1,4})(?:x(?=[tp])|$))?(?:tp(\d{1,4})(?:x(?=p)|$))?(?:pp(\d{1,4}))?"
)


@attrs.frozen
class Decision:
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


def _auto(shape: ModelShape, cards: int, profile: Profile) -> Plan:
    decisions = decide(shape, cards, profile)
    tensor = sum(d.weight_bytes for d in decisions if d.strategy is Strategy.TENSOR_PARALLEL)
    total = sum(d.weight_bytes for d in decisions)
    use_tensor = 2 * tensor >= total
    percent = 100 * (tensor if use_tensor else total - tensor) / total
    answer = "tensor" if use_tensor else "model"
    reason = (
        f"pick_strategy answers {answer} parallel for {percent:.0f} % of the weight bytes "
        f"with the {profile.name} bandwidths"
    )
    if not use_tensor and cards > len(shape.layers):
        use_tensor = True
        reason += f", but {len(shape.layers)} layers cannot fill {cards} pipeline stages"
    plan = tensor_pipeline(shape, cards, 1) if use_tensor else tensor_pipeline(shape, 1, cards)
    return attrs.evolve(plan, reason=reason)


def make_plan(spec: str, shape: ModelShape, cards: int, profile: Profile) -> FleetPlan:
    """The plan for `spec` over all `cards`: `auto`, `tp`, `pp`, or any of dpD, tpA and ppB joined
    by x: D replicas side by side, of B stages of A cards each.

    Raises PlanError when the spec is not understood or does not use exactly `cards` cards.
    """
    text = spec.strip().lower()
    if text == "auto":
        return FleetPlan.of(_auto(shape, cards, profile))
    if text == "tp":
        return _as_asked(tensor_pipeline(shape, cards, 1))
    if text == "pp":
        return _as_asked(tensor_pipeline(shape, 1, cards))
    match = _NAMED.fullmatch(text)
    if not match:
        raise PlanError(
            f"no plan {spec!r}: expected auto, tp, pp, or tpAxppB such as tp2xpp2, or several "
            f"replicas of it side by side such as dp2xtp2"
        )
    replicas, tensor, pipeline = (int(count or 1) for count in match.groups())
    if replicas * tensor * pipeline != cards:
        uses = replicas * tensor * pipeline
        raise PlanError(
            f"plan {text} uses {uses} cards, the fleet has {cards}: "
            f"use --cards {uses}, or --plan auto"
        )
    return _as_asked(tensor_pipeline(shape, tensor, pipeline), replicas)


def _as_asked(plan: Plan, replicas: int = 1) -> FleetPlan:
    return side_by_side(attrs.evolve(plan, reason="as asked"), replicas)
