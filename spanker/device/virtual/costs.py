# SPDX-License-Identifier: Apache-2.0
"""What the commands of a program take: the table of docs/api/timing-model.md, command by command.

A program is read once, into numbers per row and per position; a step then costs one pass of numpy
over them.  Nothing here knows of other cards or of what happens when.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from spanker.device.base import Buffer
from spanker.device.virtual.units import PS_PER_S
from spanker.errors import CardCommandError
from spanker.kernels.elements import Element
from spanker.kernels.formats import Format, packed_bytes, row_bytes
from spanker.kernels.program import (
    COMMAND,
    LOGIT_CHUNK,
    PROGRAM_HEADER,
    Q8_BLOCK_BYTES,
    STEP_HEADER,
    Op,
)
from spanker.native import lib
from spanker.sched.bandwidth import CardSpeed, Profile

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

# Neighbouring tokens of a sequence that read its keys and values together.
ATTENTION_TOKENS = 8

_REF = np.dtype([("buffer", "<u4"), ("stride", "<u4"), ("offset", "<u8")])
_COMMAND = np.dtype(
    [
        ("op", "<u2"),
        ("format", "<u2"),
        ("flags", "<u4"),
        ("refs", _REF, (4,)),
        ("args", "<u4", (14,)),
    ]
)
assert _COMMAND.itemsize == COMMAND.size

_TRANSFERS = (Op.LINK_SEND, Op.LINK_RECV)
_PER_OUTPUT = (Op.SELECT,)


# --- the table ---------------------------------------------------------------------------


class _Rate:
    """Which rate of the profile a command's work runs at."""

    ELEMENTS, INT8, FLOAT = range(3)


@attrs.frozen
class _Cost:
    """Bytes read and written, and work, of one command.

    `fixed_read` once, where there is a row at all; `read`, `written` and `work` for each row;
    `position_read` for each position that a group of tokens sees; `pair_work` for each pair of a
    token and a position that it sees.
    """

    read: int = 0
    written: int = 0
    work: int = 0
    fixed_read: int = 0
    position_read: int = 0
    pair_work: int = 0
    rate: int = _Rate.ELEMENTS


def _q8(k: int) -> int:
    return k // 32 * Q8_BLOCK_BYTES


