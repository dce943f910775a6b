# SPDX-License-Identifier: Apache-2.0
"""What the conformance suite of CardDevice runs on, and small programs for it.

A body joins with one line in BODIES: how to make `count` linked cards with `ddr_bytes` each, as an
object with `.cards` and `.close()`.  Tests ask `clock_of` a card for the time and let it pass
there: that of virtual cards passes only then.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import select
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import pytest
from driver_model import DriverModel

from spanker.device.axi import AxiRecorder
from spanker.device.base import CardDevice, Completion
from spanker.device.kernel.rig import KernelRig
from spanker.device.kernel.spec import first_cards
from spanker.device.remote import RemoteCard
from spanker.device.riscv.spec import RiscvCardSpec
from spanker.device.soft import SoftCardSpec, SoftRig
from spanker.device.virtual.card import VirtualCard, VirtualRig
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.device.virtual.units import PS_PER_NS, to_ps
from spanker.kernels import program as op
from spanker.kernels.program import (
    Command,
    Program,
    Ref,
    SequenceStep,
    Transfer,
    encode_step,
)
from spanker.sched.bandwidth import REV_A
from spanker.testing.faulty_card import FaultyCard

DDR_BYTES = 1 << 20
WAIT_S = 20.0


class Rig(Protocol):
    @property
    def cards(self) -> Sequence[CardDevice]: ...
    def close(self) -> None: ...


MakeRig = Callable[..., Rig]


def soft_rig(count: int, ddr_bytes: int) -> SoftRig:
    return SoftRig([SoftCardSpec(ddr_bytes=ddr_bytes)] * count)


class RecordedRig:
    """Soft cards, each within a recorder."""

    def __init__(self, count: int, ddr_bytes: int) -> None:
        self._rig = soft_rig(count, ddr_bytes)
        self.cards = [AxiRecorder(card) for card in self._rig.cards]

    def close(self) -> None:
        self._rig.close()


class FaultyRig:
    """Soft cards, each within one that could be made to fail."""

    def __init__(self, count: int, ddr_bytes: int) -> None:
        self._rig = soft_rig(count, ddr_bytes)
        self.cards = [
            FaultyCard(card, time.monotonic, lambda when, call: None) for card in self._rig.cards
        ]

    def close(self) -> None:
        for card in self.cards:
            card.close()
        self._rig.close()


def riscv_rig(count: int, ddr_bytes: int) -> SoftRig:
    """Firmware in an emulator."""
    return SoftRig([riscv_spec(ddr_bytes)] * count)


def mixed_rig(count: int, ddr_bytes: int) -> SoftRig:
    """The same and soft cards in turn."""
    kinds = (riscv_spec(ddr_bytes), SoftCardSpec(ddr_bytes=ddr_bytes))
    return SoftRig([kinds[n % 2] for n in range(count)])


def riscv_spec(ddr_bytes: int) -> RiscvCardSpec:
    """The emulator keeps account of every page: no terabytes."""
    return RiscvCardSpec(ddr_bytes=min(ddr_bytes, 64 << 20))


def throttled_rig(count: int, ddr_bytes: int) -> SoftRig:
    """Soft cards at the first board's speeds."""
    return SoftRig([SoftCardSpec(ddr_bytes=ddr_bytes)] * count, throttle=REV_A)


def virtual_rig(count: int, ddr_bytes: int) -> VirtualRig:
    return VirtualRig([VirtualCardSpec(ddr_bytes=ddr_bytes)] * count, REV_A)


class ModelledDriverRig:
    """Kernel cards over a model of the module; their cards can fail as a test plants it."""

    def __init__(self, count: int, ddr_bytes: int) -> None:
        self.driver = DriverModel(count, ddr_bytes)
        self._rig: KernelRig | None = None
        try:
            self._rig = KernelRig(first_cards(count), system=self.driver)
        except BaseException:
            self.driver.shut_down()
            raise
        self.cards = self._rig.cards
        for card in self.cards:
            card.kill = functools.partial(self.driver.kill, card.number)
            card.hang = self.driver.cards[card.number].soft.hang

    def close(self) -> None:
        assert self._rig
        self._rig.close()
        assert not self.driver.mapped
        self.driver.shut_down()


# How many real cards there are: /dev/spanker0 and so on are tested instead of the model.
REAL_CARDS = int(os.environ.get("SPANKER_TEST_KERNEL_CARDS", "0"))

# What an abort may take.  The machine around real cards is an emulated one, and so is what runs
# firmware: their calls and interrupts together take milliseconds when the host has other things to
# do.
ABORT_WITHIN_S = 0.010
BESIDE_ABORT_WITHIN_S = 0.2


def abort_within_s(device: CardDevice) -> float:
    """What an abort may take of such a card."""
    beside = REAL_CARDS or isinstance(device, RemoteCard)
    return BESIDE_ABORT_WITHIN_S if beside else ABORT_WITHIN_S


def kernel_rig(count: int, ddr_bytes: int) -> KernelRig:
    """Cards of the module that is loaded, whose memory is as large as it is."""
    if count > REAL_CARDS:
        pytest.skip(f"{count} cards are wanted, SPANKER_TEST_KERNEL_CARDS says {REAL_CARDS}")
    return KernelRig(first_cards(count))


BODIES: dict[str, Callable[[int, int], Rig]] = {
    "soft": soft_rig,
    "recorded": RecordedRig,
    "faulty": FaultyRig,
    "throttled": throttled_rig,
    "virtual": virtual_rig,
    "riscv": riscv_rig,
    "mixed": mixed_rig,
    "kernel": ModelledDriverRig,
}
# Those that need firmware and its emulator.
EMULATED = ("riscv", "mixed")
if REAL_CARDS:
    BODIES = {"kernel": kernel_rig}


