# SPDX-License-Identifier: Apache-2.0
"""The cost model foretells what a fleet of hollow cards does when it loses one."""

from __future__ import annotations

import json

import pytest
import recovery_prediction as bench

# Of everything one; each takes seconds.
QUICK = {"tp4, killed", "tp4, hung, noticed after 0.5 s", "dp2xtp2, to the other", "pp4"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.name in QUICK else pytest.mark.long, id=case.name)
        for case in bench.CASES
        if case.simulated
    ],
)
def test_prediction_and_simulation_are_the_same_to_a_thousandth(case: bench.Case) -> None:
    """And half a millisecond; an heir that decodes ends two steps before."""
    record = bench.compare(case)
    assert bench.agrees(record), record
    assert record["simulated"]["plan"].split("+").count(record["after"])


def test_a_prediction_that_is_off_is_told() -> None:
    record = bench.compare(bench.CASES[0])
    for name in ("detection_s", "replan_s", "seconds"):
        for off_s in (-0.02, 0.02):
            happened = {**record["simulated"], name: record["simulated"][name] + off_s}
            assert not bench.agrees({**record, "simulated": happened})


def test_the_record_is_of_these_cases() -> None:
    record = json.loads(bench.RESULTS.read_text())
    assert [entry["case"] for entry in record["cases"]] == [case.name for case in bench.CASES]
    assert all(bench.agrees(entry) for entry in record["cases"])
