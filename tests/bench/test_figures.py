# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the benchmarks' records, with numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import figures
import make_model
import pytest
import report
import show

from spanker.sched.plan import CardShare, Plan, Stage
from spanker.sched.shares import Share
from spanker.testing import write_tiny_llama

FACTS = figures.ModelFacts(
    path="m.gguf",
    file_bytes=1_200_000_000,
    weight_bytes=1_000_000_000,
    multiply_adds=2_500_000_000,
    layer_multiply_adds=2_000_000_000,
    layers=10,
    heads=8,
    kv_heads=4,
    head_dim=64,
    context=4096,
    formats={"Q4_0": 1_000_000_000},
)


def test_facts_are_those_of_the_file(tmp_path: Path):
    path = make_model.write_model(
        tmp_path / "m.gguf",
        "m",
        make_model.Shape(256, 2, 8, 2, 32, 512, 400, 4096, 10000.0, False),
        make_model.MIXES["q4_0"],
    )
    found = figures.model_facts(str(path))
    layer = 2 * 256 * 256 + 2 * 64 * 256 + 3 * 512 * 256
    assert found.layer_multiply_adds == 2 * layer
    assert found.multiply_adds == 2 * layer + 400 * 256
    assert found.formats == {"Q4_0": 2 * layer // 32 * 18, "Q6_K": 400 * 210}
    assert found.weight_bytes == sum(found.formats.values())
    assert (found.layers, found.kv_heads, found.head_dim, found.context) == (2, 2, 32, 4096)
    assert found.file_bytes == path.stat().st_size


def test_a_tied_embedding_counts_as_the_output(tmp_path: Path):
    path = write_tiny_llama(tmp_path / "m.gguf", format="q8_0", tied=True)
    tied = figures.model_facts(str(path))
    assert tied.multiply_adds - tied.layer_multiply_adds == 320 * 64


def test_rates_are_medians_and_shares_are_taken_within_rounds():
    samples = {
        "spanker_decode": [20.0, 10.0, 15.0],
        "llama_cpp_decode": [10.0, 10.0, 10.0],
        "spanker_prefill": [60.0, 60.0, 60.0],
        "read_gb_per_s": [40.0, 20.0, 30.0],
        "int8_gmac_per_s": [240.0, 240.0, 120.0],
    }
    found = figures.rate_figures(FACTS, samples)
    decode, prefill = found["decode"], found["prefill"]
    assert decode["spanker_tokens_per_s"] == 15.0
    assert decode["limit_tokens_per_s"] == 30.0
    assert decode["ratio"] == 1.5
    # Each round reached half of what the memory gave in that round.
    assert decode["spanker_share_of_limit"] == 0.5
    assert decode["spanker_gb_per_s"] == 15.0
    assert decode["llama_cpp_gb_per_s"] == 10.0
    assert prefill["limit_tokens_per_s"] == 120.0
    assert prefill["spanker_share_of_limit"] == 0.5
    assert prefill["spanker_gmac_per_s"] == 120.0
    assert prefill["llama_cpp_tokens_per_s"] is None
    assert prefill["ratio"] is None


def test_disturbed_rounds_are_left_out_where_they_are_few():
    samples = {
        "spanker_decode": [10.0, 99.0, 12.0],
        "read_gb_per_s": [20.0, 20.0, 20.0],
        "int8_gmac_per_s": [1.0, 1.0, 1.0],
        "other_cores": [0.0, 1.5, 0.05],
    }
    found = figures.rate_figures(FACTS, samples)
    assert found["rounds_counted"] == 2
    assert found["decode"]["spanker_tokens_per_s"] == 11.0
    # With hardly a quiet round there is nothing to choose from.
    samples["other_cores"] = [0.5, 1.5, 0.05]
    found = figures.rate_figures(FACTS, samples)
    assert found["rounds_counted"] == 3
    assert found["decode"]["spanker_tokens_per_s"] == 12.0


def test_parts_that_were_not_measured_are_left_out():
    found = figures.rate_figures(
        FACTS, {"spanker_decode": [1.0], "read_gb_per_s": [10.0], "int8_gmac_per_s": [10.0]}
    )
    assert "prefill" not in found
    assert found["decode"]["spanker_spread"] is None


def test_context_says_what_the_bytes_explain():
    # Query heads 0 to 4 and 5 to 7: KV heads 0 to 2 and 2 to 3, the third one on both cards.
    shares = tuple(
        CardShare(card, heads, *[Share(0, 0)] * 4)
        for card, heads in enumerate((Share(0, 5), Share(5, 8)))
    )
    found = figures.context_figures(
        FACTS,
        Plan("tp2", (Stage(Share(0, 10), shares),)),
        [0, 1000],
        32,
        {0: [25.0], 1000: [20.0]},
        {0: [], 1000: []},
        {0: [50.0], 1000: [50.0]},
        [0.5, 0.768, 9.0],
    )
    # 10 layers, 4 heads, 64 keys and 64 values of two bytes: 10,240 a position.
    assert [row["kv_bytes_per_token"] for row in found] == [16 * 10240, 1016 * 10240]
    assert found[0]["explained_tokens_per_s"] == 25.0
    assert found[1]["busiest_card_kv_bytes"] == 1016 * 7680
    # 1000 positions of 7,680 bytes at 0.768 GB/s are 10 ms more than 40.
    assert found[1]["explained_tokens_per_s"] == pytest.approx(20)
    assert found[1]["limit_tokens_per_s"] == pytest.approx(50 / 1.01040384)
    assert found[1]["llama_cpp_tokens_per_s"] is None


def test_medians_spreads_and_ratios():
    assert report.median([]) is None
    assert report.median([3.0, 1.0, 2.0]) == 2.0
    assert report.spread([1.0, 2.0]) is None
    assert report.spread([8.0, 9.0, 10.0, 11.0, 12.0]) == pytest.approx(0.1)
    # An interrupted run has one sample more on one side.
    assert report.paired_ratio([4.0, 6.0, 9.0], [2.0, 2.0]) == 2.5
    assert report.paired_ratio([1.0], []) is None


def test_records_are_rounded_and_written_whole(tmp_path: Path):
    path = report.save_json(tmp_path / "new" / "r.json", {"a": [1.23456789, None], "n": 123456})
    assert json.loads(path.read_text()) == {"a": [1.235, None], "n": 123456}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.01234, "0.0123"), (1234.5, "1234"), (7, "7"), ("a", "a")]
)
def test_cells(value: object, text: str):
    assert report.cell(value) == text


def test_bystanders_do_not_count_ourselves():
    bystanders = report.Bystanders()
    sum(i * i for i in range(2_000_000))
    found = bystanders.cores()
    assert set(found) == {"other_cores", "stolen_cores"}
    assert min(found.values()) >= 0


def test_tables_of_half_a_record_are_shown(capsys: pytest.CaptureFixture[str]):
    samples = {"spanker_decode": [5.0], "read_gb_per_s": [10.0], "int8_gmac_per_s": [9.0]}
    record = {
        "models": [
            {"name": "refused", "error": "not supported"},
            {
                "name": "half",
                "rates": [
                    {"cards": 1, "samples": samples, **figures.rate_figures(FACTS, samples)},
                    {"cards": 2, "samples": {}},
                ],
                "start": [{"cards": 1, "samples": {}}],
                "crowd": [{"cards": [2, 8], "samples": [[], []]}],
                "idle": [{"cards": 1}],
                "context": [{"cards": 1}],
            },
        ]
    }
    show.tables(record)
    out = capsys.readouterr().out
    assert "half" in out and "50%" in out and "prefill" not in out
