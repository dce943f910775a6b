# SPDX-License-Identifier: Apache-2.0
"""What commands take: docs/api/timing-model.md, with numbers worked out by hand."""

from __future__ import annotations

import attrs
import pytest

from spanker.device.virtual.costs import Level, ProgramCosts, StepSize, step_size
from spanker.kernels import program as op
from spanker.kernels.elements import Element, Reduction
from spanker.kernels.formats import Format
from spanker.kernels.program import (
    Command,
    Op,
    Program,
    Ref,
    SequenceStep,
    Transfer,
    encode_step,
)
from spanker.sched.bandwidth import CardSpeed, Profile

# Without work a byte takes 1000 ps; without bytes a madd or element takes what its rate says.
BYTES = Profile("bytes", 1e9, 1e9, None, 0.0, command_s=1e-6)
WORK = Profile(
    "work",
    1e30,
    1e9,
    None,
    0.0,
    int8_madds_per_s=1e9,
    float_madds_per_s=1e8,
    elements_per_s=1e7,
)
X, Y = Ref("x", 4096), Ref("y", 4096)
KV = {"kv_heads": 2, "head_dim": 64, "page_positions": 64, "pages": 8}


def read(*commands: Command) -> ProgramCosts:
    return ProgramCosts.read(Program(commands, 512, 64, 4096).encode({"x": 0, "y": 1}))


def attention(heads: int = 6) -> Command:
    return op.attention(X, Y, X, **KV, heads=heads, first_head=0, group=3, scale=1.0)


def taken(command: Command, profile: Profile, size: StepSize) -> int:
    """Picoseconds of a command."""
    return read(command).step(size, profile, 0).durations().runs[0]


# (command, bytes, work, its rate) of 3 tokens and 2 outputs; of attention at positions 9, 10, 11.
TABLE = {
    Op.EMBED: (
        op.embed(Format.Q4_0, X, Y, X, columns=64, vocabulary=99),
        3 * (36 + 256),
        3 * 64,
        1e7,
    ),
    Op.RMSNORM: (op.rmsnorm(X, Y, X, n=100, eps=1e-5), 3 * 800 + 400, 300, 1e7),
    Op.QUANTIZE: (op.quantize(X, Y, k=64), 3 * (256 + 68), 192, 1e7),
    Op.ROPE: (op.rope(X, Y, heads=3, head_dim=64, rope_dim=32), 3 * 3 * 64 * 8, 576, 1e7),
    Op.KV_APPEND: (op.kv_append(X, X, Y, **KV), 3 * 128 * 12, 3 * 256, 1e7),
    Op.ATTENTION: (
        attention(),
        12 * 128 * 4 + 3 * 8 * 6 * 64,
        2 * 64 * 6 * (10 + 11 + 12),
        1e8,
    ),
    Op.SWIGLU: (op.swiglu(X, X, Y, n=50), 3 * 600, 150, 1e7),
    Op.ADD: (op.add(X, Y, n=50), 3 * 600, 150, 1e7),
    Op.SELECT: (op.select(X, Y, n=50), 2 * 400, 100, 1e7),
    Op.LOGIT_STATS: (op.logit_stats(X, Y, n=600), 2 * (2400 + 24), 1200, 1e7),
    Op.TOP_K: (op.top_k(X, Y, n=600, k=8, first_id=0), 2 * (2400 + 64), 1200, 1e7),
    Op.BEST: (op.best(X, Y, k=8), 2 * 16, 2, 1e7),
    Op.CHOOSE: (op.choose(X, Y, lists=5), 2 * 44, 10, 1e7),
    # Once in a step, whatever its tokens.
    Op.REDUCE: (op.reduce(Element.F32, Reduction.SUM, X, Y, count=70), 70 * 12, 70, 1e7),
    Op.COPY: (op.copy(Element.F16, X, Y, count=70), 70 * 4, 0, 1e7),
    Op.DIVIDE: (op.divide(Element.I32, X, count=70, by=3), 70 * 8, 70, 1e7),
}
SIZE = StepSize(3, 2, 12, 10 + 11 + 12)


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.name)
def test_bytes_and_work_of_each_operation(kind: Op) -> None:
    command, nbytes, work, rate = TABLE[kind]
    assert command.op is kind
    assert taken(command, BYTES, SIZE) == 1_000_000 + 1000 * nbytes
    assert taken(command, WORK, SIZE) == round(work / rate * 1e12)


