# SPDX-License-Identifier: Apache-2.0
"""Frames: what goes in comes out, whatever the split; whatever else goes in is an error."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spanker.actors.frame import (
    HEADER_BYTES,
    Deferred,
    Frame,
    FrameDecoder,
    FrameLimits,
    check_frame,
    crc32c,
    encode_frame,
)
from spanker.errors import ConfigError, LocalProtocolError, RemoteProtocolError

FRAMES = (
    Frame(1, b""),
    Frame(0xFFFF, b"body"),
    Frame(2, b"", (b"",)),
    Frame(3, b"x" * 300, (b"abc", b"", b"0123456789" * 40)),
    Frame(4, b"y", (b"", b"")),
)


def wire(*frames: Frame) -> bytes:
    return b"".join(piece for frame in frames for piece in encode_frame(frame))


def header(
    *,
    magic: bytes = b"SPKR",
    version: int = 1,
    kind: int = 7,
    flags: int = 0,
    buffers: int = 0,
    body: int = 0,
    raw: int = 0,
    block_crc: int = 0,
) -> bytes:
    """A header with a good CRC of its own, from the document's table and not from the encoder."""
    fields = struct.pack("<4sHHHHIQI", magic, version, kind, flags, buffers, body, raw, block_crc)
    return fields + struct.pack("<I", crc32c(fields))


# --- layout -----------------------------------------------------------------------


def test_crc32c_gives_the_published_check_values() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


def test_layout_is_the_documented_one() -> None:
    table = struct.pack("<QQ", 3, 0)
    expected = header(kind=5, buffers=2, body=4, raw=3, block_crc=zlib.crc32(b"body" + table))
    assert len(expected) == HEADER_BYTES == 32
    assert wire(Frame(5, b"body", (b"abc", b""))) == expected + b"body" + table + b"abc"


def test_encoding_passes_raw_buffers_on_without_a_copy() -> None:
    big = bytearray(1 << 20)
    view = memoryview(big)[4096:]
    pieces = encode_frame(Frame(1, b"b", (big, view)))
    assert pieces[1] is big
    assert pieces[2] is view


@pytest.mark.parametrize("array_format", ["f", "H", "b"])
def test_buffers_of_other_element_types_count_in_bytes(array_format: str) -> None:
    view = memoryview(bytes(range(64))).cast(array_format)
    (frame,) = FrameDecoder().feed(wire(Frame(1, b"", (view,))))
    assert frame.buffers == (bytes(range(64)),)


def test_buffers_that_are_not_flat_memory_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="C-contiguous"):
        encode_frame(Frame(1, b"", (memoryview(b"abcdef")[::2],)))
    with pytest.raises(LocalProtocolError, match="got list"):
        encode_frame(Frame(1, b"", ([1, 2],)))  # type: ignore[arg-type]


def test_deferred_buffers_are_made_where_the_frame_is_encoded_and_not_before() -> None:
    filled = 0

    def fill(out: npt.NDArray[np.uint8]) -> None:
        nonlocal filled
        filled += 1
        assert out.dtype == np.uint8 and out.flags.c_contiguous and out.shape == (300,)
        out[:] = np.arange(300) % 251

    deferred = Deferred(300, fill)
    frame = Frame(1, b"body", (b"abc", deferred))
    check_frame(frame)
    assert repr(frame) == "Frame(kind=1, body=b'body', buffers=(<3 bytes>, <300 bytes>))"
    for limits in (FrameLimits(raw_bytes_max=302), FrameLimits(buffers_max=1)):
        with pytest.raises(LocalProtocolError):
            encode_frame(frame, limits)
    assert filled == 0
    data = bytes(i % 251 for i in range(300))
    assert wire(frame) == wire(Frame(1, b"body", (b"abc", data)))
    assert filled == 1


def test_repr_tells_sizes_and_not_contents() -> None:
    assert repr(Frame(1, b"b", (bytes(1 << 20),))) == (
        "Frame(kind=1, body=b'b', buffers=(<1048576 bytes>))"
    )


# --- decoding, split anyhow ---------------------------------------------------------


def test_frames_decode_whole() -> None:
    decoder = FrameDecoder()
    assert decoder.feed(wire(*FRAMES)) == list(FRAMES)
    decoder.eof()


def test_frames_decode_byte_by_byte_and_no_sooner_than_complete() -> None:
    decoder = FrameDecoder()
    got = []
    for frame in FRAMES:
        data = wire(frame)
        for i in range(len(data) - 1):
            assert decoder.feed(data[i : i + 1]) == []
        got += decoder.feed(data[-1:])
    assert got == list(FRAMES)
    decoder.eof()


