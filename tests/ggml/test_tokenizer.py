# SPDX-License-Identifier: Apache-2.0
"""Token ids equal llama.cpp's; splitting equals a slow splitter written from its rules."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from merging_oracle import BYTES
from tokenizers import pre_tokenizers

from spanker.errors import ModelFormatError, RequestError, UnsupportedModelError
from spanker.ggml.bpe import PRE_TOKENIZERS, PreTokenizer
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parent / "smollm2_tokens.json").read_text())
APACHE = Path("/usr/share/common-licenses/Apache-2.0")


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    with GGUFFile(smollm2_path) as file:
        return Tokenizer.from_metadata(file.metadata)


def tiny(
    *,
    tokens: list[str] | None = None,
    merges: list[str] | None = None,
    types: dict[int, int] | None = None,
    pre: str | None = "gpt-2",
    **keys: object,
) -> dict[str, Any]:
    """Metadata of a vocabulary of all bytes, then `tokens`; id of a byte is its value."""
    every = BYTES + (tokens or [])
    token_type = np.ones(len(every), np.int32)
    for i, kind in (types or {}).items():
        token_type[i] = kind
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": every,
        "tokenizer.ggml.merges": merges or [],
        "tokenizer.ggml.token_type": token_type,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    metadata.update({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    return metadata


def build(**keys: Any) -> Tokenizer:
    return Tokenizer.from_metadata(tiny(**keys))


# --- the real model -----------------------------------------------------------


@pytest.mark.parametrize("prompt", GOLDEN["prompts"], ids=lambda p: p["text"][:12])
def test_ids_and_text_equal_llama_cpp(smollm2: Tokenizer, prompt: dict[str, Any]) -> None:
    assert smollm2.encode(prompt["text"]) == prompt["ids"]
    assert smollm2.decode(prompt["ids"], skip_special=False) == prompt["text"]
    assert smollm2.decode(prompt["continuation_ids"]) == prompt["continuation"]


def test_long_text_equals_llama_cpp(smollm2: Tokenizer) -> None:
    if not APACHE.exists():
        pytest.skip(f"{APACHE} is missing")
    text = APACHE.read_text()
    ids = smollm2.encode(text)
    expected = GOLDEN["apache_first_ids"]
    assert ids[: len(expected)] == expected
    assert smollm2.decode(ids) == text


def test_properties_of_the_real_vocabulary(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.add_bos) == (1, 2, False)
    assert {smollm2.token_text(i) for i in smollm2.stop_ids} == {
        "<|endoftext|>",
        "<|im_end|>",
        "<reponame>",
    }
    assert [i for i in range(smollm2.vocab_size) if smollm2.is_special(i)] == list(range(17))
    assert smollm2.token_bytes(1) == b"<|im_start|>"


def test_control_texts_are_parsed_only_when_asked(smollm2: Tokenizer) -> None:
    assert smollm2.encode("<|im_end|>") == [2]
    plain = smollm2.encode("<|im_end|>", special=False)
    assert 2 not in plain and len(plain) > 1
    assert smollm2.decode(plain) == "<|im_end|>"
    assert smollm2.decode([2, 504, 2]) == "The"
    assert smollm2.decode([2, 504], skip_special=False) == "<|im_end|>The"


def test_bytes_the_vocabulary_lacks_vanish_without_joining_their_neighbours(
    smollm2: Tokenizer,
) -> None:
    assert smollm2.encode("!\x14!") == smollm2.encode("!") * 2
    assert smollm2.encode("!!") != smollm2.encode("!") * 2


# --- special tokens -----------------------------------------------------------


def test_longest_special_text_wins_wherever_it_stands() -> None:
    # llama.cpp cuts all of "bcde" before it looks for "abc", leftmost or not.
    both = build(tokens=["abc", "bcde"], types={256: 3, 257: 3})
    assert both.encode("abcdeabc") == [ord("a"), 257, 256]
    assert both.encode("abcde", special=False) == [*b"abcde"]


def test_special_lengths_count_bytes_not_characters() -> None:
    both = build(tokens=["aaaa", "a€€"], types={256: 3, 257: 3})
    assert both.encode("aaaa€€") == [*b"aaa", 257]


def test_user_defined_tokens_apply_always_and_are_text() -> None:
    tokenizer = build(tokens=["<think>", "<ctl>"], types={256: 4, 257: 3})
    assert tokenizer.encode("x<think><ctl>", special=False)[:2] == [ord("x"), 256]
    assert not tokenizer.is_special(256)
    assert tokenizer.decode([256, 257]) == "<think>"


def test_unused_and_unknown_tokens_are_special() -> None:
    tokenizer = build(tokens=["<unk>", "[pad9]"], types={256: 2, 257: 5})
    assert tokenizer.is_special(256) and tokenizer.is_special(257)
    assert tokenizer.encode("<unk>[pad9]") == [256, *b"[pad9]"]


def test_bos_as_the_model_says_or_as_asked() -> None:
    plain = build(tokens=["<s>"], types={256: 3}, bos_token_id=256)
    assert plain.encode("a") == [97]
    assert plain.encode("a", add_bos=True) == [256, 97]
    wanting = build(tokens=["<s>"], types={256: 3}, bos_token_id=256, add_bos_token=True)
    assert wanting.encode("") == [256]
    assert wanting.encode("a", add_bos=False) == [97]
    llama3 = build(tokens=["<s>"], types={256: 3}, bos_token_id=256, pre="llama-bpe")
    assert llama3.add_bos and llama3.encode("a") == [256, 97]
    with pytest.raises(RequestError, match="no BOS"):
        build().encode("a", add_bos=True)


def test_stop_ids_come_from_keys_and_texts() -> None:
    tokenizer = build(
        tokens=["</x>", "<turn>", "<|im_end|>", "<|eot_id|>"],
        types={256: 3, 257: 3, 258: 3},
        eos_token_id=256,
        eot_token_id=257,
    )
    assert tokenizer.stop_ids == {256, 257, 258, 259}
    assert tokenizer.eos_id == 256
    # a turn's end marked as text in the file is still no text
    assert tokenizer.is_special(259) and tokenizer.encode("<|eot_id|>") == [259]
    assert build().stop_ids == frozenset() and build().eos_id is None and build().bos_id is None


# --- merging and splitting ----------------------------------------------------


def test_merges_apply_by_rank_then_from_the_left() -> None:
    tokenizer = build(tokens=["bc", "ab", "abc"], merges=["b c", "a b", "ab c"])
    assert tokenizer.encode("abc") == [97, 256]
    assert tokenizer.encode("aab") == [97, 257]
    first_counts = build(tokens=["ab", "bc"], merges=["a b", "b c", "a b"])
    assert first_counts.encode("abc") == [256, 99]


def test_a_whole_word_token_needs_no_merge_for_llama3_only() -> None:
    keys: dict[str, Any] = {"tokens": ["hello"], "merges": [], "bos_token_id": 0}
    assert build(**keys, pre="llama-bpe").encode("hello", add_bos=False) == [256]
    assert build(**keys, pre="dbrx").encode("hello") == [*b"hello"]


Split = Callable[[str], list[str]]


def is_letter(char: str) -> bool:
    return char != "" and unicodedata.category(char)[0] == "L"


def is_number(char: str) -> bool:
    return char != "" and unicodedata.category(char)[0] == "N"


def is_space(char: str) -> bool:
    return char != "" and char.isspace() and char not in "\x1c\x1d\x1e\x1f"


def is_other(char: str) -> bool:
    return char != "" and not (is_letter(char) or is_number(char) or is_space(char))


def run(text: str, start: int, test: Callable[[str], bool], most: int = 10**9) -> int:
    end = start
    while end < len(text) and end - start < most and test(text[end]):
        end += 1
    return end


def space_end(text: str, start: int) -> int:
    r"""\s+(?!\S)|\s+ : a run of spaces leaves its last one to the word after it."""
    end = run(text, start, is_space)
    return end - 1 if end < len(text) and end - start > 1 else end


def split_gpt2(text: str) -> list[str]:
    words, at = [], 0
    while at < len(text):
        body = at + (text[at] == " ")
        end = at
        for suffix in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"):
            if text.startswith(suffix, at):
                end = at + len(suffix)
                break
        else:
            for test in (is_letter, is_number, is_other):
                if body < len(text) and test(text[body]):
                    end = run(text, body, test)
                    break
            else:
                end = space_end(text, at)
        words.append(text[at:end])
        at = end
    return words


def split_smollm(text: str) -> list[str]:
    parts, start = [], 0
    for i, char in enumerate(text):
        if is_number(char):
            parts += [text[start:i], char]
            start = i + 1
    parts.append(text[start:])
    return [word for part in parts for word in split_gpt2(part)]


def split_llama3(text: str, digits: int = 3) -> list[str]:
    words, at = [], 0
    while at < len(text):
        rest = text[at : at + 3].lower()
        char, following = text[at], text[at + 1 : at + 2]
        spaces = run(text, at, is_space)
        last_newline = max(text.rfind("\n", at, spaces), text.rfind("\r", at, spaces))
        body = at + (char == " ")
        if rest[:2] in ("'s", "'t", "'m", "'d"):
            end = at + 2
        elif rest in ("'re", "'ve", "'ll"):
            end = at + 3
        elif is_letter(char) or (
            is_letter(following) and char not in "\r\n" and not is_number(char)
        ):
            end = run(text, at + 1, is_letter)
        elif is_number(char):
            end = run(text, at, is_number, digits)
        elif body < len(text) and is_other(text[body]):
            end = run(text, run(text, body, is_other), lambda c: c in "\r\n")
        elif last_newline >= 0:
            end = last_newline + 1
        else:
            end = space_end(text, at)
        words.append(text[at:end])
        at = end
    return words


# Letters, digits and spaces of several scripts, contractions, marks, emoji; assigned long ago,
# so that every Unicode table agrees on them.
ALPHABET = "aZsStTé中ſK1٣²Ⅷ'’ \u00a0\u2003\u3000\n\r\t\x0b\x85\x1c.,!_-€$\u0301\u200d😀\U000e0001"
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(ALPHABET),
        st.sampled_from(["'s", "'re", "'LL", "'Ve", "  ", "\r\n", " a", "12345", "\n\n  x"]),
    ),
    max_size=24,
).map("".join)


@pytest.mark.parametrize(
    ("pre", "split"),
    [
        ("gpt-2", split_gpt2),
        ("smollm", split_smollm),
        ("llama-bpe", split_llama3),
        ("qwen2", lambda text: split_llama3(text, 1)),
    ],
)
def test_words_equal_the_slow_splitter(pre: str, split: Split) -> None:
    # All ASCII and other texts go different ways.
    @settings(deadline=None, max_examples=300)
    @given(st.one_of(TEXTS, st.text(st.characters(max_codepoint=127), max_size=24)))
    @example("it'ſ 'S")  # folds to s in some engines, not in llama.cpp
    @example("a  1  ١ b  ")
    @example(" \n \r\n  x")
    @example("a  1  b  'LL can't've\x1c \x0b\x0c12345.\n\n  ")
    def check(text: str) -> None:
        assert PRE_TOKENIZERS[pre].split(text) == split(text)

    check()


@pytest.mark.parametrize("pattern", sorted({pre.pattern for pre in PRE_TOKENIZERS.values()}))
def test_lines_are_cut_into_words_as_the_whole_text_is(pattern: str) -> None:
    seed = 11
    print("seed", seed)
    rng = random.Random(seed)
    whole = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    for _ in range(1000):
        text = "é" + "".join(rng.choices("aSé 1'.\n\n\r\t中", k=40))
        expected = [word for word, _ in whole.pre_tokenize_str(text)]
        assert PreTokenizer(pattern).split(text) == expected, text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_encode_and_decode(text: str) -> None:
    tokenizer = ROUND_TRIP
    assert tokenizer.decode(tokenizer.encode(text)) == text


ROUND_TRIP = build(tokens=["ab", "Ġa"], merges=["a b", "Ġ a"])


# --- bytes of tokens ----------------------------------------------------------


def test_token_bytes_of_every_byte_and_of_plain_added_tokens() -> None:
    tokenizer = build(tokens=["日本 x", "<c>"], types={257: 3})
    assert b"".join(map(tokenizer.token_bytes, range(256))) == bytes(range(256))
    assert tokenizer.token_bytes(256) == "日本 x".encode()
    assert tokenizer.token_bytes(257) == b"<c>"
    assert tokenizer.decode([0xE2, 0x82]) == "�"
    assert tokenizer.decode([0xE2, 0x82, 0xAC]) == "€"


@pytest.mark.parametrize("id", [-1, 256, 10**12])
def test_ids_outside_the_vocabulary_are_refused(id: int) -> None:
    tokenizer = build()
    calls: list[Callable[[], object]] = [
        lambda: tokenizer.token_bytes(id),
        lambda: tokenizer.token_text(id),
        lambda: tokenizer.is_special(id),
        lambda: tokenizer.decode([id]),
    ]
    for call in calls:
        with pytest.raises(RequestError, match=f"{id} is outside the vocabulary 0..255"):
            call()


def test_text_without_utf8_form_is_refused() -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        build().encode("a\ud800")


# --- files that are refused ---------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "bert"}, UnsupportedModelError, "model 'bert' .* supported: 'gpt2' .* 'llama'"),
        ({"model": None}, ModelFormatError, "holds no tokenizer"),
        ({"pre": "default"}, UnsupportedModelError, "pre-tokenizer 'default' .* smollm"),
        ({"pre": None}, UnsupportedModelError, "a missing pre-tokenizer"),
        ({"pre": 7}, UnsupportedModelError, "pre-tokenizer 7"),
        ({"tokens": None}, ModelFormatError, "tokens is missing"),
        ({"tokens": np.zeros(3)}, ModelFormatError, "tokens is ndarray of length 3"),
        ({"tokens": []}, ModelFormatError, "holds 0 tokens"),
        ({"tokens": ["a", "b", "a"]}, ModelFormatError, "holds the token 'a' twice"),
        ({"token_type": np.ones(5, np.int32)}, ModelFormatError, "expected 256 integers"),
        ({"token_type": np.ones(256)}, ModelFormatError, "expected 256 integers"),
        ({"token_type": np.full(256, 6)}, UnsupportedModelError, "token 0 has type 6"),
        ({"merges": None}, ModelFormatError, "merges is missing"),
        ({"merges": ["a b"]}, ModelFormatError, "'a b' does not join two tokens into a third"),
        ({"merges": ["ab"]}, ModelFormatError, "'ab' does not join"),
        ({"merges": [" a"]}, ModelFormatError, "' a' does not join"),
        # as many spaces as merges, and all words are tokens
        ({"merges": ["a b a", "b"]}, ModelFormatError, "'a b a' does not join"),
        ({"merges": ["a\0b a"]}, ModelFormatError, "does not join"),
        ({"bos_token_id": 256}, ModelFormatError, "bos_token_id is 256, expected .* 0..255"),
        ({"eos_token_id": True}, ModelFormatError, "eos_token_id is True"),
        ({"add_bos_token": 1}, ModelFormatError, "add_bos_token is 1, expected a bool"),
        ({"add_bos_token": True}, ModelFormatError, "bos_token_id is missing"),
        ({"add_eos_token": True}, UnsupportedModelError, "add_eos_token is true"),
    ],
)
def test_a_vocabulary_that_is_not_understood_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    metadata = tiny()
    for key, value in change.items():
        if value is None:
            del metadata[f"tokenizer.ggml.{key}"]
        else:
            metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(error, match=message) as caught:
        Tokenizer.from_metadata(metadata)
    assert "\n" not in str(caught.value)


def test_empty_tokens_get_a_name_of_their_own() -> None:
    tokenizer = build(tokens=["", ""])
    assert tokenizer.token_text(256) == "[EMPTY_256]"
    assert tokenizer.token_text(257) == "[EMPTY_257]"
