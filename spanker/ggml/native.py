# SPDX-License-Identifier: Apache-2.0
"""The native vocabulary: csrc/spk_vocabulary.h on Python's and numpy's values.

Sizes are checked here, statuses become exceptions, and objects are freed with their last
reference.  What the strings of a file mean, and what to say about wrong ones, does not live here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from spanker.errors import RequestError
from spanker.native import ffi, lib

MAX_TOKENS = int(lib.SPK_TOKENS_VOCABULARY_MAX)
MAX_MERGES = int(lib.SPK_MERGES_MAX)
MAX_VOCABULARY_BYTES = int(lib.SPK_VOCABULARY_BYTES_MAX)

_MAX_TEXT_BYTES = int(lib.SPK_ENCODED_BYTES_MAX)
_NO_TOKEN = int(lib.SPK_NO_TOKEN)


class StringError(Exception):
    """String `index` of an array is not what it should be."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class NotUTF8(StringError):
    """It is not UTF-8."""


class FoundTwice(StringError):
    """A token before it has the same text."""


class NotAMerge(StringError):
    """It does not join two tokens into a third."""


class TooMuchText(StringError):
    """With it the text is more than `MAX_VOCABULARY_BYTES`."""


_ERRORS: dict[int, type[StringError]] = {
    lib.SPK_VOCABULARY_E_BOUNDS: TooMuchText,
    lib.SPK_VOCABULARY_E_UTF8: NotUTF8,
    lib.SPK_VOCABULARY_E_TWICE: FoundTwice,
    lib.SPK_VOCABULARY_E_MERGE: NotAMerge,
}


def _check(status: int, where: int = -1) -> None:
    if status == lib.SPK_VOCABULARY_OK:
        return
    if status == lib.SPK_VOCABULARY_E_NOMEM:
        raise MemoryError("no memory for a vocabulary or a text")
    raise _ERRORS[status](where)


# --- arrays of strings -------------------------------------------------------------------


def strings_bytes(data: bytes | memoryview, count: int) -> int | None:
    """How many bytes the `count` strings at the start of `data` take; None if it is too short."""
    nbytes = ffi.new("size_t *", len(data))
    status = lib.spk_strings_scan(ffi.from_buffer(data), nbytes, count, ffi.NULL)
    return None if status else int(nbytes[0])


def string_ends(blob: bytes, count: int) -> npt.NDArray[np.int64]:
    """Where each of the `count` strings that make up `blob` ends."""
    ends = np.empty(count, np.int64)
    nbytes = ffi.new("size_t *", len(blob))
    _check(lib.spk_strings_scan(blob, nbytes, count, ffi.from_buffer("int64_t[]", ends)))
    return ends


def join_strings(items: Iterable[str]) -> bytes:
    """An array of strings, which need not be UTF-8 if `items` have lone surrogates."""
    encoded = [item.encode("utf-8", "surrogatepass") for item in items]
    return b"".join(part for item in encoded for part in (struct.pack("<Q", len(item)), item))


# --- tokens and merges -------------------------------------------------------------------


class NativeVocabulary:
    """Tokens by id and by text, and merges of them.  Immutable once the merges are in.

    At most `MAX_TOKENS`.  Raises `NotUTF8`, `FoundTwice` and `TooMuchText` for the first string
    that is.
    """

    def __init__(self, blob: bytes, count: int) -> None:
        out = ffi.new("struct spk_vocabulary **")
        where = ffi.new("size_t *")
        key = ffi.from_buffer("uint64_t[]", os.urandom(16))
        _check(lib.spk_vocabulary_create(blob, len(blob), count, key, out, where), where[0])
        self.handle = ffi.gc(out[0], lib.spk_vocabulary_destroy)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def add_merges(self, blob: bytes, count: int) -> None:
        """Once, before anything is encoded; at most `MAX_MERGES`.

        Raises `NotAMerge` for the first that is none.
        """
        where = ffi.new("size_t *")
        _check(lib.spk_vocabulary_add_merges(self.handle, blob, len(blob), count, where), where[0])

    def token(self, id: int) -> bytes:
        """The text of token `id`."""
        if not 0 <= id < self._count:
            raise IndexError(id)
        found = lib.spk_vocabulary_token(self.handle, id)
        return bytes(ffi.buffer(found.text, found.nbytes))

    def find(self, text: bytes) -> int | None:
        """The id of the token with this text."""
        found = int(lib.spk_vocabulary_find(self.handle, text, len(text)))
        return None if found == _NO_TOKEN else found


