# SPDX-License-Identifier: Apache-2.0
"""The search for the best whole-model plan, by the cost model (`sched.cost`).

    search.py     what is asked, what comes out: `search(Request) -> Outcome`
    pools.py      which cards are alike, and the sets of cards that the search goes through
    dividing.py   the best shares of one stage's cards
    stages.py     the best row of stages: a dynamic programme over cards used and layers done
    naming.py     plans by name, and the names of plans
    words.py      why a plan was chosen, in words

A plan's price is the sum of its stages' phases, in each of which the slowest card counts and then
the exchange.  So shares can be chosen stage by stage and dimension by dimension, and stages by
dynamic programming, without losing the best plan; where the search looks at less than everything it
says how far from a bound the result can be.
"""
