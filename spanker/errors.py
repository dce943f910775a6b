# SPDX-License-Identifier: Apache-2.0
"""The one exception tree of Spanker.

Every error that Spanker raises on purpose derives from `SpankerError`, and its
text says what went wrong, what was expected, what was found, where, and what
to do next, on one line.  The command line prints that line and nothing else.
"""

from __future__ import annotations

import copy
from typing import TypeVar


class SpankerError(Exception):
    """Base of every error raised by Spanker."""


class ConfigError(SpankerError):
    """An option, fleet specification or environment variable makes no sense."""


# --- models ------------------------------------------------------------------


class ModelError(SpankerError):
    """A model file cannot be used."""


class ModelNotFoundError(ModelError):
    """No such model name or file."""


class ModelFormatError(ModelError):
    """The file is not a well-formed GGUF: truncated, corrupt, out of bounds."""


class UnsupportedModelError(ModelError):
    """A well-formed file holds something whose effect on the result is not understood."""


class DownloadError(ModelError):
    """Fetching a model failed, or what arrived is not what was asked for."""


# --- requests ----------------------------------------------------------------


class RequestError(SpankerError):
    """A generation request cannot be served as it stands."""


class ContextLengthError(RequestError):
    """The prompt, or the prompt with its requested tokens, exceeds the context."""


class TemplateError(RequestError):
    """The chat template is missing, invalid, or rejected the messages."""


# --- matrix products ----------------------------------------------------------


class MatmulError(SpankerError):
    """The operands of a matrix product are not what it takes."""


class BadDimsError(MatmulError):
    """Sizes that make no product: of `m` x `k` times `k` x `n` in blocks of `block` weights."""

    def __init__(self, message: str, *, m: int = 0, k: int = 0, n: int = 0, block: int = 0) -> None:
        super().__init__(message)
        self.m = m
        self.k = k
        self.n = n
        self.block = block


class OutputTooSmallError(MatmulError):
    """The output has `have` bytes and must have `need` or more."""

    def __init__(self, message: str, *, have: int = 0, need: int = 0) -> None:
        super().__init__(message)
        self.have = have
        self.need = need


# --- collectives ---------------------------------------------------------------


class CollectiveError(SpankerError):
    """The arrays of a collective are not what it takes."""


class TopologyMismatchError(CollectiveError):
    """Not one array for each card: `expected` cards, `actual` arrays."""

    def __init__(self, message: str, *, expected: int = 0, actual: int = 0) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


class ShapeMismatchError(CollectiveError):
    """The array of card `sail` is not like that of card 0, or not of the length it must have."""

    def __init__(
        self, message: str, *, sail: int = 0, expected: object = None, actual: object = None
    ) -> None:
        super().__init__(message)
        self.sail = sail
        self.expected = expected
        self.actual = actual


# --- plans -------------------------------------------------------------------


class PlanError(SpankerError):
    """No valid plan: bad plan name, more stages than layers, mismatched cards."""


# --- wire --------------------------------------------------------------------


class WireError(SpankerError):
    """A frame or message channel failed."""


class LocalProtocolError(WireError):
    """Our own side tried to send what the protocol does not allow."""


class RemoteProtocolError(WireError):
    """The peer sent what the protocol does not allow; the channel is unusable."""


class ChannelClosedError(WireError):
    """The peer is gone, or this side has been closed."""


# --- cards -------------------------------------------------------------------


class CardError(SpankerError):
    """A card, or the actor that owns it, failed.  `card` is its number in the fleet."""

    def __init__(self, message: str, *, card: int | None = None) -> None:
        super().__init__(message)
        self.card = card


class DriverError(CardError):
    """The kernel module is not loaded or of another version, or a device cannot be opened."""


class IoctlError(CardError):
    """The kernel module has refused a call: `errno` says how, `name` which it was."""

    def __init__(
        self, message: str, *, number: int = 0, name: str = "", card: int | None = None
    ) -> None:
        super().__init__(message, card=card)
        self.errno = number
        self.name = name


class FirmwareError(CardError):
    """A firmware image is malformed, damaged, or made for other cards."""


class CardMemoryError(CardError):
    """An allocation, or a whole plan, does not fit into a card's DDR."""


class CardCommandError(CardError):
    """A command or program was refused before it ran: bad buffer, bounds, argument."""


class CardFaultError(CardError):
    """A program stopped on a fault: non-finite value, corrupt link message."""


class CardLinkError(CardFaultError):
    """A message from another card failed its checks, after all retries of the link."""


class CardLinkDownError(CardError):
    """A step waits for bytes that cannot come: the link between `card` and `peer` is down."""

    def __init__(self, message: str, *, card: int | None = None, peer: int | None = None) -> None:
        super().__init__(message, card=card)
        self.peer = peer


class CardAbortedError(CardError):
    """A program was aborted before it finished."""


class CardHungError(CardError):
    """A card holds work and makes no progress."""


class CardLostError(CardError):
    """A card is gone: it was closed, killed, or its actor crashed."""


class CardAuditError(CardLostError):
    """A card has computed something else than its model's file says: it is used no more."""


# --- raising one error more than once -----------------------------------------

_ErrorT = TypeVar("_ErrorT", bound=SpankerError)


def again(error: _ErrorT) -> _ErrorT:
    """A copy to raise of an error that is kept and may be raised any number of times.

    Raised itself, it would collect the traceback, and keep the frames, of every time and task.
    """
    raised = copy.copy(error)
    raised.__cause__ = error.__cause__
    return raised
