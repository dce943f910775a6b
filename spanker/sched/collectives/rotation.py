# SPDX-License-Identifier: Apache-2.0
"""All-to-all by rotation: in step d every card sends to the d-th after it, so that each card always
receives from one other only.

    all-to-all   n - 1 steps   1/n of DATA leaves each card in each
"""

from __future__ import annotations

from spanker.sched.collectives.direct import kept, out
from spanker.sched.collectives.plan import Phase, Send
from spanker.sched.collectives.task import Task


def all_to_all(task: Task) -> list[Phase]:
    n = task.n
    return [
        Phase(local=kept(task)),
        *(
            Phase(tuple(Send(i, (i + d) % n, task.share(i + d), out(task, i)) for i in range(n)))
            for d in range(1, n)
        ),
    ]
