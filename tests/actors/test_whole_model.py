# SPDX-License-Identifier: Apache-2.0
"""Whole models against the numpy reference, bit for bit: every plan, on shapes that fit no plan.

The shapes have heads, FFN rows, words and columns that no number of cards divides, formats mixed
within a layer, and cards that get nothing of a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from reference_model import forward, greedy, with_formats

import spanker
from spanker.ggml.sampling import SamplingParams, choose_from_logits
from spanker.native import isas
from spanker.testing.models import TinyModel, tiny_llama

F32 = {"format": "f32"}


@attrs.frozen
class Case:
    """A model and a forced sequence of `tokens` tokens."""

    make: Callable[[], TinyModel]
    tokens: int = 24


def llama(formats: dict[str, str], *, rope_dim: int | None = None, **shape: Any) -> TinyModel:
    model = with_formats(tiny_llama(format="f32", **shape), formats)
    if rope_dim is not None:
        model.metadata["llama.rope.dimension_count"] = rope_dim
    return model


# Rows of whole super-blocks, and five words in the last 16 rows.
K_SHAPE: dict[str, Any] = {
    "hidden": 256,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "ffn": 512,
    "vocabulary": 597,
}


def k_m(base: str) -> dict[str, str]:
    """The formats of a Q4_K_M or Q5_K_M of two layers."""
    return {"*": base, "blk.1.attn_v": "q6_k", "blk.1.ffn_down": "q6_k", "output": "q6_k"}


CASES = {
    # Heads of 48 or 120 values in all, which end within a block: the consumer must be a float.
    "3 heads over 1": Case(
        lambda: llama(
            {"*": "q4_0", "attn_output": "f16"},
            hidden=96,
            heads=3,
            kv_heads=1,
            head_dim=16,
            ffn=160,
            vocabulary=300,
        )
    ),
    "5 heads of 24": Case(
        lambda: llama(
            {"*": "q4_1", "attn_output": "f32", "output": "q8_0"},
            hidden=96,
            heads=5,
            kv_heads=5,
            head_dim=24,
            ffn=160,
            vocabulary=1000,
            tied=False,
        )
    ),
    # Heads of 48 values: whole blocks only together, so that floats are gathered, then quantised.
    "2 heads of 48": Case(
        lambda: llama(
            {"*": "q4_0"}, hidden=64, heads=2, kv_heads=2, head_dim=48, ffn=96, vocabulary=259
        )
    ),
    "9 heads over 3": Case(
        lambda: llama(
            {"*": "q4_1"},
            hidden=160,
            heads=9,
            kv_heads=3,
            head_dim=32,
            ffn=288,
            vocabulary=1000,
            layers=3,
        )
    ),
    "floats of no block": Case(
        lambda: llama(
            {"*": "f32"}, hidden=80, heads=5, kv_heads=1, head_dim=6, ffn=72, vocabulary=300
        )
    ),
    "halves": Case(
        lambda: llama(
            {"*": "f16"},
            hidden=96,
            heads=6,
            kv_heads=3,
            head_dim=16,
            ffn=150,
            vocabulary=1000,
            tied=False,
        )
    ),
    # xn is wanted both as floats and as Q8 blocks by the same layer.
    "mixed formats": Case(
        lambda: llama(
            {
                "token_embd": "q8_0",
                "attn_q": "f32",
                "attn_k": "q4_0",
                "attn_v": "q8_0",
                "attn_output": "q4_1",
                "ffn_gate": "q4_1",
                "ffn_up": "f16",
                "ffn_down": "q8_0",
                "output": "f32",
            },
            hidden=64,
            heads=4,
            kv_heads=2,
            head_dim=16,
            ffn=128,
            vocabulary=600,
            tied=False,
        )
    ),
    "half of a head rotated": Case(
        lambda: llama(
            {"*": "q8_0"},
            rope_dim=8,
            hidden=64,
            heads=4,
            kv_heads=4,
            head_dim=16,
            ffn=128,
            vocabulary=320,
        )
    ),
    "one head": Case(
        lambda: llama(
            {"*": "q4_0"}, hidden=32, heads=1, kv_heads=1, head_dim=32, ffn=32, vocabulary=260
        )
    ),
    "brain floats": Case(
        lambda: llama(
            {"*": "bf16"},
            hidden=96,
            heads=5,
            kv_heads=5,
            head_dim=14,
            ffn=150,
            vocabulary=600,
        )
    ),
    "five bits": Case(
        lambda: llama(
            {"*": "q5_0", "ffn_down": "q5_1", "output": "q5_1"},
            hidden=96,
            heads=6,
            kv_heads=3,
            head_dim=16,
            ffn=160,
            vocabulary=600,
            tied=False,
        )
    ),
    "five bits and minima": Case(
        lambda: llama(
            {"*": "q5_1", "attn_v": "q5_0"},
            hidden=64,
            heads=3,
            kv_heads=1,
            head_dim=32,
            ffn=96,
            vocabulary=300,
        )
    ),
    # Columns of the embedding in units of 256: the second card is the last that embeds.
    "q4_k": Case(
        lambda: llama(
            {"*": "q4_k"}, hidden=512, heads=4, kv_heads=2, head_dim=64, ffn=256, vocabulary=600
        )
    ),
    "q5_k": Case(lambda: llama({"*": "q5_k"}, **K_SHAPE)),
    # Rows of three super-blocks: pairs, and one alone.
    "q6_k": Case(lambda: llama({"*": "q6_k"}, **{**K_SHAPE, "ffn": 768})),
    # As llama.cpp mixes them: of two layers the last gets more bits for values and the way down.
    "q4_k_m": Case(lambda: llama(k_m("q4_k"), **K_SHAPE, tied=False)),
    "q4_k_m, tied": Case(lambda: llama({**k_m("q4_k"), "token_embd": "q6_k"}, **K_SHAPE)),
    "q5_k_m": Case(lambda: llama(k_m("q5_k"), **K_SHAPE, tied=False)),
    "q4_0 with another output": Case(
        lambda: llama({"*": "q4_0", "output": "q6_k"}, **K_SHAPE, tied=False)
    ),
    # What llama.cpp takes where rows are no multiple of 256, as in SmolLM2: only the way down is.
    "q4_k_m that falls back": Case(
        lambda: llama(
            {
                "*": "q5_0",
                "blk.1.attn_v": "q8_0",
                "blk.0.ffn_down": "q4_k",
                "blk.1.ffn_down": "q6_k",
                "output": "q8_0",
            },
            hidden=96,
            heads=3,
            kv_heads=3,
            head_dim=32,
            ffn=512,
            vocabulary=600,
            tied=False,
        )
    ),
    "an embedding unlike the output": Case(
        lambda: llama(
            {"*": "q5_k", "token_embd": "q4_1", "attn_k": "bf16", "output": "bf16"},
            **K_SHAPE,
            tied=False,
        )
    ),
    "several pages": Case(
        lambda: llama(
            {"*": "q4_0"}, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocabulary=320
        ),
        tokens=150,
    ),
}
PLANS = {"tp1": 1, "tp2": 2, "tp3": 3, "tp4": 4, "tp5": 5, "pp2": 2, "tp2xpp2": 4, "tp3xpp2": 6}


@functools.cache
def made(name: str) -> tuple[TinyModel, list[int], np.ndarray]:
    """The model, a sequence, and the bits of its logits."""
    model = CASES[name].make()
    rng = np.random.default_rng(list(name.encode()))
    vocabulary = int(model.metadata["llama.vocab_size"])  # type: ignore[call-overload]
    ids = [int(i) for i in rng.integers(0, vocabulary, CASES[name].tokens)]
    return model, ids, forward(model, ids).view(np.uint32)


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("models")

    @functools.cache
    def path(name: str) -> Path:
        return made(name)[0].write(directory / f"{name}.gguf")

    return path


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", CASES)
async def test_logits_are_those_of_the_reference_under_every_plan(
    name: str, plan: str, path_of: Callable[[str], Path]
) -> None:
    _, ids, expected = made(name)
    async with spanker.open_fleet(PLANS[plan], plan="tp") as fleet:
        # Chunks that end anywhere in pages and tiles.
        model = await fleet.load(path_of(name), plan=plan, prompt_chunk=37 if len(ids) > 37 else 11)
        assert fleet.plan.name == plan
        got = await model.logits(ids)
    assert np.array_equal(got.view(np.uint32), expected)


@pytest.mark.parametrize("cards", [8, 13])
async def test_more_cards_than_heads_change_no_bit(
    cards: int, path_of: Callable[[str], Path]
) -> None:
    for name in ("9 heads over 3", "one head"):
        _, ids, expected = made(name)
        async with spanker.open_fleet(cards, plan="tp") as fleet:
            model = await fleet.load(path_of(name), plan="tp")
            assert np.array_equal((await model.logits(ids)).view(np.uint32), expected)


async def test_cards_of_different_instruction_sets_agree(path_of: Callable[[str], Path]) -> None:
    spec = ",".join(f"soft:1@{isa}" for isa in (*isas(), "scalar"))
    for name in CASES:
        _, ids, expected = made(name)
        async with spanker.open_fleet(spec, plan="tp") as fleet:
            model = await fleet.load(path_of(name), plan="tp")
            assert np.array_equal((await model.logits(ids)).view(np.uint32), expected)


# --- the tokens that the cards choose ----------------------------------------------------------


def with_equal_words(model: TinyModel, period: int) -> TinyModel:
    """Word i of the output is word i mod `period`: every logit is there several times."""
    name = "output.weight"
    t = model.tensors[name]
    data = np.frombuffer(t.data, np.uint8).reshape(t.shape[0], -1)
    rows = data[np.arange(t.shape[0]) % period]
    return TinyModel(
        dict(model.metadata), {**model.tensors, name: attrs.evolve(t, data=rows.tobytes())}
    )


@pytest.mark.parametrize("plan", ["tp1", "tp3", "tp5", "pp2", "tp2xpp2", "tp3xpp2"])
@pytest.mark.parametrize("period", [256, 100, 1])
async def test_of_equal_logits_the_lowest_id_is_chosen_wherever_it_lies(
    plan: str, period: int, tmp_path: Path
) -> None:
    """The cards go on with the token that they have chosen; the host sees it later."""
    source = with_equal_words(
        llama(
            {"*": "q5_0"}, hidden=96, heads=3, head_dim=32, kv_heads=3, vocabulary=800, tied=False
        ),
        period,
    )
    path = source.write(tmp_path / "equal.gguf")
    async with spanker.open_fleet(PLANS[plan], plan="tp") as fleet:
        model = await fleet.load(path, plan=plan)
        generation = model.generate([5, 6, 7], max_tokens=10, ignore_eos=True)
        await generation.collect()
    assert generation.token_ids == greedy(source, [5, 6, 7], 10)
    assert max(generation.token_ids) < period


SAMPLING = {
    "greedy": {},
    "nucleus": {"temperature": 0.8, "top_p": 0.95},
    # More tokens than a card sends, and far more than lie on one card.
    "wide": {"temperature": 3.0, "top_k": 150, "top_p": 0.99},
    "flat": {"temperature": 20.0},
    "min_p": {"temperature": 2.0, "min_p": 0.02},
}


@pytest.mark.parametrize("plan", ["tp1", "tp3", "tp2xpp2"])
@pytest.mark.parametrize("how", SAMPLING)
async def test_tokens_are_those_that_the_reference_logits_give(
    how: str, plan: str, path_of: Callable[[str], Path]
) -> None:
    source, ids, _ = made("9 heads over 3")
    prompt = ids[:5]
    async with spanker.open_fleet(PLANS[plan], plan="tp") as fleet:
        model = await fleet.load(path_of("9 heads over 3"), plan=plan)
        generation = model.generate(
            prompt,
            max_tokens=12,
            seed=6,
            ignore_eos=True,
            **SAMPLING[how],  # type: ignore[arg-type]
        )
        tokens = [t async for t in generation if t.id is not None]
    truth = forward(source, prompt + generation.token_ids)
    params = SamplingParams(seed=6, **SAMPLING[how])  # type: ignore[arg-type]
    for token in tokens:
        choice = choose_from_logits(params, token.position, truth[token.position - 1])
        assert (token.id, token.logprob) == (choice.id, choice.logprob)
