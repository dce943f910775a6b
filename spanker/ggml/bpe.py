# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE, the tokenizer of GPT-2 and its heirs (`tokenizer.ggml.model` = "gpt2").

Text is cut into words by a pattern, a word's bytes are written as characters
of GPT-2's alphabet, and these are merged by the model's list of merges.

The ids equal llama.cpp's (src/llama-vocab.cpp, src/unicode.cpp) for the
pre-tokenizers listed below; every other one is refused by name, because nearly
the right tokens give quietly worse text.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping

import attrs

from spanker.errors import UnsupportedModelError
from spanker.ggml.native import NativeBPE
from spanker.ggml.vocabulary import TokenType, Vocabulary
from spanker.values import Value

Splitter = Callable[[str], list[str]]


# --- cutting text into words ---------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class PreTokenizer(Value):
    r"""How text is cut into words before merging.

    Every text is a row of matches of `pattern`, which writes \p{L} and \p{N}
    only within brackets.  `whole_words`: a word that is itself a token is
    taken without merging.
    """

    pattern: str
    whole_words: bool = False
    add_bos: bool = False

    def split(self, text: str) -> list[str]:
        """The words of `text`; joined, they are `text`."""
        if text.isascii():
            return _ascii_splitter(self.pattern)(text)
        # A few characters beyond ASCII do not make all of a text slow.
        words: list[str] = []
        for is_ascii, lines in itertools.groupby(_BETWEEN_WORDS.split(text), str.isascii):
            splitter = _ascii_splitter if is_ascii else _unicode_splitter
            words += splitter(self.pattern)("".join(lines))
        return words


# Here a word ends by every pattern below, and does so without looking at what follows: the line
# feed is no letter, is all there is of its run of spaces, and goes with none of the letters after.
_BETWEEN_WORDS = re.compile(r"(?<=[!-~]\n)(?=[A-Za-z])")


@functools.lru_cache(maxsize=8)
def _ascii_splitter(pattern: str) -> Splitter:
    # Ten times as fast as the library, which matters for long prompts.
    ascii_only = pattern.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")
    return re.compile(ascii_only, re.ASCII).findall


@functools.lru_cache(maxsize=8)
def _unicode_splitter(pattern: str) -> Splitter:
    # Python's own patterns know no \p{L}.
    import tokenizers
    from tokenizers import pre_tokenizers

    splitter = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return lambda text: [word for word, _ in splitter.pre_tokenize_str(text)]


_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
# A run of spaces leaves its last one to the word after it.
_GPT2_WORDS = _CONTRACTIONS + r"| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Every digit is cut off first: for the spaces before it, the text ends there.
_DIGITS_GPT2_WORDS = _CONTRACTIONS + r"|[\p{N}]| ?[\p{L}]+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def _llama3_words(digits: str) -> str:
    """The Llama 3 family's word pattern, with its rule for digits."""
    return (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        r"|[^\r\n\p{L}\p{N}]?[\p{L}]+"
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = PreTokenizer(_GPT2_WORDS)
_DIGITS_GPT2 = PreTokenizer(_DIGITS_GPT2_WORDS)
_LLAMA3 = PreTokenizer(_llama3_words(r"[\p{N}]{1,3}"), whole_words=True, add_bos=True)
_DBRX = PreTokenizer(_llama3_words(r"[\p{N}]{1,3}"))
_QWEN2 = PreTokenizer(_llama3_words(r"[\p{N}]"))

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "exaone": _DIGITS_GPT2,
    "minerva-7b": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "dbrx": _DBRX,
    "smaug-bpe": _DBRX,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "stablelm2": _QWEN2,
}


def _pre_tokenizer(metadata: Mapping[str, object]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if isinstance(name, str) and name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    found = "a missing pre-tokenizer" if name is None else f"pre-tokenizer {name!r}"
    raise UnsupportedModelError(
        f"{found} (tokenizer.ggml.pre) is not supported; supported: "
        + ", ".join(sorted(PRE_TOKENIZERS))
    )


# --- bytes as characters -------------------------------------------------------


def _byte_alphabet() -> tuple[str, ...]:
    """The character that stands for each byte in byte-level BPE (GPT-2's encoder.py).

    Printable Latin-1 stands for itself; the rest is moved up past U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(moved)) for byte in range(256))


_ALPHABET = _byte_alphabet()
_BYTE_OF = {char: byte for byte, char in enumerate(_ALPHABET)}


# --- the encoding --------------------------------------------------------------


class ByteLevelBPE:
    """Encodes text that holds no special tokens; see `tokenizer.Encoding`."""

    drops_first_space = False
    default_bos_id: int | None = None
    default_eos_id: int | None = None

    def __init__(self, vocabulary: Vocabulary, pre: PreTokenizer) -> None:
        self._vocabulary = vocabulary
        self._pre = pre
        self.add_bos = pre.add_bos
        self._native = NativeBPE.make(vocabulary.native, _ALPHABET, whole_words=pre.whole_words)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> ByteLevelBPE:
        """Raises `ModelFormatError` and `UnsupportedModelError`."""
        pre = _pre_tokenizer(metadata)
        vocabulary = Vocabulary.from_metadata(metadata, types=TokenType.UNUSED)
        vocabulary.add_merges(metadata)
        return cls(vocabulary, pre)

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    def encode(self, text: str, *, markup: bool, after_special: bool) -> list[int]:
        # Words are merged in themselves, so neither argument makes a difference.  Bytes that the
        # vocabulary lacks vanish; no merge reaches over their place.
        return self._native.encode(text, self._pre.split(text))

    def token_bytes(self, id: int) -> bytes:
        token = self._vocabulary.text(id)
        if self._vocabulary.types[id] == TokenType.NORMAL:
            try:
                return bytes(map(_BYTE_OF.__getitem__, token))
            except KeyError:
                pass  # an added token, stored as plain text
        return token.encode()
