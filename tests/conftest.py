# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several test directories share."""

from __future__ import annotations

from pathlib import Path

import pytest

from spanker.ggml import catalog


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The catalogue's smallest real model, pulled if the cache does not have it."""
    return catalog.pull("smollm2")
