# SPDX-License-Identifier: Apache-2.0
"""Write GGUFs of real shapes with random weights, for benchmarks without a download.

    python bench/make_model.py tinyllama-q4_0 tinyllama-q4_k_m --out build/bench

A name is a shape and a mix of formats.  Speed does not depend on what weights say, and these keep
activations where a trained model has them.  The same name, seed and layer count give the same
bytes.  One core writes 1.1 billion weights in about half a minute, holding one chunk in memory.

Mixes after llama.cpp's quantiser (src/llama-quant.cpp, llama_tensor_get_type): which matrix of
which layer gets more bits, and what replaces a K-quant where rows are no multiple of 256.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, product
from pathlib import Path

import attrs
import numpy as np

from spanker.ggml.gguf import GGMLType
from spanker.testing.models import F32, Value, gguf_head, padded
from spanker.testing.quantize import encode

# Floats made at once; their bytes are written before the next ones are made.
CHUNK_WEIGHTS = 1 << 21


# --- shapes and mixes ----------------------------------------------------------------


@attrs.frozen
class Shape:
    """A llama's dimensions; `tied` models have no output matrix of their own."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    context: int
    rope_base: float
    tied: bool


SHAPES: Mapping[str, Shape] = {
    # TinyLlama-1.1B, made for 2,048 positions; here 4,096, because decoding is measured at
    # position 4,000 too.  Random weights do not mind.
    "tinyllama": Shape(2048, 22, 32, 4, 64, 5632, 32000, 4096, 10000.0, False),
    # SmolLM2-135M.
    "smollm2": Shape(576, 30, 9, 3, 64, 1536, 49152, 8192, 100000.0, True),
}


@attrs.frozen
class Mix:
    """Formats by role: `output` for the output matrix (or a tied embedding), `more` for the
    values' projection and the way down in the layers that `more_bits` picks, `base` for the rest.
    """

    base: GGMLType
    output: GGMLType
    more: GGMLType


def _mix(base: GGMLType, output: GGMLType | None = None, more: GGMLType | None = None) -> Mix:
    return Mix(base, output or base, more or base)


MIXES: Mapping[str, Mix] = {
    "q4_0": _mix(GGMLType.Q4_0, GGMLType.Q6_K),
    "q4_1": _mix(GGMLType.Q4_1, GGMLType.Q6_K),
    "q5_0": _mix(GGMLType.Q5_0, GGMLType.Q6_K),
    "q5_1": _mix(GGMLType.Q5_1, GGMLType.Q6_K),
    "q8_0": _mix(GGMLType.Q8_0),
    "q4_k_m": _mix(GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q6_K),
    "q5_k_m": _mix(GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q6_K),
    "q6_k": _mix(GGMLType.Q6_K),
    "f16": _mix(GGMLType.F16),
    "bf16": _mix(GGMLType.BF16),
}

# What stands in for a K-quant in rows that are no multiple of 256.
_FALLBACK: Mapping[GGMLType, GGMLType] = {
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}


def more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def parse_name(name: str) -> tuple[Shape, Mix]:
    """The parts of e.g. `tinyllama-q4_k_m`; ValueError for others."""
    shape, _, mix = name.partition("-")
    if shape not in SHAPES or mix not in MIXES:
        raise ValueError(
            f"no model {name!r}: expected SHAPE-MIX with a shape of {', '.join(SHAPES)} and a mix "
            f"of {', '.join(MIXES)}"
        )
    return SHAPES[shape], MIXES[mix]


# --- tensors -------------------------------------------------------------------------


