# SPDX-License-Identifier: Apache-2.0
"""`python -m spanker.testing.replay SEED`: the story of one seed of the simulator of misfortune."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import click

# Of this source tree: an installed package has no bugs to plant.
MUTATIONS = Path(__file__).parents[2] / "tests" / "testing" / "mutations.py"


@click.command()
@click.argument("seed", type=int)
@click.option("--mutation", metavar="NAME", help="plant a bug of tests/testing/mutations.py")
@click.option("--shrink", is_flag=True, help="make what fails as short as it can be, and show it")
def main(seed: int, mutation: str | None, shrink: bool) -> None:
    """Tell what happens with SEED, and whether all is well: 1 is returned where it is not."""
    from spanker.testing.misfortune import draw, literal, run
    from spanker.testing.misfortune.shrinking import shrink as shrunk
    from spanker.testing.misfortune.story import story

    planted = contextlib.nullcontext if mutation is None else _planted(mutation)
    run_it = functools.partial(run, planting=planted)
    scenario = draw(seed)
    outcome = run_it(scenario)
    if shrink and not outcome.good:
        scenario = shrunk(scenario, run_it)
        outcome = run_it(scenario)
        click.echo(f"{literal(scenario)}\n")
    click.echo(story(scenario, outcome))
    sys.exit(not outcome.good)


def _planted(name: str) -> Callable[[], AbstractContextManager[object]]:
    """What plants the bug of that name, once each time it is called."""
    spec = importlib.util.spec_from_file_location("spanker_mutations", MUTATIONS)
    if spec is None or spec.loader is None or not MUTATIONS.exists():
        raise click.UsageError(f"--mutation needs the source tree: there is no {MUTATIONS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if name not in module.BY_NAME:
        known = ", ".join(module.BY_NAME)
        raise click.UsageError(f"no mutation {name!r}: expected one of {known}")
    planted: Callable[[], AbstractContextManager[object]] = module.BY_NAME[name].planted
    return planted


if __name__ == "__main__":
    main()
