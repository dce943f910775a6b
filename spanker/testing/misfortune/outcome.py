# SPDX-License-Identifier: Apache-2.0
"""What comes of a run: what each client got, what was told, and what should not have been."""

from __future__ import annotations

import attrs

from spanker.errors import SpankerError


@attrs.define
class Got:
    """What one client has received so far, and how it ended.

    `position` of each item, its id (None: logits of a prompt), and the bytes of its logits, each
    row by itself.  `left`: it went before the end, of its own will.
    """

    positions: list[int] = attrs.Factory(list)
    ids: list[int] = attrs.Factory(list)
    logits: list[bytes] = attrs.Factory(list)
    began_s: float | None = None
    ended_s: float | None = None
    finish: str | None = None
    error: SpankerError | None = None
    left: str | None = None


@attrs.frozen
class Outcome:
    """`violations` is empty where all was well; `story` are lines, each with its virtual time.

    `seconds` is how much virtual time has passed, `turns` how often the scheduler came round.
    """

    violations: tuple[str, ...]
    story: tuple[tuple[float, str], ...]
    seconds: float
    turns: int
    faults: int

    @property
    def good(self) -> bool:
        return not self.violations
