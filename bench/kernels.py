# SPDX-License-Identifier: Apache-2.0
"""Every kernel by itself on one core: bytes and multiply-adds per second, beside the core's limits.

    python bench/kernels.py --ops matmul --formats q4_0,q6_k --isa avx2,avx512vnni --json out.json

One thread, pinned.  The best of several calls counts, as for the limits (bench/probe.py).  Calls
are long, so that what Python adds to each does not show; where a call cannot be long, the same
call with hardly any work is measured too and taken off.

A product of one token runs over the same matrix many times stacked up, which is more than four
times what the last cache holds: memory is measured, and only the row length matters.  A product
of 512 tokens runs over as many rows of its matrix as a time budget allows.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np
import probe
import report

from spanker.errors import ConfigError
from spanker.ggml.gguf import GGMLType
from spanker.kernels.formats import Format, pack, packed_bytes
from spanker.kernels.native import TILE_ROWS, KvPool, NativeKernels
from spanker.native import isas
from spanker.testing.quantize import ENCODED, encode

#: (rows, k) of the matrices of SmolLM2-135M and TinyLlama-1.1B.
SHAPES = ((576, 576), (1536, 576), (2048, 2048), (5632, 2048), (2048, 5632), (32000, 2048))
PROMPT_TOKENS = 512
# (query heads per KV head, head size) of both models, and where they are.
GROUPS = {"smollm2": (3, 64), "tinyllama": (8, 64)}
ATTENTION_POSITIONS = (512, 4096)
VOCABULARIES = (32000, 49152)
CANDIDATES = 64
PAGE_POSITIONS = 64

CALLS = 5
# A call of a prompt's product is cut to about so long; a short call is repeated up to it.
CALL_S = 0.3
# As many weights are quantised as this; more are copies.
DISTINCT_WEIGHTS = 1 << 22
SEED = 20


@attrs.frozen
class Measured:
    """One kernel: the seconds of several calls, of which the best counts, and a call's work.

    `int8` says that the multiply-adds are of integers, `from_memory` that no cache held the bytes:
    elsewhere the limit of one or the other means nothing.
    """

    op: str
    format: str
    shape: str
    tokens: int
    isa: str
    samples: tuple[float, ...] = attrs.field(repr=False)
    nbytes: int
    multiply_adds: int = 0
    int8: bool = False
    from_memory: bool = False

    @property
    def seconds(self) -> float:
        return min(self.samples)

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9

    @property
    def gmac_per_s(self) -> float | None:
        return self.multiply_adds / self.seconds / 1e9 if self.multiply_adds else None

    def record(self, limits: probe.Limits) -> dict[str, object]:
        """As values, with the shares of the limits where they mean something."""
        rate = self.gmac_per_s
        return attrs.asdict(self) | {
            "seconds": self.seconds,
            "gb_per_s": self.gb_per_s,
            "gmac_per_s": rate,
            "share_of_read": self.gb_per_s / limits.read_gb_per_s if self.from_memory else None,
            "share_of_int8": rate / limits.int8_gmac_per_s if rate and self.int8 else None,
        }


def best_of(call: Callable[[], object], calls: int = CALLS) -> tuple[float, ...]:
    """Seconds of each of so many measurements of a call, after one to warm up.

    A short call is repeated within each measurement.
    """

    def once(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - begin) / repeats

    once(1)
    repeats = max(1, min(1000, int(CALL_S / 10 / max(once(1), 1e-7))))
    gc.collect()
    return tuple(once(repeats) for _ in range(calls))


def net_of(call: Callable[[], object], nearly_empty: Callable[[], object]) -> tuple[float, ...]:
    """The same without what the call costs when there is hardly anything to do."""
    overhead = min(best_of(nearly_empty))
    return tuple(max(seconds - overhead, 1e-9) for seconds in best_of(call))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(SEED).standard_normal(shape, np.float32)


# --- products ------------------------------------------------------------------------


def packed_rows(fmt: Format, rows: int, k: int) -> np.ndarray:
    """A packed matrix of at least so many rows, in whole tiles; made of copies where it is large.

    Tiles follow one another in the packed layout, so copies of whole tiles are a taller matrix.
    """
    distinct = max(1, min(rows, DISTINCT_WEIGHTS // k) // TILE_ROWS) * TILE_ROWS
    data = encode(normal(distinct, k), GGMLType(int(fmt)))
    once = pack(fmt, np.frombuffer(data, np.uint8).reshape(distinct, -1), k)
    copies = -(-rows // distinct)
    out = np.empty(copies * once.size, np.uint8)
    out.reshape(copies, once.size)[:] = once
    return out


def activations(kernels: NativeKernels, fmt: Format, tokens: int, k: int) -> np.ndarray:
    x = normal(tokens, k)
    return x if fmt.is_float else kernels.quantize_q8(x)


def matmul_of_one(kernels: NativeKernels, fmt: Format, packed: np.ndarray, k: int) -> Measured:
    """One token against a matrix that is far larger than the caches."""
    rows = packed.size // packed_bytes(fmt, TILE_ROWS, k) * TILE_ROWS
    x, out = activations(kernels, fmt, 1, k), np.empty((1, rows), np.float32)
    samples = best_of(lambda: kernels.matmul_packed(fmt.name, packed, rows, x, out=out))
    return Measured(
        op="matmul",
        format=fmt.name.lower(),
        shape=f"n x {k}",
        tokens=1,
        isa=kernels.isa,
        samples=samples,
        nbytes=packed.size,
        multiply_adds=rows * k,
        int8=not fmt.is_float,
        from_memory=True,
    )


def matmul_of_many(
    kernels: NativeKernels, fmt: Format, packed: np.ndarray, rows: int, k: int
) -> Measured:
    """A prompt against a matrix, or as many rows of it as the time allows."""
    x = activations(kernels, fmt, PROMPT_TOKENS, k)
    out = np.empty((PROMPT_TOKENS, rows), np.float32)

    def call(tiles: int) -> np.ndarray:
        return kernels.matmul_packed(fmt.name, packed, rows, x, tiles=(0, tiles), out=out)

    call(1)
    begin = time.perf_counter()
    call(2)
    per_tile_s = (time.perf_counter() - begin) / 2
    tiles = max(2, min(-(-rows // TILE_ROWS), int(CALL_S / per_tile_s)))
    done = min(tiles * TILE_ROWS, rows)
    return Measured(
        op="matmul",
        format=fmt.name.lower(),
        shape=f"{rows} x {k}",
        tokens=PROMPT_TOKENS,
        isa=kernels.isa,
        samples=best_of(lambda: call(tiles)),
        nbytes=packed_bytes(fmt, done, k),
        multiply_adds=done * k * PROMPT_TOKENS,
        int8=not fmt.is_float,
    )


def matmuls(fmt: Format, chosen: Sequence[NativeKernels]) -> Iterator[Measured]:
    """All products of a format; a matrix is packed once for all instruction sets."""
    shapes = [(rows, k) for rows, k in SHAPES if k % fmt.block == 0]
    for k in sorted({k for _, k in shapes}):
        row_bytes = packed_bytes(fmt, TILE_ROWS, k) // TILE_ROWS
        packed = packed_rows(fmt, -(-probe.memory_working_set_bytes() // row_bytes), k)
        for kernels in chosen:
            yield matmul_of_one(kernels, fmt, packed, k)
    for rows, k in shapes:
        packed = packed_rows(fmt, rows, k)[: packed_bytes(fmt, rows, k)]
        for kernels in chosen:
            yield matmul_of_many(kernels, fmt, packed, rows, k)


# --- attention -----------------------------------------------------------------------


def kv_pool(positions: int, dim: int) -> KvPool:
    """KV heads of one sequence, as many as no cache holds."""
    head_bytes = positions * dim * 2 * 2
    heads = max(1, probe.memory_working_set_bytes() // head_bytes)
    pool = KvPool.zeros(positions // PAGE_POSITIONS, heads, PAGE_POSITIONS, dim)
    pool.words[:] = normal(pool.words.shape[-1]).astype(np.float16).view(np.uint16)
    return pool


def attention_of_one(
    kernels: NativeKernels, model: str, group: int, pool: KvPool, positions: int
) -> Measured:
    """The queries of one token: the `group` that share a KV head, for one head after another."""
    dim = pool.head_dim
    query, out = normal(group, dim), np.empty((group, dim), np.float32)
    pages = range(pool.pages)

    def call(visible: int) -> None:
        seen = [visible] * group
        for head in range(pool.kv_heads):
            kernels.attention(pool, pages, head, query, seen, dim**-0.5, out=out)

    return Measured(
        op="attention",
        format="f16",
        shape=f"{model} @ {positions}",
        tokens=1,
        isa=kernels.isa,
        samples=net_of(lambda: call(positions), lambda: call(1)),
        nbytes=pool.kv_heads * positions * dim * 2 * 2,
        multiply_adds=pool.kv_heads * group * positions * dim * 2,
        from_memory=True,
    )


def attention_of_many(kernels: NativeKernels, pool: KvPool, positions: int) -> Measured:
    """The last queries of a prompt on one KV head, each seeing one position more."""
    tokens, dim = PROMPT_TOKENS, pool.head_dim
    queries, out = normal(tokens, dim), np.empty((tokens, dim), np.float32)
    pages = range(pool.pages)
    seen = [positions - tokens + 1 + i for i in range(tokens)]

    def call(visible: list[int]) -> np.ndarray:
        return kernels.attention(pool, pages, 0, queries, visible, dim**-0.5, out=out)

    return Measured(
        op="attention",
        format="f16",
        shape=f"head of {dim} @ {positions}",
        tokens=tokens,
        isa=kernels.isa,
        samples=net_of(lambda: call(seen), lambda: call([1] * tokens)),
        nbytes=positions * dim * 2 * 2,
        multiply_adds=sum(seen) * dim * 2,
    )


def attentions(kernels: NativeKernels) -> Iterator[Measured]:
    for positions in ATTENTION_POSITIONS:
        for dim in sorted({dim for _, dim in GROUPS.values()}):
            pool = kv_pool(positions, dim)
            for model in (name for name in GROUPS if GROUPS[name][1] == dim):
                yield attention_of_one(kernels, model, GROUPS[model][0], pool, positions)
            yield attention_of_many(kernels, pool, positions)


# --- the other kernels ---------------------------------------------------------------


def simple(
    op: str,
    kernels: NativeKernels,
    shape: str,
    tokens: int,
    nbytes: int,
    samples: tuple[float, ...],
) -> Measured:
    """A kernel whose arrays stay in cache, as they do between two products."""
    return Measured(op, "f32", shape, tokens, kernels.isa, samples, nbytes)


def rmsnorm(kernels: NativeKernels, n: int) -> Measured:
    x, weight = normal(PROMPT_TOKENS, n), normal(n)
    out = np.empty_like(x)
    samples = best_of(lambda: kernels.rmsnorm(x, weight, 1e-5, out=out))
    return simple("rmsnorm", kernels, f"{n}", PROMPT_TOKENS, 2 * x.nbytes, samples)


def quantize(kernels: NativeKernels, k: int) -> Measured:
    x = normal(PROMPT_TOKENS, k)
    out = kernels.quantize_q8(x)
    samples = best_of(lambda: kernels.quantize_q8(x, out=out))
    return simple("quantize", kernels, f"{k}", PROMPT_TOKENS, x.nbytes + out.nbytes, samples)


def swiglu(kernels: NativeKernels, n: int) -> Measured:
    gate, up = normal(2, PROMPT_TOKENS, n)
    out = np.empty_like(gate)
    samples = best_of(lambda: kernels.swiglu(gate, up, out=out))
    return simple("swiglu", kernels, f"{n}", PROMPT_TOKENS, 3 * gate.nbytes, samples)


def logit_stats(kernels: NativeKernels, n: int) -> Measured:
    """Many rows of logits in one call: its chunks do not know of each other."""
    logits = normal(64 * n)
    samples = best_of(lambda: kernels.logit_stats(logits, 1.0))
    return simple("logit_stats", kernels, f"{n}", 64, logits.nbytes, samples)


def top_k(kernels: NativeKernels, n: int) -> Measured:
    logits = normal(n)
    samples = net_of(
        lambda: kernels.top_k(logits, CANDIDATES), lambda: kernels.top_k(logits[:CANDIDATES], 1)
    )
    return simple("top_k", kernels, f"{CANDIDATES} of {n}", 1, logits.nbytes, samples)


def over(
    run: Callable[[NativeKernels, int], Measured], sizes: Sequence[int]
) -> Callable[[NativeKernels], Iterator[Measured]]:
    """A kernel at several sizes."""
    return lambda kernels: (run(kernels, size) for size in sizes)


OTHERS: dict[str, Callable[[NativeKernels], Iterator[Measured]]] = {
    "attention": attentions,
    "rmsnorm": over(rmsnorm, (576, 2048)),
    "quantize": over(quantize, (576, 2048, 5632)),
    "swiglu": over(swiglu, (1536, 5632)),
    "logit_stats": over(logit_stats, VOCABULARIES),
    "top_k": over(top_k, VOCABULARIES),
}
OPS = ("matmul", *OTHERS)


# --- the command ---------------------------------------------------------------------


def measure(
    ops: Sequence[str], formats: Sequence[Format], chosen: Sequence[NativeKernels]
) -> Iterator[Measured]:
    if "matmul" in ops:
        for fmt in formats:
            yield from matmuls(fmt, chosen)
    for op, run in OTHERS.items():
        if op in ops:
            for kernels in chosen:
                yield from run(kernels)


def known_formats() -> list[Format]:
    """The kernels' formats that weights can be made for."""
    names = {kind.name for kind in ENCODED}
    return [fmt for fmt in Format if fmt.name in names]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])

    def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
        def chosen(text: str) -> list[str]:
            names = text.split(",")
            if unknown := [name for name in names if name not in known]:
                raise argparse.ArgumentTypeError(
                    f"no {unknown[0]!r}: expected some of {','.join(known)}"
                )
            return names

        return chosen

    formats = [fmt.name.lower() for fmt in known_formats()]
    parser.add_argument("--ops", type=some_of(OPS), default=list(OPS), help=",".join(OPS))
    parser.add_argument("--formats", type=some_of(formats), default=formats)
    parser.add_argument("--isa", type=some_of(isas()), default=list(isas()))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the record here as well")
    return parser.parse_args(arguments)


