# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and the values they make.

Nothing heavy is imported here, so the defaults of other modules are repeated; a test compares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import click

DEFAULT_MODEL = "smollm2"
DEFAULT_MAX_TOKENS = 256
DEFAULT_PROMPT_CHUNK = 512
PROFILES = ("native", "rev-a", "rev-b")

Command = TypeVar("Command", bound=Callable[..., Any])


@attrs.frozen
class FleetOptions:
    """Which model runs on which cards, and how."""

    model: str
    cards: str
    plan: str
    profile: str = "native"
    throttle: bool = False
    ctx: int | None = None
    prompt_chunk: int = DEFAULT_PROMPT_CHUNK
    audit: int | None = None
    rebalance: bool = False
    kv_copies: int = 0


@attrs.frozen
class SamplingOptions:
    """How tokens are chosen and when a generation ends."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop: tuple[str, ...]


def _profile_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """The name of a profile, or a file; what is in the file is read when the fleet is opened."""
    if value not in PROFILES and not value.endswith(".toml") and "/" not in value:
        raise click.BadParameter(f"{value!r} is none of {', '.join(PROFILES)}, nor a FILE.toml")
    return value


model = click.option(
    "--model",
    default=DEFAULT_MODEL,
    metavar="NAME|FILE",
    help="A model's name, e.g. smollm2 or hf:owner/repo/file.gguf, or a GGUF file.",
)
cards = click.option(
    "--cards",
    default="1",
    metavar="N|SPEC",
    help="The cards: a number, or e.g. soft:3, soft:2@avx2,soft:1@scalar, soft:4:64MiB; "
    "riscv:2 for those that run firmware in an emulator; kernel:2 or kernel for those behind the "
    "kernel module.",
)
plan = click.option(
    "--plan",
    default="auto",
    metavar="PLAN",
    help="How the cards share the model: auto, tp, pp, tpAxppB such as tp2xpp2, or dpDxtpAxppB "
    "such as dp2xtp2 for D replicas side by side.",
)
profile = click.option(
    "--profile",
    callback=_profile_name,
    default="native",
    metavar="NAME|FILE",
    help="The speeds to plan by: native, rev-a, rev-b, or what `spanker calibrate` has written;"
    " the host link keeps those of rev-a and rev-b.",
)
profile_to_plan_by = click.option(
    "--profile",
    callback=_profile_name,
    default="rev-a",
    metavar="NAME|FILE",
    help="The speeds of cards, links and host: native, rev-a, rev-b, or what `spanker calibrate`"
    " has written.",
)
links = click.option(
    "--links",
    type=click.Choice(("mesh", "ring", "line")),
    default="mesh",
    help="Which cards are linked with each other.",
)
throttle = click.option(
    "--throttle",
    is_flag=True,
    help="Slow the cards and the links between them down to the profile's speeds.",
)
ctx = click.option(
    "--ctx",
    type=click.IntRange(min=1),
    show_default="the model's, at most 4096",
    help="Positions of prompt and answer together.",
)
prompt_chunk = click.option(
    "--prompt-chunk",
    type=click.IntRange(min=1),
    default=DEFAULT_PROMPT_CHUNK,
    help="Most prompt tokens in one step.",
)
audit = click.option(
    "--audit",
    type=click.IntRange(min=1),
    metavar="N",
    help="After every N steps compute a piece of a card's work again, and leave out a card that has"
    " it wrong.",
)
rebalance = click.option(
    "--rebalance",
    is_flag=True,
    help="Give a card that becomes slower than it was a smaller share.",
)
kv_copies = click.option(
    "--kv-copies",
    type=click.IntRange(0, 1),
    default=0,
    help="1: another card keeps each card's keys and values as well, so that nothing is computed"
    " again when a card is lost.",
)
_fleet = (model, cards, plan, profile, throttle, prompt_chunk, audit, rebalance, kv_copies)
trace = click.option(
    "--trace",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write what every card did when, for ui.perfetto.dev or chrome://tracing.",
)
prompt_file = click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Read the prompt from a file.",
)
chat = click.option(
    "--chat", is_flag=True, help="Put the prompt as a user's message to the assistant."
)
ignore_eos = click.option("--ignore-eos", is_flag=True, help="Go on past the end of the text.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")

_sampling = (
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        default=DEFAULT_MAX_TOKENS,
        help="Most tokens to generate.",
    ),
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        help="0 always takes the best token; higher is more varied.",
    ),
    click.option("--top-k", type=int, default=0, help="Choose among the k best tokens; 0: all."),
    click.option(
        "--top-p",
        type=float,
        default=1.0,
        help="Choose among the best tokens that reach this probability together.",
    ),
    click.option(
        "--min-p",
        type=float,
        default=0.0,
        help="Choose among tokens at least this likely, relative to the best.",
    ),
    click.option(
        "--seed", type=int, default=0, help="The same seed gives the same text, on any cards."
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."),
)

# What can be asked for by an option of its own: where, and what it is.
_FAULTS = {
    "kill": ("CARD@WHEN", "A card is gone, e.g. 2@token:20; repeatable, as all of these."),
    "hang": ("CARD@WHEN", "A card goes on answering, but does no work."),
    "reset": ("CARD@WHEN", "Somebody resets a card, which has lost all it held."),
    "slow": ("CARD@WHENxN", "A card takes N times as long, e.g. 3@token:5x4."),
    "cut": ("A-B@WHEN", "The link between two cards is down, e.g. 0-2@token:10."),
}
_faults = tuple(
    click.option(f"--{what}", multiple=True, metavar=metavar, help=told)
    for what, (metavar, told) in _FAULTS.items()
)
_fault_plan = click.option(
    "--faults",
    "fault_plan",
    metavar="FILE|TEXT",
    help="A whole plan of faults: a file, as text or JSON, or the text itself, "
    'e.g. "kill 2@token:20; corrupt 0-1@step:9".',
)


def fault_options(command: Command) -> Command:
    """Faults one by one, handed to the command as the lines `faults` of a fault plan, in the order
    of their kinds, and a whole plan, `fault_plan`."""

    @functools.wraps(command)
    def collect(**values: Any) -> Any:
        asked = {what: values.pop(what) for what in _FAULTS}
        values["faults"] = tuple(f"{what} {rest}" for what in asked for rest in asked[what])
        return command(**values)

    decorated: Any = collect
    for option in reversed((*_faults, _fault_plan)):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def fleet_options(command: Command) -> Command:
    """All of `FleetOptions`, handed to the command as `where`."""
    return _collected(FleetOptions, "where", (*_fleet, ctx), command)


def fleet_options_without_ctx(command: Command) -> Command:
    """The same for commands that know themselves how long the context must be."""
    return _collected(FleetOptions, "where", _fleet, command)


def sampling_options(command: Command) -> Command:
    """All of `SamplingOptions`, handed to the command as `how`."""
    return _collected(SamplingOptions, "how", _sampling, command)


def _collected(
    kind: type[Any],
    argument: str,
    options: tuple[Callable[[Any], Any], ...],
    command: Command,
) -> Command:
    names = [field.name for field in attrs.fields(kind)]

    @functools.wraps(command)
    def collect(**values: Any) -> Any:
        values[argument] = kind(**{name: values.pop(name) for name in names if name in values})
        return command(**values)

    decorated: Any = collect
    for option in reversed(options):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]
