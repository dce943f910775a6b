# SPDX-License-Identifier: Apache-2.0
"""`spanker run`: what it prints where, and that its answer is the library's."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from cli_process import batch, good, started, terminal

import spanker as library
from spanker.ggml.chat import ChatTemplate
from spanker.ggml.gguf import GGUFFile
from spanker.ggml.tokenizer import Tokenizer
from spanker.testing import write_tiny_llama

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf"))


async def test_one_and_three_cards_print_the_librarys_answer(smollm2_path: Path) -> None:
    args = ("run", PROMPT, "--model", str(smollm2_path), "--max-tokens", "12")
    one, three = (
        json.loads(good(*args, "--logits-hash", "--json", "--cards", cards).stdout)
        for cards in ("1", "3")
    )
    async with library.open_fleet("soft:2", plan="tp") as fleet:
        model = await fleet.load(smollm2_path, ctx=512)
        generation = model.generate(PROMPT, max_tokens=12, logits=True)
        digest = hashlib.sha256()
        async for token in generation:
            assert token.logits is not None
            digest.update(np.asarray(token.logits, "<f4").tobytes())
    for value in (one, three):
        assert value["prompt_tokens"] == list(generation.prompt_ids)
        assert value["tokens"] == generation.token_ids
        assert value["text"] == generation.text
        assert value["finish_reason"] == "length"
        assert value["logits_sha256"] == digest.hexdigest()
    assert [len(v["cards"]) for v in (one, three)] == [1, 3]
    assert one["cards"][0]["link_sent_bytes"] == 0
    for card in three["cards"]:
        assert 0 < card["busy_share"] <= 1.1
        assert card["link_sent_bytes"] > 0
        assert 0 < card["ddr_used_bytes"] < one["cards"][0]["ddr_used_bytes"]
    assert three["plan"]["name"] == "tp3"
    (replica,) = three["plan"]["replicas"]
    assert [s["heads"] for s in replica["stages"][0]["shares"]] == [[0, 3], [3, 6], [6, 9]]
    assert all(v > 0 for v in three["timings"].values())


def test_the_text_alone_goes_to_stdout_and_the_summary_to_stderr(smollm2_path: Path) -> None:
    done = good("run", PROMPT, "--model", str(smollm2_path), "--max-tokens", "8", "--cards", "3")
    assert done.stdout.startswith(b" Paris.") and not done.stdout.endswith(b"tokens")
    summary = done.stderr.decode()
    for row in ("0  layers 0-29", "1  layers 0-29", "2  layers 0-29", "plan tp3: "):
        assert row in summary
    assert "prompt 5 tokens, " in summary and "; loaded in " in summary
    assert "generated 8 tokens, " in summary and "--max-tokens reached" in summary


def test_a_trace_changes_nothing_else(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("an older one")
    args = (
        "run",
        PROMPT,
        "--model",
        tiny,
        "--max-tokens",
        "9",
        "--ignore-eos",
        "--cards",
        "3",
        "--plan",
        "tp",
    )
    plain, traced, silent = batch(args, (*args, "--trace", str(path)), (*args, "--json"))
    assert plain.code == traced.code == 0 and traced.out == plain.out
    assert "trace of " not in plain.err
    assert f" commands in 9 steps: {path}\n" in traced.err and "lost" not in traced.err
    value = json.loads(path.read_text(encoding="ascii"))
    events = [e for e in value["traceEvents"] if e["ph"] == "X"]
    assert {e["tid"] for e in events} == {1, 2, 3, 4}
    names = {e["name"] for e in events}
    assert {"matmul blk.0.ffn_gate q4_0", "wait for step 1", "collect step 9"} < names
    assert any(name.startswith("wait for cards 0, 2 blk.1") for name in names)
    assert value["otherData"]["version"] == f"spanker {library.__version__}"
    (done,) = batch((*args, "--json", "--trace", str(path)))
    assert done.json()["tokens"] == silent.json()["tokens"] and done.err == ""
    assert json.loads(path.read_text())["otherData"]["steps"] == 9


@pytest.mark.parametrize("plan", ["auto", "dp3"])
def test_everything_fits_into_80_columns(tiny: str, plan: str) -> None:
    with (
        terminal(80) as screen,
        started(
            *("run", "Once", "--model", tiny, "--max-tokens", "4", "--plan", plan),
            *("--cards", "soft:2@scalar,soft:1:100MB"),
            stderr=screen.device,
        ) as running,
    ):
        screen.wait_for("--max-tokens reached")
        assert running.process.wait(10) == 0
        screen.drain()
    summary = screen.text.rpartition("\x1b[2K")[2].replace("\x1b[1m", "").replace("\x1b[0m", "")
    print(summary)
    assert "busy" in summary and "scalar" in summary
    assert max(len(line) for line in summary.splitlines()) <= 80


def test_sampling_depends_on_the_seed_alone(tiny: str) -> None:
    args = ("run", "Once", "--model", tiny, "--json", "--max-tokens", "16")
    sampled = (*args, "--temperature", "1", "--top-p", "0.95")
    first, again, other = batch(
        (*sampled, "--seed", "7"),
        (*sampled, "--seed", "7", "--cards", "2", "--plan", "pp"),
        (*sampled, "--seed", "8"),
    )
    assert again.json()["tokens"] == first.json()["tokens"]
    assert other.json()["tokens"] != first.json()["tokens"]


def test_a_prompt_comes_from_argument_stdin_or_file(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"two\nlines\n")
    args = ("run", "--model", tiny, "--max-tokens", "2", "--json")
    expected, *same, other, both = batch(
        (*args, "two\nlines"),
        (args, b"two\nlines"),
        ((*args, "-"), b"two\nlines\r\n"),
        (*args, "--prompt-file", str(file)),
        (args, b"two\nlines\n\n"),
        (*args, "--prompt-file", str(file), "two"),
    )
    prompt = expected.json()["prompt_tokens"]
    assert [done.json()["prompt_tokens"] for done in same] == [prompt] * 3
    assert other.json()["prompt_tokens"] != prompt
    assert both.code == 2 and "not both" in both.err


def test_chat_wraps_the_prompt_by_the_models_template(tiny: str) -> None:
    with GGUFFile(tiny) as gguf:
        tokenizer = Tokenizer.from_metadata(gguf.metadata)
        template = ChatTemplate.from_metadata(gguf.metadata, tokenizer)
    text = template.render([{"role": "user", "content": "hi"}])
    (got,) = batch(("run", "hi", "--chat", "--model", tiny, "--max-tokens", "1", "--json"))
    assert got.json()["prompt_tokens"] == tokenizer.encode(text, add_bos=False)


def test_every_stop_text_counts(tiny: str) -> None:
    args = ("run", "Once", "--model", tiny, "--max-tokens", "24", "--ignore-eos", "--json")
    (done,) = batch(args)
    whole = done.json()["text"]
    stop = whole[len(whole) // 2 :][:2]
    (done,) = batch((*args, "--stop", "never in there", "--stop", stop))
    assert done.json()["finish_reason"] == "stop"
    assert done.json()["text"] == whole[: whole.index(stop)]


def test_a_reader_that_leaves_ends_the_command_quietly(tiny: str) -> None:
    with started("run", "Once", "--model", tiny, "--max-tokens", "200", "--ignore-eos") as running:
        assert running.process.stdout is not None and running.process.stderr is not None
        assert running.process.stdout.read(1)
        running.process.stdout.close()
        assert running.process.stderr.read() == b""
        assert running.process.wait(10) == 128 + signal.SIGPIPE


def test_a_full_disk_is_an_error_of_one_line(tiny: str) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    for json_option in ((), ("--json",)):
        with started("run", "Once", "--model", tiny, *json_option, stdout=full) as running:
            assert running.process.stderr is not None
            said = running.process.stderr.read()
            assert running.process.wait(10) == 1
        assert said == b"spanker: error: cannot write to stdout: No space left on device\n"
    os.close(full)
