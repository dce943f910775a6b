# SPDX-License-Identifier: Apache-2.0
"""The interface of the kernel module, name by name: driver/include/uapi/spanker_ioctl.h.

Here lives what is true of any caller: each function is one ioctl, checks lengths, and turns an
errno into an exception that names the ioctl and the device.  What a card makes of it is in
kernel.py.  The structures are laid out by the compiler, from the module's own header.

A `System` is how the kernel is reached.  Tests put another one in its place, which answers as the
module would.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from typing import Any, Protocol

import attrs

from spanker.device.kernel.spec import CONTROL, DEVICE_DIR
from spanker.errors import CardCommandError, CardError, CardLostError, DriverError, IoctlError
from spanker.native import ffi, lib

VERSION = (int(lib.SPANKER_UAPI_MAJOR), int(lib.SPANKER_UAPI_MINOR), int(lib.SPANKER_UAPI_PATCH))
PROGRAM_BYTES_MAX = int(lib.SPANKER_PROGRAM_BYTES_MAX)
PARAMETERS_BYTES_MAX = int(lib.SPANKER_PARAMETERS_BYTES_MAX)
READS_MAX = int(lib.SPANKER_READS_MAX)
READ_BYTES_MAX = int(lib.SPANKER_READ_BYTES_MAX)
IMAGE_BYTES_MAX = int(lib.SPANKER_IMAGE_BYTES_MAX)
FLAG_EMULATED = int(lib.SPANKER_INFO_EMULATED)
FLAG_FAILED = int(lib.SPANKER_INFO_FAILED)
FLAG_GONE = int(lib.SPANKER_INFO_GONE)
LINK_TRAINING = int(lib.SPANKER_LINK_TRAINING)
LINK_UP = int(lib.SPANKER_LINK_UP)

# What poll(2) answers, as on every Linux.
POLL_IN, POLL_ERR, POLL_HUP = 0x1, 0x8, 0x10

_NAMES: dict[int, str] = {
    int(getattr(lib, f"SPANKER_IOC_{name}")): name
    for name in (
        *("PING", "GET_VERSION", "INFO", "BUFFER_CREATE", "BUFFER_DESTROY", "PROGRAM_LOAD"),
        *("PROGRAM_UNLOAD", "SUBMIT", "COLLECT", "WAIT", "ABORT", "RESET", "LINK", "LINK_CONTROL"),
        *("TELEMETRY", "IMAGE"),
    )
}


# Of COLLECT.
_NO_MORE = (errno.ESHUTDOWN, errno.ENODEV, errno.ESTALE, errno.EIO)


class System(Protocol):
    """What is asked of the operating system.  Numbers below 0 are -errno."""

    def open(self, path: str) -> int: ...
    def close(self, fd: int) -> None: ...
    def exists(self, path: str) -> bool: ...
    def ioctl(self, fd: int, request: int, argument: Any) -> int: ...
    def map(self, fd: int, offset: int, nbytes: int) -> Any:
        """A pointer to `nbytes` of memory, or -errno."""

    def unmap(self, at: Any, nbytes: int) -> None: ...
    def poll(self, fd: int) -> int: ...
    def lock(self, fd: int) -> bool:
        """Take the device for this file alone, among those who ask; False where it is taken."""


class Linux:
    """The real one."""

    def open(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            return -(error.errno or errno.EIO)

    def close(self, fd: int) -> None:
        os.close(fd)

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def ioctl(self, fd: int, request: int, argument: Any) -> int:
        return int(lib.spk_driver_ioctl(fd, request, argument))

    def map(self, fd: int, offset: int, nbytes: int) -> Any:
        at = ffi.new("void **")
        status = int(lib.spk_driver_map(fd, offset, nbytes, at))
        return status or at[0]

    def unmap(self, at: Any, nbytes: int) -> None:
        lib.spk_driver_unmap(at, nbytes)

    def poll(self, fd: int) -> int:
        return int(lib.spk_driver_poll(fd))

    def lock(self, fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


LINUX: System = Linux()


def error_text(number: int) -> str:
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"


@attrs.frozen
class Version:
    """Of the module that is loaded."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


