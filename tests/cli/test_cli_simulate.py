# SPDX-License-Identifier: Apache-2.0
"""`spanker simulate`: figures as a table and as JSON, always the same, and Ctrl-C."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import attrs
import pytest
from cli_process import EXIT_S, batch, good, started, terminal

from spanker.sched import profiles
from spanker.sched.bandwidth import REV_A

SHAPE = ("simulate", "--shape", "smollm2-135m", "--cards", "3", "--tokens", "5", "--prompt", "9")


def test_the_json_has_every_figure() -> None:
    (done,) = batch((*SHAPE, "--json", "--plan", "tp", "--batch", "2"))
    found = done.json()
    assert found["decode_tokens_per_second"] == pytest.approx(2 * 4 / found["decode_s"])
    assert found["prefill_tokens_per_second"] == pytest.approx(
        2 * 9 / found["time_to_first_token_s"]
    )
    # 78 MB and a rope table over Gigabit Ethernet.
    assert 0.8 < found["load_s"] < 1.3
    assert (found["model"], found["profile"], found["plan"]["name"]) == (
        "smollm2-135m",
        "rev-a",
        "tp3",
    )
    assert (found["batch"], found["tokens_generated"], found["prompt_tokens"]) == (2, 5, 9)
    assert [card["card"] for card in found["cards"]] == [0, 1, 2]
    for card in found["cards"]:
        waiting = sum(entry["part"] for entry in card["waiting"])
        assert card["busy"] + waiting + card["idle"] == pytest.approx(1.0)
    assert len(found["links"]) == 6
    assert set(found["links"][0]) == {"source", "target", "nbytes", "busy"}
    assert found["host_link"]["bytes_to_host"] > 0
    assert found["tokens"] is None


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    outputs, traces = set(), set()
    for hash_seed in range(3):
        trace = tmp_path / "trace.json"
        args = (*SHAPE, "--json", "--seed", "3", "--trace", str(trace))
        outputs.add(good(*args, env={"PYTHONHASHSEED": str(hash_seed)}).stdout)
        traces.add(trace.read_bytes())
    assert len(outputs) == len(traces) == 1
    events = json.loads(traces.pop())["traceEvents"]
    assert {"card 2 (virtual2, virtual)", "host"} <= {
        e["args"].get("name") for e in events if e["ph"] == "M"
    }


def test_a_model_and_its_tokens(tiny_model: Path) -> None:
    args = ("simulate", str(tiny_model), "--cards", "2:64MiB", "--tokens", "4", "--json")
    timed, computed = batch(args, (*args, "--arithmetic"))
    assert timed.json()["tokens"] is None
    (ids,) = computed.json()["tokens"]
    assert len(ids) == 4
    assert timed.json() == computed.json() | {"tokens": None, "arithmetic": False}
    assert timed.json()["ctx"] == 256


def test_the_table_says_what_waits_for_what(tmp_path: Path) -> None:
    trace = str(tmp_path / "t.json")
    row, tensor, one = batch(
        (*SHAPE, "--plan", "pp", "--trace", trace),
        (*SHAPE, "--plan", "tp", "--profile", "rev-b"),
        ("simulate", "--shape", "smollm2-135m", "--tokens", "1", "--profile", "native"),
    )
    for done in (row, tensor, one):
        assert done.code == 0, done.err
        for word in ("load", "prefill", "decode", "host link", "busy", "idle"):
            assert word in done.out
    assert "cards 2 " in row.out and "cards 0 " in row.out and "busiest links" in row.out
    assert f"trace of every command: {trace}" in row.err
    assert "each other" in tensor.out
    assert "decode     -: 0 tokens" in one.out and "busiest links" not in one.out


def test_replicas_are_told_apart() -> None:
    args = (*SHAPE, "--cards", "4", "--plan", "dp2xtp2", "--batch", "3")
    shown, first, second = batch(args, (*args, "--json"), (*args, "--json"))
    assert shown.code == 0 and "plan       dp2xtp2: as asked" in shown.out
    rows = [line.split()[:2] for line in shown.out.splitlines() if "each other" in line]
    assert "replica  cards" in shown.out and ["0", "0-1"] in rows
    found = first.json()
    assert first.out == second.out
    assert [card["replica"] for card in found["cards"]] == [0, 0, 1, 1]
    cards = [
        [share["card"] for stage in replica["stages"] for share in stage["shares"]]
        for replica in found["plan"]["replicas"]
    ]
    assert cards == [[0, 1], [2, 3]]


def test_what_cannot_be_is_said_on_one_line() -> None:
    cases = {
        ("simulate",): (2, "either a MODEL or a --shape"),
        ("simulate", "smollm2", "--shape", "tinyllama"): (2, "either a MODEL or a --shape"),
        ("simulate", "--shape", "nonsense"): (1, "no shape 'nonsense': expected one of smollm2"),
        (*SHAPE, "--plan", "tp2"): (1, "plan tp2 uses 2 cards"),
        (*SHAPE, "--plan", "dp2xtp2"): (1, "plan dp2xtp2 uses 4 cards"),
        (*SHAPE, "--cards", "1:32MiB"): (1, "of DDR free"),
        (*SHAPE, "--cards", "65"): (1, "65 cards are too many"),
        (*SHAPE, "--ctx", "5"): (1, "prompt has 9 tokens"),
        (*SHAPE, "--trace", "/nonexistent/x"): (1, "cannot write the trace"),
    }
    for done, (code, words) in zip(batch(*cases), cases.values(), strict=True):
        assert done.code == code
        assert words in done.err
        assert code == 2 or done.err.count("\n") == 1


@pytest.mark.parametrize("phase", ["loading", "generating"])
def test_ctrl_c_ends_a_simulation_within_a_second(phase: str) -> None:
    load = ("--shape", "llama-70b", "--cards", "64", "--plan", "tp8xpp8")
    generate = ("--shape", "smollm2-135m", "--cards", "8", "--plan", "tp", "--tokens", "4000")
    args = load if phase == "loading" else generate
    with (
        terminal() as screen,
        started("simulate", *args, stderr=screen.device) as running,
    ):
        screen.wait_for(phase)
        took_s = running.signal_and_wait(signal.SIGINT)
        assert running.process.returncode == 128 + signal.SIGINT
        assert took_s < EXIT_S
        assert running.survivors() == []
        assert running.process.stdout is not None and running.process.stdout.read() == b""


def test_a_profile_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    profiles.save(attrs.evolve(REV_A, name="mine"), path)
    built_in, mine = batch((*SHAPE, "--json"), (*SHAPE, "--json", "--profile", str(path)))
    assert mine.json()["profile"] == "mine"
    assert mine.json()["decode_s"] == built_in.json()["decode_s"]
