# SPDX-License-Identifier: Apache-2.0
"""Whole-model plans for people: as text, and as a diagram in SVG.

The same plan gives the same characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from spanker.sched.plan import CardShare, FleetPlan, Plan, Stage
from spanker.sched.shares import Share

_NAMES = (
    ("heads", "heads"),
    ("hidden", "rows"),
    ("ffn", "ffn"),
    ("vocabulary", "vocabulary"),
    ("columns", "embedding columns"),
)


# --- text -------------------------------------------------------------------------------


def text(plan: FleetPlan) -> str:
    """The plan in lines, one for each card."""
    lines = [f"plan {plan.name}: {_counts(plan)}"]
    if plan.reason:
        lines.append(plan.reason)
    for number, replica in enumerate(plan.replicas):
        indent = ""
        if len(plan.replicas) > 1:
            lines.append(f"replica {number}: {replica.name}")
            indent = "  "
        for place, stage in enumerate(replica.stages):
            lines.append(f"{indent}stage {place}: {_layers(stage)}")
            lines += (f"{indent}  card {s.card}: {_share(s)}" for s in stage.shares)
    return "\n".join(lines) + "\n"


def _counts(plan: FleetPlan) -> str:
    parts = [_count(len(plan.cards), "card")]
    if len(plan.replicas) > 1:
        parts.append(_count(len(plan.replicas), "replica"))
    stages = {len(replica.stages) for replica in plan.replicas}
    if stages != {1}:
        parts.append(" or ".join(_count(n, "stage") for n in sorted(stages)))
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _layers(stage: Stage) -> str:
    layers = stage.layers
    return (
        f"layers {layers.start} to {layers.stop - 1}"
        if layers.size > 1
        else f"layer {layers.start}"
    )


def _share(share: CardShare) -> str:
    parts = [
        f"{words} {_range(part)}"
        for name, words in _NAMES
        if not (part := getattr(share, name)).empty
    ]
    return ", ".join(parts) or "nothing"


def _range(part: Share) -> str:
    return f"[{part.start}, {part.stop})"


# --- SVG --------------------------------------------------------------------------------

_LEFT, _TOP, _CARD, _BAR, _GAP = 120, 64, 116, 12, 6
_STYLE = (
    "text{font-family:sans-serif;font-size:11px;fill:#222}"
    ".t{font-size:14px;font-weight:bold}.n{fill:#666}.h{text-anchor:middle;font-weight:bold}"
    ".b{font-size:9px}"
)
_COLOURS = {
    "heads": "#1b6ca8",
    "hidden": "#2d7d46",
    "ffn": "#b3541e",
    "vocabulary": "#8e3b8c",
    "columns": "#8a6d00",
}
_CARDS_A_LINE = 16


def svg(plan: FleetPlan) -> str:
    """A diagram: stages go down, their cards stand side by side, and a card's bars show which part
    of each dimension is its own.  A whole SVG document."""
    body: list[str] = []
    y, width = _TOP, 640
    for number, replica in enumerate(plan.replicas):
        if len(plan.replicas) > 1:
            body.append(
                f'<text class="h" style="text-anchor:start" x="10" y="{y + 6}">'
                f"replica {number}: {escape(replica.name)}</text>"
            )
            y += 18
        y, reached = _replica(replica, y, body)
        width = max(width, reached)
    height = y + 24
    title = f"plan {plan.name}: {_counts(plan)}"
    legend = " ".join(
        f'<tspan fill="{_COLOURS[name]}" font-weight="bold">{words}</tspan>,'
        for name, words in _NAMES
    ).rstrip(",")
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text class="t" x="10" y="22">{escape(title)}</text>',
            f'<text x="10" y="39">filled is what a card has of the {legend}</text>',
            *body,
            "</svg>",
            "",
        ]
    )


def _replica(plan: Plan, y: int, body: list[str]) -> tuple[int, int]:
    """Draw from y on; where it ends, down and to the right."""
    totals = _totals(plan)
    width = 0
    for number, stage in enumerate(plan.stages):
        bars = [name for name, _ in _NAMES if any(not getattr(s, name).empty for s in stage.shares)]
        height = 22 + (len(bars) * (_BAR + 3)) + _GAP
        lines = -(-len(stage.shares) // _CARDS_A_LINE)
        body.append(
            f'<rect x="4" y="{y}" width="{_LEFT + min(len(stage.shares), _CARDS_A_LINE) * _CARD}" '
            f'height="{lines * height + _GAP}" fill="#f4f6f8"/>'
            f'<text x="10" y="{y + 18}">stage {number}</text>'
            f'<text class="n" x="10" y="{y + 33}">{_layers(stage)}</text>'
        )
        for place, share in enumerate(stage.shares):
            row, column = divmod(place, _CARDS_A_LINE)
            x = _LEFT + column * _CARD
            body += _card(share, bars, totals, x, y + row * height)
            width = max(width, x + _CARD)
        y += lines * height + _GAP + 4
    return y, width + 10


def _totals(plan: Plan) -> dict[str, int]:
    return {
        name: max((getattr(s, name).stop for stage in plan.stages for s in stage.shares), default=0)
        for name, _ in _NAMES
    }


def _card(
    share: CardShare, bars: list[str], totals: dict[str, int], x: int, y: int
) -> Iterator[str]:
    width = _CARD - 16
    yield f"<g><title>card {share.card}: {escape(_share(share))}</title>"
    yield f'<text class="h" x="{x + width // 2}" y="{y + 15}">card {share.card}</text>'
    for i, name in enumerate(bars):
        part: Share = getattr(share, name)
        top, total = y + 20 + i * (_BAR + 3), totals[name]
        begin, end = width * part.start / total, width * part.stop / total
        yield (
            f'<rect x="{x}" y="{top}" width="{width}" height="{_BAR}" fill="#dde3e8"/>'
            f'<rect x="{x + begin:.1f}" y="{top}" width="{end - begin:.1f}" height="{_BAR}" '
            f'fill="{_COLOURS[name]}"/>'
        )
    yield "</g>"
