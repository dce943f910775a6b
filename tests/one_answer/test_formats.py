# SPDX-License-Identifier: Apache-2.0
"""One answer in every weight format: tiny models, as real files mix their formats, give the bits
of the numpy reference however the work is spread.

Replay one case:  python tests/one_answer/test_formats.py q4_k_m "soft:3@avx2" tp 7 batched
"""

from __future__ import annotations

import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a replay

from matrix import Case
from reference_model import forward, with_formats

import spanker
from spanker.kernels.formats import Format
from spanker.native import isas
from spanker.testing.models import TinyModel, tiny_llama

# Three chunks of words, five of them in the last; rows of one and of two super-blocks.
SHAPE: dict[str, Any] = {
    "hidden": 256,
    "heads": 5,
    "kv_heads": 5,
    "head_dim": 256,
    "ffn": 512,
    "vocabulary": 517,
}


def k_m(base: str) -> dict[str, str]:
    """Of two layers the last gets more bits for values and the way down."""
    return {"*": base, "blk.1.attn_v": "q6_k", "blk.1.ffn_down": "q6_k", "output": "q6_k"}


MIXES: Mapping[str, dict[str, str]] = {
    **{f.name.lower(): {"*": f.name.lower()} for f in Format},
    "q4_k_m": k_m("q4_k"),
    "q5_k_m": k_m("q5_k"),
    "q4_0 and q6_k": {"*": "q4_0", "output": "q6_k"},
    "q5_1 and q6_k": {"*": "q5_1", "output": "q6_k"},
    "f16 embedding": {**k_m("q4_k"), "token_embd": "f16"},
    "bf16 output": {"*": "q5_k", "token_embd": "q5_0", "output": "bf16"},
    # Rows that are no multiple of 256 are in formats that need only 32.
    "fallback": {
        "*": "q5_0",
        "blk.1.attn_v": "q8_0",
        "blk.0.ffn_down": "q4_k",
        "blk.1.ffn_down": "q6_k",
        "output": "q8_0",
    },
}
OTHER_SHAPES: Mapping[str, dict[str, int]] = {
    "fallback": {"hidden": 96, "heads": 3, "kv_heads": 3, "head_dim": 32}
}
PROMPT_TOKENS = 21
GENERATED = 5
SAMPLED = {"temperature": 0.9, "seed": 5}


@functools.cache
def made(name: str) -> TinyModel:
    """A plain format shares embedding and output, a mix does not."""
    mix = MIXES[name]
    shape = {**SHAPE, **OTHER_SHAPES.get(name, {})}
    return with_formats(tiny_llama(format="f32", tied=len(mix) == 1, **shape), mix)


@functools.cache
def prompt(name: str) -> tuple[int, ...]:
    rng = np.random.default_rng(list(name.encode()))
    return tuple(int(i) for i in rng.integers(0, SHAPE["vocabulary"], PROMPT_TOKENS))


@functools.cache
def expected(name: str, tokens: tuple[int, ...]) -> np.ndarray:
    """The bits of the logits behind the prompt, one row for each further token."""
    return forward(made(name), tokens)[PROMPT_TOKENS - 1 : -1].view(np.uint32)


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("formats")
    return functools.cache(lambda name: made(name).write(directory / f"{name}.gguf"))


async def check(name: str, path: Path, case: Case) -> None:
    """Greedily and by chance: the logits of every token are those of the reference for the tokens
    before it, and the tokens are the same in every case, as the logits are."""
    async with spanker.open_fleet(case.cards, plan="tp") as fleet:
        model = await fleet.load(path, plan=case.plan, prompt_chunk=case.chunk)
        for options in ({}, SAMPLED):
            async with trio.open_nursery() as nursery:
                if case.batched:
                    for number in range(3):
                        nursery.start_soon(_companion, model, number)
                tokens, rows = await _generate(model, prompt(name), options)
                nursery.cancel_scope.cancel()
            truth = expected(name, prompt(name) + tokens)
            assert np.array_equal(rows.view(np.uint32), truth), (name, str(case), options)
            if not options:
                assert tokens == tuple(int(i) for i in truth.view(np.float32).argmax(axis=1))


async def _generate(
    model: spanker.Model, ids: tuple[int, ...], options: dict[str, Any]
) -> tuple[tuple[int, ...], np.ndarray]:
    tokens, rows = [], []
    async for token in model.generate(
        list(ids), max_tokens=GENERATED, ignore_eos=True, logits=True, **options
    ):
        if token.id is not None:
            tokens.append(token.id)
            rows.append(token.logits)
    assert len(tokens) == GENERATED
    return tuple(tokens), np.stack(rows)


async def _companion(model: spanker.Model, number: int) -> None:
    """Another sequence in the same steps: other tokens, length and sampling."""
    ids = [(37 * i + number) % SHAPE["vocabulary"] for i in range(3 + 7 * number)]
    async for _ in model.generate(
        ids, max_tokens=100, ignore_eos=True, temperature=0.5 * number, seed=number
    ):
        pass


ALL_ISAS = ",".join(f"soft:1@{isa}" for isa in isas())


def quick_cases() -> list[Case]:
    """Everything at once, twice, and one card that does it all."""
    return [
        Case("soft:1"),
        Case(ALL_ISAS, chunk=7, batched=True),
        Case(f"soft:3@scalar,soft:1@{isas()[-1]}", "tp2xpp2", chunk=4),
    ]


def wide_cases() -> list[Case]:
    shapes = [
        (1, "tp"),
        (2, "tp"),
        (3, "tp"),
        (7, "tp"),
        (2, "pp2"),
        (4, "tp2xpp2"),
        (6, "tp3xpp2"),
    ]
    fleets = [(f"soft:{n}@{isa}", plan) for n, plan in shapes for isa in isas()]
    fleets += [(ALL_ISAS, "tp"), (f"{ALL_ISAS},{ALL_ISAS}", "tp3xpp2")]
    return [
        Case(cards, plan, chunk, batched)
        for (cards, plan), chunk, batched in itertools.product(fleets, (1, 7, 512), (False, True))
    ]


@pytest.mark.parametrize("case", quick_cases(), ids=str)
@pytest.mark.parametrize("name", MIXES)
async def test_every_format_gives_the_reference_bits(
    name: str, case: Case, path_of: Callable[[str], Path]
) -> None:
    await check(name, path_of(name), case)


@pytest.mark.long
@pytest.mark.parametrize("case", wide_cases(), ids=str)
@pytest.mark.parametrize("name", MIXES)
async def test_every_format_gives_the_reference_bits_on_any_fleet(
    name: str, case: Case, path_of: Callable[[str], Path]
) -> None:
    await check(name, path_of(name), case)


if __name__ == "__main__":
    _, name, cards, plan, chunk, company = sys.argv
    with tempfile.TemporaryDirectory() as directory:
        path = made(name).write(Path(directory, "model.gguf"))
        trio.run(check, name, path, Case(cards, plan, int(chunk), company == "batched"))
    print("as expected")
