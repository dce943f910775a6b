# SPDX-License-Identifier: Apache-2.0
"""A base for values that are compared, hashed and shown by their fields.

attrs compiles these three methods for every class, 0.25 ms each time, which was a fifth of what
Spanker takes to start.  `@attrs.frozen(eq=False, repr=False)` on a `Value` has them from here, for
some tenths of a microsecond a call more.  What is compared or hashed by the thousand stays with
plain `@attrs.frozen`.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import attrs

# What a class is compared and hashed by.
_KEYS: dict[type, Callable[[Any], object]] = {}


class Value:
    """Equal to values of the same class with equal fields, as with attrs."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        key = _KEYS.get(self.__class__) or _key(self.__class__)
        return key(self) == key(other)

    def __hash__(self) -> int:
        key = _KEYS.get(self.__class__) or _key(self.__class__)
        return hash((self.__class__, key(self)))

    def __repr__(self) -> str:
        shown = []
        for field in attrs.fields(self.__class__):  # type: ignore[arg-type]
            if field.repr:
                text = field.repr if callable(field.repr) else repr
                shown.append(f"{field.name}={text(getattr(self, field.name))}")
        return f"{self.__class__.__qualname__.rsplit('>.', 1)[-1]}({', '.join(shown)})"


def _key(cls: type) -> Callable[[Any], object]:
    names = [field.name for field in attrs.fields(cls) if field.eq]
    _KEYS[cls] = key = attrgetter(*names) if names else lambda value: ()
    return key
