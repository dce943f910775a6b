# SPDX-License-Identifier: Apache-2.0
"""Text to ids in slow, obvious Python: what the native encoders are held to.

Everything goes by text, as the rules are said; special tokens are no part of it.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from spanker.ggml.bpe import PRE_TOKENIZERS
from spanker.ggml.tokenizer import TokenType

SPACE = "\u2581"


def slow_merge(symbols: list[str], ranks: Mapping[str, float], joint: str) -> list[str]:
    """The rule as it is said: again and again the leftmost of the pairs with the lowest rank."""
    symbols = list(symbols)
    while True:
        found = [
            (ranks[a + joint + b], i)
            for i, (a, b) in enumerate(pairwise(symbols))
            if a + joint + b in ranks
        ]
        if not found:
            return symbols
        i = min(found)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def merge(symbols: list[str], ranks: Mapping[str, float], joint: str) -> list[str]:
    """The same in n log n, for long words; `symbols` is used up."""
    count = len(symbols)
    following = list(range(1, count + 1))
    previous = list(range(-1, count - 1))
    rank_of = ranks.get
    heap: list[tuple[float, int, str]] = []
    for i in range(count - 1):
        pair = symbols[i] + joint + symbols[i + 1]
        rank = rank_of(pair)
        if rank is not None:
            heap.append((rank, i, pair))
    heapq.heapify(heap)
    while heap:
        _, i, pair = heapq.heappop(heap)
        j = following[i]
        # Either may have been merged with another meanwhile; what is merged away is empty.
        if not symbols[i] or j == count or symbols[i] + joint + symbols[j] != pair:
            continue
        symbols[i] += symbols[j]
        symbols[j] = ""
        after = following[i] = following[j]
        if after < count:
            previous[after] = i
        for left, right in ((previous[i], i), (i, after)):
            if left >= 0 and right < count:
                pair = symbols[left] + joint + symbols[right]
                rank = rank_of(pair)
                if rank is not None:
                    heapq.heappush(heap, (rank, left, pair))
    return [symbol for symbol in symbols if symbol]


# --- whole texts ------------------------------------------------------------------------


def byte_char(byte: int) -> str:
    """GPT-2's character for a byte, by its rule: the unprintable ones follow U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))


BYTES = [byte_char(byte) for byte in range(256)]  # in byte order


def _tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    texts = list(metadata["tokenizer.ggml.tokens"])
    return {text or f"[EMPTY_{i}]": i for i, text in enumerate(texts)}


class BPEOracle:
    """Byte-level BPE."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.pre = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
        self.ids = _tokens(metadata)
        merges = list(metadata["tokenizer.ggml.merges"])
        self.ranks: dict[str, float] = {}
        for rank, pair in enumerate(merges):
            self.ranks.setdefault(pair, rank)

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        for word in self.pre.split(text):
            symbols = [BYTES[byte] for byte in word.encode()]
            whole = self.ids.get("".join(symbols))
            if self.pre.whole_words and whole is not None:
                out.append(whole)
            else:
                merged = merge(symbols, self.ranks, " ")
                out += [self.ids[symbol] for symbol in merged if symbol in self.ids]
        return out


class SPMOracle:
    """SentencePiece BPE, all of a text as one word."""

    def __init__(self, metadata: Mapping[str, Any], *, markup: bool) -> None:
        self.prefix = SPACE if metadata.get("tokenizer.ggml.add_space_prefix", True) else ""
        self.ids = _tokens(metadata)
        self.bytes = [self.ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        self.unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
        with np.errstate(over="ignore"):
            scores = np.asarray(metadata["tokenizer.ggml.scores"]).astype(np.float32)
        hidden = () if markup else (TokenType.CONTROL, TokenType.UNKNOWN)
        types = metadata["tokenizer.ggml.token_type"]
        self.ranks = {
            text: -float(scores[i]) for text, i in self.ids.items() if types[i] not in hidden
        }

    def encode(self, text: str) -> list[int]:
        out: list[int] = []
        symbols = list(self.prefix + re.sub(" ", SPACE, text))
        for symbol in merge(symbols, self.ranks, ""):
            if symbol in self.ranks:
                out.append(self.ids[symbol])
                continue
            ids = [self.bytes[byte] for byte in symbol.encode()]
            known = [i for i in ids if i is not None]
            out += known if len(known) == len(ids) else [self.unknown]
        return out
