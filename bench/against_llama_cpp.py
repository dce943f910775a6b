# SPDX-License-Identifier: Apache-2.0
"""Decode and prefill beside llama.cpp, in one process, alternating, medians and ratios.

    pip install --no-binary llama-cpp-python '.[peers]'      (builds llama.cpp: ten minutes)
    python bench/against_llama_cpp.py --model smollm2 --threads 2 --rounds 7 --json out.json

N cards, tensor parallel, against N threads of llama.cpp on the same file.  Decode is 128 forced
tokens after a short prompt; prefill is a prompt of 512 tokens in one batch.  Spanker samples
greedily through its whole runtime (actors, messages, detokenising); llama.cpp only evaluates.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import trio

import spanker
from spanker.ggml import catalog

DECODE_TOKENS = 128
PREFILL_TOKENS = 512


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as info:
        for line in info:
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def llama_cpp(path: str, threads: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """(decode, prefill) in tokens per second."""
    try:
        from llama_cpp import Llama
    except ImportError:
        sys.exit("llama.cpp is missing: pip install --no-binary llama-cpp-python '.[peers]'")
    llama = Llama(
        path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    prompt = [(i * 7919) % 40000 for i in range(PREFILL_TOKENS)]

    def decode() -> float:
        llama.reset()
        llama.eval(prompt[:5])
        begin = time.perf_counter()
        for i in range(DECODE_TOKENS):
            llama.eval([100 + i])
        return DECODE_TOKENS / (time.perf_counter() - begin)

    def prefill() -> float:
        llama.reset()
        begin = time.perf_counter()
        llama.eval(prompt)
        return PREFILL_TOKENS / (time.perf_counter() - begin)

    return decode, prefill


async def ours_decode(model: spanker.Model) -> float:
    times = []
    prompt = [(i * 7919) % 40000 for i in range(5)]
    async for _ in model.generate(prompt, max_tokens=DECODE_TOKENS + 1, ignore_eos=True):
        times.append(time.perf_counter())
    return DECODE_TOKENS / (times[DECODE_TOKENS] - times[0])


async def ours_prefill(model: spanker.Model) -> float:
    prompt = [(i * 7919) % 40000 for i in range(PREFILL_TOKENS)]
    begin = time.perf_counter()
    async for _ in model.generate(prompt, max_tokens=1, ignore_eos=True):
        pass
    return PREFILL_TOKENS / (time.perf_counter() - begin)


async def measure(path: str, threads: int, rounds: int) -> dict[str, object]:
    """Alternate the two engines for `rounds` rounds after one warm-up."""
    decode, prefill = llama_cpp(path, threads)
    samples: dict[str, list[float]] = {}
    async with spanker.open_fleet(threads) as fleet:
        model = await fleet.load(path, plan="tp", ctx=1024)
        for number in range(rounds + 1):
            for name, value in (
                ("spanker_decode", await ours_decode(model)),
                ("llama_cpp_decode", decode()),
                ("spanker_prefill", await ours_prefill(model)),
                ("llama_cpp_prefill", prefill()),
            ):
                if number:
                    samples.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "machine": machine(),
        "model": os.path.basename(path),
        "cards": threads,
        "threads": threads,
        "rounds": rounds,
        "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
        "ratio_decode": round(medians["spanker_decode"] / medians["llama_cpp_decode"], 2),
        "ratio_prefill": round(medians["spanker_prefill"] / medians["llama_cpp_prefill"], 2),
        "samples": {k: [round(v, 1) for v in values] for k, values in samples.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write the record here as well")
    options = parser.parse_args()
    path = str(catalog.resolve(options.model))
    record = trio.run(measure, path, options.threads, options.rounds)
    text = json.dumps(record, indent=1)
    if options.json:
        with open(options.json, "w") as out:
            out.write(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
