# SPDX-License-Identifier: Apache-2.0
"""hf: names, against a hub that behaves, refuses or is not there, and the real library's cache."""

from __future__ import annotations

import errno
import logging
import os
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from spanker import __version__
from spanker.errors import DownloadError, ModelNotFoundError
from spanker.ggml import hub
from spanker.ggml.catalog import pull, resolve
from spanker.ggml.hub import HubFile
from spanker.testing import write_tiny_llama

NAME = "hf:sails/tiny-GGUF/tiny.Q4_0.gguf"


class FakeHub:
    """A huggingface_hub whose one download does what a test says."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = directory / "tiny.gguf"
        self.cached: object = None
        self.asked: list[tuple[Any, ...]] = []
        self.calls: list[dict[str, Any]] = []
        self.download: Callable[[type[Any]], object] = lambda bar: None
        self.module = types.ModuleType("huggingface_hub")
        self.errors = types.ModuleType("huggingface_hub.errors")
        for name, base in (
            ("RepositoryNotFoundError", "OSError"),
            ("GatedRepoError", "RepositoryNotFoundError"),
            ("RevisionNotFoundError", "OSError"),
            ("EntryNotFoundError", "Exception"),
            ("LocalEntryNotFoundError", "EntryNotFoundError"),
        ):
            parent = getattr(self.errors, base, None) or {"OSError": OSError}.get(base, Exception)
            setattr(self.errors, name, type(name, (parent,), {}))
        vars(self.module).update(
            __version__="1.1.0",
            errors=self.errors,
            try_to_load_from_cache=self._try_to_load_from_cache,
            hf_hub_download=self._hf_hub_download,
        )
        monkeypatch.setitem(sys.modules, "huggingface_hub", self.module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", self.errors)

    def _try_to_load_from_cache(self, repo: str, file: str, *, revision: str) -> object:
        self.asked.append((repo, file, revision))
        return self.cached

    def _hf_hub_download(self, repo: str, file: str, **options: Any) -> str:
        self.calls.append({"repo": repo, "file": file, **options})
        self.download(options["tqdm_class"])
        self.file.write_bytes(b"GGUF")
        return str(self.file)

    def fails(self, error: Exception, cause: Exception | None = None) -> None:
        def download(bar: type[Any]) -> None:
            raise error from cause

        self.download = download


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(tmp_path, monkeypatch)


# --- names --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repo", "revision", "file"),
    [
        ("hf:o/r/f.gguf", "o/r", "main", "f.gguf"),
        (NAME, "sails/tiny-GGUF", "main", "tiny.Q4_0.gguf"),
        ("hf:o/r@v1.0/f.gguf", "o/r", "v1.0", "f.gguf"),
        ("hf:o/r/a/b c/f@x.gguf", "o/r", "main", "a/b c/f@x.gguf"),
        ("hf:o-1/r_2.x@refs%2Fpr%2F7/a/f.gguf", "o-1/r_2.x", "refs/pr/7", "a/f.gguf"),
    ],
)
def test_names_are_taken_apart(name: str, repo: str, revision: str, file: str) -> None:
    assert HubFile.parse(name) == HubFile(name, repo, revision, file)


@pytest.mark.parametrize(
    "name",
    [
        "hf:",
        "hf:tiny.gguf",
        "hf:owner/tiny.gguf",
        "hf:owner/repo",
        "hf:owner/repo/model.safetensors",
        "hf:owner/repo/.gguf/",
        "hf:owner/repo//f.gguf",
        "hf:owner/repo/../../../f.gguf",
        "hf:owner/repo/./f.gguf",
        "hf:../repo/f.gguf",
        "hf:owner/repo@/f.gguf",
        "hf:owner/repo@../f.gguf",
        "hf:owner@main/repo/f.gguf",
        "hf://owner/repo/f.gguf",
        "hf:owner/repo/f\n.gguf",
    ],
)
def test_a_malformed_name_is_told_what_was_expected(name: str, fake: FakeHub) -> None:
    for call in (resolve, pull):
        with pytest.raises(
            ModelNotFoundError, match=r"expected hf:owner/repo/file\.gguf"
        ) as caught:
            call(name)
        assert "\n" not in str(caught.value)
    assert fake.asked == fake.calls == []


# --- a hub that behaves ---------------------------------------------------------


def test_resolve_asks_the_cache_only(fake: FakeHub, tmp_path: Path) -> None:
    for absent in (None, object()):  # not looked for, or known not to exist
        fake.cached = absent
        with pytest.raises(ModelNotFoundError, match=f"fetch it with `spanker pull {NAME}`"):
            resolve(NAME)
    fake.cached = str(tmp_path / "blob")
    assert resolve(NAME) == tmp_path / "blob"
    assert resolve(Path(NAME)) == tmp_path / "blob"
    assert resolve("hf:o/r@v2/a/f.gguf") == tmp_path / "blob"
    assert fake.asked[0] == ("sails/tiny-GGUF", "tiny.Q4_0.gguf", "main")
    assert fake.asked[-1] == ("o/r", "a/f.gguf", "v2")
    assert fake.calls == []


def test_pull_fetches_what_the_cache_lacks(fake: FakeHub, tmp_path: Path) -> None:
    assert pull("hf:o/r@v2/a/f.gguf") == fake.file
    [call] = fake.calls
    del call["tqdm_class"]
    assert call == {
        "repo": "o/r",
        "file": "a/f.gguf",
        "revision": "v2",
        "force_download": False,
        "library_name": "spanker",
        "library_version": __version__,
    }
    fake.cached = str(tmp_path / "blob")
    assert pull(NAME) == tmp_path / "blob"
    assert len(fake.calls) == 1
    assert pull(NAME, force=True) == fake.file
    assert fake.calls[1]["force_download"] is True


def test_progress_is_that_of_the_bar_that_is_furthest(
    fake: FakeHub, capfd: pytest.CaptureFixture[str]
) -> None:
    def download(bar: type[Any]) -> None:
        with bar(total=100, initial=10, desc="f", name="http", disable=None, unit="B") as unpacked:
            with bar(total=None, desc="arrived") as arrived:
                arrived.update(90)
                unpacked.update(30)
                unpacked.set_description("f")
                unpacked.update(0)
                unpacked.update(-20)
                unpacked.update(80)

    fake.download = download
    seen: list[tuple[str, int, int]] = []
    pull(NAME, progress=lambda *step: seen.append(step))
    assert seen == [("download", n, 100) for n in (10, 40, 40, 100)]
    assert capfd.readouterr() == ("", "")


def test_the_library_says_nothing_itself_while_it_downloads(fake: FakeHub) -> None:
    logger = logging.getLogger("huggingface_hub")
    levels = []
    fake.download = lambda bar: levels.append(logger.getEffectiveLevel())
    before = logger.level
    pull(NAME)
    fake.fails(OSError("broken"))
    with pytest.raises(DownloadError):
        pull(NAME)
    assert levels == [logging.ERROR] and logger.level == before


# --- a hub that refuses, or is not there ------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "sails/tiny-GGUF is gated: accept its terms .* `hf auth login`"),
        ("RepositoryNotFoundError", "there is no repository sails/tiny-GGUF, or it is private"),
        ("RevisionNotFoundError", "sails/tiny-GGUF has no revision main: check"),
        ("EntryNotFoundError", "has no file tiny.Q4_0.gguf in its revision main: check"),
        ("LocalEntryNotFoundError", r"the hub cannot be reached \(no\nroute\): check the network"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_to_do(kind: str, message: str, fake: FakeHub) -> None:
    fake.fails(getattr(fake.errors, kind)("a long\nstory"), ConnectionError("no\nroute"))
    with pytest.raises(DownloadError, match=message.replace(r"\n", " ")) as caught:
        pull(NAME)
    assert str(caught.value).startswith(f"cannot pull {NAME}: ") and "\n" not in str(caught.value)


def test_what_made_a_forced_download_fail_is_said(fake: FakeHub) -> None:
    cause = fake.errors.GatedRepoError("403")
    fake.fails(ValueError("Force download failed due to the above error."), cause)
    with pytest.raises(DownloadError, match="is gated"):
        pull(NAME, force=True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full: free some space"),
        (OSError("Consistency check failed:\nsize"), "check failed: size; check the network"),
        (RuntimeError(), "RuntimeError; check the network"),
    ],
)
def test_other_failures_are_one_line(error: Exception, message: str, fake: FakeHub) -> None:
    fake.fails(error)
    with pytest.raises(DownloadError, match=message) as caught:
        pull(NAME)
    assert "\n" not in str(caught.value)


def test_an_interrupt_passes(fake: FakeHub) -> None:
    def download(bar: type[Any]) -> None:
        raise KeyboardInterrupt

    fake.download = download
    with pytest.raises(KeyboardInterrupt):
        pull(NAME)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (resolve, pull):
        with pytest.raises(ModelNotFoundError, match=r"pip install 'spanker\[hf\]'"):
            call(NAME)


@pytest.mark.parametrize("version", ["0.36.2", "1.0.1", "unknown"])
def test_an_old_library_is_refused(version: str, fake: FakeHub) -> None:
    fake.module.__version__ = version  # type: ignore[attr-defined]
    with pytest.raises(ModelNotFoundError, match=f"1.1 or later, got {version}: pip install"):
        resolve(NAME)
    fake.module.__version__ = "12.0.0.dev0"  # type: ignore[attr-defined]
    assert pull(NAME) == fake.file


# --- the real library, as far as there is no network --------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the hub's library lays it out: a tiny model at a commit that is `main`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = root / "models--sails--tiny-GGUF"
    snapshot = repo / "snapshots" / COMMIT
    for directory in (repo / "blobs", repo / "refs", snapshot / "more"):
        directory.mkdir(parents=True)
    write_tiny_llama(repo / "blobs" / "abc")
    (repo / "refs" / "main").write_text(COMMIT)
    (snapshot / "tiny.Q4_0.gguf").symlink_to("../../blobs/abc")
    (snapshot / "more" / "tiny.gguf").symlink_to("../../../blobs/abc")
    return snapshot


def test_the_real_cache_is_found(cache: Path) -> None:
    assert resolve(NAME) == pull(NAME) == cache / "tiny.Q4_0.gguf"
    assert resolve("hf:sails/tiny-GGUF/more/tiny.gguf") == cache / "more" / "tiny.gguf"
    assert resolve(f"hf:sails/tiny-GGUF@{COMMIT}/tiny.Q4_0.gguf") == cache / "tiny.Q4_0.gguf"
    for absent in (
        "hf:sails/tiny-GGUF/other.gguf",
        "hf:sails/tiny-GGUF@v2/tiny.Q4_0.gguf",
        "hf:sails/other/tiny.Q4_0.gguf",
    ):
        with pytest.raises(ModelNotFoundError, match=f"`spanker pull {absent}`"):
            resolve(absent)


def test_the_real_library_refuses_names_by_its_own_rules(cache: Path) -> None:
    for call in (resolve, pull, partial(pull, force=True)):
        with pytest.raises(ModelNotFoundError, match=r"no model 'hf:a--b/c/f\.gguf': .*--"):
            call("hf:a--b/c/f.gguf")


@pytest.mark.parametrize("force", [False, True])
def test_the_real_library_without_a_network(force: bool, cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot pull hf:a/b/c.gguf: .*(?i:offline)") as caught:
        pull("hf:a/b/c.gguf", force=force)
    assert "\n" not in str(caught.value)


def test_the_real_errors_are_those_that_are_told_apart() -> None:
    errors = pytest.importorskip("huggingface_hub.errors")
    for name in (
        "GatedRepoError",
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "LocalEntryNotFoundError",
        "EntryNotFoundError",
    ):
        assert issubclass(getattr(errors, name), Exception)
    assert issubclass(errors.GatedRepoError, errors.RepositoryNotFoundError)
    assert hub.FORM.startswith(hub.PREFIX)