@attrs.frozen
class Info:
    """What the module says of a card: struct spanker_info, sizes in bytes."""

    number: int
    flags: int
    serial: int
    ddr_bytes: int
    ddr_free: int
    mappable: int
    card_major: int
    card_minor: int
    semantics: int
    programs: int
    links: int
    generation: int
    queue_max: int
    epoch: int
    sku: str
    name: str
    isa: str

    @property
    def emulated(self) -> bool:
        """Whether it is a program, no silicon."""
        return bool(self.flags & FLAG_EMULATED)

    @property
    def failed(self) -> bool:
        """Whether nothing works until a reset."""
        return bool(self.flags & FLAG_FAILED)


@attrs.frozen
class LinkInfo:
    """One link of a card: struct spanker_link.  `peer` is a serial number, 0 where nobody is."""

    link: int
    state: int
    errors: int
    peer: int
    tx_bytes: int
    rx_bytes: int


@attrs.frozen
class Telemetry:
    """struct spanker_telemetry; `waiting_for` is a link, or None."""

    temperature_mc: int
    ecc_corrected: int
    ecc_uncorrected: int
    waiting_for: int | None
    steps: int
    commands: int
    busy_ns: int
    ddr_read_bytes: int
    ddr_written_bytes: int
    progress: int
    queued: int
    ddr_used: int


@attrs.frozen
class NewBuffer:
    """What BUFFER_CREATE gives; `mmap_offset` is 0 where the buffer cannot be mapped."""

    handle: int
    mmap_offset: int


@attrs.frozen
class Collected:
    """One completion; `error` is 0 or a negative errno, `data` the bytes of the step's reads."""

    fence: int
    busy_ns: int
    error: int
    command: int
    data: bytes


