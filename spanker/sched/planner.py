# SPDX-License-Identifier: Apache-2.0
"""Choosing a plan: by name, or by what `pick_strategy` says of each matrix of the model."""

from __future__ import annotations

import re

import attrs

from spanker.errors import PlanError
from spanker.sched.bandwidth import Profile
from spanker.sched.decision import Strategy, decide
from spanker.sched.plan import ModelShape, Plan, tensor_pipeline

_NAMED = re.compile(r"(?:tp(\d{1,4}))?(x?)(?:pp(\d{1,4}))?")


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


def make_plan(spec: str, shape: ModelShape, cards: int, profile: Profile) -> Plan:
    """The plan for `spec`: `auto`, `tp`, `pp`, `tpA`, `ppB` or `tpAxppB`, over all `cards`.

    Raises PlanError when the spec is not understood or does not use exactly `cards` cards.
    """
    text = spec.strip().lower()
    if text == "auto":
        return _auto(shape, cards, profile)
    if text == "tp":
        return attrs.evolve(tensor_pipeline(shape, cards, 1), reason="as asked")
    if text == "pp":
        return attrs.evolve(tensor_pipeline(shape, 1, cards), reason="as asked")
    match = _NAMED.fullmatch(text)
    if not match or not text or bool(match[2]) != bool(match[1] and match[3]):
        raise PlanError(f"no plan {spec!r}: expected auto, tp, pp, or tpAxppB such as tp2xpp2")
    tensor, pipeline = int(match[1] or 1), int(match[3] or 1)
    if tensor * pipeline != cards:
        raise PlanError(
            f"plan {text} uses {tensor * pipeline} cards, the fleet has {cards}: "
            f"use --cards {tensor * pipeline}, or --plan auto"
        )
    return attrs.evolve(tensor_pipeline(shape, tensor, pipeline), reason="as asked")
