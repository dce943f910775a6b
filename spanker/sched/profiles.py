# SPDX-License-Identifier: Apache-2.0
"""Profiles in TOML files: read with every key checked, and written so that a person can edit them.

    format = 1
    name = "my-board"
    local_ddr_bytes_per_s = 2e9
    ...                                  # the fields of sched.bandwidth.Profile; None is left out
    [about]                              # who measured it, when, on what: shown, never planned by
    [[cards]]                            # those that differ: card, memory, compute
    [[links]]                            # source, target, bytes_per_s, latency_s

What the fields mean is said by `Profile` and docs/api/timing-model.md.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import attrs

from spanker.errors import ConfigError
from spanker.sched.bandwidth import PROFILES, CardSpeed, LinkSpeed, Profile
from spanker.sched.bandwidth import profile as named_profile
from spanker.sched.topology import MAX_CARDS

FORMAT = 1
FILE_BYTES_MAX = 1 << 20
NAME_CHARS_MAX = 64
ABOUT_KEYS_MAX = 64
ABOUT_CHARS_MAX = 1024

About = Mapping[str, str | int | float]

_NUMBERS = tuple(
    f.name
    for f in attrs.fields(Profile)
    if f.init and f.name not in ("name", "cores", "cards", "links")
)
_OPTIONAL = frozenset(f.name for f in attrs.fields(Profile) if f.default is not attrs.NOTHING) | {
    "host_link_bytes_per_s"
}
_CARD = {"card": int, "memory": float, "compute": float}
_LINK = {"source": int, "target": int, "bytes_per_s": float, "latency_s": float}


def find(name: str) -> Profile:
    """The profile called `name`, or that of a file: a path is what ends in .toml or contains a
    slash.  Raises ConfigError."""
    return load(name) if is_path(name) else named_profile(name)


def is_path(name: str) -> bool:
    """Whether `name` means a file and not one of the built-in profiles."""
    return name.endswith(".toml") or os.sep in name


def is_builtin(name: str) -> bool:
    """Whether a built-in profile has that name; a file's cannot."""
    return name in {p.name for p in PROFILES}


# --- reading ------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Profile:
    """Read a profile.  ConfigError names the file, the key, what was expected and what found."""
    where = os.fspath(path)
    try:
        with open(where, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the profile {where}: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"profile {where}: expected at most {FILE_BYTES_MAX:,} bytes, got more")
    return loads(data, where)


