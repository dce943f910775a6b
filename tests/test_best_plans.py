# SPDX-License-Identifier: Apache-2.0
"""The planner's choice beside the simulator: of the best plans it is the fastest there too."""

from __future__ import annotations

import attrs
import pytest

from spanker.sched.bandwidth import NATIVE, REV_A, REV_B, CardSpeed, LinkSpeed, Profile
from spanker.sched.limits import step_limits
from spanker.sched.planning import Request, search
from spanker.sched.shapes import named_shape
from spanker.sched.topology import Topology
from spanker.simulation import Scenario, simulate

PROMPT, TOKENS = 16, 6
STRAGGLER = attrs.evolve(REV_A, name="straggler", cards=(CardSpeed(1, 0.5, 0.5),))
SLOW_LINK = attrs.evolve(
    REV_A,
    name="slow link",
    links=(LinkSpeed(0, 2, 5e7, 50e-6), LinkSpeed(2, 0, 5e7, 50e-6)),
)

CASES = [
    ("smollm2-135m", 4, REV_A, 1),
    ("smollm2-135m", 3, NATIVE, 1),
    ("smollm2-135m", 4, STRAGGLER, 1),
]
MORE = [
    ("smollm2-135m", 4, REV_A, 4),
    ("smollm2-135m", 8, REV_B, 1),
    ("smollm2-135m", 4, SLOW_LINK, 1),
    ("smollm2-360m", 5, REV_A, 1),
    ("smollm2-360m", 6, NATIVE, 3),
    ("tinyllama", 8, REV_A, 1),
    ("tinyllama", 6, STRAGGLER, 2),
    ("tinyllama", 7, REV_B, 5),
    ("llama-7b", 16, REV_A, 1),
]
# Other cards lead around the links that are missing.
PARTLY_LINKED = [
    ("smollm2-135m", Topology.line(3), REV_A, 1),
    ("smollm2-135m", Topology.of_pairs(4, [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]), REV_A, 1),
    pytest.param("smollm2-360m", Topology.line(5), REV_A, 2, marks=pytest.mark.long),
]


def rank(shape: str, topology: Topology, profile: Profile, batch: int) -> None:
    cards = len(topology.cards)
    request = Request(
        named_shape(shape),
        profile,
        topology,
        (16 << 30,) * cards,
        step_limits(named_shape(shape), 512),
        batch=batch,
        position=PROMPT + TOKENS // 2,
    )
    best = search(request).candidates[:20]
    simulated = []
    for candidate in best:
        result = simulate(
            Scenario(
                shape=shape,
                cards=cards,
                profile=profile,
                plan=candidate.plan,
                prompt_tokens=PROMPT,
                tokens=TOKENS,
                batch=batch,
                ctx=512,
                topology=topology,
            )
        )
        rates = [rate for rate in result.sequence_rates if rate is not None]
        assert len(rates) == batch
        simulated.append((candidate.plan.name, sum(rates)))
    first = simulated[0][1]
    assert first >= max(rate for _, rate in simulated) / 1.01, simulated


@pytest.mark.parametrize(("shape", "cards", "profile", "batch"), CASES)
def test_the_simulator_ranks_the_choice_first(
    shape: str, cards: int, profile: Profile, batch: int
) -> None:
    rank(shape, Topology.with_mock(cards), profile, batch)


@pytest.mark.parametrize(("shape", "topology", "profile", "batch"), PARTLY_LINKED)
def test_the_simulator_ranks_the_choice_first_where_links_are_missing(
    shape: str, topology: Topology, profile: Profile, batch: int
) -> None:
    rank(shape, topology, profile, batch)


@pytest.mark.long
@pytest.mark.parametrize(("shape", "cards", "profile", "batch"), MORE)
def test_the_simulator_ranks_more_choices_first(
    shape: str, cards: int, profile: Profile, batch: int
) -> None:
    rank(shape, Topology.with_mock(cards), profile, batch)
