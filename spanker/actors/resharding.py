# SPDX-License-Identifier: Apache-2.0
"""A model goes from one plan to another with what its cards hold of it, weights and KV pages: the
rounds of a `sched.resharding.Reshard`, one after the other.

In a round a card copies within its memory, then sends and receives, by a program of its own, while
the host writes what no card has.  Other models and replicas have their steps between two rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from spanker.actors import copying, loading
from spanker.actors.steps import LoadedModel
from spanker.errors import CardMemoryError
from spanker.ggml.architectures import llama
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.packed import PackedFile
from spanker.kernels import program as op
from spanker.kernels.elements import Element
from spanker.kernels.program import Command, Program, Ref, Transfer
from spanker.sched.layout import BufferSpec, card_buffers
from spanker.sched.pages import PageMove, pools
from spanker.sched.resharding import (
    EXCHANGE_MAX,
    Content,
    Fill,
    Holdings,
    Reshard,
    Round,
    check_reshard,
    contents,
    reshard,
)

if TYPE_CHECKING:
    from spanker.actors.coordinator import Coordinator


class Move:
    """One model on its way: `held` is what is left where it was, `loaded` what is already where it
    will be.  `keeps_pages`: whether its pages go along, as far as is known."""

    def __init__(
        self,
        coordinator: Coordinator,
        held: LoadedModel,
        beside: Sequence[LoadedModel],
        loaded: LoadedModel,
        gguf: GGUFFile | None,
        packed: PackedFile | None,
        pages: PageMove | None = None,
    ) -> None:
        """`pages` are to go along."""
        self._coordinator = coordinator
        self.held = held
        self.loaded = loaded
        self._gguf = gguf
        self._packed = packed
        self._pages = pages
        self.keeps_pages = False
        # As the links are now; what it needs of them may not stay so.
        self._topology, self._avoided = coordinator.topology, coordinator.links.down
        self._mapping = coordinator.mapping(loaded.plan.cards, packed)
        # One that maps the embedding has no columns of it to lend.
        self._lenders = {
            card: there
            for there in beside
            for card in there.plan.cards
            if _holds(coordinator, there, card) and not there.maps_table(card)
        }
        self._holdings = Holdings.of(
            held.plan,
            [m.plan for m in beside],
            [*self._lenders, *(c for c in held.plan.cards if _holds(coordinator, held, c))],
        )
        model, limits = loaded.model, loaded.limits
        self._contents = {
            card: {c.buffer: c for c in contents(model.shape, loaded.plan, card, limits.context)}
            for card in loaded.plan.cards
        }
        self._pools = {
            pool.buffer
            for there in (held, loaded)
            for card in there.plan.cards
            for pool in pools(model.shape, there.plan, card, there.limits)
        }
        self._specs = {
            card: {s.name: s for s in card_buffers(model.shape, loaded.plan, card, limits)}
            for card in loaded.plan.cards
        }

    def planned(self, free: Sequence[int]) -> Reshard:
        """What is to be done, checked; `free` bytes there are on each card when nothing of the
        model is on it any more."""
        coordinator, shape = self._coordinator, self.loaded.model.shape
        context = self.loaded.limits.context
        granule = max(coordinator.cards[card].ddr_granule for card in self.loaded.plan.cards)
        room = {}
        for card in self.loaded.plan.cards:
            own: tuple[Content, ...] = ()
            if card in self._holdings.own:
                own = contents(shape, self.held.plan, card, context)
            room[card] = free[card] - sum(-(-c.nbytes // granule) * granule for c in own)
        made = reshard(
            shape,
            self._holdings,
            self.loaded.plan,
            self._topology,
            context=context,
            room=room,
            granule=granule,
            pages=self._pages,
            mapped=bool(self._mapping) or any(map(self.held.maps_table, self.held.handles)),
            from_peers=coordinator.hands_on,
        )
        check_reshard(shape, self._holdings, self.loaded.plan, made, context=context)
        return made

    async def carry_out(self, made: Reshard, at_once: int) -> None:
        """All of it, but for the programs.  Raises what cards report, ModelError of the file."""
        coordinator, held, loaded = self._coordinator, self.held, self.loaded
        self.keeps_pages = made.pages is not None
        # Activations, of which nothing is kept, and often keys and values.
        unkept = {}
        for card, handles in held.handles.items():
            shape, plan, limits = held.model.shape, held.plan, held.limits
            wanted = {c.buffer for c in contents(shape, plan, card, limits.context)}
            if self.keeps_pages:
                wanted |= self._pools
            unkept[card] = [name for name in handles if name not in wanted]
        await coordinator.free(held, unkept)
        for card, buffer in made.kept:
            loaded.handles[card][buffer] = held.handles[card].pop(buffer)
        for round_ in made.rounds:
            await self._round(round_, at_once)
        await self._allocate(self._missing())
        # Pools, where they have made room for the others.
        await self._allocate(self._missing())
        rest = [Fill(card, b, 0, self._contents[card][b].nbytes) for card, b in made.rest]
        await loading.run_all(self._uploads(rest, at_once))

    async def _round(self, round_: Round, at_once: int) -> None:
        round_ = self._without_pages(round_)
        specs: dict[int, list[BufferSpec]] = {}
        for card, buffer in round_.made:
            specs.setdefault(card, []).append(self._specs[card][buffer])
        await self._allocate(specs)
        round_ = self._without_pages(round_)
        data = {
            card: program.encode(self._handles(card)) for card, program in programs(round_).items()
        }
        jobs = self._uploads(round_.from_host, at_once)
        async with copying.loaded(self._coordinator, data) as numbers:
            if numbers:
                run = functools.partial(copying.run, self._coordinator, numbers, self._avoided)
                jobs.append(run)
            await loading.run_all(jobs)
        freed: dict[int, list[str]] = {}
        for card, buffer in round_.freed:
            freed.setdefault(card, []).append(buffer)
        await self._coordinator.free(self.held, freed)

    def _missing(self) -> dict[int, list[BufferSpec]]:
        return {
            card: [spec for name, spec in specs.items() if name not in self.loaded.handles[card]]
            for card, specs in self._specs.items()
        }

    def _without_pages(self, round_: Round) -> Round:
        """What there is to do of a round, where pages may not go along any more."""
        if self.keeps_pages:
            return round_
        return Round(
            tuple((card, buffer) for card, buffer in round_.made if not self._is_pool(buffer)),
            tuple(fill for fill in round_.fills if not self._is_pool(fill.buffer)),
            tuple((card, b) for card, b in round_.freed if b in self.held.handles[card]),
        )

    async def _allocate(self, specs: Mapping[int, Sequence[BufferSpec]]) -> None:
        """Buffers on each card.  Where there is memory, but not in one piece, it is that of the
        pages: then they are computed again."""
        try:
            await self._take(specs)
        except CardMemoryError:
            if not self.keeps_pages:
                raise
            self.keeps_pages = False
            for loaded in (self.loaded, self.held):
                pages = {c: [*filter(self._is_pool, had)] for c, had in loaded.handles.items()}
                await self._coordinator.free(loaded, pages)
            left = {}
            for card, own in specs.items():
                made = self.loaded.handles[card]
                left[card] = [s for s in own if not (s.name in made or self._is_pool(s.name))]
            await self._take(left)

    def _is_pool(self, buffer: str) -> bool:
        return buffer in self._pools

    async def _take(self, specs: Mapping[int, Sequence[BufferSpec]]) -> None:
        async def allocate(card: int) -> None:
            handles = self.loaded.handles[card]
            for batch in loading.batched(specs[card], loading.BATCH_MAX):
                sizes = tuple(spec.nbytes for spec in batch)
                new = await self._coordinator.allocate(card, sizes)
                handles.update(zip((spec.name for spec in batch), new, strict=True))

        await loading.run_all([functools.partial(allocate, card) for card in specs])

    def _uploads(self, fills: Sequence[Fill], at_once: int) -> list[loading.Job]:
        """What brings these from the host, card by card."""
        by_card: dict[int, list[llama.Upload]] = {}
        model, limits = self.loaded.model, self.loaded.limits
        for fill in fills:
            content: Content = self._contents[fill.card][fill.buffer]
            if fill.nbytes < content.nbytes:
                content = content.part(fill.offset, fill.nbytes)
            by_card.setdefault(fill.card, []).append(
                llama.upload(model, self._gguf, limits, content, self._packed, fill.offset)
            )
        return [
            functools.partial(self._upload, card, uploads, at_once)
            for card, uploads in by_card.items()
        ]

    async def _upload(self, card: int, uploads: Sequence[llama.Upload], at_once: int) -> None:
        packed = self._packed if card in self._mapping else None
        await self._coordinator.bring(
            self.loaded, card, uploads, at_once, packed, lambda nbytes: None
        )

    def _handles(self, card: int) -> dict[str, int]:
        """The buffers that a card's program names."""
        handles = dict(self.loaded.handles.get(card, {}))
        lender = self._lenders.get(card)
        if lender is not None:
            there: Mapping[str, int] = lender.handles[card]
        else:
            # What is kept it holds, and has, at the same time.
            there = {**handles, **self.held.handles.get(card, {})}
        handles.update({_held(name): handle for name, handle in there.items()})
        return handles


