# SPDX-License-Identifier: Apache-2.0
"""How far the logits of each weight format are from exact ones: Spanker's and llama.cpp's.

    python bench/quality.py
    python bench/quality.py q4_k_m smollm2 /path/to/model.gguf --sequences 8 --json out.json

Forced sequences of 64 tokens run through both engines and through a float64 forward pass over the
dequantised weights of the same file (bench/exact.py): what differs is the rounding of activations,
keys and values, and of sums.  An error is the RMS of the difference of all logits, as a part of
the RMS of the exact ones.  llama.cpp evaluates token by token and in one batch, which differ; its
worst and best are shown, and Spanker's error over that best with its standard error: engines that
round alike differ by chance.  It takes part where this interpreter has it (pip install '.[peers]').

Models are formats, of which small models with random weights are made (a plain name is that format
everywhere, q4_k_m and q5_k_m mix as llama.cpp's quantiser does), names of `spanker pull`, or GGUF
files of the llama architecture.  Made models get random tokens, others a text.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import engines
import make_model
import numpy as np
import numpy.typing as npt
import report
import trio
from exact import F64, ExactLlama, rms

import spanker
from spanker.errors import SpankerError
from spanker.ggml import catalog
from spanker.ggml.gguf import GGMLType

F32 = npt.NDArray[np.float32]

TOKENS = 64
SEQUENCES = 8
# Small models of each format, with this and the following seeds.
MODELS, SEED = 4, 7
SHAPE = make_model.Shape(512, 4, 8, 4, 64, 1536, 1024, 256, 10000.0, False)
TEXT = Path(__file__).resolve().parent.parent / "LICENSE"
# Below these are the bytes and the control tokens of the made models.
_FIRST_ID = 259


def _plain(kind: GGMLType) -> make_model.Mix:
    return make_model.Mix(kind, kind, kind)


MADE: Mapping[str, make_model.Mix] = {
    **{
        kind.name.lower(): _plain(kind)
        for kind in (GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0)
    },
    "q4_k_m": make_model.MIXES["q4_k_m"],
    "q5_k_m": make_model.MIXES["q5_k_m"],
    **{kind.name.lower(): _plain(kind) for kind in (GGMLType.Q6_K, GGMLType.BF16, GGMLType.F16)},
}


@attrs.frozen
class Quality:
    """RMS errors of the logits of one model, one for each sequence; llama.cpp's by how it
    evaluated."""

    model: str
    logits_rms: float
    spanker: list[float]
    llama_cpp: dict[str, list[float]]

    def relative(self, errors: Sequence[float]) -> float:
        """The RMS error of all sequences as a part of the RMS of the logits."""
        return rms(np.array(errors)) / self.logits_rms

    @property
    def by_error(self) -> list[list[float]]:
        """What llama.cpp did, from the best to the worst."""
        return sorted(self.llama_cpp.values(), key=self.relative)

    @property
    def beside_best(self) -> tuple[float, float] | None:
        """Spanker's error over llama.cpp's best, and the standard error of that (jackknife)."""
        if not self.by_error:
            return None
        ours, theirs = np.square(self.spanker), np.square(self.by_error[0])
        ratio = float(np.sqrt(ours.sum() / theirs.sum()))
        if (n := ours.size) < 2:
            return ratio, float("nan")
        without = np.sqrt((ours.sum() - ours) / (theirs.sum() - theirs))
        return ratio, float(np.sqrt((n - 1) * np.square(without - without.mean()).mean()))


def errors_of(got: Sequence[npt.NDArray[np.floating]], exact: F64) -> list[float]:
    """The RMS of the differences, sequence by sequence."""
    return [rms(a.astype(np.float64) - b) for a, b in zip(got, exact, strict=True)]


# --- the engines ---------------------------------------------------------------------


async def spanker_logits(path: str, cards: str, sequences: Sequence[Sequence[int]]) -> list[F32]:
    async with spanker.open_fleet(cards) as fleet:
        model = await fleet.load(path, ctx=TOKENS)
        return [await model.logits(list(ids)) for ids in sequences]


async def text_sequences(path: str, count: int) -> list[list[int]]:
    """Tokens of the beginning of a text that every checkout has."""
    async with spanker.open_fleet("soft:1") as fleet:
        model = await fleet.load(path, ctx=TOKENS)
        ids = model.tokenize(TEXT.read_text(encoding="utf-8"))
    return [ids[TOKENS * i : TOKENS * (i + 1)] for i in range(count)]


def random_sequences(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(_FIRST_ID, SHAPE.vocabulary, (count, TOKENS)).tolist()


def llama_cpp_logits(
    path: str, threads: int, sequences: Sequence[Sequence[int]], batch: int
) -> list[F32]:
    """The same from llama.cpp, evaluated in batches of so many tokens."""
    from llama_cpp import Llama

    llama = Llama(
        path,
        n_ctx=TOKENS,
        n_batch=TOKENS,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )
    out = []
    try:
        for ids in sequences:
            llama.reset()
            for begin in range(0, len(ids), batch):
                llama.eval(ids[begin : begin + batch])
            out.append(np.array(llama.scores[: len(ids)], np.float32))
    finally:
        llama.close()
    return out


def measure(
    name: str, path: str, sequences: Sequence[Sequence[int]], cards: str, threads: int
) -> Quality:
    exact = ExactLlama(path).logits(sequences)
    ours = trio.run(spanker_logits, path, cards, sequences)
    theirs: dict[str, list[float]] = {}
    if engines.llama_cpp_version() is not None:
        for how, batch in (("token by token", 1), ("one batch", TOKENS)):
            theirs[how] = errors_of(llama_cpp_logits(path, threads, sequences, batch), exact)
    return Quality(name, rms(exact), errors_of(ours, exact), theirs)


def pooled(parts: Sequence[Quality]) -> Quality:
    """Several models of one format as one, each of as many sequences."""
    first = parts[0]
    return Quality(
        first.model,
        rms(np.array([part.logits_rms for part in parts])),
        [error for part in parts for error in part.spanker],
        {how: [e for part in parts for e in part.llama_cpp[how]] for how in first.llama_cpp},
    )


def measure_named(name: str, count: int, cards: str, threads: int, directory: str) -> Quality:
    """Of a format, a name of `spanker pull`, or a file."""
    if name not in MADE:
        file = str(catalog.pull(name) if name in catalog.CATALOG else catalog.resolve(name))
        return measure(name, file, trio.run(text_sequences, file, count), cards, threads)
    parts = []
    for seed in range(SEED, SEED + MODELS):
        path = Path(directory, f"{name}.gguf")
        make_model.write_model(path, name, SHAPE, MADE[name], seed=seed)
        parts.append(measure(name, str(path), random_sequences(count, seed), cards, threads))
    return pooled(parts)


# --- output --------------------------------------------------------------------------


def row(result: Quality) -> list[object]:
    """A line of the table."""

    def percent(errors: Sequence[float]) -> str:
        return f"{result.relative(errors):.3%}"

    cells: list[object] = [Path(result.model).name, result.logits_rms, percent(result.spanker)]
    if result.beside_best is None:
        return [*cells, None, None, None]
    best, worst = result.by_error[0], result.by_error[-1]
    ratio, error = result.beside_best
    return [*cells, percent(worst), percent(best), f"{ratio:.3f} ± {error:.3f}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"default: {' '.join(MADE)}")
    parser.add_argument(
        "--sequences", type=int, default=SEQUENCES, help="of each model; default: %(default)s"
    )
    parser.add_argument("--cards", default="soft:1", help="Spanker's fleet; the answer is the same")
    parser.add_argument("--threads", type=int, default=2, help="llama.cpp's; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="save the figures here")
    options = parser.parse_args(arguments)
    if options.sequences < 1 or options.threads < 1:
        parser.error("--sequences and --threads must be at least 1")
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for name in options.models or MADE:
            try:
                found = measure_named(
                    name, options.sequences, options.cards, options.threads, directory
                )
            except SpankerError as error:
                print(error, file=sys.stderr)
                return 1
            results.append(found)
    report.show_table(
        f"RMS error of the logits of {TOKENS} forced tokens, as a part of their RMS",
        ["model", "RMS", "Spanker", "llama.cpp worst", "llama.cpp best", "Spanker / best"],
        [row(result) for result in results],
    )
    if options.json:
        record = {
            "when": report.now_utc(),
            "machine": report.describe_machine(),
            "tokens": TOKENS,
            "sequences": options.sequences,
            "models": [attrs.asdict(r) for r in results],
        }
        print(report.save_json(options.json, record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
