# SPDX-License-Identifier: Apache-2.0
"""Model files on the Hugging Face hub, by names such as hf:owner/repo/folder/model.gguf.

A revision (branch, tag or commit) may follow the repository:
hf:owner/repo@v1.0/model.gguf.  Files are kept in the hub's own cache, which other
programs share.  This needs the package huggingface_hub, the extra `hf`; it is
imported only for such names.  Synchronous code for the command line.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spanker._version import __version__
from spanker.errors import DownloadError, ModelNotFoundError
from spanker.values import Value, lazy_frozen

if TYPE_CHECKING:
    from types import ModuleType

PREFIX = "hf:"
#: What names look like, for messages.
FORM = "hf:owner/repo/file.gguf"
_DEFAULT_REVISION = "main"
# The first whose downloads tell how far they are; pyproject.toml says so, too.
_VERSION_MIN = (1, 1)

_NAME = (
    r"hf:(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w-][\w.%-]*))?/(?P<file>.+\.gguf)"
)


@lazy_frozen
class HubFile(Value):
    """One file of a repository; `revision` is a branch, a tag or a commit."""

    name: str
    repo: str
    revision: str
    file: str

    @classmethod
    def parse(cls, name: str) -> HubFile:
        """Take a name apart; `ModelNotFoundError` if it is malformed."""
        match = re.fullmatch(_NAME, name, re.ASCII)
        if match is None or any(part in ("", ".", "..") for part in match["file"].split("/")):
            raise ModelNotFoundError(
                f"{name!r} does not name a file on the Hugging Face hub: expected "
                "hf:owner/repo/file.gguf, or hf:owner/repo@revision/folder/file.gguf"
            )
        # Revisions such as refs/pr/1 are written as in the hub's own addresses.
        revision = (match["revision"] or _DEFAULT_REVISION).replace("%2F", "/")
        return cls(name, match["repo"], revision, match["file"])


def resolve(name: str) -> Path:
    """The file in the hub's cache; there is no look at the network.

    Raises `ModelNotFoundError` if the name is malformed, huggingface_hub is
    not installed, or the file has not been pulled.
    """
    wanted = HubFile.parse(name)
    path = _cached(_library(wanted), wanted)
    if path is None:
        raise ModelNotFoundError(
            f"model {name!r} is not in the Hugging Face cache yet; fetch it with "
            f"`spanker pull {name}`"
        )
    return path


def pull(name: str, report: Callable[[int, int], None], *, force: bool = False) -> Path:
    """Fetch the file unless the hub's cache has it, return its path.  Blocks.

    `report` is called with bytes done and in all.  `force` fetches it anew, a
    newer one if there is one.  What an interrupted pull has fetched is kept,
    and the next goes on from there.  Raises `ModelNotFoundError` for a
    malformed name or if huggingface_hub is not installed, `DownloadError` for
    everything else that can go wrong.
    """
    wanted = HubFile.parse(name)
    hub = _library(wanted)
    path = _cached(hub, wanted)
    if path is not None and not force:
        return path
    try:
        with _quiet():
            return Path(
                hub.hf_hub_download(
                    wanted.repo,
                    wanted.file,
                    revision=wanted.revision,
                    force_download=force,
                    tqdm_class=_bar(report),
                    library_name="spanker",
                    library_version=__version__,
                )
            )
    except Exception as error:  # its own errors, its HTTP client's, the file system's
        raise DownloadError(f"cannot pull {name}: {_reason(wanted, error)}") from error


def _library(wanted: HubFile) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise ModelNotFoundError(
            f"{wanted.name} needs the package huggingface_hub: pip install 'spanker[hf]'"
        ) from None
    # Other packages bring it along, too, in any version.
    version = huggingface_hub.__version__
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is None or (int(parts[1]), int(parts[2])) < _VERSION_MIN:
        raise ModelNotFoundError(
            f"{wanted.name} needs huggingface_hub {_VERSION_MIN[0]}.{_VERSION_MIN[1]} or later, "
            f"got {version}: pip install --upgrade 'spanker[hf]'"
        )
    return huggingface_hub


def _cached(hub: ModuleType, wanted: HubFile) -> Path | None:
    try:
        found = hub.try_to_load_from_cache(wanted.repo, wanted.file, revision=wanted.revision)
    except ValueError as error:  # the hub's own rules for names
        raise ModelNotFoundError(f"no model {wanted.name!r}: {_line(error)}") from None
    return Path(found) if isinstance(found, str) else None  # else None, or known not to exist


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings on stderr: what matters comes as an error."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _bar(report: Callable[[int, int], None]) -> type[Any]:
    """What the library takes for a progress bar."""
    from tqdm import tqdm

    shown = 0

    class Bar(tqdm):  # type: ignore[misc]
        # No thread that watches over bars, which would outlive the download.
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": True})
            self._report()

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            self._report()

        def _report(self) -> None:
            # One download may have several bars, of what has arrived and what is
            # unpacked: the one that is furthest counts.
            nonlocal shown
            if self.total and shown <= self.n <= self.total:
                shown = self.n
                report(int(self.n), int(self.total))

    return Bar


def _reason(wanted: HubFile, error: Exception) -> str:
    """What went wrong and what to do next, on one line."""
    if isinstance(error, ValueError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # so it wraps what made a forced download fail
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{wanted.repo} is gated: accept its terms on its page, then log in with "
            "`hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {wanted.repo}, or it is private: check the name, or log in "
            "with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{wanted.repo} has no revision {wanted.revision}: check its branches and tags"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"the hub cannot be reached ({_line(error.__cause__ or error)}): check the network, "
            "and whether HF_HUB_OFFLINE is set"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return (
            f"{wanted.repo} has no file {wanted.file} in its revision {wanted.revision}: check "
            "its list of files"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space, or set HF_HOME to another directory"
    return f"{_line(error)}; check the network and try again"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
