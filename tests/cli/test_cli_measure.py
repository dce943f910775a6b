# SPDX-License-Identifier: Apache-2.0
"""`spanker eval`, `bench`, `info` and `pull`: the figures and their meaning."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from cli_process import batch, good

import spanker as library
from spanker.testing import write_tiny_llama

LICENSE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf"))


async def test_eval_is_the_mean_of_the_librarys_log_probabilities(smollm2_path: Path) -> None:
    # More tokens than one piece of scores holds.
    args = ("--model", str(smollm2_path), "--text", str(LICENSE), "--tokens", "100")
    got = json.loads(good("eval", *args, "--cards", "2", "--json").stdout)
    async with library.open_fleet() as fleet:
        model = await fleet.load(smollm2_path, ctx=128)
        ids = model.tokenize(LICENSE.read_text())[:100]
        x = (await model.logits(ids[:-1])).astype(np.float64)
    log_total = np.log(np.exp(x - x.max(axis=1, keepdims=True)).sum(axis=1)) + x.max(axis=1)
    expected = float((log_total - x[np.arange(99), ids[1:]]).mean())
    assert got["tokens"] == 100 and got["predictions"] == 99
    assert math.isclose(got["mean_nll"], expected, rel_tol=1e-12)
    assert math.isclose(got["perplexity"], math.exp(expected), rel_tol=1e-12)


def test_eval_takes_the_whole_text_by_default_and_refuses_what_does_not_fit(
    tiny: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h")
    args = ("eval", "--model", tiny, "--text")
    long = tmp_path / "long.txt"
    long.write_text("a b c d e f g h" * 100)
    whole, piped, shown, more, beyond = batch(
        (*args, str(text), "--json"),
        ((*args, "-", "--json"), text.read_bytes()),
        (*args, str(text)),
        (*args, str(text), "--tokens", "100"),
        (*args, str(long), "--tokens", "300"),
    )
    assert whole.json()["tokens"] > 8
    assert piped.json()["mean_nll"] == whole.json()["mean_nll"]
    assert "perplexity" in shown.out
    assert more.code == 1 and "expected at least 100" in more.err
    assert beyond.code == 1
    assert "300 tokens do not fit into the model's context of 256" in beyond.err


def test_bench_prints_the_record(smollm2_path: Path) -> None:
    args = ("bench", "--model", str(smollm2_path), "--cards", "2", "--gen-tokens", "12")
    record = json.loads(good(*args, "--repeat", "3", "--json").stdout)
    assert record["schema_version"] == "1"
    assert record["backend"] == "spanker"
    assert record["prompt"] == "Hello, "
    assert record["prompt_tokens"] == 3
    assert record["tokens_generated"] == 12
    assert record["spanker_version"] == library.__version__
    assert record["plan"] == "tp2" and record["cards"] == 2
    assert set(record["host"]) == {"cpu", "cores", "ram_gb"}
    assert record["host"]["cores"] >= 1 and record["host"]["ram_gb"] > 0
    datetime.strptime(record["timestamp_utc"], "%Y-%m-%dT%H:%M:%SZ")
    # Decode alone: eleven tokens after the first.
    assert math.isclose(record["tokens_per_second"] * record["wall_clock_seconds"], 11)
    assert math.isclose(record["prompt_tokens_per_second"] * record["time_to_first_token_s"], 3)
    assert record["load_s"] > 0
    rates = [run["tokens_per_second"] for run in record["runs"]]
    assert len(rates) == 3 and record["tokens_per_second"] == sorted(rates)[1]


def test_bench_makes_up_a_prompt_of_any_length(tiny: str) -> None:
    args = ("bench", "--model", tiny, "--gen-tokens", "2")
    lengths = (1, 7, 100)
    *made, shown, beyond = batch(
        *((*args, "--prompt-tokens", str(n), "--json") for n in lengths),
        args,
        (*args, "--prompt-tokens", "255"),
    )
    assert tuple(done.json()["prompt_tokens"] for done in made) == lengths
    assert "decode" in shown.out
    assert beyond.code == 1 and "context is 256" in beyond.err


def test_info_foretells_what_loading_does(tiny: str) -> None:
    options = ("--model", tiny, "--cards", "3")
    told, ran, shown, plain, replicas, beside = batch(
        ("info", *options, "--json"),
        ("run", "x", *options, "--json"),
        ("info", *options),
        ("info",),
        ("info", *options, "--plan", "dp3"),
        ("run", "x", *options, "--plan", "dp3", "--max-tokens", "4"),
    )
    foretold, done = told.json(), ran.json()
    assert foretold["model"]["plan"] == done["plan"]
    assert foretold["default_isa"] in foretold["isas"]
    assert foretold["isas"][0] == "scalar"
    used = [card for card in done["cards"] if card["share"] != "nothing"]
    for weights, card in zip(foretold["model"]["card_weight_bytes"], used, strict=True):
        assert 0 < weights < card["ddr_used_bytes"]
    answers = {d["name"]: d["strategy"] for d in foretold["model"]["decisions"]}
    assert set(answers) >= {"attn_q", "ffn_down", "output"}
    assert "pick_strategy" in shown.out and "tensor-parallel" in shown.out
    assert "instructions" in plain.out
    assert "replica" not in shown.out and "replica" not in ran.err
    for text in (replicas.out, beside.err):
        (header,) = [line for line in text.splitlines() if line.startswith("card")]
        assert header.split()[:2] == ["card", "replica"]
        rows = [line.split()[:2] for line in text.splitlines() if "layers 0-1" in line]
        assert rows == [["0", "0"], ["1", "1"], ["2", "2"]]


def test_pull_lists_models_and_prints_the_path_of_a_cached_one(smollm2_path: Path) -> None:
    listed, pulled = batch(("pull",), ("pull", "smollm2"))
    assert "smollm2" in listed.out and "Apache-2.0" in listed.out and "yes" in listed.out
    assert pulled.out == f"{smollm2_path}\n"


def test_bench_can_be_traced(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    args = ("bench", "--model", tiny, "--gen-tokens", "5", "--repeat", "2", "--trace", str(path))
    shown, record = batch(args, (*args, "--json"))
    assert f" commands in 10 steps: {path}\n" in shown.err and "decode" in shown.out
    assert record.json()["tokens_generated"] == 5
    assert json.loads(path.read_text())["otherData"]["steps"] == 10
