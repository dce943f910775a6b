# SPDX-License-Identifier: Apache-2.0
"""The cost model agrees with the simulator, which computes the same page event by event."""

from __future__ import annotations

import json

import cost_vs_simulator as bench
import pytest


def test_there_are_enough_cases_of_every_kind() -> None:
    assert len(bench.CASES) >= 30
    assert len({case.name for case in bench.CASES}) == len(bench.CASES)
    assert sum(case.together for case in bench.CASES) >= 30
    assert {case.shape for case in bench.CASES} >= set(bench.SHAPES)


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_decode_prefill_and_load_are_within_3_percent(case: bench.Case) -> None:
    model, events, off = bench.errors(case)
    for part, error in off.items():
        assert error is None or abs(error) <= 0.03, (part, model, events)
    # Where there is nothing to compare, neither has it.
    assert (model.load == 0) == (events.load == 0)
    assert (model.decode is None) == (events.decode is None)


def test_the_record_is_of_these_cases() -> None:
    record = json.loads(bench.RESULTS.read_text())
    assert [entry["case"] for entry in record["cases"]] == [case.name for case in bench.CASES]
    assert all(abs(entry["error"]) <= bench.TOLERANCE for entry in record["worst"].values())
