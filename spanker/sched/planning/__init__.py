# SPDX-License-Identifier: Apache-2.0
"""The search for the best whole-model plan, by the cost model (`sched.cost`).

    request.py     what is asked, and what comes out
    search.py      `search(Request) -> Outcome`: one replica or several, and plans by name
    partitions.py  dealing cards to replicas
    pools.py       which cards are alike, and the sets of cards that can be a stage
    stages.py      the best row of stages: a dynamic programme over cards used and layers done
    options.py     what a set of cards would do as a stage, and what fits into its memory
    dimensions.py  what its cards divide among them
    dividing.py    the best shares of it
    naming.py      what plans are called
    words.py       why a plan was chosen

A plan's price is the sum of its stages' phases, in each of which the slowest card counts and then
the exchange.  So shares can be chosen stage by stage and dimension by dimension, and stages by
dynamic programming, without losing the best plan.  Only the choice of the next token joins the ends
of a row: which cards have columns of the embedding and which have vocabulary is tried with it.
Where the search looks at less than everything it says how far from a bound the result can be.
"""

from __future__ import annotations

from spanker.sched.planning.request import Candidate, Outcome, Request
from spanker.sched.planning.search import search

__all__ = ["Candidate", "Outcome", "Request", "search"]
