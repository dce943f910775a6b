# SPDX-License-Identifier: Apache-2.0
"""Messages between the coordinator and a card actor, as typed values.

This module is sans-I/O: it turns a message into a frame and back, and knows nothing of channels or
cards.  A message class below is the whole declaration of a message: its kind number, its fields
with their ranges, how many raw buffers it carries, and, for a request, which reply answers it.
Numbers, fields and versioning rules are specified in docs/api/wire-protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    Generic,
    NoReturn,
    TypeVar,
    get_args,
    get_type_hints,
)

import attrs
import msgpack

from spanker import errors
from spanker.actors.frame import (
    DEFAULT_LIMITS,
    Buffer,
    Frame,
    FrameLimits,
    RawBuffer,
    check_frame,
    flat_buffer,
    repr_sizes,
)
from spanker.device.base import TRACE_EVENT
from spanker.errors import CardError, LocalProtocolError, RemoteProtocolError, SpankerError
from spanker.values import Value, lazy_frozen

PROTOCOL_VERSION = 8

NAME_CHARS_MAX = 256
ERROR_CHARS_MAX = 4096
READS_MAX = DEFAULT_LIMITS.buffers_max
LINKS_MAX = 64

# --- field types -----------------------------------------------------------------
# The annotation of a field carries its check; both sides apply it.


@attrs.frozen(eq=False, repr=False)
class UInt(Value):
    """An integer of so many bits; bool and numpy integers are not integers here."""

    bits: int
    most: int = attrs.field(init=False)

    @most.default
    def _most(self) -> int:
        return (1 << self.bits) - 1

    def accepts(self, value: object) -> bool:
        return type(value) is int and 0 <= value <= self.most

    def __str__(self) -> str:
        return f"u{self.bits}"


@attrs.frozen(eq=False, repr=False)
class OptionalUInt(Value):
    """None, or an integer of so many bits."""

    bits: int

    def accepts(self, value: object) -> bool:
        return value is None or (type(value) is int and 0 <= value < 1 << self.bits)

    def __str__(self) -> str:
        return f"u{self.bits} or nil"


@attrs.frozen(eq=False, repr=False)
class Text(Value):
    """A string of at most so many characters."""

    chars_max: int

    def accepts(self, value: object) -> bool:
        return type(value) is str and len(value) <= self.chars_max

    def __str__(self) -> str:
        return f"str (at most {self.chars_max} characters)"


@attrs.frozen(eq=False, repr=False)
class UInts(Value):
    """A tuple of at most so many u64."""

    count_max: int

    def accepts(self, value: object) -> bool:
        return type(value) is tuple and len(value) <= self.count_max and _all_u64(value)

    def __str__(self) -> str:
        return f"array of u64 (at most {self.count_max})"


@attrs.frozen(eq=False, repr=False)
class UIntTriples(Value):
    """A tuple of at most so many triples of u64."""

    count_max: int

    def accepts(self, value: object) -> bool:
        if type(value) is not tuple or len(value) > self.count_max:
            return False
        return all(type(row) is tuple and len(row) == 3 and _all_u64(row) for row in value)

    def __str__(self) -> str:
        return f"array of [u64, u64, u64] (at most {self.count_max})"


def _all_u64(values: tuple[object, ...]) -> bool:
    for value in values:
        if type(value) is not int or not 0 <= value <= 0xFFFF_FFFF_FFFF_FFFF:
            return False
    return True


U32 = Annotated[int, UInt(32)]
U64 = Annotated[int, UInt(64)]
CardNumber = Annotated[int | None, OptionalUInt(16)]
Name = Annotated[str, Text(NAME_CHARS_MAX)]
ErrorText = Annotated[str, Text(ERROR_CHARS_MAX)]
LinkCounters = Annotated[tuple[int, ...], UInts(LINKS_MAX)]
Sizes = Annotated[tuple[int, ...], UInts(READS_MAX)]
Reads = Annotated[tuple[tuple[int, int, int], ...], UIntTriples(READS_MAX)]

_REQUEST_ID = UInt(32)

# --- the registry ------------------------------------------------------------------


@lazy_frozen
class Message(Value):
    """Base of all messages.  `buffers` are the raw buffers that travel with it, by reference.

    A buffer must not be altered before the reply to its request has come: on a memory channel the
    receiver reads that very memory, and only then calls what makes a deferred one.
    """

    buffers: tuple[Buffer, ...] = attrs.field(default=(), kw_only=True, repr=repr_sizes)


MessageT = TypeVar("MessageT", bound=Message)
# Covariant, so that any request is a Request[Message].
ReplyT_co = TypeVar("ReplyT_co", bound=Message, covariant=True)


@lazy_frozen
class Request(Message, Generic[ReplyT_co]):
    """Base of what the coordinator sends; `ReplyT_co` answers it, or `Failed` does."""

    def reply_sizes(self) -> tuple[int, ...]:
        """The bytes of each raw buffer that the reply must carry."""
        return ()

    def reply_bytes(self) -> int:
        """The raw bytes that the reply carries, or may carry at most."""
        return sum(self.reply_sizes())

    def check_reply(self, reply: Message) -> ReplyT_co:
        """`reply`, known to be the right answer to this request.

        Raises what `Failed` reports, and RemoteProtocolError for an answer of another class or
        with raw buffers of other sizes than asked for.
        """
        if isinstance(reply, Failed):
            raise_failed(reply)
        expected = REPLIES[type(self)]
        if not isinstance(reply, expected):
            raise RemoteProtocolError(
                f"reply to {type(self).__name__}: expected {expected.__name__}, "
                f"got {type(reply).__name__}"
            )
        sizes = tuple(map(len, reply.buffers))
        if sizes != self.reply_sizes():
            raise RemoteProtocolError(
                f"reply to {type(self).__name__}: expected raw buffers of {self.reply_sizes()} "
                f"bytes, got {sizes}"
            )
        return reply  # type: ignore[return-value]


@attrs.frozen(eq=False, repr=False)
class _Codec(Value):
    kind: int
    message_class: type[Message]
    buffers_min: int
    buffers_max: int
    names: tuple[str, ...]
    checks: tuple[Any, ...]
    values: Callable[[Message], tuple[object, ...]]

    @property
    def short(self) -> bool:
        """Whether its body is numbers alone, of SHORT_BYTES at most."""
        return all(type(check) in (UInt, OptionalUInt, UInts) for check in self.checks)


_BY_KIND: dict[int, _Codec] = {}
_BY_CLASS: dict[type[Message], _Codec] = {}
_REPLIES: dict[type[Message], type[Message]] = {}
# Those with a short body, one array of numbers and a few numbers; and what accepts each field.
_SHORT: dict[type[Message], tuple[_Codec, tuple[Callable[[object], bool], ...]]] = {}
SHORT_BYTES = 1024

KINDS: Mapping[int, _Codec] = MappingProxyType(_BY_KIND)
"""Every message of the protocol by its kind number."""

REPLIES: Mapping[type[Message], type[Message]] = MappingProxyType(_REPLIES)
"""The reply class that answers each request class."""


def _values_getter(names: tuple[str, ...]) -> Callable[[Message], tuple[object, ...]]:
    # attrgetter yields a tuple only for two names or more.
    if len(names) > 1:
        return attrgetter(*names)
    return lambda message: tuple(getattr(message, name) for name in names)


def _wire(
    kind: int, *, buffers: int | tuple[int, int] = 0
) -> Callable[[type[MessageT]], type[MessageT]]:
    """Enter a message class under `kind`, with so many raw buffers or a range of their number."""

    def register(message_class: type[MessageT]) -> type[MessageT]:
        hints = get_type_hints(message_class, include_extras=True)
        names = tuple(name for name in hints if name != "buffers")
        checks = tuple(hints[name].__metadata__[0] for name in names)
        least, most = (buffers, buffers) if isinstance(buffers, int) else buffers
        codec = _Codec(kind, message_class, least, most, names, checks, _values_getter(names))
        assert kind not in _BY_KIND, f"kind {kind} is taken"
        _BY_KIND[kind] = codec
        _BY_CLASS[message_class] = codec
        if codec.short and sum(type(check) is UInts for check in checks) < 2:
            _SHORT[message_class] = codec, tuple(check.accepts for check in checks)
        if issubclass(message_class, Request):
            (_REPLIES[message_class],) = get_args(message_class.__orig_bases__[0])  # type: ignore[attr-defined]
        return message_class

    return register


# --- replies -------------------------------------------------------------------------


@_wire(0x80)
@lazy_frozen
class Ok(Message):
    """Done; there is nothing to tell."""


@_wire(0x81)
@lazy_frozen
class CardInfo(Message):
    """What a card is.  A coordinator refuses versions unlike its own."""

    protocol_version: U32
    semantics_version: U32
    serial: U64
    name: Name
    isa: Name
    ddr_bytes: U64
    max_programs: U32
    max_windows: U32 = 0
    meets: U32 = 0
    maps: U32 = 0
    relays: U32 = 0
    ddr_granule: U32 = 64


@_wire(0x83, buffers=1)
@lazy_frozen
class BufferData(Message):
    """The bytes that ReadBuffer asked for, as one raw buffer."""


@_wire(0x87)
@lazy_frozen
class BuffersAllocated(Message):
    """Handles in the order of the sizes asked for."""

    handles: Sizes


@_wire(0x84)
@lazy_frozen
class ProgramLoaded(Message):
    program: U64


@_wire(0x85, buffers=(0, READS_MAX))
@lazy_frozen
class StepDone(Message):
    """A step has completed; one raw buffer for each of its reads, in order."""

    fence: U64
    busy_ns: U64


@_wire(0x86)
@lazy_frozen
class Counters(Message):
    """Totals since the card was opened, and where it stands.

    `progress` grows whenever anything gets done; `queued` submissions have not completed;
    `waiting_for` is the card whose link the current command waits on.  The link counters are by
    card number; `links_down` are the cards whose link with this one is not up.  `relayed_out` and
    `relayed_in` are the `Relayed` messages that its actor has sent and got since the last `Abort`.
    """

    commands: U64
    steps: U64
    ddr_read_bytes: U64
    ddr_written_bytes: U64
    busy_ns: U64
    progress: U64
    ddr_used_bytes: U64
    ddr_total_bytes: U64
    queued: U32
    waiting_for: CardNumber
    link_tx_bytes: LinkCounters
    link_rx_bytes: LinkCounters
    links_down: LinkCounters = ()
    relayed_out: U64 = 0
    relayed_in: U64 = 0


@_wire(0x88, buffers=1)
@lazy_frozen
class TraceData(Message):
    """Executed commands, oldest first, packed as `device.base.TRACE_EVENT` in the raw buffer; so
    many were `lost` since StartTrace for want of room."""

    lost: U64


@_wire(0xFF)
@lazy_frozen
class Failed(Message):
    """The reply to any request that failed: a class name of spanker.errors, and its text."""

    error: Name
    message: ErrorText
    card: CardNumber


# --- requests ------------------------------------------------------------------------


@_wire(0x01)
@lazy_frozen
class Describe(Request[CardInfo]):
    """Who are you?  The first request on a channel."""


@_wire(0x03)
@lazy_frozen
class FreeBuffer(Request[Ok]):
    handle: U64


@_wire(0x0C)
@lazy_frozen
class AllocBuffers(Request[BuffersAllocated]):
    """Allocate a buffer of each of these sizes; all of them or none."""

    sizes: Sizes


@_wire(0x0D, buffers=(0, READS_MAX))
@lazy_frozen
class WriteBuffers(Request[Ok]):
    """Write raw buffers into card buffers: `writes` are (handle, offset, nbytes), one for each raw
    buffer, of just that size."""

    writes: Reads
    buffers: tuple[RawBuffer, ...] = attrs.field(default=(), kw_only=True, repr=repr_sizes)  # type: ignore[assignment]


@_wire(0x05)
@lazy_frozen
class ReadBuffer(Request[BufferData]):
    handle: U64
    offset: U64
    nbytes: U64

    def reply_sizes(self) -> tuple[int, ...]:
        return (self.nbytes,)


@_wire(0x06, buffers=1)
@lazy_frozen
class LoadProgram(Request[ProgramLoaded]):
    """Load the command bytes in the raw buffer."""


@_wire(0x07)
@lazy_frozen
class UnloadProgram(Request[Ok]):
    program: U64


@_wire(0x08, buffers=1)
@lazy_frozen
class RunStep(Request[StepDone]):
    """Run a program with the parameter block in the raw buffer, then read back card memory.

    `reads` are (handle, offset, nbytes).
    """

    program: U64
    reads: Reads = ()

    def reply_sizes(self) -> tuple[int, ...]:
        return tuple(nbytes for _, _, nbytes in self.reads)


@_wire(0x09)
@lazy_frozen
class ReadCounters(Request[Counters]):
    pass


@_wire(0x0A)
@lazy_frozen
class Abort(Request[Ok]):
    """Abort what runs, complete every fence, and enter `epoch`."""

    epoch: U64


@_wire(0x0E)
@lazy_frozen
class StartTrace(Request[Ok]):
    """Record executed commands from now on, at most `events` that nobody has read; 0 stops.  Only
    between steps."""

    events: U64


@_wire(0x0F)
@lazy_frozen
class ReadTrace(Request[TraceData]):
    """Take up to `events` of the recorded commands."""

    events: U32

    def reply_bytes(self) -> int:
        return self.events * TRACE_EVENT.size

    def check_reply(self, reply: Message) -> TraceData:
        if not isinstance(reply, TraceData):
            return super().check_reply(reply)
        nbytes = len(reply.buffers[0])
        if nbytes % TRACE_EVENT.size or nbytes > self.reply_bytes():
            raise RemoteProtocolError(
                f"reply to ReadTrace: expected at most {self.events} events of "
                f"{TRACE_EVENT.size} bytes, got {nbytes} bytes"
            )
        return reply


@_wire(0x10)
@lazy_frozen
class OpenWindows(Request[BuffersAllocated]):
    """Open a window of each of these sizes, all of them or none; FreeBuffer closes one.

    A window is a buffer whose memory is lent with every run of a program that names it.
    """

    sizes: Sizes


@_wire(0x11, buffers=(1, READS_MAX))
@lazy_frozen
class RunLent(Request[StepDone]):
    """Run a program with the parameter block in the first raw buffer, on the memory of the others.

    Raw buffer i + 1 is what window `windows[i]` shows meanwhile: the card works on it itself, so
    this is for channels that hand over memory, and nobody else may touch it before the reply.
    """

    program: U64
    windows: Sizes


@_wire(0x12)
@lazy_frozen
class MapFile(Request[Ok]):
    """Let bytes of a file be what buffers hold: `places` are (handle, offset in the file, nbytes).

    `file` is a descriptor of this process, so this is for channels that hand over memory.  It may
    be closed after the reply; the file must not change as long as the buffers are there.
    """

    file: U32
    places: Reads


@_wire(0x13, buffers=1)
@lazy_frozen
class Relayed(Message):
    """Messages between two cards that go over the host, of at most RELAY_BYTES: for `peer` where a
    card sends it, from `peer` where it is sent to a card.

    Nothing answers it, and its request id is 0.
    """

    peer: U32


@_wire(0x0B)
@lazy_frozen
class Stop(Request[Ok]):
    """Release everything and end, after this reply."""


# --- encoding and decoding -----------------------------------------------------------


def encode(message: Message, request_id: int) -> Frame:
    """The frame of `message`; its raw buffers are passed on by reference.

    Raises LocalProtocolError for a field, request id or number of raw buffers out of range.
    """
    codec = _BY_CLASS.get(type(message))
    if codec is None:
        raise LocalProtocolError(f"{type(message).__name__} is not a message of this protocol")
    values = codec.values(message)
    problem = _problem(codec, request_id, values, len(message.buffers))
    if problem:
        raise LocalProtocolError(f"outgoing {problem}")
    try:
        body = msgpack.packb((request_id, *values))
    except UnicodeEncodeError as error:
        raise LocalProtocolError(
            f"outgoing {codec.message_class.__name__}: text cannot be encoded: {error}"
        ) from None
    return Frame(codec.kind, body, tuple(map(flat_buffer, message.buffers)))


def check(message: Message, request_id: int, limits: FrameLimits = DEFAULT_LIMITS) -> None:
    """Raise LocalProtocolError for what `encode`, or `check_frame` of its frame, would refuse;
    without making a body where it is short anyway."""
    short = _SHORT.get(type(message))
    if short is None or not _is_fine(*short, message, request_id, limits):
        check_frame(encode(message, request_id), limits)


def _is_fine(
    codec: _Codec,
    accepts: Sequence[Callable[[object], bool]],
    message: Message,
    request_id: int,
    limits: FrameLimits,
) -> bool:
    """Whether nothing is wrong with a short message; what is, others say."""
    if type(request_id) is not int or not 0 <= request_id <= 0xFFFF_FFFF:
        return False
    for accept, value in zip(accepts, codec.values(message), strict=True):
        if not accept(value):
            return False
    buffers, raw_bytes = message.buffers, 0
    if not codec.buffers_min <= len(buffers) <= codec.buffers_max:
        return False
    for buffer in buffers:
        raw_bytes += len(flat_buffer(buffer))
    return (
        len(buffers) <= limits.buffers_max
        and raw_bytes <= limits.raw_bytes_max
        and limits.body_bytes_max >= SHORT_BYTES
    )


def decode(frame: Frame) -> tuple[int, Message]:
    """The request id and message of `frame`; raw buffers are passed on by reference.

    Raises RemoteProtocolError for an unknown kind, a malformed body, a wrong number of fields or
    raw buffers, and a field of another type or out of range.
    """
    codec = _BY_KIND.get(frame.kind)
    if codec is None:
        raise RemoteProtocolError(
            f"incoming message: unknown kind {frame.kind:#06x}; run the same Spanker on both sides"
        )
    try:
        # msgpack allocates an array when it reads its length: a small maximum keeps nested
        # headers of a short body from claiming memory.
        fields = msgpack.unpackb(
            frame.body,
            use_list=False,
            raw=False,
            strict_map_key=True,
            max_array_len=READS_MAX,
            max_str_len=4 * ERROR_CHARS_MAX,
            max_bin_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(
            f"incoming {codec.message_class.__name__}: body is not valid msgpack "
            f"({type(error).__name__})"
        ) from None
    if type(fields) is not tuple or len(fields) != 1 + len(codec.names):
        got = f"{len(fields)} fields" if type(fields) is tuple else type(fields).__name__
        raise RemoteProtocolError(
            f"incoming {codec.message_class.__name__}: expected an array of "
            f"{1 + len(codec.names)} fields, got {got}"
        )
    request_id, *values = fields
    problem = _problem(codec, request_id, values, len(frame.buffers))
    if problem:
        raise RemoteProtocolError(f"incoming {problem}")
    # What was decoded holds no deferred buffers.
    return request_id, codec.message_class(*values, buffers=frame.buffers)  # type: ignore[arg-type]


def _problem(codec: _Codec, request_id: object, values: Any, buffer_count: int) -> str | None:
    """What is wrong with the fields of a message, or None."""
    name = codec.message_class.__name__
    if not _REQUEST_ID.accepts(request_id):
        return f"{name}, request id: expected {_REQUEST_ID}, got {_brief(request_id)}"
    for field, check, value in zip(codec.names, codec.checks, values, strict=True):
        if not check.accepts(value):
            return f"{name}, field {field}: expected {check}, got {_brief(value)}"
    if not codec.buffers_min <= buffer_count <= codec.buffers_max:
        most = "" if codec.buffers_min == codec.buffers_max else f" to {codec.buffers_max}"
        return f"{name}: expected {codec.buffers_min}{most} raw buffers, got {buffer_count}"
    return None


def _brief(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# --- failures ------------------------------------------------------------------------


def failed(error: Exception, card: int | None = None) -> Failed:
    """The reply that reports `error`; what is not a SpankerError is reported as CardError."""
    name, text = type(error).__name__, str(error)
    if _error_class(name) is not type(error):
        name, text = "CardError", f"{name}: {text}"
    if isinstance(error, CardError) and error.card is not None:
        card = error.card
    text = text.encode("utf-8", "replace").decode()
    if len(text) > ERROR_CHARS_MAX:
        text = text[: ERROR_CHARS_MAX - 3] + "..."
    return Failed(name, text, card)


def raise_failed(report: Failed) -> NoReturn:
    """Raise the error that `report` names; a name unknown to spanker.errors becomes CardError."""
    # The text is the peer's: it stays one line and cannot drive a terminal.
    text = "".join(c if c.isprintable() else " " for c in report.message)
    error_class = _error_class(report.error)
    if error_class is None:
        name = "".join(c if c.isprintable() else " " for c in report.error)
        raise CardError(f"{name}: {text}", card=report.card)
    if issubclass(error_class, CardError):
        raise error_class(text, card=report.card)
    raise error_class(text)


def _error_class(name: str) -> type[SpankerError] | None:
    found = getattr(errors, name, None)
    if isinstance(found, type) and issubclass(found, SpankerError):
        return found
    return None
