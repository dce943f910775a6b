# SPDX-License-Identifier: Apache-2.0
"""Streaming gives the text that decoding at once gives, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spanker.errors import RequestError
from spanker.ggml.detokenizer import MAX_STOP_CHARS, MAX_STOPS, StopMatcher, StreamDecoder
from spanker.ggml.tokenizer import Tokenizer


def vocabulary() -> Tokenizer:
    """Ids 0..255 are the bytes, 256 a word, 257 a control token, 258 half of a character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    chars = [chr(b) if b in printable else chr(256 + moved.index(b)) for b in range(256)]
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*chars, "Ġword", "<ctl>", chars[0xE2] + chars[0x82]],
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.token_type": [1] * 257 + [3, 1],
        }
    )


VOCABULARY = vocabulary()
IDS = st.lists(
    st.one_of(st.integers(0, 258), st.sampled_from([*"aé€😀".encode(), 257, 258])), max_size=30
)


@given(IDS, st.booleans())
@example([*"€".encode()[:2], 257, 0xAC], True)
@example([0xF0, 0x9F, 0x41, 0xF0], True)
@example([0xE0, 0x80, 0xED, 0xA0, 0x80], True)
def test_streamed_text_equals_decode(ids: list[int], skip_special: bool) -> None:
    stream = StreamDecoder(VOCABULARY, skip_special)
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == VOCABULARY.decode(ids, skip_special=skip_special)


def test_a_character_appears_with_its_last_byte() -> None:
    stream = StreamDecoder(VOCABULARY)
    assert [stream.push(byte) for byte in "😀".encode()] == ["", "", "", "😀"]
    assert (stream.push(258), stream.push(0xAC)) == ("", "€")
    assert stream.finish() == ""


def test_an_unfinished_character_becomes_a_replacement_at_finish() -> None:
    stream = StreamDecoder(VOCABULARY)
    assert (stream.push(258), stream.finish()) == ("", "�")


def test_control_tokens_show_only_when_asked() -> None:
    assert StreamDecoder(VOCABULARY).push(257) == ""
    assert StreamDecoder(VOCABULARY, skip_special=False).push(257) == "<ctl>"


def test_a_bad_id_is_refused() -> None:
    with pytest.raises(RequestError, match="outside the vocabulary"):
        StreamDecoder(VOCABULARY).push(259)


# --- stop strings -------------------------------------------------------------


def truth(text: str, stops: list[str]) -> tuple[str, bool]:
    """What may be emitted of `text` in all: cut at the stop that ends first, longest on a tie."""
    found = [
        (text.find(stop) + len(stop), text.find(stop)) for stop in stops if text.find(stop) >= 0
    ]
    return (text[: min(found)[1]], True) if found else (text, False)


def feed(matcher: StopMatcher, pieces: list[str]) -> tuple[str, bool]:
    out = "".join(matcher.push(piece)[0] for piece in pieces)
    return out + matcher.finish(), matcher.stopped


SMALL = st.text("ab\n", max_size=14)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


@given(st.lists(SMALL, max_size=8), STOPS)
@example(["abcd"], ["abcd", "bc"])
@example(["a", "ab"], ["aab"])
@example(["aabaa", "b"], ["aabaab", "ba"])
def test_any_split_gives_the_truth(pieces: list[str], stops: list[str]) -> None:
    assert feed(StopMatcher(stops), pieces) == truth("".join(pieces), stops)


@given(st.lists(SMALL, max_size=8), STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop(pieces: list[str], stops: list[str]) -> None:
    matcher, seen, out = StopMatcher(stops), "", ""
    for piece in pieces:
        safe, stopped = matcher.push(piece)
        seen, out = seen + piece, out + safe
        if stopped:
            break
        held = seen[len(out) :]
        assert held == max(
            (seen[-n:] for s in stops for n in range(1, len(s)) if seen.endswith(s[:n])),
            key=len,
            default="",
        )


def test_held_back_text_comes_out_when_it_is_no_stop() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push("Hi\nUse") == ("Hi", False)
    assert matcher.push("less") == ("\nUseless", False)
    assert matcher.push("\nUser") == ("", False)
    assert matcher.finish() == "\nUser"


def test_nothing_follows_a_stop() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("textEN") == ("text", False)
    assert matcher.push("D more") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.finish() == ""


def test_without_stops_everything_passes_at_once() -> None:
    assert StopMatcher([]).push("abc") == ("abc", False)


@pytest.mark.parametrize(
    "stops",
    [[""], ["a", ""], ["x" * (MAX_STOP_CHARS + 1)], ["a"] * (MAX_STOPS + 1), "ab", [3]],
)
def test_bad_stops_are_refused(stops: list[str]) -> None:
    with pytest.raises(RequestError, match="stop"):
        StopMatcher(stops)
