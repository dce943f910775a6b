# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, from the `tokenizer.ggml.*` keys of a GGUF file.

Here live special tokens: finding them in a text, and what they mean.  What is
between them is encoded in bpe.py or spm.py, by the model's kind of tokenizer.
Incremental decoding and chat templates do not live here.

The ids equal llama.cpp's (src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from spanker.errors import ModelFormatError, RequestError, UnsupportedModelError
from spanker.ggml.bpe import ByteLevelBPE
from spanker.ggml.spm import SentencePiece
from spanker.ggml.vocabulary import TokenType, Vocabulary, flag, token_id

__all__ = ["TokenType", "Tokenizer"]

# Texts that llama.cpp takes to end a turn or a document, whatever their type.
_STOP_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        # the padding, repository and file separators of fill-in-the-middle
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    }
)
_STOP_KEYS = (
    "eos_token_id",
    "eot_token_id",
    "eom_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
)

_PARSED = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
_MARKUP = frozenset({TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED})
# What C's isspace takes for a space.
_SPACES = frozenset(" \t\n\v\f\r")


class Encoding(Protocol):
    """A kind of tokenizer, for text between special tokens.  Thread-safe."""

    add_bos: bool
    """Whether prompts start with BOS when the file does not say."""

    default_bos_id: int | None
    """The BOS token when the file does not say; there need be no such id."""

    default_eos_id: int | None

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def drops_first_space(self) -> bool:
        """Whether the space before a text's first word comes from encoding, not from the text."""

    def encode(self, text: str, *, markup: bool, after_special: bool) -> list[int]:
        """The ids of `text`, which is not empty.

        Without `markup` no control token may come out, whatever the text.
        `after_special`: the text stands at the start or after a special token.
        """

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a valid id stands for in a text."""


class Tokenizer:
    """A model's vocabulary: encodes text, decodes ids.  Immutable and thread-safe.

    Build it with `from_metadata`.
    """

    def __init__(
        self,
        encoding: Encoding,
        *,
        bos_id: int | None,
        eos_id: int | None,
        add_bos: bool,
        stop_ids: frozenset[int],
        eats_spaces: frozenset[int],
    ) -> None:
        vocabulary = encoding.vocabulary
        self._encoding = encoding
        self._vocabulary = vocabulary
        self._types = vocabulary.types
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._add_bos = add_bos
        self._stop_ids = stop_ids
        self._eats_spaces = eats_spaces
        # llama.cpp cuts special texts out longest first, so that one inside
        # another is not seen; ties (it leaves them open) go to the lower id.
        self._specials = sorted(
            ((vocabulary.text(i), i) for i in vocabulary.of_type(*_PARSED)),
            key=lambda item: -len(item[0].encode()),
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Build from GGUF metadata; some 7 ms for 49,152 tokens and as many merges.

        Raises `UnsupportedModelError` for another kind of tokenizer and
        `ModelFormatError` for missing or contradictory keys.
        """
        encoding = _encoding(metadata)
        vocabulary = encoding.vocabulary
        size = len(vocabulary)
        add_bos = flag(metadata, "add_bos_token", encoding.add_bos)
        for name in ("add_eos_token", "add_sep_token"):
            if flag(metadata, name, False):
                raise UnsupportedModelError(
                    f"tokenizer.ggml.{name} is true, which would end the prompt; "
                    "only models that generate text are supported"
                )
        bos_id = token_id(metadata, "bos_token_id", size, encoding.default_bos_id)
        eos_id = token_id(metadata, "eos_token_id", size, encoding.default_eos_id)
        if add_bos and bos_id is None:
            raise ModelFormatError(
                "the tokenizer starts each prompt with a BOS token but "
                "tokenizer.ggml.bos_token_id is missing; convert the model again"
            )
        stop_ids = {eos_id, *(token_id(metadata, name, size) for name in _STOP_KEYS)}
        for text in _STOP_TEXTS:
            i = vocabulary.find(text)
            if i is not None:
                stop_ids.add(i)
                vocabulary.types[i] = TokenType.CONTROL
        return cls(
            encoding,
            bos_id=bos_id,
            eos_id=eos_id,
            add_bos=add_bos,
            stop_ids=frozenset(i for i in stop_ids if i is not None),
            eats_spaces=_eats_spaces(metadata, vocabulary),
        )

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def eos_id(self) -> int | None:
        return self._eos_id

    @property
    def add_bos(self) -> bool:
        """Whether prompts start with the BOS token unless `encode` is told otherwise."""
        return self._add_bos

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a generation: end of text, of turn, of message, of file."""
        return self._stop_ids

    def encode(self, text: str, *, special: bool = True, add_bos: bool | None = None) -> list[int]:
        """The token ids of `text`.

        With `special` the texts of control tokens in `text` become those
        tokens; without it they are plain text, which is right for untrusted
        input.  (User-defined tokens are plain vocabulary and always apply.)
        `add_bos` None does what the model says.  Bytes that a byte-level
        vocabulary lacks are dropped, as llama.cpp does.

        Raises `RequestError` for text that has no UTF-8 form, or for a BOS
        that the model does not have.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text holds a lone surrogate at character {error.start}, which has no "
                "UTF-8 form; remove it"
            ) from None
        ids: list[int] = []
        if self._add_bos if add_bos is None else add_bos:
            if self._bos_id is None:
                raise RequestError("add_bos is true but the model has no BOS token")
            ids.append(self._bos_id)
        after_special = True
        for part in self._partition(text, special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encoding.encode(part, markup=special, after_special=after_special)
            after_special = isinstance(part, int)
        return ids

    def _partition(self, text: str, special: bool) -> list[str | int]:
        parts: list[str | int] = [text] if text else []
        for token, i in self._specials:
            if token not in text or not (special or self._types[i] == TokenType.USER_DEFINED):
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                else:
                    cut += _cut_out(token, i, part, i in self._eats_spaces)
            parts = cut
        return parts

    def token_text(self, id: int) -> str:
        """The token as it stands in the vocabulary: byte-level characters, U+2581 for a space."""
        return self._vocabulary.text(self._checked(id))

    def is_special(self, id: int) -> bool:
        """Whether the token is markup (control, unknown, unused), not text."""
        return self._types[self._checked(id)] in _MARKUP

    def token_bytes(self, id: int) -> bytes:
        """The raw bytes of one token; of a special token, the bytes of its text.

        They need not be whole UTF-8 characters.
        """
        return self._encoding.token_bytes(self._checked(id))

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False
    ) -> str:
        """The text of `ids`; malformed UTF-8 becomes U+FFFD.

        Some models' encoding puts a space before a text: decoding removes it,
        unless the text `continues` another one.
        """
        pieces = [self.token_bytes(i) for i in ids if not (skip_special and self.is_special(i))]
        if pieces and self._encoding.drops_first_space and not continues:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces).decode(errors="replace")

    def _checked(self, id: int) -> int:
        if 0 <= id < len(self._vocabulary):
            return id
        raise RequestError(
            f"token id {id} is outside the vocabulary 0..{len(self._vocabulary) - 1}"
        )


