# SPDX-License-Identifier: Apache-2.0
"""Every mistake that a user can make is one line on stderr that says what to do."""

from __future__ import annotations

from pathlib import Path

import attrs
import numpy as np
import pytest
from cli_process import good, spanker, started, terminal

from spanker.testing import tensor, tiny_llama, write_gguf, write_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a good tiny model and several that are not."""
    directory = tmp_path_factory.mktemp("models")
    data = write_tiny_llama(directory / "good.gguf").read_bytes()
    (directory / "truncated.gguf").write_bytes(data[: len(data) // 8])
    (directory / "short.gguf").write_bytes(data[:-1000])
    (directory / "text.gguf").write_text("not a model at all\n")
    tiny = tiny_llama()
    extra = tensor("blk.0.surprise.weight", np.ones((64, 64), np.float32))
    write_gguf(directory / "extra.gguf", tiny.metadata, (*_tensors(tiny), extra))
    mamba = {**tiny.metadata, "general.architecture": "mamba"}
    write_gguf(directory / "mamba.gguf", mamba, _tensors(tiny))
    return directory


def _tensors(tiny: object) -> tuple[object, ...]:
    return tuple(getattr(tiny, "tensors").values())  # noqa: B009


def refused(*args: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> str:
    """The one line on stderr of a command that must fail with exit code 1."""
    done = spanker(*args, stdin=stdin, env=env)
    text = done.stderr.decode()
    print(text, end="")
    assert done.returncode == 1
    assert done.stdout == b""
    assert text.startswith("spanker: error: ") and text.endswith("\n") and text.count("\n") == 1
    return text


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("missing.gguf", "no such model file; give the path of a GGUF file or one of the names"),
        ("truncated.gguf", "the file is truncated or corrupt: download it again"),
        ("short.gguf", "the file is truncated: download it again"),
        ("text.gguf", "is not a GGUF file"),
        ("mamba.gguf", "architecture 'mamba' is not supported; supported: 'llama'"),
        ("extra.gguf", "tensor 'blk.0.surprise.weight' is not part of a llama model"),
    ],
)
def test_a_file_that_is_no_model(models: Path, file: str, expected: str) -> None:
    said = refused("run", "x", "--model", str(models / file))
    assert str(models / file) in said and expected in said


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--cards", "0"), "a fleet needs at least one card, got '0': use e.g. --cards 1"),
        (("--cards", "300"), "300 cards are too many: a soft fleet has 1 to 64"),
        (("--cards", "three"), "expected a number or soft:N[@ISA][:BYTES]"),
        (("--cards", "soft:1@z80"), "'z80' is not available here: expected one of scalar"),
        (("--cards", "soft:1:50KiB"), "use more cards, a shorter --ctx"),
        (("--plan", "zigzag"), "no plan 'zigzag': expected auto, tp, pp, or tpAxppB"),
        (("--plan", "tp2xpp2", "--cards", "3"), "uses 4 cards, the fleet has 3: use --cards 4"),
        (("--plan", "pp", "--cards", "3"), "need at least 3 layers, the model has 2"),
        (("--ctx", "3"), "but the context holds 3 with at least one for the answer"),
        (("--ctx", "999999"), "the model was made for 1 to 256 positions"),
        (("--temperature", "-1"), "temperature must be 0 to 100, got -1.0"),
        (("--top-p", "nan"), "top_p must be above 0 and at most 1"),
        (("--stop", ""), "stop string '' is not a string of 1..1024 characters"),
    ],
)
def test_an_option_that_makes_no_sense(models: Path, args: tuple[str, ...], expected: str) -> None:
    assert expected in refused("run", "a prompt", "--model", str(models / "good.gguf"), *args)


def test_too_little_card_memory_for_the_real_model(smollm2_path: Path) -> None:
    said = refused("run", "x", "--model", str(smollm2_path), "--cards", "soft:1:20MiB")
    assert "needs 252,710,400 bytes on card 0" in said and "has 20,971,520" in said


def test_a_model_that_is_not_cached_yet(tmp_path: Path) -> None:
    said = refused("run", "x", env={"SPANKER_CACHE": str(tmp_path)})
    assert "fetch it with `spanker pull smollm2`" in said
    assert "no model 'nope'" in refused("pull", "nope", env={"SPANKER_CACHE": str(tmp_path)})


def test_a_prompt_that_is_not_text(models: Path) -> None:
    model = str(models / "good.gguf")
    assert "stdin is not UTF-8 text: byte 1 is 0xff" in refused(
        "run", "--model", model, stdin=b"a\xff"
    )
    assert "more than 16 MiB" in refused("run", "--model", model, stdin=b"a" * (16 << 20) + b"aa")
    assert "no tokens" in refused("run", "--model", model)


def test_a_missing_prompt_on_a_terminal_is_wrong_usage() -> None:
    with terminal() as screen, started("run", stdin=screen.device) as running:
        assert running.process.stderr is not None
        assert b"give a PROMPT, or pipe one in" in running.process.stderr.read()
        assert running.process.wait(10) == 2


@pytest.mark.parametrize(
    "args",
    [
        ("frobnicate",),
        ("run", "--no-such-option"),
        ("run", "x", "--profile", "rev-z"),
        ("run", "x", "--max-tokens", "0"),
        ("run", "--prompt-file", "/nonexistent"),
        ("eval",),
        ("bench", "--gen-tokens", "1"),
    ],
)
def test_wrong_usage_has_exit_code_2(args: tuple[str, ...]) -> None:
    done = spanker(*args)
    assert done.returncode == 2
    assert done.stdout == b"" and b"Error: " in done.stderr and b"Traceback" not in done.stderr


def test_control_characters_of_a_file_reach_no_terminal(tmp_path: Path) -> None:
    tiny = attrs.evolve(
        tiny_llama(), metadata={**tiny_llama().metadata, "general.name": "\x1b[31mred\x07"}
    )
    model = tiny.write(tmp_path / "red.gguf")
    shown = good("info", "--model", str(model)).stdout
    assert b"red" in shown and b"\x1b" not in shown and b"\x07" not in shown


def test_a_bug_shows_its_traceback_and_asks_for_a_report() -> None:
    import subprocess
    import sys

    program = (
        "import spanker.cli.info as info; from spanker.cli import main\n"
        "def broken(*args, **options): raise ZeroDivisionError('a bug')\n"
        "info.info = broken; main(['info'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 1
    assert b"ZeroDivisionError: a bug" in done.stderr
    assert done.stderr.endswith(b"please report it with these lines\n")
