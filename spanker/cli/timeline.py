# SPDX-License-Identifier: Apache-2.0
"""When the tokens of a generation came, and what happened to the fleet meanwhile, as values."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence

import attrs

from spanker.events import Event

# A gap between tokens that is so many times the median one is a stall.
STALL = 10.0


@attrs.frozen
class Mark:
    """Something happened: a fault, or what the fleet told of itself; `short` is its name."""

    at_s: float
    short: str
    text: str


@attrs.frozen
class Gap:
    """No token for `seconds` after token number `after`, from 1, which came `at_s`."""

    after: int
    at_s: float
    seconds: float


@attrs.frozen
class Timeline:
    """Seconds since the first token, or where there is none since the request; what was before is
    negative."""

    request_s: float
    tokens: tuple[float, ...]
    faults: tuple[Mark, ...] = ()
    events: tuple[Mark, ...] = ()

    @classmethod
    def of(
        cls,
        request_s: float,
        tokens: Sequence[float],
        faults: Iterable[tuple[float, str]] = (),
        events: Iterable[Event] = (),
    ) -> Timeline:
        """From times of one clock, whatever its zero; of faults with their lines."""
        zero = tokens[0] if tokens else request_s
        return cls(
            request_s - zero,
            tuple(time_s - zero for time_s in tokens),
            tuple(Mark(time_s - zero, text, text) for time_s, text in faults),
            tuple(Mark(e.time_s - zero, type(e).__name__, str(e)) for e in events),
        )

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """From each token to the next."""
        return tuple(
            Gap(number, a, b - a)
            for number, (a, b) in enumerate(itertools.pairwise(self.tokens), start=1)
        )

    @property
    def longest(self) -> Gap | None:
        """The longest gap, of equal ones the first."""
        return max(self.gaps, key=lambda gap: gap.seconds, default=None)

    @property
    def median_s(self) -> float | None:
        """The median gap."""
        return statistics.median(gap.seconds for gap in self.gaps) if self.gaps else None

    @property
    def stalls(self) -> tuple[Gap, ...]:
        """Gaps of STALL times the median and more."""
        limit_s = STALL * (self.median_s or 0.0)
        return tuple(gap for gap in self.gaps if gap.seconds >= limit_s > 0)

    @property
    def marks(self) -> tuple[tuple[str, Mark], ...]:
        """Faults and events with what they are, in order of their time."""
        told = [("fault", m) for m in self.faults] + [("event", m) for m in self.events]
        return tuple(sorted(told, key=lambda pair: pair[1].at_s))

    def json(self) -> dict[str, object]:
        longest = self.longest
        return {
            "request_s": self.request_s,
            "tokens_s": self.tokens,
            "faults": [{"at_s": m.at_s, "text": m.text} for m in self.faults],
            "events": [{"at_s": m.at_s, "kind": m.short, "text": m.text} for m in self.events],
            "median_gap_s": self.median_s,
            "longest_gap": None if longest is None else _gap_json(longest),
            "stalls": [_gap_json(gap) for gap in self.stalls],
        }


def _gap_json(gap: Gap) -> dict[str, object]:
    return {"after_token": gap.after, "at_s": gap.at_s, "seconds": gap.seconds}
