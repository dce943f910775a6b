# SPDX-License-Identifier: Apache-2.0
"""Reading a llama GGUF: what is understood, what is refused by name, and what each card is sent."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from reference_model import with_formats

from spanker.errors import ModelFormatError, SpankerError, UnsupportedModelError
from spanker.ggml.architectures import llama
from spanker.ggml.architectures.llama import (
    LlamaModel,
    Piece,
    Upload,
    build_program,
    read_model,
    uploads,
)
from spanker.ggml.gguf import GGMLType, GGUFFile
from spanker.kernels.formats import Format, pack, row_bytes
from spanker.kernels.program import Op, Ref
from spanker.sched.layout import card_buffers, layer_rows
from spanker.sched.plan import Limits, Plan, tensor_pipeline
from spanker.testing.models import GGUFTensor, TinyModel, Value, tensor, tiny_llama

LIMITS = Limits(
    prompt_chunk=8,
    context=64,
    tokens_max=8,
    outputs_max=4,
    candidates=10,
    kv_pages=3,
    page_positions=32,
)


def read(model: TinyModel, path: Path) -> LlamaModel:
    with GGUFFile(model.write(path / "model.gguf")) as gguf:
        return read_model(gguf)


def refusal(model: TinyModel, path: Path, kind: type[SpankerError]) -> str:
    with pytest.raises(kind) as caught:
        read(model, path)
    text = str(caught.value)
    assert str(path / "model.gguf") in text and "\n" not in text
    return text


# --- what is understood -----------------------------------------------------------------


def test_the_shape_is_that_of_the_file(tmp_path: Path) -> None:
    made = tiny_llama(
        layers=3, hidden=96, heads=6, kv_heads=2, head_dim=16, ffn=160, vocabulary=300, context=128
    )
    model = read(made, tmp_path)
    s = model.shape
    assert (s.hidden, s.heads, s.kv_heads, s.head_dim, s.rope_dim) == (96, 6, 2, 16, 16)
    assert (s.ffn, s.vocabulary, s.context, len(s.layers), s.group) == (160, 300, 128, 3, 3)
    assert (model.rms_eps, model.rope_base) == (pytest.approx(1e-5), 10000.0)
    q = s.layers[2].attn_q
    assert (q.name, q.rows, q.k, q.row_bytes) == ("blk.2.attn_q.weight", 96, 96, 54)
    assert (q.quantized, q.columns_unit, q.unit_bytes) == (True, 32, 18)


def test_without_an_output_matrix_the_embedding_serves_as_one(tmp_path: Path) -> None:
    model = read(tiny_llama(), tmp_path)
    assert model.tied and model.shape.output is model.shape.embedding
    model = read(tiny_llama(tied=False), tmp_path)
    assert not model.tied and model.shape.output.name == "output.weight"


# Of 256 weights.
ROW_BYTES = {
    "f32": 1024,
    "f16": 512,
    "bf16": 512,
    "q4_0": 144,
    "q4_1": 160,
    "q5_0": 176,
    "q5_1": 192,
    "q8_0": 272,
    "q4_k": 144,
    "q5_k": 176,
    "q6_k": 210,
}


@pytest.mark.parametrize("fmt", ROW_BYTES)
def test_every_format_is_read(tmp_path: Path, fmt: str) -> None:
    model = read(tiny_llama(layers=1, hidden=256, ffn=512, format=fmt), tmp_path)
    assert {w.format for w in model.weights.values()} == {Format[fmt.upper()]}
    layer = model.shape.layers[0]
    assert layer.attn_q.row_bytes == model.shape.output.row_bytes == ROW_BYTES[fmt]
    assert layer.ffn_down.row_bytes == 2 * ROW_BYTES[fmt]
    unit = 1 if fmt in ("f32", "f16", "bf16") else 256 if fmt.endswith("k") else 32
    assert (layer.attn_q.columns_unit, layer.attn_q.unit_bytes) == (
        unit,
        ROW_BYTES[fmt] * unit // 256,
    )
    assert layer.attn_q.quantized == (unit > 1)


def test_the_formats_that_are_tested_are_all_there_are() -> None:
    assert set(ROW_BYTES) == {f.name.lower() for f in Format}


def test_formats_may_differ_within_a_file(tmp_path: Path) -> None:
    made = mixed(
        {"*": "q4_k", "token_embd": "bf16", "blk.1.attn_v": "q6_k", "output": "q5_1"},
        hidden=256,
        ffn=256,
        tied=False,
    )
    model = read(made, tmp_path)
    formats = {name: weight.format for name, weight in model.weights.items()}
    assert formats.pop("token_embd.weight") is Format.BF16
    assert formats.pop("output.weight") is Format.Q5_1
    assert formats.pop("blk.1.attn_v.weight") is Format.Q6_K
    assert set(formats.values()) == {Format.Q4_K}


def mixed(formats: dict[str, str], **shape: Any) -> TinyModel:
    """A tiny model with formats by the part of a tensor's name, as reference_model says."""
    return with_formats(tiny_llama(format="f32", **shape), formats)


