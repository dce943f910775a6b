# SPDX-License-Identifier: Apache-2.0
"""The command line starts at once, and its help tells the truth."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_process import batch, good

from spanker import __version__, fleet
from spanker.cli import opening, options
from spanker.cli.commands import group
from spanker.sched import limits
from spanker.sched.bandwidth import PROFILES

HEAVY = ("numpy", "trio", "rich", "msgpack", "tokenizers", "jinja2", "spanker.fleet")


@pytest.mark.parametrize(
    "args", [["--help"], ["run", "--help"], ["drill", "x"], ["--version"], ["run", "--bad"]]
)
def test_help_and_usage_errors_import_nothing_heavy(args: list[str]) -> None:
    program = (
        "import sys, spanker.cli\n"
        f"try: spanker.cli.main({args})\n"
        f"finally: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.stderr.endswith(b"\n[]\n") or done.stderr == b"[]\n"


def test_the_version_is_the_packages() -> None:
    assert good("--version").stdout.decode() == f"spanker {__version__}\n"


def test_repeated_defaults_are_those_of_the_library() -> None:
    assert options.DEFAULT_MAX_TOKENS == fleet.DEFAULT_MAX_TOKENS
    assert options.DEFAULT_PROMPT_CHUNK == limits.DEFAULT_PROMPT_CHUNK
    assert options_of("drill")["hang_timeout"].default == opening.HANG_TIMEOUT_S  # type: ignore[attr-defined]
    assert list(options.PROFILES) == [p.name for p in PROFILES]
    assert str(limits.DEFAULT_CONTEXT) in str(options_of("run")["ctx"].show_default)


def options_of(command: str) -> dict[str, object]:
    return {p.name: p for p in group.commands[command].params if p.name is not None}  # type: ignore[misc]


def test_every_command_and_option_explains_itself() -> None:
    commands = sorted(group.commands)
    for command, done in zip(commands, batch(*((c, "--help") for c in commands)), strict=True):
        assert done.code == 0
        assert max(len(line) for line in done.out.splitlines()) <= 80
        assert group.commands[command].short_help
        for parameter in group.commands[command].params:
            assert parameter.param_type_name == "argument" or getattr(parameter, "help", "")


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (
            "run",
            "model cards plan ctx max_tokens temperature top_k top_p min_p seed stop chat "
            "prompt_chunk profile as_json logits_hash ignore_eos prompt_file",
        ),
        ("chat", "model cards plan ctx max_tokens temperature top_k top_p min_p seed stop system"),
        (
            "drill",
            "model cards plan ctx max_tokens temperature top_k top_p min_p seed stop chat "
            "prompt_chunk profile as_json ignore_eos prompt_file kill hang reset slow cut "
            "fault_plan hang_timeout plot trace",
        ),
        ("eval", "model text tokens cards plan as_json"),
        ("bench", "model cards plan prompt prompt_tokens gen_tokens repeat as_json"),
        ("info", "model cards plan as_json"),
    ],
)
def test_commands_have_their_options(command: str, names: str) -> None:
    assert set(names.split()) <= set(options_of(command))
