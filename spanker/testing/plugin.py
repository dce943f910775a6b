# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: fleets of emulated cards, a tiny model, and seeds as fixtures.

pytest loads it wherever Spanker is installed, so it imports nothing beyond pytest until a fixture
is used.  `spanker_fleet` needs pytest-trio; the others do not.

A test that uses `spanker_seed` or `spanker_virtual` runs for seed 0, for those of its marker
`spanker_seeds`, or for that of `--spanker-seed`; when it fails, its report ends with the seed, the
faults that were drawn from it, and the command that replays it.
"""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from spanker.fleet import Fleet
    from spanker.testing.fault_plan import FaultPlan

T = TypeVar("T")

FLEET = "soft:3"
# Long for a tiny model, short for a person who waits for a test.
HANG_TIMEOUT_S = 1.0


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a GGUF of some 60 KB with random weights: loads in milliseconds, runs on any fleet.

    A llama with 2 layers, 64 wide, 4 heads over 2 KV heads, 320 tokens, 256 positions, Q4_0; it
    tokenises any text and answers with noise, always the same.  For another shape call
    `spanker.testing.write_tiny_llama`.
    """
    from spanker.testing.models import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("spanker") / "tiny.gguf")


@pytest.fixture
def spanker_fleet_factory() -> Callable[..., AbstractAsyncContextManager[Fleet]]:
    """Opens fleets: `async with spanker_fleet_factory("soft:4", hang_timeout_s=0.5) as fleet`.

    Takes what `spanker.open_fleet` takes; by default three cards, each of which has a part of every
    model, and a card counts as hung after 1 s without progress, not 10.
    """

    def factory(cards: object = FLEET, **options: object) -> AbstractAsyncContextManager[Fleet]:
        from spanker.fleet import open_fleet

        options.setdefault("hang_timeout_s", HANG_TIMEOUT_S)
        # The best plan for a tiny model leaves cards idle, and whose failure would show nothing.
        options.setdefault("plan", "tp")
        return open_fleet(cards, **options)  # type: ignore[arg-type]

    return factory


@pytest.fixture
async def spanker_fleet(
    spanker_fleet_factory: Callable[..., AbstractAsyncContextManager[Fleet]],
) -> AsyncIterator[Fleet]:
    """An open fleet of three soft cards without a model, for an async test under pytest-trio.

    `spanker.testing.kill` and `hang` make a card of it fail; a hang is noticed after 1 s.
    """
    async with spanker_fleet_factory() as fleet:
        yield fleet


# --- seeds --------------------------------------------------------------------------------


class SpankerVirtual:
    """The fixture `spanker_virtual`: call it with an async function to run it in virtual time.

    `seed` decides in what order tasks run that could run at the same time, and what `faults` draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.drawn: list[FaultPlan] = []

    def __call__(self, async_fn: Callable[..., Awaitable[T]], *args: object) -> T:
        """What `async_fn(*args)` returns; as `spanker.testing.run_virtual`."""
        from spanker.actors.virtual_time import run_virtual

        return run_virtual(async_fn, *args, seed=self.seed)

    def faults(self, cards: int, **options: Any) -> FaultPlan:
        """A fault plan for so many cards, as `FaultPlan.random`, from this seed; the next call
        gives another one."""
        from spanker.testing.fault_plan import FaultPlan

        plan = FaultPlan.random(f"{self.seed} {len(self.drawn)}", cards, **options)
        self.drawn.append(plan)
        return plan


@pytest.fixture
def spanker_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run of a test: 0, one of its marker `spanker_seeds`, or `--spanker-seed`."""
    return getattr(request, "param", 0)


@pytest.fixture
def spanker_virtual(spanker_seed: int) -> SpankerVirtual:
    """Runs an async function in virtual time, from one seed: `spanker_virtual(main)`.

    Fleets in it are of virtual or hollow cards; what waits for soft ones would be overtaken by the
    clock.
    """
    return SpankerVirtual(spanker_seed)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("spanker").addoption(
        "--spanker-seed",
        type=int,
        metavar="SEED",
        help="run tests that use spanker_seed or spanker_virtual for this seed alone",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "spanker_seeds(seeds): run a test that uses spanker_seed or spanker_virtual for so many "
        "seeds from 0, or for each of a list",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "spanker_seed" not in metafunc.fixturenames:
        return
    seeds: Sequence[int] | None = None
    marker = metafunc.definition.get_closest_marker("spanker_seeds")
    if marker is not None:
        (given,) = marker.args
        seeds = range(given) if isinstance(given, int) else given
    one: int | None = metafunc.config.getoption("--spanker-seed")
    if one is not None:
        seeds = (one,)
    if seeds is not None:
        ids = [f"seed{seed}" for seed in seeds]
        metafunc.parametrize("spanker_seed", seeds, ids=ids, indirect=True)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    report = outcome.get_result()
    used = getattr(item, "funcargs", {})
    if not report.failed or "spanker_seed" not in used:
        return
    seed = used["spanker_seed"]
    lines = [f"seed {seed}"]
    virtual = used.get("spanker_virtual")
    lines += [f"faults {plan}" for plan in virtual.drawn] if virtual is not None else []
    lines.append(f"replay with: pytest {_replayed(item, seed)} --spanker-seed={seed}")
    report.sections.append(("spanker", "\n".join(lines)))


def _replayed(item: pytest.Item, seed: int) -> str:
    """What the test is called when its only seed is given."""
    name, bracket, parameters = item.nodeid.partition("[")
    if f"seed{seed}" not in parameters[:-1].split("-"):
        parameters = f"{parameters[:-1]}-seed{seed}]" if bracket else f"seed{seed}]"
    return shlex.quote(f"{name}[{parameters}")
