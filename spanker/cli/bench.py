# SPDX-License-Identifier: Apache-2.0
"""`spanker bench`: how fast a model is loaded, reads a prompt, and generates."""

from __future__ import annotations

import datetime
import statistics
import time

import attrs

from spanker._version import __version__
from spanker.cli import terminal
from spanker.cli.interrupts import Interrupts, run_async
from spanker.cli.machine import this_machine
from spanker.cli.opening import Inspected, check_trace, inspect, maybe_trace, open_model
from spanker.cli.options import FleetOptions
from spanker.cli.reports import Timing, pace_note, trace_note
from spanker.errors import ContextLengthError
from spanker.fleet import Model
from spanker.ggml.tokenizer import Tokenizer
from spanker.sched.limits import DEFAULT_CONTEXT

SCHEMA_VERSION = "1"
_FILLER = "The fleet left the harbour at dawn, and the wind was fair. "


def bench(
    where: FleetOptions,
    prompt: str | int,
    gen_tokens: int,
    repeat: int,
    *,
    trace: str | None,
    as_json: bool,
) -> None:
    """`prompt` is a text, or how many tokens of a made-up one."""
    check_trace(trace)
    inspected = inspect(where.model)
    tokenizer = inspected.tokenizer()
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else _made_up(tokenizer, prompt)
    ctx = _context(inspected, len(ids) + gen_tokens)

    notes: list[str] = []

    async def job(interrupts: Interrupts) -> dict[str, object]:
        async with open_model(where, ctx) as opened:
            async with maybe_trace(opened.fleet, trace) as recorded:
                timings = [await _measure(opened.model, ids, gen_tokens) for _ in range(repeat)]
            if recorded is not None and trace is not None:
                notes.append(trace_note(recorded, trace))
            if (told := pace_note(opened.fleet)) is not None:
                notes.append(told)
            rates = [t.decode_rate or 0.0 for t in timings]
            chosen = timings[rates.index(statistics.median_low(rates))]
            isas = dict.fromkeys(card.isa for card in opened.fleet.cards)
            return {
                "schema_version": SCHEMA_VERSION,
                "model": opened.model.name,
                "backend": "spanker",
                "prompt": prompt if isinstance(prompt, str) else f"{prompt} made-up tokens",
                "prompt_tokens": len(ids),
                "tokens_generated": chosen.tokens,
                **_figures(chosen),
                "load_s": opened.load_s,
                "plan": opened.model.plan.name,
                "cards": len(opened.fleet.cards),
                "isa": ",".join(isas),
                "profile": opened.fleet.profile.name,
                "behind": opened.fleet.behind,
                "runs": [_figures(t) for t in timings],
                "host": attrs.asdict(this_machine()),
                "spanker_version": __version__,
                "timestamp_utc": datetime.datetime.now(datetime.timezone.utc).strftime(
                    "%Y-%m-%dT%H:%M:%SZ"
                ),
            }

    record = run_async(job)
    if as_json:
        terminal.emit_json(record)
    else:
        _show(record)
        for note in notes:
            terminal.note(note)


def _figures(timing: Timing) -> dict[str, object]:
    """The wall clock is that of the decode: from the first token to the last."""
    return {
        "wall_clock_seconds": timing.decode_s,
        "tokens_per_second": timing.decode_rate,
        "prompt_tokens_per_second": timing.prompt_rate,
        "time_to_first_token_s": timing.first_token_s,
    }


def _made_up(tokenizer: Tokenizer, tokens: int) -> list[int]:
    # Every repetition has at least one token.
    return tokenizer.encode(_FILLER * min(tokens, 1 + tokens // 8))[:tokens]


def _context(inspected: Inspected, needed: int) -> int:
    most = inspected.model.shape.context
    if needed > most:
        raise ContextLengthError(
            f"prompt and generated tokens are {needed:,} together, but the model's context is "
            f"{most:,}: use fewer --prompt-tokens or --gen-tokens"
        )
    return max(needed, min(most, DEFAULT_CONTEXT))


async def _measure(model: Model, prompt: list[int], tokens: int) -> Timing:
    begin = time.perf_counter()
    times: list[float] = []
    async with model.generate(prompt, max_tokens=tokens, ignore_eos=True) as generation:
        async for token in generation:
            if token.id is not None:
                times.append(time.perf_counter())
    return Timing(len(prompt), len(times), times[0] - begin, times[-1] - times[0])


def _show(record: dict[str, object]) -> None:
    host = record["host"]
    assert isinstance(host, dict)
    first_s, decode_s = record["time_to_first_token_s"], record["wall_clock_seconds"]
    terminal.show(
        terminal.facts(
            [
                ("model", str(record["model"])),
                ("machine", f"{host['cpu']}, {host['cores']} cores, {host['ram_gb']} GB"),
                ("cards", f"{record['cards']}, {record['isa']}, plan {record['plan']}"),
                ("load", f"{record['load_s']:.3f} s"),
                (
                    "prompt",
                    f"{record['prompt_tokens_per_second']:.1f} tokens/s "
                    f"({record['prompt_tokens']} tokens in {first_s:.3f} s)",
                ),
                (
                    "decode",
                    f"{record['tokens_per_second']:.1f} tokens/s "
                    f"({record['tokens_generated']} tokens in {decode_s:.3f} s)",
                ),
            ]
        )
    )
