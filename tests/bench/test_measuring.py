# SPDX-License-Identifier: Apache-2.0
"""The measuring scripts run, on next to nothing, and keep what they found."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import probe
import pytest
import roofline

from spanker.testing import write_tiny_llama

BENCH = Path(roofline.__file__).parent


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits measured in moments."""
    monkeypatch.setattr(probe, "_MEMORY_BYTES_MIN", 1 << 20)
    monkeypatch.setattr(probe, "last_level_cache_bytes", lambda: 1 << 18)
    monkeypatch.setattr(probe, "_PASS_BYTES_MIN", 1 << 20)
    monkeypatch.setattr(probe, "_INT8_STEPS", 1000)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf", vocabulary=31000, context=1024, layers=1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_plausible(threads: int):
    found = probe.limits(threads, passes=2)
    assert found.threads == threads
    assert 0.1 < found.read_gb_per_s < 100_000
    assert 0.1 < found.int8_gmac_per_s < 1_000_000


def test_any_working_set_and_thread_count_is_measured():
    for threads, size in ((1, 1), (3, 100_003), (5, 1 << 20)):
        assert probe.read_bandwidth(threads, size, passes=1) > 0
    with pytest.raises(probe.ProbeError, match="threads must be 1 to 256, got 0"):
        probe.int8_rate(0)


def test_without_a_compiler_the_probe_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(probe.ProbeError, match=r"no C compiler \(no-such-compiler\).*install gcc"):
        probe.compiler()


@pytest.mark.usefixtures("small")
def test_the_roofline_measures_ours_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(roofline, "IDLE_S", 0.1)
    monkeypatch.setattr(roofline, "START_RUNS", 1)
    monkeypatch.setattr(roofline, "PACKED_CACHE", tmp_path / "packed")
    monkeypatch.setattr(roofline, "EMPTY_CACHE", tmp_path / "empty")
    monkeypatch.setattr(roofline, "CONTEXT_POSITIONS", (5, 40))
    out = tmp_path / "r.json"
    options = ["--cards", "1", "--rounds", "1", "--no-peer", "--json", str(out)]
    with pytest.raises(SystemExit) as stopped:
        roofline.main(["--models", f"{tiny},missing", *options])
    # A model that cannot be had is an error, after all the others.
    assert stopped.value.code == 1
    record = json.loads(out.read_text())
    assert record["complete"] and record["llama_cpp"] is None
    measured, missing = record["models"]
    assert measured["name"] == "tiny"
    assert "no model 'missing'" in missing["error"]
    (rates,) = measured["rates"]
    assert rates["decode"]["spanker_tokens_per_s"] > 0
    assert rates["prefill"]["llama_cpp_tokens_per_s"] is None
    assert len(rates["samples"]["spanker_decode"]) == 1
    for engine in ("spanker", "spanker_packed"):
        assert measured["start"][0]["medians"][engine]["first_token_s"] > 0
    assert len(measured["crowd"][0]["decode_tokens_per_s"]) == 2
    assert measured["idle"][0]["cpu_share"] < 1
    assert [row["position"] for row in measured["context"][0]["positions"]] == [5, 40]
    shown = capsys.readouterr().out
    for title in ("decode, tokens/s", "start", "more cards than cores", "idle", "later positions"):
        assert title in shown


@pytest.mark.long
def test_an_interrupted_roofline_saves_what_it_has(tiny: Path, tmp_path: Path):
    out = tmp_path / "r.json"
    command = [sys.executable, str(BENCH / "roofline.py"), "--no-peer", "--models", str(tiny)]
    command += ["--cards", "1", "--rounds", "1000", "--parts", "decode", "--json", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "round 2 of" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(30) == 130
    assert "interrupted" in rest and "Traceback" not in rest
    record = json.loads(out.read_text())
    assert not record["complete"]
    assert len(record["models"][0]["rates"][0]["samples"]["spanker_decode"]) >= 2


def test_kernels_are_measured_over_the_chosen_ops(tmp_path: Path):
    out = tmp_path / "k.json"
    command = [sys.executable, str(BENCH / "kernels.py"), "--ops", "rmsnorm,top_k"]
    subprocess.run([*command, "--isa", "scalar", "--json", str(out)], check=True)
    record = json.loads(out.read_text())
    assert {kernel["op"] for kernel in record["kernels"]} == {"rmsnorm", "top_k"}
    assert all(kernel["seconds"] > 0 for kernel in record["kernels"])
