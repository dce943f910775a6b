# SPDX-License-Identifier: Apache-2.0
"""The forward pass of a llama GGUF in float64 over the dequantised weights: what rounding in any
engine is measured against.

It shares nothing with Spanker: the file is read and the weights are dequantised by the `gguf`
package, and every sum is numpy's.  Whole sequences only, no cache of keys and values.
"""

from __future__ import annotations

import os

import gguf
import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

# Weights in float64 at a time: 256 MiB.
_CHUNK_WEIGHTS = 1 << 25


class ExactLlama:
    """A llama GGUF; rotates interleaved pairs, as converted files of that architecture want."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        reader = gguf.GGUFReader(os.fspath(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if fields["general.architecture"] != "llama":
            raise ValueError(f"{path}: expected a llama, got {fields['general.architecture']}")
        keys = {name[6:]: value for name, value in fields.items() if name.startswith("llama.")}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.layers: int = keys["block_count"]
        self.heads: int = keys["attention.head_count"]
        self.kv_heads: int = keys.get("attention.head_count_kv", self.heads)
        hidden = keys["embedding_length"]
        self.head_dim: int = keys.get("attention.key_length", hidden // self.heads)
        self.rope_dim: int = keys.get("rope.dimension_count", self.head_dim)
        self.rope_base: float = keys.get("rope.freq_base", 10000.0)
        self.eps: float = keys["attention.layer_norm_rms_epsilon"]

    def logits(self, sequences: npt.ArrayLike) -> F64:
        """(sequences, tokens, vocabulary) of as many sequences of as many tokens: row i of each
        are the logits after its first i + 1 tokens."""
        tokens = np.asarray(sequences)
        x = self._rows("token_embd.weight", tokens.reshape(-1)).reshape(*tokens.shape, -1)
        for i in range(self.layers):
            x = x + self._attention(f"blk.{i}.", self._norm(f"blk.{i}.attn_norm.weight", x))
            x = x + self._ffn(f"blk.{i}.", self._norm(f"blk.{i}.ffn_norm.weight", x))
        output = "output.weight" if "output.weight" in self._tensors else "token_embd.weight"
        return self._matmul(output, self._norm("output_norm.weight", x))

    # --- pieces: x is (sequences, tokens, elements) ---

    def _attention(self, layer: str, x: F64) -> F64:
        shape, dim, group = x.shape[:2], self.head_dim, self.heads // self.kv_heads
        q = self._matmul(layer + "attn_q.weight", x).reshape(*shape, self.heads, dim)
        k = self._matmul(layer + "attn_k.weight", x).reshape(*shape, self.kv_heads, dim)
        v = self._matmul(layer + "attn_v.weight", x).reshape(*shape, self.kv_heads, dim)
        q, k = self._rotate(q), self._rotate(k)
        future = np.triu(np.full((shape[1], shape[1]), -np.inf), 1)
        out = np.empty((*shape, self.heads, dim))
        for head in range(self.heads):
            keys = k[:, :, head // group].transpose(0, 2, 1)
            score = q[:, :, head] @ keys / dim**0.5 + future
            weight = np.exp(score - score.max(axis=-1, keepdims=True))
            weight /= weight.sum(axis=-1, keepdims=True)
            out[:, :, head] = weight @ v[:, :, head // group]
        return self._matmul(layer + "attn_output.weight", out.reshape(*shape, -1))

    def _ffn(self, layer: str, x: F64) -> F64:
        gate = self._matmul(layer + "ffn_gate.weight", x)
        up = self._matmul(layer + "ffn_up.weight", x)
        return self._matmul(layer + "ffn_down.weight", gate / (1 + np.exp(-gate)) * up)

    def _norm(self, name: str, x: F64) -> F64:
        weight = self._rows(name, slice(None)).reshape(-1)
        normed: F64 = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps) * weight
        return normed

    def _rotate(self, x: F64) -> F64:
        """Heads (sequences, tokens, heads, head_dim), rotated by position; of each only the first
        `rope_dim` elements."""
        n = self.rope_dim
        angle = np.arange(x.shape[1])[:, None] * self.rope_base ** (-np.arange(0, n, 2) / n)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., 0:n:2], x[..., 1:n:2]
        out = x.copy()
        out[..., 0:n:2] = a * cos - b * sin
        out[..., 1:n:2] = a * sin + b * cos
        return out

    def _matmul(self, name: str, x: F64) -> F64:
        flat = x.reshape(-1, x.shape[-1])
        rows = int(self._tensors[name].shape[1])
        step = max(1, _CHUNK_WEIGHTS // flat.shape[1])
        out = np.empty((flat.shape[0], rows))
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            out[:, part] = flat @ self._rows(name, part).T
        return out.reshape(*x.shape[:-1], rows)

    def _rows(self, name: str, index: npt.NDArray[np.int64] | slice) -> F64:
        tensor = self._tensors[name]
        return gguf.quants.dequantize(tensor.data[index], tensor.tensor_type).astype(np.float64)


def rms(values: npt.NDArray[np.floating]) -> float:
    """The root of the mean square of all elements, in float64."""
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))