def test_absent_keys_have_their_defaults(tmp_path: Path) -> None:
    made = tiny_llama()
    for key in (
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    ):
        del made.metadata[f"llama.{key}"]
    model = read(made, tmp_path)
    assert (model.shape.head_dim, model.shape.rope_dim, model.rope_base) == (16, 16, 10000.0)
    made = tiny_llama(heads=4, kv_heads=4)
    del made.metadata["llama.attention.head_count_kv"]
    assert read(made, tmp_path).shape.kv_heads == 4


def test_a_part_of_the_head_may_be_rotated_and_the_base_given(tmp_path: Path) -> None:
    made = tiny_llama()
    made.metadata.update({"llama.rope.dimension_count": 8, "llama.rope.freq_base": 500000.0})
    model = read(made, tmp_path)
    assert (model.shape.rope_dim, model.rope_base) == (8, 500000.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.causal", True),
        ("llama.attention.layer_norm_epsilon", 0.125),
        ("llama.rope.scaling.type", "none"),
        ("llama.rope.scaling.factor", 1.0),
        ("llama.rope.scale_linear", 0.0),
        ("llama.expert_count", 0),
        ("llama.expert_used_count", 0),
        ("llama.logit_scale", 1.0),
        ("llama.attention.sliding_window", 0),
        ("llama.attention.clamp_kqv", 0.0),
        ("llama.use_parallel_residual", True),
        ("llama.tensor_data_layout", "Meta AI original pth"),
        ("general.type", "model"),
        ("general.quantization_version", 2),
        ("general.tags", ["a", "b"]),
        ("quantize.imatrix.file", "x"),
        ("split.count", 1),
    ],
)
def test_keys_with_a_neutral_value_are_accepted(tmp_path: Path, key: str, value: Value) -> None:
    made = tiny_llama()
    made.metadata[key] = value
    plain = read(tiny_llama(), tmp_path)
    changed = read(made, tmp_path)
    assert (changed.shape, changed.rms_eps, changed.rope_base) == (
        plain.shape,
        plain.rms_eps,
        plain.rope_base,
    )


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", "qwen2", "architecture 'qwen2' is not supported"),
        ("general.architecture", 7, "architecture 7 is not supported"),
        ("general.architecture", ["llama", "llama"], "architecture"),
        ("general.type", "adapter", "holds a 'adapter', not a model"),
        ("general.type", ["model", "model"], "not a model"),
        ("split.count", 2, "split over several files"),
        ("split.count", [1, 1], "split over several files"),
        ("llama.attention.causal", False, "llama.attention.causal = False"),
        ("llama.rope.scaling.type", "yarn", "llama.rope.scaling.type = 'yarn'"),
        ("llama.rope.scaling.factor", 4.0, "llama.rope.scaling.factor = 4.0"),
        ("llama.rope.scaling.factor", [1.0, 4.0], "llama.rope.scaling.factor"),
        ("llama.rope.scaling.original_context_length", 4096, "original_context_length"),
        ("llama.rope.scale_linear", 2.0, "llama.rope.scale_linear"),
        ("llama.expert_count", 8, "llama.expert_count = 8 would change the result"),
        ("llama.expert_used_count", 2, "llama.expert_used_count"),
        ("llama.logit_scale", 0.5, "llama.logit_scale"),
        ("llama.embedding_scale", 12.0, "llama.embedding_scale"),
        ("llama.residual_scale", 0.25, "llama.residual_scale"),
        ("llama.attention.sliding_window", 4096, "llama.attention.sliding_window"),
        ("llama.attention.something_new", 1, "llama.attention.something_new = 1"),
        ("llama.tensor_data_layout", "other", "llama.tensor_data_layout"),
        ("qwen2.block_count", 2, "key qwen2.block_count = 2 is not understood"),
        ("llama.attention.head_count", [4, 4], "one integer, got array([4, 4]"),
        ("llama.attention.head_count_kv", [2, 1], "llama.attention.head_count_kv must be one"),
        ("llama.feed_forward_length", [128, 64], "llama.feed_forward_length must be one integer"),
        ("llama.block_count", "two", "llama.block_count must be one integer, got 'two'"),
        ("llama.block_count", True, "llama.block_count must be one integer, got True"),
        ("llama.attention.value_length", 8, "different head sizes"),
        ("llama.attention.layer_norm_rms_epsilon", "x", "must be a number, got 'x'"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(
    tmp_path: Path, key: str, value: Value, words: str
) -> None:
    made = tiny_llama()
    made.metadata[key] = value
    assert words in refusal(made, tmp_path, UnsupportedModelError)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.block_count", 0, "llama.block_count must be 1 to 4096, got 0"),
        ("llama.block_count", 4097, "must be 1 to 4096"),
        ("llama.block_count", 3, "tensor 'blk.2.attn_norm.weight' is missing"),
        ("llama.embedding_length", 32, "'token_embd.weight' must have shape (320, 32)"),
        ("llama.embedding_length", 1 << 40, "must be 1 to"),
        ("llama.feed_forward_length", 64, "'blk.0.ffn_gate.weight' must have shape (64, 64)"),
        ("llama.attention.head_count", 3, "3 heads, 2 KV heads"),
        ("llama.attention.head_count_kv", 3, "4 heads, 3 KV heads"),
        ("llama.attention.head_count_kv", 8, "4 heads, 8 KV heads"),
        ("llama.rope.dimension_count", 18, "rotated size 18"),
        ("llama.rope.dimension_count", 7, "rotated size 7"),
        ("llama.vocab_size", 300, "llama.vocab_size is 300, but the embedding has 320 rows"),
        ("llama.vocab_size", [320, 320], "llama.vocab_size"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, "must be positive, got 0.0"),
        ("llama.rope.freq_base", float("nan"), "must be positive, got nan"),
        ("llama.rope.freq_base", float("inf"), "must be positive, got inf"),
        ("llama.context_length", 0, "llama.context_length must be 1"),
        ("llama.context_length", -5, "llama.context_length must be 1"),
    ],
)
def test_contradictions_are_refused_with_what_was_found(
    tmp_path: Path, key: str, value: Value, words: str
) -> None:
    made = tiny_llama()
    made.metadata[key] = value
    assert words in refusal(made, tmp_path, ModelFormatError)


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    made = tiny_llama()
    del made.metadata[f"llama.{key}"]
    text = refusal(made, tmp_path, UnsupportedModelError)
    assert f"llama.{key}" in text and "got nothing" in text


