# SPDX-License-Identifier: Apache-2.0
"""A request that makes no sense is refused where it is made, and nobody else notices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio

import spanker
from spanker.errors import RequestError
from spanker.ggml.sampling import SamplingParams, uniform

BAD = [
    {"seed": 1.5},
    {"seed": None},
    {"top_k": 3.5},
    {"max_tokens": 2.5},
    {"temperature": "hot"},
    {"temperature": float("nan")},
    {"top_p": float("nan")},
]


@pytest.mark.parametrize("options", BAD, ids=str)
async def test_a_bad_option_disturbs_no_other_generation(
    tiny_model: Path, options: dict[str, object]
) -> None:
    async with spanker.open_fleet("soft:2", plan="tp") as fleet:
        model = await fleet.load(tiny_model)
        texts: list[str] = []

        async def bystander() -> None:
            texts.append(await model.generate("hello", max_tokens=40, ignore_eos=True).collect())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bystander)
            await trio.lowlevel.checkpoint()
            with pytest.raises(RequestError):
                model.generate("hello", **{"temperature": 1.0, **options})  # type: ignore[arg-type]
        assert len(texts[0]) > 0


async def test_token_ids_must_be_whole_and_may_be_numpys(tiny_model: Path) -> None:
    async with spanker.open_fleet("soft:1") as fleet:
        model = await fleet.load(tiny_model)
        with pytest.raises(RequestError, match="whole number"):
            await model.logits([1.0, 2.0])  # type: ignore[list-item]
        with pytest.raises(RequestError, match="whole number"):
            model.generate([1.5])  # type: ignore[list-item]
        ids = np.array([5, 6, 7])
        assert np.array_equal(await model.logits(ids), await model.logits([5, 6, 7]))


def test_a_numpy_seed_is_the_same_seed() -> None:
    seed = SamplingParams(seed=np.int64(5)).seed
    assert type(seed) is int
    assert uniform(seed, 7) == uniform(5, 7)
