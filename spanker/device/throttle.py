# SPDX-License-Identifier: Apache-2.0
"""Throttled soft cards: what the card model in C is told of a profile, and tells of its pace.

The model itself, docs/api/timing-model.md in real time, is spanker/device/csrc/throttle.c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs

from spanker.errors import ConfigError
from spanker.native import check, ffi, lib
from spanker.sched.bandwidth import NATIVE, Profile


@attrs.frozen
class Pace:
    """What a throttled card has done by the model's clock; steps that failed do not count.

    `modelled_s` adds up all steps, `last_step_s` is the last one alone: from when the card could
    begin it to its modelled end, which was `last_end_s` after the fleet was opened.  `late_s` adds
    up how much later the steps really ended, `late_s_max` is the worst: what the machine adds to
    the model, and of which little or nothing is carried into the next step.
    """

    steps: int
    modelled_s: float
    last_step_s: float
    last_end_s: float
    late_s: float
    late_s_max: float

    @property
    def behind(self) -> float:
        """How late steps ended, as a part of what they take."""
        return self.late_s / self.modelled_s if self.modelled_s else 0.0


class Throttle:
    """Slows cards down to a profile, from before their pool starts until after it has ended.

    ConfigError for a profile that throttled cards cannot keep.
    """

    def __init__(self, handles: Sequence[Any], profile: Profile) -> None:
        check_profile(profile)
        numbers = range(len(handles))
        port = profile.port_bytes_per_s or math.inf
        speeds = []
        for number in numbers:
            card = profile.card(number)
            speeds.append(
                (
                    profile.local_ddr_bytes_per_s * card.memory,
                    profile.int8_madds_per_s * card.compute,
                    profile.float_madds_per_s * card.compute,
                    profile.elements_per_s * card.compute,
                    port,
                    profile.command_s,
                    profile.step_s,
                )
            )
        links = [profile.link(a, b) for a in numbers for b in numbers]
        status = ffi.new("int *")
        self._throttle: Any = lib.spk_throttle_create(
            list(handles),
            len(handles),
            ffi.new("struct spk_card_speed[]", speeds),
            ffi.new("struct spk_link_speed[]", [(x.bytes_per_s, x.latency_s) for x in links]),
            status,
        )
        check(status[0], f"throttling {len(handles)} cards to profile {profile.name}")

    def close(self) -> None:
        """The cards are as fast as they can again.  Idempotent."""
        throttle, self._throttle = self._throttle, ffi.NULL
        lib.spk_throttle_destroy(throttle)


def check_profile(profile: Profile) -> None:
    """Raise ConfigError unless throttled cards can keep a profile."""
    if profile is NATIVE:
        raise ConfigError(
            "profile native is this machine unthrottled: give the profile of a slower machine to "
            "throttle to, such as rev-a"
        )
    for name in ("cores", "shared_bytes_per_s"):
        if getattr(profile, name) is not None:
            raise ConfigError(
                f"profile {profile.name} says by {name} what emulated cards share; throttled cards "
                f"keep the speeds of each card only: leave {name} out"
            )


def pace_of(handle: Any) -> Pace:
    """The pace of a native card."""
    p = ffi.new("struct spk_pace *")
    lib.spk_card_pace(handle, p)
    return Pace(
        steps=int(p.steps),
        modelled_s=p.modelled_ns / 1e9,
        last_step_s=p.last_step_ns / 1e9,
        last_end_s=p.last_end_ns / 1e9,
        late_s=p.late_ns / 1e9,
        late_s_max=p.late_ns_max / 1e9,
    )