def test_a_file_without_an_architecture_is_refused(tmp_path: Path) -> None:
    made = tiny_llama()
    del made.metadata["general.architecture"]
    assert "architecture nothing" in refusal(made, tmp_path, UnsupportedModelError)


@pytest.mark.parametrize("name", sorted(tiny_llama().tensors))
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    made = tiny_llama()
    del made.tensors[name]
    assert f"tensor {name!r} is missing" in refusal(made, tmp_path, ModelFormatError)


@pytest.mark.parametrize("name", sorted(tiny_llama(layers=1).tensors))
def test_a_tensor_of_another_shape_is_refused(tmp_path: Path, name: str) -> None:
    made = tiny_llama(layers=1)
    shape = made.tensors[name].shape
    values = np.zeros((shape[0] + 32, *shape[1:]), np.float32)
    made.tensors[name] = tensor(name, values, "f32")
    text = refusal(made, tmp_path, ModelFormatError)
    # The embedding tells the vocabulary: there the key of its size disagrees.
    assert name in text or "llama.vocab_size" in text
    assert "shape" in text or "352 rows" in text


def test_an_embedding_that_is_no_matrix_is_refused(tmp_path: Path) -> None:
    made = tiny_llama()
    made.tensors["token_embd.weight"] = tensor("token_embd.weight", np.zeros(320, np.float32))
    assert "must have shape (320, 64)" in refusal(made, tmp_path, ModelFormatError)


