# SPDX-License-Identifier: Apache-2.0
"""The `virtual` card: modelled time from the engine, memory and arithmetic from the native card.

A `VirtualRig` makes the cards of one fleet.  Each is the native card of the soft body, without
threads: it checks and holds programs, steps and buffers, and when the engine says that a step ends
it is stepped, here and now, until that step is done.  A hollow card is never stepped: it answers as
if all its weights were zero, and keeps no bytes.

Time comes from `clock`, or, without one, from whoever calls `advance`.  Nothing here waits: the
task that lets the time of a rig pass is `actors.virtual_time.drive`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence

import attrs

from spanker.device.base import (
    Buffer,
    CardDevice,
    CardRig,
    Completion,
    DeviceCounters,
    Fill,
    Lent,
    Place,
    Read,
)
from spanker.device.soft import (
    CARDS_MAX,
    SoftCard,
    SoftCardSpec,
    check_topology,
    link_all,
    link_one,
)
from spanker.device.virtual.costs import ProgramCosts, over_links, step_size
from spanker.device.virtual.engine import Engine, Outcome, Usage, Work
from spanker.device.virtual.flows import MESSAGE_BYTES
from spanker.device.virtual.recorder import Recorder
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.device.virtual.units import PS_PER_NS
from spanker.device.virtual.zeros import answer
from spanker.errors import CardCommandError, ConfigError
from spanker.native import lib, status_error
from spanker.sched.bandwidth import Profile
from spanker.sched.topology import Topology

# What stands for a message that goes over the host: its epoch, how many bytes it has, whether they
# are damaged; and as many bytes more as a soft card's message of them has.
_HOSTED = struct.Struct("<QIB")
_MESSAGE_HEADER_BYTES = 24


def _hosted(nbytes: int, epoch: int, damaged: bool) -> bytes:
    padding = -(-nbytes // 8) * 8 + _MESSAGE_HEADER_BYTES - _HOSTED.size
    return _HOSTED.pack(epoch, nbytes, damaged) + bytes(padding)


class VirtualCard(SoftCard):
    """One card of a `VirtualRig`."""

    kind = "virtual"
    modelled = True

    def __init__(self, rig: VirtualRig, number: int, spec: VirtualCardSpec) -> None:
        self._fd = -1
        super().__init__(rig, number, SoftCardSpec(spec.isa, spec.ddr_bytes))
        self.hollow = spec.hollow
        # What a card says of itself takes time on the host link, wherever and however it computes.
        self._info = attrs.evolve(self._info, isa="virtual", windows_max=0, meets=0, maps=0)
        self.rig = rig
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._programs: dict[int, ProgramCosts] = {}
        self._reads_of: dict[int, tuple[Read, ...]] = {}
        # What the native card has completed, perhaps before its time has come.
        self._native: dict[int, Completion] = {}
        self._failed = 0  # the last fence that was given up
        self._done: deque[Completion] = deque()
        self._outstanding = 0
        self._relayed: list[tuple[int, bytes]] = []
        self._recorder: Recorder | None = None

    @property
    def completion_fd(self) -> int | None:
        _ = self.handle
        return self._fd

    @property
    def outstanding(self) -> int:
        return self._outstanding

    # --- memory -------------------------------------------------------------------------

    def window(self, nbytes: int) -> int:
        # What a hollow card would do to lent memory nobody has written.
        return CardDevice.window(self, nbytes)

    def map_file(self, file: int, places: Sequence[Place]) -> None:
        # What comes to a modelled card comes over its host link.
        CardDevice.map_file(self, file, places)

    def write(self, handle: int, offset: int, data: Buffer) -> None:
        if self.hollow:
            self.check_range(handle, offset, len(data), "writing")
        else:
            super().write(handle, offset, data)

    def fill(self, handle: int, offset: int, nbytes: int, make: Fill) -> None:
        if self.hollow:
            self.check_range(handle, offset, nbytes, "filling")
        else:
            super().fill(handle, offset, nbytes, make)

    def read(self, handle: int, offset: int, nbytes: int) -> bytes:
        if not self.hollow:
            return super().read(handle, offset, nbytes)
        self.check_range(handle, offset, nbytes, "reading")
        return bytes(nbytes)

    # --- programs and steps ---------------------------------------------------------------

    def load_program(self, program: Buffer) -> int:
        # The native card's bytes take no time on any way; how they go is the engine's business.
        handle = super().load_program(over_links(program))
        try:
            self._programs[handle] = costs = ProgramCosts.read(program)
            for peer in costs.link_peers:
                if not self.rig.linked(self.number, peer):
                    raise CardCommandError(
                        f"card {self.number}: program refused: a transfer names card {peer}, a "
                        f"peer without a link",
                        card=self.number,
                    )
        except BaseException:
            super().unload_program(handle)
            self._programs.pop(handle, None)
            raise
        return handle

    def unload_program(self, program: int) -> None:
        super().unload_program(program)
        del self._programs[program]

    def submit(
        self,
        program: int,
        parameters: Buffer,
        reads: Sequence[Read] = (),
        lent: Sequence[Lent] = (),
    ) -> int:
        engine = self.rig.synced()
        fence = super().submit(program, parameters, reads, lent)
        if self.hollow:
            self._reads_of[fence] = tuple(reads)
        engine.submit(self.number, Work(fence, self._programs[program], step_size(parameters)))
        self._outstanding += 1
        self.rig.changed()
        return fence

    def completions(self) -> Sequence[Completion]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        done = list(self._done)
        self._done.clear()
        self._outstanding -= len(done)
        return done

    def send_over_host(self, peer: int, nbytes: int, epoch: int, damaged: bool) -> None:
        """For the rig: a step hands bytes to the host."""
        for begin in range(0, nbytes, MESSAGE_BYTES):
            part = min(nbytes - begin, MESSAGE_BYTES)
            self._relayed.append((peer, _hosted(part, epoch, damaged)))
        os.eventfd_write(self._fd, 1)

    def relayed(self) -> Sequence[tuple[int, bytes]]:
        found, self._relayed = self._relayed, []
        return found

    def relay(self, peer: int, data: Buffer) -> bool:
        self._check_peer(peer)
        if len(data) < _HOSTED.size:
            raise CardCommandError(
                f"card {self.number}: {len(data)} bytes from card {peer} are nothing that came "
                f"over the host",
                card=self.number,
            )
        epoch, nbytes, damaged = _HOSTED.unpack_from(data)
        self.rig.synced().take(peer, self.number, nbytes, epoch, bool(damaged))
        self.rig.changed()
        return True

    def abort(self, epoch: int) -> None:
        engine = self.rig.synced()
        super().abort(epoch)
        self.step_native()
        self._fail(engine.abort(self.number, epoch), lib.SPK_E_ABORTED)
        self.rig.changed()

    def end_step(self, work: Work) -> Outcome:
        """For the rig: the time of a step has come."""
        native = self._finished(work)
        if native is None:
            return Outcome.STUCK
        self._complete(native._replace(busy_ns=work.busy_ps // PS_PER_NS))
        if native.error is None:
            return Outcome.DONE
        self._fail(self.rig.engine.behind(self.number), lib.SPK_E_ABORTED)
        return Outcome.FAULT

    def damaged(self, work: Work) -> None:
        """For the rig: a step has failed on a message that does not pass its check."""
        behind = self.rig.engine.behind(self.number)
        # The native card's messages are whole.
        lib.spk_card_fail(self.handle, lib.SPK_E_LINK)
        self._fail((work,), lib.SPK_E_LINK)
        self._fail(behind, lib.SPK_E_ABORTED)

    def _finished(self, work: Work) -> Completion | None:
        fence = work.fence
        if self.hollow:
            lib.spk_card_skip(self.handle)
            self._take_native()
            reads = self._reads_of.pop(fence)
            data = tuple(answer(work.program.results, read) for read in reads)
            return self._native.pop(fence)._replace(data=data)
        if fence not in self._native:
            self.rig.step_until(self, fence)
        return self._native.pop(fence, None)

    def _fail(self, dropped: Sequence[Work], status: int) -> None:
        """Complete what is not to be done, in order, with an error; not with what the native card
        says of it, which depends on how far that has got."""
        self._take_native()
        for work in dropped:
            self._native.pop(work.fence, None)
            self._reads_of.pop(work.fence, None)
            error = status_error(status, f"card {self.number}, command 0", card=self.number)
            self._complete(Completion(work.fence, work.busy_ps // PS_PER_NS, error))
        if dropped:
            self._failed = dropped[-1].fence

    def _complete(self, completion: Completion) -> None:
        self._done.append(completion)
        os.eventfd_write(self._fd, 1)

    def step_native(self) -> bool:
        """For the rig: a slice of work, if there is any that waits for nobody."""
        moved: bool = lib.spk_card_step(self.handle) == lib.SPK_STEP_RAN
        return moved

    def has_native(self, fence: int) -> bool:
        """For the rig: whether the native card has completed a step."""
        self._take_native()
        return fence in self._native

    def _take_native(self) -> None:
        for completion in super().completions():
            # What had been given up before the native card came to it is of no interest.
            if completion.fence > self._failed:
                self._native[completion.fence] = completion

    # --- what is told -------------------------------------------------------------------

    def counters(self) -> DeviceCounters:
        engine = self.rig.synced()
        state = engine.state(self.number)
        links = [engine.link_bytes(self.number, c.number) for c in self.rig.cards]
        native = self._counters(links, engine.links_down(self.number))
        # In modelled time a peer that hangs may have sent what it has not: the bytes know better.
        stuck = engine.is_stuck(self.number)
        return attrs.evolve(
            native,
            commands=state.commands,
            steps=state.steps,
            ddr_read_bytes=state.read_bytes,
            ddr_written_bytes=state.written_bytes,
            busy_ns=state.busy_ps // PS_PER_NS,
            progress=state.progress,
            queued=state.queued,
            waiting_for=native.waiting_for if stuck else state.waiting_for,
        )

    def trace(self, events: int) -> None:
        self._u64(events, "number of events")
        _ = self.handle
        most, engine = int(lib.SPK_TRACE_EVENTS_MAX), self.rig.synced()
        if events > most or engine.state(self.number).queued:
            raise CardCommandError(
                f"card {self.number}: tracing {events} commands: expected at most {most:,}, and "
                f"no step queued",
                card=self.number,
            )
        self._recorder = Recorder(events) if events else None
        engine.record(self.number, self._recorder)

    def trace_events(self, most: int) -> tuple[bytes, int]:
        self._u64(most, "number of events")
        if self._recorder is None:
            return b"", 0
        return self._recorder.take(most), self._recorder.lost

    # --- faults, the end ------------------------------------------------------------------
    # The engine has them; the native card below only knows of those that stop it.

    def _plant_fault(self, fault: int, command: int | None) -> None:
        engine = self.rig.synced()
        happen = functools.partial(self._stop, fault)
        if command is None:
            happen()
        elif command == lib.SPK_COMMAND_ANY:
            engine.plant(self.number, None, happen)
        else:
            engine.plant(self.number, command, happen)
        self.rig.changed()

    def _stop(self, fault: int) -> None:
        lib.spk_card_plant(self.handle, fault)
        lost = lib.spk_card_lost(self.handle)
        if lost == lib.SPK_OK:
            self.rig.engine.hang(self.number)
        else:
            self.step_native()
            self._fail(self.rig.engine.kill(self.number), lost)

    def _slow(self, factor: float) -> None:
        self.rig.synced().slow(self.number, factor)
        self.rig.changed()

    def _want_link(self, peer: int, up: bool) -> None:
        self.rig.synced().want_link(self.number, peer, up)
        self.rig.changed()

    def _corrupt(self, peer: int, messages: int) -> None:
        self.rig.synced().corrupt(self.number, peer, messages)

    def reopen(self) -> None:
        super().reopen()
        self.rig.synced().reopen(self.number)
        self._programs.clear()
        self._reads_of.clear()
        self._native.clear()
        self._relayed.clear()
        self._failed = 0
        self._recorder = None
        self.completions()
        self._outstanding = 0
        self.rig.changed()

    def close(self) -> None:
        if not self.closed:
            self.rig.engine.kill(self.number)
        super().close()

    def release(self) -> None:
        super().release()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class VirtualRig(CardRig):
    """The cards of one fleet, linked all with all or as in `topology`, and the engine that says
    when they are done.

    `clock` gives the time in picoseconds; without one it passes by `advance` alone, from 0.
    `on_change`, if set, is called whenever the next event may have become another one.
    """

    def __init__(
        self,
        specs: Sequence[VirtualCardSpec],
        profile: Profile,
        clock: Callable[[], int] | None = None,
        topology: Topology | None = None,
    ) -> None:
        if not 1 <= len(specs) <= CARDS_MAX:
            raise ConfigError(f"a virtual fleet has 1 to {CARDS_MAX} cards, got {len(specs)}")
        check_topology(topology, len(specs))
        self._topology = topology
        self.on_change: Callable[[], None] | None = None
        self.cards: list[VirtualCard] = []
        self._clock = clock
        now = 0 if clock is None else clock()
        self.engine = Engine(
            profile, len(specs), self._end_step, now, self._damaged, self._send_over_host
        )
        try:
            for number, spec in enumerate(specs):
                self.cards.append(VirtualCard(self, number, spec))
            link_all(self.cards)
        except BaseException:
            self.close()
            raise

    # --- time ---------------------------------------------------------------------------

    @property
    def throttled(self) -> bool:
        return False

    @property
    def meets(self) -> bool:
        return self._topology is None or self._topology.fully_meshed

    def linked(self, card: int, peer: int) -> bool:
        """Whether two cards have a link, be it up or down."""
        given = self._topology
        # Cards that have joined later are linked with all.
        return given is None or max(card, peer) >= len(given.cards) or given.is_up(card, peer)

    def create(self, spec: VirtualCardSpec) -> VirtualCard:
        """One more card, of the next number; it is of no use before `join`.  ConfigError where
        there can be no more."""
        if len(self.cards) == CARDS_MAX:
            raise ConfigError(f"a virtual fleet has at most {CARDS_MAX} cards")
        self.synced().have_card(len(self.cards))
        return VirtualCard(self, len(self.cards), spec)

    def join(self, card: VirtualCard) -> None:
        """Link a new card with all others.  After an error all is as before."""
        link_one(card, self.cards)
        self.cards.append(card)

    @property
    def now(self) -> int:
        """The time up to which everything has happened."""
        return self.engine.now

    def next_event(self) -> int | None:
        """When something happens next, if nothing is submitted meanwhile."""
        return self.engine.next_event()

    def advance(self, until: int) -> None:
        """Let everything happen up to and including `until`."""
        self.engine.advance(until)

    def synced(self) -> Engine:
        """The engine, as far as the clock is."""
        if self._clock is not None:
            self.engine.advance(self._clock())
        return self.engine

    def changed(self) -> None:
        """Something was submitted or dropped."""
        if self.on_change is not None:
            self.on_change()

    def usage(self) -> Usage:
        """What cards and links have been used by now."""
        return self.synced().usage()

    # --- arithmetic -----------------------------------------------------------------------

    def _end_step(self, card: int, work: Work) -> Outcome:
        return self.cards[card].end_step(work)

    def _damaged(self, card: int, work: Work) -> None:
        self.cards[card].damaged(work)

    def _send_over_host(self, card: int, peer: int, nbytes: int, epoch: int, damaged: bool) -> None:
        self.cards[card].send_over_host(peer, nbytes, epoch, damaged)

    def step_until(self, card: VirtualCard, fence: int) -> None:
        """Step cards until one of them has completed a step, or none can do anything more."""
        saved = lib.spk_fp_enter()
        try:
            while not card.has_native(fence):
                if card.step_native():
                    continue
                # It waits for others.
                others = (c for c in self.cards if c is not card and not c.closed)
                if not any(other.step_native() for other in others):
                    return
        finally:
            lib.spk_fp_leave(saved)

    # --- the end ------------------------------------------------------------------------

    def close(self) -> None:
        """Release the cards.  Idempotent."""
        for card in self.cards:
            card.release()
