# SPDX-License-Identifier: Apache-2.0
"""Native merging gives the ids of the plain rule, and those of the `tokenizers` library."""

from __future__ import annotations

import random
import string
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from merging_oracle import BYTES, SPACE, BPEOracle, SPMOracle, merge, slow_merge
from tokenizers import models, pre_tokenizers

from spanker.ggml.gguf import GGUFFile
from spanker.ggml.tokenizer import Tokenizer, TokenType
from spanker.testing import write_gguf

# --- the oracle -------------------------------------------------------------------------

PARTS = st.text("abc", min_size=1, max_size=3)
RANKS = st.floats(-3, 3) | st.integers(-2, 2)


@settings(deadline=None)
@given(st.text("abcd", max_size=30), st.dictionaries(st.text("abc", max_size=6), RANKS))
def test_the_oracle_merges_by_the_text_of_a_pair(text: str, ranks: dict[str, float]) -> None:
    assert merge(list(text), ranks, "") == slow_merge(list(text), ranks, "")


@settings(deadline=None)
@given(
    st.text("abcd", max_size=30),
    st.dictionaries(st.tuples(PARTS, PARTS).map(" ".join), RANKS, max_size=30),
)
def test_the_oracle_merges_by_the_parts_of_a_pair(text: str, ranks: dict[str, float]) -> None:
    assert merge(list(text), ranks, " ") == slow_merge(list(text), ranks, " ")


# --- byte-level BPE ---------------------------------------------------------------------


def bpe_metadata(
    tokens: list[str], merges: list[str], pre: str = "dbrx", **keys: Any
) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


def encode(metadata: dict[str, Any], text: str, **keys: Any) -> list[int]:
    return Tokenizer.from_metadata(metadata).encode(text, add_bos=False, **keys)


@st.composite
def bpe_vocabularies(draw: st.DrawFn, letters: str = "abcdeĠĊÃ©") -> tuple[list[str], list[str]]:
    """Letters, some of which may be missing, and merges of what there is already; some make the
    same token, some come again, and some join tokens that no word can have."""
    tokens = list(letters)
    if draw(st.booleans()):
        tokens += ["x y", "bx y", "日", "y日", ""]
    merges: list[str] = ["b x y"] if "bx y" in tokens else []
    for _ in range(draw(st.integers(0, 14))):
        pair = draw(st.tuples(*[st.sampled_from([t for t in tokens if t and " " not in t])] * 2))
        merges.append(" ".join(pair))
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
    return draw(st.permutations(tokens)), draw(st.permutations(merges))


@settings(deadline=None, max_examples=300)
@given(
    bpe_vocabularies(),
    st.text("abcde \né€xy日", max_size=40) | st.text("ab", max_size=200),
    st.sampled_from(["dbrx", "gpt-2", "smollm", "llama-bpe", "qwen2"]),
)
@example((["a"], []), "aba", "gpt-2")
def test_ids_equal_the_rule(made: tuple[list[str], list[str]], text: str, pre: str) -> None:
    metadata = bpe_metadata(*made, pre=pre, bos_token_id=0)
    assert encode(metadata, text) == BPEOracle(metadata).encode(text)


@settings(deadline=None)
@given(bpe_vocabularies("abcde"), st.text("abcde", max_size=40))
def test_ids_equal_the_tokenizers_library(made: tuple[list[str], list[str]], text: str) -> None:
    tokens = [token for token in made[0] if token and " " not in token]
    merges = [pair for pair in dict.fromkeys(made[1]) if pair.count(" ") == 1]
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(pair.split(" ")) for pair in merges],
        )
    )
    assert encode(bpe_metadata(tokens, merges), text) == library.encode(text).ids