@pytest.mark.parametrize(
    "name",
    [
        "rope_freqs.weight",
        "rope_factors_long.weight",
        "blk.0.ffn_gate_exps.weight",
        "blk.0.attn_q.bias",
        "blk.0.attn_q_norm.weight",
        "blk.2.attn_q.weight",
        "output.bias",
    ],
)
def test_a_tensor_that_nothing_reads_is_refused_by_name(tmp_path: Path, name: str) -> None:
    made = tiny_llama()
    made.tensors[name] = tensor(name, np.ones(64, np.float32))
    text = refusal(made, tmp_path, UnsupportedModelError)
    assert f"tensor {name!r} is not part of a llama model" in text
    made.tensors["zzz"] = tensor("zzz", np.ones(64, np.float32))
    assert "and 1 more" in refusal(made, tmp_path, UnsupportedModelError)


REFUSED = [kind for kind in GGMLType if kind not in set(map(int, Format))]


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "token_embd.weight", "output.weight"])
def test_formats_that_are_not_multiplied_are_refused_by_name(
    tmp_path: Path, kind: GGMLType, name: str
) -> None:
    made = tiny_llama(hidden=256, ffn=256, tied=False)
    rows = made.tensors[name].shape[0]
    nbytes = rows * 256 // kind.block_weights * kind.block_bytes
    made.tensors[name] = GGUFTensor(name, (rows, 256), kind, bytes(nbytes))
    text = refusal(made, tmp_path, UnsupportedModelError)
    assert f"tensor {name!r} has format {kind.name}; supported formats: " in text
    supported = text.partition("supported formats: ")[2].split(", ")
    assert sorted(supported) == sorted(f.name for f in Format)


def test_what_is_refused_includes_the_formats_that_people_will_try() -> None:
    names = {kind.name for kind in REFUSED}
    assert names >= {"Q2_K", "Q3_K", "IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ2_0"}


@pytest.mark.parametrize("kind", [GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.F64, GGMLType.I32])
@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "output_norm.weight"])
def test_a_norm_of_another_format_is_refused(tmp_path: Path, name: str, kind: GGMLType) -> None:
    made = tiny_llama(hidden=256, ffn=256)
    nbytes = 256 // kind.block_weights * kind.block_bytes
    made.tensors[name] = GGUFTensor(name, (256,), kind, bytes(nbytes))
    text = refusal(made, tmp_path, UnsupportedModelError)
    assert f"tensor {name!r} must be F32, F16 or BF16, got {kind.name}" in text


# --- what is sent to the cards ------------------------------------------------------------------

