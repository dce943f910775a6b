# SPDX-License-Identifier: Apache-2.0
"""`spanker run`: one generation, streamed, and what the cards did for it."""

from __future__ import annotations

import hashlib
import time

import attrs
import numpy as np

from spanker.cli import terminal
from spanker.cli.interrupts import Interrupts, run_async
from spanker.cli.opening import Opened, check_trace, maybe_trace, open_model
from spanker.cli.options import FleetOptions, SamplingOptions
from spanker.cli.reports import (
    CardWork,
    Timing,
    card_table,
    pace_note,
    plan_json,
    trace_note,
    work_between,
)
from spanker.ggml.detokenizer import StopMatcher
from spanker.ggml.sampling import SamplingParams
from spanker.sched.plan import FleetPlan

_ENDINGS = {"length": "; --max-tokens reached", "context": "; the context is full"}


@attrs.frozen
class Report:
    """One generation, when it is over."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    logits_sha256: str | None
    plan: FleetPlan
    cards: tuple[CardWork, ...]
    timing: Timing
    load_s: float
    behind: float | None
    events: tuple[str, ...]

    def json(self) -> dict[str, object]:
        out: dict[str, object] = {
            "prompt_tokens": self.prompt_ids,
            "tokens": self.ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "plan": plan_json(self.plan),
            "cards": [card.json() for card in self.cards],
            "timings": self.timing.json(self.load_s),
        }
        if self.events:
            out["events"] = self.events
        if self.behind is not None:
            out["behind"] = self.behind
        if self.logits_sha256 is not None:
            out["logits_sha256"] = self.logits_sha256
        return out


def run(
    where: FleetOptions,
    how: SamplingOptions,
    prompt: str,
    *,
    chat: bool,
    ignore_eos: bool,
    logits_hash: bool,
    trace: str | None,
    as_json: bool,
) -> None:
    check(how)
    check_trace(trace)
    notes: list[str] = []

    async def job(interrupts: Interrupts) -> Report:
        async with open_model(where) as opened:
            ids = (
                opened.model.chat_prompt([{"role": "user", "content": prompt}])
                if chat
                else opened.model.tokenize(prompt)
            )
            out = None if as_json else terminal.Output()
            async with maybe_trace(opened.fleet, trace) as recorded:
                report = await _generate(opened, ids, how, ignore_eos, logits_hash, out)
            if recorded is not None and trace is not None:
                notes.append(trace_note(recorded, trace))
            if (told := pace_note(opened.fleet)) is not None:
                notes.append(told)
            return report

    report = run_async(job)
    if as_json:
        terminal.emit_json(report.json())
    else:
        _summarise(report)
        for note in notes:
            terminal.note(note)


def check(how: SamplingOptions) -> None:
    """Raise for options that make no sense before anything is loaded."""
    SamplingParams(how.temperature, how.top_k, how.top_p, how.min_p, how.seed)
    StopMatcher(how.stop)


async def _generate(
    opened: Opened,
    prompt: list[int],
    how: SamplingOptions,
    ignore_eos: bool,
    logits_hash: bool,
    out: terminal.Output | None,
) -> Report:
    model, fleet = opened.model, opened.fleet
    digest = hashlib.sha256() if logits_hash else None
    before = (await fleet.stats()).cards
    begin = time.perf_counter()
    first = last = None
    async with model.generate(
        prompt, **attrs.asdict(how), ignore_eos=ignore_eos, logits=logits_hash
    ) as generation:
        async for token in generation:
            if token.id is not None:
                last = time.perf_counter()
                first = first or last
            if digest is not None and token.logits is not None:
                digest.update(np.ascontiguousarray(token.logits, "<f4").data)
            if out is not None:
                await out.write(token.text)
    end = time.perf_counter()
    if out is not None and out.is_tty:
        await out.write("\n")
    first, last = first or end, last or end
    return Report(
        prompt_ids=generation.prompt_ids,
        ids=tuple(generation.token_ids),
        text=generation.text,
        finish_reason=generation.finish_reason,
        logits_sha256=digest.hexdigest() if digest is not None else None,
        plan=model.plan,
        cards=work_between(before, (await fleet.stats()).cards, end - begin),
        timing=Timing(len(prompt), len(generation.token_ids), first - begin, last - first),
        load_s=opened.load_s,
        behind=fleet.behind,
        events=tuple(str(event) for event in fleet.events.history),
    )


def _summarise(report: Report) -> None:
    timing = report.timing
    terminal.note()
    terminal.show(card_table(report.cards), stderr=True)
    terminal.note()
    terminal.note_wrapped(f"plan {report.plan.name}: {report.plan.reason}")
    terminal.note(
        f"prompt {timing.prompt_tokens} tokens, {terminal.rate(timing.prompt_rate)}; "
        f"first token after {terminal.seconds(timing.first_token_s)}; "
        f"loaded in {terminal.seconds(report.load_s)}"
    )
    ending = _ENDINGS.get(report.finish_reason or "", "")
    terminal.note(f"generated {timing.tokens} tokens, {terminal.rate(timing.decode_rate)}{ending}")
    if report.logits_sha256 is not None:
        terminal.note(f"logits sha256 {report.logits_sha256}")
