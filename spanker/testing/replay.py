# SPDX-License-Identifier: Apache-2.0
"""`python -m spanker.testing.replay SEED`: the story of one seed of the simulator of misfortune."""

from __future__ import annotations

import sys

import click


@click.command()
@click.argument("seed", type=int)
@click.option("--shrink", is_flag=True, help="make the scenario as short as it can be and still fail")
def main(seed: int, shrink: bool) -> None:
    """Tell what happens with SEED, and whether all is well: 1 is returned where it is not."""
    from spanker.testing.misfortune import draw, run
    from spanker.testing.misfortune.scenario import literal
    from spanker.testing.misfortune.story import story

    scenario = draw(seed)
    outcome = run(scenario)
    if shrink and not outcome.good:
        from spanker.testing.misfortune.shrinking import shrink as shrunk

        scenario = shrunk(scenario)
        outcome = run(scenario)
        print(literal(scenario), end="\n\n")
    print(story(scenario, outcome))
    sys.exit(not outcome.good)


if __name__ == "__main__":
    main()