# --- time -------------------------------------------------------------------------------


def polls_readable(device: CardDevice, timeout_s: float) -> bool:
    assert device.completion_fd is not None
    poll = select.poll()
    poll.register(device.completion_fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class RealTime:
    """The time of cards that work by themselves."""

    def now_ns(self) -> int:
        return time.monotonic_ns()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def readable(self, device: CardDevice, timeout_s: float) -> bool:
        return polls_readable(device, timeout_s)


class ModelledTime:
    """The time of virtual cards: it passes when somebody lets it."""

    def __init__(self, rig: VirtualRig) -> None:
        self._rig = rig

    def now_ns(self) -> int:
        return self._rig.now // PS_PER_NS

    def sleep(self, seconds: float) -> None:
        self._rig.advance(self._rig.now + to_ps(seconds))

    def readable(self, device: CardDevice, timeout_s: float) -> bool:
        end = self._rig.now + to_ps(timeout_s)
        while not polls_readable(device, 0):
            event = self._rig.next_event()
            if event is None or event > end:
                self._rig.advance(end)
                return polls_readable(device, 0)
            self._rig.advance(event)
        return True


def clock_of(device: CardDevice) -> RealTime | ModelledTime:
    return ModelledTime(device.rig) if isinstance(device, VirtualCard) else RealTime()


def readable(device: CardDevice, timeout_s: float) -> bool:
    return clock_of(device).readable(device, timeout_s)


# --- steps ------------------------------------------------------------------------------


def collect(device: CardDevice, count: int, timeout_s: float = WAIT_S) -> list[Completion]:
    """Exactly `count` completions, waiting for them as an actor would."""
    done: list[Completion] = []
    clock = clock_of(device)
    end = clock.now_ns() / 1e9 + timeout_s
    while len(done) < count:
        done += device.completions()
        if len(done) < count and device.completion_fd is not None:
            left = end - clock.now_ns() / 1e9
            assert left > 0, f"{len(done)} of {count} completions after {timeout_s} s"
            readable(device, left)
    assert len(done) == count
    return done


def finish(device: CardDevice, count: int = 1) -> None:
    """Wait for `count` completions and raise the first error among them."""
    for completion in collect(device, count):
        if completion.error is not None:
            raise completion.error


def make_program(*commands: Command, tokens: int = 4, outputs: int = 4) -> Program:
    return Program(commands, tokens, min(outputs, tokens), positions_max=64)


def step(tokens: int = 1, outputs: int = 0) -> bytes:
    """Parameters of a step of so many tokens of one sequence, the first ones as outputs."""
    if not tokens:
        return encode_step([])
    return encode_step([SequenceStep([0] * tokens, 0, [], tuple(range(outputs)))])


def floats(device: CardDevice, handle: int, count: int) -> np.ndarray:
    return np.frombuffer(device.read(handle, 0, 4 * count), np.float32)


def adder(device: CardDevice, n: int = 16, tokens: int = 4) -> tuple[int, int, int]:
    """A program x += 1 over n floats per token; returns (program, buffer x, buffer of ones)."""
    x, ones = device.alloc(4 * n * tokens), device.alloc(4 * n * tokens)
    device.write(ones, 0, np.ones(n * tokens, np.float32).tobytes())
    made = make_program(op.add(Ref("x", 4 * n), Ref("y", 4 * n), n=n), tokens=tokens)
    return device.load_program(made.encode({"x": x, "y": ones})), x, ones


def waiter(device: CardDevice, peer: int, nbytes: int = 64) -> tuple[int, int]:
    """A program that waits for `nbytes` from a peer; returns (program, buffer)."""
    buffer = device.alloc(nbytes)
    commands = op.exchange([Transfer(False, peer, Ref("in"), nbytes)])
    return device.load_program(make_program(*commands, tokens=1).encode({"in": buffer})), buffer


def sender(device: CardDevice, peer: int, nbytes: int = 64) -> tuple[int, int]:
    buffer = device.alloc(nbytes)
    commands = op.exchange([Transfer(True, peer, Ref("out"), nbytes)])
    return device.load_program(make_program(*commands, tokens=1).encode({"out": buffer})), buffer


def position_data(card: int, rows: int, row_bytes: int) -> np.ndarray:
    """Bytes that differ by card, row and position, with no short period."""
    i = np.arange(rows * row_bytes, dtype=np.uint64) + np.uint64(card << 32)
    return ((i * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)).astype(np.uint8)


def gather_programs(
    cards: Sequence[CardDevice], shares: Sequence[int], tokens: int, seed: int
) -> tuple[list[int], list[int]]:
    """Every card sends its share of each row to all others; (programs, buffers).

    The order of transfers is shuffled differently on every card: no order may deadlock.
    """
    rng = random.Random(seed)
    starts = [0, *itertools.accumulate(shares)]
    row = starts[-1]
    programs, buffers = [], []
    for me, card in enumerate(cards):
        transfers = []
        for peer in range(len(cards)):
            if peer != me:
                transfers.append(Transfer(True, peer, Ref("row", row, starts[me]), shares[me]))
                transfers.append(Transfer(False, peer, Ref("row", row, starts[peer]), shares[peer]))
        rng.shuffle(transfers)
        buffers.append(card.alloc(max(row, 1) * max(tokens, 1)))
        made = make_program(*op.exchange(transfers), tokens=max(tokens, 1), outputs=1)
        programs.append(card.load_program(made.encode({"row": buffers[-1]})))
    return programs, buffers


def plant(device: CardDevice, fault: str) -> None:
    if not hasattr(device, fault):
        pytest.skip(f"this body has no {fault}()")
    getattr(device, fault)()