@pytest.mark.parametrize("frame", FRAMES)
def test_every_prefix_wants_more_and_every_split_gives_the_frame(frame: Frame) -> None:
    data = wire(frame)
    for cut in range(1, len(data)):
        decoder = FrameDecoder()
        assert decoder.feed(data[:cut]) == []
        assert 0 < decoder.bytes_wanted <= len(data) - cut
        assert decoder.feed(data[cut:]) == [frame]
        truncated = FrameDecoder()
        truncated.feed(data[:cut])
        with pytest.raises(RemoteProtocolError, match="ended inside a frame"):
            truncated.eof()
        with pytest.raises(RemoteProtocolError, match="ended inside a frame"):
            truncated.feed(data[cut:])


def test_random_splits_of_random_frames() -> None:
    seed = 20260
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(30):
        frames = [
            Frame(
                rng.randrange(1 << 16),
                rng.randbytes(rng.choice((0, 1, 40, 3000))),
                tuple(rng.randbytes(rng.choice((0, 1, 31, 5000))) for _ in range(rng.randrange(5))),
            )
            for _ in range(rng.randrange(1, 6))
        ]
        data = memoryview(wire(*frames))
        decoder = FrameDecoder()
        got = []
        while data:
            n = rng.choice((1, 2, 31, 32, 33, 1000, 20000))
            got += decoder.feed(bytearray(data[:n]) if rng.random() < 0.5 else data[:n])
            data = data[n:]
        assert got == frames
        decoder.eof()


def test_decoded_buffers_do_not_alias_what_was_fed() -> None:
    data = bytearray(wire(Frame(1, b"", (b"abc",))))
    for split in (len(data), len(data) - 2):
        decoder = FrameDecoder()
        fed = bytearray(data)
        frames = decoder.feed(fed[:split]) + decoder.feed(memoryview(fed)[split:])
        fed[:] = bytes(len(fed))
        assert frames == [Frame(1, b"", (b"abc",))]
        assert isinstance(frames[0].buffers[0], memoryview)
        assert frames[0].buffers[0].readonly


def test_feeding_is_linear_in_the_bytes_fed() -> None:
    def cost_s(nbytes: int) -> float:
        data = memoryview(wire(Frame(1, b"", (bytes(nbytes),))))
        best = float("inf")
        for _ in range(3):
            decoder = FrameDecoder()
            start = time.process_time()
            for at in range(0, len(data), 1024):
                decoder.feed(data[at : at + 1024])
            best = min(best, time.process_time() - start)
        return best

    # Quadratic copying would make 16 times the bytes cost 256 times as much.
    assert cost_s(8 << 20) < 60 * cost_s(512 << 10)


# --- violations ---------------------------------------------------------------------

LIMITS = FrameLimits(body_bytes_max=100, raw_bytes_max=1000, buffers_max=3)