# --- encoding ----------------------------------------------------------------------------


def _ids(values: Sequence[int | None]) -> list[int]:
    return [_NO_TOKEN if value is None else value for value in values]


def _room(data: bytes) -> npt.NDArray[np.uint32]:
    if len(data) > _MAX_TEXT_BYTES:
        raise RequestError(
            f"the text has {len(data)} bytes, at most {_MAX_TEXT_BYTES} are encoded at once"
        )
    return np.empty(len(data), np.uint32)


@attrs.frozen
class NativeBPE:
    """Byte-level BPE with a vocabulary's merges.  `characters`: what bytes are written with."""

    _vocabulary: NativeVocabulary
    _plan: Any

    @classmethod
    def make(
        cls, vocabulary: NativeVocabulary, characters: Sequence[str], *, whole_words: bool
    ) -> NativeBPE:
        plan = ffi.new("struct spk_bpe *")
        plan.characters = [ord(character) for character in characters]
        plan.byte_ids = _ids([vocabulary.find(character.encode()) for character in characters])
        plan.whole_words = whole_words
        return cls(vocabulary, plan)

    def encode(self, text: str, words: Sequence[str]) -> list[int]:
        """The ids of `words`, which joined are `text`."""
        data = text.encode()
        ids, count = _room(data), ffi.new("size_t *")
        lengths = np.fromiter(map(len, words), np.uint32, len(words))
        status = lib.spk_bpe_encode(
            self._vocabulary.handle,
            self._plan,
            data,
            len(data),
            ffi.from_buffer("uint32_t[]", lengths),
            len(lengths),
            ffi.from_buffer("uint32_t[]", ids),
            count,
        )
        _check(status)
        found: list[int] = ids[: count[0]].tolist()
        return found


@attrs.frozen
class NativeSPM:
    """SentencePiece BPE with a vocabulary's scores: only tokens of some types come out."""

    _vocabulary: NativeVocabulary
    _plan: Any
    _kept: tuple[object, ...]

    @classmethod
    def make(
        cls,
        vocabulary: NativeVocabulary,
        scores: npt.NDArray[np.float32],
        types: bytes,
        kinds: Iterable[int],
        byte_ids: Sequence[int | None],
        unknown_id: int,
    ) -> NativeSPM:
        if not len(scores) == len(types) == len(vocabulary):
            raise ValueError("expected a score and a type for each token")
        before_space = np.zeros(lib.SPK_CHARACTERS_BYTES, np.uint8)
        lib.spk_spm_before_space(vocabulary.handle, ffi.from_buffer("uint8_t[]", before_space))
        plan = ffi.new("struct spk_spm *")
        kept = (
            ffi.from_buffer("float[]", np.ascontiguousarray(scores, np.float32)),
            ffi.from_buffer("uint8_t[]", types),
            ffi.from_buffer("uint8_t[]", before_space),
        )
        plan.scores, plan.types, plan.before_space = kept
        plan.kinds = sum(1 << kind for kind in set(kinds))
        plan.byte_ids = _ids(byte_ids)
        plan.unknown_id = unknown_id
        return cls(vocabulary, plan, kept)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which has U+2581 for its spaces."""
        data = text.encode()
        ids, count = _room(data), ffi.new("size_t *")
        status = lib.spk_spm_encode(
            self._vocabulary.handle,
            self._plan,
            data,
            len(data),
            ffi.from_buffer("uint32_t[]", ids),
            count,
        )
        _check(status)
        found: list[int] = ids[: count[0]].tolist()
        return found
