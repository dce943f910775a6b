# SPDX-License-Identifier: Apache-2.0
"""The kernels of another machine, emulated, under the interface of this one's.

`GuestKernels` is a NativeKernels whose every call runs in a guest: under qemu-user, the program of
tests/native/cross/kernel_server.c, which tools/build_kernel_server.py builds with all kernels that
native_build.libraries lists for the machine.  So what tests this machine's kernels tests those of
any instruction set of that one, by its name:

    with Guest([*qemu(cpu(256)), program], "rvv") as guest:
        kernels = GuestKernels(guest)
        kernels.matmul("q4_0", weights, x)

A kernel that writes before its buffers or touches what is behind them, or a guest that dies, is a
GuestError; the next call starts another.
"""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
import tempfile
from functools import partial
from typing import IO, Any

import numpy as np

from spanker.kernels.elements import Element
from spanker.kernels.formats import Format, packed_bytes, row_bytes
from spanker.kernels.native import Q8_EXPANDED, NativeKernels
from spanker.kernels.reference import BLOCK, LOGIT_CHUNK, Q8_BLOCK_BYTES
from spanker.native import ISAS, ffi, lib

# As in kernel_server.c.
OPS = (
    *("quantize_q8", "expand_q8", "matmul_q8", "matmul_f32", "rmsnorm", "rope", "kv_append"),
    *("attention", "swiglu", "add", "dequantize_row", "logit_stats", "top_k", "reduce", "divide"),
)
# A pointer, how many bytes of it the kernel may touch, and whether it writes any.
Buffer = tuple[Any, int, bool]


# Bits of a vector register: the least that V promises, and what code for that might not expect.
LENGTHS = (128, 256, 512, 1024)


class GuestError(AssertionError):
    """The kernel broke out of its buffers, or the guest died."""


def qemu(cpu: str, machine: str = "riscv64") -> list[str]:
    """The command that runs a program of that machine on that CPU (qemu's -cpu)."""
    found = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    if found is None:
        raise FileNotFoundError(f"qemu-{machine} is not installed (Debian's qemu-user)")
    return [found, "-cpu", cpu]


def cpu(length: int | None) -> str:
    """A RISC-V CPU with V and registers of `length` bits, or without V, as qemu's -cpu has it.

    What is left of a register behind the last element is the machine's choice: here, all ones.
    """
    if length is None:
        return "rv64,v=false"
    return f"rv64,v=true,vlen={length},vext_spec=v1.0,rvv_ta_all_1s=true,rvv_ma_all_1s=true"


