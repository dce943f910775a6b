# SPDX-License-Identifier: Apache-2.0
"""The card protocol as the host speaks it: docs/api/card-protocol.md.

From values to bytes and back, without input and output.  The structures are those of
spanker/device/csrc/spk_wire.h, which the compiler lays out.  What a card says is checked against
what it may say: RemoteProtocolError tells what was wrong, and nothing after it means anything.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from spanker.device.base import Buffer
from spanker.errors import RemoteProtocolError
from spanker.native import ffi, lib

VERSION = int(lib.SPK_WIRE_VERSION)
DATA_MAX = int(lib.SPK_WIRE_DATA_MAX)
REQUEST_MAX = int(lib.SPK_WIRE_REQUEST_MAX)
EVENTS_MAX = int(lib.SPK_WIRE_EVENTS_MAX)
HEADER_BYTES = int(ffi.sizeof("struct spk_wire_header"))
_COMPLETION_BYTES = int(ffi.sizeof("struct spk_wire_completion"))


def packed(kind: str, *fields: object) -> bytes:
    """The bytes of one `kind`: uint32_t, uint64_t, or a structure by its name."""
    made: bytes = ffi.buffer(ffi.new(f"{kind} *", fields if len(fields) > 1 else fields[0]))[:]
    return made


def request(kind: int, body_bytes: int) -> bytes:
    """The header of a request."""
    return packed("struct spk_wire_header", lib.SPK_WIRE_MAGIC, kind, 0, 0, body_bytes)


class Reply(NamedTuple):
    """What the header of a reply says: a `status` other than SPK_OK is followed by a text."""

    status: int
    command: int
    nbytes: int


def reply(header: Buffer, kind: int, expected: int, at_least: int | None = None) -> Reply:
    """Of a reply to a request of this kind, whose body has `expected` bytes unless it refuses, or
    where that is given `at_least` so many and `expected` at most."""
    h = _header(header)
    if h.kind != kind | lib.SPK_WIRE_REPLY:
        raise RemoteProtocolError(f"a frame of kind {h.kind:#x} where request {kind} is answered")
    least, most = expected if at_least is None else at_least, expected
    if h.status != lib.SPK_OK:
        least, most = 0, lib.SPK_WIRE_TEXT_MAX
    if not least <= h.nbytes <= most:
        raise RemoteProtocolError(
            f"{h.nbytes:,} bytes answer request {kind}, expected {least:,} to {most:,}"
        )
    return Reply(h.status, h.command, h.nbytes)


def _header(data: Buffer) -> Any:
    h = ffi.from_buffer("struct spk_wire_header *", data)
    if h.magic != lib.SPK_WIRE_MAGIC:
        raise RemoteProtocolError(f"no frame: it begins with {bytes(data[:4]).hex()}")
    return h


def structure(kind: str, data: Buffer, at: int = 0) -> Any:
    """One structure within the bytes of a body, which it keeps."""
    return ffi.from_buffer(f"struct {kind} *", memoryview(data)[at:])


class Told(NamedTuple):
    """A completion as the card tells of it."""

    fence: int
    busy_ns: int
    status: int
    command: int
    result: bytes


class Completions:
    """The second stream: bytes in, completions out, each of a step that was announced.

    No more is kept than one completion of the size that its step has announced.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        # Fence and bytes of result of each step that is queued, oldest first.
        self._expected: deque[tuple[int, int]] = deque()

    def expect(self, fence: int, result_bytes: int) -> None:
        """A step was queued that brings back so much if it succeeds."""
        self._expected.append((fence, result_bytes))

    @property
    def expected(self) -> tuple[int, ...]:
        """The fences of the steps that are to be told of."""
        return tuple([fence for fence, _ in self._expected])

    def feed(self, data: Buffer) -> list[Told]:
        """What is complete with these bytes; RemoteProtocolError for what was not announced."""
        self._data += data
        found: list[Told] = []
        while (told := self._next()) is not None:
            found.append(told)
        return found

    def _next(self) -> Told | None:
        begin = HEADER_BYTES + _COMPLETION_BYTES
        if len(self._data) < begin:
            return None
        head = bytes(self._data[:begin])
        h, c = _header(head), structure("spk_wire_completion", head, HEADER_BYTES)
        if h.kind != lib.SPK_WIRE_COMPLETION or h.status or h.command:
            raise RemoteProtocolError(f"a frame of kind {h.kind:#x} among completions")
        if not self._expected:
            raise RemoteProtocolError(f"step {c.fence} has completed, which nobody has queued")
        fence, result_bytes = self._expected[0]
        if c.status != lib.SPK_OK:
            result_bytes = 0
        if (c.fence, c.result_bytes, h.nbytes) != (
            fence,
            result_bytes,
            _COMPLETION_BYTES + result_bytes,
        ):
            raise RemoteProtocolError(
                f"step {c.fence} has completed with {c.result_bytes:,} bytes in a frame of "
                f"{h.nbytes:,}, expected step {fence} with {result_bytes:,}"
            )
        if len(self._data) < begin + result_bytes:
            return None
        told = Told(
            c.fence,
            c.busy_ns,
            c.status,
            c.command,
            bytes(self._data[begin : begin + result_bytes]),
        )
        del self._data[: begin + result_bytes]
        self._expected.popleft()
        return told
