# SPDX-License-Identifier: Apache-2.0
"""A base for values that are compared, hashed and shown by their fields.

attrs compiles these three methods for every class, 0.25 ms each time, which was a fifth of what
Spanker takes to start.  `@attrs.frozen(eq=False, repr=False)` on a `Value` has them from here, for
some tenths of a microsecond a call more.  What is compared or hashed by the thousand stays with
plain `@attrs.frozen`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    # What a checker of types is to see.
    from attrs import frozen as lazy_frozen
else:

    def lazy_frozen(cls):
        """`@attrs.frozen(eq=False, repr=False, slots=False)`, carried out when the class gets its
        first instance: of messages, events and reports most starts use few, and attrs takes 0.25 ms
        for each class."""
        cls.__init__ = _first_init
        return cls


_MAKING = threading.RLock()


def _first_init(self: object, *args: object, **kwargs: object) -> None:
    made(type(self))
    self.__init__(*args, **kwargs)  # type: ignore[misc]


def made(cls: type) -> type:
    """The class itself, as attrs has it: for who wants its fields before it has an instance."""
    with _MAKING:
        for base in reversed(cls.__mro__):
            if base.__dict__.get("__init__") is _first_init:
                attrs.frozen(eq=False, repr=False, slots=False, init=True)(base)
    return cls


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
        for field in attrs.fields(made(self.__class__)):
            if field.repr:
                text = field.repr if callable(field.repr) else repr
                shown.append(f"{field.name}={text(getattr(self, field.name))}")
        return f"{self.__class__.__qualname__.rsplit('>.', 1)[-1]}({', '.join(shown)})"


def _key(cls: type) -> Callable[[Any], object]:
    names = [field.name for field in attrs.fields(made(cls)) if field.eq]
    _KEYS[cls] = key = attrgetter(*names) if names else lambda value: ()
    return key


__all__ = ["Value", "lazy_frozen", "made"]