def _cut_out(token: str, id: int, text: str, eats_spaces: bool) -> Iterator[str | int]:
    """The pieces of `text`, none empty, with `id` in place of each `token`."""
    start = 0
    while (found := text.find(token, start)) >= 0:
        if found > start:
            yield text[start:found]
        yield id
        start = found + len(token)
        while eats_spaces and start < len(text) and text[start] in _SPACES:
            start += 1
    if start < len(text):
        yield text[start:]


def _encoding(metadata: Mapping[str, object]) -> Encoding:
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise ModelFormatError("the file holds no tokenizer: tokenizer.ggml.model is missing")
    if model == "gpt2":
        return ByteLevelBPE.from_metadata(metadata)
    if model == "llama":
        return SentencePiece.from_metadata(metadata)
    raise UnsupportedModelError(
        f"tokenizer model {model!r} is not supported; supported: 'gpt2' (byte-level BPE), "
        "'llama' (SentencePiece BPE)"
    )


def _eats_spaces(metadata: Mapping[str, object], vocabulary: Vocabulary) -> frozenset[int]:
    """The special tokens that swallow the spaces after them.

    GGUF files do not tell; llama.cpp goes by the model's name, and so must we.
    """
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    keep = ("<unk>", "<s>", "<|endoftext|>")
    return frozenset(i for i in vocabulary.of_type(*_PARSED) if vocabulary.text(i) not in keep)
