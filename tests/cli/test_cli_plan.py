# SPDX-License-Identifier: Apache-2.0
"""`spanker plan` and `plan show`: what they say, what they write, what they refuse."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from cli_process import batch, good

from spanker.sched import plan_json
from spanker.sched.bandwidth import REV_A
from spanker.sched.cost import decode_fleet
from spanker.sched.shapes import named_shape
from spanker.sched.topology import Topology
from spanker.testing.models import write_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf"))


SHAPE = ("plan", "--shape", "smollm2-135m", "--cards", "4")


def test_the_json_has_every_figure() -> None:
    (done,) = batch((*SHAPE, "--json", "--batch", "2", "--position", "300"))
    found = done.json()
    chosen = found["chosen"]
    assert found["candidates"][0]["name"] == chosen["name"]
    assert chosen["decode_tokens_per_second"] == max(
        c["decode_tokens_per_second"] for c in found["candidates"]
    )
    plan = plan_json.from_json(chosen["plan"])
    cost = decode_fleet(
        named_shape("smollm2-135m"), plan, REV_A, Topology.with_mock(4), batch=2, context=300
    )
    assert chosen["decode_tokens_per_second"] == pytest.approx(cost.tokens_per_second)
    assert {(e["batch"], e["position"]) for e in chosen["decode"]} >= {
        (1, 300),
        (2, 300),
        (2, 4096),
    }
    assert sum(chosen["spent"].values()) == pytest.approx(1.0)
    assert set(chosen["memory_bytes"]) == {str(card) for card in plan.cards}
    assert chosen["load"]["seconds"] > 0 and chosen["prefill"]["tokens_per_second"] > 0
    assert {d["strategy"] for d in found["decisions"]} == {"tensor-parallel"}
    assert "pick_strategy says tensor parallel" in found["beside_pick_strategy"]
    assert 0 <= found["gap"] and found["exact"] == (found["gap"] == 0)
    assert "tokens/s predicted with the rev-a figures" in found["reason"]


def test_the_table_says_what_is_chosen_and_why() -> None:
    (done,) = batch((*SHAPE, "--top", "5"))
    lines = done.out.splitlines()
    assert done.code == 0
    assert any(line.startswith("plan ") and "tp4" in line for line in lines)
    assert any(line.startswith("time goes to") and "% memory" in line for line in lines)
    assert any(line.startswith("beside") and "as chosen" in line for line in lines)
    (header,) = [i for i, line in enumerate(lines) if line.startswith("plan  ")][1:]
    rows = [line.split()[0] for line in lines[header + 1 :] if line]
    assert rows[0] == "tp4" and {"tp2xpp2", "pp4"} <= set(rows)


def test_idle_cards_are_told_of(tiny: str) -> None:
    (done,) = batch(("plan", tiny, "--cards", "16", "--profile", "rev-b"))
    assert done.code == 0
    assert "left idle: more would only slow it down" in done.out
    assert "slower than" in done.out or "as chosen" in done.out


def test_the_chosen_plan_is_saved(tiny: str, tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    (done,) = batch(("plan", tiny, "--cards", "3", "--save", path, "--json"))
    assert f"the plan, for --plan: {path}" in done.err
    assert json.loads(done.out)["chosen"]["plan"] == json.loads(Path(path).read_text())


def test_a_saved_plan_can_be_shown_and_run(tiny: str, tmp_path: Path) -> None:
    path, drawing = str(tmp_path / "plan.json"), tmp_path / "plan.svg"
    saved, shown, ran, plain, refused = batch(
        ("plan", "show", "tp2", "--model", tiny, "--cards", "2", "--save", path),
        ("plan", "show", path, "--svg", str(drawing)),
        (
            "run",
            "x",
            "--model",
            tiny,
            "--cards",
            "3",
            "--plan",
            path,
            "--max-tokens",
            "4",
            "--json",
        ),
        ("run", "x", "--model", tiny, "--cards", "1", "--max-tokens", "4", "--json"),
        ("run", "x", "--model", tiny, "--cards", "1", "--plan", path, "--max-tokens", "4"),
    )
    assert saved.code == 0 and f"the plan as JSON: {path}" in saved.err
    plan = plan_json.from_json(Path(path).read_bytes())
    assert shown.out.startswith(f"plan {plan.name}: ")
    for card in plan.cards:
        assert f"card {card}: heads [" in shown.out
    root = ElementTree.parse(drawing).getroot()
    titles = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(title.startswith("card ") for title in titles) == len(plan.cards)
    assert ran.json()["plan"]["name"] == plan.name
    assert ran.json()["tokens"] == plain.json()["tokens"]
    assert refused.code == 1 and "uses card" in refused.err and path in refused.err


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "broadcast", "all-to-all", "barrier"])
def test_collectives_are_shown(kind: str, tmp_path: Path) -> None:
    path, drawing = str(tmp_path / "p.json"), str(tmp_path / "p.svg")
    args = ("plan", "show", kind, "--cards", "3", "--links", "ring", "--elements", "12")
    text, again = batch((*args, "--save", path, "--svg", drawing), ("plan", "show", path))
    assert text.code == again.code == 0
    assert text.out.startswith(f"{kind} '")
    assert "0 -> 1: " in text.out
    assert again.out.splitlines()[:2] == text.out.splitlines()[:2]
    assert "verified" in again.out or "not right" in again.out
    ElementTree.parse(drawing)


def test_an_algorithm_by_name_and_what_it_cannot_do() -> None:
    args = ("plan", "show", "all-reduce", "--cards", "4", "--algorithm", "ring")
    refused, any_order, saved = batch(
        args, (*args, "--any-order"), (*args, "--op", "max", "--json")
    )
    assert refused.code == 1 and "does not fold in card order" in refused.err
    assert any_order.out.startswith("all-reduce 'ring'") and "verified" in any_order.out
    assert saved.json()["algorithm"] == "ring"


def test_what_cannot_be_is_said_on_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"version": 1, "replicas": []}')
    cases = {
        ("plan", "best"): (2, "give either a MODEL or a --shape"),
        ("plan", "x", "--shape", "y"): (2, "give either a MODEL or a --shape"),
        ("plan", "--shape", "nothing"): (1, "no shape 'nothing'"),
        (*SHAPE, "--profile", "fast"): (2, "none of native, rev-a, rev-b"),
        (*SHAPE, "--ctx", "100000"): (1, "a context of 100000 is not possible"),
        ("plan", "--shape", "llama-70b", "--cards", "2:1GiB"): (1, "of DDR free"),
        (*SHAPE, "--save", "/nonexistent/x"): (1, "cannot write /nonexistent/x"),
        ("plan", "show", "nothing"): (1, "cannot show 'nothing'"),
        ("plan", "show", "tp9", "--shape", "tinyllama"): (1, "uses 9 cards, the fleet has 4"),
        ("plan", "show", str(bad)): (1, "plan: expected a field 'name'"),
        ("plan", "show", "/nonexistent.json"): (1, "cannot read the plan /nonexistent.json"),
    }
    for done, (code, words) in zip(batch(*cases), cases.values(), strict=True):
        assert done.code == code, done
        assert words in done.err
        if code == 1:
            assert done.err.count("\n") == 1


def test_a_plot_over_card_counts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = tmp_path / "plot.png"
    done = json.loads(good(*SHAPE, "--plot", str(path), "--json").stdout)
    assert [entry["cards"] for entry in done["by_cards"]] == [1, 2, 3, 4]
    rates = [entry["tokens_per_second"] for entry in done["by_cards"]]
    assert rates == sorted(rates)
    assert rates[-1] == done["chosen"]["decode_tokens_per_second"]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_matplotlib_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from spanker.cli import plots
    from spanker.cli.errors import Failure

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Failure, match=r"pip install 'spanker\[plot\]'"):
        plots.check("x.png")