# Heads, FFN, vocabulary and columns that no number of cards divides, in several formats.
MODELS: dict[str, Callable[[], TinyModel]] = {
    "q4_0": lambda: tiny_llama(
        hidden=96, heads=6, kv_heads=2, head_dim=16, ffn=160, vocabulary=300
    ),
    "f16": lambda: tiny_llama(
        hidden=80,
        heads=5,
        kv_heads=5,
        head_dim=24,
        ffn=72,
        vocabulary=1000,
        format="f16",
        tied=False,
    ),
    "q8_0": lambda: tiny_llama(heads=3, kv_heads=1, head_dim=32, format="q8_0", tied=False),
    "q5": lambda: mixed(
        {"*": "q5_0", "ffn_down": "q5_1", "attn_v": "bf16"},
        hidden=96,
        heads=6,
        kv_heads=2,
        ffn=160,
        vocabulary=700,
    ),
    # Columns in units of 256: two cards embed, however many there are.
    "k-quants": lambda: mixed(
        {"*": "q4_k", "blk.1.attn_v": "q6_k", "blk.1.ffn_down": "q6_k", "output": "q5_k"},
        hidden=512,
        heads=4,
        kv_heads=2,
        head_dim=128,
        ffn=256,
        vocabulary=600,
        tied=False,
    ),
    "q6_k": lambda: tiny_llama(
        layers=2, hidden=512, heads=3, kv_heads=3, head_dim=256, ffn=768, format="q6_k"
    ),
}
PLANS = [(1, 1), (2, 1), (3, 1), (5, 1), (8, 1), (1, 2), (2, 2), (5, 2)]


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: MODELS[name]().write(directory / f"{name}.gguf"))


def filled(upload: Upload) -> bytes:
    """A buffer's content from its pieces, each of which fills just what it says."""
    out = np.full(upload.nbytes + 2, 0xA5, np.uint8)
    at = 0
    for piece in upload.pieces:
        assert piece.offset == at and piece.nbytes > 0
        guarded = np.full(piece.nbytes + 2, 0x5A, np.uint8)
        piece.fill(guarded[1:-1])
        assert guarded[0] == guarded[-1] == 0x5A
        at += piece.nbytes
        out[1 + piece.offset : 1 + at] = guarded[1:-1]
    assert at == upload.nbytes and out[0] == out[-1] == 0xA5
    return out[1:-1].tobytes()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("cards", "stages"), PLANS)
@pytest.mark.parametrize("upload_bytes", [3000, 2 << 20])
def test_every_byte_of_every_weight_buffer_is_written_once(
    path_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    cards: int,
    stages: int,
    upload_bytes: int,
) -> None:
    monkeypatch.setattr(llama, "UPLOAD_BYTES", upload_bytes)
    with GGUFFile(path_of(name)) as gguf:
        model = read_model(gguf)
        plan = tensor_pipeline(model.shape, cards, stages)
        for card in plan.cards:
            sizes = {b.name: b.nbytes for b in card_buffers(model.shape, plan, card, LIMITS)}
            written: set[str] = set()
            for upload in uploads(model, gguf, plan, card, LIMITS):
                assert upload.buffer not in written
                written.add(upload.buffer)
                assert upload.nbytes == sizes[upload.buffer]
                at = 0
                for piece in upload.pieces:
                    assert piece.offset == at and piece.nbytes > 0
                    at += piece.nbytes
                assert at == upload.nbytes
            weights = {b for b in sizes if b.endswith((".weight", ".columns", ".rows"))}
            assert written == weights | {"rope"}


@pytest.mark.parametrize("upload_bytes", [64, 3000, 100_000])
def test_pieces_are_of_the_size_asked_for_as_far_as_tiles_allow(
    path_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, upload_bytes: int
) -> None:
    monkeypatch.setattr(llama, "UPLOAD_BYTES", upload_bytes)
    for name in MODELS:
        with GGUFFile(path_of(name)) as gguf:
            model = read_model(gguf)
            plan = tensor_pipeline(model.shape, 2, 1)
            row_bytes = {n: w.shape.row_bytes for n, w in model.weights.items()}
            row_bytes["output.rows"] = model.shape.output.row_bytes
            for upload in uploads(model, gguf, plan, 1, LIMITS):
                # A packed piece is at least one tile, one of columns at least one row.
                least = 16 * row_bytes.get(upload.buffer, 0)
                if upload.buffer.endswith(".columns"):
                    least = upload.nbytes // model.shape.vocabulary
                most = max(upload_bytes, least)
                sizes = [piece.nbytes for piece in upload.pieces]
                assert max(sizes) <= most
                assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]