BAD = {
    "other protocol": (b"GET / HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n", "magic"),
    "version": (header(version=2), "version 1, got 2"),
    "flags": (header(flags=1), "flags"),
    "body too long": (header(body=101), "at most 100 body bytes, got 101"),
    "body far too long": (header(body=0xFFFFFFFF), "at most 100 body bytes"),
    "raw too long": (header(raw=1001, buffers=1), "at most 1000 raw bytes"),
    "raw far too long": (header(raw=(1 << 64) - 1, buffers=1), "at most 1000 raw bytes"),
    "too many buffers": (header(buffers=4), "at most 3 raw buffers"),
    "raw bytes without buffers": (header(raw=1), "without raw buffers"),
    "header CRC": (header()[:-1] + bytes([header()[-1] ^ 1]), "CRC-32C"),
    "body CRC": (header(body=1, block_crc=1) + b"a", "CRC-32 0x00000001"),
    "table does not add up": (
        header(raw=5, buffers=1, block_crc=zlib.crc32(struct.pack("<Q", 4))) + struct.pack("<Q", 4),
        "adds up to 4",
    ),
    "table adds up beyond 64 bits": (
        header(raw=1, buffers=2, block_crc=zlib.crc32(struct.pack("<QQ", (1 << 64) - 1, 2)))
        + struct.pack("<QQ", (1 << 64) - 1, 2),
        "adds up to 18446744073709551617",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_violation_is_an_error_then_and_ever_after(name: str) -> None:
    data, text = BAD[name]
    good = wire(Frame(1, b"ok"))
    whole = FrameDecoder(LIMITS)
    for fed in (data, good, b""):
        with pytest.raises(RemoteProtocolError, match=text) as caught:
            whole.feed(fed)
        assert "\n" not in str(caught.value)
    with pytest.raises(RemoteProtocolError, match=text):
        whole.eof()

    bytewise = FrameDecoder(LIMITS)
    with pytest.raises(RemoteProtocolError, match=text):
        for i in range(len(data)):
            assert bytewise.feed(data[i : i + 1]) == []


@pytest.mark.parametrize("name", BAD)
def test_frames_before_a_violation_are_not_lost(name: str) -> None:
    data, text = BAD[name]
    decoder = FrameDecoder(LIMITS)
    assert decoder.feed(wire(Frame(1, b"ok")) + data) == [Frame(1, b"ok")]
    with pytest.raises(RemoteProtocolError, match=text):
        decoder.feed(b"")


@pytest.mark.parametrize("frame", FRAMES)
def test_junk_after_a_frame_is_a_violation(frame: Frame) -> None:
    decoder = FrameDecoder()
    assert decoder.feed(wire(frame) + b"\0" * HEADER_BYTES) == [frame]
    with pytest.raises(RemoteProtocolError, match="magic"):
        decoder.feed(b"")


def test_frames_at_the_limits_pass_and_beyond_them_are_refused_before_sending() -> None:
    at_limit = Frame(9, bytes(100), (bytes(999), b"", b"1"))
    (decoded,) = FrameDecoder(LIMITS).feed(b"".join(encode_frame(at_limit, LIMITS)))
    assert decoded == at_limit
    for beyond in (
        Frame(9, bytes(101)),
        Frame(9, b"", (bytes(500), bytes(501))),
        Frame(9, b"", (b"",) * 4),
        Frame(1 << 16, b""),
        Frame(-1, b""),
    ):
        with pytest.raises(LocalProtocolError):
            encode_frame(beyond, LIMITS)
        with pytest.raises(LocalProtocolError):
            check_frame(beyond, LIMITS)


@pytest.mark.parametrize(
    "bad", [{"buffers_max": 1 << 16}, {"body_bytes_max": 1 << 32}, {"raw_bytes_max": -1}]
)
def test_limits_that_the_header_cannot_express_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        FrameLimits(**bad)


# --- hostile bytes --------------------------------------------------------------------

SMALL = FrameLimits(body_bytes_max=4096, raw_bytes_max=16384, buffers_max=8)


@st.composite
def mutated_streams(draw: st.DrawFn) -> bytes:
    data = bytearray(wire(*draw(st.lists(st.sampled_from(FRAMES), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        what = draw(st.sampled_from(("flip", "cut", "insert", "reseal")))
        if what == "flip" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=40))
        elif len(data) >= HEADER_BYTES:
            # A liar who gets the header's checksum right reaches the checks behind it.
            data[28:32] = struct.pack("<I", crc32c(data[:28]))
    return bytes(data)


def outcome(data: bytes, step: int) -> tuple[list[Frame], str | None]:
    decoder = FrameDecoder(SMALL)
    frames: list[Frame] = []
    try:
        for at in range(0, len(data), step):
            frames += decoder.feed(data[at : at + step])
        decoder.feed(b"")
        decoder.eof()
    except RemoteProtocolError as error:
        return frames, str(error)
    return frames, None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(mutated_streams(), st.integers(1, 50))
def test_mutated_streams_end_alike_however_they_are_split(data: bytes, step: int) -> None:
    assert outcome(data, step) == outcome(data, len(data) or 1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_never_crash_the_decoder(data: bytes) -> None:
    frames, error = outcome(data, 7)
    assert frames == []
    assert error is not None or not data


def test_no_allocation_beyond_the_limits_whatever_a_header_claims() -> None:
    limits = FrameLimits(body_bytes_max=64 << 10, raw_bytes_max=256 << 10, buffers_max=64)
    claims = [
        header(body=body, raw=raw, buffers=buffers)
        for body in (0, 64 << 10, 0xFFFFFFFF)
        for raw in (0, 256 << 10, 1 << 40, (1 << 64) - 1)
        for buffers in (0, 1, 64, 0xFFFF)
    ]
    entry = struct.pack("<Q", 256 << 10)
    claims.append(header(raw=256 << 10, buffers=1, block_crc=zlib.crc32(entry)) + entry)
    tracemalloc.start()
    try:
        for claim in claims:
            decoder = FrameDecoder(limits)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                for byte in claim + b"z" * 100:
                    decoder.feed(bytes([byte]))
            except RemoteProtocolError:
                pass
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < (256 << 10) + (64 << 10) + 16384
            # What is claimed and refused costs nothing.
            if decoder.bytes_wanted == HEADER_BYTES:
                assert peak < 16384
    finally:
        tracemalloc.stop()
