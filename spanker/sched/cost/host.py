# SPDX-License-Identifier: Apache-2.0
"""What the host's link adds to a step: the messages that begin it and those that end it.

Messages of a step go one after the other, in order of the plan's cards; what they take is their
bytes, and one latency.  Without a modelled host link they take nothing.
"""

from __future__ import annotations

import itertools

import attrs

from spanker.sched.bandwidth import Profile
from spanker.sched.cost import messages
from spanker.sched.cost.rows import StepRows
from spanker.sched.plan import Plan
from spanker.values import Value


@attrs.frozen(eq=False, repr=False)
class HostMessages(Value):
    """Of one step: bytes of all messages to cards and to the host, and seconds.

    `begin_s[stage]`: from when the host submits it to when the last card of that stage has it.
    `end_s`: from the end of the step to when the host has all answers.  `latency_s` is contained in
    both.
    """

    bytes_to_cards: float
    bytes_to_host: float
    begin_s: tuple[float, ...]
    end_s: float
    latency_s: float


def step_messages(
    plan: Plan, profile: Profile, rows: StepRows, sequences: int, context: int, candidates: int
) -> HostMessages:
    """The messages of a step of `sequences` sequences of up to `context` positions."""
    rate = profile.host_link_bytes_per_s
    s_per_byte = 1 / rate if rate else 0.0
    latency_s = profile.host_link_latency_s if rate else 0.0
    last = plan.stages[-1]
    begins, ends = [], 0
    for stage in plan.stages:
        reads = [2 if rows.outputs and not s.vocabulary.empty else 0 for s in stage.shares]
        begins.append(sum(messages.step_bytes(rows, sequences, context, count) for count in reads))
    answers = [
        messages.answer_bytes(rows.outputs, s.vocabulary.size, candidates)
        for stage in plan.stages
        for s in stage.shares
    ]
    # Cards of other stages have answered before, unless they wait for the token.
    late = {*last.cards, *(plan.embedders if rows.outputs else ())}
    ends = sum(n for card, n in zip(plan.cards, answers, strict=True) if card in late)
    return HostMessages(
        bytes_to_cards=sum(begins),
        bytes_to_host=sum(answers),
        begin_s=tuple(latency_s + n * s_per_byte for n in itertools.accumulate(begins)),
        end_s=latency_s + ends * s_per_byte,
        latency_s=latency_s,
    )
