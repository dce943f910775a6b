# SPDX-License-Identifier: Apache-2.0
"""Text from tokens as they arrive: whole characters only, and stop strings.

Both classes are pure state machines fed piece by piece; how the pieces are cut
never changes the result.  Vocabulary and sampling do not live here.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from spanker.errors import RequestError
from spanker.ggml.tokenizer import Tokenizer

MAX_STOPS = 64
MAX_STOP_CHARS = 1024


class StreamDecoder:
    """Decodes token ids one at a time; never returns part of a character.

    The text continues a prompt: all outputs joined, `finish` included, equal
    `tokenizer.decode(ids, continues=True)`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that `id` completes, possibly "".  Raises `RequestError` for a bad id."""
        if self._tokenizer.is_special(id) and self._skip_special:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed, or ""."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Passes text on until one of `stops` has appeared.

    The stop that is completed first counts; of several completed by the same
    character, the longest.  Text that may still turn out to begin a stop is
    held back.  Raises `RequestError` for an empty, too long or too many stops.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise RequestError("stop is one string, expected a list of strings")
        if len(stops) > MAX_STOPS:
            raise RequestError(f"{len(stops)} stop strings, at most {MAX_STOPS} are allowed")
        for stop in stops:
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise RequestError(
                    f"stop string {str(stop)[:40]!r} is not a string of 1..{MAX_STOP_CHARS} "
                    "characters"
                )
        # Longest first, so that the first found is the one that counts.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been completed."""
        return self._stopped

    def push(self, text: str) -> tuple[str, bool]:
        """Return (text that is safe to emit now, whether a stop was completed)."""
        if self._stopped:
            return "", True
        pending = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            for i, stop in enumerate(self._stops):
                matched = _step(stop, self._fallbacks[i], self._matched[i], char)
                self._matched[i] = matched
                if matched == len(stop):
                    self._stopped = True
                    self._held = ""
                    return pending[: end - matched], True
        safe = len(pending) - max(self._matched, default=0)
        self._held = pending[safe:]
        return pending[:safe], False

    def finish(self) -> str:
        """The text held back; no stop can be completed any more."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, its longest proper suffix that is a prefix too.

    The table of Knuth, Morris and Pratt, "Fast pattern matching in strings"
    (1977): a client may choose stops, so the cost per character is bounded.
    """
    table = [0]
    matched = 0
    for char in stop[1:]:
        matched = _step(stop, table, matched, char)
        table.append(matched)
    return table


def _step(stop: str, fallbacks: list[int], matched: int, char: str) -> int:
    while matched and stop[matched] != char:
        matched = fallbacks[matched - 1]
    return matched + (stop[matched] == char)
