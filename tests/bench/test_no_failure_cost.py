# SPDX-License-Identifier: Apache-2.0
"""The bench of what surviving costs while nothing fails: two trees, told apart and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import no_failure_cost as bench
import pytest

from spanker.testing import write_tiny_llama


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(write_tiny_llama(tmp_path / "tiny.gguf", context=1024))


def test_two_trees_are_compared(tiny: str, tmp_path: Path) -> None:
    other, record = tmp_path / "other", tmp_path / "out.json"
    other.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "csrc")
    shutil.copytree(bench.HERE / "spanker", other / "spanker", ignore=skip)
    options = ["--model", tiny, "--tokens", "16", "--rounds", "2", "--json", str(record)]
    for beside, named in (((), "recover=False"), (("--beside", str(other)), str(other))):
        assert bench.main([*options, *beside]) == 0
        found = json.loads(record.read_text())
        assert found["beside"] == named and found["same_tokens"]
        assert all(len(side["runs"]) == 2 for side in found["tokens_per_s"].values())
        assert 0.1 < found["ratio"] < 10


def test_a_tree_that_is_none_is_told(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"failed|expected the Spanker of"):
        bench.run(tmp_path, tiny, 1, 8, {})
