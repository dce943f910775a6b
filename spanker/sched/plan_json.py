# SPDX-License-Identifier: Apache-2.0
"""Whole-model plans as JSON, and back: exactly the same value.

A plan from a file has only the right form; `sched.plan.check_plan` says whether it computes a
model.

    {"version": 1, "name": "tp2", "reason": "", "replicas": [
      {"name": "tp2", "reason": "", "stages": [
        {"layers": [0, 30], "shares": [
          {"card": 0, "heads": [0, 5], "hidden": [0, 288], "ffn": [0, 768],
           "vocabulary": [0, 24576], "columns": [0, 288]}, ...]}]}]}

A range is [start, stop).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from spanker.sched.plan import CardShare, FleetPlan, Plan, Stage
from spanker.sched.reading import card_number, fields, items, parsed, refuse, row
from spanker.sched.shares import Share
from spanker.sched.topology import MAX_CARDS

VERSION = 1
TEXT_BYTES_MAX = 1 << 20
LAYERS_MAX = 4096
# Of a dimension of a model.
SIZE_MAX = 1 << 24
NAME_MAX = 1024
REASON_MAX = 4096

_SHARES = tuple(f.name for f in attrs.fields(CardShare) if f.name != "card")


def to_json(plan: FleetPlan) -> dict[str, Any]:
    """The plan as a value that json.dumps takes."""
    return {
        "version": VERSION,
        "name": plan.name,
        "reason": plan.reason,
        "replicas": [_replica_json(replica) for replica in plan.replicas],
    }


def from_json(document: str | bytes | Mapping[str, Any]) -> FleetPlan:
    """The plan that `to_json` made, from its value or its text.  Raises PlanError, with the path of
    what is wrong."""
    value: object = document
    if isinstance(document, str | bytes):
        value = parsed(document, "plan", TEXT_BYTES_MAX)
    of = fields(value, "plan", ("version", "name", "reason", "replicas"))
    if type(of["version"]) is not int or of["version"] != VERSION:
        refuse("plan.version", f"{VERSION}", of["version"])
    replicas = tuple(items(of["replicas"], "plan.replicas", MAX_CARDS, _replica))
    if not replicas:
        refuse("plan.replicas", "one replica or more", of["replicas"])
    plan = FleetPlan(
        _text(of["name"], "plan.name", NAME_MAX),
        replicas,
        _text(of["reason"], "plan.reason", REASON_MAX),
    )
    if len(set(plan.cards)) != len(plan.cards):
        refuse("plan.replicas", "every card once", list(plan.cards))
    return plan


# --- writing ----------------------------------------------------------------------------


def _replica_json(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "reason": plan.reason,
        "stages": [
            {
                "layers": _pair(stage.layers),
                "shares": [
                    {"card": share.card} | {name: _pair(getattr(share, name)) for name in _SHARES}
                    for share in stage.shares
                ],
            }
            for stage in plan.stages
        ],
    }


def _pair(share: Share) -> list[int]:
    return [share.start, share.stop]


# --- reading ----------------------------------------------------------------------------


def _replica(value: object, path: str) -> Plan:
    of = fields(value, path, ("name", "reason", "stages"))
    return Plan(
        _text(of["name"], f"{path}.name", NAME_MAX),
        tuple(items(of["stages"], f"{path}.stages", LAYERS_MAX, _stage)),
        _text(of["reason"], f"{path}.reason", REASON_MAX),
    )


def _stage(value: object, path: str) -> Stage:
    of = fields(value, path, ("layers", "shares"))
    return Stage(
        _range(of["layers"], f"{path}.layers"),
        tuple(items(of["shares"], f"{path}.shares", MAX_CARDS, _share)),
    )


def _share(value: object, path: str) -> CardShare:
    of = fields(value, path, ("card", *_SHARES))
    shares = {name: _range(of[name], f"{path}.{name}") for name in _SHARES}
    return CardShare(card_number(of["card"], f"{path}.card"), **shares)


def _range(value: object, path: str) -> Share:
    start, stop = row(value, path, "start, stop")
    for name, number in (("start", start), ("stop", stop)):
        if type(number) is not int or not 0 <= number <= SIZE_MAX:
            refuse(f"{path}.{name}", f"a number from 0 to {SIZE_MAX}", number)
    if start > stop:
        refuse(f"{path}.stop", f"{start} or more", stop)
    return Share(start, stop)


def _text(value: object, path: str, longest: int) -> str:
    if not isinstance(value, str) or len(value) > longest:
        refuse(path, f"a text of at most {longest} characters", value)
    return value
