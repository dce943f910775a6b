# SPDX-License-Identifier: Apache-2.0
"""The only module that imports the compiled library: names, statuses, instruction sets.

The declarations are those of spanker/kernels/csrc/spk_kernels.h, spanker/device/csrc/spk_card.h and
spanker/ggml/csrc/spk_vocabulary.h.
"""

from __future__ import annotations

import os

from spanker.errors import (
    CardAbortedError,
    CardCommandError,
    CardError,
    CardFaultError,
    CardLinkError,
    CardLostError,
    CardMemoryError,
    ConfigError,
    SpankerError,
)

try:
    from spanker._native import ffi, lib
except ImportError as error:  # pragma: no cover - a broken installation
    raise SpankerError(
        f"the native part of spanker is not built ({error}): run `pip install .` in its source"
    ) from error

__all__ = ["ISAS", "check", "default_isa", "ffi", "isa_number", "isas", "lib", "status_error"]

ISAS: dict[str, int] = {
    "scalar": lib.SPK_ISA_SCALAR,
    "avx2": lib.SPK_ISA_AVX2,
    "avx512vnni": lib.SPK_ISA_AVX512VNNI,
    "neon": lib.SPK_ISA_NEON,
    "rvv": lib.SPK_ISA_RVV,
    "xpop": lib.SPK_ISA_XPOP,
}

_ERRORS: dict[int, tuple[type[CardError], str]] = {
    lib.SPK_E_ARG: (CardCommandError, "invalid argument"),
    lib.SPK_E_NONFINITE: (CardFaultError, "a NaN or an infinity appeared in the activations"),
    lib.SPK_E_F16_RANGE: (
        CardFaultError,
        "an activation scale, key or value does not fit into f16",
    ),
    lib.SPK_E_NOMEM: (CardMemoryError, "out of card memory"),
    lib.SPK_E_BOUNDS: (CardCommandError, "an access outside of its buffer"),
    lib.SPK_E_HANDLE: (CardCommandError, "no such buffer or program"),
    lib.SPK_E_BUSY: (CardCommandError, "busy: the queue is full, or the object is in use"),
    lib.SPK_E_PARAMS: (CardCommandError, "the step's parameters do not fit the program"),
    lib.SPK_E_ABORTED: (CardAbortedError, "the step was aborted"),
    lib.SPK_E_LINK: (CardLinkError, "a link message failed its checks"),
    lib.SPK_E_LOST: (
        CardLostError,
        "the card is gone; close the fleet and open it without that card",
    ),
    lib.SPK_E_RESET: (
        CardLostError,
        "{card} has been reset, and all it held is lost; open it again",
    ),
    lib.SPK_E_MEMORY: (
        CardLostError,
        "{card} has had an uncorrected memory error, and what it holds cannot be trusted; "
        "open it again",
    ),
    lib.SPK_E_SYSTEM: (CardError, "the operating system refused memory, a thread or a descriptor"),
}


def status_error(status: int, what: str, *, card: int | None = None, detail: str = "") -> CardError:
    """The exception for a status other than SPK_OK, its text starting with `what`."""
    kind, text = _ERRORS.get(status, (CardError, f"unknown status {status}"))
    # Of a lost card the native side knows no detail.
    if kind is CardLostError:
        detail = text.format(card="the card" if card is None else f"card {card}")
    return kind(f"{what}: {detail or text}", card=card)


def check(status: int, what: str, *, card: int | None = None, detail: str = "") -> None:
    """Raise the exception for `status` unless it is SPK_OK."""
    if status != lib.SPK_OK:
        raise status_error(status, what, card=card, detail=detail)


def isas() -> tuple[str, ...]:
    """The instruction sets that this build has and this machine runs, slowest first."""
    return tuple(name for name, number in ISAS.items() if lib.spk_kernels_get(number) != ffi.NULL)


def isa_number(name: str) -> int:
    """The number of an instruction set; ConfigError when this machine cannot run it."""
    if name not in isas():
        raise ConfigError(
            f"instruction set {name!r} is not available here: expected one of {', '.join(isas())}"
        )
    return ISAS[name]


def default_isa() -> str:
    """$SPANKER_ISA if set, else the fastest of this machine."""
    name = os.environ.get("SPANKER_ISA", "")
    if name:
        isa_number(name)
        return name
    return isas()[-1]
