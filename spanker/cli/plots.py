# SPDX-License-Identifier: Apache-2.0
"""Plots of what commands have found; they need matplotlib, an extra."""

from __future__ import annotations

import os
from collections.abc import Sequence

from spanker.cli.errors import Failure


def check(path: str) -> None:
    """Raise, before anything is computed, where no plot could be drawn or written."""
    try:
        import matplotlib
    except ImportError:
        raise Failure("a plot needs matplotlib: pip install 'spanker[plot]'") from None
    matplotlib.use("Agg")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise Failure(f"cannot write the plot {path}: {folder} is no folder to write to")
    if not path.endswith((".png", ".svg", ".pdf")):
        raise Failure(f"cannot write the plot {path}: expected a name ending in .png, .svg or .pdf")


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
    try:
        figure.savefig(path)
    except OSError as error:
        raise Failure(f"cannot write the plot {path}: {error.strerror}") from error
