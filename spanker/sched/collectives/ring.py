# SPDX-License-Identifier: Apache-2.0
"""Ring algorithms: every card sends to the next one only, all of them at once.

    all-gather       n - 1 steps      (n - 1)/n of DATA over each link of the ring, one way
    reduce-scatter   n - 1 steps      the same, folded in the order of the ring
    all-reduce       2(n - 1) steps   twice that
    barrier          n - 1 steps      a token over each link in each

The ring is the order of the cards where links allow it, else one that is searched for.
"""

from __future__ import annotations

from spanker.sched.collectives.compose import averaged_shares, move, tokens, transposed
from spanker.sched.collectives.plan import Phase
from spanker.sched.collectives.task import Task


def all_gather(task: Task) -> list[Phase]:
    ring, n = task.graph.ring(), task.n
    return [
        # The share that stands `step` places back in the ring arrived in the step before.
        Phase(
            tuple(
                move(ring[i], ring[(i + 1) % n], task.share(ring[(i - step) % n])) for i in range(n)
            )
        )
        for step in range(n - 1)
    ]


def reduce_scatter(task: Task) -> list[Phase]:
    return transposed(all_gather(task.backwards()), task.elements) + averaged_shares(task)


def all_reduce(task: Task) -> list[Phase]:
    return reduce_scatter(task) + all_gather(task)


def barrier(task: Task) -> list[Phase]:
    ring, n = task.graph.ring(), task.n
    return tokens([[(ring[i], ring[(i + 1) % n]) for i in range(n)] for _ in range(n - 1)])
