# SPDX-License-Identifier: Apache-2.0
"""Traces as text: what commands are called, whose they are, and that the JSON is what viewers take.

No fleet here: events are made up.  test_tracer.py records real ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from spanker.actors import trace as traces
from spanker.actors.message import CardInfo, StepDone
from spanker.actors.steps import LoadedModel
from spanker.actors.trace import CARD_THREAD, HOST_THREAD, Label, Trace, labels
from spanker.device.base import TRACE_EVENT
from spanker.errors import (
    CardAbortedError,
    CardCommandError,
    CardFaultError,
    CardLostError,
    LocalProtocolError,
)
from spanker.ggml.architectures.llama import build_program, read_model
from spanker.ggml.gguf import GGUFFile
from spanker.kernels import program as op
from spanker.kernels.formats import Format
from spanker.kernels.program import Op, Ref, SequenceStep, Transfer
from spanker.sched.plan import Limits
from spanker.sched.planner import make_plan
from spanker.testing.models import tiny_llama

BEGIN = 5_000_000_000
LIMITS = Limits(
    context=128,
    prompt_chunk=64,
    tokens_max=64,
    outputs_max=8,
    candidates=4,
    kv_pages=4,
    page_positions=32,
)
STEP = [SequenceStep([1, 2, 3], 0, [0], (2,)), SequenceStep([4], 0, [1], (0,))]


def card(number: int, name: str | None = None) -> CardInfo:
    return CardInfo(1, 1, number, name or f"soft{number}", "avx2", 1 << 20, 4)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tiny_llama().write(tmp_path_factory.mktemp("models") / "tiny.gguf")
    with GGUFFile(path) as gguf:
        model = read_model(gguf)
    (plan,) = make_plan("tp", model.shape, 2).replicas
    return LoadedModel(model, plan, LIMITS, {0: {}, 1: {}}, {0: 0, 1: 0})


def packed(*events: tuple[int, int, int, int, Op, Format]) -> bytes:
    """Events whose times are counted from the beginning of the trace."""
    return b"".join(
        TRACE_EVENT.pack(BEGIN + begin, BEGIN + end, *rest) for begin, end, *rest in events
    )


def parsed(trace: Trace) -> tuple[list[dict], dict]:
    text = "".join(trace.chunks())
    assert text.isascii() and text.endswith("}\n")
    value = json.loads(text)
    assert set(value) == {"displayTimeUnit", "traceEvents", "otherData"}
    return value["traceEvents"], value["otherData"]


def complete(trace: Trace) -> list[dict]:
    return [event for event in parsed(trace)[0] if event["ph"] == "X"]


# --- labels -----------------------------------------------------------------------------


def named(command: op.Command, part: str = "") -> Label:
    (label,) = labels([attrs.evolve(command, part=part)])
    assert label is not None
    return label


def test_commands_are_called_after_their_weights_or_what_they_write() -> None:
    weight, x, y = Ref("blk.3.ffn_gate.weight"), Ref("xq", 34), Ref("gate", 64)
    matmul = named(op.matmul(Format.Q4_0, weight, x, y, rows=17, k=64), "blk.3")
    assert matmul.name == "matmul blk.3.ffn_gate q4_0"
    assert matmul.args == {
        "op": "matmul",
        "part": "blk.3",
        "weight": "blk.3.ffn_gate.weight",
        "format": "q4_0",
        "rows": 17,
        "k": 64,
        "bytes": 32 * 2 * 18,
    }
    table = Ref("token_embd.weight.columns", 34)
    embed = op.embed(Format.Q8_0, table, Ref("chosen", 4), x, columns=32, vocabulary=9)
    assert named(embed).name == "embed token_embd.columns q8_0"
    assert named(op.rmsnorm(x, Ref("output_norm.weight"), y, n=8, eps=1.0)).name == (
        "rmsnorm output_norm"
    )
    assert named(op.quantize(x, Ref("xq"), k=32), "blk.0").name == "quantize blk.0 xq"
    rope = named(op.rope(Ref("q"), Ref("rope"), heads=3, head_dim=16, rope_dim=8), "blk.1")
    assert (rope.name, rope.args["heads"], rope.args["head_dim"]) == ("rope blk.1 q", 3, 16)
    assert named(op.add(Ref("x"), y, n=8), "blk.1").name == "add blk.1 x"
    assert named(op.swiglu(y, y, Ref("act"), n=8), "blk.1").name == "swiglu blk.1 act"
    assert named(op.select(x, Ref("xo"), n=8)).name == "select xo"
    attention = op.attention(
        Ref("q"), Ref("kv.7"), Ref("att"), kv_heads=1, head_dim=16, page_positions=32, pages=4,
        heads=3, first_head=0, group=3, scale=1.0,
    )  # fmt: skip
    assert named(attention, "blk.7").args == {
        "op": "attention", "part": "blk.7", "kv_heads": 1, "head_dim": 16, "heads": 3,
    }  # fmt: skip
    assert {named(c).category for c in (embed, rope_of(), attention)} == {"compute"}


def rope_of() -> op.Command:
    return op.rope(Ref("q"), Ref("rope"), heads=1, head_dim=16, rope_dim=8)


def test_an_exchange_says_for_whom_it_waits_and_what_it_moves() -> None:
    x, best = Ref("x", 64), Ref("best", 16)
    both = op.exchange(
        [
            Transfer(True, 1, x, 24),
            Transfer(True, 2, x, 24),
            Transfer(False, 2, x, 8),
            Transfer(False, 1, x, 32),
            Transfer(False, 2, x, 4),
        ]
    )
    made = labels(tuple(attrs.evolve(c, part="blk.5") for c in both))
    assert made[1:] == (None,) * 5
    first = made[0]
    assert first is not None
    assert (first.name, first.category, first.kind) == (
        "wait for cards 2, 1 blk.5 x",
        "link",
        "exchange",
    )
    assert first.args == {"op": "exchange", "from": [2, 1], "to": [1, 2]}
    assert (first.sent, first.received) == ((48, 0), (44, 0))
    send = labels(op.exchange([Transfer(True, 3, best, 8)], outputs=True))[0]
    assert send is not None and send.name == "send to card 3 best"
    assert (send.sent, send.received) == ((0, 8), (0, 0))
    receive = labels(op.exchange([Transfer(False, 0, best, 8)], outputs=True))[0]
    assert receive is not None and receive.name == "wait for card 0 best"


@pytest.mark.parametrize("plan", ["tp2", "pp2"])
def test_every_command_of_a_model_has_a_label_that_names_its_layer(
    loaded: LoadedModel, plan: str
) -> None:
    (made,) = make_plan(plan, loaded.model.shape, 2).replicas
    for number in (0, 1):
        commands = build_program(loaded.model, made, number, LIMITS).commands
        for command, label in zip(commands, labels(commands), strict=True):
            if command.op in (Op.LINK_SEND, Op.LINK_RECV):
                assert label is None
                continue
            assert label is not None and label.name.isascii() and label.kind in label.args["op"]
            named = [r.buffer for _, r in command.refs if r.buffer.startswith(("blk.", "kv."))]
            for buffer in named:
                layer = buffer.split(".")[1]
                assert f"blk.{layer}" in label.name and label.args["part"] == f"blk.{layer}"


# --- events -----------------------------------------------------------------------------


def test_an_empty_trace_is_a_trace() -> None:
    events, other = parsed(Trace([card(0), card(1, 'a "new"\n card é')], BEGIN))
    assert [e["ph"] for e in events] == ["M"] * 7
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {
        HOST_THREAD: "host",
        CARD_THREAD: "card 0 (soft0, avx2)",
        CARD_THREAD + 1: 'card 1 (a "new"\n card é, avx2)',
    }
    assert {e["pid"] for e in events} == {1}
    assert (other["steps"], other["commands"], other["lost"]) == (0, 0, 0)


def test_events_stand_on_their_cards_thread_with_step_and_command(loaded: LoadedModel) -> None:
    trace = Trace([card(0), card(1)], BEGIN)
    commands = build_program(loaded.model, loaded.plan, 1, LIMITS).commands
    exchange = next(i for i, c in enumerate(commands) if c.op == Op.EXCHANGE)
    trace.step(7, loaded, STEP)
    # Events come before anybody knows whose they are.
    trace.add(
        1,
        packed(
            (1_234, 5_678, 31, 0, commands[0].op, commands[0].format),
            (5_678, 9_999, 31, exchange, Op.EXCHANGE, Format.F32),
            (9_999, 9_999, 31, exchange + 1, Op.LINK_SEND, Format.F32),
        ),
        0,
    )
    trace.answered(1, 7, StepDone(31, 5))
    first, second = complete(trace)
    assert first["name"] == "embed token_embd.columns q4_0"
    assert (first["pid"], first["tid"]) == (1, CARD_THREAD + 1)
    assert (first["ts"], first["dur"], first["cat"]) == (1.234, 4.444, "compute")
    assert first["args"]["step"] == 7 and first["args"]["fence"] == 31
    assert first["args"]["weight"] == "token_embd.weight.columns"
    assert second["cat"] == "link" and second["name"].startswith("wait for card 0 x")
    transfers = commands[exchange + 1 : exchange + 1 + commands[exchange].args[0]]
    # Four tokens in this step.
    assert second["args"]["sent_bytes"] == 4 * sum(
        t.args[1] for t in transfers if t.op == Op.LINK_SEND
    )
    assert second["args"]["received_bytes"] > 0
    other = parsed(trace)[1]
    assert other["cards"][1]["ops"] == {
        "embed": {"count": 1, "ms": 0.004444},
        "exchange": {"count": 1, "ms": 0.004321},
    }
    assert other["cards"][0]["ops"] == {} and other["cards"][1]["commands"] == 3


def test_a_step_that_failed_on_a_card_had_the_next_fence(loaded: LoadedModel) -> None:
    trace = Trace([card(0), card(1)], BEGIN)
    answers = (
        StepDone(10, 1),
        CardFaultError("a NaN"),
        CardAbortedError("aborted"),
        CardCommandError("refused"),  # it got no fence
        LocalProtocolError("too large"),  # it never got there
        StepDone(13, 1),
        CardLostError("gone"),
    )
    for number, answer in enumerate(answers, 1):
        trace.step(number, loaded, STEP)
        trace.answered(0, number, answer)
    fences = (9, 10, 11, 12, 13, 14, 15)
    trace.add(0, packed(*((f, f, f, 0, Op.EMBED, Format.Q4_0) for f in fences)), 0)
    steps = [event["args"].get("step") for event in complete(trace)]
    assert steps == [None, 1, 2, 3, 6, 7, None]
    # Of what nobody knows the operation is told at least.
    assert [e["name"] for e in complete(trace)][:2] == [
        "embed q4_0",
        "embed token_embd.columns q4_0",
    ]
    # A failure before anything succeeded tells no fence.
    fresh = Trace([card(0)], BEGIN)
    fresh.step(1, loaded, STEP)
    fresh.answered(0, 1, CardFaultError("a NaN"))
    fresh.add(0, packed((1, 2, 5, 0, Op.EXCHANGE, Format.F32)), 0)
    (event,) = complete(fresh)
    assert (event["name"], event["cat"]) == ("exchange", "link") and "step" not in event["args"]


def test_what_no_version_knows_is_shown_all_the_same(loaded: LoadedModel) -> None:
    trace = Trace([card(0)], BEGIN)
    trace.step(1, loaded, STEP)
    trace.answered(0, 1, StepDone(1, 1))
    trace.add(
        0,
        packed((0, 1, 1, 9999, 77, 0), (1, 2, 2, 0, Op.MATMUL, 99), (2, 3, 2, 0, Op.LINK_RECV, 0)),  # type: ignore[arg-type]
        0,
    )
    assert [e["name"] for e in complete(trace)] == ["operation 77", "matmul"]


def test_spans_of_the_host_say_what_a_step_is(loaded: LoadedModel) -> None:
    trace = Trace([card(0)], 0)
    trace.step(3, loaded, STEP)
    with trace.span("submit", 3):
        pass
    with pytest.raises(KeyError), trace.span("wait for", 3):
        raise KeyError
    first, second = complete(trace)
    assert (first["name"], first["cat"], first["tid"]) == ("submit step 3", "host", HOST_THREAD)
    assert first["args"] == {"step": 3, "sequences": 2, "tokens": 4, "outputs": 2}
    assert second["name"] == "wait for step 3"
    assert 0 < first["ts"] <= first["ts"] + first["dur"] <= second["ts"]


def test_times_are_exact_to_the_nanosecond() -> None:
    trace = Trace([card(0)], BEGIN)
    hour = 3_600_000_000_000
    times = ((0, 1), (999, 1_000), (hour + 7, hour + 1_000_003))
    trace.add(0, packed(*((a, b, 1, 0, Op.ADD, Format.F32) for a, b in times)), 0)
    text = "".join(trace.chunks())
    for begin, duration in (("0.000", "0.001"), ("0.999", "0.001"), ("3600000000.007", "999.996")):
        assert f'"ts": {begin}, "dur": {duration}' in text


def test_what_finds_no_room_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "EVENTS_MAX", 10)
    trace = Trace([card(0), card(1)], BEGIN)
    seven = packed(*((n, n, n, 0, Op.ADD, Format.F32) for n in range(7)))
    trace.add(0, seven, 2)
    trace.add(1, seven, 0)
    trace.add(0, seven, 3)
    assert (trace.commands, trace.lost) == (10, 3 + 4 + 7)
    other = parsed(trace)[1]
    assert [(c["commands"], c["lost"]) for c in other["cards"]] == [(7, 3 + 7), (3, 4)]
    assert other["lost"] == 14
    assert [e["args"]["fence"] for e in complete(trace)] == [*range(7), *range(3)]


def test_a_long_trace_comes_in_pieces(tmp_path: Path) -> None:
    trace = Trace([card(0)], BEGIN)
    for _ in range(10):
        trace.add(0, packed(*((n, n + 1, n, 0, Op.ADD, Format.F32) for n in range(1000))), 0)
    pieces = list(trace.chunks())
    assert len(pieces) > 4 and max(map(len, pieces)) < 1 << 20
    assert len(complete(trace)) == 10_000
    # And again the same.
    assert list(trace.chunks()) == pieces
