# SPDX-License-Identifier: Apache-2.0
"""Merging the symbols of a word pair by pair: the heart of every byte-pair encoding.

How text is cut into words and words into symbols, and which pairs merge in
which order, is the business of each kind of tokenizer, not of this file.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping

# A text repeats its words: most of them are looked up.  Worst case some 40 MB.
CACHED_WORDS = 1 << 15
CACHED_WORD_CHARS = 32


def merge(symbols: list[str], ranks: Mapping[str, float], joint: str) -> list[str]:
    """Join neighbours until no pair of them has a rank; `symbols` is used up.

    The pair of `a` and `b` has the rank of `a + joint + b`.  The lowest rank
    comes first, of equal ones the leftmost.  n log n for n symbols.
    """
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


class WordCache:
    """Encodes words, and remembers how: at most `CACHED_WORDS`, none of them long.

    Threads may share it: at worst a word is encoded twice.
    """

    def __init__(self, encode: Callable[[str], tuple[int, ...]]) -> None:
        self._encode = encode
        self._known: dict[str, tuple[int, ...]] = {}

    def ids(self, words: Iterable[str]) -> list[int]:
        """The ids of all words, one after the other."""
        out: list[int] = []
        known = self._known
        for word in words:
            ids = known.get(word)
            if ids is None:
                ids = self._encode(word)
                if len(word) <= CACHED_WORD_CHARS:
                    if len(known) >= CACHED_WORDS:
                        known.clear()
                    known[word] = ids
            out += ids
        return out
