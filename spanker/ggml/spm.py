# SPDX-License-Identifier: Apache-2.0
"""SentencePiece BPE, the tokenizer of Llama 1 and 2, TinyLlama and Mistral
(`tokenizer.ggml.model` = "llama").

A space is written as U+2581, and neighbouring characters are merged as long as
they make a token, the one with the highest score first.  What is no token in
the end is written byte by byte.

The ids equal llama.cpp's (llm_tokenizer_spm in src/llama-vocab.cpp), save that
text never becomes markup where the caller excludes that, and that a character
for which the vocabulary has no bytes becomes the unknown token.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from spanker.errors import ModelFormatError, UnsupportedModelError
from spanker.ggml.native import NativeSPM
from spanker.ggml.vocabulary import (
    TokenType,
    Vocabulary,
    brief,
    flag,
    numbers,
    token_id,
)

SPACE = "\u2581"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class SentencePiece:
    """Encodes text that holds no special tokens; see `tokenizer.Encoding`."""

    add_bos = True
    # llama.cpp's, for files that do not name them.
    default_bos_id: int | None = 1
    default_eos_id: int | None = 2

    def __init__(
        self,
        vocabulary: Vocabulary,
        scores: npt.NDArray[np.float32],
        *,
        add_space_prefix: bool,
        unknown_id: int,
    ) -> None:
        self._vocabulary = vocabulary
        self._scores = scores
        self._prefix = SPACE if add_space_prefix else ""
        self._unknown_id = unknown_id
        self._byte_of = _byte_tokens(vocabulary)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> SentencePiece:
        """Raises `ModelFormatError` and `UnsupportedModelError`."""
        if flag(metadata, "remove_extra_whitespaces", False):
            raise UnsupportedModelError(
                "tokenizer.ggml.remove_extra_whitespaces is true, which is not supported: this "
                "kind of tokenizer keeps all spaces of a text"
            )
        charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
        if charsmap is not None:
            raise UnsupportedModelError(
                f"tokenizer.ggml.precompiled_charsmap is {brief(charsmap)}; text normalisation "
                "is not supported"
            )
        vocabulary = Vocabulary.from_metadata(metadata, types=TokenType.BYTE)
        size = len(vocabulary)
        # token 0 exists: a vocabulary is not empty
        unknown_id = token_id(metadata, "unknown_token_id", size, 0) or 0
        return cls(
            vocabulary,
            _scores(metadata, size),
            add_space_prefix=flag(metadata, "add_space_prefix", True),
            unknown_id=unknown_id,
        )

    @property
    def vocabulary(self) -> Vocabulary:
        return self._vocabulary

    @property
    def drops_first_space(self) -> bool:
        return bool(self._prefix)

    def encode(self, text: str, *, markup: bool, after_special: bool) -> list[int]:
        escaped = text.replace(" ", SPACE)
        if after_special:
            escaped = self._prefix + escaped
        return (self._with_markup if markup else self._without_markup).encode(escaped)

    def token_bytes(self, id: int) -> bytes:
        kind = self._vocabulary.types[id]
        if kind == TokenType.BYTE:
            return self._byte_of[id]
        token = self._vocabulary.text(id)
        return (token.replace(SPACE, " ") if kind == TokenType.NORMAL else token).encode()

    # Both are made when they are first needed: types may change before that.

    @functools.cached_property
    def _with_markup(self) -> NativeSPM:
        return self._only(*TokenType)

    @functools.cached_property
    def _without_markup(self) -> NativeSPM:
        return self._only(*(set(TokenType) - {TokenType.CONTROL, TokenType.UNKNOWN}))

    def _only(self, *kinds: TokenType) -> NativeSPM:
        return NativeSPM.make(
            self._vocabulary.native,
            self._scores,
            bytes(self._vocabulary.types),
            kinds=kinds,
            byte_ids=[self._vocabulary.find(f"<0x{byte:02X}>") for byte in range(256)],
            unknown_id=self._unknown_id,
        )


def _byte_tokens(vocabulary: Vocabulary) -> dict[int, bytes]:
    out: dict[int, bytes] = {}
    for i in vocabulary.of_type(TokenType.BYTE):
        token = vocabulary.text(i)
        match = _BYTE_TOKEN.fullmatch(token)
        if match is None:
            raise ModelFormatError(
                f"token {i} is of the type byte but is {token[:40]!r}, expected e.g. '<0x0A>'"
            )
        out[i] = bytes.fromhex(match[1])
    return out


def _scores(metadata: Mapping[str, object], count: int) -> npt.NDArray[np.float32]:
    values = numbers(metadata, "scores", count, "fi", f"{count} numbers")
    with np.errstate(over="ignore"):
        scores = values.astype(np.float32)
    wrong = np.isnan(scores)
    if wrong.any():
        raise ModelFormatError(
            f"tokenizer.ggml.scores holds nan for token {wrong.argmax()}, expected numbers"
        )
    return scores
