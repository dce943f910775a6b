# SPDX-License-Identifier: Apache-2.0
"""Profiles in TOML files: what is written is read back, and every mistake is told by its key."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spanker.errors import ConfigError
from spanker.sched import profiles
from spanker.sched.bandwidth import NATIVE, REV_A, CardSpeed, LinkSpeed, Profile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MINE = attrs.evolve(
    REV_A,
    name="my board",
    host_link_bytes_per_s=None,
    port_bytes_per_s=None,
    cores=2,
    shared_bytes_per_s=3.5e10,
    cards=(CardSpeed(1, memory=0.5), CardSpeed(3, compute=2.0)),
    links=(LinkSpeed(0, 1, 1e9, 1e-6),),
)
# The least that is a profile.
LEAST = """
format = 1
name = "least"
local_ddr_bytes_per_s = 1e9
intercard_bytes_per_s = 5e8
host_link_latency_s = 0
"""


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        profiles.loads(text.encode(), "x.toml")
    return str(caught.value)


# --- there and back ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "profile", [MINE, attrs.evolve(REV_A, name="a"), attrs.evolve(NATIVE, name="n")]
)
def test_what_is_saved_is_what_is_loaded(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "it.toml"
    profiles.save(profile, path, {"date": "today", "cores": 2, "load": 0.5})
    assert profiles.load(path) == profile
    assert profiles.find(str(path)) == profile
    assert tomllib.loads(path.read_text())["about"] == {"date": "today", "cores": 2, "load": 0.5}
    assert list(tmp_path.iterdir()) == [path]


positive = st.floats(min_value=1e-3, max_value=1e15) | st.just(math.inf)
times = st.floats(min_value=0, max_value=1e3)


@given(
    name=st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=64),
    speeds=st.fixed_dictionaries(
        {
            "local_ddr_bytes_per_s": positive,
            "intercard_bytes_per_s": positive,
            "host_link_bytes_per_s": st.none() | positive,
            "int8_madds_per_s": positive,
            "port_bytes_per_s": st.none() | positive,
            "shared_bytes_per_s": st.none() | positive,
            "host_link_latency_s": times,
            "command_s": times,
            "cores": st.none() | st.integers(1, 256),
        }
    ),
    cards=st.lists(st.tuples(positive, positive), max_size=4),
    ends=st.sets(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=4),
)
def test_any_profile_survives(name, speeds, cards, ends) -> None:
    profile = Profile(
        name=f"_{name}"[:64],
        **speeds,
        cards=tuple(CardSpeed(i, *factors) for i, factors in enumerate(cards)),
        links=tuple(LinkSpeed(a, b, 2.0, 3.0) for a, b in sorted(ends)),
    )
    assert profiles.loads(profiles.dumps(profile).encode()) == profile


def test_what_is_left_out_is_as_in_the_class() -> None:
    assert profiles.loads(LEAST.encode()) == Profile("least", 1e9, 5e8, None, 0.0)


def test_whole_numbers_are_numbers() -> None:
    profile = profiles.loads((LEAST + "command_s = 1\nint8_madds_per_s = inf\n").encode())
    assert profile.command_s == 1.0 and isinstance(profile.command_s, float)
    assert profile.int8_madds_per_s == math.inf


def test_names_are_names_and_paths_are_paths() -> None:
    assert profiles.find("rev-a") is REV_A
    assert profiles.is_path("a.toml") and profiles.is_path("./rev-a") and profiles.is_path("/x/y")
    assert not profiles.is_path("rev-a") and not profiles.is_path("toml")
    with pytest.raises(ConfigError, match="no profile 'rev-z'"):
        profiles.find("rev-z")


# --- mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("command = 1", "x.toml, key command: expected one of format, name, local_ddr"),
        ('command_s = "2e-6"', "key command_s: expected a number, got '2e-6'"),
        ("command_s = true", "key command_s: expected a number, got True"),
        ("command_s = nan", "key command_s: expected a number, got nan"),
        ("command_s = -1", "x.toml: profile least: command_s must be 0 or more, got -1.0"),
        ("command_s = inf", "command_s must be 0 or more, got inf"),
        ("int8_madds_per_s = 0", "int8_madds_per_s must be above 0, got 0.0"),
        (
            "int8_madds_per_s = 1" + "0" * 400,
            "key int8_madds_per_s: expected a number, got 'a number of",
        ),
        ("cores = 1.5", "key cores: expected a whole number, got 1.5"),
        ("cores = 0", "cores must be above 0, got 0"),
        ("about = 3", "key about: expected a table, got 3"),
        ("about = {x = [1]}", "key about.x: expected a text or a number, got [1]"),
        ("about = {x = true}", "key about.x: expected a text or a number, got True"),
        (f"about = {{x = '{'y' * 2000}'}}", "key about.x: expected at most 1024 characters"),
        ("cards = 1", "key cards: expected an array of tables, got 1"),
        ("cards = [1]", "key cards[0]: expected a table of card, memory, compute, got 1"),
        ("cards = [{memory = 1}]", "key cards[0].card: expected a whole number, got nothing"),
        (
            "cards = [{card = 1, mem = 1}]",
            "key cards[0].mem: expected one of card, memory, compute",
        ),
        ("cards = [{card = 256}]", "key cards[0].card: expected a card from 0 to 255, got 256"),
        ("cards = [{card = -1}]", "key cards[0].card: expected a card from 0 to 255, got -1"),
        ("cards = [{card = 1, memory = 0}]", "least, card 1: factors must be above 0"),
        ("cards = [{card = 1}, {card = 1}]", "listed twice"),
        ("links = [{source = 0, target = 1, bytes_per_s = 1}]", "key links[0].latency_s: expected"),
        (
            "links = [{source = 0, target = 1, bytes_per_s = 'x', latency_s = 0}]",
            "key links[0].bytes_per_s: expected a number, got 'x'",
        ),
        (
            "cards = [" + "{card = 1}," * 300 + "]",
            "key cards: expected at most 256 entries, got 300",
        ),
        ("name = 'again'", "x.toml is not TOML"),
        ("=", "x.toml is not TOML"),
        ("x = " + "[" * 5000, "x.toml is not TOML"),
    ],
)
def test_a_mistake_is_told_with_its_key(change: str, message: str) -> None:
    text = refusal(LEAST + change)
    assert message in text
    assert "\n" not in text and len(text) < 500


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "", "key format: expected a whole number, got nothing"),
        ("format = 1", "format = 2", "key format: expected 1, which this version"),
        ('name = "least"', "", "key name: expected a text, got nothing"),
        ('name = "least"', "name = ''", "key name: expected 1 to 64 printable"),
        ('name = "least"', 'name = "a\\u001b[2J"', "key name: expected 1 to 64 printable"),
        ('name = "least"', 'name = "rev-a"', "key name: expected another name than those of built"),
        (
            "local_ddr_bytes_per_s = 1e9",
            "",
            "key local_ddr_bytes_per_s: expected a number, got not",
        ),
    ],
)
def test_what_must_be_there_must_be_right(old: str, new: str, message: str) -> None:
    assert message in refusal(LEAST.replace(old, new))


def test_what_is_no_text_or_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not TOML"):
        profiles.loads(b"\xff\xfe")
    large = tmp_path / "large.toml"
    large.write_text(LEAST + "#" * profiles.FILE_BYTES_MAX)
    with pytest.raises(ConfigError, match=r"large.toml: expected at most 1,048,576 bytes"):
        profiles.load(large)
    with pytest.raises(ConfigError, match=r"cannot read the profile .*missing.toml: No such file"):
        profiles.load(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="cannot read the profile"):
        profiles.load(tmp_path)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write the profile .*none/x.toml"):
        profiles.save(MINE, tmp_path / "none" / "x.toml")
    kept = tmp_path / "kept.toml"
    kept.write_text("as it was")
    with pytest.raises(ConfigError, match="key name: expected another name"):
        profiles.save(REV_A, kept)
    assert kept.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [kept]
