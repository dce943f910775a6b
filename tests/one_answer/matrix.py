# SPDX-License-Identifier: Apache-2.0
"""The one-answer matrix: what varies, what is generated, and the hashes that must come out.

Replay one case:  python tests/one_answer/matrix.py "soft:3@avx2" tp 7 alone
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import attrs
import trio

import spanker
from spanker.ggml import catalog
from spanker.native import isas

ROOT = Path(__file__).parents[2]
PROMPT_TOKENS = 640
GENERATED = 64
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 20261123}

# sha256 over the token ids (little-endian u32) and over the logits (little-endian float32) of all
# 64 positions.  These hold for every release: the kernel rules are final.
GREEDY = (
    "6f0c1b74be5822217625cfbf2e5eff504cb1ad888a164ff93eb53400395a9b7a",
    "6682776fc57fdf4d491559ecd1d7cd5db27c350d7392330840d836253e58cc44",
)
AT_0_8 = (
    "8d181e51e8dd29b125475e02a22891d99e0aa5d9336a2d346d15786b553f9443",
    "67d2adee2c71104cdfd0a3b13e77fafd0ad0eb0927955254c70b84148be400f0",
)


@attrs.frozen
class Case:
    """One way to compute the answer."""

    cards: str
    plan: str = "tp"
    chunk: int = 512
    batched: bool = False

    def __str__(self) -> str:
        return (
            f"{self.cards}-{self.plan}-chunk{self.chunk}-{'batched' if self.batched else 'alone'}"
        )

    @property
    def slow(self) -> bool:
        """Whether it takes ten times as long as most."""
        return self.chunk == 1 or "@scalar" in self.cards


async def answers(case: Case, path: Path, *, sampled: bool = True) -> list[tuple[str, str]]:
    """(tokens hash, logits hash) of the greedy and of the sampled generation."""
    async with spanker.open_fleet(case.cards, plan="tp") as fleet:
        model = await fleet.load(path, plan=case.plan, prompt_chunk=case.chunk, ctx=1024)
        text = (ROOT / "LICENSE").read_text()
        prompt = model.tokenize(text)[:PROMPT_TOKENS]
        assert len(prompt) == PROMPT_TOKENS
        out: list[tuple[str, str]] = []
        for options in ({}, SAMPLED)[: 1 + sampled]:
            async with trio.open_nursery() as nursery:
                if case.batched:
                    for number in range(3):
                        nursery.start_soon(_companion, model, prompt, number)
                out.append(await _hashes(model, prompt, options))
                nursery.cancel_scope.cancel()
        return out


async def _hashes(
    model: spanker.Model, prompt: list[int], options: dict[str, float]
) -> tuple[str, str]:
    tokens, logits = hashlib.sha256(), hashlib.sha256()
    count = 0
    async for token in model.generate(
        prompt, max_tokens=GENERATED, ignore_eos=True, logits=True, **options
    ):
        if token.id is None:
            continue
        assert token.logits is not None
        tokens.update(token.id.to_bytes(4, "little"))
        logits.update(token.logits.astype("<f4").tobytes())
        count += 1
    assert count == GENERATED
    return tokens.hexdigest(), logits.hexdigest()


async def _companion(model: spanker.Model, prompt: list[int], number: int) -> None:
    """Another sequence in the same steps: other tokens, length and sampling."""
    start = 100 * (number + 1)
    async for _ in model.generate(
        prompt[start : start + 30 + 17 * number],
        max_tokens=GENERATED * 4,
        ignore_eos=True,
        temperature=0.5 * number,
        seed=number,
    ):
        pass


def single_factor_cases() -> list[Case]:
    """Each factor alone, everything else as in one card, tensor parallel, chunk 512."""
    cases = [Case(f"soft:{n}") for n in range(1, 9)]
    cases += [Case(f"soft:{n}", f"pp{n}") for n in (2, 3, 5, 8)]
    cases += [Case("soft:4", "tp2xpp2"), Case("soft:6", "tp3xpp2")]
    cases += [Case(f"soft:2@{isa}") for isa in isas()]
    if len(isas()) > 1:
        cases.append(Case(f"soft:1@{isas()[0]},soft:1@{isas()[-1]},soft:1"))
    cases += [Case("soft:2", chunk=chunk) for chunk in (1, 7)]
    cases.append(Case("soft:2", batched=True))
    return cases


def pair_cases() -> list[Case]:
    """Two factors varied together: every card count and plan with every chunk, ISA and batching."""
    shapes = [(n, "tp") for n in range(1, 9)] + [(n, f"pp{n}") for n in range(2, 9)]
    shapes += [(4, "tp2xpp2"), (6, "tp3xpp2")]
    cases = []
    for cards, plan in shapes:
        cases += [Case(f"soft:{cards}", plan, chunk) for chunk in (7, 100)]
        cases.append(Case(f"soft:{cards}", plan, batched=True))
        cases += [Case(f"soft:{cards}@{isa}", plan) for isa in isas()]
    cases += [Case(f"soft:2@{isa}", chunk=chunk) for isa in isas() for chunk in (7, 100)]
    cases += [Case(f"soft:2@{isa}", batched=True) for isa in isas()]
    cases += [Case("soft:2", chunk=chunk, batched=True) for chunk in (7, 100)]
    single = single_factor_cases()
    return [case for case in single if case.slow] + sorted(set(cases) - set(single), key=str)


if __name__ == "__main__":
    _, cards, plan, chunk, company = sys.argv
    case = Case(cards, plan, int(chunk), company == "batched")
    greedy, sampled = trio.run(answers, case, catalog.pull("smollm2"))
    print(case, "greedy", *greedy, "as expected" if greedy == GREEDY else "DIFFERS")
    print(case, "sampled", *sampled, "as expected" if sampled == AT_0_8 else "DIFFERS")
