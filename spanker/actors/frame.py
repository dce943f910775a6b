# SPDX-License-Identifier: Apache-2.0
"""Frames: how one message and its raw buffers become bytes, and bytes become frames again.

This module is sans-I/O: no trio, no sockets, no clock, and no knowledge of what a body means.
Bytes go into `FrameDecoder.feed`, frames come out; `encode_frame` is its inverse.  The layout,
limits and error rules are specified in docs/api/wire-protocol.md.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import attrs
import numpy as np
import numpy.typing as npt

from spanker.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from spanker.values import Value

MAGIC = b"SPKR"
FRAME_VERSION = 1

# magic, version, kind, flags, buffer count, body bytes, raw bytes, CRC-32 of body and table;
# the CRC-32C of those 28 bytes follows them.
_HEADER_FIELDS = struct.Struct("<4sHHHHIQI")
_HEADER_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER_FIELDS.size + _HEADER_CRC.size
_TABLE_ENTRY_BYTES = 8

Buffer = bytes | bytearray | memoryview


@attrs.frozen(eq=False, repr=False)
class Deferred(Value):
    """A raw buffer whose bytes are made where they are needed: within one process by the card, in
    its own memory, otherwise in front of the stream.

    `fill` writes all of a contiguous uint8 array of `nbytes` bytes, at most once, in any thread,
    and does not keep it.
    """

    nbytes: int
    fill: Callable[[npt.NDArray[np.uint8]], None]

    def __len__(self) -> int:
        return self.nbytes

    def make_in(self, out: npt.NDArray[np.uint8]) -> None:
        """Make the bytes in `out`.  Any error of `fill` becomes LocalProtocolError: it is the
        sender's own, whoever calls this."""
        try:
            self.fill(out)
        except Exception as error:
            raise LocalProtocolError(
                f"a raw buffer of {self.nbytes:,} bytes could not be made: "
                f"{type(error).__name__}: {error}; what its request writes may be there in part"
            ) from error

    def make(self) -> memoryview:
        """The bytes themselves, in memory of their own; raises as `make_in`."""
        data = np.empty(self.nbytes, np.uint8)
        self.make_in(data)
        return data.data


RawBuffer = Buffer | Deferred


@attrs.frozen(eq=False, repr=False)
class FrameLimits(Value):
    """The largest frame that one side sends or accepts; both sides must agree on it."""

    body_bytes_max: int = 1 << 20
    raw_bytes_max: int = 256 << 20
    buffers_max: int = 64

    def __attrs_post_init__(self) -> None:
        # The field widths of the header.
        widths = (("body_bytes_max", 32), ("raw_bytes_max", 64), ("buffers_max", 16))
        for name, bits in widths:
            value = getattr(self, name)
            if not 0 <= value < 1 << bits:
                raise ConfigError(
                    f"frame limits: {name} must be 0..{(1 << bits) - 1}, got {value}; "
                    f"the header field is {bits} bits wide"
                )


DEFAULT_LIMITS = FrameLimits()


def repr_sizes(buffers: tuple[RawBuffer, ...]) -> str:
    """Sizes instead of contents, for a repr that may be logged."""
    return "(" + ", ".join(f"<{len(buffer)} bytes>" for buffer in buffers) + ")"


@attrs.frozen(eq=False, repr=False)
class Frame(Value):
    """One frame: a message kind, its encoded body, and raw buffers that travel beside it.

    A decoded frame's buffers are read-only views of memory that belongs to the frame; only a frame
    to be encoded may hold deferred ones.
    """

    kind: int
    body: bytes
    buffers: tuple[RawBuffer, ...] = attrs.field(default=(), repr=repr_sizes)


# --- checksums -----------------------------------------------------------------


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C_TABLE = _crc32c_table()


