# SPDX-License-Identifier: Apache-2.0
"""Fault plans: what shall fail, where and when, as values.

Nothing here makes anything fail: that is `injection`, or whoever else reads a plan.  As text, one
fault is a line, and faults are separated by `;`, a comma and a space, or a new line:

    FAULT = WHAT WHERE "@" WHEN ["x" FACTOR] ["for" SECONDS "s"] [COUNT "times"]
    WHERE = CARD | CARD "," CARD ... | CARD "-" CARD | "host" | "channel:" CARD | "client:" NUMBER
    WHEN  = ("time" | "step" | "token" | "byte") ":" NUMBER | "command:" STEP ":" COMMAND

    kill 2@token:20    slow 3@time:0.5 x4    cut 0-2@token:10 for 0.5s    drop channel:1@step:9

What goes together is the table `KINDS`.  docs/testing.md explains each kind.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from spanker.errors import ConfigError
from spanker.values import Value

VERSION = 1
TEXT_CHARACTERS_MAX = 1 << 16
FAULTS_MAX = 1024
NUMBER_MAX = 1 << 53


class What(enum.Enum):
    """What goes wrong; the value is its word in texts."""

    DIE = "kill"
    HANG = "hang"
    SLOW = "slow"
    RESET = "reset"
    ECC = "ecc"
    ECC_CORRECTED = "ecc-corrected"
    WRONG_COMPLETION = "wrong-completion"
    OUT_OF_MEMORY = "out-of-memory"
    CORRUPT = "corrupt"
    CUT = "cut"
    FLAP = "flap"
    PARTITION = "partition"
    STALL = "stall"
    DROP = "drop"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    DISCONNECT = "disconnect"
    CANCEL = "cancel"


def _ascending(numbers: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers)))


# --- where --------------------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class Card(Value):
    """A card by its number in the fleet."""

    number: int

    def __str__(self) -> str:
        return str(self.number)


@attrs.frozen(eq=False, repr=False)
class Cards(Value):
    """A set of cards, in ascending order."""

    numbers: tuple[int, ...] = attrs.field(converter=_ascending)

    def __str__(self) -> str:
        return ",".join(map(str, self.numbers))


@attrs.frozen(eq=False, repr=False)
class Link(Value):
    """The link between two cards; what has a direction concerns what `a` sends to `b`."""

    a: int
    b: int

    def __str__(self) -> str:
        return f"{self.a}-{self.b}"


@attrs.frozen(eq=False, repr=False)
class HostLink(Value):
    """What the host's messages to all cards, and theirs to it, travel over."""

    def __str__(self) -> str:
        return "host"


@attrs.frozen(eq=False, repr=False)
class Channel(Value):
    """The messages between the host and one card."""

    card: int

    def __str__(self) -> str:
        return f"channel:{self.card}"


@attrs.frozen(eq=False, repr=False)
class Client(Value):
    """Whoever made request `number`, from 0; for who runs the requests, as `injection` does not."""

    number: int

    def __str__(self) -> str:
        return f"client:{self.number}"


Where = Card | Cards | Link | HostLink | Channel | Client


# --- when ---------------------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class AtTime(Value):
    """So many seconds of trio's clock after the fleet was opened."""

    seconds: float = attrs.field(converter=float)

    def __str__(self) -> str:
        return f"time:{_decimal(self.seconds)}"


@attrs.frozen(eq=False, repr=False)
class AtStep(Value):
    """Just before the n-th submission to the card, from 1; of a link, to its first card."""

    n: int

    def __str__(self) -> str:
        return f"step:{self.n}"


@attrs.frozen(eq=False, repr=False)
class AtCommand(Value):
    """When a card comes to this command, from 0, of the n-th submission to it, from 1."""

    step: int
    command: int

    def __str__(self) -> str:
        return f"command:{self.step}:{self.command}"


@attrs.frozen(eq=False, repr=False)
class AtToken(Value):
    """When the n-th token has come, from 1, by the count of whoever takes them."""

    n: int

    def __str__(self) -> str:
        return f"token:{self.n}"


@attrs.frozen(eq=False, repr=False)
class AtByte(Value):
    """At the message that carries the n-th byte over the channel, from 1, both ways together."""

    n: int

    def __str__(self) -> str:
        return f"byte:{self.n}"


When = AtTime | AtStep | AtCommand | AtToken | AtByte


# --- what goes together -------------------------------------------------------------------

PLACES: Mapping[type[Where], str] = {
    Card: "a card",
    Cards: "a set of cards",
    Link: "a link",
    HostLink: "the host link",
    Channel: "a channel",
    Client: "a client",
}
MOMENT_NAMES: Mapping[type[When], str] = {
    AtTime: "time",
    AtStep: "step",
    AtCommand: "command",
    AtToken: "token",
    AtByte: "byte",
}


class Option(enum.Enum):
    """Whether a kind of fault has a factor, or a duration."""

    NO = "no"
    MAY = "may"
    MUST = "must"


