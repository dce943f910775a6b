# SPDX-License-Identifier: Apache-2.0
"""The benchmarks are scripts, not a package: their directory goes on the path."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "bench"
if str(BENCH) not in sys.path:
    sys.path.insert(0, str(BENCH))
