# SPDX-License-Identifier: Apache-2.0
"""Every example runs and prints what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=120, cwd=EXAMPLES
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    missing = [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in source]
    assert not missing


@pytest.mark.usefixtures("smollm2_path")
def test_trio_app() -> None:
    out = run("trio_app.py")
    assert "on 3 cards, plan tp3" in out
    assert " Paris." in out
    assert len(re.findall(r"^card \d: layers 0-29", out, re.MULTILINE)) == 3


@pytest.mark.usefixtures("smollm2_path")
def test_asyncio_app() -> None:
    first, second = run("asyncio_app.py").split("\n", 1)
    assert first.startswith("Water boils at ")
    assert "The largest planet is" in second
    assert len(second) > 40


@pytest.mark.usefixtures("smollm2_path")
def test_several_prompts_share_steps() -> None:
    out = run("several_prompts.py")
    assert out.count("--- ") == 4
    found = re.search(r"(\d+) tokens in (\d+) steps", out)
    assert found
    tokens, steps = map(int, found.groups())
    assert tokens == 96
    assert 24 <= steps <= 30


@pytest.mark.usefixtures("smollm2_path")
def test_own_plan() -> None:
    out = run("own_plan.py")
    assert "two to one: " in out and "tokens/s predicted, bound by elements" in out
    assert "tp3: " in out and "  card 0: layers 0-29, 5 heads, 768 ffn" in out
    assert "the same answer: True" in out


def test_all_reduce() -> None:
    out = run("all_reduce.py")
    assert "the same bits on every card: True" in out
    assert "[25000, 25000, 25000, 25000]" in out
    assert "after three sums of 0, 1, 2, 3: [96 96 96 96 96 96 96 96]" in out


@pytest.mark.usefixtures("smollm2_path")
def test_chat_remembers_the_turns() -> None:
    out = run("chat.py")
    assert out.count("you: ") == out.count("model: ") == 2
    assert "Ana" in out.rsplit("model: ", 1)[1]


def test_one_int4_product() -> None:
    check, *traffic = run("matmul_q4_k.py").splitlines()
    assert re.fullmatch(r"100 x 512 times 512 x 7 in int4: (9|1\d)\.\d% off .*", check)
    assert [line.split()[0] for line in traffic] == ["write", "write", "compute", "read"]


def test_the_users_own_test() -> None:
    out = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_app.py")
    assert "3 passed" in out


def test_virtual_fleet() -> None:
    out = run("virtual_fleet.py")
    assert out == run("virtual_fleet.py")
    assert re.search(r"^loaded after \d\.\d\d ms\ntoken \d+ after \d+\.\d\d ms\n", out)
    assert "at 1 h: card 1 lost: hangs" in out
    assert "at 1 h: tiny llama: re-planned tp3 -> tp2 on cards 0, 2; resumed 1 sequence" in out
    assert re.search(r"^an 8B model on 8 boards: [23]\.\d\d tokens/s$", out, re.MULTILINE)