def _holds(coordinator: Coordinator, loaded: LoadedModel, card: int) -> bool:
    return card not in coordinator.lost and coordinator.holds(loaded, card)


# --- programs ----------------------------------------------------------------------------


def _held(buffer: str) -> str:
    """What a program calls the buffer of this name that was there before."""
    return f"held {buffer}"


def programs(round_: Round) -> dict[int, Program]:
    """What each card does in a round, where it does something: copies within its memory, then
    transfers, in the same order everywhere."""
    commands: dict[int, list[Command]] = {}
    for fill in round_.copies:
        commands.setdefault(fill.card, []).append(_copy(fill))
    for moves in loading.batched(round_.moves, EXCHANGE_MAX):
        transfers: dict[int, list[Transfer]] = {}
        for card, transfer in _transfers(moves):
            transfers.setdefault(card, []).append(transfer)
        for card, own in transfers.items():
            commands.setdefault(card, []).extend(op.exchange(own))
    return {card: Program(tuple(commands[card]), 1, 1, 1) for card in sorted(commands)}


def _copy(fill: Fill) -> Command:
    element = Element.I32
    into = Ref(fill.buffer, offset=fill.offset)
    operand = Ref(_held(fill.source_buffer), offset=fill.source_offset)
    return op.copy(element, into, operand, count=fill.nbytes // element.nbytes)


def _transfers(moves: Sequence[Fill]) -> Iterator[tuple[int, Transfer]]:
    """Both sides of each move, with the card whose it is."""
    for fill in moves:
        assert fill.source is not None
        there = Ref(_held(fill.source_buffer), offset=fill.source_offset)
        here = Ref(fill.buffer, offset=fill.offset)
        hosted = fill.hosted
        yield fill.source, Transfer(True, fill.card, there, fill.nbytes, True, hosted)
        yield fill.card, Transfer(False, fill.source, here, fill.nbytes, True, hosted)
