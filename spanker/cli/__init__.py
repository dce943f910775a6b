# SPDX-License-Identifier: Apache-2.0
"""The command `spanker`.

This module and those it imports stay light, so that `--help` and usage errors are instant:
commands.py declares the commands and their options; what a command does is in a module of its
own, imported when it runs.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from spanker.cli.commands import group
from spanker.cli.errors import Interrupted, raise_interrupted


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 128 + n after signal n."""
    # What is imported stays; looking through it for garbage again and again takes 25 ms.
    gc.set_threshold(100_000)
    # numpy's BLAS is not used: its threads would cost start-up time and memory for nothing.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(_exit_code(args))


def _exit_code(args: Sequence[str] | None) -> int:
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, raise_interrupted)
        result = group.main(args, prog_name="spanker", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Interrupted as interrupted:
        if sys.stderr is not None and sys.stderr.isatty():
            click.echo(err=True)  # a new line after the terminal's ^C
        return 128 + interrupted.number
    except (KeyboardInterrupt, click.Abort):
        return 128 + signal.SIGINT
    except Exception:
        traceback.print_exc()
        click.echo("spanker: that is a bug in Spanker; please report it with these lines", err=True)
        return 1
    return result if isinstance(result, int) else 0
