# SPDX-License-Identifier: Apache-2.0
"""What a scenario is: a fleet, a model, clients, and what goes wrong when.

Values only, each field a literal, so that the text of a scenario is Python that makes it again.
Nothing here draws or runs one (drawing.py, running.py).
"""

from __future__ import annotations

import enum
from typing import Any

import attrs


class Way(enum.Enum):
    """How a client that does not stay to the end leaves."""

    CLOSE = "close"
    DROP = "drop"
    CANCEL = "cancel"

    def __repr__(self) -> str:
        return f"Way.{self.name}"


class What(enum.Enum):
    """What can be done to a fleet or in it."""

    KILL = "kill"
    HANG = "hang"
    RESET = "reset"
    ECC = "ecc"
    SLOW = "slow"
    STARVE = "starve"
    CUT = "cut"
    CORRUPT = "corrupt"
    INJECT = "inject"
    DRAIN = "drain"
    ADMIT = "admit"
    LOAD = "load"
    JOIN = "join"

    def __repr__(self) -> str:
        return f"What.{self.name}"


# What is somebody's wish; the rest is misfortune.
WISHES = frozenset({What.DRAIN, What.ADMIT, What.LOAD, What.JOIN})
# What a card does not survive.
FATAL = frozenset({What.KILL, What.HANG, What.RESET, What.ECC})


@attrs.frozen
class Moment:
    """`then_s` after so many items (tokens, pieces of logits) have come to clients of all kinds and
    so many events been told by the fleet, counted from its opening."""

    items: int = 0
    events: int = 0
    then_s: float = 0.0


@attrs.frozen
class Client:
    """One request, and how whoever makes it behaves.

    Its prompt has `prompt_length` tokens, which follow from `prompt_first`.  `score` asks for the
    logits of the prompt, anything else generates.  It takes `pause_s` before each item but the
    first, leaves `leave_s` after its item `leave_after` (None: stays to the end), and gives up
    `deadline_s` after it has begun.  Its stop string is the text of the token `stop_at` of the
    right answer, if that has any.  `model` is the one it asks: 0 the first, 1 the second.
    """

    start: Moment = Moment()
    prompt_first: int = 0
    prompt_length: int = 1
    tokens_max: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    sampling_seed: int = 0
    logits: bool = False
    score: bool = False
    pause_s: float = 0.0
    leave_after: int | None = None
    leave_s: float = 0.0
    leave_by: Way = Way.CLOSE
    deadline_s: float | None = None
    stop_at: int | None = None
    model: int = 0


@attrs.frozen
class Deed:
    """Something done at a moment, to a card where it concerns one, or its link with `peer`.

    `value` is the factor of SLOW, the allocations of STARVE, the messages of CORRUPT; `for_s` is
    how long a link is CUT, None for ever.  INJECT is the fault `text` of a fault plan, for what
    happens to channels, the host link, and whatever else only an injection does.  One that is for a
    card that has not joined is not done.
    """

    at: Moment
    what: What
    card: int = 0
    peer: int = 0
    value: float = 1
    for_s: float | None = None
    text: str = ""


@attrs.frozen
class Knobs:
    """Limits of sessions and steps, far smaller than usual, so that a short scenario meets them."""

    run_ahead: int = 64
    score_ahead: int = 4
    page_positions: int = 64
    outputs_max: int = 64
    candidates: int = 64
    steps_ahead: int = 2


@attrs.frozen
class Scenario:
    """Everything that is decided before a run; `seed` decides the rest, the scheduler's choices.

    `cards`, `plan`, `audit_every` and `rebalance` as for `open_fleet`, `profile`, `model` and
    `links` by their names in profiles.py and models.py, `ctx`, `kv_tokens`, `kv_copies` and
    `prompt_chunk` as for `Fleet.load`.
    """

    seed: int
    cards: str
    profile: str = "instant"
    model: str = "small"
    plan: str = "tp"
    ctx: int = 64
    kv_tokens: int | None = None
    prompt_chunk: int = 16
    hang_timeout_s: float = 1.0
    recover: bool = True
    links: str = "mesh"
    audit_every: int | None = None
    rebalance: bool = False
    kv_copies: int = 0
    knobs: Knobs = Knobs()
    clients: tuple[Client, ...] = ()
    deeds: tuple[Deed, ...] = ()

    @property
    def faults(self) -> tuple[Deed, ...]:
        """What goes wrong of what is done."""
        return tuple(deed for deed in self.deeds if deed.what not in WISHES)


# --- as text --------------------------------------------------------------------------------


def literal(value: object, indent: int = 0) -> str:
    """A value of this file as Python that makes it, without what is as by default."""
    if isinstance(value, tuple):
        if not value:
            return "()"
        inner = " " * (indent + 4)
        lines = [f"{inner}{literal(item, indent + 4)},\n" for item in value]
        return f"(\n{''.join(lines)}{' ' * indent})"
    kind: type[Any] = type(value)
    if not attrs.has(kind):
        return repr(value)
    fields = [
        (field.name, getattr(value, field.name))
        for field in attrs.fields(kind)
        if getattr(value, field.name) != field.default
    ]
    name = kind.__name__
    if not any(isinstance(item, tuple) and item for _, item in fields):
        return f"{name}({', '.join(f'{key}={literal(item)}' for key, item in fields)})"
    inner = " " * (indent + 4)
    lines = [f"{inner}{key}={literal(item, indent + 4)},\n" for key, item in fields]
    return f"{name}(\n{''.join(lines)}{' ' * indent})"