def loads(data: bytes, where: str = "profile") -> Profile:
    """A profile from the bytes of a file; `where` is what errors call it."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"profile {where} is not TOML: {error}") from error
    return _Reader(where).profile(table)


class _Reader:
    def __init__(self, where: str) -> None:
        self._where = where

    def profile(self, table: dict[str, Any]) -> Profile:
        known = ("format", "name", *_NUMBERS, "cores", "about", "cards", "links")
        self._check_keys(table, known, ())
        if (found := self._get(table, "format", int, ())) != FORMAT:
            raise self._error("format", f"{FORMAT}, which this version of Spanker reads", found)
        values: dict[str, Any] = {"name": self._name(table)}
        for key in (*_NUMBERS, "cores"):
            if key in table or key not in _OPTIONAL:
                kind = int if key == "cores" else float
                values[key] = self._get(table, key, kind, ())
        values.setdefault("host_link_bytes_per_s", None)
        self._about(table)
        values["cards"] = tuple(
            CardSpeed(**self._entry(entry, _CARD, ("card",), f"cards[{i}]"))
            for i, entry in enumerate(self._list(table, "cards", MAX_CARDS))
        )
        values["links"] = tuple(
            LinkSpeed(**self._entry(entry, _LINK, tuple(_LINK), f"links[{i}]"))
            for i, entry in enumerate(self._list(table, "links", MAX_CARDS * (MAX_CARDS - 1)))
        )
        try:
            return Profile(**values)
        except ConfigError as error:
            # It says which key, what was expected and what was found.
            raise ConfigError(f"{self._where}: {error}") from None

    def _name(self, table: dict[str, Any]) -> str:
        name = self._get(table, "name", str, ())
        if not (0 < len(name) <= NAME_CHARS_MAX and name.isprintable()):
            raise self._error("name", f"1 to {NAME_CHARS_MAX} printable characters", name)
        if is_builtin(name):
            raise self._error("name", "another name than those of built-in profiles", name)
        return str(name)

    def _about(self, table: dict[str, Any]) -> None:
        about = self._get(table, "about", dict, ()) if "about" in table else {}
        if len(about) > ABOUT_KEYS_MAX:
            raise self._error("about", f"at most {ABOUT_KEYS_MAX} keys", len(about))
        for key, value in about.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise self._error(f"about.{key}", "a text or a number", value)
            if isinstance(value, str) and len(value) > ABOUT_CHARS_MAX:
                raise self._error(f"about.{key}", f"at most {ABOUT_CHARS_MAX} characters", value)

    def _list(self, table: dict[str, Any], key: str, most: int) -> list[Any]:
        entries: list[Any] = self._get(table, key, list, ()) if key in table else []
        if len(entries) > most:
            raise self._error(key, f"at most {most} entries", len(entries))
        return entries

    def _entry(
        self, entry: object, kinds: dict[str, type], required: tuple[str, ...], where: str
    ) -> dict[str, Any]:
        if not isinstance(entry, dict):
            raise self._error(where, f"a table of {', '.join(kinds)}", entry)
        self._check_keys(entry, tuple(kinds), (where,))
        values = {
            key: self._get(entry, key, kind, (where,))
            for key, kind in kinds.items()
            if key in entry or key in required
        }
        for key, kind in kinds.items():
            if kind is int and not 0 <= values[key] < MAX_CARDS:
                raise self._error(
                    f"{where}.{key}", f"a card from 0 to {MAX_CARDS - 1}", values[key]
                )
        return values

    def _check_keys(
        self, table: dict[str, Any], known: tuple[str, ...], inside: tuple[str, ...]
    ) -> None:
        for key in table:
            if key not in known:
                raise self._error(".".join((*inside, key)), f"one of {', '.join(known)}", key)

    def _get(self, table: dict[str, Any], key: str, kind: type, inside: tuple[str, ...]) -> Any:
        """A value of a table as `kind`: a whole number is a number, true is none."""
        name = ".".join((*inside, key))
        if key not in table:
            raise self._error(name, _KINDS[kind], None)
        value: Any = table[key]
        if isinstance(value, bool):
            raise self._error(name, _KINDS[kind], value)
        if kind is float and isinstance(value, int):
            try:
                value = float(value)
            except OverflowError:
                raise self._error(name, _KINDS[kind], "a number of 309 digits or more") from None
        if not isinstance(value, kind) or (isinstance(value, float) and math.isnan(value)):
            raise self._error(name, _KINDS[kind], value)
        return value

    def _error(self, key: str, expected: str, got: object) -> ConfigError:
        shown = "nothing" if got is None else repr(got) if isinstance(got, str | bool) else str(got)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ConfigError(f"profile {self._where}, key {key}: expected {expected}, got {shown}")


_KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a table",
    list: "an array of tables",
}


# --- writing ------------------------------------------------------------------------------


def dumps(profile: Profile, about: About | None = None) -> str:
    """The text of a profile's file; `load` gives an equal profile."""
    import tomli_w

    table: dict[str, Any] = {"format": FORMAT, "name": profile.name}
    for key in (*_NUMBERS, "cores"):
        value = getattr(profile, key)
        if value is not None:
            table[key] = value if key == "cores" else float(value)
    if about:
        table["about"] = dict(about)
    if profile.cards:
        table["cards"] = [attrs.asdict(card) for card in profile.cards]
    if profile.links:
        table["links"] = [attrs.asdict(link) for link in profile.links]
    return tomli_w.dumps(table)


def save(profile: Profile, path: str | os.PathLike[str], about: About | None = None) -> None:
    """Write a profile's file, whole or not at all; ConfigError where that is not possible."""
    where = os.fspath(path)
    text = dumps(profile, about)
    loads(text.encode(), where)  # what was written can be read
    temporary = f"{where}.{os.getpid()}.part"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, where)
    except OSError as error:
        raise ConfigError(f"cannot write the profile {where}: {error.strerror}") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