def content(gguf: GGUFFile, model: LlamaModel, plan: Plan) -> dict[str, list[bytes]]:
    """What the cards of a plan get, by buffer, in order of the cards."""
    out: dict[str, list[bytes]] = {}
    for card in plan.cards:
        for upload in uploads(model, gguf, plan, card, LIMITS):
            out.setdefault(upload.buffer, []).append(filled(upload))
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("cards", "stages"), PLANS)
@pytest.mark.parametrize("upload_bytes", [3000, 2 << 20])
def test_the_cards_get_the_right_rows(
    path_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    cards: int,
    stages: int,
    upload_bytes: int,
) -> None:
    monkeypatch.setattr(llama, "UPLOAD_BYTES", upload_bytes)
    with GGUFFile(path_of(name)) as gguf:
        model = read_model(gguf)
        shape, plan = model.shape, tensor_pipeline(model.shape, cards, stages)
        got = content(gguf, model, plan)

        def packed(name: str, first: int, rows: int) -> bytes:
            weight = model.weights[name]
            data = gguf.tensor_data(name)[first : first + rows]
            return pack(weight.format, data, weight.shape.k).tobytes()

        for stage in plan.stages:
            for index in range(stage.layers.start, stage.layers.stop):
                held: dict[str, list[bytes]] = {}
                for share in stage.shares:
                    for matrix, first, rows in layer_rows(shape.layers[index], shape, share):
                        held.setdefault(matrix.name, []).append(packed(matrix.name, first, rows))
                for matrix_name, expected in held.items():
                    assert got[matrix_name] == expected
        vocabulary = [s.vocabulary for s in plan.stages[-1].shares if s.vocabulary.size]
        assert got["output.rows"] == [
            packed(shape.output.name, v.start, v.size) for v in vocabulary
        ]
        if model.tied and len(plan.cards) == 1:
            assert "token_embd.weight.columns" not in got
            return
        # The columns of all cards side by side are the embedding as it stands in the file.
        table = gguf.tensor_data("token_embd.weight")
        columns = [
            np.frombuffer(part, np.uint8).reshape(shape.vocabulary, -1)
            for part in got["token_embd.weight.columns"]
        ]
        assert np.array_equal(np.concatenate(columns, axis=1), table)


