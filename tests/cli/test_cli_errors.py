# SPDX-License-Identifier: Apache-2.0
"""Every mistake that a user can make is one line on stderr that says what to do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
from cli_process import Done, batch, good, spanker, started, terminal

from spanker.testing import tensor, tiny_llama, write_gguf, write_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a good tiny model and several that are not."""
    directory = tmp_path_factory.mktemp("models")
    data = write_tiny_llama(directory / "good.gguf").read_bytes()
    (directory / "truncated.gguf").write_bytes(data[:2000])
    (directory / "outside.gguf").write_bytes(data[:-1000])
    (directory / "text.gguf").write_text("not a model at all\n")
    tiny = tiny_llama()
    extra = tensor("blk.0.surprise.weight", np.ones((64, 64), np.float32))
    write_gguf(directory / "extra.gguf", tiny.metadata, (*_tensors(tiny), extra))
    mamba = {**tiny.metadata, "general.architecture": "mamba"}
    write_gguf(directory / "mamba.gguf", mamba, _tensors(tiny))
    return directory


def _tensors(tiny: object) -> tuple[object, ...]:
    return tuple(getattr(tiny, "tensors").values())  # noqa: B009


def one_line(done: Done) -> str:
    """The one line on stderr of a command that must have failed with exit code 1."""
    print(done.err, end="")
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("spanker: error: ") and done.err.endswith("\n")
    assert done.err.count("\n") == 1
    return done.err


FILES = {
    "missing.gguf": "no such model file; give the path of a GGUF file or one of the names",
    "truncated.gguf": "the file is truncated or corrupt: download it again",
    "outside.gguf": "but the file ends at",
    "text.gguf": "is not a GGUF file",
    "mamba.gguf": "architecture 'mamba' is not supported; supported: 'llama'",
    "extra.gguf": "tensor 'blk.0.surprise.weight' is not part of a llama model",
}


def test_a_file_that_is_no_model_is_named_with_what_is_wrong(models: Path) -> None:
    calls = [("run", "x", "--model", str(models / file)) for file in FILES]
    for (file, expected), done in zip(FILES.items(), batch(*calls), strict=True):
        said = one_line(done)
        assert str(models / file) in said and expected in said


OPTIONS = {
    ("--cards", "0"): "a fleet needs at least one card, got '0': use e.g. --cards 1",
    ("--cards", "300"): "300 cards are too many: a soft fleet has 1 to 64",
    ("--cards", "three"): "expected a number, soft:N[@ISA][:BYTES] or kernel:N",
    ("--cards", "soft:1@z80"): "'z80' is not available here: expected one of scalar",
    ("--cards", "soft:1:50KiB"): "use more cards, a shorter --ctx",
    ("--plan", "zigzag"): "no plan 'zigzag': expected auto, tp, pp, or tpAxppB",
    ("--plan", "tp2xpp2", "--cards", "3"): "uses 4 cards, the fleet has 3: use --cards 4",
    ("--plan", "pp", "--cards", "3"): "need at least 3 layers, the model has 2",
    ("--ctx", "3"): "but the context holds 3 with at least one for the answer",
    ("--ctx", "999999"): "the model was made for 1 to 256 positions",
    ("--prompt-chunk", "99999"): "the prompt chunk must be 1 to 8192 tokens, got 99999",
    ("--temperature", "-1"): "temperature must be 0 to 100, got -1.0",
    ("--top-p", "nan"): "top_p must be above 0 and at most 1",
    ("--stop", ""): "stop string '' is not a string of 1..1024 characters",
}


def test_an_option_that_makes_no_sense_is_refused_with_what_to_do(models: Path) -> None:
    calls = [("run", "words", "--model", str(models / "good.gguf"), *args) for args in OPTIONS]
    for expected, done in zip(OPTIONS.values(), batch(*calls), strict=True):
        assert expected in one_line(done)


