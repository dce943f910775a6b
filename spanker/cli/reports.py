# SPDX-License-Identifier: Apache-2.0
"""What the commands report of plans, cards and times: as JSON values and as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from spanker.cli import terminal
from spanker.fleet import CardStats, Fleet
from spanker.sched.plan import FleetPlan

if TYPE_CHECKING:
    from rich.table import Table

    from spanker.actors.trace import Trace


# Throttled cards that are so far behind do not show how fast the modelled ones are.
BEHIND_MAX = 0.1


@attrs.frozen
class Timing:
    """When the tokens of one generation came.

    `first_token_s` from the start to the first token, `decode_s` from there to the last.
    """

    prompt_tokens: int
    tokens: int
    first_token_s: float
    decode_s: float

    @property
    def prompt_rate(self) -> float:
        return self.prompt_tokens / self.first_token_s

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first; None with fewer than two."""
        if self.tokens < 2 or not self.decode_s:
            return None
        return (self.tokens - 1) / self.decode_s

    def json(self, load_s: float) -> dict[str, object]:
        return {
            "load_s": load_s,
            "time_to_first_token_s": self.first_token_s,
            "prompt_tokens_per_second": self.prompt_rate,
            "decode_s": self.decode_s,
            "decode_tokens_per_second": self.decode_rate,
        }


@attrs.frozen
class CardWork:
    """What a card did during a generation, from its counters before and after."""

    after: CardStats
    busy_share: float
    link_sent_bytes: int
    link_received_bytes: int

    def json(self) -> dict[str, object]:
        card = self.after
        return {
            "card": card.number,
            "name": card.name,
            "isa": card.isa,
            "share": card.share,
            "replica": card.replica,
            "ddr_used_bytes": card.ddr_used_bytes,
            "ddr_total_bytes": card.ddr_total_bytes,
            "busy_share": self.busy_share,
            "link_sent_bytes": self.link_sent_bytes,
            "link_received_bytes": self.link_received_bytes,
        }


def work_between(
    before: tuple[CardStats, ...], after: tuple[CardStats, ...], wall_s: float
) -> tuple[CardWork, ...]:
    """Each card's work between two readings of its counters, `wall_s` apart; without those that
    were lost in between."""
    begun = {card.number: card for card in before}
    return tuple(
        CardWork(
            after=b,
            busy_share=(b.busy_s - a.busy_s) / wall_s if wall_s else 0.0,
            link_sent_bytes=sum(b.link_tx_bytes) - sum(a.link_tx_bytes),
            link_received_bytes=sum(b.link_rx_bytes) - sum(a.link_rx_bytes),
        )
        for a, b in [(begun[card.number], card) for card in after]
    )


def card_table(cards: tuple[CardWork, ...]) -> Table:
    """A row for each card, within the width of stderr's terminal."""
    several = any(work.after.replica for work in cards)
    replica = [">replica"] if several else []
    made = terminal.table(">card", *replica, "share", ">DDR", ">busy", ">sent", "ISA")
    # The other columns take about 56.
    columns = max(terminal.width(stderr=True) - (65 if several else 56), 16)
    for work in cards:
        card = work.after
        made.add_row(
            str(card.number),
            *(["-" if card.replica is None else str(card.replica)] if several else []),
            terminal.fold(card.share, columns),
            f"{terminal.size(card.ddr_used_bytes)} of {terminal.size(card.ddr_total_bytes)}",
            f"{work.busy_share:.0%}",
            terminal.size(work.link_sent_bytes),
            card.isa,
        )
    return made


def trace_note(trace: Trace, path: str) -> str:
    """What a trace has become, in one line."""
    lost = f"; {trace.lost:,} more were lost" if trace.lost else ""
    return f"trace of {trace.commands:,} commands in {trace.steps:,} steps: {path}{lost}"


def pace_note(fleet: Fleet) -> str | None:
    """How well throttled cards kept the pace, in one line; None where they are not throttled."""
    if fleet.behind is None:
        return None
    told = f"throttled to {fleet.profile.name}: steps ended {fleet.behind:.1%} of their time late"
    if fleet.behind < BEHIND_MAX:
        return told
    return f"{told}, so this machine is too slow for it, or too busy: these times are its own"


def plan_json(plan: FleetPlan) -> dict[str, object]:
    """A plan as `--plan FILE.json` takes it; imported for those who ask for JSON."""
    from spanker.sched.plan_json import to_json

    return to_json(plan)