@pytest.mark.parametrize(
    ("fmt", "weights", "activations", "rate"),
    [
        (Format.Q4_0, 32 * 512 // 32 * 18, 512 // 32 * 34, 1e9),
        (Format.Q6_K, 32 * 512 // 256 * 210, 512 // 32 * 34, 1e9),
        (Format.F16, 32 * 512 * 2, 512 * 4, 1e8),
    ],
)
def test_a_matmul_reads_whole_tiles_once(
    fmt: Format, weights: int, activations: int, rate: float
) -> None:
    command = op.matmul(fmt, X, X, Y, rows=17, k=512)
    nbytes = weights + 3 * (activations + 17 * 4)
    assert taken(command, BYTES, SIZE) == 1_000_000 + 1000 * nbytes
    assert taken(command, WORK, SIZE) == round(32 * 512 * 3 / rate * 1e12)
    outputs = attrs.evolve(command, outputs=True)
    assert taken(outputs, BYTES, SIZE) == 1_000_000 + 1000 * (weights + 2 * (activations + 68))


def test_every_operation_has_a_cost() -> None:
    """Whoever adds an operation says what it takes; modelled cards send messages and never meet."""
    covered = {*TABLE, Op.MATMUL, Op.EXCHANGE, Op.LINK_SEND, Op.LINK_RECV}
    assert covered == set(Op) - {Op.ALL_REDUCE}


def test_memory_and_arithmetic_overlap_and_commands_do_not() -> None:
    both = attrs.evolve(BYTES, elements_per_s=1e7)
    # 600 bytes take 600 ns, 50 elements 5 us.
    assert taken(op.add(X, Y, n=50), both, StepSize(1, 0, 1, 1)) == 1_000_000 + 5_000_000
    wide = attrs.evolve(both, elements_per_s=1e9)
    assert taken(op.add(X, Y, n=50), wide, StepSize(1, 0, 1, 1)) == 1_000_000 + 600_000


def test_without_rows_a_command_takes_its_command_time() -> None:
    size = StepSize(3, 0, 12, 33)
    for command in (op.best(X, Y, k=8), op.select(X, Y, n=50)):
        assert taken(command, BYTES, size) == 1_000_000
    norm = op.rmsnorm(X, Y, X, n=100, eps=1e-5, outputs=True)
    assert taken(norm, BYTES, size) == 1_000_000


def test_a_card_may_be_slower_than_its_profile() -> None:
    slow = attrs.evolve(BYTES, cards=(CardSpeed(1, memory=0.5, compute=0.25),))
    costs = read(op.add(X, Y, n=50))
    size = StepSize(1, 0, 1, 1)
    assert costs.step(size, slow, 0).durations().runs == [1_600_000]
    assert costs.step(size, slow, 1).durations().runs == [2_200_000]
    slow = attrs.evolve(WORK, cards=(CardSpeed(1, compute=0.25),))
    assert costs.step(size, slow, 1).durations().runs == [20_000_000]


def test_contention_stretches_commands_and_arithmetic_and_thins_memory() -> None:
    profile = attrs.evolve(BYTES, elements_per_s=1e8)
    # 1 us to take it up; 600 ns of memory, 500 ns of arithmetic.
    step = read(op.add(X, Y, n=50)).step(StepSize(1, 0, 1, 1), profile, 0)
    assert step.durations().runs == [1_600_000]
    assert step.durations(Level(stretch=3.0)).runs == [3_000_000 + 1_500_000]
    assert step.durations(Level(memory=0.25)).runs == [1_000_000 + 2_400_000]
    assert step.durations(Level(2.0, 0.25)).runs == [2_000_000 + 2_400_000]


# --- programs and steps -----------------------------------------------------------------


def test_a_program_is_cut_at_its_exchanges() -> None:
    transfers = [Transfer(True, 1, X, 100), Transfer(False, 2, X, 7), Transfer(True, 1, X, 0)]
    costs = read(
        op.add(X, Y, n=1),
        op.add(X, Y, n=2),
        *op.exchange(transfers),
        *op.exchange([Transfer(False, 1, X, 8)], outputs=True),
        op.best(X, Y, k=1),
    )
    assert costs.numbers.tolist() == [0, 1, 2, 6, 8]
    assert (costs.edges, costs.behind) == ((0, 3, 4, 5), (3, 1))
    first, second = costs.transfers(3, 2)
    assert (first.send_peers.tolist(), first.send_bytes.tolist()) == ([1], [300])
    assert (first.receive_peers.tolist(), first.receive_bytes.tolist()) == ([2], [21])
    assert (second.send_peers.tolist(), second.receive_bytes.tolist()) == ([], [16])
    assert costs.transfers(0, 0)[0].send_peers.tolist() == []
    step = costs.step(StepSize(1, 1, 1, 1), BYTES, 0)
    # Two commands and the exchange's own; the second exchange's; the last command.
    assert step.durations().runs == [3_000_000 + 36_000, 1_000_000, 1_000_000 + 16_000]
    assert step.durations().before.tolist()[-1] == sum(step.durations().runs)
    assert first.distinct and second.distinct
    assert (step.read_bytes(), step.written_bytes()) == ([24, 0, 8], [12, 0, 8])


def test_peers_that_occur_twice_are_known() -> None:
    twice = [Transfer(True, 1, X, 100), Transfer(True, 1, X, 7), Transfer(False, 1, X, 9)]
    transfers = read(*op.exchange(twice)).transfers(1, 0)[0]
    assert transfers.send_peers.tolist() == [1, 1] and not transfers.distinct
    twice[1] = Transfer(True, 1, X, 0)
    assert read(*op.exchange(twice)).transfers(1, 0)[0].distinct


def test_exchanges_that_are_alike_are_sized_once() -> None:
    gather = op.exchange([Transfer(True, 1, X, 100), Transfer(False, 1, X, 100)])
    costs = read(*(gather * 5), *op.exchange([Transfer(True, 1, X, 100)]))
    sized = costs.transfers(2, 1)
    assert len({id(t) for t in sized}) == 2 and costs.transfers(2, 1) is sized
    # Steps of all sizes do not add up.
    for tokens in range(1, 100):
        costs.transfers(tokens, 1)
    assert costs.transfers(2, 1) is not sized


def test_an_empty_program_is_one_empty_run() -> None:
    costs = read()
    assert costs.edges == (0, 0)
    assert costs.step(StepSize(1, 0, 1, 1), BYTES, 0).durations().runs == [0]


@pytest.mark.parametrize(
    ("sequences", "size"),
    [
        ([([5], 99)], (1, 100, 100)),
        ([([0] * 8, 0)], (8, 8, 36)),
        ([([0] * 9, 0)], (9, 8 + 9, 45)),
        ([([0] * 3, 10), ([0] * 2, 0)], (5, 13 + 2, 11 + 12 + 13 + 1 + 2)),
        ([([0], 4), ([0], 4)], (2, 5 + 5, 10)),
        ([], (0, 0, 0)),
    ],
)
def test_attention_takes_tokens_of_one_sequence_in_groups_of_eight(
    sequences: list[tuple[list[int], int]], size: tuple[int, int, int]
) -> None:
    step = encode_step([SequenceStep(ids, at, [0, 1], (0,)) for ids, at in sequences])
    tokens, group_positions, pairs = size
    assert step_size(step) == StepSize(tokens, len(sequences), group_positions, pairs)


def test_results_tell_where_a_hollow_card_has_something_to_answer() -> None:
    costs = read(
        op.logit_stats(X, Ref("y", 16, 64), n=600), op.top_k(X, Y, n=600, k=8, first_id=256)
    )
    stats, top = costs.results
    assert (stats.buffer, stats.offset, stats.stride, stats.op) == (1, 64, 16, Op.LOGIT_STATS)
    assert (top.op, top.args[:3]) == (Op.TOP_K, (600, 8, 256))
