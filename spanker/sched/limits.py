# SPDX-License-Identifier: Apache-2.0
"""How large steps and contexts are made unless someone says otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from spanker.errors import ConfigError, ContextLengthError
from spanker.sched.layout import fit_kv_pages
from spanker.sched.plan import FleetPlan, Limits, ModelShape

DEFAULT_CONTEXT = 4096
DEFAULT_PROMPT_CHUNK = 512
PROMPT_CHUNK_MAX = 8192
PAGE_POSITIONS = 64
OUTPUTS_MAX = 64
CANDIDATES = 64
# By default the KV pool holds so many full contexts, or what the cards have room for.
KV_CONTEXTS = 8


def step_limits(
    shape: ModelShape, ctx: int | None = None, prompt_chunk: int = DEFAULT_PROMPT_CHUNK
) -> Limits:
    """The limits for sequences of `ctx` positions (default: the model's context, at most 4096) and
    steps of up to `prompt_chunk` prompt tokens, without KV pages.

    Raises ContextLengthError and ConfigError for what is out of range.
    """
    context = min(shape.context, DEFAULT_CONTEXT) if ctx is None else ctx
    if not 1 <= context <= shape.context:
        raise ContextLengthError(
            f"a context of {context} is not possible: the model was made for 1 to "
            f"{shape.context:,} positions"
        )
    if not 1 <= prompt_chunk <= PROMPT_CHUNK_MAX:
        raise ConfigError(
            f"the prompt chunk must be 1 to {PROMPT_CHUNK_MAX} tokens, got {prompt_chunk}"
        )
    prompt_chunk = min(prompt_chunk, context)
    return Limits(
        context=context,
        prompt_chunk=prompt_chunk,
        # However short the chunks, a step can carry one token of many sequences.
        tokens_max=max(prompt_chunk, OUTPUTS_MAX),
        outputs_max=OUTPUTS_MAX,
        candidates=min(CANDIDATES, shape.vocabulary),
        kv_pages=0,
        page_positions=PAGE_POSITIONS,
    )


def with_kv_pages(
    shape: ModelShape,
    plan: FleetPlan,
    limits: Limits,
    free_bytes: Sequence[int],
    kv_tokens: int | None = None,
) -> Limits:
    """The limits with KV pages for `kv_tokens` positions of all sequences of a replica together
    (default: 8 contexts, or what fits into the free memory of the cards).

    Raises ConfigError where what was asked for does not fit, CardMemoryError where not even one
    context does.
    """
    wanted = -(-(kv_tokens or KV_CONTEXTS * limits.context) // limits.page_positions)
    pages = min(
        fit_kv_pages(shape, replica, limits, tuple(free_bytes), wanted) for replica in plan.replicas
    )
    if kv_tokens is not None and pages < wanted:
        raise ConfigError(
            f"a KV cache of {kv_tokens:,} positions does not fit: the cards have room for "
            f"{pages * limits.page_positions:,}; lower kv_tokens or use more cards"
        )
    return attrs.evolve(limits, kv_pages=pages)
