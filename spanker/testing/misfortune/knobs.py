# SPDX-License-Identifier: Apache-2.0
"""Sets the limits of sessions and steps for a while, as the knobs of a scenario say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from spanker.actors import session
from spanker.sched import limits
from spanker.testing.misfortune.scenario import Knobs

_PLACES = (
    (session, "RUN_AHEAD_MAX", "run_ahead"),
    (session, "SCORE_AHEAD_MAX", "score_ahead"),
    (session, "STEPS_AHEAD", "steps_ahead"),
    (limits, "PAGE_POSITIONS", "page_positions"),
    (limits, "OUTPUTS_MAX", "outputs_max"),
    (limits, "CANDIDATES", "candidates"),
)


@contextlib.contextmanager
def turned(knobs: Knobs) -> Iterator[None]:
    """Within the block these limits hold, for the whole process."""
    before = [getattr(module, name) for module, name, _ in _PLACES]
    try:
        for module, name, field in _PLACES:
            setattr(module, name, getattr(knobs, field))
        yield
    finally:
        for (module, name, _), value in zip(_PLACES, before, strict=True):
            setattr(module, name, value)
