# SPDX-License-Identifier: Apache-2.0
"""bench/collectives.py measures what it says, of ourselves; peers are not installed here."""

from __future__ import annotations

from typing import Any

import collectives


async def test_a_run_without_peers_has_figures_for_every_size() -> None:
    out: dict[str, Any] = {}
    await collectives.measure(2, 1, (4096, 65536), None, out)
    assert out["ranks"] == 2 and out["peers"] == {} and len(out["bystanders"]) == 1
    for size in ("4096", "65536"):
        figures = out["sizes"][size]
        assert figures["median_us"].keys() == {"program", "api"}
        assert all(0 < us < 1e6 for us in figures["best_us"].values())


def test_turns_are_as_long_as_the_last_one_says() -> None:
    assert collectives.calls_for([]) == collectives.CALLS_MIN
    assert collectives.calls_for([1e-6] * 3) == collectives.CALLS_MAX
    assert collectives.calls_for([10.0]) == collectives.CALLS_MIN
    assert collectives.calls_for([0.002]) == 50
