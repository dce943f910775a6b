# SPDX-License-Identifier: Apache-2.0
"""SentencePiece tokenizers equal the sentencepiece package and the rule as it is said.

Where llama.cpp has rules of its own (spaces after special tokens, among them), the ids here were
compared with it.
"""

from __future__ import annotations

import io
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spanker.errors import ModelFormatError, RequestError, UnsupportedModelError
from spanker.ggml.chat import ChatTemplate
from spanker.ggml.detokenizer import StopMatcher, StreamDecoder
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.tokenizer import Tokenizer, TokenType
from spanker.testing import tiny_spm_vocabulary, write_gguf

UNK, BOS, EOS, FIRST_BYTE, FIRST = 0, 1, 2, 3, 259
ESCAPED = "\u2581"


def tiny(
    words: dict[str, float] | None = None,
    others: dict[str, TokenType] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Metadata: <unk>, <s>, </s>, all bytes, then `words` with their scores, then `others`."""
    words, others = words or {}, others or {}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *words, *others],
        "tokenizer.ggml.token_type": np.array(
            [*types, *(TokenType.NORMAL for _ in words), *others.values()], np.int32
        ),
        "tokenizer.ggml.scores": np.array(
            [0.0] * FIRST + [*words.values()] + [0.0] * len(others), np.float32
        ),
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


def build(*args: Any, **keys: Any) -> Tokenizer:
    return Tokenizer.from_metadata(tiny(*args, **keys))


def raw(text: str) -> list[int]:
    """`text` as byte tokens."""
    return [FIRST_BYTE + byte for byte in text.encode()]


LETTERS = dict.fromkeys(ESCAPED + "abcdefgh", -100.0)


# --- merging -------------------------------------------------------------------


def slow_ids(metadata: dict[str, Any], text: str) -> list[int]:
    """The rule as it is said, one merge after the other, over all of the text."""
    tokens = list(metadata["tokenizer.ggml.tokens"])
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list((" " + text).replace(" ", ESCAPED))
    while True:
        found = [
            (-scores[tokens.index(a + b)], i)
            for i, (a, b) in enumerate(pairwise(symbols))
            if a + b in tokens
        ]
        if not found:
            break
        i = min(found)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    out: list[int] = []
    for symbol in symbols:
        out += [tokens.index(symbol)] if symbol in tokens else raw(symbol)
    return out


# Tokens may have spaces at any place: then words are no boundary for merges.
WORDS = st.dictionaries(
    st.text(ESCAPED + "abé中", min_size=1, max_size=5),
    st.one_of(st.sampled_from([0.0, -1.0, -2.0]), st.floats(-9, 1, width=32)),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=300)
@given(WORDS, st.text(" abé中x\u2581\n😀", min_size=1, max_size=30))
@example({"a" + ESCAPED: 0.0, "a" + ESCAPED * 2: 0.0, ESCAPED * 2: 1.0}, "a  a   b a")
@example({ESCAPED + "a": 0.0, "b" + ESCAPED: 1.0, "b" + ESCAPED + "a": 0.0}, "ab a a")
@example({"-" + ESCAPED: 0.0, "]" + ESCAPED: 0.0, "^" + ESCAPED: 0.0}, "]^- a")
def test_ids_equal_the_slow_rule(words: dict[str, float], text: str) -> None:
    metadata = tiny(words)
    assert Tokenizer.from_metadata(metadata).encode(text, add_bos=False) == slow_ids(metadata, text)


def test_the_highest_score_merges_first_and_of_equal_ones_the_leftmost() -> None:
    tokenizer = build({**LETTERS, "ab": -2.0, "bc": -1.0}, add_space_prefix=False)
    a, ab, bc = (FIRST + len(LETTERS) + i for i in (-8, 0, 1))
    assert tokenizer.encode("abc", add_bos=False) == [a, bc]
    assert tokenizer.encode("ab", add_bos=False) == [ab]
    equal = build({**LETTERS, "ab": -1.0, "bc": -1.0}, add_space_prefix=False)
    assert equal.encode("abc", add_bos=False) == [ab, a + 2]


def test_long_words_take_no_longer_than_their_length_asks() -> None:
    tokenizer = build({**LETTERS, "aa": -1.0, "aaaa": -2.0, ESCAPED * 2: -1.0})
    begin = time.perf_counter()
    assert len(tokenizer.encode("a" * 100_000)) == 2 + 25_000
    assert len(tokenizer.encode(" " * 100_000)) == 2 + 50_000
    assert time.perf_counter() - begin < 4


# --- the sentencepiece package ---------------------------------------------------

SEED = 3
SCRIPTS = "aàáâãeèéêiìíoòóuùúñçß αβγδεζηθ абвгдежз अआइई 的一是不了人我在有他 のにはを 안녕하세요"


def sentences(rng: random.Random, count: int) -> list[str]:
    """Made-up text: words that come again, some of other scripts, numbers, runs of spaces."""
    syllables = ["".join(rng.choices("bcdfghklmnprstvw", k=1) + rng.choices("aeiou", k=2))]
    syllables += [rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(40)]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)]
    words += ["".join(rng.choices(SCRIPTS, k=rng.randint(1, 5))).strip() or "é" for _ in range(60)]
    out = []
    for _ in range(count):
        line = ""
        for _ in range(rng.randint(1, 20)):
            line += rng.choice(words) if rng.random() < 0.9 else str(rng.randrange(10_000))
            line += rng.choice([" ", " ", " ", "  ", ", ", ". ", "-", "    "])
        out.append(line)
    return out


SENTENCES = sentences(random.Random(SEED), 600)


@pytest.fixture(scope="module")
def trained() -> sentencepiece.SentencePieceProcessor:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES[:400]),
        model_writer=written,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.995,
        # as Llama's: the text as it is
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def metadata_of(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    ids = range(model.vocab_size())
    kinds = {i: TokenType.BYTE for i in ids if model.is_byte(i)}
    kinds |= {i: TokenType.CONTROL for i in ids if model.is_control(i)}
    kinds[model.unk_id()] = TokenType.UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.token_type": [int(kinds.get(i, TokenType.NORMAL)) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
    }


def test_a_trained_model_equals_the_sentencepiece_package(
    trained: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "vocabulary.gguf", metadata_of(trained), ())
    with GGUFFile(tmp_path / "vocabulary.gguf") as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    print("seed", SEED)
    rng = random.Random(SEED)
    texts = [*SENTENCES[400:], "a </s> <s><unk> <0x41>b"]
    letters = "abcdefgh   .,'\n\t0123456789éß中文字のハングル한국어😀👩‍👩‍👧\u2581\x00<0x41></s>"
    texts += ["".join(rng.choices(letters, k=rng.randrange(1, 60))) for _ in range(300)]
    used = set()
    for text in texts:
        ids = tokenizer.encode(text, special=False)
        assert ids == trained.encode(text, add_bos=True), text
        assert tokenizer.decode(ids) == trained.decode(ids), text
        used.update(ids)
    # both merged tokens and bytes
    assert len(used) > 500 and {i for i in used if trained.is_byte(i)}


# --- spaces and special tokens -----------------------------------------------------

SPACE, A, B = FIRST, FIRST + 1, FIRST + 2


def test_a_space_goes_before_the_text_and_after_special_tokens() -> None:
    tokenizer = build(LETTERS, {"<ctl>": TokenType.CONTROL, "<user>": TokenType.USER_DEFINED})
    ctl = FIRST + len(LETTERS)
    user = ctl + 1
    assert tokenizer.encode("a") == [BOS, SPACE, A]
    assert tokenizer.encode("a", add_bos=False) == [SPACE, A]
    assert tokenizer.encode(" a") == [BOS, SPACE, SPACE, A]
    assert tokenizer.encode("a<ctl>b") == [BOS, SPACE, A, ctl, SPACE, B]
    assert tokenizer.encode("<ctl> b") == [BOS, ctl, SPACE, SPACE, B]
    assert tokenizer.encode("a<user>b", special=False) == [BOS, SPACE, A, user, SPACE, B]
    assert tokenizer.encode("<ctl><ctl>") == [BOS, ctl, ctl]
    assert tokenizer.encode("") == [BOS]
    assert tokenizer.encode("<s>a</s>", add_bos=False) == [BOS, SPACE, A, EOS]


def test_no_space_goes_before_the_text_where_the_model_wants_none() -> None:
    tokenizer = build(LETTERS, {"<ctl>": TokenType.CONTROL}, add_space_prefix=False)
    assert tokenizer.encode("a<ctl>b a") == [BOS, A, FIRST + len(LETTERS), B, SPACE, A]
    assert tokenizer.decode([SPACE, A]) == " a"


def test_special_tokens_of_phi_3_swallow_the_spaces_after_them() -> None:
    others = {
        "<|user|>": TokenType.CONTROL,
        " e": TokenType.USER_DEFINED,
        "<|endoftext|>": TokenType.CONTROL,
    }
    metadata = tiny(LETTERS, others)
    user = FIRST + len(LETTERS)
    text = "<|user|> \n a<s> a e e"
    plain = Tokenizer.from_metadata(metadata).encode(text, add_bos=False)
    assert plain == [
        user,
        *[SPACE] * 2,
        *raw("\n"),
        SPACE,
        A,
        BOS,
        SPACE,
        SPACE,
        A,
        *[user + 1] * 2,
    ]
    metadata["general.name"] = "Phi-3 mini"
    swallowed = Tokenizer.from_metadata(metadata).encode(text, add_bos=False)
    # the space of the second " e" is gone, too
    assert swallowed == [user, SPACE, A, BOS, SPACE, SPACE, A, user + 1, SPACE, FIRST + 5]


def test_untrusted_text_never_becomes_a_control_token() -> None:
    # In llama.cpp it does, where the pieces are tokens, too.
    words = {"<": -9.0, "s": -9.0, ">": -9.0, "<s": -1.0, "/s>": -1.0, "/": -9.0, "s>": -2.0}
    tokenizer = build(words, add_space_prefix=False)
    less, s, _, begin, end, _, rest = range(FIRST, FIRST + len(words))
    assert tokenizer.encode("<s></s>", add_bos=False) == [BOS, EOS]
    ids = tokenizer.encode("<s></s>", special=False, add_bos=False)
    assert ids == [begin, FIRST + 2, less, end]
    assert tokenizer.decode(ids) == "<s></s>"
    assert s not in ids and rest not in ids


def test_bos_and_eos_have_defaults_that_the_file_can_change() -> None:
    tokenizer = build()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (BOS, EOS, True)
    assert tokenizer.stop_ids == {EOS}
    other = build(LETTERS, bos_token_id=UNK, eos_token_id=A, add_bos_token=False)
    assert (other.bos_id, other.eos_id, other.add_bos) == (UNK, A, False)
    assert other.stop_ids == {EOS, A}  # </s> ends a text by its name
    assert other.encode("a", add_bos=False) == other.encode("a") == [SPACE, A]


def test_a_character_without_bytes_is_the_unknown_token() -> None:
    metadata = tiny(LETTERS)
    metadata["tokenizer.ggml.tokens"][FIRST_BYTE + 0xE2] = "no byte"
    metadata["tokenizer.ggml.token_type"][FIRST_BYTE + 0xE2] = TokenType.NORMAL
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("a€é") == [BOS, SPACE, A, UNK, *raw("é")]
    metadata["tokenizer.ggml.unknown_token_id"] = B
    assert Tokenizer.from_metadata(metadata).encode("€") == [BOS, SPACE, B]


# --- decoding ------------------------------------------------------------------------


def test_the_space_before_a_text_is_taken_off_again() -> None:
    tokenizer = build(LETTERS, {"<user> \u2581": TokenType.USER_DEFINED})
    assert tokenizer.decode([SPACE, SPACE, A, SPACE, B]) == " a b"
    assert tokenizer.decode([BOS, SPACE, A]) == "a"
    assert tokenizer.decode([BOS, SPACE, A], skip_special=False) == "<s> a"
    assert tokenizer.decode([SPACE, A], continues=True) == " a"
    assert tokenizer.decode([A, SPACE]) == "a "
    assert tokenizer.decode([FIRST_BYTE + 0x20, A]) == "a"
    assert tokenizer.decode([]) == tokenizer.decode([BOS]) == tokenizer.decode([SPACE]) == ""
    # only in normal tokens does U+2581 stand for a space
    assert tokenizer.decode([FIRST + len(LETTERS)]) == "<user> \u2581"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=ESCAPED), max_size=40))
def test_any_text_survives_encode_and_decode(text: str) -> None:
    ids = ROUND_TRIP.encode(text, special=False)
    assert ROUND_TRIP.decode(ids) == text


ROUND_TRIP = build({**LETTERS, "ab": -1.0, ESCAPED + "a": -2.0, ESCAPED * 2: -3.0})


@given(st.lists(st.integers(0, FIRST + len(LETTERS) - 1) | st.sampled_from(raw("aé€😀"))))
def test_streamed_text_continues_the_prompt(ids: list[int]) -> None:
    stream = StreamDecoder(ROUND_TRIP)
    pieces = [stream.push(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == ROUND_TRIP.decode(ids, continues=True)


def test_a_character_made_of_byte_tokens_appears_whole() -> None:
    stream, matcher = StreamDecoder(ROUND_TRIP), StopMatcher(["é中"])
    ids = [SPACE, *raw("😀"), *raw("é"), A, *raw("é中b")]
    pieces = [stream.push(i) for i in ids]
    assert pieces == [" ", "", "", "", "😀", "", "é", "a", "", "é", "", "", "中", "b"]
    out = [matcher.push(piece) for piece in pieces]
    assert "".join(text for text, _ in out) == " 😀éa" and matcher.stopped


def test_bytes_and_texts_of_tokens() -> None:
    tokenizer = build(LETTERS)
    every = b"".join(tokenizer.token_bytes(FIRST_BYTE + byte) for byte in range(256))
    assert every == bytes(range(256))
    assert tokenizer.token_text(SPACE) == ESCAPED and tokenizer.token_bytes(SPACE) == b" "
    assert [tokenizer.is_special(i) for i in (UNK, BOS, EOS, FIRST_BYTE, A)] == [1, 1, 1, 0, 0]
    with pytest.raises(RequestError, match=r"outside the vocabulary 0..267"):
        tokenizer.token_bytes(268)


# --- chat ----------------------------------------------------------------------------

LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_templates_write_special_tokens_as_the_vocabulary_has_them() -> None:
    metadata = {**tiny_spm_vocabulary(400), "tokenizer.chat_template": LLAMA2}
    tokenizer = Tokenizer.from_metadata(metadata)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "there"},
        {"role": "user", "content": "so"},
    ]
    text = ChatTemplate.from_metadata(metadata, tokenizer).render(messages)
    assert text == "<s>[INST] hi [/INST] there </s><s>[INST] so [/INST]"
    ids = tokenizer.encode(text, add_bos=False)
    assert [i for i in ids if tokenizer.is_special(i)] == [BOS, EOS, BOS]
    assert tokenizer.decode(ids) == "[INST] hi [/INST] there  [INST] so [/INST]"


def test_the_tiny_vocabulary_has_a_template_that_ends_turns_with_eos() -> None:
    metadata = tiny_spm_vocabulary()
    tokenizer = Tokenizer.from_metadata(metadata)
    template = ChatTemplate.from_metadata(metadata, tokenizer)
    text = template.render([{"role": "user", "content": "hi"}])
    assert text == "<|user|>\nhi</s>\n<|assistant|>\n"
    assert tokenizer.encode(text).count(EOS) == 1


# --- files that are refused ------------------------------------------------------------


def with_byte_token(text: str) -> dict[str, Any]:
    tokens = [*tiny()["tokenizer.ggml.tokens"]]
    tokens[FIRST_BYTE] = text
    return {"tokens": tokens}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": None}, ModelFormatError, "tokens is missing"),
        ({"tokens": ["a"] * FIRST}, ModelFormatError, "holds the token 'a' twice"),
        ({"scores": None}, ModelFormatError, "scores is missing, expected 259 numbers"),
        ({"scores": np.zeros(258)}, ModelFormatError, "scores is .* 258, expected 259 numbers"),
        ({"scores": ["0"] * FIRST}, ModelFormatError, "expected 259 numbers"),
        ({"scores": np.full(FIRST, np.nan)}, ModelFormatError, "holds nan for token 0"),
        ({"token_type": np.full(FIRST, 7)}, UnsupportedModelError, "token 0 has type 7"),
        ({"token_type": np.full(FIRST, 0)}, UnsupportedModelError, "type 0, expected 1..6"),
        (with_byte_token("<0x1>"), ModelFormatError, "token 3 is of the type byte but is '<0x1>'"),
        (with_byte_token("<0xGG>"), ModelFormatError, "expected e.g. '<0x0A>'"),
        ({"add_space_prefix": 1}, ModelFormatError, "add_space_prefix is 1, expected a bool"),
        ({"unknown_token_id": 259}, ModelFormatError, "unknown_token_id is 259"),
        ({"remove_extra_whitespaces": True}, UnsupportedModelError, "remove_extra_whitespaces"),
        ({"precompiled_charsmap": np.zeros(9, np.uint8)}, UnsupportedModelError, "normalisation"),
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


def test_scores_beyond_float32_are_as_good_as_infinite() -> None:
    scores = np.array([0.0] * FIRST + [-1e300, 1e300])
    metadata = tiny({"a": 0.0, "aa": 0.0}, scores=scores)
    assert Tokenizer.from_metadata(metadata).encode("aa")[-1] == FIRST + 1


def test_a_vocabulary_without_the_default_tokens_has_none() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["a"],
        "tokenizer.ggml.scores": [0.0],
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.bos_id is None and tokenizer.eos_id is None and tokenizer.stop_ids == set()
    metadata["tokenizer.ggml.add_bos_token"] = True
    with pytest.raises(ModelFormatError, match="bos_token_id is missing"):
        Tokenizer.from_metadata(metadata)
