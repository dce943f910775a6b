# SPDX-License-Identifier: Apache-2.0
"""`spanker simulate`: how fast a fleet of modelled cards would be, and what it would wait for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import attrs

from spanker._version import __version__
from spanker.actors.virtual_time import run_virtual
from spanker.cli import terminal
from spanker.cli.interrupts import Interrupts, run_async
from spanker.cli.opening import check_trace
from spanker.cli.reports import plan_json
from spanker.device.spec import parse_fleet
from spanker.sched import profiles
from spanker.sched.plan import Stage
from spanker.simulation import CardTime, LinkTime, Scenario, Simulation, run

SCHEMA_VERSION = "1"
# Rows of the table of links.
LINKS_SHOWN = 5


def scenario(*, cards: str, profile: str, **options: Any) -> Scenario:
    """A scenario from options; raises ConfigError for what makes no sense."""
    specs = parse_fleet(cards)
    return Scenario(
        cards=len(specs),
        ddr_bytes=specs[0].ddr_bytes,
        profile=profiles.find(profile),
        **options,
    )


def simulate(what: Scenario, *, trace: str | None, as_json: bool) -> None:
    check_trace(trace)

    async def job(interrupts: Interrupts) -> Simulation:
        with contextlib.ExitStack() as bars:
            advances: dict[str, terminal.Advance | None] = {}

            def progress(doing: str, done: int, total: int) -> None:
                if doing not in advances:
                    bars.close()  # one at a time
                    bar = terminal.progress_bar(doing, counts_bytes=doing == "loading")
                    advances[doing] = bars.enter_context(bar)
                advance = advances[doing]
                if advance is not None:
                    advance(done, total)

            return await run(what, trace=trace, progress=progress)

    result = run_async(job, functools.partial(run_virtual, seed=what.seed))
    if as_json:
        terminal.emit_json(_json(result))
    else:
        _show(result)
        if trace is not None:
            terminal.note(f"trace of every command: {trace}")


# --- JSON ------------------------------------------------------------------------------


def _json(result: Simulation) -> dict[str, object]:
    """Everything, and nothing of the machine that it was computed on."""
    what = result.scenario
    return {
        "schema_version": SCHEMA_VERSION,
        "model": result.model,
        "profile": what.profile.name,
        "plan": plan_json(result.plan),
        "prompt_tokens": what.prompt_tokens,
        "tokens_generated": what.tokens,
        "batch": what.batch,
        "ctx": result.context,
        "seed": what.seed,
        "arithmetic": what.arithmetic,
        "load_s": result.load_s,
        "time_to_first_token_s": result.first_token_s,
        "prefill_tokens_per_second": result.prefill_tokens_per_second,
        "decode_s": result.decode_s,
        "decode_tokens_per_second": result.decode_tokens_per_second,
        "sequence_tokens_per_second": result.sequence_rates,
        "steps": result.steps,
        "tokens": result.token_ids if what.arithmetic else None,
        "cards": [_card_json(card) for card in result.cards],
        "links": [attrs.asdict(link) for link in result.links],
        "host_link": attrs.asdict(result.host_link),
        "spanker_version": __version__,
    }


def _card_json(card: CardTime) -> dict[str, object]:
    waiting = [{"for": peer, "part": part} for peer, part in card.waiting.items()]
    return {
        "card": card.card,
        "share": card.share,
        "replica": card.replica,
        "ddr_used_bytes": card.ddr_used_bytes,
        "busy": card.busy,
        "waiting": waiting,
        "idle": card.idle,
    }


# --- tables ----------------------------------------------------------------------------


def _show(result: Simulation) -> None:
    what, host = result.scenario, result.host_link
    sequences = "" if what.batch == 1 else f" in {what.batch} sequences"
    terminal.show(
        terminal.facts(
            [
                ("model", result.model),
                ("cards", f"{what.cards}, {what.profile.name}"),
                ("plan", f"{result.plan.name}: {result.plan.reason}"),
                ("load", terminal.seconds(result.load_s)),
                (
                    "prefill",
                    f"{_rate(result.prefill_tokens_per_second)}: {what.prompt_tokens} tokens"
                    f"{sequences}, first token after {terminal.seconds(result.first_token_s)}",
                ),
                (
                    "decode",
                    f"{_rate(result.decode_tokens_per_second)}: {result.decode_tokens} tokens"
                    f"{sequences} in {terminal.seconds(result.decode_s)}",
                ),
                (
                    "host link",
                    f"{host.busy_to_cards:.1%} to the cards, {host.busy_to_host:.1%} from them",
                ),
            ]
        )
    )
    terminal.emit("")
    _show_stages(result)
    busiest = sorted(result.links, key=lambda link: -link.busy)[:LINKS_SHOWN]
    if busiest:
        terminal.emit("")
        _show_links(busiest, result.decode_s)


def _show_stages(result: Simulation) -> None:
    """A row for each stage of each replica, whose cards are much alike: means over them."""
    plan = result.plan
    stages = [stage for replica in plan.replicas for stage in replica.stages]
    stage_of = {card: number for number, stage in enumerate(stages) for card in stage.cards}
    several = [">replica"] if plan.parallel else []
    made = terminal.table(*several, "cards", "layers", ">DDR", ">busy", ">waits", "for", ">idle")
    for number, stage in enumerate(stages):
        cards = [result.cards[card] for card in stage.cards]
        waits: dict[int, float] = {}
        for card in cards:
            for peer, part in card.waiting.items():
                other = stage_of[peer]
                waits[other] = waits.get(other, 0.0) + part / len(cards)
        made.add_row(
            *([str(plan.replica_of(stage.cards[0]))] if plan.parallel else []),
            _range(stage.cards),
            f"{stage.layers.start}-{stage.layers.stop - 1}",
            terminal.size(max(card.ddr_used_bytes for card in cards)),
            f"{_mean([card.busy for card in cards]):.0%}",
            f"{sum(waits.values()):.0%}",
            _waits(waits, number, stages),
            f"{_mean([card.idle for card in cards]):.0%}",
        )
    terminal.show(made)


def _waits(waits: dict[int, float], own: int, stages: Sequence[Stage]) -> str:
    """For whom cards of a stage wait, longest first, as far as it can be seen."""
    order = sorted(waits, key=lambda stage: -waits[stage])
    texts = [
        f"{'each other' if stage == own else f'cards {_range(stages[stage].cards)}'} "
        f"{waits[stage]:.0%}"
        for stage in order
        if waits[stage] >= 0.005
    ]
    return ", ".join(texts) or "-"


def _show_links(links: Sequence[LinkTime], decode_s: float) -> None:
    made = terminal.table("busiest links", ">busy", ">bytes", ">rate")
    for link in links:
        made.add_row(
            f"{link.source} -> {link.target}",
            f"{link.busy:.1%}",
            terminal.size(link.nbytes),
            f"{terminal.size(link.nbytes / decode_s)}/s" if decode_s else "-",
        )
    terminal.show(made)


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.3g} tokens/s"


def _range(cards: Sequence[int]) -> str:
    return str(cards[0]) if len(cards) == 1 else f"{cards[0]}-{cards[-1]}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
