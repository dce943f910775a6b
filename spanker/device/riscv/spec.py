# SPDX-License-Identifier: Apache-2.0
"""Which RISC-V cards; apart from them, since most fleets have none."""

from __future__ import annotations

import attrs

from spanker.errors import ConfigError
from spanker.values import Value

# The emulator keeps account of every page.
DEFAULT_DDR_BYTES = 1 << 30
DDR_BYTES_MAX = 16 << 30
ISAS = ("scalar", "rvv", "xpop")
VLENS = (128, 256, 512, 1024)


@attrs.frozen(eq=False, repr=False)
class RiscvCardSpec(Value):
    """How to make one RISC-V card.  `isa` is that of its kernels, None for the firmware's best;
    `vlen` the bits of a vector register."""

    isa: str | None = None
    vlen: int = 128
    ddr_bytes: int = DEFAULT_DDR_BYTES


def card_spec(options: str | None, ddr_bytes: int | None) -> RiscvCardSpec:
    """Of `rvv`, `vlen256` or `rvv_vlen256`; ConfigError for anything else."""
    isa, vlen = None, 128
    for option in options.split("_") if options else ():
        if option in ISAS and isa is None:
            isa = option
        elif option.startswith("vlen") and option[4:] in map(str, VLENS):
            vlen = int(option[4:])
        else:
            raise ConfigError(
                f"no option {option!r} of a RISC-V card: expected one of {', '.join(ISAS)}, and "
                f"vlen{', vlen'.join(map(str, VLENS))}, as in riscv:2@rvv_vlen256"
            )
    nbytes = DEFAULT_DDR_BYTES if ddr_bytes is None else ddr_bytes
    if not 64 <= nbytes <= DDR_BYTES_MAX:
        raise ConfigError(
            f"a RISC-V card has 64 to {DDR_BYTES_MAX:,} bytes of DDR, not {nbytes:,}: the emulator "
            f"keeps account of every page"
        )
    return RiscvCardSpec(isa, vlen, nbytes)
