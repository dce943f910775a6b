# SPDX-License-Identifier: Apache-2.0
"""The writer of tiny models, with the `gguf` package as the oracle."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

import spanker
from spanker.ggml.gguf import GGMLType, GGUFFile
from spanker.ggml.tokenizer import Tokenizer
from spanker.testing import (
    tensor,
    tiny_llama,
    tiny_spm_vocabulary,
    tiny_vocabulary,
    write_gguf,
    write_tiny_llama,
)

FORMATS = ("f32", "f16", "q8_0", "q4_0", "q4_1")
# The largest step of each format, as a part of the largest magnitude in the block.
STEP = {"f32": 0, "f16": 2**-10, "q8_0": 1 / 127, "q4_0": 1 / 8, "q4_1": 2 / 15}


@pytest.mark.parametrize("format", FORMATS)
def test_quantised_values_are_within_a_step_by_the_gguf_package(format: str):
    seed = 31
    print("seed", seed)
    values = np.random.default_rng(seed).standard_normal((7, 96)).astype(np.float32)
    values[2] = 0
    values[3, :32] = -5
    made = tensor("w", values, format)
    kind = gguf.GGMLQuantizationType(int(made.type))
    back = gguf.quants.dequantize(np.frombuffer(made.data, np.uint8).reshape(7, -1), kind)
    blocks = (7, 3, 32)
    largest = np.abs(values).reshape(blocks).max(2, keepdims=True)
    error = np.abs(back.reshape(blocks) - values.reshape(blocks))
    # Half a step by rounding; at the far end of Q4_0's lopsided range a whole one.
    assert (error <= largest * (STEP[format] * 1.01)).all()


def test_a_written_file_reads_as_it_was_written_in_both_readers(tmp_path: Path):
    metadata = {
        "flag": True,
        "small": 7,
        "large": 1 << 40,
        "negative": -3,
        "float": 0.5,
        "text": "weiß",
        "texts": ["a", "", "ß"],
        "numbers": [3, -1],
        "floats": [0.5, -2.0],
        "flags": [True, False],
        "empty": [],
    }
    tensors = [
        tensor("odd", np.arange(33, dtype=np.float32)),
        tensor("matrix", np.arange(128, dtype=np.float32).reshape(2, 64), "q8_0"),
    ]
    path = write_gguf(tmp_path / "any.gguf", metadata, tensors)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    with ours:
        assert list(ours.metadata) == list(metadata)
        for key, value in metadata.items():
            read = ours.metadata[key]
            assert (list(read) if isinstance(value, list) else read) == value, key
            if value != []:
                assert theirs.fields[key].contents() == value, key
        for written, other in zip(tensors, theirs.tensors, strict=True):
            info = ours.tensors[written.name]
            assert (info.shape, info.type) == (written.shape, written.type)
            assert ours.tensor_data(written.name).tobytes() == written.data
            assert other.data.tobytes() == written.data


def test_the_same_arguments_give_the_same_file_and_another_seed_another(tmp_path: Path):
    first, second, other = (tmp_path / f"{i}.gguf" for i in range(3))
    write_tiny_llama(first)
    write_tiny_llama(second)
    write_tiny_llama(other, seed=1)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()


@pytest.mark.parametrize("size", [259, 260, 320, 5000])
def test_the_vocabulary_tokenises_any_text(size: int):
    tokenizer = Tokenizer.from_metadata(tiny_vocabulary(size))
    assert tokenizer.vocab_size == size
    text = "Hello the wörld, 北京 \U0001f600\n\x00 the the"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (len(ids) < len(text.encode())) == (size > 260)
    assert tokenizer.encode("<|im_end|>") == [258]
    assert tokenizer.stop_ids == {256, 258}


@pytest.mark.parametrize("size", [260, 261, 320, 5000])
def test_the_sentencepiece_vocabulary_tokenises_any_text(size: int):
    tokenizer = Tokenizer.from_metadata(tiny_spm_vocabulary(size))
    assert tokenizer.vocab_size == size
    text = "Hello the wörld, 北京 \U0001f600\n\x00 the  the"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.bos_id == 1 and tokenizer.stop_ids == {2}
    assert (len(ids) < len(text.encode())) == (size > 261)


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 259 tokens, got 258"):
        tiny_vocabulary(258)
    with pytest.raises(ValueError, match="at least 260 tokens, got 259"):
        tiny_spm_vocabulary(259)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
async def test_every_format_loads_and_depends_on_every_token(
    format: str, tied: bool, tmp_path: Path
):
    path = write_tiny_llama(tmp_path / "tiny.gguf", format=format, tied=tied)
    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        model = await fleet.load(path)
        generation = model.generate("Hello", max_tokens=40)
        await generation.collect()
        # A model that repeats itself, or soon ends, would hide many a mistake.
        assert len(generation.token_ids) == 40
        assert len(set(generation.token_ids)) > 20
        first, second = await model.logits([1, 2, 3, 4]), await model.logits([9, 2, 3, 4])
        assert 0.5 < first.std() < 2
        assert not (first == second).any()


async def test_a_model_with_a_sentencepiece_tokenizer_loads_and_generates(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "tiny.gguf", tokenizer="spm", seed=4)
    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        model = await fleet.load(path)
        prompt = model.tokenizer.encode("hello there")
        generation = model.generate("hello there", max_tokens=40)
        said = await generation.collect()
        assert len(generation.token_ids) == 40
        assert len(set(generation.token_ids)) > 20
        assert said == model.tokenizer.decode(generation.token_ids, continues=True)
        again = model.generate(prompt, max_tokens=40)
        await again.collect()
        assert again.token_ids == generation.token_ids
        assert model.detokenize(prompt) == "hello there"


def test_the_pieces_can_be_altered(tmp_path: Path):
    made = tiny_llama(layers=1, head_dim=32, heads=3, kv_heads=1, hidden=96)
    assert made.tensors["blk.0.attn_q.weight"].shape == (96, 96)
    assert made.tensors["blk.0.attn_k.weight"].shape == (32, 96)
    made.metadata["llama.expert_count"] = 8
    del made.tensors["output_norm.weight"]
    with GGUFFile(made.write(tmp_path / "broken.gguf")) as file:
        assert file.metadata["llama.expert_count"] == 8
        assert "output_norm.weight" not in file.tensors
        assert file.tensors["token_embd.weight"].type == GGMLType.Q4_0
