# SPDX-License-Identifier: Apache-2.0
"""What every stage needs of this machine: paths, failures, child processes, apt's own settings.

Children die with the harness, however it ends: each has a process group of its own, which
`kill_all` ends, and asks the kernel for SIGKILL when its parent is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DRIVER = ROOT / "driver"
HERE = Path(__file__).resolve().parent
WORK = ROOT / "build" / "driver-vm"
CACHE = WORK / "cache"

TERMINATE_S = 10
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)
_children: list[subprocess.Popen] = []


class Failure(Exception):
    """What went wrong, in one or more lines for the person who reads them."""


def say(text: str) -> None:
    print(f"   {text}", flush=True)


def is_root() -> bool:
    return os.geteuid() == 0


# --- children -------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(command: Sequence[object], **options: object) -> subprocess.Popen:
    """A child in a process group of its own, which does not outlive the harness."""
    process = subprocess.Popen(
        [str(word) for word in command],
        start_new_session=True,
        preexec_fn=_die_with_parent,
        **options,
    )
    _children.append(process)
    return process


def stop(process: subprocess.Popen, terminate_s: float = TERMINATE_S) -> None:
    """Ask, wait a bounded time, kill; the whole group, of which some may outlive the first."""
    # That one is looked at, and not reaped: as long as it is there, so is the number of its group.
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + terminate_s
        while time.monotonic() < deadline and not _has_ended(process):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(terminate_s)
    if process in _children:
        _children.remove(process)


def _has_ended(process: subprocess.Popen) -> bool:
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_all() -> None:
    for process in list(_children):
        stop(process, terminate_s=5)


def run(
    command: Sequence[object],
    *,
    timeout_s: float = 600,
    log: Path | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """Run to the end and return what it printed; a failure carries the end of that."""
    words = [str(word) for word in command]
    process = start(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=cwd,
        env=None if env is None else {**os.environ, **env},
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        stop(process)
        raise Failure(f"{' '.join(words)}: not done after {timeout_s:.0f} s") from None
    finally:
        if process.poll() is not None and process in _children:
            _children.remove(process)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(output)
    if process.returncode != 0:
        raise Failure(
            f"{' '.join(words)}: exit status {process.returncode}\n{last_lines(output, 40)}"
        )
    return output


def last_lines(text: str, count: int) -> str:
    return "\n".join(f"   | {line}" for line in text.splitlines()[-count:])


# --- results that survive an interruption ---------------------------------------------------------


@contextlib.contextmanager
def building(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the name `target` only once it is complete."""
    partial = target.with_name(target.name + ".partial")
    remove(partial)
    partial.mkdir(parents=True)
    yield partial
    remove(target)
    partial.rename(target)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def key_of(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


# --- apt ------------------------------------------------------------------------------------------


def distribution() -> dict[str, str]:
    """The fields of os-release."""
    lines = Path("/etc/os-release").read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {name: value.strip('"') for name, value in pairs}


def mirror(suite: str) -> str:
    """The address that this machine takes `suite` from, else its own release."""
    fields = "$(REPO_URI) $(CODENAME) $(COMPONENT)"
    listed = run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"])
    known = {}
    for line in listed.splitlines():
        match line.split():
            case [address, codename, "main"]:
                known.setdefault(codename, address)
    own = distribution().get("VERSION_CODENAME", "")
    for name in (suite, own):
        if name in known:
            return known[name]
    raise Failure(
        f"apt knows no mirror of {own or 'this distribution'} (component main): "
        "run apt-get update, or see /etc/apt/sources.list"
    )


def apt_settings() -> Path:
    """apt's settings for downloads (proxies, checks) as a file, for an apt of another tree."""
    wanted = ("Acquire::Check-", "Acquire::http", "Acquire::https", "Acquire::Retries")
    dump = run(["apt-config", "dump", "Acquire"])
    lines = [line for line in dump.splitlines() if line.startswith(wanted)]
    lines += ['Acquire::Languages "none";', 'APT::Install-Recommends "false";']
    WORK.mkdir(parents=True, exist_ok=True)
    path = WORK / "apt.conf"
    path.write_text("\n".join(lines) + "\n")
    return path


def debian_tree(
    target: Path,
    suite: str,
    packages: Sequence[str],
    *,
    variant: str = "extract",
    suites: Sequence[str] = (),
    prefer: str = "",
    timeout_s: float = 600,
) -> Path:
    """A tree of packages of another release (`extract`: unpacked only, nothing configured)."""
    if target.exists():
        return target
    options = ["--aptopt=" + str(apt_settings())]
    if prefer:
        options.append(f'--aptopt=APT::Default-Release "{prefer}"')
    with building(target) as partial:
        run(
            ["mmdebstrap", "--quiet", f"--variant={variant}", "--include=" + ",".join(packages)]
            + [*options, suite, partial]
            + [f"deb {mirror(name)} {name} main" for name in (suite, *suites)],
            timeout_s=timeout_s,
        )
    return target


def in_tree(tree: Path, *command: object) -> list[object]:
    """A command that sees `tree` as the system, with /proc.

    In a mount namespace of its own: however it ends, nothing stays mounted in the tree.
    """
    script = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
    return ["unshare", "--mount", "sh", "-c", script, tree, *command]
