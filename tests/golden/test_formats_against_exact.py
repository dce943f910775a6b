# SPDX-License-Identifier: Apache-2.0
"""Closeness of every weight format's logits to a float64 forward pass over the same weights.

Equality with the numpy reference says that kernels obey their rules; this says that the rules are
good ones: the error is what Q8 activations in blocks of 32 and f16 keys and values leave, and a
coarser or a wrong rule shows.  bench/quality.py measures the same beside llama.cpp.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from reference_model import forward, with_formats

import spanker
from spanker.kernels import reference
from spanker.kernels.formats import Format
from spanker.testing.models import TinyModel, tiny_llama

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from exact import ExactLlama, rms

F32 = npt.NDArray[np.float32]

# Of the RMS of the logits.  Over six seeds of models and tokens quantised formats had 3.45 to 4.2 %
# and floats 0.083 to 0.104 %.  Activations in blocks of 256 would have 5 %, in f16 0.15 %.
QUANTISED_MAX = 0.044
FLOATS_MAX = 0.0012
SEED = 1
TOKENS = 48

FORMATS = {f.name.lower(): {"*": f.name.lower()} for f in Format} | {
    "q4_k_m": {"*": "q4_k", "blk.1.attn_v": "q6_k", "blk.1.ffn_down": "q6_k", "output": "q6_k"}
}


@functools.cache
def made(name: str) -> TinyModel:
    shape = tiny_llama(
        format="f32",
        hidden=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        ffn=512,
        vocabulary=600,
        tied=False,
        seed=SEED,
    )
    return with_formats(shape, FORMATS[name])


@functools.cache
def sequences() -> tuple[tuple[int, ...], ...]:
    rng = np.random.default_rng(SEED)
    return tuple(tuple(int(i) for i in rng.integers(0, 600, TOKENS)) for _ in range(2))


@pytest.fixture(scope="module")
def exact_of(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, npt.NDArray[np.float64]]]:
    """The file of a format, and the exact logits of both sequences."""
    directory = tmp_path_factory.mktemp("exact")

    @functools.cache
    def exact(name: str) -> tuple[Path, npt.NDArray[np.float64]]:
        path = made(name).write(directory / f"{name}.gguf")
        return path, ExactLlama(path).logits(sequences())

    return exact


def bound(name: str) -> float:
    return FLOATS_MAX if name in ("f32", "f16", "bf16") else QUANTISED_MAX


@pytest.mark.parametrize("name", FORMATS)
async def test_logits_are_as_close_as_the_rules_allow(
    name: str, exact_of: Callable[[str], tuple[Path, npt.NDArray[np.float64]]]
) -> None:
    path, exact = exact_of(name)
    async with spanker.open_fleet("soft:1") as fleet:
        model = await fleet.load(path)
        got = np.stack([await model.logits(list(ids)) for ids in sequences()])
    error = rms(got - exact) / rms(exact)
    print(f"{name}: {error:.3%} of the logits' RMS")
    assert error <= bound(name)
    # Less than this would mean that both sides round: the comparison would prove nothing.
    assert error >= bound(name) / 2


# --- wrong rules -------------------------------------------------------------------------------


def truncated(patch: pytest.MonkeyPatch) -> None:
    """Activations cut to integers."""
    patch.setattr(reference, "rint", np.trunc)


def blocks_of_256(patch: pytest.MonkeyPatch) -> None:
    """One scale of activations for eight blocks."""
    quantize = reference.quantize_q8

    def coarse(x: F32) -> npt.NDArray[np.uint8]:
        out = quantize(x).reshape(x.shape[0], -1, 34)
        v = x.reshape(x.shape[0], -1, 256)
        d = (np.abs(v).max(axis=2, keepdims=True) / np.float32(127)).astype(np.float16)
        q = np.rint(v / d.astype(np.float32)).clip(-127, 127).astype(np.int8)
        out[..., :2] = np.repeat(d, 8, axis=1).view(np.uint8)
        out[..., 2:] = q.reshape(*out.shape[:2], 32).view(np.uint8)
        return out.reshape(x.shape[0], -1)

    patch.setattr(reference, "quantize_q8", coarse)


def _blocks(change: Callable[[reference.Blocks], reference.Blocks]) -> Callable[..., None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        split = reference.split_blocks
        patch.setattr(reference, "split_blocks", lambda name, rows: change(split(name, rows)))

    return apply


def swapped_halves(blocks: reference.Blocks) -> reference.Blocks:
    """The scales of the first and the last 16 weights of a block."""
    assert blocks.halves is not None
    return blocks._replace(halves=blocks.halves[..., ::-1])


def next_minima(blocks: reference.Blocks) -> reference.Blocks:
    """Each block with the minimum of the one behind it."""
    assert blocks.m is not None
    return blocks._replace(m=np.roll(blocks.m, -1, axis=1))


def without_the_fifth_bit(blocks: reference.Blocks) -> reference.Blocks:
    return blocks._replace(q=np.where(blocks.q >= 0, blocks.q & 15, blocks.q))


def activations_in(kind: type[np.floating]) -> Callable[[pytest.MonkeyPatch], None]:
    """Activations rounded before float weights."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        matmul = reference.matmul
        patch.setattr(
            reference, "matmul", lambda name, w, x: matmul(name, w, x.astype(kind).astype("f4"))
        )

    return apply


WRONG = {
    "activations cut to integers": ("q4_0", truncated),
    "activations in blocks of 256": ("q4_k", blocks_of_256),
    "minima of other blocks": ("q4_1", _blocks(next_minima)),
    "minima of other blocks of a super-block": ("q5_k", _blocks(next_minima)),
    "scales of halves swapped": ("q6_k", _blocks(swapped_halves)),
    "a fifth bit lost": ("q5_1", _blocks(without_the_fifth_bit)),
    "activations in f16": ("bf16", activations_in(np.float16)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_rule_would_be_beyond_the_bound(
    what: str,
    exact_of: Callable[[str], tuple[Path, npt.NDArray[np.float64]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, apply = WRONG[what]
    _, exact = exact_of(name)
    apply(monkeypatch)
    got = np.stack([forward(made(name), ids) for ids in sequences()])
    error = rms(got - exact) / rms(exact)
    print(f"{what}: {error:.3%} of the logits' RMS")
    assert error > 1.1 * bound(name)
