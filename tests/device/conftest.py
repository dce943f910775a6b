# SPDX-License-Identifier: Apache-2.0
"""Cards of every body, for the conformance suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conformance_rigs import (
    BODIES,
    DDR_BYTES,
    EMULATED,
    MakeRig,
    Rig,
)

from spanker.device.base import CardDevice

_BODIES = [
    pytest.param(body, marks=pytest.mark.riscv) if body in EMULATED else body for body in BODIES
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first card of a mixed rig is like that of the other one: once is enough."""
    items[:] = [
        item
        for item in items
        if not ("mixed" in item.name and "card" in getattr(item, "fixturenames", ()))
    ]


@pytest.fixture(params=_BODIES)
def make_rig(request: pytest.FixtureRequest) -> Iterator[MakeRig]:
    rigs: list[Rig] = []
    if request.param in EMULATED:
        request.getfixturevalue("firmware")

    def make(count: int = 1, ddr_bytes: int = DDR_BYTES) -> Rig:
        rigs.append(BODIES[request.param](count, ddr_bytes))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def card(make_rig: MakeRig) -> CardDevice:
    return make_rig(1).cards[0]


@pytest.fixture
def pair(make_rig: MakeRig) -> tuple[CardDevice, CardDevice]:
    a, b = make_rig(2).cards
    return a, b
