# SPDX-License-Identifier: Apache-2.0
"""`spanker drill`: faults on a live fleet, what they did to the tokens, and whether the answer is
the same."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from cli_process import EXIT_S, batch, started, terminal

from spanker.cli.drill import Outcome, Run, plan_of
from spanker.cli.errors import Failure
from spanker.cli.generation import Report
from spanker.cli.reports import Timing
from spanker.cli.timeline import Timeline
from spanker.errors import ConfigError
from spanker.events import CardLost
from spanker.sched.plan import FleetPlan
from spanker.testing import write_tiny_llama
from spanker.testing.fault_plan import FaultPlan


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", context=512))


def drilled(tiny: str, *args: str) -> tuple[str, ...]:
    return (
        *("drill", "Once", "--model", tiny, "--cards", "4", "--plan", "tp"),
        *("--max-tokens", "40", "--ignore-eos", "--hang-timeout", "0.3"),
        *args,
    )


def test_the_answer_is_the_same_whatever_fails(tiny: str) -> None:
    faults = {
        ("--kill", "2@token:20"): ["kill 2@token:20"],
        ("--hang", "1@token:9"): ["hang 1@token:9"],
        ("--reset", "0@step:12"): ["reset 0@step:12"],
        ("--slow", "3@token:5x4", "--kill", "1@token:30"): [
            "kill 1@token:30",
            "slow 3@token:5 x4",
        ],
        ("--cut", "0-2@token:10 for 0.05s"): ["cut 0-2@token:10 for 0.05s"],
        ("--kill", "0@token:3", "--kill", "1@token:30"): ["kill 0@token:3", "kill 1@token:30"],
    }
    plain, *done = batch(
        ("run", *drilled(tiny)[1:-2], "--json", "--logits-hash"),
        *(drilled(tiny, *args, "--json") for args in faults),
    )
    expected = plain.json()
    for found, lines in zip((one.json() for one in done), faults.values(), strict=True):
        assert found["same"] and found["difference"] is None and found["faults"] == lines
        for answer in (found, found["undisturbed"]):
            assert answer["tokens"] == expected["tokens"]
            assert answer["logits_sha256"] == expected["logits_sha256"]
        # All that `spanker run` says is there, too.
        assert set(expected) <= set(found)
        told = [fault["text"] for fault in found["timeline"]["faults"]]
        assert set(lines) <= set(told) and found["pending_faults"] == []
    killed = done[0].json()
    assert killed["plan"]["name"] == "tp3" and killed["events"]
    assert [card["card"] for card in killed["cards"]] == [0, 1, 3]


def test_with_copies_of_kv_nothing_is_computed_again(tmp_path: Path) -> None:
    # A KV head for each card, so that without copies that of the lost one is gone.
    path = str(write_tiny_llama(tmp_path / "tiny.gguf", context=512, heads=4, kv_heads=4))
    args = drilled(path, "--kill", "2@token:20", "--json")
    for done, kept in zip(batch(args, (*args, "--kv-copies", "1")), (False, True), strict=True):
        found = done.json()
        assert found["same"]
        told = [event["text"] for event in found["timeline"]["events"]]
        assert any("(1 with its KV)" in text for text in told) == kept
    alone = drilled(path, "--kill", "0@token:20", "--cards", "1", "--kv-copies", "1")
    (refused,) = batch(alone)
    assert "a copy on the same card would be lost with it" in refused.err


def test_the_timeline_is_in_order(tiny: str) -> None:
    (done,) = batch(drilled(tiny, "--hang", "2@token:20", "--json"))
    found = done.json()["timeline"]
    tokens = found["tokens_s"]
    assert len(tokens) == 40 and tokens == sorted(tokens) and tokens[0] == 0
    assert found["request_s"] < 0
    (fault,), (lost, replanned) = found["faults"], found["events"]
    assert (lost["kind"], replanned["kind"]) == ("CardLost", "Replanned")
    assert tokens[19] <= fault["at_s"] < fault["at_s"] + 0.3 <= lost["at_s"] < replanned["at_s"]
    gap = found["longest_gap"]
    # Steps that the card had done already give their tokens still.
    assert 20 <= gap["after_token"] <= 24 and gap["seconds"] >= 0.3
    assert gap["at_s"] < lost["at_s"] < replanned["at_s"] < gap["at_s"] + gap["seconds"]
    assert gap in found["stalls"] and gap["seconds"] > 10 * found["median_gap_s"]


def test_virtual_cards_take_modelled_time_and_always_the_same(tiny: str) -> None:
    args = drilled(tiny, "--cards", "virtual:4", "--profile", "rev-a", "--kill", "2@token:20")
    first, again, shown = batch((*args, "--json"), (*args, "--json"), args)
    assert first.out == again.out
    found = first.json()
    assert found["same"] and found["cards"][0]["isa"] == "virtual"
    assert found["timeline"]["longest_gap"]["after_token"] == 20
    assert shown.code == 0 and shown.out == found["text"] + "\n"


def test_what_happened_is_told(tiny: str) -> None:
    killed, idle = batch(
        drilled(tiny, "--kill", "2@token:20"),
        drilled(tiny, "--plan", "auto", "--kill", "3@token:20"),
    )
    assert killed.code == idle.code == 0 and killed.out == idle.out != ""
    for words in (
        "undisturbed: 40 tokens",
        "card 2 lost: ",
        "re-planned tp4 -> tp3 on cards 0, 1, 3",
        "fault    kill 2@token:20",
        "the last of 40",
        "no token for ",
        "the answer is that of the run without faults",
    ):
        assert words in killed.err
    assert "kill 3@token:20 concerned no card at work: plan tp1 leaves it idle" in idle.err


def test_plans_come_from_options_files_and_texts(tmp_path: Path) -> None:
    text, as_json = tmp_path / "plan.txt", tmp_path / "plan.json"
    text.write_text("hang 1@token:3\nslow 0@time:0.5 x2 for 100ms\n")
    plan = FaultPlan.parse("hang 1@token:3; slow 0@time:0.5 x2 for 0.1s")
    as_json.write_text(json.dumps(plan.to_json()))
    for source in (str(text), str(as_json), "hang 1@token:3; slow 0@time:0.5x2 for 0.1s"):
        assert plan_of((), source) == plan
    both = plan_of(("kill 2@token:1",), str(text))
    assert both.faults == (*FaultPlan.parse("kill 2@token:1").faults, *plan.faults)
    with pytest.raises(Failure, match=r"cannot read the fault plan .*missing"):
        plan_of((), str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="no kind of fault 'melt'"):
        plan_of((), "melt 1@token:3")


def test_an_honest_failure(tiny: str, tmp_path: Path) -> None:
    every = [text for card in range(4) for text in ("--kill", f"{card}@token:{5 + card}")]
    late = ("--kill", "0@token:41")
    cases = {
        drilled(tiny, *every): "the answer is not that of a run without faults: it ended after ",
        drilled(tiny, *late): "the answer is the same, but kill 0@token:41 never happened",
        drilled(tiny, "--kill", "4@token:1"): "no card 4: the fleet has cards 0 to 3",
        drilled(tiny, "--kill", "1@noon:1"): "fault",
        drilled(tiny, "--faults", ""): "cannot read the fault plan",
        drilled(tiny, "--faults", "cancel client:0@token:1"): "nobody runs clients here",
        drilled(tiny, *late, "--plot", "x.txt"): "cannot write the plot",
    }
    for done, words in zip(batch(*cases), cases.values(), strict=True):
        assert done.code == 1 and words in done.err.splitlines()[-1], done
    nothing, *found = batch(drilled(tiny), drilled(tiny, *every, "--json"))
    assert nothing.code == 2 and "say what is to fail" in nothing.err
    # The object is there all the same.
    (object_,) = (json.loads(done.out) for done in found)
    assert found[0].code == 1 and object_["same"] is False
    assert object_["error"] in object_["difference"]
    assert 0 < len(object_["tokens"]) < 40
    assert object_["tokens"] == object_["undisturbed"]["tokens"][: len(object_["tokens"])]


def test_a_plot(tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    png, svg = tmp_path / "plot.png", tmp_path / "plot.svg"
    for done in batch(
        *(drilled(tiny, "--kill", "2@token:20", "--plot", str(p)) for p in (png, svg))
    ):
        assert done.code == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "kill 2@token:20" in svg.read_text() and "Replanned" in svg.read_text()


def test_ctrl_c_ends_a_drill_within_a_second(tiny: str) -> None:
    """In the middle of a stall, when a hung card is waited for."""
    args = drilled(tiny, "--hang", "2@token:20", "--hang-timeout", "60")
    with terminal() as screen, started(*args, stderr=screen.device) as running:
        screen.wait_for("undisturbed: ")
        assert running.process.stdout is not None and running.process.stdout.read(8)
        took_s = running.signal_and_wait(signal.SIGINT)
        assert running.process.returncode == 128 + signal.SIGINT
        assert took_s < EXIT_S
        assert running.survivors() == []


# --- values -------------------------------------------------------------------------------


def run_of(ids: tuple[int, ...], sha256: str = "a", error: str | None = None) -> Run:
    report = Report(
        prompt_ids=(1,),
        ids=ids,
        text="",
        finish_reason="length",
        logits_sha256=sha256,
        plan=FleetPlan("tp1", ()),
        cards=(),
        timing=Timing(1, len(ids), 1.0, 1.0),
        load_s=0.0,
        behind=None,
        events=(),
        error=error,
    )
    return Run(report, Timeline.of(0.0, []))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (run_of((7, 8, 9)), None),
        (run_of((7, 5, 9)), "token 2 is 5, not 8"),
        (run_of((7, 8)), "it has 2 tokens, not 3"),
        (run_of((7, 8, 9), "b"), "its tokens are the same, but not its logits"),
        (run_of((7,), error="no card is left"), "it ended after 1 tokens of 3: no card is left"),
    ],
)
def test_every_difference_is_told(other: Run, words: str | None) -> None:
    outcome = Outcome(FaultPlan(), run_of((7, 8, 9)), other)
    assert outcome.same == (words is None)
    assert words is None or words in str(outcome.difference)


def test_a_timeline_begins_with_the_first_token() -> None:
    lost = CardLost(13.5, 2, "gone")
    found = Timeline.of(10.0, [12.0, 12.1, 12.2, 14.2, 14.3], [(12.2, "kill 2@token:3")], [lost])
    assert found.request_s == -2.0
    assert found.tokens == pytest.approx((0.0, 0.1, 0.2, 2.2, 2.3))
    assert [(what, mark.short) for what, mark in found.marks] == [
        ("fault", "kill 2@token:3"),
        ("event", "CardLost"),
    ]
    (stall,) = found.stalls
    assert stall == found.longest
    assert (stall.after, stall.seconds) == (3, pytest.approx(2.0))
    none = Timeline.of(10.0, [])
    assert (none.request_s, none.longest, none.median_s, none.stalls) == (0.0, None, None, ())
    assert Timeline.of(10.0, [11.0, 11.0]).stalls == ()
