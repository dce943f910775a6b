# SPDX-License-Identifier: Apache-2.0
"""Card programs as values: commands over named buffers, and the parameter block of a step.

A program is built once per card and plan.  It names buffers; `Program.encode` replaces the names
by the card's handles and gives the bytes of spanker/device/csrc/spk_card.h, which the card checks
against its buffers before it accepts them.  Row t of an operand (t counts tokens, or outputs where
said) starts at offset + t * stride.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence

import attrs

from spanker.errors import CardCommandError
from spanker.kernels.elements import Element, Reduction
from spanker.kernels.formats import Format
from spanker.native import ffi, lib
from spanker.values import Value

COMMAND = struct.Struct("<HHI" + "IIQ" * 4 + "14I")
PROGRAM_HEADER = struct.Struct("<6I8x")
STEP_HEADER = struct.Struct("<6I8x")
assert ffi.sizeof("struct spk_command") == COMMAND.size
assert ffi.sizeof("struct spk_program_header") == PROGRAM_HEADER.size
assert ffi.sizeof("struct spk_step_header") == STEP_HEADER.size

Q8_BLOCK_BYTES: int = lib.SPK_Q8_BLOCK_BYTES
LOGIT_CHUNK: int = lib.SPK_LOGIT_CHUNK
NO_CANDIDATE = 0xFFFFFFFF


def chosen_token(output: int) -> int:
    """What stands in a step for the token that the cards choose for an output of the step before:
    the one with the largest logit, of equal ones the lowest id."""
    return int(lib.SPK_TOKEN_CHOSEN) | output


class Op(enum.IntEnum):
    """Operations of the command processor."""

    EMBED = 1
    RMSNORM = 2
    QUANTIZE = 3
    MATMUL = 4
    ROPE = 5
    KV_APPEND = 6
    ATTENTION = 7
    SWIGLU = 8
    ADD = 9
    SELECT = 10
    LOGIT_STATS = 11
    TOP_K = 12
    EXCHANGE = 13
    LINK_SEND = 14
    LINK_RECV = 15
    BEST = 16
    CHOOSE = 17
    REDUCE = 18
    COPY = 19
    DIVIDE = 20
    ALL_REDUCE = 21


# Which of its four operands an operation has, by slot: bit r for operand r, as the card has it.
OPERANDS: dict[Op, int] = {
    **dict.fromkeys((Op.EMBED, Op.RMSNORM, Op.MATMUL, Op.KV_APPEND, Op.ATTENTION), 0b1011),
    **dict.fromkeys((Op.SWIGLU,), 0b1011),
    **dict.fromkeys((Op.QUANTIZE, Op.SELECT, Op.LOGIT_STATS, Op.TOP_K), 0b1001),
    **dict.fromkeys((Op.BEST, Op.CHOOSE, Op.REDUCE, Op.COPY), 0b1001),
    **dict.fromkeys((Op.ROPE, Op.ADD), 0b0011),
    **dict.fromkeys((Op.LINK_SEND,), 0b0001),
    **dict.fromkeys((Op.LINK_RECV, Op.DIVIDE, Op.ALL_REDUCE), 0b1000),
    **dict.fromkeys((Op.EXCHANGE,), 0),
}


@attrs.frozen(eq=False, repr=False)
class Ref(Value):
    """Where an operand lies: a buffer by name, the byte offset of row 0, bytes between rows."""

    buffer: str
    stride: int = 0
    offset: int = 0


@attrs.frozen(eq=False, repr=False)
class Command(Value):
    """One operation.  `refs` by operand slot (0 to 3; 3 is the output), `args` as the op says.

    `format` is that of weights, or the kind of element of a bulk operation.  `bulk` is said of a
    transfer that is not about rows: it moves args[1] + args[2] * 2**32 bytes, once per step;
    `hosted` of one that goes over the host.  `part` names the part of the model that it belongs
    to, for people; the card never sees it.
    """

    op: Op
    refs: tuple[tuple[int, Ref], ...] = ()
    args: tuple[int, ...] = ()
    format: Format | Element = Format.F32
    outputs: bool = False
    part: str = attrs.field(default="", eq=False)
    bulk: bool = False
    hosted: bool = False

    def of_part(self, part: str) -> Command:
        """The same command under the name of a part; a model has hundreds, and `attrs.evolve` takes
        ten times as long."""
        return Command(
            self.op,
            self.refs,
            self.args,
            self.format,
            self.outputs,
            part,
            self.bulk,
            self.hosted,
        )

    def renamed(self, names: Mapping[str, str], part: str) -> Command:
        """The same command of another part, on other buffers where `names` has another name."""
        refs = []
        for slot, ref in self.refs:
            name = names.get(ref.buffer)
            refs.append((slot, ref if name is None else Ref(name, ref.stride, ref.offset)))
        return Command(
            self.op,
            tuple(refs),
            self.args,
            self.format,
            self.outputs,
            part,
            self.bulk,
            self.hosted,
        )


def _f32_bits(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


# --- one constructor per operation ----------------------------------------------


def embed(
    fmt: Format,
    table: Ref,
    chosen: Ref,
    out: Ref,
    *,
    columns: int,
    vocabulary: int,
    packed_k: int = 0,
    first: int = 0,
) -> Command:
    """out[t] = columns of the embedding row of token t.

    The table holds rows of GGML blocks or, with `packed_k`, a matrix of so many columns as the
    matmuls take it, of which those from `first` on are looked up.  Where token t is
    `chosen_token(i)`, its id is chosen[i] (u32).
    """
    args = (columns, vocabulary, packed_k, first)
    return Command(Op.EMBED, ((0, table), (1, chosen), (3, out)), args, fmt)


def rmsnorm(x: Ref, weight: Ref, out: Ref, *, n: int, eps: float, outputs: bool = False) -> Command:
    """out[t] = RMSNorm of x[t] (n floats) times weight."""
    return Command(
        Op.RMSNORM, ((0, x), (1, weight), (3, out)), (n, _f32_bits(eps)), outputs=outputs
    )


def quantize(x: Ref, out: Ref, *, k: int, outputs: bool = False) -> Command:
    """out[t] = x[t] (k floats) as Q8 blocks."""
    return Command(Op.QUANTIZE, ((0, x), (3, out)), (k,), outputs=outputs)


def matmul(
    fmt: Format, weight: Ref, x: Ref, out: Ref, *, rows: int, k: int, outputs: bool = False
) -> Command:
    """out[t] (rows floats) = packed weights (rows x k) times x[t]: Q8 blocks or, for float
    weights, floats."""
    return Command(Op.MATMUL, ((0, weight), (1, x), (3, out)), (rows, k), fmt, outputs)


def rope(x: Ref, table: Ref, *, heads: int, head_dim: int, rope_dim: int) -> Command:
    """Rotate x[t] (heads x head_dim floats) in place by table[position of t]."""
    return Command(Op.ROPE, ((0, x), (1, table)), (heads, head_dim, rope_dim))


def kv_append(
    k: Ref, v: Ref, pool: Ref, *, kv_heads: int, head_dim: int, page_positions: int, pages: int
) -> Command:
    """Store the keys and values of each token at its position."""
    return Command(
        Op.KV_APPEND, ((0, k), (1, v), (3, pool)), (kv_heads, head_dim, page_positions, pages)
    )


def attention(
    q: Ref,
    pool: Ref,
    out: Ref,
    *,
    kv_heads: int,
    head_dim: int,
    page_positions: int,
    pages: int,
    heads: int,
    first_head: int,
    group: int,
    scale: float,
) -> Command:
    """out[t] = attention of this card's query heads over all positions up to t's own.

    `first_head` is the model's number of the first query head, `group` the query heads per KV
    head; the pool starts with the KV head of `first_head`.
    """
    args = (kv_heads, head_dim, page_positions, pages, heads, first_head, group, _f32_bits(scale))
    return Command(Op.ATTENTION, ((0, q), (1, pool), (3, out)), args)


def swiglu(gate: Ref, up: Ref, out: Ref, *, n: int) -> Command:
    """out[t] = silu(gate[t]) * up[t], n floats."""
    return Command(Op.SWIGLU, ((0, gate), (1, up), (3, out)), (n,))


def add(x: Ref, y: Ref, *, n: int) -> Command:
    """x[t] += y[t], n floats."""
    return Command(Op.ADD, ((0, x), (1, y)), (n,))


def select(x: Ref, out: Ref, *, n: int) -> Command:
    """out[i] = x[token of output i], n floats."""
    return Command(Op.SELECT, ((0, x), (3, out)), (n,))


def logit_stats(logits: Ref, out: Ref, *, n: int) -> Command:
    """out[i] = (max, sum of exp) float pairs of each chunk of 256 of n logits."""
    return Command(Op.LOGIT_STATS, ((0, logits), (3, out)), (n,), outputs=True)


def top_k(logits: Ref, out: Ref, *, n: int, k: int, first_id: int) -> Command:
    """out[i] = k token ids (u32, first_id added, NO_CANDIDATE where missing), then k logits."""
    return Command(Op.TOP_K, ((0, logits), (3, out)), (n, k, first_id), outputs=True)


def best(top: Ref, out: Ref, *, k: int) -> Command:
    """out[i] = (id u32, logit f32): the first of the k candidates that `top_k` left."""
    return Command(Op.BEST, ((0, top), (3, out)), (k,), outputs=True)


def choose(pairs: Ref, out: Ref, *, lists: int) -> Command:
    """out[i] (u32) = the id with the largest logit of `lists` pairs, the first of equal ones."""
    return Command(Op.CHOOSE, ((0, pairs), (3, out)), (lists,), outputs=True)


# --- bulk operations: once per step, whatever its tokens and outputs --------------------


def _halves(count: int) -> tuple[int, int]:
    return count & 0xFFFFFFFF, count >> 32


def reduce(element: Element, how: Reduction, into: Ref, operand: Ref, *, count: int) -> Command:
    """into = into `how` operand, element by element; the two do not overlap."""
    args = (*_halves(count), int(how))
    return Command(Op.REDUCE, ((0, operand), (3, into)), args, element)


def copy(element: Element, into: Ref, operand: Ref, *, count: int) -> Command:
    """into = operand, `count` elements; the two do not overlap."""
    return Command(Op.COPY, ((0, operand), (3, into)), _halves(count), element)


def divide(element: Element, into: Ref, *, count: int, by: int) -> Command:
    """into = into / by, element by element; 1 <= by <= 65536."""
    return Command(Op.DIVIDE, ((3, into),), (*_halves(count), by), element)


def all_reduce(
    element: Element, how: Reduction, data: Ref, *, count: int, by: int, cards: int, own: int
) -> Command:
    """Fold the `count` elements of `data` of all `cards` in their order, divide by `by`, and leave
    that in all of them; `own` is this card's number.  All cards that are linked run it together.
    Only where cards reach each other's memory (`DeviceInfo.meets`)."""
    args = (*_halves(count), int(how), by, cards, own)
    return Command(Op.ALL_REDUCE, ((3, data),), args, element)