def crc32c(data: Buffer, crc: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of `data`, continuing from `crc`; for headers.

    Pure Python, about 0.1 us a byte: large data wants the C version or another checksum.
    """
    table = _CRC32C_TABLE
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


# --- encoding ------------------------------------------------------------------


def flat_buffer(buffer: RawBuffer) -> RawBuffer:
    """`buffer` as something whose `len` is its bytes, without a copy.

    Raises LocalProtocolError for what is not a contiguous buffer.
    """
    if isinstance(buffer, (bytes, bytearray, Deferred)):
        return buffer
    if not isinstance(buffer, memoryview):
        raise LocalProtocolError(
            f"raw buffer: expected bytes, bytearray or memoryview, got {type(buffer).__name__}; "
            "pass an array as its .data"
        )
    if not buffer.c_contiguous:
        raise LocalProtocolError(
            f"raw buffer: expected C-contiguous memory, got shape {buffer.shape} with strides "
            f"{buffer.strides}; copy it first"
        )
    if buffer.ndim == 1 and buffer.format == "B":
        return buffer
    # memoryview.cast refuses shapes that contain a zero.
    return buffer.cast("B") if buffer.nbytes else b""


def check_frame(frame: Frame, limits: FrameLimits = DEFAULT_LIMITS) -> None:
    """Raise LocalProtocolError when `frame` is not one that our side may send."""
    raw_bytes = sum(map(len, frame.buffers))
    for what, got, most in (
        ("kind", frame.kind, 0xFFFF),
        ("body bytes", len(frame.body), limits.body_bytes_max),
        ("raw bytes", raw_bytes, limits.raw_bytes_max),
        ("raw buffers", len(frame.buffers), limits.buffers_max),
    ):
        if not 0 <= got <= most:
            raise LocalProtocolError(
                f"outgoing frame of kind {frame.kind}: expected at most {most} as {what}, "
                f"got {got}; send it in smaller pieces"
            )


def frame_bytes(frame: Frame) -> int:
    """How many bytes `encode_frame` gives."""
    table_bytes = len(frame.buffers) * _TABLE_ENTRY_BYTES
    return HEADER_BYTES + len(frame.body) + table_bytes + sum(map(len, frame.buffers))


def encode_frame(frame: Frame, limits: FrameLimits = DEFAULT_LIMITS) -> list[Buffer]:
    """The bytes of `frame` as a gather list: header, body and table joined, then each raw buffer.

    Raw buffers are the caller's own objects, not copies; deferred ones are made, which raises as
    `Deferred.make_in` and may take milliseconds.  Raises LocalProtocolError, before that, when the
    frame exceeds `limits` or a buffer is not flat.
    """
    flat = tuple(flat_buffer(buffer) for buffer in frame.buffers)
    check_frame(Frame(frame.kind, frame.body, flat), limits)
    buffers = [buffer.make() if isinstance(buffer, Deferred) else buffer for buffer in flat]
    lengths = [len(buffer) for buffer in buffers]
    block = frame.body + struct.pack(f"<{len(lengths)}Q", *lengths)
    header = _HEADER_FIELDS.pack(
        MAGIC,
        FRAME_VERSION,
        frame.kind,
        0,
        len(buffers),
        len(frame.body),
        sum(lengths),
        zlib.crc32(block),
    )
    return [header + _HEADER_CRC.pack(crc32c(header)) + block, *filter(len, buffers)]


# --- decoding ------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class _Header(Value):
    kind: int
    buffer_count: int
    body_bytes: int
    raw_bytes: int
    block_crc: int


def _parse_header(data: Buffer, limits: FrameLimits) -> _Header:
    magic, version, kind, flags, buffer_count, body_bytes, raw_bytes, block_crc = (
        _HEADER_FIELDS.unpack_from(data)
    )
    # Magic and version keep their place in every version of the layout; nothing else need.
    if magic != MAGIC:
        raise RemoteProtocolError(
            f"frame header: expected magic {MAGIC!r}, got {magic!r}; "
            "the peer does not speak this protocol, or the stream is out of step"
        )
    if version != FRAME_VERSION:
        raise RemoteProtocolError(
            f"frame header: expected version {FRAME_VERSION}, got {version}; "
            "run the same Spanker on both sides"
        )
    (header_crc,) = _HEADER_CRC.unpack_from(data, _HEADER_FIELDS.size)
    computed = crc32c(data[: _HEADER_FIELDS.size])
    if header_crc != computed:
        raise RemoteProtocolError(
            f"frame header: expected CRC-32C {computed:#010x}, got {header_crc:#010x}; "
            "the stream is corrupt"
        )
    if flags:
        raise RemoteProtocolError(f"frame header: reserved flags must be 0, got {flags:#06x}")
    for what, got, most in (
        ("body bytes", body_bytes, limits.body_bytes_max),
        ("raw bytes", raw_bytes, limits.raw_bytes_max),
        ("raw buffers", buffer_count, limits.buffers_max),
    ):
        if got > most:
            raise RemoteProtocolError(
                f"frame header of kind {kind}: expected at most {most} {what}, got {got}"
            )
    if raw_bytes and not buffer_count:
        raise RemoteProtocolError(
            f"frame header of kind {kind}: expected 0 raw bytes without raw buffers, "
            f"got {raw_bytes}"
        )
    return _Header(kind, buffer_count, body_bytes, raw_bytes, block_crc)


class FrameDecoder:
    """Turns a byte stream, split anywhere, into frames.

    A frame has three sections: header, block (body and table), raw.  Each is received whole before
    its meaning is looked at, and memory for it is allocated only once its length has been checked,
    so the decoder never holds more than one frame within `limits`.  Its cost is linear in the
    bytes fed.

    After the first violation the decoder stays in error.
    """

    def __init__(self, limits: FrameLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._violation: str | None = None
        self._expect("header", HEADER_BYTES)
        self._header: _Header
        self._body: bytes
        self._lengths: tuple[int, ...]

    @property
    def bytes_wanted(self) -> int:
        """Bytes missing from the present section: a hint for how much to read at once."""
        return self._wanted - self._filled

    def feed(self, data: Buffer) -> list[Frame]:
        """Take the next bytes of the stream; return the frames that they complete.

        Raises RemoteProtocolError at a violation and on every later call.  Frames completed before
        the violation are never lost: when there are any, they are returned, and the error comes
        from the next call, for which `feed(b"")` will do.
        """
        if self._violation is not None:
            raise RemoteProtocolError(self._violation)
        rest = memoryview(data)
        frames: list[Frame] = []
        try:
            while True:
                section, rest = self._take(rest)
                if section is None:
                    return frames
                frame = self._advance(section)
                if frame is not None:
                    frames.append(frame)
        except RemoteProtocolError as error:
            self._fail(error)
            if not frames:
                raise
        return frames

    def eof(self) -> None:
        """The stream has ended: raise RemoteProtocolError unless it ended between two frames."""
        if self._violation is not None:
            raise RemoteProtocolError(self._violation)
        if self._stage != "header" or self._filled:
            error = RemoteProtocolError(
                f"stream ended inside a frame: got {self._filled} of {self._wanted} bytes of its "
                f"{self._stage}; the peer died or cut the connection"
            )
            self._fail(error)
            raise error

    def _fail(self, error: RemoteProtocolError) -> None:
        self._violation = str(error)
        self._expect("header", HEADER_BYTES)

    def _expect(self, stage: str, wanted: int) -> None:
        self._stage = stage
        self._wanted = wanted
        self._filled = 0
        self._partial: bytearray | None = None

    def _take(self, data: memoryview) -> tuple[Buffer | None, memoryview]:
        """The present section if `data` completes it, as memory of our own, and what is left."""
        missing = self._wanted - self._filled
        if self._partial is None:
            if len(data) >= missing:
                return bytes(data[:missing]), data[missing:]
            if not data:
                return None, data
            self._partial = bytearray(self._wanted)
        piece = data[:missing]
        self._partial[self._filled : self._filled + len(piece)] = piece
        self._filled += len(piece)
        if self._filled < self._wanted:
            return None, data[len(piece) :]
        return self._partial, data[len(piece) :]

    def _advance(self, section: Buffer) -> Frame | None:
        """Digest one complete section; return the frame if it was the last one."""
        if self._stage == "header":
            header = _parse_header(section, self._limits)
            self._header = header
            table_bytes = header.buffer_count * _TABLE_ENTRY_BYTES
            self._expect("body and buffer table", header.body_bytes + table_bytes)
            return None
        header = self._header
        if self._stage == "raw buffers":
            self._expect("header", HEADER_BYTES)
            return Frame(header.kind, self._body, _split(section, self._lengths))
        computed = zlib.crc32(section)
        if computed != header.block_crc:
            raise RemoteProtocolError(
                f"frame of kind {header.kind}: expected CRC-32 {header.block_crc:#010x} of body "
                f"and buffer table, got {computed:#010x}; the stream is corrupt"
            )
        self._body = bytes(section[: header.body_bytes])
        if not header.buffer_count:
            self._expect("header", HEADER_BYTES)
            return Frame(header.kind, self._body)
        self._lengths = struct.unpack_from(f"<{header.buffer_count}Q", section, header.body_bytes)
        if sum(self._lengths) != header.raw_bytes:
            raise RemoteProtocolError(
                f"frame of kind {header.kind}: the header announces {header.raw_bytes} raw bytes, "
                f"the buffer table adds up to {sum(self._lengths)}"
            )
        self._expect("raw buffers", header.raw_bytes)
        return None


def _split(raw: Buffer, lengths: tuple[int, ...]) -> tuple[memoryview, ...]:
    view = memoryview(raw).toreadonly()
    buffers = []
    for length in lengths:
        buffers.append(view[:length])
        view = view[length:]
    return tuple(buffers)