@attrs.frozen(eq=False, repr=False)
class Kind(Value):
    """Where one kind of fault can strike, what it can be told besides, and whether it can cost the
    fleet a card."""

    where: tuple[type[Where], ...]
    factor: Option = Option.NO
    duration: Option = Option.NO
    counted: bool = False
    loses: bool = False


KINDS: Mapping[What, Kind] = {
    What.DIE: Kind((Card,), loses=True),
    What.HANG: Kind((Card,), loses=True),
    What.SLOW: Kind((Card,), factor=Option.MUST, duration=Option.MAY),
    What.RESET: Kind((Card,), loses=True),
    What.ECC: Kind((Card,), loses=True),
    What.ECC_CORRECTED: Kind((Card,), counted=True),
    What.WRONG_COMPLETION: Kind((Card,), loses=True),
    What.OUT_OF_MEMORY: Kind((Card,), counted=True),
    What.CORRUPT: Kind((Link, Channel), counted=True, loses=True),
    What.CUT: Kind((Link,), duration=Option.MAY, loses=True),
    What.FLAP: Kind((Link, Card), duration=Option.MUST, counted=True, loses=True),
    What.PARTITION: Kind((Cards,), duration=Option.MAY, loses=True),
    What.STALL: Kind((Channel, HostLink, Client), duration=Option.MUST, loses=True),
    What.DROP: Kind((Channel,), counted=True, loses=True),
    What.DUPLICATE: Kind((Channel,), counted=True, loses=True),
    What.REORDER: Kind((Channel,), counted=True, loses=True),
    What.DISCONNECT: Kind((Channel,), loses=True),
    What.CANCEL: Kind((Client,)),
}

# The moments that each kind of place can tell of.
MOMENTS: Mapping[type[Where], tuple[type[When], ...]] = {
    Card: (AtTime, AtToken, AtStep, AtCommand),
    Cards: (AtTime, AtToken),
    Link: (AtTime, AtToken, AtStep),
    HostLink: (AtTime, AtToken),
    Channel: (AtTime, AtToken, AtStep, AtByte),
    Client: (AtTime, AtToken),
}

# What a card can do to itself in the middle of a program.
AT_COMMANDS = frozenset({What.DIE, What.HANG, What.RESET, What.ECC})


@attrs.frozen(eq=False, repr=False)
class Fault(Value):
    """One fault.  `factor` says how many times slower, `duration_s` how long it lasts (None: for
    good; of what flaps: how long it is away each time, and then back), `count` how many messages,
    allocations, errors or times.  ConfigError where these do not go together."""

    what: What
    where: Where
    when: When
    factor: float | None = None
    duration_s: float | None = None
    count: int = 1

    def __attrs_post_init__(self) -> None:
        kind = KINDS[self.what]
        if type(self.where) not in kind.where:
            self._refuse(f"strikes {_places(kind.where)}", PLACES[type(self.where)])
        moments = MOMENTS[type(self.where)]
        if self.what not in AT_COMMANDS:
            moments = tuple(m for m in moments if m is not AtCommand)
        if type(self.when) not in moments:
            named = ", ".join(MOMENT_NAMES[moment] for moment in moments)
            self._refuse(
                f"of {PLACES[type(self.where)]} is at {named}", MOMENT_NAMES[type(self.when)]
            )
        self._check_numbers()
        for name, value, wanted, least in (
            ("a factor", self.factor, kind.factor, 1.0),
            ("a duration", self.duration_s, kind.duration, 0.0),
        ):
            if value is None and wanted is Option.MUST:
                self._refuse(f"needs {name}", "none")
            if value is not None and wanted is Option.NO:
                self._refuse(f"has no use for {name}", value)
            if value is not None and not (math.isfinite(value) and value > least):
                self._refuse(f"needs {name} above {least:g}", value)
        if self.count != 1 and not kind.counted:
            self._refuse("happens once", f"{self.count} times")

    def _check_numbers(self) -> None:
        numbers: list[tuple[str, object, int]] = [("count", self.count, 1)]
        where, when = self.where, self.when
        names = [field.name for field in attrs.fields(type(where))]
        for name in names:
            value = getattr(where, name)
            values = value if isinstance(value, tuple) else (value,)
            numbers += [("number", each, 0) for each in values]
        if isinstance(where, Link) and where.a == where.b:
            self._refuse("needs a link between two cards", where)
        if isinstance(where, Cards) and not where.numbers:
            self._refuse("needs at least one card", "none")
        if isinstance(when, AtTime):
            if not (math.isfinite(when.seconds) and when.seconds >= 0):
                self._refuse("is at a time from 0 on", when.seconds)
        elif isinstance(when, AtCommand):
            numbers += [("step", when.step, 1), ("command", when.command, 0)]
        else:
            numbers.append((MOMENT_NAMES[type(when)], when.n, 1))
        for name, number, least in numbers:
            if type(number) is not int or not least <= number < NUMBER_MAX:
                self._refuse(f"needs a {name} from {least} on", number)

    def _refuse(self, expected: str, got: object) -> None:
        raise ConfigError(f"fault {self.what.value}: {expected}, got {got}")

    def __str__(self) -> str:
        parts = [f"{self.what.value} {self.where}@{self.when}"]
        if self.factor is not None:
            parts.append(f"x{_decimal(self.factor)}")
        if self.duration_s is not None:
            parts.append(f"for {_decimal(self.duration_s)}s")
        if self.count != 1:
            parts.append(f"{self.count} times")
        return " ".join(parts)

    @property
    def cards(self) -> tuple[int, ...]:
        """The cards whose own part, link or channel it strikes; none for the host's or a client."""
        where = self.where
        if isinstance(where, Card):
            return (where.number,)
        if isinstance(where, Cards):
            return where.numbers
        if isinstance(where, Link):
            return where.a, where.b
        return (where.card,) if isinstance(where, Channel) else ()


