# SPDX-License-Identifier: Apache-2.0
"""Reading the text form of fault plans, whose grammar stands in `fault_plan`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from spanker.errors import ConfigError
from spanker.testing.fault_plan import (
    AtByte,
    AtCommand,
    AtStep,
    AtTime,
    AtToken,
    Card,
    Cards,
    Channel,
    Client,
    Fault,
    HostLink,
    Link,
    What,
    When,
    Where,
    brief,
)

_NUMBERED: Mapping[str, type[AtStep] | type[AtToken] | type[AtByte]] = {
    "step": AtStep,
    "token": AtToken,
    "byte": AtByte,
}

_NUMBER = r"(?:\d{1,20}(?:\.\d{0,20})?(?:[eE][+-]?\d{1,3})?)"
_BETWEEN = re.compile(r"[;\n]|,\s+")
_FAULT = re.compile(
    rf"(?P<what>[a-z][a-z_-]*)\s+(?P<where>[a-z0-9:,-]+)\s*@\s*"
    rf"(?P<when>[a-z]+):(?P<number>{_NUMBER})(?::(?P<command>\d{{1,20}}))?"
    rf"(?:\s+x(?P<factor>{_NUMBER}))?"
    rf"(?:\s+for\s+(?P<duration>{_NUMBER})\s*(?P<unit>ms|s))?"
    rf"(?:\s+(?P<count>\d{{1,20}})\s+times?)?"
)
_EXAMPLE = "e.g. kill 2@token:20, slow 1@time:0.5 x4 or cut 0-2@step:10 for 0.5s"


def parse(text: str) -> tuple[Fault, ...]:
    """The faults of a text, in order; ConfigError says what is wrong with which."""
    lines = [line.strip() for line in _BETWEEN.split(text)]
    return tuple([_parse_fault(line) for line in lines if line])


def _parse_fault(line: str) -> Fault:
    match = _FAULT.fullmatch(line)
    if not match:
        raise ConfigError(f"no fault {brief(line)}: expected WHAT WHERE@WHEN, {_EXAMPLE}")
    word = match["what"].replace("_", "-")
    try:
        what = What.DIE if word == "die" else What(word)
    except ValueError:
        words = ", ".join(kind.value for kind in What)
        raise ConfigError(f"no kind of fault {word!r}: expected {words}") from None
    duration = match["duration"]
    seconds = None if duration is None else float(duration)
    if seconds is not None and match["unit"] == "ms":
        seconds /= 1000
    return Fault(
        what,
        _parse_where(match["where"], what, line),
        _parse_when(match["when"], match["number"], match["command"], line),
        None if match["factor"] is None else float(match["factor"]),
        seconds,
        1 if match["count"] is None else int(match["count"]),
    )


def _parse_where(text: str, what: What, line: str) -> Where:
    if text == "host":
        return HostLink()
    if match := re.fullmatch(r"(channel|client):(\d{1,20})", text):
        number = int(match[2])
        return Channel(number) if match[1] == "channel" else Client(number)
    if match := re.fullmatch(r"(\d{1,20})-(\d{1,20})", text):
        return Link(int(match[1]), int(match[2]))
    if re.fullmatch(r"\d{1,20}(,\d{1,20})*", text):
        numbers = [int(number) for number in text.split(",")]
        # A partition is of a set of cards, be it of one.
        return (
            Cards(tuple(numbers))
            if len(numbers) > 1 or what is What.PARTITION
            else Card(numbers[0])
        )
    raise ConfigError(
        f"fault {brief(line)}: no place {text!r}: expected a card such as 2, cards 0,1, a link "
        f"0-2, host, channel:2 or client:0"
    )


def _parse_when(word: str, number: str, command: str | None, line: str) -> When:
    if word == "time" and command is None:
        return AtTime(float(number))
    if number.isdecimal():
        if word == "command" and command is not None:
            return AtCommand(int(number), int(command))
        if word in _NUMBERED and command is None:
            return _NUMBERED[word](int(number))
    raise ConfigError(
        f"fault {brief(line)}: no moment {word}:{number}: expected time:SECONDS, step:N, token:N, "
        f"byte:N or command:STEP:COMMAND"
    )
