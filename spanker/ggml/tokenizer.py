# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, from the `tokenizer.ggml.*` keys of a GGUF file.

Here live the vocabulary, special tokens and the exact splitting rules; the
byte-pair merging is the `tokenizers` library's.  Incremental decoding and chat
templates do not live here.

The ids equal llama.cpp's (src/llama-vocab.cpp, src/unicode.cpp) for the models
and pre-tokenizers listed below; every other one is refused by name, because
nearly the right tokens give quietly worse text.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import attrs
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from spanker.errors import ModelFormatError, RequestError, UnsupportedModelError
from spanker.ggml.gguf import StringArray

MAX_VOCABULARY = 1 << 21


class TokenType(enum.IntEnum):
    """`tokenizer.ggml.token_type`, as in llama.h; other numbers are refused."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@attrs.frozen
class _PreTokenizer:
    """How text is cut into words before merging.

    `isolate_digits` cuts every digit off first; `pattern` None is GPT-2's.
    `whole_words`: a word that is itself a token is taken without merging.
    """

    isolate_digits: bool = False
    pattern: str | None = None
    whole_words: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.isolate_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(tokenizers.Regex(self.pattern), "isolated"))
        steps.append(
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None)
        )
        return pre_tokenizers.Sequence(steps)


def _words(digits: str) -> str:
    """The Llama 3 family's word pattern, with its rule for digits."""
    return (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = _PreTokenizer()
_DIGITS_GPT2 = _PreTokenizer(isolate_digits=True)
_LLAMA3 = _PreTokenizer(pattern=_words(r"\p{N}{1,3}"), whole_words=True, add_bos=True)
_DBRX = _PreTokenizer(pattern=_words(r"\p{N}{1,3}"))
_QWEN2 = _PreTokenizer(pattern=_words(r"\p{N}"))

_PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = {
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


def _byte_alphabet() -> tuple[str, ...]:
    """The character that stands for each byte in byte-level BPE (GPT-2's encoder.py).

    Printable Latin-1 stands for itself; the rest is moved up past U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in printable else chr(next(moved)) for byte in range(256))


_ALPHABET = _byte_alphabet()
_BYTE_OF = {char: byte for byte, char in enumerate(_ALPHABET)}


class Tokenizer:
    """A model's vocabulary: encodes text, decodes ids.  Immutable and thread-safe.

    Build it with `from_metadata`.
    """

    def __init__(
        self,
        tokens: list[str],
        types: list[int],
        merges: list[tuple[str, str]],
        pre: _PreTokenizer,
        *,
        bos_id: int | None,
        eos_id: int | None,
        add_bos: bool,
        stop_ids: frozenset[int],
    ) -> None:
        self._tokens = tokens
        self._types = types
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._add_bos = add_bos
        self._stop_ids = stop_ids
        parsed = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED)
        # llama.cpp cuts special texts out longest first, so that one inside
        # another is not seen; ties (it leaves them open) go to the lower id.
        self._specials = sorted(
            ((tokens[i], i) for i, kind in enumerate(types) if kind in parsed),
            key=lambda item: -len(item[0].encode()),
        )
        vocabulary = {token: i for i, token in enumerate(tokens)}
        # Bytes that the vocabulary lacks vanish, but not before merging: their
        # neighbours must not merge over the gap.  They become this id, then go.
        self._gap_id = len(tokens)
        gap = "\0" * (1 + max(map(len, tokens)))
        vocabulary[gap] = self._gap_id
        self._bpe = tokenizers.Tokenizer(
            models.BPE(
                vocab=vocabulary, merges=merges, unk_token=gap, ignore_merges=pre.whole_words
            )
        )
        self._bpe.pre_tokenizer = pre.build()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Build from GGUF metadata; about 0.2 s for 49,152 tokens.

        Raises `UnsupportedModelError` for another kind of tokenizer and
        `ModelFormatError` for missing or contradictory keys.
        """
        pre = _pre_tokenizer(metadata)
        tokens = _tokens(metadata)
        types = _types(metadata, len(tokens))
        add_bos = _flag(metadata, "add_bos_token", pre.add_bos)
        for name in ("add_eos_token", "add_sep_token"):
            if _flag(metadata, name, False):
                raise UnsupportedModelError(
                    f"tokenizer.ggml.{name} is true, which would end the prompt; "
                    "only models that generate text are supported"
                )
        bos_id = _token_id(metadata, "bos_token_id", len(tokens))
        if add_bos and bos_id is None:
            raise ModelFormatError(
                "the tokenizer starts each prompt with a BOS token but "
                "tokenizer.ggml.bos_token_id is missing; convert the model again"
            )
        stop_ids = {_token_id(metadata, name, len(tokens)) for name in _STOP_KEYS} - {None}
        for i, token in enumerate(tokens):
            if token in _STOP_TEXTS:
                stop_ids.add(i)
                types[i] = TokenType.CONTROL
        return cls(
            tokens,
            types,
            _merges(metadata, frozenset(tokens)),
            pre,
            bos_id=bos_id,
            eos_id=_token_id(metadata, "eos_token_id", len(tokens)),
            add_bos=add_bos,
            stop_ids=frozenset(i for i in stop_ids if i is not None),
        )

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

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
        `add_bos` None does what the model says.  Bytes that the vocabulary
        lacks are dropped, as llama.cpp does.

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
        for part in self._partition(text, special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._bpe.encode(part, add_special_tokens=False).ids)
        if self._gap_id in ids:
            ids = [i for i in ids if i != self._gap_id]
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
                    continue
                for index, piece in enumerate(part.split(token)):
                    if index:
                        cut.append(i)
                    if piece:
                        cut.append(piece)
            parts = cut
        return parts

    def token_text(self, id: int) -> str:
        """The token as it stands in the vocabulary (byte-level characters)."""
        return self._tokens[self._checked(id)]

    def is_special(self, id: int) -> bool:
        """Whether the token is markup (control, unknown, unused), not text."""
        return self._types[self._checked(id)] in (
            TokenType.CONTROL,
            TokenType.UNKNOWN,
            TokenType.UNUSED,
        )

    def token_bytes(self, id: int) -> bytes:
        """The raw bytes of one token; of a special token, the bytes of its text.

        They need not be whole UTF-8 characters.
        """
        token = self._tokens[self._checked(id)]
        if self._types[id] == TokenType.NORMAL:
            try:
                return bytes(map(_BYTE_OF.__getitem__, token))
            except KeyError:
                pass  # an added token, stored as plain text
        return token.encode()

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; malformed UTF-8 becomes U+FFFD."""
        return b"".join(
            self.token_bytes(i) for i in ids if not (self.is_special(i) and skip_special)
        ).decode(errors="replace")

    def _checked(self, id: int) -> int:
        if 0 <= id < len(self._tokens):
            return id
        raise RequestError(f"token id {id} is outside the vocabulary 0..{len(self._tokens) - 1}")


# --- reading the metadata ----------------------------------------------------


def _pre_tokenizer(metadata: Mapping[str, object]) -> _PreTokenizer:
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        raise ModelFormatError("the file holds no tokenizer: tokenizer.ggml.model is missing")
    if model != "gpt2":
        raise UnsupportedModelError(
            f"tokenizer model {model!r} is not supported; supported: 'gpt2' (byte-level BPE)"
        )
    name = metadata.get("tokenizer.ggml.pre")
    if isinstance(name, str) and name in _PRE_TOKENIZERS:
        return _PRE_TOKENIZERS[name]
    found = "a missing pre-tokenizer" if name is None else f"pre-tokenizer {name!r}"
    raise UnsupportedModelError(
        f"{found} (tokenizer.ggml.pre) is not supported; supported: "
        + ", ".join(sorted(_PRE_TOKENIZERS))
    )


def _strings(metadata: Mapping[str, object], name: str) -> list[str]:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    if isinstance(value, StringArray):
        return value.tolist()
    if isinstance(value, Sequence) and all(type(item) is str for item in value):
        return list(value)
    raise ModelFormatError(f"{key} is {_brief(value)}, expected an array of strings")


def _tokens(metadata: Mapping[str, object]) -> list[str]:
    tokens = _strings(metadata, "tokens")
    if not 1 <= len(tokens) <= MAX_VOCABULARY:
        raise ModelFormatError(
            f"tokenizer.ggml.tokens holds {len(tokens)} tokens, expected 1..{MAX_VOCABULARY}"
        )
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise ModelFormatError(f"tokenizer.ggml.tokens holds the token {twice[:40]!r} twice")
    return tokens


def _types(metadata: Mapping[str, object], count: int) -> list[int]:
    value = metadata.get("tokenizer.ggml.token_type")
    if value is None:
        return [TokenType.NORMAL] * count
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) != count:
        raise ModelFormatError(
            f"tokenizer.ggml.token_type is {_brief(value)}, expected {count} integers"
        )
    if array.min() < TokenType.NORMAL or array.max() > TokenType.UNUSED:
        wrong = int(np.argmax((array < TokenType.NORMAL) | (array > TokenType.UNUSED)))
        raise UnsupportedModelError(
            f"token {wrong} has type {array[wrong]}, expected "
            f"{TokenType.NORMAL:d}..{TokenType.UNUSED:d}"
        )
    types: list[int] = array.tolist()
    return types


def _merges(metadata: Mapping[str, object], known: frozenset[str]) -> list[tuple[str, str]]:
    # The first of equal merges counts, as in llama.cpp.
    merges = dict.fromkeys(_strings(metadata, "merges"))
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        # The library panics on some pairs that make no token: check them all.
        if left not in known or right not in known or left + right not in known:
            raise ModelFormatError(
                f"tokenizer.ggml.merges: {merge[:80]!r} does not join two tokens into a third"
            )
        pairs.append((left, right))
    return pairs


def _flag(metadata: Mapping[str, object], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise ModelFormatError(f"tokenizer.ggml.{name} is {_brief(value)}, expected a bool")
    return value


def _token_id(metadata: Mapping[str, object], name: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise ModelFormatError(
            f"tokenizer.ggml.{name} is {_brief(value)}, expected a token id 0..{count - 1}"
        )
    return value


def _brief(value: object) -> str:
    """A value from the file, short enough for an error message."""
    if value is None:
        return "missing"
    if isinstance(value, (bool, int, float, str)):
        return repr(value)[:60]
    try:
        return f"{type(value).__name__} of length {len(value)}"  # type: ignore[arg-type]
    except TypeError:
        return type(value).__name__