class DeviceFile:
    """An open device of the module: a card, or /dev/spankerctl.  `close` is idempotent.

    `card` is what errors call it by, None for its path alone.
    """

    def __init__(self, path: str, *, card: int | None = None, system: System | None = None) -> None:
        self.path = path
        self.card = card
        self.system = system or LINUX
        self._fd = self.system.open(path)
        if self._fd < 0:
            raise _open_error(path, -self._fd, self.system)
        self._collect = ffi.new("struct spanker_collect *")
        self._room = ffi.new("char[]", 4096)

    @property
    def fd(self) -> int:
        """CardLostError after close."""
        if self._fd < 0:
            raise CardLostError(f"{self._who} is closed", card=self.card)
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self.system.close(fd)

    def __enter__(self) -> DeviceFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _who(self) -> str:
        return self.path if self.card is None else f"card {self.card}"

    def _try(self, request: int, argument: Any = ffi.NULL) -> int:
        """0, or a positive errno; CardLostError where the card is gone, failed or was reset."""
        number = -self.system.ioctl(self.fd, request, argument)
        if number in (errno.ENODEV, errno.ESTALE) or (number == errno.EIO and self._is_broken()):
            raise self.lost(number)
        return number

    def _is_broken(self) -> bool:
        """Whether nothing works any more."""
        return bool(self.poll() & (POLL_ERR | POLL_HUP))

    def _call(self, request: int, argument: Any = ffi.NULL) -> None:
        number = self._try(request, argument)
        if number:
            name = _NAMES[request]
            raise IoctlError(
                f"{self._who}: SPANKER_IOC_{name} on {self.path} failed: {error_text(number)}",
                number=number,
                name=name,
                card=self.card,
            )

    def lost(self, number: int = errno.ENODEV) -> CardLostError:
        """The error of a card that is gone (ENODEV), has failed (EIO), or was reset by somebody
        (ESTALE)."""
        if number == errno.ESTALE:
            what = "was reset since it was opened, and all it held is lost"
            then = "admit it to the fleet again, or open the fleet again"
        elif number == errno.EIO:
            what = "has failed"
            then = "admit it to the fleet again, or open the fleet again: both reset the card"
        else:
            what = "is gone"
            then = "admit it once it is back, or open the fleet without that card"
        who = self.path if self.card is None else f"card {self.card}: {self.path}"
        return CardLostError(f"{who} {what}; {then}", card=self.card)

    def lock(self) -> None:
        """Until `close`, nobody else who asks gets this card; CardError where somebody has it."""
        if not self.system.lock(self.fd):
            raise CardError(
                f"{self._who}: {self.path} is used by another fleet; close that one, or leave "
                f"this card out",
                card=self.card,
            )

    def poll(self) -> int:
        """POLL_IN, POLL_ERR and POLL_HUP as they are now."""
        return self.system.poll(self.fd)

    # --- one function an ioctl --------------------------------------------------------------

    def ping(self) -> None:
        self._call(lib.SPANKER_IOC_PING)

    def version(self) -> Version:
        v = ffi.new("struct spanker_version *")
        self._call(lib.SPANKER_IOC_GET_VERSION, v)
        return Version(v.major, v.minor, v.patch)

    def check_version(self) -> Version:
        """The module's version; DriverError where it speaks another language than this package."""
        found = self.version()
        # Before 1.0 a minor version may change what a structure means, as a major one may later.
        if found.major != VERSION[0] or found.minor < VERSION[1]:
            raise DriverError(
                f"{self.path}: the spanker module speaks version {found} of the interface, this "
                f"Spanker {'.'.join(map(str, VERSION))}: install the module of this version "
                f"(driver/README.md) and load it again"
            )
        return found

    def info(self) -> Info:
        i = ffi.new("struct spanker_info *")
        self._call(lib.SPANKER_IOC_INFO, i)
        names = [field.name for field in attrs.fields(Info)[:-3]]
        texts = [
            bytes(ffi.buffer(text)).rstrip(b"\0").decode("ascii", "replace")
            for text in (i.sku, i.name, i.isa)
        ]
        return Info(*[getattr(i, name) for name in names], *texts)

    def buffer_create(self, nbytes: int) -> NewBuffer:
        """A buffer in the card's DDR; IoctlError with ENOSPC or ENOMEM where there is no room."""
        b = ffi.new("struct spanker_buffer_create *")
        b.bytes, b.kind = nbytes, lib.SPANKER_BUFFER_DDR
        self._call(lib.SPANKER_IOC_BUFFER_CREATE, b)
        return NewBuffer(b.handle, b.mmap_offset)

    def buffer_destroy(self, handle: int) -> None:
        b = ffi.new("struct spanker_buffer_destroy *")
        b.handle = handle
        self._call(lib.SPANKER_IOC_BUFFER_DESTROY, b)

    def map(self, mmap_offset: int, nbytes: int) -> Any:
        """A pointer to a buffer's memory, until `unmap`."""
        at = self.system.map(self.fd, mmap_offset, nbytes)
        if isinstance(at, int):
            if -at in (errno.ENODEV, errno.ESTALE):
                raise self.lost(-at)
            raise IoctlError(
                f"{self._who}: mapping {nbytes:,} bytes of {self.path} failed: {error_text(-at)}",
                number=-at,
                name="mmap",
                card=self.card,
            )
        return at

    def unmap(self, at: Any, nbytes: int) -> None:
        self.system.unmap(at, nbytes)

    def program_load(self, program: bytes, handles: Sequence[int]) -> tuple[int, int, int, str]:
        """(errno, program's id, command at fault, why it was refused)."""
        _check_length("a program", len(program), PROGRAM_BYTES_MAX, self.card)
        p = ffi.new("struct spanker_program_load *")
        data, table = ffi.from_buffer("char[]", program), ffi.new("__u32[]", list(handles) or 1)
        why = ffi.new("char[]", int(lib.SPANKER_WHY_BYTES))
        p.program, p.program_bytes = _address(data), len(program)
        p.handles, p.handle_count = _address(table), len(handles)
        p.why = _address(why)
        number = self._try(lib.SPANKER_IOC_PROGRAM_LOAD, p)
        reason = bytes(ffi.string(why)).decode("ascii", "replace")
        return number, int(p.program_id), int(p.command), reason

    def program_unload(self, program_id: int) -> None:
        p = ffi.new("struct spanker_program_unload *")
        p.program_id = program_id
        self._call(lib.SPANKER_IOC_PROGRAM_UNLOAD, p)

    def submit(
        self, program_id: int, parameters: Any, reads: Sequence[tuple[int, int, int]]
    ) -> int:
        """The fence of a queued step; `parameters` is a buffer, `reads` (handle, offset, bytes)."""
        data = ffi.from_buffer("char[]", parameters)
        _check_length("the parameters of a step", len(data), PARAMETERS_BYTES_MAX, self.card)
        wanted: Any = ffi.NULL
        if reads:
            wanted = ffi.new("struct spanker_read[]", [(h, 0, at, n) for h, at, n in reads])
        s = ffi.new("struct spanker_submit *")
        s.program_id, s.parameters, s.parameters_bytes = program_id, _address(data), len(data)
        s.read_count, s.reads = len(reads), _address(wanted)
        self._call(lib.SPANKER_IOC_SUBMIT, s)
        return int(s.fence)

    def collect(self, nbytes: int) -> Collected | int:
        """The oldest completion, whose reads are `nbytes`; never waits.  Or a positive errno:
        EAGAIN for none, and ESHUTDOWN, ENODEV, ESTALE or EIO where there will be no more, as the
        card is gone, was reset, or has failed."""
        if nbytes > len(self._room):
            self._room = ffi.new("char[]", nbytes)
        c = self._collect
        c.timeout_ns, c.results, c.results_bytes = 0, _address(self._room), nbytes
        c.fence = c.busy_ns = c.error = c.command = c.flags = c.reserved = 0
        number = -self.system.ioctl(self.fd, lib.SPANKER_IOC_COLLECT, c)
        if number == errno.EAGAIN or number in _NO_MORE:
            return number
        if number:
            raise IoctlError(
                f"{self._who}: SPANKER_IOC_COLLECT on {self.path} failed: {error_text(number)}",
                number=number,
                name="COLLECT",
                card=self.card,
            )
        data = b"" if c.error else bytes(ffi.buffer(self._room, c.results_bytes))
        return Collected(int(c.fence), int(c.busy_ns), int(c.error), int(c.command), data)

    def abort(self, epoch: int) -> None:
        a = ffi.new("struct spanker_abort *")
        a.epoch = epoch
        self._call(lib.SPANKER_IOC_ABORT, a)

    def reset(self) -> None:
        """Every file of the card that is open, this one too, can only be closed afterwards."""
        self._call(lib.SPANKER_IOC_RESET)

    def link(self, number: int) -> LinkInfo:
        i = ffi.new("struct spanker_link *")
        i.link = number
        self._call(lib.SPANKER_IOC_LINK, i)
        return LinkInfo(i.link, i.state, i.errors, i.peer, i.tx_bytes, i.rx_bytes)

    def link_control(self, number: int, *, up: bool) -> None:
        """Whether this end wants a link up."""
        c = ffi.new("struct spanker_link_control *")
        c.link, c.up = number, up
        self._call(lib.SPANKER_IOC_LINK_CONTROL, c)

    def telemetry(self) -> Telemetry:
        t = ffi.new("struct spanker_telemetry *")
        self._call(lib.SPANKER_IOC_TELEMETRY, t)
        names = [field.name for field in attrs.fields(Telemetry)]
        out = Telemetry(*[getattr(t, name) for name in names])
        return attrs.evolve(out, waiting_for=None) if t.waiting_for == 0xFFFFFFFF else out

    def image(self, image: bytes) -> None:
        """Give the card a firmware image; CardCommandError where it takes none."""
        _check_length("a firmware image", len(image), IMAGE_BYTES_MAX, self.card)
        i = ffi.new("struct spanker_image *")
        data = ffi.from_buffer("char[]", image)
        i.image, i.image_bytes = _address(data), len(image)
        number = -self.system.ioctl(self.fd, lib.SPANKER_IOC_IMAGE, i)
        if number == errno.ENODEV and not self._is_broken():
            raise CardCommandError(f"{self._who} takes no firmware image", card=self.card)
        if number in (errno.ENODEV, errno.ESTALE):
            raise self.lost(number)
        if number:
            raise IoctlError(
                f"{self._who}: SPANKER_IOC_IMAGE on {self.path} failed: {error_text(number)}",
                number=number,
                name="IMAGE",
                card=self.card,
            )


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


def _check_length(what: str, nbytes: int, most: int, card: int | None) -> None:
    if nbytes > most:
        raise CardCommandError(
            f"{'' if card is None else f'card {card}: '}{what} has {nbytes:,} bytes, the kernel "
            f"module takes at most {most:,}",
            card=card,
        )


def _open_error(path: str, number: int, system: System) -> DriverError:
    """Why a device could not be opened, and what to do."""
    control = os.path.join(os.path.dirname(path), CONTROL)
    what = f"cannot open {path}: {error_text(number)}"
    if not system.exists(control):
        return DriverError(
            f"{what}: the spanker module is not loaded; load it with `modprobe spanker` (see "
            f"driver/README.md), or use emulated cards such as soft:3"
        )
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return DriverError(f"{what}: there is no such card; `spanker info` lists those there are")
    if number in (errno.EACCES, errno.EPERM):
        return DriverError(f"{what}: ask for access to the devices, or run as a user who has it")
    return DriverError(what)


def module_version(device_dir: str = DEVICE_DIR) -> Version:
    """The version of the loaded module, whichever that is; DriverError where none is."""
    with DeviceFile(os.path.join(device_dir, CONTROL)) as control:
        control.ping()
        return control.version()
