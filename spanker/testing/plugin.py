# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: fleets of emulated cards and a tiny model as fixtures.

pytest loads it wherever Spanker is installed, so it imports nothing beyond pytest until a fixture
is used.  `spanker_fleet` needs pytest-trio; the others do not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from spanker.fleet import Fleet

FLEET = "soft:3"
# Long for a tiny model, short for a person who waits for a test.
HANG_TIMEOUT_S = 1.0


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a GGUF of some 60 KB with random weights: loads in milliseconds, runs on any fleet.

    A llama with 2 layers, 64 wide, 4 heads over 2 KV heads, 320 tokens, 256 positions, Q4_0; it
    tokenises any text and answers with noise, always the same.  For another shape call
    `spanker.testing.write_tiny_llama`.
    """
    from spanker.testing.models import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("spanker") / "tiny.gguf")


@pytest.fixture
def spanker_fleet_factory() -> Callable[..., AbstractAsyncContextManager[Fleet]]:
    """Opens fleets: `async with spanker_fleet_factory("soft:4", hang_timeout_s=0.5) as fleet`.

    Takes what `spanker.open_fleet` takes; by default three cards, each of which has a part of every
    model, and a card counts as hung after 1 s without progress, not 10.
    """

    def factory(cards: object = FLEET, **options: object) -> AbstractAsyncContextManager[Fleet]:
        from spanker.fleet import open_fleet

        options.setdefault("hang_timeout_s", HANG_TIMEOUT_S)
        # The best plan for a tiny model leaves cards idle, and whose failure would show nothing.
        options.setdefault("plan", "tp")
        return open_fleet(cards, **options)  # type: ignore[arg-type]

    return factory


@pytest.fixture
async def spanker_fleet(
    spanker_fleet_factory: Callable[..., AbstractAsyncContextManager[Fleet]],
) -> AsyncIterator[Fleet]:
    """An open fleet of three soft cards without a model, for an async test under pytest-trio.

    `spanker.testing.kill` and `hang` make a card of it fail; a hang is noticed after 1 s.
    """
    async with spanker_fleet_factory() as fleet:
        yield fleet
