# SPDX-License-Identifier: Apache-2.0
"""The tokens of a model and their kinds, from the `tokenizer.ggml.*` keys of a GGUF file.

Here live the checks that every kind of tokenizer needs.  How text becomes
tokens does not live here.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spanker.errors import ModelFormatError, UnsupportedModelError
from spanker.ggml import native
from spanker.ggml.gguf import StringArray

MAX_VOCABULARY = native.MAX_TOKENS


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`, as in llama.h; other numbers are refused."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Vocabulary:
    """All tokens, by id and by text, and the merges of those that have some.

    Their text is kept natively and becomes a `str` when it is asked for.
    `types` is mutable until the tokenizer is built: a token's text may tell
    more about its kind than the file does.
    """

    def __init__(self, tokens: native.NativeVocabulary, types: bytearray) -> None:
        self.native = tokens
        self.types = types

    def __len__(self) -> int:
        return len(self.native)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], *, types: TokenType) -> Vocabulary:
        """Read and check tokens and types; a type above `types` is refused.

        Empty tokens get a name, as llama.cpp gives them.  Raises
        `ModelFormatError` and `UnsupportedModelError`.
        """
        tokens = strings(metadata, "tokens")
        if not 1 <= len(tokens) <= MAX_VOCABULARY:
            raise ModelFormatError(
                f"tokenizer.ggml.tokens holds {len(tokens)} tokens, expected 1..{MAX_VOCABULARY}"
            )
        try:
            made = native.NativeVocabulary(tokens.blob, len(tokens))
        except native.NotUTF8 as error:
            raise tokens.not_utf8(error.index) from None
        except native.TooMuchText:
            raise ModelFormatError(
                "tokenizer.ggml.tokens holds too much text, expected at most "
                f"{native.MAX_VOCABULARY_BYTES} bytes"
            ) from None
        except native.FoundTwice:
            named = (token or f"[EMPTY_{i}]" for i, token in enumerate(tokens))
            twice = Counter(named).most_common(1)[0][0]
            raise ModelFormatError(
                f"tokenizer.ggml.tokens holds the token {twice[:40]!r} twice"
            ) from None
        return cls(made, _types(metadata, len(tokens), types))

    def add_merges(self, metadata: Mapping[str, object]) -> None:
        """Read and check the merges: each is two tokens with a space between, that together are a
        token.  Raises `ModelFormatError`.
        """
        merges = strings(metadata, "merges")
        if len(merges) > native.MAX_MERGES:
            raise ModelFormatError(
                f"tokenizer.ggml.merges holds {len(merges)} merges, expected at most "
                f"{native.MAX_MERGES}"
            )
        try:
            self.native.add_merges(merges.blob, len(merges))
        except native.NotAMerge as error:
            raise ModelFormatError(
                f"tokenizer.ggml.merges: {merges[error.index][:80]!r} does not join two tokens "
                "into a third"
            ) from None

    def text(self, id: int) -> str:
        """The text of a token, which must be there."""
        return self.native.token(id).decode()

    def find(self, text: str) -> int | None:
        """The id of the token with this text."""
        return self.native.find(text.encode())

    def of_type(self, *kinds: TokenType) -> list[int]:
        """The ids of all tokens of these types, in order."""
        found: list[int] = np.flatnonzero(
            np.isin(np.frombuffer(self.types, np.uint8), kinds)
        ).tolist()
        return found


def _types(metadata: Mapping[str, object], count: int, most: TokenType) -> bytearray:
    value = metadata.get("tokenizer.ggml.token_type")
    if value is None:
        return bytearray([TokenType.NORMAL]) * count
    array = numbers(metadata, "token_type", count, "iu", f"{count} integers")
    wrong = (array < TokenType.NORMAL) | (array > most)
    if wrong.any():
        first = int(wrong.argmax())
        raise UnsupportedModelError(
            f"token {first} has type {array[first]}, expected {TokenType.NORMAL:d}..{most:d}"
        )
    return bytearray(array.astype(np.uint8).tobytes())


# --- keys by kind of value -----------------------------------------------------


def strings(metadata: Mapping[str, object], name: str) -> StringArray:
    """The strings under `tokenizer.ggml.<name>`."""
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    if isinstance(value, StringArray):
        return value
    if isinstance(value, Sequence) and all(type(item) is str for item in value):
        return StringArray(native.join_strings(value), len(value), key)
    raise ModelFormatError(f"{key} is {brief(value)}, expected an array of strings")


def numbers(
    metadata: Mapping[str, object], name: str, count: int, kinds: str, expected: str
) -> npt.NDArray[Any]:
    """The `count` numbers under `tokenizer.ggml.<name>`, of one of numpy's `kinds`."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in kinds or len(array) != count:
        raise ModelFormatError(f"tokenizer.ggml.{name} is {brief(value)}, expected {expected}")
    return array


def flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    """The bool under `tokenizer.ggml.<name>`."""
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise ModelFormatError(f"tokenizer.ggml.{name} is {brief(value)}, expected a bool")
    return value


def token_id(
    metadata: Mapping[str, object], name: str, count: int, default: int | None = None
) -> int | None:
    """The token id under `tokenizer.ggml.<name>`; `default`, where there is such a token."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return default if default is not None and default < count else None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise ModelFormatError(
            f"tokenizer.ggml.{name} is {brief(value)}, expected a token id 0..{count - 1}"
        )
    return value


def brief(value: object) -> str:
    """A value from the file, short enough for an error message."""
    if value is None:
        return "missing"
    if isinstance(value, (bool, int, float, str)):
        return repr(value)[:60]
    try:
        return f"{type(value).__name__} of length {len(value)}"  # type: ignore[arg-type]
    except TypeError:
        return type(value).__name__
