# SPDX-License-Identifier: Apache-2.0
"""Tiny models for tests: GGUF files of a few hundred kilobytes with seeded random weights.

`write_tiny_llama` writes a whole model that loads and generates; `tiny_llama` gives its metadata
and tensors as values, to be altered and then written with `write_gguf`, for tests of broken files.
The words such a model says mean nothing, but depend on every weight, token and position.

Layout after the GGUF specification (docs/gguf.md in ggml); blocks are written by `quantize`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Literal

import attrs
import numpy as np
import numpy.typing as npt

from spanker.ggml.gguf import DEFAULT_ALIGNMENT, GGMLType
from spanker.ggml.tokenizer import TokenType
from spanker.testing.quantize import encode

F32 = npt.NDArray[np.float32]
Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]
Kind = Literal["gpt2", "spm"]

BOS = "<|endoftext|>"
_CONTROLS = (BOS, "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# With fewer tokens there would be no room for all bytes and the control tokens.
VOCABULARY_MIN = 256 + len(_CONTROLS)

_SPM_CONTROLS = ("<unk>", "<s>", "</s>")
SPM_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Bytes could not stand for the U+2581 that stands for a space.
SPM_VOCABULARY_MIN = len(_SPM_CONTROLS) + 256 + 1


# --- any GGUF ------------------------------------------------------------------------


@attrs.frozen
class GGUFTensor:
    """A tensor as it stands in a file: `shape` rows first, `data` in the layout of `type`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    data: bytes = attrs.field(repr=False)


def tensor(name: str, values: F32, format: str = "f32") -> GGUFTensor:
    """Float values (rows, k) or (n,) as a tensor of a format of `quantize.encode`, by its name.

    The quantised formats work in blocks of 32 (K-quants 256) along the last dimension; ValueError
    where they do not fit.
    """
    kind = GGMLType[format.upper()]
    return GGUFTensor(name, values.shape, kind, encode(values, kind))


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Value],
    tensors: Iterable[GGUFTensor],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
) -> Path:
    """Write a GGUF (version 3) of just these keys and tensors; nothing is checked.

    Python values become bool, uint32 or int64, float32, string, and arrays of these; arrays of
    integers are int32, empty ones are of strings.  An alignment other than 32 needs the key
    `general.alignment` too.
    """
    tensors = tuple(tensors)
    records = [(t.name, t.shape, t.type, len(t.data)) for t in tensors]
    with open(path, "wb") as file:
        file.write(gguf_head(metadata, records, alignment=alignment))
        for t in tensors:
            file.write(t.data.ljust(padded(len(t.data), alignment), b"\0"))
    return Path(path)


def gguf_head(
    metadata: Mapping[str, Value],
    tensors: Sequence[tuple[str, tuple[int, ...], GGMLType, int]],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
) -> bytes:
    """What stands in front of the data: keys and (name, shape, type, bytes) of the tensors.

    Their data follows in this order, each filled up with zeros to the alignment.
    """
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_string(key), _value(value)]
    offset = 0
    for name, shape, kind, nbytes in tensors:
        head.append(_string(name) + struct.pack("<I", len(shape)))
        head.append(struct.pack(f"<{len(shape)}QIQ", *shape[::-1], kind, offset))
        offset += padded(nbytes, alignment)
    start = b"".join(head)
    return start.ljust(padded(len(start), alignment), b"\0")


