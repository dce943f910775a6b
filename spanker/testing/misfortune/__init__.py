# SPDX-License-Identifier: Apache-2.0
"""A simulator of misfortune: whole fleets in virtual time, to which a seed decides what happens.

    scenario = draw(1234)      a fleet, a model, clients, and what goes wrong when: a value
    outcome = run(scenario)    the real coordinator, sessions and card actors; the same every time
    outcome.violations         answers that are wrong or missing, errors without a reason, leaks

`python -m spanker.testing.misfortune --seeds 0:1000` runs many, `python -m spanker.testing.replay
1234` tells the story of one and, with `--shrink`, makes it as short as it can be.
"""

from spanker.testing.misfortune.drawing import draw
from spanker.testing.misfortune.outcome import Outcome
from spanker.testing.misfortune.running import run
from spanker.testing.misfortune.scenario import (
    Client,
    Deed,
    Knobs,
    Moment,
    Scenario,
    Way,
    What,
    literal,
)

__all__ = [
    "Client",
    "Deed",
    "Knobs",
    "Moment",
    "Outcome",
    "Scenario",
    "Way",
    "What",
    "draw",
    "literal",
    "run",
]