@attrs.frozen(eq=False, repr=False)
class FaultPlan(Value):
    """Faults, in any order: each has its own moment.  `str` and `parse` are each other's inverse,
    and so are `to_json` and `from_json`."""

    faults: tuple[Fault, ...] = ()

    def __str__(self) -> str:
        return "; ".join(map(str, self.faults))

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """The plan of a text; of an empty one, no faults.  ConfigError says what is wrong."""
        if len(text) > TEXT_CHARACTERS_MAX:
            raise ConfigError(
                f"fault plan: expected at most {TEXT_CHARACTERS_MAX:,} characters, "
                f"got {len(text):,}"
            )
        from spanker.testing.fault_text import parse

        plan = cls(parse(text))
        if len(plan.faults) > FAULTS_MAX:
            raise ConfigError(
                f"fault plan: expected at most {FAULTS_MAX} faults, got {len(plan.faults)}"
            )
        return plan

    def to_json(self) -> dict[str, Any]:
        """The plan as a value that json.dumps takes: each fault is its text."""
        return {"version": VERSION, "faults": [str(fault) for fault in self.faults]}

    @classmethod
    def from_json(cls, document: str | bytes | Mapping[str, Any]) -> FaultPlan:
        """The plan that `to_json` made, from its value or its text.  ConfigError says what is
        wrong."""
        value: object = document
        if isinstance(document, str | bytes):
            if len(document) > 2 * TEXT_CHARACTERS_MAX:
                raise ConfigError(f"fault plan: {len(document):,} bytes of JSON are too many")
            try:
                value = json.loads(document)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"fault plan: expected JSON, got {error}") from None
        if not isinstance(value, Mapping) or set(value) != {"version", "faults"}:
            raise ConfigError(
                f"fault plan: expected an object of version and faults, got {brief(value)}"
            )
        version, faults = value["version"], value["faults"]
        if type(version) is not int or version != VERSION:
            raise ConfigError(f"fault plan: expected version {VERSION}, got {brief(version)}")
        if not isinstance(faults, list) or not all(isinstance(line, str) for line in faults):
            raise ConfigError(f"fault plan: expected a list of texts, got {brief(faults)}")
        return cls.parse("\n".join(faults))

    def check(self, cards: int) -> None:
        """ConfigError where it names a card that a fleet of so many does not have."""
        for fault in self.faults:
            for card in fault.cards:
                if card >= cards:
                    raise ConfigError(
                        f"fault {fault}: no card {card}: the fleet has cards 0 to {cards - 1}"
                    )

    @classmethod
    def random(
        cls,
        seed: int | str,
        cards: int,
        *,
        faults: int | None = None,
        kinds: Sequence[What] | None = None,
        tokens: int = 64,
        steps: int = 64,
        seconds: float = 1.0,
        clients: int = 0,
        survivors: int = 1,
    ) -> FaultPlan:
        """A plan drawn from a seed: the same arguments give the same plan, on every machine.

        1 to 3 faults, each as likely, or so many.  For each the kind is drawn from `kinds`
        (default: all), then the sort of place, the place and the sort of moment, always evenly
        among those that are possible in a fleet of so many cards with so many clients.  Tokens,
        steps and times lie evenly from 1 to `tokens`, 1 to `steps` and 0 to `seconds`, commands in
        the first 16, bytes up to 64 KiB; factors are 2, 4, 8 or 16, durations 1 ms to a quarter of
        `seconds`, counts 1 to 3.  No plan touches more than `cards - survivors` cards with what may
        cost the fleet a card: a draw that would is drawn again, and after 100 of them left out.
        """
        from spanker.testing.fault_drawing import Chances, draw_faults

        chances = Chances(cards, clients, tuple(kinds or What), tokens, steps, seconds, survivors)
        return cls(draw_faults(seed, faults, chances))


def _decimal(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _places(kinds: Sequence[type[Where]]) -> str:
    return " or ".join(PLACES[kind] for kind in kinds)


def brief(value: object) -> str:
    text = repr(value)
    return text[:60] + "..." * (len(text) > 60)