def test_a_real_vocabulary_equals_the_rule_and_the_tokenizers_library(smollm2_path: Path) -> None:
    with GGUFFile(smollm2_path) as file:
        ours = Tokenizer.from_metadata(file.metadata)
        oracle = BPEOracle(file.metadata)
    library = tokenizers.Tokenizer(
        models.BPE(vocab=oracle.ids, merges=[tuple(pair.split(" ")) for pair in oracle.ranks])
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
        ids = ours.encode(text)
        assert ids == oracle.encode(text), text
        assert ids == library.encode(text).ids, text


def random_vocabulary(rng: random.Random, letters: str, count: int, most: int) -> list[str]:
    """Merges whose results are merged again, in an order of their own."""
    tokens = list(letters)
    merges: dict[str, None] = {}
    known = set(tokens)
    while len(tokens) < count:
        left, right = rng.choice(tokens), rng.choice(tokens)
        if len(left + right) <= most:
            merges[f"{left} {right}"] = None
            if left + right not in known:
                known.add(left + right)
                tokens.append(left + right)
    order = list(merges)
    rng.shuffle(order)
    return order


@pytest.mark.parametrize("seed", range(4))
def test_large_random_vocabularies_equal_the_rule(seed: int, tmp_path: Path) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    merges = random_vocabulary(rng, "abcdefĠé", 3000, 9)
    tokens = [*BYTES, *dict.fromkeys(pair.replace(" ", "") for pair in merges)]
    rng.shuffle(tokens)
    metadata = bpe_metadata(tokens, merges, pre="gpt-2")
    write_gguf(tmp_path / "vocabulary.gguf", metadata, ())
    with GGUFFile(tmp_path / "vocabulary.gguf") as file:
        from_file = Tokenizer.from_metadata(file.metadata)
    from_lists = Tokenizer.from_metadata(metadata)
    oracle = BPEOracle(metadata)
    for _ in range(60):
        text = "".join(rng.choices("abcdef \u00e9\x01", k=rng.randrange(300)))
        assert from_file.encode(text) == from_lists.encode(text) == oracle.encode(text)


def test_long_words_equal_the_rule_in_n_log_n() -> None:
    seed = 7
    print("seed", seed)
    rng = random.Random(seed)
    merges = random_vocabulary(rng, "ab", 400, 30)
    tokens = [*"ab", *dict.fromkeys(pair.replace(" ", "") for pair in merges)]
    metadata = bpe_metadata(tokens, merges)
    tokenizer, oracle = Tokenizer.from_metadata(metadata), BPEOracle(metadata)
    for text in ("a" * 100_000, "".join(rng.choices("ab", k=100_000)), "ab" * 50_000):
        begin = time.perf_counter()
        ids = tokenizer.encode(text)
        assert time.perf_counter() - begin < 1
        assert ids == oracle.encode(text)


# --- SentencePiece ----------------------------------------------------------------------

KINDS = st.sampled_from(
    [TokenType.NORMAL] * 4 + [TokenType.CONTROL, TokenType.UNUSED, TokenType.UNKNOWN]
)
SCORES = st.sampled_from([0.0, -0.0, -1.0, 1.0, -1e300, 1e300, float("inf")]) | st.floats(-9, 9)


@settings(deadline=None, max_examples=400)
@given(
    st.dictionaries(
        st.text("ab" + SPACE + "é中😀", min_size=1, max_size=5),
        st.tuples(KINDS, SCORES),
        min_size=1,
        max_size=30,
    ),
    st.sets(
        st.sampled_from(["a", " ", "é", "中", "😀"]).flatmap(lambda c: st.sampled_from(c.encode()))
    ),
    st.text("ab é中😀\n" + SPACE, max_size=40),
    st.booleans(),
    st.booleans(),
)
def test_spm_ids_equal_the_rule(
    words: dict[str, tuple[TokenType, float]],
    missing: set[int],
    text: str,
    prefix: bool,
    special: bool,
) -> None:
    every = [f"<0x{byte:02X}>" for byte in range(256) if byte not in missing]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*words, *every],
        "tokenizer.ggml.token_type": np.array(
            [kind for kind, _ in words.values()] + [TokenType.BYTE] * len(every), np.int32
        ),
        "tokenizer.ggml.scores": [score for _, score in words.values()] + [0.0] * len(every),
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.unknown_token_id": len(words) - 1,
    }
    # Those that are cut out before are no part of the rule.
    cut = [
        t for t, (k, _) in words.items() if special and k in (TokenType.CONTROL, 2) and t in text
    ]
    if text and not cut:
        expected = SPMOracle(metadata, markup=special).encode(text)
        assert encode(metadata, text, special=special) == expected


@pytest.mark.parametrize("seed", range(4))
def test_large_random_spm_vocabularies_equal_the_rule(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    letters = "abcdefé中" + SPACE
    merges = random_vocabulary(rng, letters, 2000, 8)
    words = [*letters, *dict.fromkeys(pair.replace(" ", "") for pair in merges)]
    every = [f"<0x{byte:02X}>" for byte in range(256)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*every, *words],
        "tokenizer.ggml.token_type": [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(words),
        "tokenizer.ggml.scores": [rng.randrange(-300, 3) for _ in range(256 + len(words))],
    }
    metadata["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"], np.float32)
    tokenizer, oracle = Tokenizer.from_metadata(metadata), SPMOracle(metadata, markup=True)
    for _ in range(60):
        text = "".join(rng.choices("abcdefé中   x\n😀", k=rng.randrange(1, 300)))
        assert tokenizer.encode(text, add_bos=False) == oracle.encode(text)