def table(found: Sequence[dict[str, object]]) -> None:
    columns = ("op", "format", "shape", "tokens", "ISA", "us", "GB/s", "of read")
    rows = [
        [
            *(row[key] for key in ("op", "format", "shape", "tokens", "isa")),
            row["seconds"] * 1e6,  # type: ignore[operator]
            row["gb_per_s"],
            report.percent(row["share_of_read"]),  # type: ignore[arg-type]
            row["gmac_per_s"],
            report.percent(row["share_of_int8"]),  # type: ignore[arg-type]
        ]
        for row in found
    ]
    report.show_table("kernels on one core", (*columns, "G mult-adds/s", "of int8"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.sched_setaffinity(0, {probe.cpus()[0]})
    try:
        limits = [probe.limits(1)]
        chosen = [NativeKernels(isa) for isa in options.isa]
    except (probe.ProbeError, ConfigError) as error:
        sys.exit(f"kernels: {error}")
    formats = [Format[name.upper()] for name in options.formats]
    measured: list[Measured] = []
    interrupted = False
    try:
        for one in measure(options.ops, formats, chosen):
            measured.append(one)
            rate = f"{one.gmac_per_s:.1f} G multiply-adds/s" if one.gmac_per_s else ""
            print(
                f"{one.op} {one.format} {one.shape}, {one.tokens} tokens, {one.isa}: "
                f"{one.gb_per_s:.1f} GB/s {rate}",
                file=sys.stderr,
                flush=True,
            )
        limits.append(probe.limits(1))
    except KeyboardInterrupt:
        interrupted = True
    # The machine is shared, and what disturbs a measurement only lowers it.
    limit = attrs.evolve(
        limits[0],
        read_gb_per_s=max(each.read_gb_per_s for each in limits),
        int8_gmac_per_s=max(each.int8_gmac_per_s for each in limits),
    )
    found = [one.record(limit) for one in measured]
    table(found)
    print(
        f"limits of one core: {limit.read_gb_per_s:.1f} GB/s read ({limit.read_isa}), "
        f"{limit.int8_gmac_per_s:.0f} G int8 multiply-adds/s ({limit.int8_isa})"
    )
    if options.json:
        record = {
            "time_utc": report.now_utc(),
            "complete": not interrupted,
            "machine": report.describe_machine(),
            "limits": attrs.asdict(limit),
            "kernels": found,
        }
        print(f"written: {report.save_json(options.json, record)}", file=sys.stderr)
    sys.exit(130 if interrupted else 0)


if __name__ == "__main__":
    main()
