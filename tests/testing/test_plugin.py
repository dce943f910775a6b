# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: light to load, and its fixtures are what they say."""

from __future__ import annotations

import subprocess
import sys

import trio

import spanker
import spanker.testing


def test_loading_the_plugin_imports_nothing_heavy():
    script = (
        "import sys, spanker.testing.plugin\n"
        "heavy = {'trio', 'numpy', 'attrs', 'pytest_trio', 'spanker._native', 'spanker.fleet'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "\n")


def test_every_public_name_of_the_package_can_be_imported():
    for name in spanker.__all__:
        assert getattr(spanker, name) is not None, name
    for name in spanker.testing.__all__:
        assert getattr(spanker.testing, name) is not None, name


async def test_spanker_fleet_is_open_and_has_three_cards(spanker_fleet, tiny_model):
    assert len(spanker_fleet.cards) == 3
    model = await spanker_fleet.load(tiny_model)
    assert len([t async for t in model.generate("Hello", max_tokens=4)]) == 4


def test_the_factory_needs_no_pytest_trio(spanker_fleet_factory, tiny_model):
    async def main() -> int:
        async with spanker_fleet_factory("soft:2", hang_timeout_s=0.5) as fleet:
            model = await fleet.load(tiny_model)
            await model.generate("Hello", max_tokens=2).collect()
            return len(fleet.cards)

    assert trio.run(main) == 2


def test_who_has_no_pytest_trio_can_use_the_other_fixtures(tmp_path):
    test = tmp_path / "test_plain.py"
    test.write_text(
        "import trio\n"
        "def test_fleet(tiny_model, spanker_fleet_factory):\n"
        "    async def main():\n"
        "        async with spanker_fleet_factory('soft:1') as fleet:\n"
        "            await fleet.load(tiny_model)\n"
        "    trio.run(main)\n"
    )
    options = ["-p", "no:trio", "-p", "no:cacheprovider", "-W", "error", "-q", "--rootdir"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path), str(test)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
