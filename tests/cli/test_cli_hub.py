# SPDX-License-Identifier: Apache-2.0
"""hf: names are good wherever a model is named.  The hub is never asked: it is set offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_process import Done, batch, good

from spanker.testing import write_tiny_llama

pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "hf:sails/tiny-GGUF/q4/tiny.gguf"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of NAME in a cache as the hub's library lays it out."""
    repo = tmp_path / "models--sails--tiny-GGUF"
    snapshot = repo / "snapshots" / COMMIT / "q4"
    for directory in (repo / "blobs", repo / "refs", snapshot):
        directory.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    write_tiny_llama(repo / "blobs" / "abc")
    (snapshot / "tiny.gguf").symlink_to("../../../blobs/abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return snapshot / "tiny.gguf"


def failed(done: Done) -> str:
    assert done.code == 1 and done.out == ""
    assert done.err.startswith("spanker: error: ") and done.err.count("\n") == 1
    return done.err


def test_every_command_takes_the_name_of_a_file_on_the_hub(cached: Path) -> None:
    text = ("hello " * 20).encode()
    pulled, ran, told, measured, judged, chatted = batch(
        ("pull", NAME),
        ("run", "hello", "--model", NAME, "--max-tokens", "4", "--json"),
        ("info", "--model", NAME, "--json"),
        ("bench", "--model", NAME, "--gen-tokens", "4", "--json"),
        (("eval", "--model", NAME, "--text", "-", "--json"), text),
        (("chat", "--model", NAME, "--max-tokens", "2"), b"hello\n"),
    )
    assert pulled.out == f"{cached}\n"
    assert len(ran.json()["tokens"]) == 4
    assert told.json()["model"]["path"] == str(cached)
    for done in (measured, judged):
        assert done.json()
    assert chatted.code == 0


def test_what_is_not_there_is_said_on_one_line(cached: Path) -> None:
    other = "hf:sails/other/tiny.gguf"
    absent, offline, malformed, revision = batch(
        ("run", "x", "--model", other),
        ("pull", other),
        ("pull", "hf:tiny.gguf"),
        ("info", "--model", "hf:sails/tiny-GGUF@v2/q4/tiny.gguf"),
    )
    assert f"fetch it with `spanker pull {other}`" in failed(absent)
    assert f"cannot pull {other}: the hub cannot be reached" in failed(offline)
    assert "expected hf:owner/repo/file.gguf" in failed(malformed)
    assert "`spanker pull hf:sails/tiny-GGUF@v2/q4/tiny.gguf`" in failed(revision)


def test_help_names_such_files() -> None:
    assert b"spanker pull hf:owner/repo/file.gguf" in good("pull").stderr
    assert b"hf:owner/repo/file.gguf" in good("pull", "--help").stdout
    assert b"hf:owner/repo/file.gguf" in good("run", "--help").stdout