def padded(nbytes: int, alignment: int = DEFAULT_ALIGNMENT) -> int:
    """A size rounded up to the alignment."""
    return -(-nbytes // alignment) * alignment


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """A value behind the number of its type."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        small = 0 <= value < 1 << 32
        return struct.pack("<II", 4, value) if small else struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    items = list(value)
    if not items or isinstance(items[0], str):
        kind, body = 8, b"".join(_string(str(item)) for item in items)
    elif isinstance(items[0], bool):
        kind, body = 7, bytes(map(bool, items))
    elif isinstance(items[0], float):
        kind, body = 6, np.asarray(items, "<f4").tobytes()
    else:
        kind, body = 5, np.asarray(items, "<i4").tobytes()
    return struct.pack("<IIQ", 9, kind, len(items)) + body


# --- a tiny llama --------------------------------------------------------------------


@attrs.frozen
class TinyModel:
    """A model as values; both containers are copies that a test may change as it likes."""

    metadata: dict[str, Value]
    tensors: dict[str, GGUFTensor]

    def write(self, path: str | os.PathLike[str]) -> Path:
        return write_gguf(path, self.metadata, self.tensors.values())


def write_tiny_llama(
    path: str | os.PathLike[str],
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 128,
    vocabulary: int = 320,
    format: str = "q4_0",
    seed: int = 0,
    context: int = 256,
    tied: bool = True,
    tokenizer: Kind = "gpt2",
) -> Path:
    """Write the model of `tiny_llama` to `path`, and return the path."""
    return tiny_llama(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocabulary=vocabulary,
        format=format,
        seed=seed,
        context=context,
        tied=tied,
        tokenizer=tokenizer,
    ).write(path)


def tiny_llama(
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 128,
    vocabulary: int = 320,
    format: str = "q4_0",
    seed: int = 0,
    context: int = 256,
    tied: bool = True,
    tokenizer: Kind = "gpt2",
) -> TinyModel:
    """A llama with random weights, and a tokenizer for any text.

    All matrices are in `format`: f32, f16, bf16; q8_0, q4_0, q4_1, q5_0, q5_1, which need
    `hidden`, `ffn` and heads x head_dim to be multiples of 32; q4_k, q5_k, q6_k, which need
    multiples of 256.  The vocabulary is `tiny_vocabulary`, or with the tokenizer "spm"
    `tiny_spm_vocabulary`.  The same arguments give the same bytes.  Activations stay far inside
    what f16 holds.
    """
    words_of, controls = {
        "gpt2": (tiny_vocabulary, range(256, VOCABULARY_MIN)),
        "spm": (tiny_spm_vocabulary, range(len(_SPM_CONTROLS))),
    }[tokenizer]
    rng = np.random.default_rng(seed)
    dim = hidden // heads if head_dim is None else head_dim
    tensors: dict[str, GGUFTensor] = {}

    def matrix(name: str, rows: int, k: int, gain: float = 1.0) -> F32:
        values: F32 = rng.standard_normal((rows, k)).astype(np.float32)
        values *= gain / k**0.5
        return values

    def put(name: str, values: F32, kind: str = format) -> None:
        tensors[name] = tensor(name, values, kind)

    def norm(name: str) -> None:
        put(name, (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32), "f32")

    def words(name: str) -> None:
        values = matrix(name, vocabulary, hidden)
        # Control tokens are unlikely, so that a generation does not soon end by itself.
        values[list(controls)] /= 16
        put(name, values)

    words("token_embd.weight")
    for i in range(layers):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        for part, rows, k, gain in (
            ("attn_q", heads * dim, hidden, 2.0),
            ("attn_k", kv_heads * dim, hidden, 2.0),
            ("attn_v", kv_heads * dim, hidden, 2.0),
            ("attn_output", hidden, heads * dim, 2.0),
            ("ffn_gate", ffn, hidden, 2.0),
            ("ffn_up", ffn, hidden, 2.0),
            ("ffn_down", hidden, ffn, 2.0),
        ):
            name = f"blk.{i}.{part}.weight"
            put(name, matrix(name, rows, k, gain))
    norm("output_norm.weight")
    if not tied:
        words("output.weight")
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "general.name": "tiny llama",
        "llama.block_count": layers,
        "llama.context_length": context,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": dim,
        "llama.attention.value_length": dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": dim,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": vocabulary,
        **words_of(vocabulary),
    }
    return TinyModel(metadata, tensors)


def tiny_vocabulary(size: int = 320) -> dict[str, Value]:
    """The `tokenizer.*` keys of a gpt2-BPE vocabulary with `size` tokens and a chat template.

    Ids 0 to 255 are the bytes, then `<|endoftext|>` (BOS and end), `<|im_start|>`, `<|im_end|>`
    (end of a turn), then merges of two letters, as many as there is room for.
    """
    if size < VOCABULARY_MIN:
        raise ValueError(f"a tiny vocabulary has at least {VOCABULARY_MIN} tokens, got {size}")
    common = "ĠetaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ.,!?0123456789"
    pairs = product(enumerate(common), enumerate(common[1:]))
    # The commonest pairs first.
    ranked = sorted(pairs, key=lambda pair: pair[0][0] + pair[1][0])
    merges = [(a, b) for (_, a), (_, b) in ranked[: size - VOCABULARY_MIN]]
    spare = size - VOCABULARY_MIN - len(merges)
    tokens = [*_byte_characters(), *_CONTROLS]
    tokens += [a + b for a, b in merges] + [f"<|spare{i}|>" for i in range(spare)]
    types = [TokenType.NORMAL] * 256 + [TokenType.CONTROL] * len(_CONTROLS)
    types += [TokenType.NORMAL] * len(merges) + [TokenType.UNUSED] * spare
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(t) for t in types],
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in merges],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def tiny_spm_vocabulary(size: int = 320) -> dict[str, Value]:
    """The `tokenizer.*` keys of a SentencePiece vocabulary with `size` tokens and a chat template.

    Ids 0 to 2 are `<unk>`, `<s>` (BOS) and `</s>` (end), then come the 256 bytes, then U+2581 for
    a space and the commonest letters, pairs of these, and other characters, as many as there is
    room for.
    """
    if size < SPM_VOCABULARY_MIN:
        raise ValueError(
            f"a tiny SentencePiece vocabulary has at least {SPM_VOCABULARY_MIN} tokens, got {size}"
        )
    common = "\u2581etaoinshrdlucmfwypvbgkjqxz"
    pairs = product(enumerate(common), enumerate(common[1:]))
    ranked = sorted(pairs, key=lambda pair: pair[0][0] + pair[1][0])
    words = [*common, *(a + b for (_, a), (_, b) in ranked)]
    words += "ETAOINSHRDLUCMFWYPVBGKJQXZ.,!?0123456789"
    first = SPM_VOCABULARY_MIN - 1
    words = words[: size - first]
    spare = size - first - len(words)
    tokens = [*_SPM_CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokens += [f"<|spare{i}|>" for i in range(spare)]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256
    types += [TokenType.NORMAL] * len(words) + [TokenType.UNUSED] * spare
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(t) for t in types],
        # The commonest pairs merge first; scores of single characters mean nothing.
        "tokenizer.ggml.scores": [0.0] * first + [-float(i) for i in range(len(words) + spare)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": SPM_CHAT_TEMPLATE,
    }


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
