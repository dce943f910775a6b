# SPDX-License-Identifier: Apache-2.0
"""Plans for people: as text, and as a time-space diagram in SVG.

The same plan gives the same characters.  Nothing here judges a plan: one that `verify` refuses is
drawn as well.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from xml.sax.saxutils import escape

from spanker.sched.collectives.plan import (
    CollectivePlan,
    Copy,
    Divide,
    Fold,
    Local,
    Phase,
    Region,
    Send,
)

# --- text -------------------------------------------------------------------------------


def text(plan: CollectivePlan, *, lines_max: int = 400) -> str:
    """The plan in lines: every send and all local work or, where these are more than `lines_max`,
    a line for each phase, phases that are alike together."""
    lines = [_title(plan), _totals(plan)]
    if sum(1 + len(phase.sends) + len(phase.local) for phase in plan.phases) <= lines_max:
        for number, phase in enumerate(plan.phases):
            lines.append(f"phase {number}")
            lines += (f"  {_send(send)}" for send in phase.sends)
            lines += (f"  {_work(plan, local)}" for local in phase.local)
    else:
        lines += _summary(plan)
    return "\n".join(lines) + "\n"


def _title(plan: CollectivePlan) -> str:
    title = (
        f"{plan.kind.value} {plan.algorithm!r} of {plan.elements:,} elements over {_cards(plan)}"
    )
    if plan.op is not None:
        title += f", {plan.op.value} in {'card' if plan.ordered else 'any'} order"
    if plan.root is not None:
        title += f", from card {plan.root}"
    return title


def _cards(plan: CollectivePlan) -> str:
    count = len(plan.cards)
    if plan.cards == tuple(range(count)):
        return f"{count} cards"
    return f"cards {', '.join(map(str, plan.cards))}"


def _totals(plan: CollectivePlan) -> str:
    sends = [send for phase in plan.phases for send in phase.sends]
    links: Counter[tuple[int, int]] = Counter()
    for send in sends:
        links[send.source, send.target] += send.what.size
    total, most = sum(links.values()), max(links.values(), default=0)
    return (
        f"{_count(len(plan.phases), 'phase')}, {_count(len(sends), 'send')} over "
        f"{_count(len(links), 'link')}: {total:,} elements, {most:,} of them over the busiest; "
        f"TMP {plan.tmp_elements:,}"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _region(region: Region) -> str:
    return f"{region.buffer.value}[{region.start}, {region.stop})"


def _send(send: Send) -> str:
    to = "" if send.to == send.what else f" to {_region(send.to)}"
    return f"{send.source} -> {send.target}: {_region(send.what)}{to}"


def _work(plan: CollectivePlan, local: Local) -> str:
    if isinstance(local, Divide):
        return f"{local.card}: divide {_region(local.into)} by {len(plan.cards)}"
    if isinstance(local, Copy):
        return f"{local.card}: copy {_region(local.operand)} to {_region(local.into)}"
    return f"{local.card}: fold {_region(local.operand)} into {_region(local.into)}"


def _summary(plan: CollectivePlan) -> Iterator[str]:
    alike = itertools.groupby(enumerate(map(_phase, plan.phases)), key=lambda entry: entry[1])
    for what, entries in alike:
        numbers = [number for number, _ in entries]
        if len(numbers) == 1:
            yield f"phase {numbers[0]}: {what}"
        else:
            yield f"phases {numbers[0]} to {numbers[-1]}, each: {what}"


def _phase(phase: Phase) -> str:
    parts = []
    if phase.sends:
        sizes = sorted({send.what.size for send in phase.sends})
        size = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
        parts.append(f"{_count(len(phase.sends), 'send')} of {size} elements")
    for kind, name in ((Fold, "fold"), (Copy, "copy"), (Divide, "division")):
        number = sum(isinstance(local, kind) for local in phase.local)
        if number:
            parts.append(_count(number, name).replace("copys", "copies"))
    return ", ".join(parts)


# --- SVG --------------------------------------------------------------------------------

_LEFT, _TOP, _COLUMN, _FOOT = 90, 70, 110, 30
_PHASES_MAX = 100
# More arrows than this in a phase, and their labels would only cover each other.
_LABELS_MAX = 64


def svg(plan: CollectivePlan, *, element_bytes: int | None = None) -> str:
    """A diagram: cards are columns, phases go down, an arrow is what one card sends another in a
    phase, with its elements or, given `element_bytes`, its bytes.  A whole SVG document.

    Of more than 100 phases the first are drawn, and how many are not is said.
    """
    drawn = plan.phases[:_PHASES_MAX]
    x = {card: _LEFT + i * _COLUMN for i, card in enumerate(plan.cards)}
    body: list[str] = []
    y = _TOP
    for number, phase in enumerate(drawn):
        height = _height(phase)
        body.append(_band(number, y, height, _LEFT + len(x) * _COLUMN))
        body += _arrows(phase, x, y, height, element_bytes)
        body += _marks(plan, phase, x, y + height)
        y += height
    left_out = len(plan.phases) - len(drawn)
    if left_out:
        body.append(f'<text class="n" x="10" y="{y + 20}">and {left_out} more phases</text>')
    height, width = y + _FOOT, max(_LEFT + len(x) * _COLUMN, 640)
    lines = [
        f'<line class="c" x1="{at}" y1="{_TOP - 8}" x2="{at}" y2="{y}"/>'
        f'<text class="h" x="{at}" y="{_TOP - 14}">card {card}</text>'
        for card, at in x.items()
    ]
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}">',
            f"<title>{escape(_title(plan))}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text class="t" x="10" y="22">{escape(_title(plan))}</text>',
            f'<text class="n" x="10" y="39">{escape(_totals(plan))}</text>',
            *lines,
            *body,
            "</svg>",
            "",
        ]
    )


_STYLE = (
    "text{font-family:sans-serif;font-size:11px;fill:#222}"
    ".t{font-size:14px;font-weight:bold}.n{fill:#666}.h{text-anchor:middle;font-weight:bold}"
    ".l{text-anchor:middle;font-size:10px}.b{stroke:#fff;stroke-width:3px}"
    ".c{stroke:#999}.s{stroke-width:1.5}"
)
# Told apart by most eyes, dark enough for text beside them; cards take turns.
_COLOURS = ("#1b6ca8", "#b3541e", "#2d7d46", "#8e3b8c", "#8a6d00", "#a6273d", "#3f4a9a", "#0f7b7b")


def _label(x: float, y: float, words: str) -> str:
    """Words in the diagram, on a white edge that keeps lines away from them."""
    at = f'x="{x}" y="{y}"'
    return f'<text class="l b" {at}>{words}</text><text class="l" {at}>{words}</text>'


def _by_pair(phase: Phase) -> dict[tuple[int, int], list[Send]]:
    pairs: dict[tuple[int, int], list[Send]] = {}
    for send in phase.sends:
        pairs.setdefault((send.source, send.target), []).append(send)
    return pairs


def _height(phase: Phase) -> int:
    """Room for the arrows that leave a card below each other."""
    leaving = Counter(source for source, _ in _by_pair(phase))
    return 56 + 12 * min(max(leaving.values(), default=0), 20)


def _band(number: int, y: int, height: int, width: int) -> str:
    shade = "#f4f6f8" if number % 2 == 0 else "#fff"
    return (
        f'<rect x="0" y="{y}" width="{width}" height="{height}" fill="{shade}" '
        'fill-opacity="0.6"/>'
        f'<text class="n" x="10" y="{y + 16}">phase {number}</text>'
    )


def _arrows(
    phase: Phase, x: dict[int, int], y: int, height: int, element_bytes: int | None
) -> Iterator[str]:
    pairs = _by_pair(phase)
    left: Counter[int] = Counter()
    column = {card: i for i, card in enumerate(x)}
    for (source, target), sends in pairs.items():
        # Arrows leave below each other, and arrive in the order in which they left.
        start = y + 8 + 12 * min(left[source], 20)
        left[source] += 1
        end = start + 26
        from_x, to_x = x[source], x[target]
        colour = _COLOURS[column[source] % len(_COLOURS)]
        elements = sum(send.what.size for send in sends)
        size = f"{elements * element_bytes:,} B" if element_bytes else f"{elements:,}"
        title = escape("; ".join(map(_send, sends[:8])) + ("; ..." if len(sends) > 8 else ""))
        yield (
            f'<g stroke="{colour}" fill="{colour}"><title>{title}</title>'
            f'<line class="s" x1="{from_x}" y1="{start}" x2="{to_x}" y2="{end}"/>'
            f'<path stroke="none" d="{_head(from_x, start, to_x, end)}"/></g>'
        )
        if len(pairs) <= _LABELS_MAX:
            # Near the source: there arrows are apart.
            share = 0.3 * _COLUMN / abs(to_x - from_x)
            at_x = round(from_x + (to_x - from_x) * share)
            at_y = round(start + (end - start) * share) - 3
            yield _label(at_x, at_y, size)


def _head(from_x: float, from_y: float, to_x: float, to_y: float) -> str:
    length = math.hypot(to_x - from_x, to_y - from_y)
    x, y = (to_x - from_x) / length, (to_y - from_y) / length
    back_x, back_y = to_x - 9 * x, to_y - 9 * y
    corners = ((to_x, to_y), (back_x - 4 * y, back_y + 4 * x), (back_x + 4 * y, back_y - 4 * x))
    return "M" + "L".join(f"{cx:.1f},{cy:.1f}" for cx, cy in corners) + "z"


def _marks(plan: CollectivePlan, phase: Phase, x: dict[int, int], y: int) -> Iterator[str]:
    """What each card does by itself at the end of a phase."""
    work: dict[int, list[Local]] = {}
    for local in phase.local:
        work.setdefault(local.card, []).append(local)
    for card, steps in work.items():
        names = [
            f"{name} x{number}" if number > 1 else name
            for kind, name in ((Copy, "copy"), (Fold, "fold"), (Divide, "divide"))
            if (number := sum(isinstance(step, kind) for step in steps))
        ]
        title = "; ".join(_work(plan, step) for step in steps[:8])
        title += "; ..." if len(steps) > 8 else ""
        label = _label(x[card], y - 5, escape(", ".join(names)))
        yield (
            f'<g><title>{escape(title)}</title><circle cx="{x[card]}" cy="{y - 19}" r="4" '
            f'fill="#fff" stroke="#222"/>{label}</g>'
        )
