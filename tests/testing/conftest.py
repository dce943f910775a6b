# SPDX-License-Identifier: Apache-2.0
"""What the tests of failing fleets share."""

from __future__ import annotations

from pathlib import Path

import pytest

from spanker.testing import write_tiny_llama


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for prompts and answers that take a while."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "long.gguf", context=2048)


@pytest.fixture(autouse=True)
def _leaves_nothing(nothing_left_behind: None) -> None:
    """However a fleet ends."""
