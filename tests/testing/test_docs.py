# SPDX-License-Identifier: Apache-2.0
"""docs/testing.md: every snippet runs as it stands, and its table has every kind of fault."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from spanker.testing.fault_plan import KINDS, PLACES

PAGE = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()


def test_every_snippet_runs(tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    tests = 0
    for number, code in enumerate(snippets):
        named = re.match(r"# (\w+\.py)\n", code)
        name = named[1] if named else f"test_snippet_{number}.py"
        tests += not named
        (tmp_path / name).write_text(code)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntrio_mode = true\nfilterwarnings = error\n")
    options = ["-p", "no:cacheprovider", "-q", "--strict-markers"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert tests == len(snippets) - 1 == 7
    assert "26 passed" in done.stdout


def test_the_table_has_every_kind() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", PAGE.split("### The kinds")[1], re.MULTILINE)
    told = {
        (word, place.strip())
        for kinds, places in rows
        for word in re.findall("`(.*?)`", kinds)
        for place in places.split(",")
    }
    names = {place: name.removeprefix("a ").removeprefix("the ") for place, name in PLACES.items()}
    names = {place: name.replace("set of ", "") for place, name in names.items()}
    assert told == {
        (what.value, names[place]) for what, kind in KINDS.items() for place in kind.where
    }
