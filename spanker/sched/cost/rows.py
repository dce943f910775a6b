# SPDX-License-Identifier: Apache-2.0
"""How much a step has to do: the rows its commands work on, and what their attention sees."""

from __future__ import annotations

import attrs

from spanker.errors import PlanError
from spanker.values import Value

# Neighbouring tokens of a sequence that read its keys and values together.
ATTENTION_TOKENS = 8


@attrs.frozen(eq=False, repr=False)
class StepRows(Value):
    """The size of a step.  Sums of two are one step that does both.

    `group_positions`: the positions that the last token of each group sees, over all groups;
    `pairs`: the positions that each token sees, over all tokens.
    """

    tokens: int
    outputs: int
    group_positions: int
    pairs: int

    @classmethod
    def decode(cls, batch: int, context: int) -> StepRows:
        """One token, with its logits, of each of `batch` sequences, that sees `context`
        positions; raises PlanError unless both are at least 1."""
        if batch < 1 or context < 1:
            raise PlanError(
                f"a decode step needs a batch and a context of at least 1, got {batch}, {context}"
            )
        return cls(batch, batch, batch * context, batch * context)

    @classmethod
    def prefill(cls, first: int, tokens: int, outputs: int) -> StepRows:
        """`tokens` of one prompt from position `first` on; raises PlanError unless first >= 0,
        tokens >= 1 and 0 <= outputs <= tokens."""
        if first < 0 or tokens < 1 or not 0 <= outputs <= tokens:
            raise PlanError(
                f"a prefill step needs first >= 0, tokens >= 1 and 0 to {tokens} outputs, got "
                f"{first}, {tokens}, {outputs}"
            )
        whole, rest = divmod(tokens, ATTENTION_TOKENS)
        groups = whole * first + ATTENTION_TOKENS * whole * (whole + 1) // 2
        if rest:
            groups += first + tokens
        return cls(tokens, outputs, groups, tokens * first + tokens * (tokens + 1) // 2)

    def __add__(self, other: StepRows) -> StepRows:
        return StepRows(
            self.tokens + other.tokens,
            self.outputs + other.outputs,
            self.group_positions + other.group_positions,
            self.pairs + other.pairs,
        )