def test_pieces_can_be_filled_in_any_order_and_from_several_threads(
    path_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one piece lets go of in the file, its neighbours on the same page still get."""
    monkeypatch.setattr(llama, "UPLOAD_BYTES", 500)
    with GGUFFile(path_of("k-quants")) as gguf:
        model = read_model(gguf)
        plan = tensor_pipeline(model.shape, 1, 1)
        made = uploads(model, gguf, plan, 0, LIMITS)
        expected = {upload.buffer: filled(upload) for upload in made}
        jobs = [(upload, piece) for upload in made for piece in upload.pieces]
        out = {upload.buffer: np.empty(upload.nbytes, np.uint8) for upload in made}

        def run(upload: Upload, piece: Piece) -> None:
            piece.fill(out[upload.buffer][piece.offset : piece.offset + piece.nbytes])

        random.Random(3).shuffle(jobs)
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda job: run(*job), jobs))
        assert {buffer: data.tobytes() for buffer, data in out.items()} == expected


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16"])
def test_norms_are_sent_as_floats_whatever_they_are_in(tmp_path: Path, fmt: str) -> None:
    made = tiny_llama(layers=1)
    values = np.linspace(0.5, 1.5, 64, dtype=np.float32)
    for name in ("output_norm.weight", "blk.0.attn_norm.weight"):
        made.tensors[name] = tensor(name, values, fmt)
    with GGUFFile(made.write(tmp_path / "model.gguf")) as gguf:
        model = read_model(gguf)
        got = content(gguf, model, tensor_pipeline(model.shape, 1, 1))
    t = made.tensors["output_norm.weight"]
    expected = quants.dequantize(
        np.frombuffer(t.data, np.uint8), GGMLQuantizationType[fmt.upper()]
    ).astype(np.float32)
    assert np.abs(expected - values).max() <= 2**-8
    assert got["output_norm.weight"] == got["blk.0.attn_norm.weight"] == [expected.tobytes()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("cards", "stages"), PLANS)
def test_a_card_embeds_from_packed_rows_only_where_it_holds_them_all(
    path_of: Callable[[str], Path], name: str, cards: int, stages: int
) -> None:
    with GGUFFile(path_of(name)) as gguf:
        model = read_model(gguf)
    shape, plan = model.shape, tensor_pipeline(model.shape, cards, stages)
    for card in plan.cards:
        _, share = plan.place(card)
        commands = build_program(model, plan, card, LIMITS).commands
        embeds = [c for c in commands if c.op is Op.EMBED]
        assert len(embeds) == (not share.columns.empty)
        for command in embeds:
            (table, _, out) = (ref for _, ref in command.refs)
            alone = model.tied and len(plan.cards) == 1
            packed_k = shape.hidden if alone else 0
            assert command.args == (share.columns.size, shape.vocabulary, packed_k, 0)
            assert command.format is model.weights["token_embd.weight"].format
            if alone:
                assert table == Ref("output.rows")
            else:
                width = row_bytes(command.format, share.columns.size)
                assert table == Ref("token_embd.weight.columns", width)
            assert out == Ref("x", shape.hidden * 4, share.columns.start * 4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("cards", "stages"), PLANS)
def test_programs_name_only_buffers_that_the_card_has(
    path_of: Callable[[str], Path], name: str, cards: int, stages: int
) -> None:
    with GGUFFile(path_of(name)) as gguf:
        model = read_model(gguf)
        plan = tensor_pipeline(model.shape, cards, stages)
        for card in plan.cards:
            buffers = card_buffers(model.shape, plan, card, LIMITS)
            used: set[str] = set()
            program = build_program(model, plan, card, LIMITS)
            for command in program.commands:
                used.update(ref.buffer for _, ref in command.refs)
            assert used <= {b.name for b in buffers}
            # What takes memory is there to be used; norms are small, and on every card of a stage.
            matrices = {m.name for layer in model.shape.layers for m in layer.matrices}
            pools = {f"kv.{i}" for i in range(len(model.shape.layers))}
            weights = {b.name for b in buffers} & (matrices | pools | {"output.rows"})
            assert weights <= used
            assert program.encode({b.name: i for i, b in enumerate(buffers)})


@pytest.mark.parametrize("cards", [1, 3])
def test_a_layer_is_like_one_made_for_itself(tmp_path: Path, cards: int) -> None:
    # bf16 and f16 matrices differ in nothing but their format.
    formats = {"*": "q4_0", "blk.2.ffn_down": "q8_0", "blk.3.attn_v": "f16", "blk.4.attn_v": "bf16"}
    sizes = {"layers": 6, "hidden": 96, "heads": 6, "kv_heads": 2, "ffn": 160}
    model = read(mixed(formats, **sizes), tmp_path)
    plan = tensor_pipeline(model.shape, cards, 1)
    for card in plan.cards:
        commands = build_program(model, plan, card, LIMITS).commands
        for layer in range(6):
            made = llama._Builder(model, plan, card, LIMITS, llama.ALL_UP)._new_layer(layer)
            at = next(i for i, c in enumerate(commands) if c.part == f"blk.{layer}")
            found = commands[at : at + len(made)]
            assert list(found) == made
            assert [c.part for c in found] == [c.part for c in made]
