# SPDX-License-Identifier: Apache-2.0
"""`spanker calibrate`, profiles in files, and --throttle."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import attrs
import pytest
from cli_process import EXIT_S, batch, good, started, terminal

from spanker.sched import profiles
from spanker.sched.bandwidth import REV_A
from spanker.testing import write_tiny_llama

BOARD = attrs.evolve(REV_A, name="board", host_link_bytes_per_s=None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny model and a profile."""
    made = tmp_path_factory.mktemp("files")
    write_tiny_llama(made / "tiny.gguf")
    profiles.save(BOARD, made / "board.toml")
    return made


def test_what_is_measured_can_be_used(directory: Path) -> None:
    """Of cards throttled to a profile in a file, into another file, and back."""
    out, model = str(directory / "again.toml"), str(directory / "tiny.gguf")
    where = ("--cards", "soft:2:24MiB", "--profile", str(directory / "board.toml"), "--throttle")
    args = ("calibrate", *where, "--seconds", "0.1", "--out", out)
    shown, told = batch(args, (*args, "--json"))
    assert shown.code == told.code == 0, shown.err + told.err
    for line in ("memory of a card", "2 GB/s", "bandwidth of a link", "500 MB/s"):
        assert line in shown.out
    assert f"written to {out}" in shown.err
    found = json.loads(told.out)
    assert found["file"] == out and found["about"]["fleet"] == "soft:2:24MiB"
    assert {"cpu", "cores", "ram_gb", "date", "measured_by", "load"} <= set(found["about"])
    assert found["profile"]["name"] == "again"
    assert found["profile"]["command_s"] == pytest.approx(5e-6, rel=0.02)
    assert {"name", "unit", "median", "low", "high", "count"} == set(found["figures"][0])
    profile = profiles.load(out)
    assert profile.int8_madds_per_s == pytest.approx(BOARD.int8_madds_per_s, rel=0.02)
    run = ("--model", model, "--cards", "2", "--max-tokens", "4", "--json")
    plain, planned, info = batch(
        ("run", "x", *run),
        ("run", "x", *run, "--profile", out),
        ("info", "--model", model, "--cards", "2", "--profile", out, "--json"),
    )
    assert planned.json()["tokens"] == plain.json()["tokens"]
    assert "with the again figures" in info.json()["model"]["plan"]["reason"]


def test_throttled_cards_say_the_same(directory: Path) -> None:
    model = str(directory / "tiny.gguf")
    run = ("--model", model, "--cards", "2", "--json")
    throttled = ("--profile", str(directory / "board.toml"), "--throttle")
    generate = ("--max-tokens", "6", "--logits-hash")
    measure = ("--prompt-tokens", "8", "--gen-tokens", "4")
    plain, same, bench = batch(
        ("run", "x", *run, *generate),
        ("run", "x", *run, *generate, *throttled),
        ("bench", *run, *measure, *throttled),
    )
    assert same.json()["logits_sha256"] == plain.json()["logits_sha256"]
    assert bench.json()["tokens_generated"] == 4
    assert bench.json()["profile"] == "board" and bench.json()["behind"] >= 0
    assert same.json()["behind"] >= 0 and "behind" not in plain.json()
    (shown,) = batch(("run", "x", *run[:-1], *throttled, "--max-tokens", "2"))
    assert "throttled to board: steps ended" in shown.err


def test_without_a_file_nothing_is_written(directory: Path) -> None:
    before = sorted(directory.iterdir())
    done = good("calibrate", "--cards", "soft:1:8MiB", "--seconds", "0.01")
    assert b"nothing was written; --out FILE.toml keeps it" in done.stderr
    assert sorted(directory.iterdir()) == before


def test_mistakes_are_one_line(directory: Path) -> None:
    bad = directory / "bad.toml"
    bad.write_text("format = 1\nname = 'x'\nspeed = 1\n")
    calls = {
        ("calibrate", "--out", "profile.txt"): (1, "ends in .toml"),
        ("calibrate", "--out", "none/there/x.toml"): (1, "cannot write the profile"),
        ("calibrate", "--cards", "soft:1:2MiB"): (1, "calibrating needs about 4 MiB of DDR"),
        ("calibrate", "--throttle"): (1, "profile native is this machine unthrottled"),
        ("calibrate", "--seconds", "0"): (2, "--seconds"),
        ("info", "--profile", "rev-z"): (2, "'rev-z' is none of native, rev-a, rev-b, nor a FILE"),
        ("run", "x", "--profile", "none.toml"): (1, "cannot read the profile none.toml"),
        ("run", "x", "--profile", str(bad)): (1, "key speed: expected one of format, name"),
    }
    for (code, message), done in zip(calls.values(), batch(*calls), strict=True):
        assert done.code == code and message in done.err, done
        assert code == 2 or done.err.count("\n") == 1


def test_ctrl_c_leaves_neither_process_nor_file(directory: Path) -> None:
    out = directory / "interrupted.toml"
    with (
        terminal() as screen,
        started(
            *("calibrate", "--cards", "2", "--seconds", "60", "--out", str(out)),
            stderr=screen.device,
        ) as running,
    ):
        screen.wait_for("measuring")
        time.sleep(0.2)
        took_s = running.signal_and_wait(signal.SIGINT)
        assert running.process.returncode == 128 + signal.SIGINT
        assert running.survivors() == []
        assert took_s < 5 * EXIT_S
    assert not out.exists()
