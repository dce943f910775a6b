# SPDX-License-Identifier: Apache-2.0
"""The firmware of RISC-V cards and the emulator that runs it here: found, checked, made a command.

What runs is what was checked: the bytes of the image are copied into memory of their own, which
nobody else has, and the emulator is given that.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import attrs

import spanker
from spanker.device.firmware import Firmware, read_firmware
from spanker.device.process import Launch
from spanker.device.riscv.spec import RiscvCardSpec
from spanker.errors import ConfigError, FirmwareError

VARIABLE = "SPANKER_FIRMWARE"
EMULATORS = ("qemu-riscv64", "qemu-riscv64-static")
BUILT = Path(spanker.__file__).resolve().parent.parent / "build" / "spanker-firmware.elf"


def find_emulator() -> str:
    """QEMU's user emulation of riscv64 on the PATH; ConfigError says how to get it."""
    for name in EMULATORS:
        if found := shutil.which(name):
            return found
    raise ConfigError(
        f"RISC-V cards need {EMULATORS[0]}, which is not on the PATH: install the package "
        f"qemu-user (or qemu-user-static)"
    )


def firmware_path() -> Path:
    """$SPANKER_FIRMWARE, or what `make firmware` has built; ConfigError where there is neither."""
    named = os.environ.get(VARIABLE)
    path = Path(named) if named else BUILT
    if path.is_file():
        return path
    if named:
        raise ConfigError(f"{VARIABLE} names {named}, and there is no such file")
    raise ConfigError(
        f"RISC-V cards need firmware: run `make firmware` in Spanker's source, or have {VARIABLE} "
        f"name an image"
    )


@attrs.frozen
class Emulator:
    """A checked image, and what runs it.  `close` it when no card is to be started any more."""

    path: str
    firmware: Firmware
    _file: int

    @classmethod
    def find(cls) -> Emulator:
        """Raises ConfigError where something is missing, FirmwareError for a bad image."""
        path, image = find_emulator(), firmware_path()
        firmware = read_firmware(image)
        file = os.memfd_create("spanker-firmware", os.MFD_CLOEXEC)
        try:
            os.fchmod(file, 0o500)
            with open(file, "wb", closefd=False) as memory:
                memory.write(firmware.data)
            return cls(path, firmware, file)
        except BaseException:
            os.close(file)
            raise

    def launch(self, spec: RiscvCardSpec) -> Launch:
        """What starts a card of this kind."""
        # Anything beyond what the vector specification promises is ones, which code that relies
        # on more does not survive.
        cpu = f"rv64,v=true,vlen={spec.vlen},vext_spec=v1.0,rvv_ta_all_1s=true,rvv_ma_all_1s=true"
        image = f"/proc/self/fd/{self._file}"
        return Launch((self.path, "-cpu", cpu, image), (self._file,))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._file)


@attrs.frozen
class Seen:
    """What there is, for people: `problem` says what is missing, one line."""

    emulator: str = ""
    path: str = ""
    firmware: Firmware | None = None
    problem: str = ""


def survey() -> Seen:
    """Look for the emulator and the firmware; raises nothing."""
    emulator = path = ""
    try:
        emulator = find_emulator()
        path = str(firmware_path())
        return Seen(emulator, path, read_firmware(path))
    except (ConfigError, FirmwareError) as error:
        return Seen(emulator, path, problem=str(error))
