# SPDX-License-Identifier: Apache-2.0
"""`spanker run`: one generation, streamed, and what the cards did for it."""

from __future__ import annotations

from spanker.cli import terminal
from spanker.cli.generation import Report, check, generate, prompt_ids, summarise
from spanker.cli.interrupts import Interrupts, run_async
from spanker.cli.opening import check_trace, maybe_trace, open_model
from spanker.cli.options import FleetOptions, SamplingOptions
from spanker.cli.reports import pace_note, trace_note


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
            ids = prompt_ids(opened, prompt, chat)
            out = None if as_json else terminal.Output()
            async with maybe_trace(opened.fleet, trace) as recorded:
                report = await generate(
                    opened, ids, how, ignore_eos=ignore_eos, logits_hash=logits_hash, out=out
                )
            if recorded is not None and trace is not None:
                notes.append(trace_note(recorded, trace))
            if (told := pace_note(opened.fleet)) is not None:
                notes.append(told)
            return report

    report = run_async(job)
    if as_json:
        terminal.emit_json(report.json())
    else:
        summarise(report)
        for note in notes:
            terminal.note(note)
