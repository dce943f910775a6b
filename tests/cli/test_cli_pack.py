# SPDX-License-Identifier: Apache-2.0
"""`spanker pack`, and what run makes of a packed copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import batch

from spanker.testing import write_tiny_llama


def test_a_copy_is_written_used_listed_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPANKER_CACHE", str(tmp_path / "cache"))
    model = str(write_tiny_llama(tmp_path / "tiny.gguf"))
    run = ("run", "hello", "--model", model, "--cards", "2", "--max-tokens", "4", "--json")
    none, before, packed, after, listed, table, removed, again, gone = batch(
        ("pack",),
        (*run, "--logits-hash"),
        ("pack", model, "--json"),
        (*run, "--logits-hash"),
        ("pack", "--json"),
        ("pack",),
        ("pack", model, "--remove"),
        ("pack", model, "--remove"),
        ("pack", "--json"),
    )
    assert none.code == 0 and "there are no packed copies" in none.err
    path = Path(packed.json()["path"])
    nbytes = packed.json()["bytes"]
    assert path.parent == tmp_path / "cache" / "packed" and nbytes > 0
    assert after.json()["logits_sha256"] == before.json()["logits_sha256"]
    assert listed.json() == [{"model": model, "bytes": nbytes, "path": str(path), "used": True}]
    assert "tiny.gguf" in table.out and "yes" in table.out
    assert removed.code == 0 and not path.exists()
    assert again.code == 1 and again.err.startswith("spanker: error: there is no packed copy of ")
    assert gone.json() == []


def test_which_copy_to_remove_must_be_said() -> None:
    (done,) = batch(("pack", "--remove"))
    assert done.code == 2 and "say of which MODEL" in done.err
