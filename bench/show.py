# SPDX-License-Identifier: Apache-2.0
"""The record of bench/roofline.py as tables and as a plot.

    python bench/show.py bench/results/roofline.json

prints the tables of a saved record and draws its plot beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import report

Record = dict[str, Any]
ENGINES = {"spanker": "spanker", "spanker_packed": "packed", "llama_cpp": "llama.cpp"}


def tables(record: Record) -> None:
    """The record as tables on stdout."""
    for part, unit, key in (
        ("decode", "GB/s", "gb_per_s"),
        ("prefill", "G mult-adds/s", "gmac_per_s"),
    ):
        rows = [
            [
                model["name"],
                measured["cards"],
                figures["spanker_tokens_per_s"],
                figures["llama_cpp_tokens_per_s"],
                figures["ratio"],
                figures["limit_tokens_per_s"],
                figures[f"spanker_{key}"],
                report.percent(figures["spanker_share_of_limit"]),
                report.percent(figures["llama_cpp_share_of_limit"]),
            ]
            for model in record["models"]
            for measured in model.get("rates", ())
            if (figures := measured.get(part))
        ]
        if rows:
            columns = ("model", "cards", "spanker", "llama.cpp", "ratio", "limit", unit)
            report.show_table(
                f"{part}, tokens/s", (*columns, "of limit", "llama.cpp of limit"), rows
            )
    _show_starts(record)
    _show_rest(record)


def _show_starts(record: Record) -> None:
    rows = [
        [
            model["name"],
            measured["cards"],
            ENGINES[engine],
            *(figures[key] for key in ("import_s", "load_s", "first_token_s", "peak_rss_mb")),
            *(figures[key] for key in ("rss_anon_mb", "rss_file_mb", "rss_shmem_mb")),
        ]
        for model in record["models"]
        for measured in model.get("start", ())
        for engine, figures in measured.get("medians", {}).items()
    ]
    if rows:
        columns = ("model", "cards", "engine", "import s", "load s", "first token s", "peak MB")
        report.show_table("start", (*columns, "anon MB", "file MB", "shmem MB"), rows)


def _show_rest(record: Record) -> None:
    rows = [
        [model["name"], *c["cards"], *c["decode_tokens_per_s"], c["ratio"]]
        for model in record["models"]
        for c in model.get("crowd", ())
        if "ratio" in c
    ]
    if rows:
        title = "more cards than cores: decode, tokens/s"
        columns = ("model", "few cards", "many cards", "few", "many", "ratio")
        report.show_table(title, columns, rows)
    rows = [
        [model["name"], i["cards"], f"{i['cpu_share']:.3%}", i["wakeups_per_s"]]
        for model in record["models"]
        for i in model.get("idle", ())
        if "cpu_share" in i
    ]
    if rows:
        report.show_table("idle", ("model", "cards", "of a core", "wake-ups/s"), rows)
    rows = [
        [
            model["name"],
            c["cards"],
            p["position"],
            p["busiest_card_kv_bytes"] / 1e6,
            p["spanker_tokens_per_s"],
            p["llama_cpp_tokens_per_s"],
            p["explained_tokens_per_s"],
            p["limit_tokens_per_s"],
        ]
        for model in record["models"]
        for c in model.get("context", ())
        for p in c.get("positions", ())
    ]
    if rows:
        columns = ("model", "cards", "position", "KV MB of a card", "spanker", "llama.cpp")
        title = "decode at later positions, tokens/s"
        report.show_table(title, (*columns, "by KV bytes", "limit"), rows)


def plot(record: Record, path: Path) -> bool:
    """Bars of decode and prefill; False where matplotlib is missing or there is nothing to show."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        print("no plot: matplotlib is missing (pip install '.[bench]')", file=sys.stderr)
        return False
    groups: dict[str, list[tuple[str, Record]]] = {}
    for part in ("decode", "prefill"):
        for model in record["models"]:
            for measured in model.get("rates", ()):
                if part in measured:
                    cards = f"{measured['cards']} card{'s' if measured['cards'] > 1 else ''}"
                    groups.setdefault(part, []).append(
                        (f"{model['name']}\n{cards}", measured[part])
                    )
    if not groups:
        return False
    bars = (
        ("spanker_tokens_per_s", "Spanker", "#1f6f8b"),
        ("llama_cpp_tokens_per_s", "llama.cpp", "#e0a458"),
        ("limit_tokens_per_s", "limit of the machine", "#d5d5d5"),
    )
    widest = max(map(len, groups.values()))
    figure, axes = pyplot.subplots(
        len(groups), 1, figsize=(2 + 1.6 * widest, 1 + 3.2 * len(groups)), squeeze=False
    )
    for axis, (part, entries) in zip(axes[:, 0], groups.items(), strict=True):
        for offset, (key, label, colour) in enumerate(bars):
            found = [(i, f) for i, (_, f) in enumerate(entries) if f[key] is not None]
            # Models differ by powers of ten: heights are shares of the limit, rates are written.
            drawn = axis.bar(
                [i + (offset - 1) * 0.27 for i, _ in found],
                [f[key] / f["limit_tokens_per_s"] for _, f in found],
                0.25,
                label=label,
                color=colour,
            )
            axis.bar_label(drawn, [report.cell(f[key]) for _, f in found], fontsize=7)
        axis.set_xticks(range(len(entries)), [label for label, _ in entries], fontsize=8)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set_title(f"{part}, tokens/s", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    machine = record["machine"]
    figure.suptitle(f"{machine['cpu']}, {machine['cores']} cores, {record['time_utc']}", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=3, fontsize=8, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} RECORD.json")
    path = Path(sys.argv[1])
    record = json.loads(path.read_text(encoding="utf-8"))
    tables(record)
    plot(record, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
