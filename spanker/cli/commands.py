# SPDX-License-Identifier: Apache-2.0
"""The commands: names, options, help.  What they do is in the modules that they import."""

from __future__ import annotations

import sys
from typing import Any

import click

from spanker._version import __version__
from spanker.cli import options
from spanker.cli.errors import Failure, one_line_errors
from spanker.cli.options import FleetOptions, SamplingOptions

# Far above any context; reading and tokenising must stay a matter of seconds.
TEXT_BYTES_MAX = 16 << 20


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


class _PlanGroup(click.Group):
    """`spanker plan MODEL` is `spanker plan best MODEL`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands:
            args = ["best", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Its only option is help; what else begins with a dash is the command's.
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["best", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, message="spanker %(version)s")
def group() -> None:
    """Run one language model on a fleet of small accelerator cards as one machine.

    \b
    Start with:
      spanker pull smollm2
      spanker run "The capital of France is" --cards 3 --max-tokens 32
    """


@group.command(short_help="Generate text from a prompt.")
@click.argument("prompt", required=False)
@options.fleet_options
@options.sampling_options
@options.prompt_file
@options.chat
@options.ignore_eos
@click.option("--logits-hash", is_flag=True, help="Also give the SHA-256 of all tokens' logits.")
@options.trace
@options.as_json
def run(
    prompt: str | None,
    where: FleetOptions,
    how: SamplingOptions,
    prompt_file: str | None,
    chat: bool,
    ignore_eos: bool,
    logits_hash: bool,
    trace: str | None,
    as_json: bool,
) -> None:
    """Generate text that continues PROMPT, or with --chat answers it.

    The text comes on stdout as it is generated, a summary of the cards on stderr. Without a
    PROMPT, or with -, it is read from stdin; one line end at its end is dropped.
    """
    text = _prompt(prompt, prompt_file)
    from spanker.cli import run as work

    work.run(
        where,
        how,
        text,
        chat=chat,
        ignore_eos=ignore_eos,
        logits_hash=logits_hash,
        trace=trace,
        as_json=as_json,
    )


@group.command(short_help="See a fleet survive what fails.")
@click.argument("prompt", required=False)
@options.fleet_options
@options.sampling_options
@options.fault_options
@click.option(
    "--hang-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    metavar="S",
    help="Take a card that holds work for hung after so long without progress.",
)
@options.prompt_file
@options.chat
@options.ignore_eos
@click.option(
    "--plot",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Draw tokens over time and what happened meanwhile, as PNG, SVG or PDF.",
)
@options.trace
@options.as_json
def drill(
    prompt: str | None,
    where: FleetOptions,
    how: SamplingOptions,
    faults: tuple[str, ...],
    fault_plan: str | None,
    hang_timeout: float,
    prompt_file: str | None,
    chat: bool,
    ignore_eos: bool,
    plot: str | None,
    trace: str | None,
    as_json: bool,
) -> None:
    """Generate as run does, twice: undisturbed, then with cards and links that fail.

    \b
    Says when tokens came, what happened meanwhile, and whether the answer is
    the same: every token and all logits. If not, or if a fault never happened,
    it fails.
      spanker drill "Once upon a time" --cards 4 --kill 2@token:20
      spanker drill "Once" --cards 4 --hang 1@token:9 --hang-timeout 1
      spanker drill "Once" --cards virtual:4 --slow 3@token:5x4

    \b
    WHEN is one of
      token:20         when the 20th token has come
      time:0.5         so many seconds after the cards were opened
      step:9           just before the 9th step that is submitted to the card
      command:9:100    at that command of its 9th step: kill, hang and reset
    and slow cards and cut links can get well: "0-2@token:10 for 0.5s".

    The steps and tokens of virtual cards take modelled time, which is what is shown.
    """
    text = _prompt(prompt, prompt_file)
    if not faults and fault_plan is None:
        raise click.UsageError(
            "say what is to fail: --kill, --hang, --slow, --cut, ... or --faults"
        )
    from spanker.cli import drill as work

    work.drill(
        where,
        how,
        text,
        work.plan_of(faults, fault_plan),
        hang_timeout_s=hang_timeout,
        chat=chat,
        ignore_eos=ignore_eos,
        plot=plot,
        trace=trace,
        as_json=as_json,
    )


@group.command(short_help="Talk with a model.")
@options.fleet_options
@options.sampling_options
@click.option("--system", metavar="TEXT", help="What the assistant is told beforehand.")
def chat(where: FleetOptions, how: SamplingOptions, system: str | None) -> None:
    """Talk with a model, one line a message.

    /clear forgets the conversation, /exit or Ctrl-D ends it. Ctrl-C stops an answer, and at the
    prompt leaves. Messages can also come from a pipe.
    """
    from spanker.cli import chat as work

    work.chat(where, how, system)


@group.command(short_help="Fetch a model, or list those that can be fetched.")
@click.argument("name", required=False)
@click.option("--force", is_flag=True, help="Fetch it even if it is there already.")
@click.option("--no-pack", is_flag=True, help="Do not write a copy that starts faster.")
def pull(name: str | None, force: bool, no_pack: bool) -> None:
    """Fetch the model NAME into the cache; without a NAME, list the models there are.

    A model of the list is packed, too; see `spanker pack --help`.

    NAME can also be any GGUF file on the Hugging Face hub, hf:owner/repo/file.gguf or
    hf:owner/repo@revision/folder/file.gguf, which goes into the hub's own cache. That needs
    spanker's extra: pip install 'spanker[hf]'.
    """
    from spanker.cli import pull as work

    if name is None:
        work.show_catalog()
    else:
        work.pull(name, force=force, pack=not no_pack)


@group.command(short_help="Make a model start faster.")
@click.argument("model", required=False)
@click.option("--remove", is_flag=True, help="Remove the copy instead.")
@options.as_json
def pack(model: str | None, remove: bool, as_json: bool) -> None:
    """Write a copy of MODEL into the cache whose weights are laid out as cards want them.

    Whoever loads MODEL from now on maps the copy, for any number of cards and any plan, where
    others read and convert the file: it starts at once. It takes as much of the disk as MODEL
    does, and is not used any more when that changes. Without a MODEL, list the copies there are.
    """
    from spanker.cli import pack as work

    if model is None:
        if remove:
            raise click.UsageError("say of which MODEL the copy is to be removed")
        work.show_all(as_json=as_json)
    elif remove:
        work.remove(model)
    else:
        work.show(work.pack(model), as_json=as_json)


@group.command("eval", short_help="Measure how well a model predicts a text.")
@options.fleet_options_without_ctx
@click.option(
    "--text",
    required=True,
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="The text; - is stdin.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    show_default="all",
    help="Use only the first N tokens of it.",
    metavar="N",
)
@options.as_json
def evaluate(
    where: FleetOptions,
    text: str,
    tokens: int | None,
    as_json: bool,
) -> None:
    """Mean negative log likelihood (nats) and perplexity of the tokens of a text.

    Each token is predicted from those before it; the first is not predicted.
    """
    content = _read(text, whole=False)
    from spanker.cli import evaluate as work

    work.evaluate(where, text, content, tokens, as_json=as_json)


@group.command(short_help="Measure speed.")
@options.fleet_options_without_ctx
@click.option("--prompt", default="Hello, ", metavar="TEXT", help="What to generate from.")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Generate from a made-up prompt of N tokens instead.",
)
@click.option(
    "--gen-tokens",
    type=click.IntRange(min=2),
    default=64,
    metavar="N",
    help="Tokens to generate.",
)
@click.option(
    "--repeat",
    type=click.IntRange(1, 1000),
    default=1,
    metavar="N",
    help="Measure N times; the run with the median decode speed counts.",
)
@options.trace
@options.as_json
def bench(
    where: FleetOptions,
    prompt: str,
    prompt_tokens: int | None,
    gen_tokens: int,
    repeat: int,
    trace: str | None,
    as_json: bool,
) -> None:
    """Measure loading, prompt processing and decoding.

    Decoding is timed alone, from the first generated token to the last.
    """
    from spanker.cli import bench as work

    work.bench(where, prompt_tokens or prompt, gen_tokens, repeat, trace=trace, as_json=as_json)


@group.command(short_help="Foretell how fast a fleet would be.")
@click.argument("model", required=False)
@click.option("--shape", metavar="NAME", help="Simulate a model of this shape, without a file.")
@click.option(
    "--cards",
    default="1",
    metavar="N[:BYTES]",
    help="How many cards, and how much memory each has.",
)
@options.profile_to_plan_by
@options.plan
@click.option("--tokens", type=click.IntRange(min=1), default=32, help="Tokens to generate.")
@click.option("--prompt", type=click.IntRange(min=1), default=128, help="Tokens of the prompt.")
@click.option(
    "--batch", type=click.IntRange(1, 64), default=1, help="Sequences generated side by side."
)
@click.option(
    "--ctx",
    "--context",
    type=click.IntRange(min=1),
    show_default="4096, or what they need",
    help="Positions per sequence.",
)
@options.prompt_chunk
@click.option(
    "--arithmetic", is_flag=True, help="Compute what the cards would, too: the same tokens as run."
)
@click.option(
    "--seed", type=int, default=0, help="Order of what the host could do at the same time."
)
@options.trace
@options.as_json
def simulate(
    model: str | None,
    shape: str | None,
    cards: str,
    profile: str,
    plan: str,
    tokens: int,
    prompt: int,
    batch: int,
    ctx: int | None,
    prompt_chunk: int,
    arithmetic: bool,
    seed: int,
    trace: str | None,
    as_json: bool,
) -> None:
    """Run MODEL, or a --shape such as llama-70b, on cards that do not exist.

    The real coordinator and card actors run in virtual time on modelled cards: seconds are those
    of the profile, and nothing of this machine is in them. The same arguments print the same
    result and write the same trace, byte for byte.
    """
    if (model is None) == (shape is None):
        raise click.UsageError("give either a MODEL or a --shape")
    from spanker.cli import simulate as work

    work.simulate(
        work.scenario(
            model=model,
            shape=shape,
            cards=cards,
            profile=profile,
            plan=plan,
            tokens=tokens,
            prompt_tokens=prompt,
            batch=batch,
            ctx=ctx,
            prompt_chunk=prompt_chunk,
            arithmetic=arithmetic,
            seed=seed,
        ),
        trace=trace,
        as_json=as_json,
    )


@group.group("plan", cls=_PlanGroup, short_help="Choose a plan, and say what to expect of it.")
def plan_group() -> None:
    """Which plan is best for a model on a fleet, and how fast each would be.

    \b
    spanker plan MODEL --cards N          choose a plan for a model
    spanker plan --shape llama-70b ...    the same for a shape, without a file
    spanker plan show PLAN                draw a plan

    `spanker plan best --help` lists the options of the first two.
    """


@plan_group.command("best", short_help="Choose a plan (what plain `spanker plan` does).")
@click.argument("model", required=False)
@click.option("--shape", metavar="NAME", help="Plan for a model of this shape, without a file.")
@click.option(
    "--cards",
    default="1",
    metavar="N|SPEC",
    help="How many cards, or e.g. 4:64MiB for the memory of each.",
)
@options.profile_to_plan_by
@options.links
@click.option(
    "--batch",
    type=click.IntRange(1, 64),
    default=1,
    help="Sequences side by side that decoding is to be fast for.",
)
@click.option(
    "--position",
    type=click.IntRange(min=1),
    default=512,
    help="How far into their context these are.",
)
@options.ctx
@click.option(
    "--prompt", type=click.IntRange(min=1), default=512, help="Tokens of the prompt in the table."
)
@options.prompt_chunk
@click.option(
    "--top", type=click.IntRange(1, 100), default=8, help="How many plans the table compares."
)
@click.option("--save", type=click.Path(dir_okay=False), metavar="FILE", help="Write the plan.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Draw tokens/s over the number of cards, as PNG, SVG or PDF.",
)
@options.as_json
def plan_best(
    model: str | None,
    shape: str | None,
    cards: str,
    profile: str,
    links: str,
    batch: int,
    position: int,
    ctx: int | None,
    prompt: int,
    prompt_chunk: int,
    top: int,
    save: str | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """Choose the plan that decodes fastest, by the cost model, and compare it with others.

    MODEL is a name or a file; nothing is loaded, and the cards need not exist.
    """
    if (model is None) == (shape is None):
        raise click.UsageError("give either a MODEL or a --shape")
    from spanker.cli import plan as work

    asked = work.Asked(
        model=model,
        shape=shape,
        cards=cards,
        profile=profile,
        links=links,
        batch=batch,
        position=position,
        ctx=ctx,
        prompt_tokens=prompt,
        prompt_chunk=prompt_chunk,
        top=top,
    )
    work.plan(asked, save=save, plot=plot, as_json=as_json)


@plan_group.command("show", short_help="Draw a plan.")
@click.argument("what", metavar="PLAN")
@click.option("--model", metavar="NAME|FILE", help="The model that a plan's name is for.")
@click.option("--shape", metavar="NAME", help="The same without a file, such as llama-70b.")
@click.option("--cards", default="4", metavar="N|SPEC", help="How many cards it is for.")
@options.profile_to_plan_by
@options.links
@click.option(
    "--algorithm",
    default="best",
    metavar="NAME",
    help="Of a collective: ring, direct, tree, ..., or best, which searches.",
)
@click.option(
    "--op", type=click.Choice(("sum", "avg", "max", "min")), default="sum", help="Of a reduction."
)
@click.option("--any-order", is_flag=True, help="Fold in any order, as integers may be.")
@click.option(
    "--elements", type=click.IntRange(min=0), default=4096, help="Elements of a collective."
)
@click.option("--svg", type=click.Path(dir_okay=False), metavar="FILE", help="Draw it.")
@click.option("--save", type=click.Path(dir_okay=False), metavar="FILE", help="Write it as JSON.")
@options.as_json
def plan_show(
    what: str,
    model: str | None,
    shape: str | None,
    cards: str,
    profile: str,
    links: str,
    algorithm: str,
    op: str,
    any_order: bool,
    elements: int,
    svg: str | None,
    save: str | None,
    as_json: bool,
) -> None:
    """Show PLAN as text, and with --svg as a drawing.

    \b
    PLAN is one of
      FILE.json                 what plan --save or show --save has written
      tp2xpp2                   a model's plan by name, with --shape or --model
      all-reduce, all-gather, reduce-scatter, broadcast, all-to-all, barrier
                                a collective on --cards with --links
    """
    from spanker.cli import plan_show as work

    asked = work.Shown(
        what=what,
        model=model,
        shape=shape,
        cards=cards,
        profile=profile,
        links=links,
        algorithm=algorithm,
        op=op,
        any_order=any_order,
        elements=elements,
    )
    work.show(asked, svg=svg, save=save, as_json=as_json)


@group.command(short_help="Show versions, this machine, and what a model would do.")
@click.option("--model", metavar="NAME|FILE", help="Describe this model and its plan.")
@options.cards
@options.plan
@options.profile
@options.as_json
def info(model: str | None, cards: str, plan: str, profile: str, as_json: bool) -> None:
    """Show versions, instruction sets, cached models; with --model its shape and plan.

    Nothing is loaded.
    """
    from spanker.cli import info as work

    where = None if model is None else FleetOptions(model, cards, plan, profile)
    work.info(where, as_json=as_json)


@group.group("firmware", short_help="Check firmware images.")
def firmware_group() -> None:
    """What the processors of a card run, as a file."""


@firmware_group.command("check", short_help="Say what is in an image, and whether it is good.")
@click.argument("image", metavar="FILE")
@options.as_json
def firmware_check(image: str, as_json: bool) -> None:
    """Check FILE, a RISC-V ELF with Spanker's note, as is done before a card gets it.

    Nothing of it runs, and no card is needed.
    """
    from spanker.cli import firmware as work

    work.check(image, as_json=as_json)


@group.command(short_help="Measure the cards, links and host, as a profile.")
@options.cards
@options.profile
@options.throttle
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    metavar="FILE.toml",
    help="Write the profile there, for --profile FILE.toml.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True, max=3600),
    default=10.0,
    metavar="S",
    help="How long to measure, about; fleets that are slow or large take longer.",
)
@options.as_json
def calibrate(
    cards: str, profile: str, throttle: bool, out: str | None, seconds: float, as_json: bool
) -> None:
    """Measure what this machine's cards really do, to plan by and to predict with.

    \b
    Memory, arithmetic, overheads, links and host link are measured by small
    programs, and how much cards slow each other down. For instance:
      spanker calibrate --cards 4 --out desk.toml
      spanker run "Hello" --cards 4 --profile desk.toml
    """
    from spanker.cli import calibrate as work

    work.calibrate(cards, profile, seconds, out, throttle=throttle, as_json=as_json)


# --- texts -----------------------------------------------------------------------------


def _prompt(argument: str | None, path: str | None) -> str:
    if path is not None:
        if argument is not None:
            raise click.UsageError("give a PROMPT or --prompt-file, not both")
        text = _read(path)
    elif argument is not None and argument != "-":
        return argument
    else:
        if argument is None and sys.stdin is not None and sys.stdin.isatty():
            raise click.UsageError("give a PROMPT, or pipe one in, or use --prompt-file")
        text = _read("-")
    if text.endswith("\n"):
        text = text[:-2] if text.endswith("\r\n") else text[:-1]
    return text


def _read(path: str, *, whole: bool = True) -> str:
    """A UTF-8 text of at most TEXT_BYTES_MAX: of a longer one the beginning, or with `whole` an
    error."""
    what = "stdin" if path == "-" else path
    try:
        with click.open_file(path, "rb") as file:
            data: bytes = file.read(TEXT_BYTES_MAX + 1)
    except OSError as error:
        raise Failure(f"cannot read {what}: {error.strerror}") from error
    long = len(data) > TEXT_BYTES_MAX
    if long and whole:
        raise Failure(
            f"{what} has more than {TEXT_BYTES_MAX >> 20} MiB, longer than any context: shorten it"
        )
    try:
        return data[:TEXT_BYTES_MAX].decode()
    except UnicodeDecodeError as error:
        if long and error.start > TEXT_BYTES_MAX - 4:
            return data[: error.start].decode()
        raise Failure(
            f"{what} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}; convert it"
        ) from None
