# SPDX-License-Identifier: Apache-2.0
"""How to make virtual cards; apart from them, since most fleets have none."""

from __future__ import annotations

import attrs

from spanker.device.soft import DEFAULT_DDR_BYTES


@attrs.frozen
class VirtualCardSpec:
    """How to make one virtual card.  `isa` as for soft cards; a `hollow` one does no arithmetic and
    keeps no bytes."""

    isa: str | None = None
    ddr_bytes: int = DEFAULT_DDR_BYTES
    hollow: bool = False
