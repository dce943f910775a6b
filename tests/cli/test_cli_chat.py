# SPDX-License-Identifier: Apache-2.0
"""`spanker chat`, by a script and at a terminal."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from cli_process import EXIT_S, good, spanker, started, terminal

import spanker as library
from spanker.testing import write_tiny_llama

QUESTIONS = ("What is the capital of France?", "And of Italy?")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", context=1 << 16))


async def test_a_script_gets_the_answers_of_a_conversation(smollm2_path: Path) -> None:
    script = f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n/clear\n{QUESTIONS[1]}\n/exit\nnever asked\n"
    options = ("--model", str(smollm2_path), "--max-tokens", "12", "--system", "Be short.")
    got = good("chat", *options, stdin=script.encode()).stdout.decode()
    async with library.open_fleet() as fleet:
        model = await fleet.load(smollm2_path, ctx=512)
        system = {"role": "system", "content": "Be short."}
        messages = [system]
        answers = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            answers.append(await model.chat(messages, max_tokens=12).collect())
            messages.append({"role": "assistant", "content": answers[-1]})
        alone = [system, {"role": "user", "content": QUESTIONS[1]}]
        answers.append(await model.chat(alone, max_tokens=12).collect())
    assert got == "".join(f"{answer}\n" for answer in answers)
    assert "Paris" in answers[0]


def test_a_script_ends_at_its_first_error(tiny: str) -> None:
    done = spanker("chat", "--model", tiny, "--ctx", "32", stdin=b"x" * 400 + b"\nhi\n")
    assert done.returncode == 1
    assert done.stdout == b""
    assert b"the context holds 32" in done.stderr and done.stderr.count(b"\n") == 1


def test_ctrl_c_stops_the_answer_and_at_the_prompt_leaves(tiny: str) -> None:
    options = ("--model", tiny, "--max-tokens", "60000", "--ctx", "65536")
    with (
        terminal() as screen,
        started(
            *("chat", *options),
            stdin=screen.device,
            stdout=screen.device,
            stderr=screen.device,
        ) as running,
    ):
        settings = screen.settings()
        screen.wait_for("> ")
        screen.press("tell me a story\r")
        screen.wait_for("story\r\n")
        screen.wait_for_more(20)
        seen = len(screen.text)
        running.process.send_signal(signal.SIGINT)
        screen.wait_for("\n> ", seen)
        assert running.process.poll() is None

        # A half-typed line is only cleared.  (Keys are still on their way in for a moment.)
        screen.press("/ex")
        screen.wait_for("/ex", seen)
        time.sleep(0.2)
        seen = len(screen.text)
        running.process.send_signal(signal.SIGINT)
        screen.wait_for("> ", seen)
        assert running.process.poll() is None

        time.sleep(0.2)
        took_s = running.signal_and_wait(signal.SIGINT)
        screen.drain()
        assert running.process.returncode == 130
        assert took_s < EXIT_S
        assert "Traceback" not in screen.text
        assert screen.settings() == settings


def test_a_terminal_ends_the_chat_with_ctrl_d(tiny: str) -> None:
    with (
        terminal() as screen,
        started(
            *("chat", "--model", tiny, "--max-tokens", "3", "--ctx", "64"),
            stdin=screen.device,
            stdout=screen.device,
            stderr=screen.device,
        ) as running,
    ):
        screen.wait_for("> ")
        seen = len(screen.text)
        screen.press("hi\r")
        screen.wait_for("(cut off after 3 tokens", seen)
        screen.wait_for("> ", seen + 10)
        seen = len(screen.text)
        screen.press("x" * 70 + "\r")
        screen.wait_for("or start anew with /clear", seen)
        screen.wait_for("\n> ", seen)
        screen.press("\x04")
        assert running.process.wait(10) == 0