@attrs.frozen
class Plan:
    """One tensor: values of about standard normal size times `gain` / sqrt(k); a norm has none.

    `quiet` rows at the start are a sixteenth of that: the control tokens should not be chosen.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    gain: float = 0.0
    quiet: int = 0

    @property
    def nbytes(self) -> int:
        weights = int(np.prod(self.shape))
        return weights // self.type.block_weights * self.type.block_bytes


def plan_tensors(shape: Shape, mix: Mix, layers: int) -> list[Plan]:
    """All tensors of a model with the first `layers` layers, in file order."""
    hidden, vocabulary = shape.hidden, shape.vocabulary
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def fitting(kind: GGMLType, k: int) -> GGMLType:
        return kind if k % kind.block_weights == 0 else _FALLBACK[kind]

    def matrix(name: str, rows: int, k: int, kind: GGMLType) -> Plan:
        return Plan(name, (rows, k), fitting(kind, k), gain=2.0)

    def words(name: str, kind: GGMLType) -> Plan:
        return Plan(name, (vocabulary, hidden), fitting(kind, hidden), gain=1.0, quiet=CONTROLS)

    def norm(name: str) -> Plan:
        return Plan(name, (hidden,), GGMLType.F32)

    plans = [words("token_embd.weight", mix.output if shape.tied else mix.base)]
    for i in range(layers):
        more = mix.more if more_bits(i, layers) else mix.base
        plans += [
            norm(f"blk.{i}.attn_norm.weight"),
            matrix(f"blk.{i}.attn_q.weight", q, hidden, mix.base),
            matrix(f"blk.{i}.attn_k.weight", kv, hidden, mix.base),
            matrix(f"blk.{i}.attn_v.weight", kv, hidden, more),
            matrix(f"blk.{i}.attn_output.weight", hidden, q, mix.base),
            norm(f"blk.{i}.ffn_norm.weight"),
            matrix(f"blk.{i}.ffn_gate.weight", shape.ffn, hidden, mix.base),
            matrix(f"blk.{i}.ffn_up.weight", shape.ffn, hidden, mix.base),
            matrix(f"blk.{i}.ffn_down.weight", hidden, shape.ffn, more),
        ]
    plans.append(norm("output_norm.weight"))
    if not shape.tied:
        plans.append(words("output.weight", mix.output))
    return plans


def tensor_bytes(plan: Plan, rng: np.random.Generator) -> Iterator[bytes]:
    """The tensor's data in pieces."""
    if not plan.gain:
        values: F32 = 1 + np.float32(0.1) * rng.standard_normal(plan.shape, np.float32)
        yield encode(values, plan.type)
        return
    rows, k = plan.shape
    step = max(1, CHUNK_WEIGHTS // k)
    scale = np.float32(plan.gain / k**0.5)
    for begin in range(0, rows, step):
        values = rng.standard_normal((min(step, rows - begin), k), np.float32)
        values *= scale
        values[: max(0, plan.quiet - begin)] /= 16
        yield encode(values, plan.type)


# --- vocabulary ----------------------------------------------------------------------

CONTROLS = 3
_LETTERS = "▁etaoinshrdlucmfwypvbgkjqxz"
_OTHERS = "ETAOINSHRDLUCMFWYPVBGKJQXZ.,!?0123456789'\"-:;()/"


def vocabulary(size: int) -> dict[str, Value]:
    """The `tokenizer.*` keys of a SentencePiece vocabulary with `size` tokens.

    <unk>, <s>, </s>, the 256 bytes, then letters, and pieces of two, three and four letters, the
    commonest first, each with a lower score than the one before.
    """
    first_piece = CONTROLS + 256
    smallest = first_piece + len(_LETTERS + _OTHERS)
    if size < smallest:
        raise ValueError(f"the vocabulary has at least {smallest} tokens, got {size}")
    pieces = list(islice(_pieces(), size - first_piece))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    # llama.h: 1 normal, 2 unknown, 3 control, 6 byte.
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [*[0.0] * first_piece, *(-float(i) for i in range(len(pieces)))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def _pieces() -> Iterator[str]:
    yield from _LETTERS + _OTHERS
    inner = _LETTERS[1:]
    for length in (2, 3, 4):
        ranked = product(range(len(_LETTERS)), *[range(len(inner))] * (length - 1))
        for first, *rest in sorted(ranked, key=sum):
            yield _LETTERS[first] + "".join(inner[i] for i in rest)


# --- the file ------------------------------------------------------------------------


def write_model(
    path: str | os.PathLike[str],
    name: str,
    shape: Shape,
    mix: Mix,
    *,
    seed: int = 0,
    layers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the model to `path`, which appears whole or not at all; returns the path.

    `layers` shortens it; `progress(done, total)` counts bytes.
    """
    count = shape.layers if layers is None else layers
    plans = plan_tensors(shape, mix, count)
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "general.name": f"{name} (random weights, seed {seed})",
        "general.quantization_version": 2,
        "llama.block_count": count,
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.hidden,
        "llama.feed_forward_length": shape.ffn,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.key_length": shape.head_dim,
        "llama.attention.value_length": shape.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": shape.rope_base,
        "llama.vocab_size": shape.vocabulary,
        **vocabulary(shape.vocabulary),
    }
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    total, done = sum(plan.nbytes for plan in plans), 0
    try:
        with open(partial, "wb") as file:
            file.write(gguf_head(metadata, [(p.name, p.shape, p.type, p.nbytes) for p in plans]))
            for number, plan in enumerate(plans):
                # A generator per tensor: its values do not depend on those before it.
                for piece in tensor_bytes(plan, np.random.default_rng([seed, number])):
                    file.write(piece)
                    done += len(piece)
                    progress(done, total)
                file.write(bytes(padded(plan.nbytes) - plan.nbytes))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def ensure_model(
    name: str, directory: str | os.PathLike[str], *, seed: int = 0, layers: int | None = None
) -> Path:
    """The file of a named model in a directory, written there unless it exists."""
    shape, mix = parse_name(name)
    suffix = "" if layers is None else f"-{layers}-layers"
    suffix += f"-seed-{seed}" if seed else ""
    path = Path(directory) / f"{name}{suffix}.gguf"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if terminal:
            print(f"\r{path.name}: {done / total:4.0%}", end="", file=sys.stderr)

    if not terminal:
        print(f"writing {path}", file=sys.stderr)
    write_model(path, name, shape, mix, seed=seed, layers=layers, progress=show)
    if terminal:
        print(file=sys.stderr)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="SHAPE-MIX", help="e.g. tinyllama-q4_0")
    parser.add_argument("--out", metavar="DIR", default="build/bench", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="only so many layers")
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers must be at least 1, got {options.layers}")
    for name in options.names:
        try:
            parse_name(name)
        except ValueError as error:
            parser.error(str(error))
    for name in options.names:
        print(ensure_model(name, options.out, seed=options.seed, layers=options.layers))


if __name__ == "__main__":
    main()
