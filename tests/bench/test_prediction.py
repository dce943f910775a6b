# SPDX-License-Identifier: Apache-2.0
"""bench/prediction.py: cases, throttled fleets under the stopwatch, what counts as a failure."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import make_model
import prediction
import pytest
from prediction import Case, Rates

from spanker.sched import profiles
from spanker.sched.bandwidth import REV_A


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case of a model of one layer, a hundred times faster than its profile has it."""
    shape = make_model.Shape(64, 2, 4, 2, 16, 128, 512, 512, 10000.0, True)
    monkeypatch.setitem(make_model.SHAPES, "mini", shape)  # type: ignore[arg-type]
    monkeypatch.setattr(prediction, "MODELS", tmp_path)
    monkeypatch.setattr(prediction, "made_up_prompt", lambda tokens: [300] * tokens)
    board = attrs.evolve(REV_A, name="board", host_link_bytes_per_s=None, command_s=50e-6)
    profiles.save(board, tmp_path / "board.toml")
    return Case("mini-q8_0", 1, "tp", 2, str(tmp_path / "board.toml"))


def test_cases_are_parsed_and_written_alike() -> None:
    for text in prediction.DEFAULT_CASES:
        assert str(Case.parse(text)) == text
    assert Case.parse("tinyllama-f16:3/pp/2/./my/board.toml").profile == "./my/board.toml"


@pytest.mark.parametrize(
    "text", ["", "tinyllama-q4_0/tp/1/rev-a", "x-q4_0:1/tp/1/rev-a", "tinyllama-q4_0:1/tp/a/rev-a"]
)
def test_what_is_no_case_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prediction.main(["--case", text])
    assert "expected MODEL:LAYERS/PLAN/CARDS/PROFILE" in capsys.readouterr().err


def test_a_case_is_measured_and_laid_beside_predictions(
    mini: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = {"none": lambda case: None, "one": lambda case: Rates(1e9, 1e9)}
    monkeypatch.setattr(prediction, "PREDICTIONS", predictions)
    record = prediction.measure(mini, 1)
    # More than 20 commands of 50 us each, for 32 prompt tokens or one more token.
    assert 0 < record["throttled"]["decode"] < 1000
    assert 0 < record["throttled"]["prefill"] < 32_000
    assert record["behind"] >= 0
    assert record["predicted"]["none"] is None
    assert record["predicted"]["one"]["decode_error"] < -0.99
    out = tmp_path / "out.json"
    monkeypatch.setattr(prediction, "measure", lambda case, rounds: record | {"counts": True})
    assert prediction.main(["--case", str(mini), "--json", str(out)]) == 1
    shown = capsys.readouterr()
    assert "decode, tokens/s" in shown.out and "one, decode: off by -" in shown.err
    assert json.loads(out.read_text())["cases"][0]["case"] == str(mini)


def test_only_cases_that_count_can_fail() -> None:
    def record(error: float, counts: bool) -> dict[str, object]:
        made = {"prefill_error": 0.0, "decode_error": error}
        return {"case": "c", "counts": counts, "predicted": {"a": made, "b": None}}

    assert prediction.failures([record(0.09, True), record(0.5, False)]) == []
    assert prediction.failures([record(-0.12, True)]) == ["c: a, decode: off by -12.0%"]


def test_a_profile_that_cannot_be_kept_is_one_line(
    mini: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    case = attrs.evolve(mini, profile="native")
    assert prediction.main(["--case", str(case)]) == 1
    assert capsys.readouterr().err.count("\n") <= 2
