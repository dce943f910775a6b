# SPDX-License-Identifier: Apache-2.0
"""The figures of the bandwidth model and the lookup of profiles."""

from __future__ import annotations

import pytest

from spanker import sched
from spanker.errors import ConfigError


def test_rev_a_figures_are_those_of_the_board() -> None:
    assert sched.LOCAL_DDR_BW_BYTES_PER_SEC == 2_000_000_000
    assert sched.INTERCARD_BW_BYTES_PER_SEC == 500_000_000
    assert sched.HOST_LINK_BW_BYTES_PER_SEC == 100_000_000
    assert sched.REV_A.local_ddr_bytes_per_s == sched.LOCAL_DDR_BW_BYTES_PER_SEC
    assert sched.REV_A.intercard_bytes_per_s == sched.INTERCARD_BW_BYTES_PER_SEC
    assert sched.REV_A.host_link_bytes_per_s == sched.HOST_LINK_BW_BYTES_PER_SEC


def test_intercard_figure_follows_from_lanes_and_line_code() -> None:
    assert 4 * 1_250_000_000 * 8 // 10 // 8 == sched.INTERCARD_BW_BYTES_PER_SEC


def test_host_link_is_within_what_gigabit_ethernet_carries() -> None:
    assert 80_000_000 <= sched.HOST_LINK_BW_BYTES_PER_SEC <= 125_000_000


@pytest.mark.parametrize("profile", sched.PROFILES, ids=lambda profile: profile.name)
def test_every_profile_keeps_the_order_of_the_tiers(profile: sched.Profile) -> None:
    host_link = profile.host_link_bytes_per_s
    assert host_link is None or 0 < host_link < profile.intercard_bytes_per_s
    assert 0 < profile.intercard_bytes_per_s
    assert 4 * profile.intercard_bytes_per_s <= profile.local_ddr_bytes_per_s
    assert profile.host_link_latency_s >= 0


def test_native_profile_does_not_throttle_the_host_link() -> None:
    assert sched.NATIVE.host_link_bytes_per_s is None
    assert sched.NATIVE.host_link_latency_s == 0


def test_profiles_are_found_by_name() -> None:
    assert sched.profile("rev-a") is sched.REV_A
    assert sched.profile("native") is sched.NATIVE


def test_an_unknown_profile_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        sched.profile("rev-z")
    assert str(caught.value) == "no profile 'rev-z': expected one of native, rev-a, rev-b"
