# SPDX-License-Identifier: Apache-2.0
"""Reading JSON that anybody may have written: every value is checked, everything that it controls
has a limit, and a PlanError names the path of what is wrong, as in plan.phases[3].sends[0].to:
expected ..., got ...
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from spanker.errors import PlanError
from spanker.sched.topology import MAX_CARDS

_T = TypeVar("_T")
_EnumT = TypeVar("_EnumT", bound=enum.Enum)


def parsed(text: str | bytes, what: str, bytes_max: int) -> object:
    """The value of a JSON text that says nothing twice."""
    if len(text) > bytes_max:
        raise PlanError(f"{what}: expected at most {bytes_max} bytes of JSON, got {len(text)}")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{what}: expected JSON, got what does not parse: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError(f"a field appears twice among {[name for name, _ in pairs]}"[:200])
    return fields


def refuse(path: str, expected: str, got: object) -> NoReturn:
    """Raise the error about one value."""
    text = repr(got)
    raise PlanError(f"{path}: expected {expected}, got {text[:60]}{'...' * (len(text) > 60)}")


def fields(value: object, path: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    """An object with just these fields."""
    if not isinstance(value, Mapping):
        refuse(path, "an object", value)
    for name in names:
        if name not in value:
            refuse(path, f"a field {name!r}", list(value))
    for name in value:
        if name not in names:
            refuse(path, f"no fields but {', '.join(names)}", name)
    return value


def items(value: object, path: str, longest: int, item: Callable[[object, str], _T]) -> list[_T]:
    """A list of at most so many, each read by `item`."""
    if not isinstance(value, list):
        refuse(path, "a list", value)
    if len(value) > longest:
        raise PlanError(f"{path}: expected at most {longest} entries, got {len(value)}")
    return [item(x, f"{path}[{i}]") for i, x in enumerate(value)]


def row(value: object, path: str, names: str) -> list[Any]:
    """A list of as many values as there are names."""
    if not isinstance(value, list) or len(value) != names.count(",") + 1:
        refuse(path, f"[{names}]", value)
    return value


def enum_of(kind: type[_EnumT], value: object, path: str) -> _EnumT:
    """The member with that value."""
    for member in kind:
        if member.value == value:
            return member
    refuse(path, f"one of {', '.join(member.value for member in kind)}", value)


def card_number(value: object, path: str) -> int:
    """The number of a card."""
    if type(value) is not int or not 0 <= value < MAX_CARDS:
        refuse(path, f"a card, 0 to {MAX_CARDS - 1}", value)
    return value
