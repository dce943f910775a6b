# SPDX-License-Identifier: Apache-2.0
"""`spanker eval`: how well a model predicts a text."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from spanker.cli import terminal
from spanker.cli.interrupts import Interrupts, run_async
from spanker.cli.opening import inspect, open_model
from spanker.cli.options import FleetOptions
from spanker.cli.reports import plan_json
from spanker.errors import ContextLengthError, RequestError
from spanker.fleet import Model


def evaluate(
    where: FleetOptions, name: str, text: str, tokens: int | None, *, as_json: bool
) -> None:
    ids = _first_tokens(where.model, name, text, tokens)

    async def job(interrupts: Interrupts) -> dict[str, object]:
        async with open_model(where, ctx=len(ids)) as opened:
            begin = time.perf_counter()
            losses = await token_losses(opened.model, ids)
            wall_s = time.perf_counter() - begin
            mean = math.fsum(losses) / len(losses)
            return {
                "model": opened.model.name,
                "text": name,
                "tokens": len(ids),
                "predictions": len(losses),
                "mean_nll": mean,
                "perplexity": math.exp(mean),
                "plan": plan_json(opened.model.plan),
                "cards": len(opened.fleet.cards),
                "timings": {
                    "load_s": opened.load_s,
                    "wall_clock_seconds": wall_s,
                    "tokens_per_second": len(ids) / wall_s,
                },
            }

    result = run_async(job)
    if as_json:
        terminal.emit_json(result)
    else:
        terminal.show(
            terminal.facts(
                [
                    ("tokens", f"{result['tokens']:,} ({result['predictions']:,} predicted)"),
                    ("mean NLL", f"{result['mean_nll']:.6f} nats"),
                    ("perplexity", f"{result['perplexity']:.4f}"),
                ]
            )
        )


def _first_tokens(model: str, name: str, text: str, tokens: int | None) -> list[int]:
    """The tokens to evaluate; errors come before anything is loaded."""
    inspected = inspect(model)
    ids = inspected.tokenizer().encode(text, special=False)
    if len(ids) < (tokens or 2):
        raise RequestError(
            f"{name} has {len(ids):,} tokens, expected at least {tokens or 2:,}: "
            f"use a longer text{' or a smaller --tokens' if tokens else ''}"
        )
    ids = ids[:tokens]
    most = inspected.model.shape.context
    if len(ids) > most:
        raise ContextLengthError(
            f"{len(ids):,} tokens do not fit into the model's context of {most:,}: "
            f"use --tokens {most} or less"
        )
    return ids


async def token_losses(model: Model, ids: Sequence[int]) -> list[float]:
    """Negative log likelihood in nats of ids[1:], each given those before it."""
    losses: list[float] = []
    targets = np.array(ids[1:])
    with terminal.progress_bar("evaluating", counts_bytes=False) as advance:
        async with contextlib.aclosing(model.score(ids[:-1])) as pieces:
            async for position, logits in pieces:
                losses += _losses(logits, targets[position : position + len(logits)])
                if advance is not None:
                    advance(len(losses), len(targets))
    return losses


def _losses(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int_]) -> list[float]:
    """Log-softmax in float64, per row."""
    x = logits.astype(np.float64)
    best = x.max(axis=1)
    x -= best[:, None]
    np.exp(x, out=x)
    total = best + np.log(x.sum(axis=1))
    hit = logits[np.arange(len(targets)), targets].astype(np.float64)
    out: list[float] = (total - hit).tolist()
    return out
