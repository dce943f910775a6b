# SPDX-License-Identifier: Apache-2.0
"""`spanker plan`: which plan is best for a model on a fleet, and what to expect of it.

All by the cost model; nothing is opened, and the cards need not exist.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import attrs

from spanker._version import __version__
from spanker.cli import terminal
from spanker.cli.errors import Failure
from spanker.cli.opening import inspect
from spanker.device.spec import parse_fleet
from spanker.errors import CardMemoryError
from spanker.sched import profiles
from spanker.sched.cost import LoadCost, PrefillCost, StepCost
from spanker.sched.decision import Decision, decide
from spanker.sched.limits import step_limits
from spanker.sched.plan import FleetPlan, ModelShape
from spanker.sched.plan_json import to_json
from spanker.sched.planning import Candidate, Outcome, Request, search
from spanker.sched.planning.figures import Decode, Figures, figures, sizes
from spanker.sched.planning.words import beside_the_rule, certainty, slowest, spent
from spanker.sched.shapes import named_shape
from spanker.sched.topology import Topology

SCHEMA_VERSION = "1"
# Card counts of a plot: all up to the first, then some.
_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56, 64)
GRAPHS = {"mesh": Topology.with_mock, "ring": Topology.ring, "line": Topology.line}


@attrs.frozen
class Asked:
    """What was asked on the command line."""

    model: str | None
    shape: str | None
    cards: str
    profile: str
    links: str
    batch: int
    position: int
    ctx: int | None
    prompt_tokens: int
    prompt_chunk: int
    top: int


@attrs.frozen
class ByCards:
    """The best plan for a number of cards; None where the model does not fit."""

    cards: int
    plan: str | None
    tokens_per_second: float | None


@attrs.frozen
class Report:
    name: str
    outcome: Outcome
    rows: tuple[Figures, ...]
    answers: tuple[Decision, ...]
    by_cards: tuple[ByCards, ...]


def plan(asked: Asked, *, save: str | None, plot: str | None, as_json: bool) -> None:
    if plot is not None:
        from spanker.cli import plots

        plots.check(plot)
    report = _report(asked, with_counts=plot is not None)
    if as_json:
        terminal.emit_json(_json(report))
    else:
        _show(report)
    if save is not None:
        write(save, json.dumps(to_json(report.outcome.chosen.plan), indent=1) + "\n")
        terminal.note(f"the plan, for --plan: {save}")
    if plot is not None:
        counted = [(c.cards, c.tokens_per_second) for c in report.by_cards]
        request = report.outcome.request
        title = f"{report.name} on {request.profile.name} cards, batch {request.batch}"
        plots.tokens_over_cards(plot, title, counted)
        terminal.note(f"tokens per second over the number of cards: {plot}")


def _report(asked: Asked, *, with_counts: bool) -> Report:
    name, shape = _model(asked)
    request = _request(asked, shape)
    outcome = search(request)
    at = sizes(request)
    rows = tuple(
        figures(request, candidate, at, asked.prompt_tokens)
        for candidate in _varied(outcome.candidates, asked.top)
    )
    cards = len(request.topology.cards)
    counts = [n for n in _COUNTS if n < cards] if with_counts else []
    by_cards = [_by_cards(asked, shape, n) for n in counts]
    by_cards.append(ByCards(cards, outcome.chosen.plan.name, outcome.chosen.tokens_per_second))
    answers = decide(shape, cards, request.profile)
    return Report(name, outcome, rows, answers, tuple(by_cards) if with_counts else ())


def _varied(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """The best of every form, by numbers of replicas and of stages, and then the best others."""
    forms: dict[tuple[int, int], Candidate] = {}
    for c in candidates:
        forms.setdefault((len(c.plan.replicas), len(c.plan.replicas[0].stages)), c)
    first = list(forms.values())
    others = [c for c in candidates if c not in first]
    shown = (first + others)[:most]
    return sorted(shown, key=lambda c: -c.tokens_per_second)


def _model(asked: Asked) -> tuple[str, ModelShape]:
    if asked.shape is not None:
        return asked.shape, named_shape(asked.shape)
    assert asked.model is not None
    inspected = inspect(asked.model)
    name = inspected.gguf.metadata.get("general.name", inspected.path.name)
    return str(name), inspected.model.shape


def _request(asked: Asked, shape: ModelShape, cards: int | None = None) -> Request:
    specs = parse_fleet(asked.cards)[:cards]
    limits = step_limits(shape, asked.ctx, asked.prompt_chunk)
    return Request(
        shape,
        profiles.find(asked.profile),
        GRAPHS[asked.links](len(specs)),
        tuple(spec.ddr_bytes for spec in specs),
        limits,
        batch=asked.batch,
        position=min(asked.position, limits.context),
        keep=max(asked.top, 20),
    )


def _by_cards(asked: Asked, shape: ModelShape, cards: int) -> ByCards:
    try:
        chosen = search(_request(asked, shape, cards)).chosen
    except CardMemoryError:
        return ByCards(cards, None, None)
    return ByCards(cards, chosen.plan.name, chosen.tokens_per_second)


# --- JSON ------------------------------------------------------------------------------


def _json(report: Report) -> dict[str, object]:
    outcome, request = report.outcome, report.outcome.request
    chosen = report.rows[0]
    out: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "model": report.name,
        "profile": request.profile.name,
        "cards": len(request.topology.cards),
        "batch": request.batch,
        "position": request.position,
        "ctx": request.limits.context,
        "chosen": _figures_json(chosen, request) | {"plan": to_json(outcome.chosen.plan)},
        "reason": outcome.reason,
        "exact": outcome.exact,
        "gap": outcome.gap,
        "search_s": outcome.search_s,
        "candidates": [_figures_json(row, request) for row in report.rows],
        "decisions": [attrs.asdict(d) | {"strategy": d.strategy.value} for d in report.answers],
        "beside_pick_strategy": _beside(report),
        "spanker_version": __version__,
    }
    if report.by_cards:
        out["by_cards"] = [attrs.asdict(entry) for entry in report.by_cards]
    return out


def _figures_json(row: Figures, request: Request) -> dict[str, object]:
    asked = row.decoding(request.batch, request.position)
    return {
        "name": row.candidate.plan.name,
        "cards_used": len(row.candidate.plan.cards),
        "decode_tokens_per_second": asked.tokens_per_second,
        "bound": asked.bound.value,
        "spent": {b.value: s for b, s in slowest(row.candidate).shares.items()},
        "decode": [_decode_json(entry) for entry in row.decode],
        "prefill": _prefill_json(row.prefill),
        "load": _load_json(row.load),
        "spare_copies_of_weights": row.spare_copies,
        "memory_bytes": {str(card): nbytes for card, nbytes in row.memory_bytes.items()},
    }


def _decode_json(entry: Decode) -> dict[str, object]:
    return {
        "batch": entry.batch,
        "position": entry.position,
        "tokens_per_second": entry.tokens_per_second,
        "bound": entry.bound.value,
    }


def _prefill_json(prefill: PrefillCost) -> dict[str, object]:
    return {
        "prompt_tokens": prefill.tokens,
        "seconds": prefill.seconds,
        "tokens_per_second": prefill.tokens_per_second,
        "bound": prefill.bound.value,
    }


def _load_json(load: LoadCost) -> dict[str, object]:
    return {
        "seconds": load.seconds,
        "startup_s": load.startup_s,
        "from_host_s": load.from_host_s,
    }


# --- tables ----------------------------------------------------------------------------


def _show(report: Report) -> None:
    outcome, request = report.outcome, report.outcome.request
    chosen = outcome.chosen
    used = len(chosen.plan.cards)
    cards = len(request.topology.cards)
    terminal.show(
        terminal.facts(
            [
                ("model", report.name),
                ("cards", f"{cards}, {request.profile.name}"),
                ("plan", _plan_words(chosen.plan, cards - used)),
                ("speed", f"{_rate(chosen.tokens_per_second)} tokens/s, {_batch(request)}"),
                ("time goes to", spent(slowest(chosen))),
                ("memory", _memory(report.rows[0], request)),
                ("certainty", f"{certainty(outcome.gap)} ({outcome.search_s:.2f} s of search)"),
                ("beside", _beside(report)),
            ]
        )
    )
    terminal.emit("")
    at = sizes(request)
    made = terminal.table(
        "plan",
        ">cards",
        *(f">{batch} x @{position}" for batch, position in at),
        ">prefill",
        ">load",
        ">DDR a card",
        "bound by",
    )
    for row in report.rows:
        made.add_row(
            row.candidate.plan.name,
            str(len(row.candidate.plan.cards)),
            *(_rate(row.decoding(*size).tokens_per_second) for size in at),
            _rate(row.prefill.tokens_per_second),
            terminal.seconds(row.load.seconds) if row.load.seconds else "-",
            terminal.size(max(row.memory_bytes.values())),
            _bounds(slowest(row.candidate)),
        )
    terminal.show(made)
    terminal.emit(
        "Decode in tokens/s, sequences x @ position of each; prefill of "
        f"{report.rows[0].prefill.tokens} tokens, in tokens/s."
    )
    if report.by_cards:
        terminal.emit("")
        _show_by_cards(report.by_cards)


def _show_by_cards(counts: tuple[ByCards, ...]) -> None:
    made = terminal.table(">cards", "best plan", ">tokens/s")
    for entry in counts:
        rate = "-" if entry.tokens_per_second is None else _rate(entry.tokens_per_second)
        made.add_row(str(entry.cards), entry.plan or "does not fit", rate)
    terminal.show(made)


def _plan_words(plan: FleetPlan, idle: int) -> str:
    words = plan.name
    if idle:
        words += f", {idle} card{'s' * (idle > 1)} left idle: more would only slow it down"
    return words


def _memory(row: Figures, request: Request) -> str:
    fullest = max(row.memory_bytes, key=lambda card: row.memory_bytes[card])
    used, free = row.memory_bytes[fullest], request.free_bytes[fullest]
    copies = row.spare_copies
    return (
        f"{terminal.size(used)} of {terminal.size(free)} on the fullest card; what is left on all "
        f"would hold {copies} more {'copy' if copies == 1 else 'copies'} of the weights"
    )


def _beside(report: Report) -> str:
    cards = len(report.outcome.request.topology.cards)
    return beside_the_rule(report.answers, cards, report.outcome.candidates)


def _batch(request: Request) -> str:
    many = "one sequence" if request.batch == 1 else f"{request.batch} sequences"
    return f"{many} at position {request.position:,}"


def _bounds(cost: StepCost) -> str:
    return f"{cost.bound.value} {cost.shares[cost.bound]:.0%}"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.3g}" if tokens_per_s < 1000 else f"{tokens_per_s:,.0f}"


def write(path: str, text: str) -> None:
    """Write a text; Failure where that is not possible."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}") from error
