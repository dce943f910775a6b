# SPDX-License-Identifier: Apache-2.0
"""A virtual machine whose PCI bus carries the cards of a card server, judged by its console.

QEMU comes from a newer release than this machine's, one that has `vfio-user-pci`, and runs from a
tree of its own through that tree's dynamic loader.  Always -accel tcg: what works there works
everywhere, on machines with and without virtualisation.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from host import (
    CACHE,
    HERE,
    ROOT,
    WORK,
    Failure,
    debian_tree,
    key_of,
    last_lines,
    run,
    say,
    start,
    stop,
)

SUITE, BACKPORTS = "trixie", "trixie-backports"
SERVER = ROOT / "build" / "spanker-card-server"
SERVER_READY_S = 20
DUMP_S = 20
POWER_OFF_S = 10
MONITOR = "monitor.sock"
MONITOR_S = 10
MIB = 1 << 20


# --- QEMU -----------------------------------------------------------------------------------------


def qemu() -> list[str]:
    """The command that begins every machine."""
    tree = debian_tree(
        CACHE / f"qemu-{key_of(SUITE, BACKPORTS)}",
        SUITE,
        ["qemu-system-x86"],
        suites=[BACKPORTS],
        prefer=BACKPORTS,
    )
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    return [
        str(libraries / "ld-linux-x86-64.so.2"),
        "--library-path",
        str(libraries),
        str(tree / "usr/bin/qemu-system-x86_64"),
        "-L",
        str(tree / "usr/share/qemu"),
        "-L",
        str(tree / "usr/share/seabios"),
    ]


def environment() -> dict[str, str]:
    tree = CACHE / f"qemu-{key_of(SUITE, BACKPORTS)}"
    return {**os.environ, "QEMU_MODULE_DIR": str(tree / "usr/lib/x86_64-linux-gnu/qemu")}


def check_qemu() -> None:
    version = run([*qemu(), "--version"], env=environment()).splitlines()[0]
    devices = run([*qemu(), "-device", "help"], env=environment())
    if "vfio-user-pci" not in devices:
        raise Failure(f"{version}: has no device vfio-user-pci; QEMU 10.1 or newer has")
    say(version)


# --- what the machine starts from -----------------------------------------------------------------


def cpio(files: dict[str, tuple[int, bytes, float]]) -> bytes:
    """An initramfs archive ("newc") of files: name -> (mode, contents, time of change)."""
    out = io.BytesIO()

    def entry(name: str, mode: int, contents: bytes, mtime: float) -> None:
        fields = [0, mode, 0, 0, 1, int(mtime), len(contents), 0, 0, 0, 0, len(name) + 1, 0]
        out.write(b"070701" + b"".join(b"%08X" % number for number in fields))
        out.write(name.encode() + b"\0")
        out.write(b"\0" * (-out.tell() % 4))
        out.write(contents)
        out.write(b"\0" * (-out.tell() % 4))

    directories = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    for name in sorted(directories):
        entry(name, stat.S_IFDIR | 0o755, b"", 0)
    for name, (mode, contents, mtime) in files.items():
        entry(name, stat.S_IFREG | mode, contents, mtime)
    entry("TRAILER!!!", 0, b"", 0)
    # The kernel takes several archives one after the other; each begins at a multiple of 4.
    out.write(b"\0" * (-out.tell() % 512))
    return out.getvalue()


def file_entry(path: Path, mode: int = 0o755) -> tuple[int, bytes, float]:
    return (mode, path.read_bytes(), path.stat().st_mtime)


@dataclass
class Guest:
    """One boot: what runs, on which kernel, with which cards."""

    name: str
    image: Path
    script: str  # for busybox's shell; `step NAME COMMAND...` ends it when the command fails
    cards: int = 0
    ddr_bytes: int = 64 * MIB
    memory_bytes: int = 512 * MIB
    timeout_s: float = 240
    disk: Path | None = None
    modules: list[tuple[str, bytes]] = field(default_factory=list)
    files: dict[str, tuple[int, bytes, float]] = field(default_factory=dict)
    isa: str = ""

    def initramfs(self) -> bytes:
        files = {
            "init": file_entry(HERE / "guest/init"),
            "bin/busybox": file_entry(Path("/bin/busybox")),
            "run.sh": (0o644, self.script.encode(), 0),
        }
        # In the order of their names, which is the order to load them in.
        for index, (name, contents) in enumerate(self.modules):
            files[f"modules/{index:02}-{name}"] = (0o644, contents, 0)
        return cpio({**files, **self.files})


# --- the machine ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _card_server(guest: Guest, sockets: Path, log: Path) -> Iterator[list[Path]]:
    if guest.cards == 0:
        yield []
        return
    command = [SERVER, "--dir", sockets, "--cards", guest.cards, "--ddr", guest.ddr_bytes]
    command += ["--isa", guest.isa] if guest.isa else []
    with log.open("wb") as errors:
        process = start(
            [*command, "--faults"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        )
    try:
        said: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=lambda: said.put(process.stdout.readline()), daemon=True).start()
        try:
            ready = said.get(timeout=SERVER_READY_S)
        except queue.Empty:
            ready = b""
        if not ready.startswith(b"ready:"):
            raise Failure(
                f"{SERVER.name} is not ready after {SERVER_READY_S} s, said {ready!r}\n"
                + last_lines(log.read_text(errors="replace"), 20)
            )
        yield [sockets / f"card{index}.sock" for index in range(guest.cards)]
        if process.poll() is not None:
            raise Failure(
                f"{SERVER.name} ended by itself, status {process.returncode}\n"
                + last_lines(log.read_text(errors="replace"), 20)
            )
    finally:
        stop(process)


def boot(guest: Guest) -> list[str]:
    """Run a machine to its end; the lines of its console, if the last word is MACHINE ok."""
    logs = WORK / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # Socket paths have to be short, whatever the tree's place.
    scratch = Path(tempfile.mkdtemp(prefix="spanker-vm-"))
    try:
        initramfs = scratch / "initramfs"
        initramfs.write_bytes(guest.initramfs())
        with _card_server(guest, scratch, logs / f"{guest.name}.server") as sockets:
            return _run(guest, scratch, sockets, logs / f"{guest.name}.console")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _command(guest: Guest, scratch: Path, sockets: list[Path]) -> list[object]:
    memory = f"{guest.memory_bytes // MIB}M"
    command: list[object] = [
        *qemu(),
        *("-M", "q35,memory-backend=ram", "-m", memory),
        # Shared: the cards read and write the machine's memory themselves.
        *("-object", f"memory-backend-memfd,id=ram,size={memory},share=on"),
        *("-accel", "tcg", "-cpu", "max", "-smp", "2"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", "stdio"),
        *("-monitor", f"unix:{scratch / MONITOR},server=on,wait=off"),
        *("-kernel", guest.image, "-initrd", scratch / "initramfs"),
        *("-append", "console=ttyS0 panic=-1 oops=panic quiet loglevel=5"),
    ]
    if guest.disk is not None:
        command += ["-drive", f"file={guest.disk},if=none,id=disk,format=raw,readonly=on"]
        command += ["-device", "virtio-blk-pci,drive=disk"]
    for index, path in enumerate(sockets):
        command += ["-device", f"pcie-root-port,id=rp{index},chassis={index},slot={index}"]
        device = (
            f'{{"driver":"vfio-user-pci","id":"card{index}","bus":"rp{index}","rombar":0,'
            f'"socket":{{"type":"unix","path":"{path}"}}}}'
        )
        command += ["-device", device]
    return command


def _tell_monitor(path: Path, command: str) -> None:
    """Have QEMU do something to the machine, as the machine itself has asked."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(MONITOR_S)
        monitor.connect(str(path))
        monitor.sendall(command.encode() + b"\n")
        # QEMU forgets what it has not read when the other end goes: until it asks for more.
        answer = b""
        while answer.count(b"(qemu) ") < 2:
            got = monitor.recv(4096)
            if not got:
                break
            answer += got


