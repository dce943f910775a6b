# SPDX-License-Identifier: Apache-2.0
"""The bench of recoveries: its equality can fail, and its record says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recovery

from spanker.testing import write_tiny_llama


def test_it_compares_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", context=512)
    record = tmp_path / "out.json"
    options = ["--model", str(path), "--cards", "3", "--tokens", "40", "--points", "8"]
    assert recovery.main([*options, "--hang-timeout", "0.2", "--json", str(record)]) == 0
    found = json.loads(record.read_text())
    assert [p["fault"] for p in found["points"]] == [*recovery.FAULTS, recovery.FAULTS[0]]
    assert all(p["same"] and p["still_s"] > 0 for p in found["points"])
    lost = [p for p in found["points"] if p["fault"] in ("kill", "hang", "reset", "ecc")]
    assert all(p["recovery_s"] > 0 and p["plan"] == "tp2" for p in lost)
    assert all(p["events"] == ["CardLost", "Replanned"] for p in lost)
    # One with another output is told.
    found["points"][1]["same"] = False
    assert recovery.show(found) == 1
    assert "3" in capsys.readouterr().out
