# SPDX-License-Identifier: Apache-2.0
"""Messages: each survives the trip unchanged; anything else is refused with the field named."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import attrs
import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spanker import errors
from spanker.actors import message as m
from spanker.actors.frame import (
    DEFAULT_LIMITS,
    Frame,
    FrameDecoder,
    FrameLimits,
    check_frame,
    encode_frame,
)
from spanker.errors import LocalProtocolError, RemoteProtocolError

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1

COUNTERS = m.Counters(1, 2, 3, 4, 5, 6, 7, 8, 9, None, (10, U64), ())

MESSAGES = (
    m.Describe(),
    m.CardInfo(1, U32, U64, "InnerJib7EA é", "soft:2@avx2", 16 << 30, 64, 4),
    m.AllocBuffers(()),
    m.AllocBuffers((0, 1, U64)),
    m.BuffersAllocated(()),
    m.BuffersAllocated((3, U64)),
    m.FreeBuffer(7),
    m.WriteBuffers(()),
    m.WriteBuffers(((7, 32, 7),), buffers=(b"weights",)),
    m.WriteBuffers(((7, 32, 3), (8, U64, 0)), buffers=(b"abc", b"")),
    m.ReadBuffer(7, 0, 7),
    m.BufferData(buffers=(b"weights",)),
    m.LoadProgram(buffers=(b"",)),
    m.ProgramLoaded(3),
    m.UnloadProgram(3),
    m.RunStep(3, buffers=(b"",)),
    m.RunStep(3, ((7, 0, 16), (8, U64, 0)), buffers=(bytes(96),)),
    m.OpenWindows(()),
    m.OpenWindows((1, U64)),
    m.RunLent(3, (), buffers=(b"",)),
    m.RunLent(3, (7, U64), buffers=(bytes(96), b"a", b"")),
    m.Relayed(3, buffers=(b"message",)),
    m.MapFile(3, ()),
    m.MapFile(U32, ((7, 32, 7), (8, U64, 0))),
    m.StepDone(U64, 0),
    m.StepDone(1, 2, buffers=(b"a", b"")),
    m.ReadCounters(),
    COUNTERS,
    attrs.evolve(COUNTERS, waiting_for=3),
    m.Abort(9),
    m.StartTrace(0),
    m.StartTrace(U64),
    m.ReadTrace(U32),
    m.TraceData(0, buffers=(b"",)),
    m.TraceData(U64, buffers=(bytes(64),)),
    m.Stop(),
    m.Ok(),
    m.Failed("CardHungError", "card 3: stuck", 3),
    m.Failed("ConfigError", "", None),
)


def frame_of(kind: int, *fields: object, buffers: int = 0) -> Frame:
    return Frame(kind, msgpack.packb(fields), (b"",) * buffers)


def test_the_examples_cover_every_message_class() -> None:
    assert {type(message) for message in MESSAGES} == {
        codec.message_class for codec in m.KINDS.values()
    }


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_check_refuses_what_encoding_would(message: m.Message) -> None:
    """Of the message, and of the message with something wrong, in the same words."""

    def refusal(check: Callable[[m.Message, int], object], what: m.Message, number: int) -> str:
        try:
            check(what, number)
        except LocalProtocolError as error:
            return str(error)
        return ""

    for limits in (
        DEFAULT_LIMITS,
        FrameLimits(body_bytes_max=5),
        FrameLimits(raw_bytes_max=6),
        FrameLimits(buffers_max=1),
    ):

        def encoded(what: m.Message, number: int, limits: FrameLimits = limits) -> None:
            check_frame(m.encode(what, number), limits)

        def checked(what: m.Message, number: int, limits: FrameLimits = limits) -> None:
            m.check(what, number, limits)

        numbers = [f.name for f in attrs.fields(type(message)) if f.type in ("U32", "U64")]
        variants = [
            message,
            attrs.evolve(message, buffers=(*message.buffers, b"")),
            attrs.evolve(message, buffers=(np.zeros(3),)),
            attrs.evolve(message, buffers=(memoryview(bytes(8))[::2],)),
            attrs.evolve(message, buffers=(b"12345678",) * 70),
            *(attrs.evolve(message, **{name: -1}) for name in numbers),
        ]
        for what in variants:
            for number in (0, U32, U32 + 1, -1):
                assert refusal(checked, what, number) == refusal(encoded, what, number)
        assert len(message.buffers) or refusal(checked, variants[4], 0)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_trip(message: m.Message) -> None:
    for request_id in (0, 1, U32):
        frame = m.encode(message, request_id)
        assert m.decode(frame) == (request_id, message)
        (over_the_wire,) = FrameDecoder().feed(b"".join(encode_frame(frame)))
        assert m.decode(over_the_wire) == (request_id, message)


def test_raw_buffers_are_passed_by_reference() -> None:
    data = bytearray(1000)
    _, got = m.decode(m.encode(m.WriteBuffers(((1, 0, 1000),), buffers=(data,)), 5))
    assert got.buffers[0] is data


def test_the_kinds_are_those_of_the_document() -> None:
    text = Path(__file__, "../../../docs/api/wire-protocol.md").resolve().read_text()
    rows = {
        cells[0].strip(" `"): [cell.strip(" `") for cell in cells[1:]]
        for line in text.splitlines()
        if line.startswith("| `0x") and (cells := line.strip("|").split(" | "))
    }
    expected = {}
    for codec in m.KINDS.values():
        fields = ", ".join(codec.names) or "–"
        least, most = codec.buffers_min, codec.buffers_max
        count = str(least) if least == most else f"{least}–{most}"
        row = [codec.message_class.__name__, fields, count]
        if codec.message_class in m.REPLIES:
            row.append(m.REPLIES[codec.message_class].__name__)
        expected[f"0x{codec.kind:02X}"] = row
    assert {kind: row[: len(expected.get(kind, row))] for kind, row in rows.items()} == expected


# --- what is refused ---------------------------------------------------------------

OUT_OF_RANGE = (
    (m.FreeBuffer(-1), "FreeBuffer, field handle: expected u64, got int -1"),
    (m.FreeBuffer(U64 + 1), "handle: expected u64"),
    (m.FreeBuffer(True), "handle: expected u64, got bool True"),
    (m.FreeBuffer(1.0), "handle: expected u64, got float"),  # type: ignore[arg-type]
    (m.FreeBuffer(None), "handle: expected u64, got NoneType"),  # type: ignore[arg-type]
    (m.CardInfo(U32 + 1, 1, 1, "", "", 1, 1), "protocol_version: expected u32"),
    (m.CardInfo(1, 1, 1, "x" * 257, "", 1, 1), "name: expected str"),
    (m.CardInfo(1, 1, 1, b"x", "", 1, 1), "name: expected str"),  # type: ignore[arg-type]
    (m.RunStep(1, ((1, 2),), buffers=(b"",)), "reads: expected array"),  # type: ignore[arg-type]
    (m.RunStep(1, ((1, 2, -3),), buffers=(b"",)), "reads: expected array"),
    (m.RunStep(1, (5,), buffers=(b"",)), "reads: expected array"),  # type: ignore[arg-type]
    (m.RunStep(1, ((1, 2, 3),) * 65, buffers=(b"",)), "reads: expected array"),
    (m.AllocBuffers((1, -1)), "AllocBuffers, field sizes: expected array of u64"),
    (m.AllocBuffers((U64, True)), "sizes: expected array of u64"),
    (m.AllocBuffers((1,) * 65), "sizes: expected array of u64"),
    (m.BuffersAllocated((None,)), "handles: expected array of u64"),  # type: ignore[arg-type]
    (m.WriteBuffers(((1, 2),), buffers=(b"",)), "writes: expected array"),  # type: ignore[arg-type]
    (m.WriteBuffers(((1, 2, -3),), buffers=(b"",)), "writes: expected array"),
    (m.WriteBuffers(((1, 2, 3),) * 65, buffers=(b"",)), "writes: expected array"),
    (m.WriteBuffers((), buffers=(b"",) * 65), "WriteBuffers: expected 0 to 64 raw buffers, got 65"),
    (attrs.evolve(COUNTERS, waiting_for=1 << 16), "waiting_for: expected u16 or nil"),
    (attrs.evolve(COUNTERS, link_tx_bytes=(-1,)), "link_tx_bytes: expected array"),
    (attrs.evolve(COUNTERS, link_rx_bytes=(0,) * 65), "link_rx_bytes: expected array"),
    (m.StartTrace(-1), "StartTrace, field events: expected u64"),
    (m.ReadTrace(U32 + 1), "ReadTrace, field events: expected u32"),
    (m.TraceData(0), "TraceData: expected 1 raw buffers, got 0"),
    (m.Failed("E", "x", 1 << 16), "card: expected u16 or nil"),
    (m.Failed("E", "x" * 4097, None), "message: expected str"),
    (m.LoadProgram(), "LoadProgram: expected 1 raw buffers, got 0"),
    (m.LoadProgram(buffers=(b"", b"")), "expected 1 raw buffers, got 2"),
    (m.StepDone(1, 0, buffers=(b"",) * 65), "expected 0 to 64 raw buffers, got 65"),
    (m.Ok(buffers=(b"",)), "expected 0 raw buffers, got 1"),
)


@pytest.mark.parametrize(("message", "text"), OUT_OF_RANGE)
def test_our_own_mistake_is_a_local_error(message: m.Message, text: str) -> None:
    with pytest.raises(LocalProtocolError, match=text) as caught:
        m.encode(message, 1)
    assert "\n" not in str(caught.value)


# msgpack itself has no integers beyond 64 bits.
@pytest.mark.parametrize("message", [message for message, _ in OUT_OF_RANGE[:1] + OUT_OF_RANGE[2:]])
def test_the_same_mistake_by_the_peer_is_a_remote_error(message: m.Message) -> None:
    names = [f.name for f in attrs.fields(type(message)) if f.name != "buffers"]
    values = [getattr(message, name) for name in names]
    kind = next(c.kind for c in m.KINDS.values() if c.message_class is type(message))
    with pytest.raises(RemoteProtocolError) as caught:
        m.decode(Frame(kind, msgpack.packb([1, *values]), message.buffers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("request_id", [-1, U32 + 1, None, "1", True])
def test_request_ids_are_32_bits(request_id: int) -> None:
    with pytest.raises(LocalProtocolError, match="request id"):
        m.encode(m.Ok(), request_id)
    with pytest.raises(RemoteProtocolError, match="request id"):
        m.decode(frame_of(0x80, request_id))


def test_text_that_cannot_be_encoded_is_a_local_error() -> None:
    with pytest.raises(LocalProtocolError, match="cannot be encoded"):
        m.encode(m.Failed("CardError", "\udc80", None), 1)


def test_a_class_outside_the_protocol_is_a_local_error() -> None:
    with pytest.raises(LocalProtocolError, match="not a message"):
        m.encode(m.Message(), 1)


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (frame_of(0x7F, 1), "unknown kind 0x007f"),
        (frame_of(0xFFFF, 1), "unknown kind"),
        (Frame(0x80, b""), "not valid msgpack"),
        (Frame(0x80, msgpack.packb([1]) + b"\0"), "not valid msgpack"),
        (Frame(0x80, b"\xc1"), "not valid msgpack"),
        (Frame(0x80, msgpack.packb({0: 1})), "not valid msgpack"),
        (Frame(0x80, msgpack.packb([msgpack.ExtType(1, b"x")])), "not valid msgpack"),
        (Frame(0x80, msgpack.packb([b"1"])), "not valid msgpack"),
        (Frame(0x80, b"\x91" * 100_000), "not valid msgpack"),
        (Frame(0xFF, b"\x94\x01\xa1\xff\xa0\xc0"), "not valid msgpack"),
        (Frame(0x80, msgpack.packb(1)), "expected an array of 1 fields, got int"),
        (frame_of(0x80), "expected an array of 1 fields, got 0 fields"),
        (frame_of(0x80, 1, 2), "expected an array of 1 fields, got 2 fields"),
        (frame_of(0x02, 1, 1), "unknown kind 0x0002"),
        (frame_of(0x03, 1), "expected an array of 2 fields, got 1 fields"),
        (frame_of(0x03, 1, -1), "FreeBuffer, field handle: expected u64, got int -1"),
        (frame_of(0x06, 1), "LoadProgram: expected 1 raw buffers, got 0"),
    ],
)
def test_malformed_messages_are_remote_errors(frame: Frame, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text) as caught:
        m.decode(frame)
    assert len(str(caught.value)) < 300


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(m.KINDS)), st.binary(max_size=60), st.integers(0, 3))
@example(0x80, b"\xc7\x0c\xff" + b"\xff" * 12, 0)  # a timestamp out of range
def test_random_bodies_decode_to_an_error_or_to_a_message_that_encodes(
    kind: int, body: bytes, buffers: int
) -> None:
    try:
        request_id, message = m.decode(Frame(kind, body, (b"",) * buffers))
    except RemoteProtocolError:
        return
    assert m.decode(m.encode(message, request_id)) == (request_id, message)


def test_mutated_bodies_decode_to_an_error_or_to_a_message() -> None:
    seed = 77
    print("seed", seed)
    rng = random.Random(seed)
    refused = 0
    for _ in range(4000):
        frame = m.encode(rng.choice(MESSAGES), rng.getrandbits(32))
        body = bytearray(frame.body)
        for _ in range(rng.randint(1, 3)):
            body[rng.randrange(len(body))] = rng.getrandbits(8)
        try:
            m.decode(Frame(frame.kind, bytes(body), frame.buffers))
        except RemoteProtocolError:
            refused += 1
    assert refused > 1000


def test_nested_length_claims_of_a_short_body_claim_no_memory() -> None:
    # array32 headers, each claiming 64 Ki elements, nested as deep as they go.
    body = b"\xdd\x00\x01\x00\x00" * 500
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            m.decode(Frame(0x80, body))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# --- replies ------------------------------------------------------------------------


def test_every_request_declares_its_reply() -> None:
    requests = {c.message_class for c in m.KINDS.values() if issubclass(c.message_class, m.Request)}
    assert set(m.REPLIES) == requests
    assert all(not issubclass(reply, m.Request) for reply in m.REPLIES.values())


def test_the_right_reply_is_handed_on() -> None:
    done = m.StepDone(1, 2, buffers=(b"ab", b""))
    step = m.RunStep(1, ((7, 0, 2), (7, 2, 0)), buffers=(b"",))
    assert step.check_reply(done) is done
    assert m.ReadBuffer(1, 0, 3).check_reply(m.BufferData(buffers=(b"abc",))).buffers == (b"abc",)
    assert m.Stop().check_reply(m.Ok()) == m.Ok()
    for events in (0, 2, 3):
        traced = m.TraceData(9, buffers=(bytes(32 * events),))
        assert m.ReadTrace(3).check_reply(traced) is traced


@pytest.mark.parametrize(
    ("request_", "reply", "text"),
    [
        (m.Describe(), m.Ok(), "expected CardInfo, got Ok"),
        (m.Stop(), m.Stop(), "expected Ok, got Stop"),
        (m.ReadBuffer(1, 0, 3), m.BufferData(buffers=(b"ab",)), r"\(3,\) bytes, got \(2,\)"),
        (m.RunStep(1, ((1, 0, 1),), buffers=(b"",)), m.StepDone(1, 1), r"got \(\)"),
        (m.RunStep(1, buffers=(b"",)), m.StepDone(1, 1, buffers=(b"",)), r"got \(0,\)"),
        (m.ReadTrace(3), m.Ok(), "expected TraceData, got Ok"),
        (m.ReadTrace(3), m.TraceData(0, buffers=(bytes(31),)), "at most 3 events of 32 .* got 31"),
        (m.ReadTrace(3), m.TraceData(0, buffers=(bytes(128),)), "got 128 bytes"),
    ],
)
def test_the_wrong_reply_is_a_remote_error(
    request_: m.Request[m.Message], reply: m.Message, text: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=text):
        request_.check_reply(reply)


# --- failures -----------------------------------------------------------------------


def error_classes() -> list[type[errors.SpankerError]]:
    found = [c for c in vars(errors).values() if isinstance(c, type)]
    return [c for c in found if issubclass(c, errors.SpankerError)]


@pytest.mark.parametrize("error_class", error_classes())
def test_every_error_of_the_tree_crosses_the_wire(error_class: type[errors.SpankerError]) -> None:
    report = m.failed(error_class("card 3: went wrong; try again"), card=3)
    _, decoded = m.decode(m.encode(report, 1))
    assert isinstance(decoded, m.Failed)
    with pytest.raises(errors.SpankerError, match=r"^card 3: went wrong; try again$") as caught:
        m.Stop().check_reply(decoded)
    assert type(caught.value) is error_class
    if isinstance(caught.value, errors.CardError):
        assert caught.value.card == 3


def test_an_error_that_knows_its_card_keeps_it() -> None:
    assert m.failed(errors.CardHungError("stuck", card=5), card=1).card == 5
    assert m.failed(errors.CardHungError("stuck")).card is None


@pytest.mark.parametrize(
    "name", ["KeyError", "SystemExit", "annotations", "__doc__", "", "Ünknown"]
)
def test_names_outside_the_tree_become_card_error(name: str) -> None:
    with pytest.raises(errors.CardError) as caught:
        m.raise_failed(m.Failed(name, "boom", 2))
    assert type(caught.value) is errors.CardError
    assert str(caught.value) == f"{name}: boom"
    assert caught.value.card == 2


def test_other_exceptions_are_reported_with_their_class() -> None:
    assert m.failed(ZeroDivisionError("by zero"), 1) == m.Failed(
        "CardError", "ZeroDivisionError: by zero", 1
    )

    class CardError(Exception):
        """Shares a name with one of ours and nothing else."""

    assert m.failed(CardError("x"), 1).message == "CardError: x"


def test_a_report_always_fits_into_its_message() -> None:
    report = m.failed(ValueError("\udc80" + "é" * 5000))
    assert m.decode(m.encode(report, 1)) == (1, report)
    assert report.message.endswith("...")


def test_text_of_a_peer_stays_one_harmless_line() -> None:
    with pytest.raises(errors.CardError) as caught:
        m.raise_failed(m.Failed("CardError", "a\nb\x1b[2Jc", None))
    assert str(caught.value) == "a b [2Jc"
