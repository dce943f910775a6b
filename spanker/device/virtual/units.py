# SPDX-License-Identifier: Apache-2.0
"""Modelled time: whole picoseconds, so that what happens at the same time does so exactly.

Seconds appear only where the world outside is met; a float of seconds names a picosecond exactly
for the first forty minutes, and is a few beside it in the first hours.
"""

from __future__ import annotations

PS_PER_S = 10**12
PS_PER_NS = 1000


def to_ps(seconds: float) -> int:
    """The nearest picosecond."""
    return round(seconds * PS_PER_S)


def to_s(ps: int) -> float:
    """The nearest float of seconds."""
    return ps / PS_PER_S