# --- links ------------------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class Transfer(Value):
    """One side of moving rows over a link, or, `hosted`, over the host: `nbytes` of each row at
    `ref`; `bulk`, once per step."""

    send: bool
    peer: int
    ref: Ref
    nbytes: int
    bulk: bool = False
    hosted: bool = False


def exchange(transfers: Sequence[Transfer], *, outputs: bool = False) -> tuple[Command, ...]:
    """Commands that run all transfers together; nothing for no transfers."""
    if not transfers:
        return ()
    return (
        Command(Op.EXCHANGE, args=(len(transfers),)),
        *(
            Command(
                Op.LINK_SEND if t.send else Op.LINK_RECV,
                ((0 if t.send else 3, t.ref),),
                (t.peer, *(_halves(t.nbytes) if t.bulk else (t.nbytes,))),
                outputs=outputs and not t.bulk,
                bulk=t.bulk,
                hosted=t.hosted,
            )
            for t in transfers
        ),
    )


# --- programs ---------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class Program(Value):
    """The commands of one step of one card, and the largest step they take."""

    commands: tuple[Command, ...]
    tokens_max: int
    outputs_max: int
    positions_max: int

    def encode(self, handles: Mapping[str, int]) -> bytes:
        """The bytes for a card whose buffers have these handles; CardCommandError names a buffer
        that is missing."""
        parts = [
            PROGRAM_HEADER.pack(
                lib.SPK_PROGRAM_MAGIC,
                lib.SPK_PROGRAM_VERSION,
                len(self.commands),
                self.tokens_max,
                self.outputs_max,
                self.positions_max,
            )
        ]
        # Of a model's many transfers most are the very same command.
        packed: dict[int, bytes] = {}
        for number, command in enumerate(self.commands):
            data = packed.get(id(command))
            if data is None:
                data = packed[id(command)] = _pack(command, number, handles)
            parts.append(data)
        return b"".join(parts)


