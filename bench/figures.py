# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model, and what samples say beside them: the arithmetic of bench/roofline.py.

Nothing is measured here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import attrs
import report

from spanker.errors import SpankerError
from spanker.ggml.gguf import GGUFFile, TensorInfo
from spanker.sched.plan import Plan

Record = dict[str, Any]

# A round in which other processes keep so much of a core busy is disturbed.  llama.cpp suffers
# most: its threads spin at barriers, and wait for the one that is not running.
DISTURBED_CORES = 0.1


@attrs.frozen
class ModelFacts:
    """Sizes from the file itself, the same for both engines.

    `weight_bytes` and `multiply_adds` are those of one decoded token; in prefill only the last
    token of a prompt meets the output matrix, so `layer_multiply_adds` count there.
    """

    path: str
    file_bytes: int
    weight_bytes: int
    multiply_adds: int
    layer_multiply_adds: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    formats: dict[str, int]

    @property
    def shape_key(self) -> tuple[int, ...]:
        """What the costs of attention depend on."""
        return (self.layers, self.kv_heads, self.head_dim, self.layer_multiply_adds)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


def model_facts(path: str) -> ModelFacts:
    """Read a llama-like GGUF's sizes."""

    def weights(info: TensorInfo) -> int:
        rows, k = info.shape
        return rows * k

    with GGUFFile(path) as gguf:
        meta = gguf.metadata

        def number(key: str, default: int | None = None) -> int:
            value = meta.get(f"llama.{key}", default)
            if not isinstance(value, int):
                raise SpankerError(f"{path}: key llama.{key} is missing: not a llama model?")
            return value

        matrices = [info for info in gguf.tensors.values() if len(info.shape) == 2]
        layers = [info for info in matrices if info.name.startswith("blk.")]
        output = gguf.tensors.get("output.weight") or gguf.tensors["token_embd.weight"]
        layer_weights, formats = sum(map(weights, layers)), dict[str, int]()
        for info in (*layers, output):
            formats[info.type.name] = formats.get(info.type.name, 0) + info.nbytes
        heads = number("attention.head_count")
        return ModelFacts(
            path=path,
            file_bytes=os.path.getsize(path),
            weight_bytes=sum(info.nbytes for info in layers) + output.nbytes,
            multiply_adds=layer_weights + weights(output),
            layer_multiply_adds=layer_weights,
            layers=number("block_count"),
            heads=heads,
            kv_heads=number("attention.head_count_kv", heads),
            head_dim=number("attention.key_length", number("embedding_length") // heads),
            context=number("context_length"),
            formats=formats,
        )


def undisturbed(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    """The quiet rounds if they are at least half of all, else all rounds."""
    others = samples.get("other_cores", [])
    quiet = [number for number, cores in enumerate(others) if cores < DISTURBED_CORES]
    if 2 * len(quiet) < len(others) or not quiet:
        return samples
    return {name: [values[number] for number in quiet] for name, values in samples.items()}


def rate_figures(facts: ModelFacts, samples: dict[str, list[float]]) -> Record:
    """Medians, ratios and shares of the limits over the rounds that were `undisturbed`.

    Shares and ratios are taken within each round.
    """
    samples = undisturbed(samples)
    out: Record = {
        "rounds_counted": len(samples["read_gb_per_s"]),
        "medians": {name: report.median(values) for name, values in samples.items()},
    }
    reading, multiplying = samples["read_gb_per_s"], samples["int8_gmac_per_s"]
    limits = {
        "decode": [report.tokens_per_s_by_bytes(facts.weight_bytes, rate) for rate in reading],
        "prefill": [rate * 1e9 / facts.layer_multiply_adds for rate in multiplying],
    }
    for part, limit in limits.items():
        ours, theirs = samples.get(f"spanker_{part}"), samples.get(f"llama_cpp_{part}", [])
        if not ours:
            continue
        figures: Record = {
            "spanker_tokens_per_s": report.median(ours),
            "spanker_spread": report.spread(ours),
            "llama_cpp_tokens_per_s": report.median(theirs),
            "llama_cpp_spread": report.spread(theirs),
            "limit_tokens_per_s": report.median(limit),
            "ratio": report.paired_ratio(ours, theirs),
            "spanker_share_of_limit": report.paired_ratio(ours, limit),
            "llama_cpp_share_of_limit": report.paired_ratio(theirs, limit),
        }
        for engine, values in (("spanker", ours), ("llama_cpp", theirs)):
            if (rate := report.median(values)) is None:
                continue
            if part == "decode":
                figures[f"{engine}_gb_per_s"] = report.weights_gb_per_s(facts.weight_bytes, rate)
            else:
                figures[f"{engine}_gmac_per_s"] = report.matmul_gmac_per_s(
                    facts.layer_multiply_adds, rate
                )
        out[part] = figures
    return out


def kv_bytes_of_a_position(facts: ModelFacts, plan: Plan) -> int:
    """What the card that reads most of them reads of one position's keys and values."""
    heads: dict[int, int] = {}
    for stage in plan.stages:
        for share in stage.shares:
            held = stage.layers.size * share.kv_heads(facts.group).size
            heads[share.card] = heads.get(share.card, 0) + held
    return report.kv_bytes_per_token(1, max(heads.values()), facts.head_dim, 1)


def context_figures(
    facts: ModelFacts,
    plan: Plan,
    positions: Sequence[int],
    tokens: int,
    ours_at: dict[int, list[float]],
    theirs_at: dict[int, list[float]],
    reading_at: dict[int, list[float]],
    attention: Sequence[float],
) -> list[Record]:
    """Per position: rates over so many tokens, the bytes each reads, and what these explain.

    `explained_tokens_per_s` is the rate at the first position, the keys and values added since
    read by the card with the most of them, at the rate (`attention`, GB/s) at which the kernel
    alone reads them from memory.
    """
    out: list[Record] = []
    of_a_position = kv_bytes_of_a_position(facts, plan)
    attention_gb_per_s = report.median(attention) or 0.0
    first_middle, first_rate = 0, 0.0
    for position in positions:
        # The tokens of a measurement stand at `position` and after it: take the middle.
        middle = position + tokens // 2
        kv_bytes = report.kv_bytes_per_token(facts.layers, facts.kv_heads, facts.head_dim, middle)
        nbytes = facts.weight_bytes + kv_bytes
        rate, bandwidth = report.median(ours_at[position]), report.median(reading_at[position])
        if not out:
            first_middle, first_rate = middle, rate or 0.0
        added_s = (middle - first_middle) * of_a_position / (attention_gb_per_s * 1e9)
        out.append(
            {
                "position": position,
                "kv_bytes_per_token": kv_bytes,
                "busiest_card_kv_bytes": middle * of_a_position,
                "bytes_per_token": nbytes,
                "spanker_tokens_per_s": rate,
                "llama_cpp_tokens_per_s": report.median(theirs_at[position]),
                "ratio": report.paired_ratio(ours_at[position], theirs_at[position]),
                "limit_tokens_per_s": (
                    report.tokens_per_s_by_bytes(nbytes, bandwidth) if bandwidth else None
                ),
                "explained_tokens_per_s": 1 / (1 / first_rate + added_s),
                "samples": {
                    "spanker": ours_at[position],
                    "llama_cpp": theirs_at[position],
                    "read_gb_per_s": reading_at[position],
                    "attention_gb_per_s": list(attention),
                },
            }
        )
    return out
