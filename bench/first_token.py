# SPDX-License-Identifier: Apache-2.0
"""One engine from a cold process to its first token: times and memory, as JSON on stdout.

    python bench/first_token.py {spanker,llama.cpp} MODEL CARDS [START_NS]

START_NS is CLOCK_MONOTONIC when the process was started, taken by whoever started it.  Run by
bench/roofline.py; imports nothing that the engine does not need.
"""

import json
import os
import sys
import time

CONTEXT = 1024
PROMPT = [300, 8219, 16138, 24057, 1976]


def status_kb() -> dict[str, int]:
    """Memory of this process: the peak with mapped file pages, and what there is of each kind."""
    found = {}
    with open("/proc/self/status") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem"):
                found[key] = int(value.split()[0])
    return found


def run_llama_cpp(path: str, threads: int, marks: dict[str, float]) -> None:
    from llama_cpp import Llama

    marks["imported"] = time.monotonic()
    llama = Llama(path, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)
    marks["loaded"] = time.monotonic()
    llama.eval(PROMPT)
    llama.sample(temp=0.0)
    marks["first_token"] = time.monotonic()
    marks.update(status_kb())


def run_spanker(path: str, cards: int, marks: dict[str, float]) -> None:
    import trio

    import spanker

    marks["imported"] = time.monotonic()

    async def job() -> None:
        async with spanker.open_fleet(cards) as fleet:
            # One sequence of so many positions, as in llama.cpp; the plan of all other figures.
            model = await fleet.load(path, plan="tp", ctx=CONTEXT, kv_tokens=CONTEXT)
            marks["loaded"] = time.monotonic()
            async with model.generate(PROMPT, max_tokens=2, ignore_eos=True) as generation:
                await generation.__anext__()
                marks["first_token"] = time.monotonic()
                marks.update(status_kb())

    trio.run(job)


def main() -> None:
    engine, path, cards = sys.argv[1], sys.argv[2], int(sys.argv[3])
    start = int(sys.argv[4]) / 1e9 if len(sys.argv) > 4 else time.monotonic()
    marks: dict[str, float] = {}
    {"spanker": run_spanker, "llama.cpp": run_llama_cpp}[engine](path, cards, marks)
    json.dump(
        {
            "import_s": marks["imported"] - start,
            "load_s": marks["loaded"] - marks["imported"],
            "first_token_s": marks["first_token"] - start,
            "peak_rss_mb": marks["VmHWM"] * 1024 / 1e6,
            "rss_anon_mb": marks["RssAnon"] * 1024 / 1e6,
            "rss_file_mb": marks["RssFile"] * 1024 / 1e6,
            "rss_shmem_mb": marks["RssShmem"] * 1024 / 1e6,
        },
        sys.stdout,
    )
    sys.stdout.flush()
    # Tearing down is not measured, and not worth waiting for.
    os._exit(0)


if __name__ == "__main__":
    main()
