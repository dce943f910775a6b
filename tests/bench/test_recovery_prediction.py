# SPDX-License-Identifier: Apache-2.0
"""The cost model foretells what a fleet of hollow cards does when it loses one."""

from __future__ import annotations

import json

import pytest
import recovery_prediction as bench

from spanker.device.virtual.spec import VirtualCardSpec
from spanker.events import Replanned
from spanker.fleet import open_fleet
from spanker.sched import cost
from spanker.sched.plan import Plan
from spanker.sched.topology import Topology
from spanker.testing import run_virtual

# Of everything one; each takes seconds.
QUICK = {
    "tp4, killed",
    "tp4, hung, noticed after 0.5 s",
    "tp4 with copies, killed",
    "dp2xtp2, to the other",
    "pp4",
}


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


@pytest.mark.parametrize("plan", ["tp", "pp", "dp2xtp2"])
def test_a_card_that_is_drained_and_comes_back_takes_what_is_predicted(plan: str) -> None:
    """Weights move over links; the host brings the embedding, where its columns are cut anew."""
    case = bench.Case("drained", plan, 0)
    shape = bench.named_shape(case.shape)

    async def main() -> list[tuple[Plan, Plan, float]]:
        specs = [VirtualCardSpec(ddr_bytes=case.ddr_bytes, hollow=True)] * 4
        async with open_fleet(specs, profile=case.profile) as fleet:
            model = await fleet.load_shape(
                case.shape, plan=plan, ctx=case.context, kv_tokens=case.kv_tokens
            )
            plans = [model.plan.replicas[0]]
            await fleet.drain(0)
            plans.append(model.plan.replicas[0])
            await fleet.admit(0)
            plans.append(model.plan.replicas[0])
            moves = [e for e in fleet.events.history if isinstance(e, Replanned)]
            return [(*plans[i : i + 2], moves[i].seconds) for i in range(2)]  # type: ignore[misc]

    for before, after, seconds in run_virtual(main):
        said = cost.recovery(
            shape,
            before,
            (),
            after,
            case.profile,
            Topology.with_mock(4),
            case.limits(),
            positions=(1,),
            others=case.made_plan().replicas[1:],
        )
        assert seconds == pytest.approx(said.replan_s, rel=0.01)
        # 6 s from the host alone.
        assert seconds < 1


def test_a_prediction_that_is_off_is_told() -> None:
    record = bench.compare(bench.CASES[0])
    for name in ("detection_s", "replan_s", "seconds"):
        for off_s in (-0.05, 0.05):
            happened = {**record["simulated"], name: record["simulated"][name] + off_s}
            assert not bench.agrees({**record, "simulated": happened})


def test_the_record_is_of_these_cases() -> None:
    record = json.loads(bench.RESULTS.read_text())
    assert [entry["case"] for entry in record["cases"]] == [case.name for case in bench.CASES]
    assert all(bench.agrees(entry) for entry in record["cases"])
