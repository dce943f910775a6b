# SPDX-License-Identifier: Apache-2.0
"""Shapes of well-known llama models, for planning without a file.

Sizes are those of the models' published configurations; formats are GGML's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import attrs

from spanker.errors import ConfigError, PlanError
from spanker.sched.plan import LayerShape, ModelShape, WeightShape
from spanker.values import Value

# (weights, bytes) of one block of each weight format; ggml-common.h.
BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
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
)


@attrs.frozen(eq=False, repr=False)
class Dimensions(Value):
    """The sizes of a llama model; `tied` says that the output matrix is the embedding."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    context: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


NAMED: Mapping[str, Dimensions] = MappingProxyType(
    {
        "smollm2-135m": Dimensions(30, 576, 9, 3, 1536, 49152, 8192, tied=True),
        "smollm2-360m": Dimensions(32, 960, 15, 5, 2560, 49152, 8192, tied=True),
        "tinyllama": Dimensions(22, 2048, 32, 4, 5632, 32000, 2048),
        "smollm2-1.7b": Dimensions(24, 2048, 32, 32, 8192, 49152, 8192, tied=True),
        "llama-7b": Dimensions(32, 4096, 32, 32, 11008, 32000, 4096),
        "mistral-7b": Dimensions(32, 4096, 32, 8, 14336, 32000, 32768),
        "llama-3-8b": Dimensions(32, 4096, 32, 8, 14336, 128256, 8192),
        "llama-13b": Dimensions(40, 5120, 40, 40, 13824, 32000, 4096),
        "llama-70b": Dimensions(80, 8192, 64, 8, 28672, 32000, 4096),
    }
)


def weight(name: str, rows: int, k: int, fmt: str) -> WeightShape:
    """A weight matrix of a format; PlanError where k does not fill its blocks."""
    if fmt not in BLOCKS:
        raise ConfigError(f"no weight format {fmt!r}: expected one of {', '.join(BLOCKS)}")
    unit, nbytes = BLOCKS[fmt]
    if k % unit:
        raise PlanError(f"{name}: a row of {k} weights does not fill whole {fmt} blocks of {unit}")
    return WeightShape(name, rows, k, k // unit * nbytes, unit > 1, unit, nbytes)


def shape_of(sizes: Dimensions, fmt: str = "q4_0", output_fmt: str | None = None) -> ModelShape:
    """A model of these dimensions with all matrices in one format, the output perhaps in another
    (as the embedding, then, where they are one)."""
    hidden, dim = sizes.hidden, sizes.head_dim
    output_fmt = output_fmt or fmt
    kv = sizes.kv_heads * dim
    embedding = weight(
        "token_embd.weight", sizes.vocabulary, hidden, output_fmt if sizes.tied else fmt
    )
    output = (
        embedding if sizes.tied else weight("output.weight", sizes.vocabulary, hidden, output_fmt)
    )
    return ModelShape(
        hidden=hidden,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=dim,
        rope_dim=dim,
        ffn=sizes.ffn,
        vocabulary=sizes.vocabulary,
        context=sizes.context,
        layers=tuple(
            LayerShape(
                attn_q=weight(f"blk.{i}.attn_q.weight", hidden, hidden, fmt),
                attn_k=weight(f"blk.{i}.attn_k.weight", kv, hidden, fmt),
                attn_v=weight(f"blk.{i}.attn_v.weight", kv, hidden, fmt),
                attn_output=weight(f"blk.{i}.attn_output.weight", hidden, hidden, fmt),
                ffn_gate=weight(f"blk.{i}.ffn_gate.weight", sizes.ffn, hidden, fmt),
                ffn_up=weight(f"blk.{i}.ffn_up.weight", sizes.ffn, hidden, fmt),
                ffn_down=weight(f"blk.{i}.ffn_down.weight", hidden, sizes.ffn, fmt),
            )
            for i in range(sizes.layers)
        ),
        embedding=embedding,
        output=output,
    )


def named_shape(name: str, fmt: str = "q4_0", output_fmt: str | None = None) -> ModelShape:
    """The shape called `name`; raises ConfigError, listing the names, when there is none."""
    if name not in NAMED:
        raise ConfigError(f"no shape {name!r}: expected one of {', '.join(NAMED)}")
    return shape_of(NAMED[name], fmt, output_fmt)