def _matmul(fmt: int, rows: int, k: int) -> _Cost:
    kind = Format(fmt)
    return _Cost(
        read=4 * k if kind.is_float else _q8(k),
        written=4 * rows,
        work=-(-rows // 16) * 16 * k,
        fixed_read=packed_bytes(kind, rows, k),
        rate=_Rate.FLOAT if kind.is_float else _Rate.INT8,
    )


def _attention(args: Sequence[int]) -> _Cost:
    kv_heads, dim, heads = args[0], args[1], args[4]
    return _Cost(
        read=4 * heads * dim,
        written=4 * heads * dim,
        position_read=4 * kv_heads * dim,
        pair_work=2 * dim * heads,
        rate=_Rate.FLOAT,
    )


def _bulk(fmt: int, args: Sequence[int], *, read: int, work: int = 1) -> _Cost:
    count, size = args[0] | args[1] << 32, Element(fmt).nbytes
    return _Cost(read=read * size * count, written=size * count, work=work * count)


# By operation, of a format and the command's arguments.
_COSTS: dict[int, Callable[[int, Sequence[int]], _Cost]] = {
    Op.EMBED: lambda fmt, a: _Cost(row_bytes(Format(fmt), a[0]), 4 * a[0], a[0]),
    Op.RMSNORM: lambda fmt, a: _Cost(4 * a[0], 4 * a[0], a[0], fixed_read=4 * a[0]),
    Op.QUANTIZE: lambda fmt, a: _Cost(4 * a[0], _q8(a[0]), a[0]),
    Op.MATMUL: lambda fmt, a: _matmul(fmt, a[0], a[1]),
    Op.ROPE: lambda fmt, a: _Cost(4 * a[0] * a[1], 4 * a[0] * a[1], a[0] * a[1]),
    Op.KV_APPEND: lambda fmt, a: _Cost(8 * a[0] * a[1], 4 * a[0] * a[1], 2 * a[0] * a[1]),
    Op.ATTENTION: lambda fmt, a: _attention(a),
    Op.SWIGLU: lambda fmt, a: _Cost(8 * a[0], 4 * a[0], a[0]),
    Op.ADD: lambda fmt, a: _Cost(8 * a[0], 4 * a[0], a[0]),
    Op.SELECT: lambda fmt, a: _Cost(4 * a[0], 4 * a[0], a[0]),
    Op.LOGIT_STATS: lambda fmt, a: _Cost(4 * a[0], 8 * -(-a[0] // LOGIT_CHUNK), a[0]),
    Op.TOP_K: lambda fmt, a: _Cost(4 * a[0], 8 * a[1], a[0]),
    Op.BEST: lambda fmt, a: _Cost(8, 8, 1),
    Op.CHOOSE: lambda fmt, a: _Cost(8 * a[0], 4, a[0]),
    Op.EXCHANGE: lambda fmt, a: _Cost(),
    Op.REDUCE: lambda fmt, a: _bulk(fmt, a, read=2),
    Op.COPY: lambda fmt, a: _bulk(fmt, a, read=1, work=0),
    Op.DIVIDE: lambda fmt, a: _bulk(fmt, a, read=1),
}
# Once in a step, whatever its rows.
_BULK = (Op.REDUCE, Op.COPY, Op.DIVIDE)


def _cost(op: int, fmt: int, args: Sequence[int]) -> _Cost:
    if op not in _COSTS:
        raise CardCommandError(f"the timing model does not say what operation {op} takes")
    return _COSTS[op](fmt, args)


# --- a step ------------------------------------------------------------------------------


@attrs.frozen
class StepSize:
    """What a step's parameters say about its length: `group_positions` is the sum over groups of
    the positions that their last tokens see, `pairs` the sum over tokens of those they see."""

    tokens: int
    outputs: int
    group_positions: int
    pairs: int


def step_size(parameters: Buffer) -> StepSize:
    """The size of a step from the bytes of `encode_step`, which the card has accepted."""
    _, _, tokens, outputs, _, _ = STEP_HEADER.unpack_from(parameters)
    words = np.frombuffer(parameters, "<u4", 3 * tokens, STEP_HEADER.size)
    seen = words[tokens : 2 * tokens].astype(np.int64) + 1
    if tokens == 1:
        return StepSize(1, outputs, int(seen[0]), int(seen[0]))
    sequence = words[2 * tokens :]
    last: list[int] = []
    begin = 0
    while begin < tokens:
        end = begin + 1
        while end < tokens and end - begin < ATTENTION_TOKENS and sequence[end] == sequence[begin]:
            end += 1
        last.append(end - 1)
        begin = end
    return StepSize(tokens, outputs, int(seen[last].sum()), int(seen.sum()))


# --- a program ---------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Transfers:
    """The sends and receives of one exchange of a step, in order, without those of no bytes; sends
    over the host are `hosted`.

    `distinct` says that no peer occurs twice among sends or receives.
    """

    send_peers: I64
    send_bytes: I64
    receive_peers: I64
    receive_bytes: I64
    distinct: bool
    hosted: tuple[tuple[int, int], ...] = ()  # (peer, bytes)


@attrs.frozen(eq=False)
class _Exchange:
    """The transfers of an exchange as the program has them; bytes are those of a row."""

    sends: npt.NDArray[np.bool_]
    peers: I64
    row_bytes: I64
    outputs: npt.NDArray[np.bool_]
    bulk: npt.NDArray[np.bool_]
    hosted: npt.NDArray[np.bool_]

    def sized(self, tokens: int, outputs: int) -> Transfers:
        rows = np.where(self.outputs, outputs, tokens)
        nbytes = self.row_bytes * np.where(self.bulk, 1, rows)
        of = nbytes > 0
        sends, receives = of & self.sends & ~self.hosted, of & ~self.sends
        hosted = of & self.sends & self.hosted
        distinct = all(
            len(np.unique(self.peers[side])) == np.count_nonzero(side) for side in (sends, receives)
        )
        return Transfers(
            self.peers[sends],
            nbytes[sends],
            self.peers[receives],
            nbytes[receives],
            distinct,
            tuple(zip(self.peers[hosted].tolist(), nbytes[hosted].tolist(), strict=True)),
        )


@attrs.frozen
class Rows:
    """Where a command writes rows of results: buffer, offset of the first, bytes between them."""

    buffer: int
    offset: int
    stride: int
    op: Op
    args: tuple[int, ...]


@attrs.define(eq=False)
class ProgramCosts:
    """A program as the timing model sees it.

    Only commands that take time count here, not transfers: `numbers` are theirs in the program.
    They are cut at exchanges: run i is the commands `edges[i]` to `edges[i + 1]`, this one not
    included, and the last of every run but the last is an EXCHANGE, with `behind[i]` transfers.
    """

    ops: npt.NDArray[np.uint16]  # of the whole program
    formats: npt.NDArray[np.uint16]
    numbers: I64
    edges: tuple[int, ...]
    behind: tuple[int, ...]
    results: tuple[Rows, ...]
    _exchanges: tuple[_Exchange, ...]  # which may be one and the same
    _by_output: npt.NDArray[np.bool_]
    _once: npt.NDArray[np.bool_]
    _table: F64  # (fields of _Cost, commands)
    _sized: dict[tuple[int, int], tuple[Transfers, ...]] = attrs.field(factory=dict)

    @classmethod
    def read(cls, program: Buffer) -> ProgramCosts:
        """Of the bytes of a program that a card has accepted."""
        commands = np.frombuffer(program, _COMMAND, offset=PROGRAM_HEADER.size)
        numbers = np.flatnonzero(~np.isin(commands["op"], _TRANSFERS))
        timed = commands[numbers]
        ops, args = timed["op"].tolist(), timed["args"].tolist()
        costs = [
            # Most commands of a model are like some other one.
            _cached_cost(op, fmt, tuple(arguments))
            for op, fmt, arguments in zip(ops, timed["format"].tolist(), args, strict=True)
        ]
        exchanges = np.flatnonzero(timed["op"] == Op.EXCHANGE)
        behind = [args[i][0] for i in exchanges.tolist()]
        # A model has hundreds of exchanges, of a handful of kinds.
        kinds: dict[bytes, _Exchange] = {}
        found = [
            _exchange(commands[first + 1 : first + 1 + count], kinds)
            for first, count in zip(numbers[exchanges].tolist(), behind, strict=True)
        ]
        results = tuple(
            _rows(timed["refs"][i][3], Op(op), args[i])
            for i, op in enumerate(ops)
            if op in (Op.LOGIT_STATS, Op.TOP_K)
        )
        outputs = (timed["flags"] & int(lib.SPK_FLAG_OUTPUTS)).astype(bool)
        return cls(
            ops=commands["op"].copy(),
            formats=commands["format"].copy(),
            numbers=numbers,
            edges=(0, *(exchanges + 1).tolist(), len(numbers)),
            behind=tuple(behind),
            results=results,
            exchanges=tuple(found),
            by_output=outputs | np.isin(timed["op"], _PER_OUTPUT),
            once=np.isin(timed["op"], _BULK),
            table=np.array(costs, np.float64).reshape(len(ops), len(_FIELDS)).T.copy(),
        )

    @property
    def link_peers(self) -> tuple[int, ...]:
        """The cards with which something is exchanged over links."""
        kinds = {id(e): e for e in self._exchanges}.values()
        peers = [e.peers[~e.hosted] for e in kinds]
        return tuple(np.unique(np.concatenate(peers)).tolist()) if peers else ()

    def transfers(self, tokens: int, outputs: int) -> tuple[Transfers, ...]:
        """What each exchange moves in a step of so many tokens and outputs."""
        key = tokens, outputs
        found = self._sized.get(key)
        if found is None:
            kinds = {id(e): e for e in self._exchanges}
            sized = {kind: e.sized(tokens, outputs) for kind, e in kinds.items()}
            if len(self._sized) == _SIZES_KEPT:
                self._sized.pop(next(iter(self._sized)))
            found = self._sized[key] = tuple(sized[id(e)] for e in self._exchanges)
        return found

    def step(self, size: StepSize, profile: Profile, card: int) -> StepCosts:
        """What a step of this size takes on a card."""
        fixed, read, written, work, position_read, pair_work, rate = self._table
        rows = np.where(self._by_output, float(size.outputs), float(size.tokens))
        rows[self._once] = 1.0
        bytes_read = fixed * (rows > 0) + read * rows + position_read * size.group_positions
        bytes_written = written * rows
        speed = profile.card(card)
        memory = profile.local_ddr_bytes_per_s * speed.memory / PS_PER_S
        return StepCosts(
            edges=self.edges,
            read=bytes_read,
            written=bytes_written,
            command_ps=profile.command_s * PS_PER_S,
            memory_ps=(bytes_read + bytes_written) / memory,
            work_ps=(work * rows + pair_work * size.pairs)
            / _rates(profile, speed)[rate.astype(np.intp)],
        )


# Of a program: for how many sizes of steps its transfers are kept.
_SIZES_KEPT = 16

_FIELDS = ("fixed_read", "read", "written", "work", "position_read", "pair_work", "rate")


@functools.lru_cache(maxsize=4096)
def _cached_cost(op: int, fmt: int, args: tuple[int, ...]) -> tuple[float, ...]:
    cost = _cost(op, fmt, args)
    return tuple(float(getattr(cost, name)) for name in _FIELDS)


def _rows(ref: npt.NDArray[np.void], op: Op, args: Sequence[int]) -> Rows:
    return Rows(int(ref["buffer"]), int(ref["offset"]), int(ref["stride"]), op, tuple(args))


def _exchange(transfers: npt.NDArray[np.void], kinds: dict[bytes, _Exchange]) -> _Exchange:
    sends = transfers["op"] == Op.LINK_SEND
    peers, row_bytes, high = (transfers["args"][:, i].astype(np.int64) for i in range(3))
    outputs = (transfers["flags"] & int(lib.SPK_FLAG_OUTPUTS)).astype(bool)
    bulk = (transfers["flags"] & int(lib.SPK_FLAG_BULK)).astype(bool)
    hosted = (transfers["flags"] & int(lib.SPK_FLAG_HOST)).astype(bool)
    row_bytes += np.where(bulk, high << 32, 0)
    key = b"".join(a.tobytes() for a in (sends, peers, row_bytes, outputs, bulk, hosted))
    return kinds.setdefault(key, _Exchange(sends, peers, row_bytes, outputs, bulk, hosted))


def over_links(program: Buffer) -> Buffer:
    """The bytes of a program with all its transfers over links; what is no program stays as it is,
    for the card to refuse."""
    if len(program) < PROGRAM_HEADER.size or (len(program) - PROGRAM_HEADER.size) % COMMAND.size:
        return program
    commands = np.frombuffer(program, _COMMAND, offset=PROGRAM_HEADER.size)
    hosted = np.isin(commands["op"], _TRANSFERS) & (commands["flags"] & int(lib.SPK_FLAG_HOST) != 0)
    if not hosted.any():
        return program
    commands = commands.copy()
    commands["flags"][hosted] &= ~np.uint32(lib.SPK_FLAG_HOST)
    return bytes(program[: PROGRAM_HEADER.size]) + commands.tobytes()


def _rates(profile: Profile, speed: CardSpeed) -> F64:
    """Work per picosecond, by `_Rate`."""
    rates = (profile.elements_per_s, profile.int8_madds_per_s, profile.float_madds_per_s)
    return np.array([rate * speed.compute / PS_PER_S for rate in rates])


# --- how long it takes -------------------------------------------------------------------


@attrs.frozen
class Level:
    """How far cards are in each other's way: `stretch` >= 1 is how many times longer commands and
    arithmetic take, `memory` <= 1 the part of a card's memory rate that it gets."""

    stretch: float = 1.0
    memory: float = 1.0

    def slowed(self, factor: float) -> Level:
        """Where everything takes `factor` times as long."""
        return self if factor == 1 else Level(self.stretch * factor, self.memory / factor)


ALONE = Level()


@attrs.frozen(eq=False)
class Durations:
    """Picoseconds: `before[i]` of all commands before command i, `runs[i]` of run i."""

    before: I64
    runs: list[int]


@attrs.define(eq=False)
class StepCosts:
    """The commands of one step of one card: bytes, and the parts of their times."""

    edges: tuple[int, ...]
    _read: F64
    _written: F64
    _command_ps: float
    _memory_ps: F64
    _work_ps: F64
    _levels: dict[Level, Durations] = attrs.field(factory=dict)

    def durations(self, level: Level = ALONE) -> Durations:
        """How long the commands take."""
        found = self._levels.get(level)
        if found is None:
            parts = level.stretch * self._command_ps + np.maximum(
                self._memory_ps / level.memory, level.stretch * self._work_ps
            )
            before = np.concatenate(([0], np.cumsum(np.rint(parts).astype(np.int64))))
            found = self._levels[level] = Durations(before, self._differences(before))
        return found

    def spliced(self, begin: Durations, rest: Durations, command: int) -> Durations:
        """One of them up to the end of a command, the other from there on."""
        at = command + 1
        later = rest.before[at:] - rest.before[at] + begin.before[at]
        before = np.concatenate((begin.before[:at], later))
        return Durations(before, self._differences(before))

    def read_bytes(self) -> list[int]:
        """Bytes that each run of commands reads."""
        return self._sums(self._read)

    def written_bytes(self) -> list[int]:
        """Bytes that each run of commands writes."""
        return self._sums(self._written)

    def _sums(self, values: F64) -> list[int]:
        return self._differences(np.concatenate(([0.0], np.cumsum(values))).astype(np.int64))

    def _differences(self, before: I64) -> list[int]:
        """From sums over all commands before each one, the sum over each run."""
        runs: list[int] = np.diff(before[list(self.edges)]).tolist()
        return runs
