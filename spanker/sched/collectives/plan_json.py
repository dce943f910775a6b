# SPDX-License-Identifier: Apache-2.0
"""Plans as JSON, and back: exactly the same value.

A plan from a file has only the right form; spanker.sched.verify says whether it is right.  Every
field is checked, everything that the file controls has a limit, and an error names the path of
what is wrong, as in plan.phases[3].sends[0].to: expected ..., got ...

    {"version": 1, "kind": "all-reduce", "algorithm": "ring", "cards": [0, 1], "elements": 4,
     "shares": [], "op": "sum", "ordered": false, "root": null, "tmp_elements": 2,
     "phases": [{"sends": [[0, 1, ["data", 0, 2], ["tmp", 0, 2]], ...],
                 "local": [["fold", 1, ["data", 0, 2], ["tmp", 0, 2]], ["divide", ...], ...]}, ...]}

A send is source, target, what, to; local work is its name, card, into and, but for a division,
operand; a region is buffer, start, stop; a share is start, stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spanker.sched.collectives.plan import (
    VERSION,
    Buffer,
    CollectivePlan,
    Copy,
    Divide,
    Fold,
    Kind,
    Local,
    Phase,
    ReduceOp,
    Region,
    Send,
)
from spanker.sched.reading import card_number, enum_of, fields, items, parsed, refuse, row
from spanker.sched.shares import Share
from spanker.sched.topology import MAX_CARDS

TEXT_BYTES_MAX = 256 << 20
ELEMENTS_MAX = 1 << 48
PHASES_MAX = 1 << 16
# In a phase; a direct exchange among 256 cards has 65,280 sends.
STEPS_MAX = 1 << 17
NAME_MAX = 64

_LOCAL: dict[str, type[Local]] = {"fold": Fold, "copy": Copy, "divide": Divide}
_FIELDS = (
    "version",
    "kind",
    "algorithm",
    "cards",
    "elements",
    "shares",
    "op",
    "ordered",
    "root",
    "tmp_elements",
    "phases",
)


def to_json(plan: CollectivePlan) -> dict[str, Any]:
    """The plan as a value that json.dumps takes."""
    return {
        "version": VERSION,
        "kind": plan.kind.value,
        "algorithm": plan.algorithm,
        "cards": list(plan.cards),
        "elements": plan.elements,
        "shares": [[share.start, share.stop] for share in plan.shares],
        "op": plan.op.value if plan.op else None,
        "ordered": plan.ordered,
        "root": plan.root,
        "tmp_elements": plan.tmp_elements,
        "phases": [
            {
                "sends": [
                    [s.source, s.target, _region(s.what), _region(s.to)] for s in phase.sends
                ],
                "local": [_local(x) for x in phase.local],
            }
            for phase in plan.phases
        ],
    }


def from_json(document: str | bytes | Mapping[str, Any]) -> CollectivePlan:
    """The plan that `to_json` made, from its value or its text.  Raises PlanError, with the path of
    what is wrong."""
    value: object = (
        parsed(document, "plan", TEXT_BYTES_MAX) if isinstance(document, (str, bytes)) else document
    )
    fields(value, "plan", _FIELDS)
    assert isinstance(value, Mapping)
    if type(value["version"]) is not int or value["version"] != VERSION:
        refuse("plan.version", f"{VERSION}", value["version"])
    cards = tuple(items(value["cards"], "plan.cards", MAX_CARDS, card_number))
    if not cards or len(set(cards)) != len(cards):
        refuse("plan.cards", "one card or more, each once", value["cards"])

    def card(x: object, path: str) -> int:
        number = card_number(x, path)
        if number not in known:
            refuse(path, "a card of the plan", x)
        return number

    def send(x: object, path: str) -> Send:
        source, target, what, to = row(x, path, "source, target, what, to")
        return Send(
            card(source, f"{path}.source"),
            card(target, f"{path}.target"),
            _to_region(what, f"{path}.what"),
            _to_region(to, f"{path}.to"),
        )

    def local(x: object, path: str) -> Local:
        name = x[0] if isinstance(x, list) and x else x
        if not isinstance(name, str) or name not in _LOCAL:
            refuse(f"{path}.name", f"one of {', '.join(_LOCAL)}", name)
        if name == "divide":
            _, number, into = row(x, path, "name, card, into")
            return Divide(card(number, f"{path}.card"), _to_region(into, f"{path}.into"))
        _, number, into, operand = row(x, path, "name, card, into, operand")
        return (Fold if name == "fold" else Copy)(
            card(number, f"{path}.card"),
            _to_region(into, f"{path}.into"),
            _to_region(operand, f"{path}.operand"),
        )

    def phase(x: object, path: str) -> Phase:
        of = fields(x, path, ("sends", "local"))
        return Phase(
            tuple(items(of["sends"], f"{path}.sends", STEPS_MAX, send)),
            tuple(items(of["local"], f"{path}.local", STEPS_MAX, local)),
        )

    known = set(cards)
    algorithm = value["algorithm"]
    if not isinstance(algorithm, str) or not 1 <= len(algorithm) <= NAME_MAX:
        refuse("plan.algorithm", f"a name of 1 to {NAME_MAX} characters", algorithm)
    if not isinstance(value["ordered"], bool):
        refuse("plan.ordered", "true or false", value["ordered"])
    return CollectivePlan(
        kind=enum_of(Kind, value["kind"], "plan.kind"),
        algorithm=algorithm,
        cards=cards,
        elements=_count(value["elements"], "plan.elements"),
        phases=tuple(items(value["phases"], "plan.phases", PHASES_MAX, phase)),
        shares=tuple(items(value["shares"], "plan.shares", MAX_CARDS, _share)),
        op=None if value["op"] is None else enum_of(ReduceOp, value["op"], "plan.op"),
        ordered=value["ordered"],
        root=None if value["root"] is None else card(value["root"], "plan.root"),
        tmp_elements=_count(value["tmp_elements"], "plan.tmp_elements"),
    )


# --- writing ----------------------------------------------------------------------------


def _region(region: Region) -> list[Any]:
    return [region.buffer.value, region.start, region.stop]


def _local(local: Local) -> list[Any]:
    if isinstance(local, Divide):
        return ["divide", local.card, _region(local.into)]
    name = "fold" if isinstance(local, Fold) else "copy"
    return [name, local.card, _region(local.into), _region(local.operand)]


# --- reading ----------------------------------------------------------------------------


def _count(value: object, path: str) -> int:
    if type(value) is not int or not 0 <= value <= ELEMENTS_MAX:
        refuse(path, f"a number from 0 to {ELEMENTS_MAX}", value)
    return value


def _share(value: object, path: str) -> Share:
    start, stop = row(value, path, "start, stop")
    return Share(*_range(start, stop, path))


def _to_region(value: object, path: str) -> Region:
    buffer, start, stop = row(value, path, "buffer, start, stop")
    return Region(enum_of(Buffer, buffer, f"{path}.buffer"), *_range(start, stop, path))


def _range(start: object, stop: object, path: str) -> tuple[int, int]:
    first, end = _count(start, f"{path}.start"), _count(stop, f"{path}.stop")
    if first > end:
        refuse(f"{path}.stop", f"{first} or more", end)
    return first, end
