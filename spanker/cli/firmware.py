# SPDX-License-Identifier: Apache-2.0
"""`spanker firmware check`: what is in a firmware image, and whether a card would take it."""

from __future__ import annotations

import os

from spanker.cli import terminal
from spanker.device.firmware import read_firmware


def check(path: str, *, as_json: bool) -> None:
    """Print what is in an image; FirmwareError where it is no good."""
    image = read_firmware(path)
    memory = sum(segment.memory_bytes for segment in image.segments)
    if as_json:
        terminal.emit_json(
            {
                "path": os.path.abspath(path),
                "bytes": len(image.data),
                "isa": image.isa,
                "abi": list(image.abi),
                "semantics": image.semantics,
                "entry": image.entry,
                "memory_bytes": memory,
                "sha256": image.sha256,
                "kernels": [
                    {"op": k.op.name.lower(), "format": k.format, "symbol": k.symbol}
                    for k in image.kernels
                ],
            }
        )
        return
    terminal.show(
        terminal.facts(
            [
                ("image", f"{path}, {len(image.data):,} bytes"),
                ("instructions", image.isa),
                ("interface", f"{image.abi[0]}.{image.abi[1]}, semantics {image.semantics}"),
                (
                    "memory",
                    f"{terminal.size(memory)} in {len(image.segments)} segments, entry "
                    f"{image.entry:#x}",
                ),
                ("SHA-256", f"{image.sha256}, as its note says"),
            ]
        )
    )
    terminal.emit("")
    kernels = terminal.table("operation", ">format", "symbol", ">address")
    for kernel in image.kernels:
        kernels.add_row(
            kernel.op.name.lower(), str(kernel.format), kernel.symbol, f"{kernel.address:#x}"
        )
    terminal.show(kernels)
