# SPDX-License-Identifier: Apache-2.0
"""A vocabulary finds its tokens, whatever they are, and says which string of a file is wrong."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from merging_oracle import BYTES

from spanker.errors import ModelFormatError
from spanker.ggml import native, vocabulary
from spanker.ggml.gguf import GGUFFile, StringArray
from spanker.ggml.tokenizer import Tokenizer
from spanker.ggml.vocabulary import TokenType, Vocabulary


def of(tokens: object, merges: object = ()) -> Vocabulary:
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    made = Vocabulary.from_metadata(metadata, types=TokenType.BYTE)
    made.add_merges(metadata)
    return made


def array(*items: bytes) -> StringArray:
    blob = b"".join(len(item).to_bytes(8, "little") + item for item in items)
    return StringArray(blob, len(items), "model.gguf: value of 'tokens'")


TEXTS = st.text(min_size=1, max_size=20) | st.sampled_from(["\0", "\0\0", "a" * 300, "é" * 70_000])


@given(st.lists(TEXTS, min_size=1, max_size=30, unique=True), TEXTS)
def test_tokens_are_found_by_id_and_by_text(tokens: list[str], other: str) -> None:
    for made in (of(tokens), of(array(*(token.encode() for token in tokens)))):
        assert len(made) == len(tokens)
        assert [made.text(i) for i in range(len(tokens))] == tokens
        assert [made.find(token) for token in tokens] == list(range(len(tokens)))
        assert (made.find(other) is not None) == (other in tokens)
        assert made.find("") is None
        for id in (-1, len(tokens)):
            with pytest.raises(IndexError):
                made.text(id)


@given(st.lists(st.sampled_from(["", "", "a", "b", "[EMPTY_1]", "[EMPTY_2]"]), min_size=1))
def test_empty_tokens_have_names_that_may_be_taken(tokens: list[str]) -> None:
    named = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(named)) == len(named):
        assert [of(tokens).text(i) for i in range(len(named))] == named
        return
    twice = max(named, key=named.count)
    with pytest.raises(ModelFormatError) as caught:
        of(tokens)
    assert str(caught.value) == f"tokenizer.ggml.tokens holds the token {twice!r} twice"


@given(st.lists(st.binary(max_size=6), max_size=4), st.binary(min_size=1, max_size=6))
@example([], b"\xed\xa0\x80")
@example([b"ok"], b"\xf4\x8f\xbf\xbf\xf4\x90\x80\x80")
@example([b"\xc3"], b"\xa9")
def test_tokens_that_are_not_utf8_are_named(before: list[bytes], last: bytes) -> None:
    items = [*dict.fromkeys([b"a", *before, last])]
    try:
        expected = [item.decode() or f"[EMPTY_{i}]" for i, item in enumerate(items)]
    except UnicodeDecodeError:
        with pytest.raises(ModelFormatError) as caught:
            of(array(*items))
        first = next(i for i, item in enumerate(items) if not is_utf8(item))
        assert str(caught.value) == (
            f"model.gguf: value of 'tokens': item {first} is not UTF-8: {items[first]!r}; "
            "the file is corrupt"
        )
    else:
        made = of(array(*items))
        assert [made.text(i) for i in range(len(items))] == expected


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_lists_with_lone_surrogates_are_refused() -> None:
    with pytest.raises(ModelFormatError, match=r"tokenizer.ggml.tokens: item 1 is not UTF-8"):
        of(["a", "\ud800"])
    with pytest.raises(ModelFormatError, match=r"tokenizer.ggml.merges: item 0 is not UTF-8"):
        of(["a", "b"], ["a \ud800"])


@pytest.mark.parametrize("before", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize(
    "wrong", ["ab", " ab", "ab ", "a c", "c a", "b a", "a b a", "a\0b a", "", " ", "x" * 99]
)
def test_the_first_merge_that_is_none_is_named(before: int, wrong: str) -> None:
    merges = ["a b"] * before + [wrong, "no merge"]
    for given_as in (merges, array(*(merge.encode() for merge in merges))):
        with pytest.raises(ModelFormatError) as caught:
            of(["a", "b", "ab"], given_as)
        assert str(caught.value) == (
            f"tokenizer.ggml.merges: {wrong[:80]!r} does not join two tokens into a third"
        )


def test_limits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_VOCABULARY", 3)
    monkeypatch.setattr(native, "MAX_MERGES", 1)
    with pytest.raises(ModelFormatError, match=r"holds 4 tokens, expected 1..3"):
        of(["a", "b", "ab", "c"])
    with pytest.raises(ModelFormatError, match="holds 2 merges, expected at most 1"):
        of(["a", "b", "ab"], ["a b", "a b"])


def test_tokens_that_begin_alike_and_end_alike_are_told_apart() -> None:
    # Of each length the first and last bytes are the same: where hashing reads words at a time.
    tokens = [
        f"ab{'x' * left}{c}{'x' * right}yz" for left in range(9) for right in range(9) for c in "cd"
    ]
    tokens = [*dict.fromkeys(tokens)]
    made = of(tokens)
    assert [made.find(token) for token in tokens] == list(range(len(tokens)))


def test_threads_share_a_tokenizer() -> None:
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*BYTES, "ab", "abab"],
        "tokenizer.ggml.merges": ["a b", "ab ab"],
    }
    tokenizer = Tokenizer.from_metadata(metadata)
    text = "abab ba abababx " * 2000
    expected = tokenizer.encode(text)
    wrong: list[int] = []

    def encode(number: int) -> None:
        if any(tokenizer.encode(text) != expected for _ in range(20)):
            wrong.append(number)

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


PEAK = """
import sys
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.tokenizer import Tokenizer
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1])
with GGUFFile(sys.argv[1]) as file:
    before = peak()
    tokenizer = Tokenizer.from_metadata(file.metadata)
    tokenizer.encode("Hello world")
    print(peak() - before)
"""


def test_a_real_vocabulary_takes_little_memory(smollm2_path: Path) -> None:
    run = [sys.executable, "-c", PEAK, str(smollm2_path)]
    peak_kib = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert peak_kib < 4 << 10


def test_a_vocabulary_outlives_its_file(smollm2_path: Path) -> None:
    with GGUFFile(smollm2_path) as file:
        made = Vocabulary.from_metadata(file.metadata, types=TokenType.UNUSED)
    assert made.find("<|im_start|>") == 1 and made.text(1) == "<|im_start|>"
