# SPDX-License-Identifier: Apache-2.0
"""Plots of what commands have found; they need matplotlib, an extra."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spanker.cli.errors import Failure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spanker.cli.timeline import Timeline


def check(path: str) -> None:
    """Raise, before anything is computed, where no plot could be drawn or written."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise Failure(f"cannot write the plot {path}: {folder} is no folder to write to")
    if not path.endswith((".png", ".svg", ".pdf")):
        raise Failure(f"cannot write the plot {path}: expected a name ending in .png, .svg or .pdf")
    try:
        import matplotlib
    except ImportError:
        raise Failure("a plot needs matplotlib: pip install 'spanker[plot]'") from None
    matplotlib.use("Agg")


def tokens_over_cards(path: str, title: str, points: Sequence[tuple[int, float | None]]) -> None:
    """Tokens per second over the number of cards, and what proportional growth would be."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found = [(cards, rate) for cards, rate in points if rate is not None]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    cards = [n for n, _ in found]
    axes.plot(cards, [rate for _, rate in found], marker="o", label="best plan, predicted")
    first_cards, first_rate = found[0]
    axes.plot(
        cards,
        [first_rate * n / first_cards for n in cards],
        linestyle=":",
        color="grey",
        label=f"in proportion to {first_cards} card{'s' * (first_cards > 1)}",
    )
    axes.set(title=title, xlabel="cards", ylabel="decode, tokens/s", xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def tokens_over_time(path: str, title: str, drilled: Timeline, undisturbed: Timeline) -> None:
    """Tokens over the seconds since the first, with and without faults; lines where something
    failed and where the fleet said so, and the stalls shaded."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for timeline, label, color in (
        (undisturbed, "without faults", "grey"),
        (drilled, "with faults", "tab:blue"),
    ):
        counts = range(1, len(timeline.tokens) + 1)
        axes.step(timeline.tokens, counts, where="post", label=label, color=color)
    for number, stall in enumerate(drilled.stalls):
        begin, end = stall.at_s, stall.at_s + stall.seconds
        # Labels that begin so are not in the legend.
        told = "_" if number else "no token"
        axes.axvspan(begin, end, color="tab:red", alpha=0.1, label=told)
    for what, mark in drilled.marks:
        # Often at the same time: one to the left of its line, the other to the right.
        color, side = ("tab:red", "right") if what == "fault" else ("tab:green", "left")
        axes.axvline(mark.at_s, color=color, linewidth=1)
        axes.annotate(
            mark.short,
            (mark.at_s, 0.99),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha=side,
            va="top",
            fontsize="small",
            color=color,
        )
    axes.set(title=title, xlabel="seconds since the first token", ylabel="tokens", ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    _save(figure, path)


def _save(figure: Figure, path: str) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise Failure(f"cannot write the plot {path}: {error.strerror}") from error
