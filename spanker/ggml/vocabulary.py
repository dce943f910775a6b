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

import attrs
import numpy as np
import numpy.typing as npt

from spanker.errors import ModelFormatError, UnsupportedModelError
from spanker.ggml.gguf import StringArray

MAX_VOCABULARY = 1 << 21


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`, as in llama.h; other numbers are refused."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@attrs.frozen
class Vocabulary:
    """All tokens, by id and by text.

    `types` is mutable until the tokenizer is built: a token's text may tell
    more about its kind than the file does.
    """

    tokens: list[str] = attrs.field(repr=False)
    ids: dict[str, int] = attrs.field(repr=False)
    types: bytearray = attrs.field(repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], *, types: TokenType) -> Vocabulary:
        """Read and check tokens and types; a type above `types` is refused.

        Raises `ModelFormatError` and `UnsupportedModelError`.
        """
        tokens = strings(metadata, "tokens")
        if not 1 <= len(tokens) <= MAX_VOCABULARY:
            raise ModelFormatError(
                f"tokenizer.ggml.tokens holds {len(tokens)} tokens, expected 1..{MAX_VOCABULARY}"
            )
        if "" in tokens:  # as llama.cpp does
            tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ids) != len(tokens):
            twice = Counter(tokens).most_common(1)[0][0]
            raise ModelFormatError(f"tokenizer.ggml.tokens holds the token {twice[:40]!r} twice")
        return cls(tokens, ids, _types(metadata, len(tokens), types))

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


def strings(metadata: Mapping[str, object], name: str) -> list[str]:
    """The strings under `tokenizer.ggml.<name>`, a list of the caller's own."""
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    if isinstance(value, StringArray):
        return value.tolist()
    if isinstance(value, Sequence) and all(type(item) is str for item in value):
        return list(value)
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
