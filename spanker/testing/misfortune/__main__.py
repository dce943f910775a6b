# SPDX-License-Identifier: Apache-2.0
"""`python -m spanker.testing.misfortune`: runs many seeds and tells which went wrong."""

from __future__ import annotations

import json
import os
import sys
import time

import attrs
import click

from spanker.testing.misfortune.many import Seen, parse_seeds, run_many

_LINE_S = 5.0


@click.command()
@click.option("--seeds", default="0:1000", show_default=True, help="FIRST:STOP, or one")
@click.option("--jobs", type=click.IntRange(1), default=None, help="processes [default: all cores]")
@click.option(
    "--json", "as_json", is_flag=True, help="one line of JSON for each seed, and a last one"
)
def main(seeds: str, jobs: int | None, as_json: bool) -> None:
    """Simulate misfortune: 1 is returned where a seed is found that goes wrong, 130 at Ctrl-C."""
    try:
        wanted = parse_seeds(seeds)
    except ValueError:
        raise click.BadParameter(
            f"expected FIRST:STOP, got {seeds!r}", param_hint="--seeds"
        ) from None
    report = _Report(len(wanted), as_json)
    try:
        for seen in run_many(wanted, jobs or len(os.sched_getaffinity(0))):
            report.take(seen)
    except KeyboardInterrupt:
        report.end()
        sys.exit(130)
    report.end()
    sys.exit(1 if report.bad else 0)


class _Report:
    """Counts, and what is printed of them."""

    def __init__(self, total: int, as_json: bool) -> None:
        self.bad: list[Seen] = []
        self._total = total
        self._json = as_json
        self._done = self._faults = 0
        self._seconds = 0.0
        self._begin = self._told = time.monotonic()

    def take(self, seen: Seen) -> None:
        self._done += 1
        self._faults += seen.faults
        self._seconds += seen.seconds
        if self._json:
            print(json.dumps(attrs.asdict(seen)), flush=True)
        if seen.violations:
            self.bad.append(seen)
            if not self._json:
                print(f"seed {seen.seed}: {'; '.join(seen.violations)}")
                print(f"  python -m spanker.testing.replay {seen.seed}", flush=True)
        now = time.monotonic()
        if now - self._told >= _LINE_S:
            self._told = now
            print(self._line(), file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._json:
            took_s = time.monotonic() - self._begin
            last = {
                "seeds": self._done,
                "bad": sorted(seen.seed for seen in self.bad),
                "faults": self._faults,
                "virtual_s": self._seconds,
                "seeds_per_s": self._done / took_s,
            }
            print(json.dumps(last))
        else:
            print(self._line())

    def _line(self) -> str:
        took_s = max(time.monotonic() - self._begin, 1e-9)
        return (
            f"{self._done:,} of {self._total:,} seeds, {len(self.bad)} went wrong; "
            f"{self._faults:,} failing cards, {self._seconds:,.0f} virtual s in {took_s:.0f} s: "
            f"{self._done / took_s:.1f} seeds/s"
        )


if __name__ == "__main__":
    main()
