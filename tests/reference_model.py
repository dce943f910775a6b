# SPDX-License-Identifier: Apache-2.0
"""A whole llama forward pass in numpy: what every fleet, plan and batch must equal bit for bit.

Nothing here runs native code, knows of cards or cuts a prompt: it is spanker/kernels/reference.py
in the order of the model, one sequence at a time, from a tiny model held as values.  The rotation
tables come from spanker/ggml/rope.py, which has tests of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from spanker.ggml import rope
from spanker.kernels import reference as ref
from spanker.testing.models import GGUFTensor, TinyModel, tensor

F32 = npt.NDArray[np.float32]


@attrs.frozen
class _Matrix:
    format: str
    rows: npt.NDArray[np.uint8]  # (rows, row bytes)

    def __call__(self, x: F32) -> F32:
        """x (T, k) times the matrix, quantised first where the weights are."""
        if self.format in ("f32", "f16", "bf16"):
            return ref.matmul(self.format, self.rows, x)
        return ref.matmul(self.format, self.rows, ref.quantize_q8(x))


def forward(model: TinyModel, tokens: Sequence[int]) -> F32:
    """Logits (tokens, vocabulary): row i are those after tokens[:i + 1]."""
    keys = {key[6:]: v for key, v in model.metadata.items() if key.startswith("llama.")}
    heads, kv_heads = keys["attention.head_count"], keys["attention.head_count_kv"]
    dim, rope_dim = keys["attention.key_length"], keys["rope.dimension_count"]
    eps = keys["attention.layer_norm_rms_epsilon"]
    table = rope.table(len(tokens), rope_dim, keys["rope.freq_base"])
    positions = np.arange(len(tokens), dtype=np.uint32)
    scale = np.float32(1) / np.sqrt(np.float32(dim))

    def matrix(name: str) -> _Matrix:
        t = model.tensors[name]
        data = np.frombuffer(t.data, np.uint8).reshape(t.shape[0], -1)
        return _Matrix(t.type.name.lower(), data)

    def norm(name: str, x: F32) -> F32:
        t = model.tensors[name]
        row = np.frombuffer(t.data, np.uint8)[None, :]
        return ref.rmsnorm(x, ref.dequantize_row(t.type.name.lower(), row)[0], eps)

    def layer(index: int) -> Callable[[str], _Matrix]:
        return lambda name: matrix(f"blk.{index}.{name}.weight")

    def attend(q: F32, k: F32, v: F32) -> F32:
        kh, vh = ref.to_f16(k), ref.to_f16(v)
        out = np.empty_like(q)
        for t in range(q.shape[0]):
            for h in range(heads):
                g = h // (heads // kv_heads)
                out[t, h] = ref.attention(q[t, h], kh[: t + 1, g], vh[: t + 1, g], scale)
        return out

    embedding = matrix("token_embd.weight")
    x = ref.dequantize_row(embedding.format, embedding.rows[np.asarray(tokens)])
    for i in range(keys["block_count"]):
        part = layer(i)
        xn = norm(f"blk.{i}.attn_norm.weight", x)
        q = part("attn_q")(xn).reshape(-1, heads, dim)
        k = part("attn_k")(xn).reshape(-1, kv_heads, dim)
        v = part("attn_v")(xn).reshape(-1, kv_heads, dim)
        q, k = (ref.rope(a, table, positions, rope_dim) for a in (q, k))
        x = ref.add(x, part("attn_output")(attend(q, k, v).reshape(len(tokens), -1)))
        xn = norm(f"blk.{i}.ffn_norm.weight", x)
        act = ref.swiglu(part("ffn_gate")(xn), part("ffn_up")(xn))
        x = ref.add(x, part("ffn_down")(act))
    output = "output.weight" if "output.weight" in model.tensors else "token_embd.weight"
    return matrix(output)(norm("output_norm.weight", x))


def greedy(model: TinyModel, prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens after the prompt; ties go to the lowest id."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(forward(model, tokens)[-1])))
    return tokens[len(prompt) :]


def with_formats(model: TinyModel, formats: dict[str, str]) -> TinyModel:
    """An f32 model with its matrices in other formats, by name without `.weight`: of one layer
    (`blk.1.attn_v`), or of all (`attn_q`, `token_embd`, ...); `*` is for all that are not named."""
    tensors: dict[str, GGUFTensor] = {}
    for name, t in model.tensors.items():
        whole = name.removesuffix(".weight")
        part = whole.split(".")[-1]
        kind = formats.get(whole, formats.get(part, formats.get("*", "f32")))
        values = np.frombuffer(t.data, np.float32).reshape(t.shape)
        tensors[name] = t if part.endswith("norm") else tensor(name, values, kind)
    return TinyModel(model.metadata, tensors)