def test_a_trace_that_cannot_be_written_is_refused_before_any_work(
    models: Path, tmp_path: Path
) -> None:
    """Before the model is looked for, even; what an older file holds is kept."""
    missing = str(models / "missing.gguf")
    older = tmp_path / "older.json"
    older.write_text("{}")
    nowhere = str(tmp_path / "none" / "trace.json")
    *refused, kept = batch(
        ("run", "words", "--model", missing, "--trace", nowhere),
        ("bench", "--model", missing, "--trace", nowhere),
        ("run", "words", "--model", missing, "--trace", str(older)),
    )
    for done in refused:
        assert one_line(done) == (
            f"spanker: error: cannot write the trace {nowhere}: No such file or directory\n"
        )
    assert "no such model file" in one_line(kept)
    assert older.read_text() == "{}"


def test_a_trace_that_finds_no_room_is_one_line(models: Path) -> None:
    args = ("run", "words", "--model", str(models / "good.gguf"), "--max-tokens", "2", "--json")
    (done,) = batch((*args, "--trace", "/dev/full"))
    assert "cannot write the trace /dev/full: No space left on device" in one_line(done)


def test_too_little_card_memory_says_how_much_is_needed(smollm2_path: Path) -> None:
    done = spanker("run", "x", "--model", str(smollm2_path), "--cards", "soft:1:20MiB")
    said = one_line(Done(done.returncode, done.stdout.decode(), done.stderr.decode()))
    assert re.search(r"needs [\d,]+ bytes on card 0 .* has 20,971,520", said)


def test_a_model_that_is_not_cached_can_be_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPANKER_CACHE", str(tmp_path))
    absent, unknown = batch(("run", "x"), ("pull", "nope"))
    assert "fetch it with `spanker pull smollm2`" in one_line(absent)
    assert "no model 'nope'" in one_line(unknown)


def test_a_prompt_that_is_not_text_is_refused(models: Path) -> None:
    args = ("run", "--model", str(models / "good.gguf"))
    stray, long, empty = batch((args, b"a\xff"), (args, b"a" * ((16 << 20) + 2)), (args, b""))
    assert "stdin is not UTF-8 text: byte 1 is 0xff" in one_line(stray)
    assert "more than 16 MiB" in one_line(long)
    assert "no tokens" in one_line(empty)


def test_a_missing_prompt_on_a_terminal_is_wrong_usage() -> None:
    with terminal() as screen, started("run", stdin=screen.device) as running:
        assert running.process.stderr is not None
        assert b"give a PROMPT, or pipe one in" in running.process.stderr.read()
        assert running.process.wait(10) == 2


def test_wrong_usage_has_exit_code_2() -> None:
    for done in batch(
        ("frobnicate",),
        ("run", "--no-such-option"),
        ("run", "x", "--profile", "rev-z"),
        ("run", "x", "--max-tokens", "0"),
        ("run", "--prompt-file", "/nonexistent"),
        ("eval",),
        ("bench", "--gen-tokens", "1"),
        ("run", "x", "--trace", "/"),
    ):
        assert done.code == 2
        assert done.out == "" and "Error: " in done.err and "Traceback" not in done.err


def test_control_characters_of_a_file_reach_no_terminal(tmp_path: Path) -> None:
    tiny = tiny_llama()
    named = {**tiny.metadata, "general.name": "\x1b[31mred\x07"}
    model = attrs.evolve(tiny, metadata=named).write(tmp_path / "red.gguf")
    shown = good("info", "--model", str(model)).stdout
    assert b"red" in shown and b"\x1b" not in shown and b"\x07" not in shown


def test_a_bug_shows_its_traceback_and_asks_for_a_report() -> None:
    program = (
        "import spanker.cli.info as info; from spanker.cli import main\n"
        "def broken(*args, **options): raise ZeroDivisionError('a bug')\n"
        "info.info = broken; main(['info'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"ZeroDivisionError: a bug" in done.stderr
    assert done.stderr.endswith(b"please report it with these lines\n")
