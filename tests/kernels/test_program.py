# SPDX-License-Identifier: Apache-2.0
"""Programs and steps as bytes: every field, read back through the structs of the C headers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spanker.errors import CardCommandError
from spanker.kernels import program as op
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
from spanker.native import ffi, lib
from spanker.sched.layout import q8_bytes

HANDLES = {"a": 11, "b": 22, "c": 33, "d": 44}
A, B, C, D = (Ref(name, 100 + i, 1000 + i) for i, name in enumerate("abcd"))


def struct_at(blob: bytes, name: str, offset: int = 0) -> Any:
    """A copy of the struct, so that the bytes may go."""
    out = ffi.new(f"struct {name} *")
    ffi.memmove(out, blob[offset : offset + ffi.sizeof(f"struct {name}")], ffi.sizeof(out[0]))
    return out[0]


def encoded(*commands: Command) -> list[Any]:
    blob = Program(commands, 7, 5, 99).encode(HANDLES)
    size = ffi.sizeof("struct spk_command")
    begin = ffi.sizeof("struct spk_program_header")
    assert len(blob) == begin + size * len(commands)
    return [struct_at(blob, "spk_command", begin + size * i) for i in range(len(commands))]


def refs(command: Any) -> dict[int, tuple[int, int, int]]:
    """The operands that are not all zero, by slot."""
    found = {i: (r.buffer, r.stride, r.offset) for i, r in enumerate(command.ref)}
    return {i: r for i, r in found.items() if r != (0, 0, 0)}


def bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def test_the_header_carries_the_largest_step() -> None:
    h = struct_at(Program((), 7, 5, 99).encode({}), "spk_program_header")
    assert (h.magic, h.version) == (lib.SPK_PROGRAM_MAGIC, lib.SPK_PROGRAM_VERSION)
    assert (h.commands, h.tokens_max, h.outputs_max, h.positions_max) == (0, 7, 5, 99)
    assert list(h.reserved) == [0, 0]


def test_operation_numbers_are_those_of_the_card() -> None:
    for member in Op:
        assert member == getattr(lib, f"SPK_OP_{member.name}")


REF = {"a": (11, 100, 1000), "b": (22, 101, 1001), "c": (33, 102, 1002), "d": (44, 103, 1003)}

COMMANDS = {
    "embed": (
        op.embed(Format.Q4_1, A, B, D, columns=64, vocabulary=300),
        ("EMBED", Format.Q4_1, {0: "a", 1: "b", 3: "d"}, [64, 300]),
    ),
    "rmsnorm": (
        op.rmsnorm(A, B, D, n=64, eps=1e-5),
        ("RMSNORM", 0, {0: "a", 1: "b", 3: "d"}, [64, bits(1e-5)]),
    ),
    "quantize": (op.quantize(A, D, k=96), ("QUANTIZE", 0, {0: "a", 3: "d"}, [96])),
    "matmul": (
        op.matmul(Format.Q8_0, A, B, D, rows=48, k=96),
        ("MATMUL", Format.Q8_0, {0: "a", 1: "b", 3: "d"}, [48, 96]),
    ),
    "rope": (
        op.rope(A, B, heads=3, head_dim=24, rope_dim=16),
        ("ROPE", 0, {0: "a", 1: "b"}, [3, 24, 16]),
    ),
    "kv_append": (
        op.kv_append(A, B, D, kv_heads=2, head_dim=24, page_positions=64, pages=9),
        ("KV_APPEND", 0, {0: "a", 1: "b", 3: "d"}, [2, 24, 64, 9]),
    ),
    "attention": (
        op.attention(
            A,
            B,
            D,
            kv_heads=2,
            head_dim=24,
            page_positions=64,
            pages=9,
            heads=4,
            first_head=3,
            group=3,
            scale=0.1,
        ),
        ("ATTENTION", 0, {0: "a", 1: "b", 3: "d"}, [2, 24, 64, 9, 4, 3, 3, bits(0.1)]),
    ),
    "swiglu": (op.swiglu(A, B, D, n=160), ("SWIGLU", 0, {0: "a", 1: "b", 3: "d"}, [160])),
    "add": (op.add(A, B, n=96), ("ADD", 0, {0: "a", 1: "b"}, [96])),
    "select": (op.select(A, D, n=96), ("SELECT", 0, {0: "a", 3: "d"}, [96])),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_of_a_command(name: str) -> None:
    command, (kind, fmt, slots, args) = COMMANDS[name]
    (got,) = encoded(command)
    assert got.op == getattr(lib, f"SPK_OP_{kind}")
    assert got.format == fmt
    assert got.flags == 0
    assert refs(got) == {slot: REF[buffer] for slot, buffer in slots.items()}
    assert list(got.arg) == args + [0] * (14 - len(args))


def test_commands_over_outputs_are_flagged() -> None:
    commands = (
        op.rmsnorm(A, B, D, n=64, eps=1e-5, outputs=True),
        op.quantize(A, D, k=96, outputs=True),
        op.matmul(Format.F16, A, B, D, rows=48, k=96, outputs=True),
        op.logit_stats(A, D, n=300),
        op.top_k(A, D, n=300, k=64, first_id=512),
        *op.exchange([Transfer(True, 1, A, 10)], outputs=True)[1:],
    )
    for got in encoded(*commands):
        assert got.flags == lib.SPK_FLAG_OUTPUTS
    assert list(encoded(commands[4])[0].arg[0:3]) == [300, 64, 512]


def test_an_exchange_is_its_count_and_then_its_transfers() -> None:
    assert op.exchange([]) == ()
    head, send, receive = encoded(
        *op.exchange([Transfer(True, 3, A, 34), Transfer(False, 2, D, 68)])
    )
    assert (head.op, head.arg[0], refs(head)) == (lib.SPK_OP_EXCHANGE, 2, {})
    assert (send.op, list(send.arg[0:2])) == (lib.SPK_OP_LINK_SEND, [3, 34])
    assert refs(send) == {0: REF["a"]}
    assert (receive.op, list(receive.arg[0:2])) == (lib.SPK_OP_LINK_RECV, [2, 68])
    assert refs(receive) == {3: REF["d"]}


def test_wide_fields_keep_all_their_bits() -> None:
    wide = Ref("a", (1 << 32) - 1, (1 << 64) - 1)
    (got,) = encoded(Command(Op.ADD, ((2, wide),), tuple(range(1, 15)), Format.Q8_0, True))
    assert refs(got) == {2: (11, (1 << 32) - 1, (1 << 64) - 1)}
    assert list(got.arg) == list(range(1, 15))


def test_a_missing_buffer_is_named_with_its_command() -> None:
    made = Program((op.add(A, B, n=1), op.add(A, Ref("missing"), n=1)), 1, 1, 1)
    with pytest.raises(CardCommandError, match=r"command 1 \(add\) names buffer 'missing'"):
        made.encode(HANDLES)


# --- steps --------------------------------------------------------------------------


def arrays(blob: bytes) -> tuple[Any, dict[str, list[Any]]]:
    """A parameter block taken apart by the layout that spk_card.h states."""
    h = struct_at(blob, "spk_step_header")
    at = ffi.sizeof("struct spk_step_header")
    out: dict[str, list[Any]] = {}
    for name, dtype, count in (
        ("token_id", np.uint32, h.tokens),
        ("position", np.uint32, h.tokens),
        ("sequence", np.uint32, h.tokens),
        ("output_token", np.uint32, h.outputs),
        ("inv_temperature", np.float32, h.outputs),
        ("first_page", np.uint32, h.sequences + 1),
        ("page", np.uint32, h.pages),
    ):
        out[name] = np.frombuffer(blob, dtype, count, at).tolist()
        at += 4 * count
    assert at == len(blob)
    return h, out


def test_every_field_of_a_step() -> None:
    blob = encode_step(
        [
            SequenceStep([5, 6, 7], 62, [9, 4], (0, 2), inv_temperature=1.25),
            SequenceStep([8], 0, [3]),
            SequenceStep([1, 2], 128, [0, 1, 2], (1,), inv_temperature=0.5),
        ]
    )
    h, a = arrays(blob)
    assert (h.magic, h.version) == (lib.SPK_STEP_MAGIC, lib.SPK_STEP_VERSION)
    assert (h.tokens, h.outputs, h.sequences, h.pages) == (6, 3, 3, 6)
    assert list(h.reserved) == [0, 0]
    assert a == {
        "token_id": [5, 6, 7, 8, 1, 2],
        "position": [62, 63, 64, 0, 128, 129],
        "sequence": [0, 0, 0, 1, 2, 2],
        "output_token": [0, 2, 5],
        "inv_temperature": [1.25, 1.25, 0.5],
        "first_page": [0, 2, 3, 6],
        "page": [9, 4, 3, 0, 1, 2],
    }


def test_an_empty_step_has_its_header_and_one_index() -> None:
    h, a = arrays(encode_step([]))
    assert (h.tokens, h.outputs, h.sequences, h.pages) == (0, 0, 0, 0)
    assert a["first_page"] == [0]


def test_sizes_of_q8_rows() -> None:
    assert [q8_bytes(k) for k in (0, 32, 96)] == [0, 34, 102]
