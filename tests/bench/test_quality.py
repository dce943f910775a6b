# SPDX-License-Identifier: Apache-2.0
"""The exact forward pass, and what is counted against it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import engines
import numpy as np
import pytest
import quality
from exact import ExactLlama, rms
from reference_model import forward

from spanker.testing.models import TinyModel, tiny_llama

SHAPES = {
    "tied": {},
    "one KV head, heads of their own size": {
        "heads": 3,
        "kv_heads": 1,
        "head_dim": 32,
        "tied": False,
    },
    "half of a head rotated": {"heads": 4, "kv_heads": 4},
}


def model(name: str) -> TinyModel:
    made = tiny_llama(format="f32", seed=4, **SHAPES[name])
    if name.startswith("half"):
        made.metadata.update({"llama.rope.dimension_count": 8, "llama.rope.freq_base": 500.0})
    return made


@pytest.mark.parametrize("name", SHAPES)
def test_exact_logits_are_those_of_the_float32_reference_but_for_rounding(
    name: str, tmp_path: Path
) -> None:
    made = model(name)
    exact = ExactLlama(made.write(tmp_path / "m.gguf"))
    ids = np.random.default_rng(0).integers(0, 320, (3, 20)).tolist()
    got = exact.logits(ids)
    assert got.shape == (3, 20, 320) and got.dtype == np.float64
    for row, tokens in zip(got, ids, strict=True):
        # f16 keys and values are what the reference rounds most.
        assert rms(row - forward(made, tokens)) < 2e-3 * rms(row)
        # Later tokens change nothing before them, nor do other sequences.
        assert np.allclose(exact.logits([tokens[:7]])[0], row[:7], rtol=0, atol=1e-12)


def test_matrices_are_worked_on_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_llama(format="q4_1").write(tmp_path / "m.gguf")
    whole = ExactLlama(path).logits([[1, 2, 3]])
    monkeypatch.setattr("exact._CHUNK_WEIGHTS", 64 * 7)
    assert np.allclose(ExactLlama(path).logits([[1, 2, 3]]), whole, rtol=0, atol=1e-12)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    made = tiny_llama()
    made.metadata["general.architecture"] = "qwen2"
    with pytest.raises(ValueError, match="expected a llama, got qwen2"):
        ExactLlama(made.write(tmp_path / "m.gguf"))


def test_errors_are_pooled_over_sequences_as_parts_of_the_logits() -> None:
    exact = np.array([[3.0, 4.0], [0.0, 0.0]])
    got = [np.array([3.0, 5.0]), np.array([1.0, -1.0])]
    errors = quality.errors_of(got, exact)
    assert errors == pytest.approx([math.sqrt(0.5), 1.0])
    found = quality.Quality(
        "m", 2.5, errors, {"one batch": [2.0, 0.0], "token by token": [1.0, 1.0]}
    )
    assert found.relative(errors) == pytest.approx(math.sqrt(0.75) / 2.5)
    assert found.by_error == [[1.0, 1.0], [2.0, 0.0]]
    ratio, error = found.beside_best or (0, 0)
    assert ratio == pytest.approx(math.sqrt(0.75))
    # Without either sequence: 1 and sqrt(0.5); half their distance.
    assert error == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert quality.row(found)[2:] == ["34.641%", "56.569%", "40.000%", "0.866 ± 0.146"]
    alone = quality.Quality("m", 2.5, errors, {})
    assert alone.beside_best is None
    assert quality.row(alone) == ["m", 2.5, "34.641%", None, None, None]


def test_models_of_one_format_are_pooled() -> None:
    parts = [quality.Quality("m", n, [n, 2 * n], {"one batch": [3 * n, n]}) for n in (1.0, 7.0)]
    found = quality.pooled(parts)
    assert (found.model, found.logits_rms) == ("m", 5.0)
    assert found.spanker == [1.0, 2.0, 7.0, 14.0]
    assert found.llama_cpp == {"one batch": [3.0, 1.0, 21.0, 7.0]}


def test_a_format_and_a_file_are_measured_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "llama_cpp_version", lambda: None)
    monkeypatch.setattr(quality, "MODELS", 2)
    path = tiny_llama(format="f16").write(tmp_path / "file.gguf")
    saved = tmp_path / "out.json"
    arguments = ["q5_1", str(path), "--sequences", "2", "--json", str(saved)]
    assert quality.main(arguments) == 0
    made, file = json.loads(saved.read_text())["models"]
    assert (made["model"], file["model"]) == ("q5_1", str(path))
    assert (len(made["spanker"]), len(file["spanker"])) == (4, 2)
    assert 0.01 < rms(np.array(made["spanker"])) / made["logits_rms"] < 0.1
    assert rms(np.array(file["spanker"])) / file["logits_rms"] < 0.005
    printed = capsys.readouterr().out
    assert "file.gguf" in printed and "Spanker / best" in printed


def test_what_cannot_be_measured_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main([str(tmp_path / "none.gguf")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        quality.main(["q4_0", "--sequences", "0"])
