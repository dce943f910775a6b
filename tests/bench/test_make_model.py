# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' models: which tensor has which type, and weights that are sane."""

from __future__ import annotations

from pathlib import Path

import attrs
import gguf
import make_model
import numpy as np
import pytest

from spanker.ggml.gguf import GGMLType, GGUFFile, StringArray

SMALL = make_model.Shape(
    hidden=256,
    layers=9,
    heads=8,
    kv_heads=2,
    head_dim=32,
    ffn=512,
    vocabulary=400,
    context=4096,
    rope_base=10000.0,
    tied=False,
)


def write(path: Path, mix: str = "q4_k_m", shape: make_model.Shape = SMALL, **options) -> Path:
    return make_model.write_model(path / "m.gguf", "small", shape, make_model.MIXES[mix], **options)


def types(path: Path) -> dict[str, str]:
    with GGUFFile(path) as file:
        return {name: info.type.name for name, info in file.tensors.items()}


def test_q4_k_m_gives_more_bits_where_llama_cpp_does(tmp_path: Path):
    found = types(write(tmp_path))
    # By hand from use_more_bits with 9 layers: 9/8 = 1 at the start, from 63/8 = 7 on at the
    # end, between them those with (i - 1) % 3 == 2.
    more = {0, 3, 6, 7, 8}
    for layer in range(9):
        rich = "Q6_K" if layer in more else "Q4_K"
        assert found[f"blk.{layer}.attn_v.weight"] == rich
        assert found[f"blk.{layer}.ffn_down.weight"] == rich
        for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
            assert found[f"blk.{layer}.{part}.weight"] == "Q4_K"
        assert found[f"blk.{layer}.ffn_norm.weight"] == "F32"
    assert found["output.weight"] == "Q6_K"
    assert found["token_embd.weight"] == "Q4_K"
    assert found["output_norm.weight"] == "F32"


def test_tinyllama_has_ten_rich_layers_of_22():
    assert [i for i in range(22) if make_model.more_bits(i, 22)] == [
        *(0, 1),
        *(4, 7, 10, 13, 16),
        *(19, 20, 21),
    ]


@pytest.mark.parametrize(
    ("mix", "base", "output"),
    [("q4_0", "Q4_0", "Q6_K"), ("q5_0", "Q5_0", "Q6_K"), ("q8_0", "Q8_0", "Q8_0")],
)
def test_plain_mixes_have_one_format_and_an_output(
    mix: str, base: str, output: str, tmp_path: Path
):
    found = types(write(tmp_path, mix, layers=1))
    assert {found[n] for n in found if n.startswith("blk.") and "norm" not in n} == {base}
    assert (found["token_embd.weight"], found["output.weight"]) == (base, output)


def test_rows_that_k_quants_cannot_fill_fall_back_as_in_llama_cpp(tmp_path: Path):
    shape = attrs.evolve(SMALL, hidden=288, heads=9, kv_heads=3, tied=True)
    found = types(write(tmp_path, "q4_k_m", shape, layers=1))
    assert found["blk.0.attn_q.weight"] == "Q5_0"  # instead of Q4_K
    assert found["blk.0.attn_v.weight"] == "Q8_0"  # instead of Q6_K
    assert found["blk.0.ffn_down.weight"] == "Q6_K"  # its rows are 512
    assert found["token_embd.weight"] == "Q8_0"  # the output, tied
    assert "output.weight" not in found


def test_the_same_seed_gives_the_same_bytes_and_layers_do_not_depend_on_their_number(
    tmp_path: Path,
):
    whole = write(tmp_path, layers=2).read_bytes()
    assert write(tmp_path, layers=2).read_bytes() == whole
    assert write(tmp_path, layers=2, seed=1).read_bytes() != whole
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]

    def first_matrix(layers: int) -> bytes:
        with GGUFFile(write(tmp_path, "q8_0", layers=layers)) as file:
            return file.tensor_data("blk.0.attn_q.weight").tobytes()

    assert first_matrix(1) == first_matrix(2)


@pytest.mark.parametrize("mix", make_model.MIXES)
def test_weights_have_no_mean_and_the_variance_of_their_gain(mix: str, tmp_path: Path):
    reader = gguf.GGUFReader(write(tmp_path, mix, layers=1))
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        if tensor.name.endswith("norm.weight"):
            assert abs(values.mean() - 1) < 0.05 and 0.05 < values.std() < 0.2
            continue
        gain = 1.0 if tensor.name.startswith(("token_embd", "output")) else 2.0
        expected = gain / values.shape[-1] ** 0.5
        assert abs(values.mean()) < 0.03 * expected, tensor.name
        assert values[3:].std() == pytest.approx(expected, rel=0.03), tensor.name


def test_control_tokens_are_quiet_in_the_output(tmp_path: Path):
    reader = gguf.GGUFReader(write(tmp_path, "q8_0", layers=1))
    output = next(t for t in reader.tensors if t.name == "output.weight")
    values = gguf.quants.dequantize(output.data, output.tensor_type)
    assert values[:3].std() < values[3:].std() / 10


def test_the_vocabulary_is_sentencepiece_s(tmp_path: Path):
    with GGUFFile(write(tmp_path, layers=1)) as file:
        metadata = file.metadata
        tokens = metadata["tokenizer.ggml.tokens"]
        assert isinstance(tokens, StringArray)
        tokens = tokens.tolist()
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokens[3 + 255] == "<0xFF>"
    assert len(tokens) == len(set(tokens)) == SMALL.vocabulary
    kinds, scores = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.scores"]
    assert list(kinds[:4]) == [2, 3, 3, 6] and set(kinds[259:].tolist()) == {1}
    assert (np.diff(scores[259:]) < 0).all()
    ids = [metadata[f"tokenizer.ggml.{n}_token_id"] for n in ("unknown", "bos", "eos")]
    assert ids == [0, 1, 2]


def test_full_vocabularies_have_no_piece_twice():
    for shape in make_model.SHAPES.values():
        tokens = make_model.vocabulary(shape.vocabulary)["tokenizer.ggml.tokens"]
        assert len(tokens) == len(set(tokens)) == shape.vocabulary


def test_a_vocabulary_too_small_for_its_bytes_is_refused():
    with pytest.raises(ValueError, match=r"at least 334 tokens, got 300"):
        make_model.vocabulary(300)


def test_the_command_writes_once_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["smollm2-q4_1", "--layers", "1", "--out", str(tmp_path / "new")]
    make_model.main(arguments)
    (path,) = (tmp_path / "new").iterdir()
    assert capsys.readouterr().out.strip() == str(path)
    with GGUFFile(path) as file:
        assert file.metadata["llama.block_count"] == 1
        assert file.tensors["token_embd.weight"].type == GGMLType.Q8_0  # 576 is no 256s
        assert file.tensors["blk.0.attn_q.weight"].shape == (576, 576)
    before = path.stat()
    make_model.main(arguments)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("name", ["tinyllama", "tinyllama-q9", "big-q4_0"])
def test_unknown_names_are_refused_with_the_known_ones(
    name: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        make_model.main([name])
    assert "tinyllama" in capsys.readouterr().err
