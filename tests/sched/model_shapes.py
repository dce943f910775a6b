# SPDX-License-Identifier: Apache-2.0
"""Shapes of models for the tests of plans, memory and planning: no files, no weights."""

from __future__ import annotations

import attrs

from spanker.sched.plan import LayerShape, ModelShape, WeightShape

# (weights, bytes) of a block.
BLOCKS = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}


def weight(name: str, rows: int, k: int, fmt: str) -> WeightShape:
    unit, nbytes = BLOCKS[fmt]
    assert k % unit == 0, (name, k, fmt)
    return WeightShape(name, rows, k, k // unit * nbytes, unit > 1, unit, nbytes)


def make_shape(
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 128,
    vocabulary: int = 320,
    context: int = 256,
    fmt: str = "q4_0",
    output_fmt: str = "f16",
    tied: bool = True,
) -> ModelShape:
    """A llama; the attention output is f16 where the heads do not fill quantisation blocks."""
    rows = heads * head_dim
    wo = "f16" if rows % 32 else fmt
    embedding = weight("token_embd.weight", vocabulary, hidden, fmt)
    return ModelShape(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_dim=head_dim,
        ffn=ffn,
        vocabulary=vocabulary,
        context=context,
        layers=tuple(
            LayerShape(
                attn_q=weight(f"blk.{i}.attn_q.weight", rows, hidden, fmt),
                attn_k=weight(f"blk.{i}.attn_k.weight", kv_heads * head_dim, hidden, fmt),
                attn_v=weight(f"blk.{i}.attn_v.weight", kv_heads * head_dim, hidden, fmt),
                attn_output=weight(f"blk.{i}.attn_output.weight", hidden, rows, wo),
                ffn_gate=weight(f"blk.{i}.ffn_gate.weight", ffn, hidden, fmt),
                ffn_up=weight(f"blk.{i}.ffn_up.weight", ffn, hidden, fmt),
                ffn_down=weight(f"blk.{i}.ffn_down.weight", hidden, ffn, fmt),
            )
            for i in range(layers)
        ),
        embedding=embedding,
        output=embedding if tied else weight("output.weight", vocabulary, hidden, output_fmt),
    )


def uneven_layers(shape: ModelShape, ffn_rows: list[int]) -> ModelShape:
    """Layers of different weight: as many rows in each one's FFN as listed."""
    layers = tuple(
        attrs.evolve(
            shape.layers[0],
            ffn_up=weight(f"blk.{i}.ffn_up.weight", rows, shape.hidden, "q4_0"),
        )
        for i, rows in enumerate(ffn_rows)
    )
    return attrs.evolve(shape, layers=layers)


SHAPES = {
    "tiny": make_shape(),
    "smollm2": make_shape(
        layers=30,
        hidden=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        ffn=1536,
        vocabulary=49152,
        context=8192,
        fmt="q4_1",
    ),
    "one head": make_shape(heads=1, kv_heads=1, head_dim=32),
    "odd heads": make_shape(heads=5, kv_heads=5, head_dim=24, hidden=96, ffn=160, vocabulary=300),
    "one KV head": make_shape(heads=3, kv_heads=1, head_dim=16, hidden=96, vocabulary=1000),
    "floats": make_shape(hidden=40, ffn=56, vocabulary=257, fmt="f32"),
    "separate output": make_shape(tied=False, vocabulary=256, ffn=32, hidden=32),
    "k-quants": make_shape(hidden=768, heads=6, head_dim=128, ffn=1024, fmt="q4_k"),
    "few words": make_shape(hidden=256, ffn=512, head_dim=64, vocabulary=256, fmt="q6_k"),
    "wide": make_shape(heads=64, kv_heads=8, head_dim=80, hidden=2048, ffn=5632, vocabulary=32000),
}
