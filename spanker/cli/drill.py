# SPDX-License-Identifier: Apache-2.0
"""`spanker drill`: a generation undisturbed, then the same with faults, and whether it is the same.

The faults are a plan's (`spanker.testing.fault_plan`); the fleet is a real one, and recovers as it
always does.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence

import attrs
import trio

from spanker.actors.virtual_time import run_virtual
from spanker.cli import plots, terminal
from spanker.cli.errors import Failure
from spanker.cli.generation import Report, check, generate, prompt_ids, summarise
from spanker.cli.interrupts import Interrupts, run_async
from spanker.cli.opening import Opened, check_trace, maybe_trace, open_model
from spanker.cli.options import FleetOptions, SamplingOptions
from spanker.cli.reports import pace_note, trace_note
from spanker.cli.timeline import Timeline
from spanker.device.spec import parse_fleet
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.errors import ConfigError
from spanker.fleet import Token
from spanker.testing.fault_plan import TEXT_CHARACTERS_MAX, FaultPlan
from spanker.testing.injection import Injection

# A factor may follow its moment directly: 3@token:5x4.
_FACTOR = re.compile(r"(?<=[0-9])x(?=[0-9])")


@attrs.frozen
class Run:
    """One of the two generations."""

    report: Report
    timeline: Timeline
    pending: tuple[str, ...] = ()


@attrs.frozen
class Outcome:
    """Both of them, and what was to happen in the second."""

    plan: FaultPlan
    undisturbed: Run
    drilled: Run

    @property
    def same(self) -> bool:
        """Whether every token and all logits are those of the run without faults."""
        return self.difference is None

    @property
    def difference(self) -> str | None:
        """How the answers differ, in words."""
        expected, got = self.undisturbed.report, self.drilled.report
        if got.error is not None:
            return f"it ended after {len(got.ids)} tokens of {len(expected.ids)}: {got.error}"
        if got.ids != expected.ids:
            pairs = zip(got.ids, expected.ids, strict=False)
            number = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if number is None:
                return f"it has {len(got.ids)} tokens, not {len(expected.ids)}"
            return (
                f"token {number + 1} is {got.ids[number]}, not {expected.ids[number]} as in the "
                f"run without faults"
            )
        if got.logits_sha256 != expected.logits_sha256:
            return "its tokens are the same, but not its logits"
        return None

    @property
    def idle(self) -> tuple[str, ...]:
        """Faults of cards that had no part in the model, so that they could not matter."""
        at_work = set(self.undisturbed.report.plan.cards)
        return tuple(
            str(fault)
            for fault in self.plan.faults
            if fault.cards and at_work.isdisjoint(fault.cards)
        )

    def json(self) -> dict[str, object]:
        """That of the run with faults as `spanker run` has it, and what it is compared with."""
        expected = self.undisturbed
        return {
            **self.drilled.report.json(),
            "faults": self.plan.to_json()["faults"],
            "pending_faults": self.drilled.pending,
            "idle_faults": self.idle,
            "timeline": self.drilled.timeline.json(),
            "undisturbed": {
                "tokens": expected.report.ids,
                "logits_sha256": expected.report.logits_sha256,
                "timings": expected.report.timing.json(expected.report.load_s),
                "timeline": expected.timeline.json(),
            },
            "same": self.same,
            "difference": self.difference,
        }


def plan_of(lines: Sequence[str], plan: str | None) -> FaultPlan:
    """The faults of single lines and those of a plan, a file or its text, together.  Raises
    ConfigError and Failure for what cannot be read."""
    parts = [_FACTOR.sub(" x", line) for line in lines]
    if plan is not None:
        parts.append(str(_read(plan)))
    return FaultPlan.parse("\n".join(parts))


def _read(plan: str) -> FaultPlan:
    if "@" in plan and not os.path.exists(plan):
        return FaultPlan.parse(_FACTOR.sub(" x", plan))
    try:
        with open(plan, encoding="utf-8") as file:
            text = file.read(2 * TEXT_CHARACTERS_MAX + 1)
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Failure(f"cannot read the fault plan {plan}: {told}") from error
    return FaultPlan.from_json(text) if text.lstrip()[:1] == "{" else FaultPlan.parse(text)


def drill(
    where: FleetOptions,
    how: SamplingOptions,
    prompt: str,
    plan: FaultPlan,
    *,
    hang_timeout_s: float,
    chat: bool,
    ignore_eos: bool,
    plot: str | None,
    trace: str | None,
    as_json: bool,
) -> None:
    """Both generations, and what came of them; a Failure where the second is another one."""
    check(how)
    check_trace(trace)
    if plot is not None:
        plots.check(plot)
    specs = parse_fleet(where.cards)
    if not plan.faults:
        raise ConfigError("the fault plan has no faults: say what is to fail")
    plan.check(len(specs))
    Injection(plan)  # raises for what nobody here can do
    virtual = all(isinstance(spec, VirtualCardSpec) for spec in specs)
    notes: list[str] = []

    async def once(faults: FaultPlan | None) -> Run:
        async with open_model(where, hang_timeout_s=hang_timeout_s, faults=faults) as opened:
            ids = prompt_ids(opened, prompt, chat)
            drilling = faults is not None
            # Of virtual cards the whole text at the end: a reader takes no modelled time.
            out = terminal.Output() if drilling and not (as_json or virtual) else None
            async with maybe_trace(opened.fleet, trace if drilling else None) as recorded:
                run = await _generate(opened, ids, how, ignore_eos, out)
            if recorded is not None and trace is not None:
                notes.append(trace_note(recorded, trace))
            if (told := pace_note(opened.fleet)) is not None and drilling:
                notes.append(told)
            return run

    async def job(interrupts: Interrupts) -> Outcome:
        undisturbed = await once(None)
        if not as_json:
            tokens, rate = len(undisturbed.report.ids), undisturbed.report.timing.decode_rate
            terminal.note(f"undisturbed: {tokens} tokens, {terminal.rate(rate)}")
        return Outcome(plan, undisturbed, await once(plan))

    runner = functools.partial(run_virtual, seed=how.seed) if virtual else trio.run
    outcome = run_async(job, runner)
    if as_json:
        terminal.emit_json(outcome.json())
    else:
        if virtual:
            terminal.emit(outcome.drilled.report.text)
        _show(outcome)
        for note in notes:
            terminal.note(note)
    if plot is not None:
        title = f"{where.cards} cards, {plan}"
        plots.tokens_over_time(plot, title, outcome.drilled.timeline, outcome.undisturbed.timeline)
    _judge(outcome)


async def _generate(
    opened: Opened,
    prompt: list[int],
    how: SamplingOptions,
    ignore_eos: bool,
    out: terminal.Output | None,
) -> Run:
    injection, times = opened.injection, list[float]()

    def taken(token: Token) -> None:
        if token.id is None:
            return
        times.append(trio.current_time())
        if injection is not None:
            injection.token()

    request_s = trio.current_time()
    report = await generate(
        opened,
        prompt,
        how,
        ignore_eos=ignore_eos,
        logits_hash=True,
        out=out,
        taken=taken,
        keep_error=injection is not None,
    )
    story = () if injection is None else injection.story
    timeline = Timeline.of(
        request_s,
        times,
        [(opened.open_s + since_s, line) for since_s, line in story],
        opened.fleet.events.history,
    )
    return Run(report, timeline, () if injection is None else tuple(map(str, injection.pending)))


def _judge(outcome: Outcome) -> None:
    """Raise unless the answer is the same, and all that was to happen has happened."""
    if outcome.difference is not None:
        raise Failure(f"the answer is not that of a run without faults: {outcome.difference}")
    if outcome.drilled.pending:
        raise Failure(
            f"the answer is the same, but {', '.join(outcome.drilled.pending)} never happened: the "
            f"generation had ended; ask for an earlier moment, more --max-tokens or --ignore-eos"
        )


def _show(outcome: Outcome) -> None:
    timeline = outcome.drilled.timeline
    summarise(outcome.drilled.report)
    terminal.note()
    rows = [(timeline.request_s, "request", ""), *((m.at_s, w, m.text) for w, m in timeline.marks)]
    if timeline.tokens:
        rows.append((timeline.tokens[-1], "token", f"the last of {len(timeline.tokens)}"))
    made = terminal.table(">seconds", "what", "")
    for at_s, what, text in sorted(rows, key=lambda row: row[0]):
        made.add_row(f"{at_s:.3f}", what, text)
    terminal.show(made, stderr=True)
    if timeline.longest is not None and timeline.median_s is not None:
        terminal.note(
            f"no token for {terminal.seconds(timeline.longest.seconds)} after token "
            f"{timeline.longest.after}; the median is {terminal.seconds(timeline.median_s)}"
        )
    for fault in outcome.idle:
        name = outcome.undisturbed.report.plan.name
        terminal.note(f"{fault} concerned no card at work: plan {name} leaves it idle; see --plan")
    if outcome.same:
        terminal.note("the answer is that of the run without faults, to the bit of every logit")
