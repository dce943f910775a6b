# SPDX-License-Identifier: Apache-2.0
"""One generation as run and drill make it, streamed, and the report of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import attrs
import numpy as np
import trio

from spanker.cli import terminal
from spanker.cli.opening import Opened
from spanker.cli.options import SamplingOptions
from spanker.cli.reports import CardWork, Timing, card_table, plan_json, work_between
from spanker.errors import SpankerError
from spanker.fleet import Token
from spanker.ggml.detokenizer import StopMatcher
from spanker.ggml.sampling import SamplingParams
from spanker.sched.plan import FleetPlan

_ENDINGS = {"length": "; --max-tokens reached", "context": "; the context is full"}


@attrs.frozen
class Report:
    """One generation, when it is over; `error` is what it failed with, if that was to be kept."""

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
    error: str | None = None

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
        if self.error is not None:
            out["error"] = self.error
        return out


def check(how: SamplingOptions) -> None:
    """Raise for options that make no sense before anything is loaded."""
    SamplingParams(how.temperature, how.top_k, how.top_p, how.min_p, how.seed)
    StopMatcher(how.stop)


def prompt_ids(opened: Opened, prompt: str, chat: bool) -> list[int]:
    """The tokens of a prompt, or with `chat` of a conversation that begins with it."""
    if chat:
        return opened.model.chat_prompt([{"role": "user", "content": prompt}])
    return opened.model.tokenize(prompt)


async def generate(
    opened: Opened,
    prompt: list[int],
    how: SamplingOptions,
    *,
    ignore_eos: bool,
    logits_hash: bool,
    out: terminal.Output | None,
    taken: Callable[[Token], None] | None = None,
    keep_error: bool = False,
) -> Report:
    """Generate, with the text to `out` as it comes; `taken` is called with every token first.

    Times are those of trio's clock.  With `keep_error` a failure ends the generation and is in the
    report, otherwise it is raised.
    """
    model, fleet = opened.model, opened.fleet
    digest = hashlib.sha256() if logits_hash else None
    before = (await fleet.stats()).cards
    begin = trio.current_time()
    first = last = None
    error: str | None = None
    async with model.generate(
        prompt, **attrs.asdict(how), ignore_eos=ignore_eos, logits=logits_hash
    ) as generation:
        try:
            async for token in generation:
                if token.id is not None:
                    last = trio.current_time()
                    first = first or last
                if taken is not None:
                    taken(token)
                if digest is not None and token.logits is not None:
                    digest.update(np.ascontiguousarray(token.logits, "<f4").data)
                if out is not None:
                    await out.write(token.text)
        except SpankerError as failure:
            if not keep_error:
                raise
            error = str(failure)
    end = trio.current_time()
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
        error=error,
    )


def summarise(report: Report) -> None:
    """What the cards did and how fast it was, on stderr."""
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