def _run(guest: Guest, scratch: Path, sockets: list[Path], log: Path) -> list[str]:
    process = start(
        _command(guest, scratch, sockets),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
    )
    console: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            console.put(line.decode(errors="replace").rstrip("\r\n"))
        console.put(None)

    threading.Thread(target=read, daemon=True).start()
    lines: list[str] = []
    console_log = log.open("w", buffering=1)  # by lines, so that one can look on
    result = ""
    deadline = time.monotonic() + guest.timeout_s
    why = f"{guest.name}: the machine stopped without a result"

    def listen(until: str, deadline: float) -> bool:
        """Read lines up to one that begins so; False when there will be no more."""
        nonlocal result
        while True:
            line = console.get(timeout=max(0.0, deadline - time.monotonic()))
            if line is None:
                return False
            lines.append(line)
            console_log.write(line + "\n")
            if line.startswith("STEP "):
                say(line.removeprefix("STEP "))
            if line.startswith("MONITOR "):
                _tell_monitor(scratch / MONITOR, line.removeprefix("MONITOR "))
            if line.startswith("MACHINE "):
                result = line.removeprefix("MACHINE ").strip()
            if line.startswith(until):
                return True

    try:
        if listen("MACHINE ", deadline):
            with contextlib.suppress(queue.Empty):
                listen("\0", time.monotonic() + POWER_OFF_S)
    except queue.Empty:
        why = f"{guest.name}: no result within {guest.timeout_s:.0f} s; what it was doing is below"
        with contextlib.suppress(queue.Empty, BrokenPipeError):
            process.stdin.write(b"dump\n")
            process.stdin.flush()
            listen("DUMP done", time.monotonic() + DUMP_S)
    finally:
        stop(process)
        console_log.close()
    if result == "ok":
        return lines
    if result:
        why = f"{guest.name}: the machine's result is {result!r}"
    raise Failure(f"{why}\n{last_lines(chr(10).join(lines), 150)}\n   all of it: {log}")
