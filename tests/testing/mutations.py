# SPDX-License-Identifier: Apache-2.0
"""Planted bugs, to see whether the simulator of misfortune finds them.

Each replaces a few words in the source of one function while it is planted.  These must be there
exactly once: a change of that function that makes a mutation meaningless fails loudly.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import attrs


@attrs.frozen
class Mutation:
    """A bug: in `target`, `module:function` or `module:Class.method`, `old` becomes `new`."""

    name: str
    target: str
    old: str
    new: str

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Within the block the bug is there, for the whole process."""
        module_name, _, path = self.target.partition(":")
        module = importlib.import_module(module_name)
        *owners, name = path.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        function = vars(owner)[name]
        bare = inspect.unwrap(function)
        source = textwrap.dedent(inspect.getsource(bare))
        assert source.count(self.old) == 1, (
            f"mutation {self.name}: expected {self.old!r} once in {self.target}, found it "
            f"{source.count(self.old)} times: adapt the mutation to the code"
        )
        made: dict[str, Any] = {}
        exec(
            compile(
                "from __future__ import annotations\n" + source.replace(self.old, self.new),
                f"<mutation {self.name}>",
                "exec",
            ),
            vars(module),
            made,
        )
        setattr(owner, name, made[name])
        try:
            yield
        finally:
            setattr(owner, name, function)


MUTATIONS = (
    # The links check epochs in C, where no message of another one is accepted.  Nearest are these:
    # cards abort, but not into a new epoch, and cards of different epochs work together.
    Mutation(
        "old-epoch",
        "spanker.actors.coordinator:Coordinator._entering",
        "self._epoch += 1\n",
        "pass\n",
    ),
    Mutation(
        "epochs-not-agreed",
        "spanker.actors.coordinator:Coordinator._agreed",
        "return len(epochs) == 1 and None not in epochs",
        "return True",
    ),
    Mutation(
        "kv-off-by-one",
        "spanker.actors.session:Sequence.forget_positions",
        "self.computed = self.scheduled = 0",
        "self.computed = self.scheduled = min(1, len(self.tokens) - 1)",
    ),
    Mutation(
        "lost-wake-up",
        "spanker.actors.session:Sequence.next",
        "self.session.wake()",
        "pass",
    ),
    Mutation(
        "page-freed-twice",
        "spanker.actors.session:PagePool.give",
        "pages.clear()",
        "pass",
    ),
    # The completion brings what was there before the step.
    Mutation(
        "fence-before-data",
        "spanker.device.virtual.card:VirtualCard.end_step",
        "native = self._finished(work)",
        "native = self._finished(work)\n"
        "    if native is not None and native.data:\n"
        "        late = self.__dict__.get('late', native.data)\n"
        "        self.__dict__['late'] = native.data\n"
        "        if [*map(len, late)] == [*map(len, native.data)]:\n"
        "            native = native._replace(data=late)",
    ),
    # After a loss; as if the first reply had not been heard.
    Mutation(
        "runs-twice",
        "spanker.actors.coordinator:Coordinator.owning",
        "return answer.take()",
        "if self.lost:\n        return await self.ask_client(client, request)\n"
        "    return answer.take()",
    ),
    Mutation(
        "page-reused-too-early",
        "spanker.actors.session:Session.release",
        "if not self._in_flight(sequence):",
        "if True:",
    ),
    # The last rows that are written to a card, once one has been lost.
    Mutation(
        "row-tile-dropped",
        "spanker.actors.coordinator:Coordinator._load",
        "alone = len(chain) == 1",
        "alone = len(chain) == 1; todo[first] = todo[first][: -1 if self.lost else None]",
    ),
    # Pages that go along, and are given to others, too; or one less of them.
    Mutation(
        "moved-pages-free",
        "spanker.actors.session:Session._resume_on",
        "[p for pages in kept.values() for p in pages]",
        "[]",
    ),
    Mutation(
        "last-page-left-behind",
        "spanker.actors.session:Session._tables",
        "math.ceil(sequence.computed / limits.page_positions)",
        "sequence.computed // limits.page_positions",
    ),
    Mutation(
        "timeout-never-fires",
        "spanker.actors.steps:ProgressWatch.look",
        "if missing or not self._left:",
        "if missing:",
    ),
    Mutation(
        "caller-left-waiting",
        "spanker.actors.session:Session._end",
        "sequence.signal()",
        "pass",
    ),
)
BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}
