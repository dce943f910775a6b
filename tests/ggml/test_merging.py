# SPDX-License-Identifier: Apache-2.0
"""Merging gives what the plain rule gives, and what the `tokenizers` library gives."""

from __future__ import annotations

import random
import string
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from spanker.ggml import merging
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.merging import CACHED_WORD_CHARS, WordCache, merge
from spanker.ggml.tokenizer import Tokenizer


def slow_merge(symbols: list[str], ranks: dict[str, float], joint: str) -> list[str]:
    """The rule as it is said: again and again the leftmost of the pairs with the lowest rank."""
    symbols = list(symbols)
    while True:
        found = [
            (ranks[a + joint + b], i)
            for i, (a, b) in enumerate(pairwise(symbols))
            if a + joint + b in ranks
        ]
        if not found:
            return symbols
        i = min(found)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


PARTS = st.text("abc", min_size=1, max_size=3)
RANKS = st.floats(-3, 3) | st.integers(-2, 2)


@settings(deadline=None)
@given(st.text("abcd", max_size=30), st.dictionaries(st.text("abc", max_size=6), RANKS))
def test_merging_by_the_text_of_a_pair(text: str, ranks: dict[str, float]) -> None:
    assert merge(list(text), ranks, "") == slow_merge(list(text), ranks, "")


@settings(deadline=None)
@given(
    st.text("abcd", max_size=30),
    st.dictionaries(st.tuples(PARTS, PARTS).map(" ".join), RANKS, max_size=30),
)
def test_merging_by_the_parts_of_a_pair(text: str, ranks: dict[str, float]) -> None:
    assert merge(list(text), ranks, " ") == slow_merge(list(text), ranks, " ")


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    """Letters, and merges of what there is already, some of them making the same token."""
    tokens = list("abcde")
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(0, 12))):
        pair = draw(st.tuples(st.sampled_from(tokens), st.sampled_from(tokens)))
        if pair not in merges:
            merges.append(pair)
            if "".join(pair) not in tokens:
                tokens.append("".join(pair))
    return tokens, draw(st.permutations(merges))


@settings(deadline=None)
@given(vocabularies(), st.text("abcde", max_size=40))
def test_merging_equals_the_tokenizers_library(
    made: tuple[list[str], list[tuple[str, str]]], text: str
) -> None:
    tokens, merges = made
    library = tokenizers.Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    ranks = {" ".join(pair): float(rank) for rank, pair in enumerate(merges)}
    assert merge(list(text), ranks, " ") == library.encode(text).tokens


def test_a_real_vocabulary_equals_the_tokenizers_library(smollm2_path: Path) -> None:
    with GGUFFile(smollm2_path) as file:
        ours = Tokenizer.from_metadata(file.metadata)
        tokens = list(file.metadata["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
        merges = list(file.metadata["tokenizer.ggml.merges"])  # type: ignore[call-overload]
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(pair.split(" ")) for pair in merges],
        )
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    seed = 20
    print("seed", seed)
    rng = random.Random(seed)
    letters = (
        string.ascii_letters
        + "      \n\n''.,!?-(){}0123456789äöüßéñłøабвгдеж中文字日本語한국어😀👍"
    )
    for _ in range(300):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(200)))
        if rng.random() < 0.5:
            words = (ours.decode([rng.randrange(17, 49152)]) for _ in range(rng.randrange(60)))
            text += "".join(words).replace("�", "")
        assert ours.encode(text) == library.encode(text).ids, text


# --- remembering words --------------------------------------------------------


def test_words_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "CACHED_WORDS", 3)
    asked: list[str] = []

    def encode(word: str) -> tuple[int, ...]:
        asked.append(word)
        return tuple(map(ord, word))

    cache = WordCache(encode)
    long = "x" * (CACHED_WORD_CHARS + 1)
    words = ["a", "b", "a", "c", "b", long, "d", "d", "a", long]
    assert cache.ids(words) == [ord(char) for word in words for char in word]
    # The fourth word finds the cache full; the long one is never kept.
    assert asked == ["a", "b", "c", long, "d", "a", long]