def _pack(command: Command, number: int, handles: Mapping[str, int]) -> bytes:
    refs = [0] * 12
    for slot, ref in command.refs:
        if ref.buffer not in handles:
            raise CardCommandError(
                f"command {number} ({command.op.name.lower()}) names buffer {ref.buffer!r}, "
                f"which was not allocated"
            )
        refs[3 * slot : 3 * slot + 3] = handles[ref.buffer], ref.stride, ref.offset
    args = command.args + (0,) * (14 - len(command.args))
    flags = int(lib.SPK_FLAG_OUTPUTS) if command.outputs else 0
    flags |= int(lib.SPK_FLAG_BULK) if command.bulk else 0
    flags |= int(lib.SPK_FLAG_HOST) if command.hosted else 0
    return COMMAND.pack(command.op, command.format, flags, *refs, *args)


# --- steps ------------------------------------------------------------------------


@attrs.frozen(eq=False, repr=False)
class SequenceStep(Value):
    """What a step does for one sequence: `tokens` at `position` and after; `outputs` are indices
    into tokens whose logits are wanted; `pages` cover every position so far."""

    tokens: Sequence[int]
    position: int
    pages: Sequence[int]
    outputs: Sequence[int] = ()
    inv_temperature: float = 1.0


def encode_step(sequences: Sequence[SequenceStep]) -> bytes:
    """The parameter block of a step; outputs are in order of sequence, then of token."""
    token_id: list[int] = []
    position: list[int] = []
    sequence: list[int] = []
    output_token: list[int] = []
    inv_temperature: list[float] = []
    first_page: list[int] = [0]
    page: list[int] = []
    for number, s in enumerate(sequences):
        output_token.extend(len(token_id) + i for i in s.outputs)
        inv_temperature.extend(s.inv_temperature for _ in s.outputs)
        token_id.extend(s.tokens)
        position.extend(range(s.position, s.position + len(s.tokens)))
        sequence.extend(number for _ in s.tokens)
        page.extend(s.pages)
        first_page.append(len(page))
    t, o = len(token_id), len(output_token)
    return struct.pack(
        f"<6I8x{3 * t + o}I{o}f{len(first_page) + len(page)}I",
        lib.SPK_STEP_MAGIC,
        lib.SPK_STEP_VERSION,
        t,
        o,
        len(sequences),
        len(page),
        *token_id,
        *position,
        *sequence,
        *output_token,
        *inv_temperature,
        *first_page,
        *page,
    )