class Guest:
    """A kernel server: started at the first call and after it died; closed by `close`."""

    def __init__(self, command: list[str], isa: str) -> None:
        self.isa = isa
        self.vector_bytes = 0
        """Of a vector register, as the guest said; 0 before the first call."""
        self._command = [*command, isa]
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] = tempfile.TemporaryFile()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._stop()
        self._said.close()

    def _stop(self) -> int:
        """The exit status of the guest, which is killed if the end of its input is not enough."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with process:
            try:
                process.communicate(timeout=5)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                process.kill()
        return process.returncode

    def start(self) -> None:
        """Start the guest unless it runs; GuestError when it is not what was asked for."""
        if self._process is not None:
            return
        self._said.truncate(0)
        self._said.seek(0)
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
        )
        number, self.vector_bytes = struct.unpack("<2I", self._read(8))
        if number != ISAS[self.isa]:
            raise GuestError(f"asked for the kernels of {self.isa}, got those of number {number}")

    def _read(self, n: int) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        data = self._process.stdout.read(n)
        if len(data) < n:
            self._died()
        return data

    def _died(self) -> None:
        status = self._stop()
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip()
        raise GuestError(f"the guest died with status {status}: {said or 'no word'}")

    def call(self, op: str, scalars: list[int], buffers: list[Buffer]) -> int:
        """Run a kernel on copies of the buffers, copy back what it writes; returns its status."""
        self.start()
        assert self._process is not None and self._process.stdin is not None
        returned = sum(1 << i for i, (_, _, written) in enumerate(buffers) if written)
        request = struct.pack(
            f"<4I{len(scalars)}Q{len(buffers)}Q",
            *(OPS.index(op), len(scalars), len(buffers), returned),
            *scalars,
            *(size for _, size, _ in buffers),
        )
        contents = [bytes(ffi.buffer(pointer, size)) for pointer, size, _ in buffers if size]
        try:
            self._process.stdin.write(b"".join([request, *contents]))
            self._process.stdin.flush()
        except BrokenPipeError:
            self._died()
        status, damaged = struct.unpack("<2I", self._read(8))
        for pointer, size, written in buffers:
            if written and size:
                ffi.memmove(pointer, self._read(size), size)
        if damaged:
            raise GuestError(f"{op} of {self.isa} wrote before its buffers (mask {damaged:#x})")
        return int(status)


def _float_bits(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def _rows(pointer: Any, count: int, stride: int, width: int, *, out: bool = False) -> Buffer:
    """`count` rows of `width` floats, `stride` floats apart."""
    return pointer, ((count - 1) * stride + width) * 4 if count and width else 0, out


def _q8_rows(pointer: Any, count: int, stride: int, k: int, *, out: bool = False) -> Buffer:
    """The same of rows of k activations in Q8 blocks, `stride` bytes apart."""
    width = k // BLOCK * Q8_BLOCK_BYTES
    return pointer, (count - 1) * stride + width if count and width else 0, out


def _expanded_bytes(tokens: int, k: int) -> int:
    return tokens * (k // BLOCK) * Q8_EXPANDED.itemsize


def _pool_sizes(kv: Any) -> list[int]:
    return [kv.pages, kv.page_positions, kv.kv_heads, kv.head_dim]


def _pool(kv: Any, *, out: bool = False) -> Buffer:
    return kv.pool, 2 * math.prod(_pool_sizes(kv)) * 2, out


def _stride(rows: Any, count: int, width: int) -> int:
    """Floats between the rows that these pointers lead to, which are equally far apart."""
    return int(rows[1] - rows[0]) if count > 1 else width


class _Table:
    """What struct spk_kernels is to NativeKernels: the functions, each a call of the guest.

    Arguments are those of spk_kernels.h, and what a pointer leads to is as large as is said there.
    """

    def __init__(self, guest: Guest) -> None:
        self._call = guest.call
        self.matmul_q8 = {fmt: partial(self._matmul_q8, fmt) for fmt in Format if not fmt.is_float}
        self.matmul_f32 = {fmt: partial(self._matmul_f32, fmt) for fmt in Format if fmt.is_float}

    def quantize_q8(
        self, x: Any, x_stride: int, out: Any, out_stride: int, k: int, tokens: int
    ) -> int:
        buffers = [_rows(x, tokens, x_stride, k), _q8_rows(out, tokens, out_stride, k, out=True)]
        return self._call("quantize_q8", [x_stride, out_stride, k, tokens], buffers)

    def expand_q8(self, blocks: Any, stride: int, out: Any, k: int, tokens: int) -> None:
        buffers = [_q8_rows(blocks, tokens, stride, k), (out, _expanded_bytes(tokens, k), True)]
        self._call("expand_q8", [stride, k, tokens], buffers)

    def _matmul_q8(
        self,
        fmt: Format,
        w: Any,
        x: Any,
        out: Any,
        stride: int,
        rows: int,
        tokens: int,
        *tiles: int,
    ) -> None:
        k = int(x.blocks) * 32
        buffers = [
            (w, packed_bytes(fmt, rows, k), False),
            (x.block, _expanded_bytes(tokens, k), False),
            _rows(out, tokens, stride, rows, out=True),
        ]
        self._call("matmul_q8", [fmt, x.blocks, stride, rows, tokens, *tiles], buffers)

    def _matmul_f32(
        self, fmt: Format, w: Any, x: Any, x_stride: int, out: Any, stride: int, *sizes: int
    ) -> None:
        rows, k, tokens, *_ = sizes
        buffers = [
            (w, packed_bytes(fmt, rows, k), False),
            _rows(x, tokens, x_stride, k),
            _rows(out, tokens, stride, rows, out=True),
        ]
        self._call("matmul_f32", [fmt, x_stride, stride, *sizes], buffers)

    def rmsnorm(
        self, x: Any, x_stride: int, w: Any, out: Any, stride: int, n: int, tokens: int, eps: float
    ) -> int:
        buffers = [
            _rows(x, tokens, x_stride, n),
            (w, n * 4, False),
            _rows(out, tokens, stride, n, out=True),
        ]
        return self._call("rmsnorm", [x_stride, stride, n, tokens, _float_bits(eps)], buffers)

    def rope(
        self, x: Any, stride: int, heads: int, dim: int, rope_dim: int, table: Any, *where: Any
    ) -> None:
        positions, tokens = where
        table_rows = max(positions[0:tokens], default=-1) + 1
        buffers = [
            _rows(x, tokens, stride, heads * dim, out=True),
            (table, table_rows * rope_dim * 4, False),
            (positions, tokens * 4, False),
        ]
        self._call("rope", [stride, heads, dim, rope_dim, tokens], buffers)

    def kv_append(self, kv: Any, page: int, position: int, k: Any, v: Any) -> int:
        nbytes = kv.kv_heads * kv.head_dim * 4
        buffers = [_pool(kv, out=True), (k, nbytes, False), (v, nbytes, False)]
        return self._call("kv_append", [*_pool_sizes(kv), page, position], buffers)

    def attention(self, a: Any) -> int:
        n, dim = a.queries, a.kv.head_dim
        if n == 0:
            return int(lib.SPK_OK)
        strides = [_stride(p, n, dim) for p in (a.q, a.out)]
        longest = max(a.visible[0:n])
        scratch = lib.SPK_ATTENTION_ROWS * (-(-longest // 16) * 16 + dim) * 4
        buffers = [
            _pool(a.kv),
            (a.pages, -(-longest // a.kv.page_positions) * 4, False),
            _rows(a.q[0], n, strides[0], dim),
            _rows(a.out[0], n, strides[1], dim, out=True),
            (a.visible, n * 4, False),
            (a.scratch, scratch, True),
        ]
        scalars = [*_pool_sizes(a.kv), a.kv_head, n, *strides, _float_bits(a.scale)]
        return self._call("attention", scalars, buffers)

    def swiglu(
        self,
        gate: Any,
        gate_stride: int,
        up: Any,
        up_stride: int,
        out: Any,
        stride: int,
        *sizes: int,
    ) -> None:
        n, tokens = sizes
        buffers = [
            _rows(gate, tokens, gate_stride, n),
            _rows(up, tokens, up_stride, n),
            _rows(out, tokens, stride, n, out=True),
        ]
        self._call("swiglu", [gate_stride, up_stride, stride, n, tokens], buffers)

    def add(self, x: Any, x_stride: int, y: Any, y_stride: int, n: int, tokens: int) -> None:
        buffers = [_rows(x, tokens, x_stride, n, out=True), _rows(y, tokens, y_stride, n)]
        self._call("add", [x_stride, y_stride, n, tokens], buffers)

    def dequantize_row(self, fmt: int, row: Any, out: Any, k: int) -> int:
        buffers = [(row, row_bytes(Format(fmt), k), False), (out, k * 4, True)]
        return self._call("dequantize_row", [fmt, k], buffers)

    def logit_stats(self, logits: Any, n: int, inv_temperature: float, stats: Any) -> int:
        buffers = [(logits, n * 4, False), (stats, -(-n // LOGIT_CHUNK) * 8, True)]
        return self._call("logit_stats", [n, _float_bits(inv_temperature)], buffers)

    def top_k(self, logits: Any, n: int, k: int, ids: Any, values: Any) -> int:
        held = min(n, k) * 4
        buffers = [(logits, n * 4, False), (ids, held, True), (values, held, True)]
        return self._call("top_k", [n, k], buffers)

    def reduce(self, element: int, how: int, into: Any, operand: Any, n: int) -> None:
        nbytes = n * Element(element).nbytes
        self._call("reduce", [element, how, n], [(into, nbytes, True), (operand, nbytes, False)])

    def divide(self, element: int, into: Any, by: int, n: int) -> None:
        self._call("divide", [element, by, n], [(into, n * Element(element).nbytes, True)])


class GuestKernels(NativeKernels):
    """The kernels of a guest's instruction set, under the interface of this machine's."""

    def __init__(self, guest: Guest) -> None:
        self.isa = guest.isa
        self._k = _Table(guest)
