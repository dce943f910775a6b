# SPDX-License-Identifier: Apache-2.0
"""How large steps and contexts are made unless someone says otherwise."""

from __future__ import annotations

from spanker.errors import ConfigError, ContextLengthError
from spanker.sched.plan import Limits, ModelShape

DEFAULT_CONTEXT = 4096
DEFAULT_PROMPT_CHUNK = 512
PROMPT_CHUNK_MAX = 8192
PAGE_POSITIONS = 64
OUTPUTS_MAX = 64
CANDIDATES = 64


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
