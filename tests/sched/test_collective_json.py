# SPDX-License-Identifier: Apache-2.0
"""Plans as JSON: the same value comes back, and whatever a file says wrong is named by its path."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import attrs
import pytest
from test_collective_catalog import graphs, named, plan_for

from spanker.errors import PlanError
from spanker.sched import Topology
from spanker.sched.collectives import CollectivePlan, from_json, make, plan_json, to_json
from spanker.sched.verify import verify

PLAN = make("all-reduce", 3, 7, algorithm="owner", op="avg")


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """PLAN's document with something else at a path."""
    document = copy.deepcopy(to_json(PLAN))
    at: Any = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return document


def refusal(document: Any) -> str:
    with pytest.raises(PlanError) as caught:
        from_json(document)
    return str(caught.value)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_every_plan_comes_back_the_same(n: int) -> None:
    rng = random.Random(n)
    for topology in graphs(n, rng).values():
        for kind, ordered, algorithm in named():
            plan = plan_for(kind, ordered, algorithm, topology, rng.choice((0, 7, 100)), rng)
            if plan is not None:
                assert from_json(to_json(plan)) == plan
                assert from_json(json.dumps(to_json(plan))) == plan
                assert from_json(json.dumps(to_json(plan)).encode()) == plan


def test_the_document_is_as_documented() -> None:
    plan = make("all-reduce", (4, 6), 4, algorithm="direct", ordered=False)
    assert to_json(plan) == {
        "version": 1,
        "kind": "all-reduce",
        "algorithm": "direct",
        "cards": [4, 6],
        "elements": 4,
        "shares": [],
        "op": "sum",
        "ordered": False,
        "root": None,
        "tmp_elements": 2,
        "phases": [
            {
                "sends": [
                    [6, 4, ["data", 0, 2], ["tmp", 0, 2]],
                    [4, 6, ["data", 2, 4], ["tmp", 0, 2]],
                ],
                "local": [
                    ["fold", 4, ["data", 0, 2], ["tmp", 0, 2]],
                    ["fold", 6, ["data", 2, 4], ["tmp", 0, 2]],
                ],
            },
            {
                "sends": [
                    [4, 6, ["data", 0, 2], ["data", 0, 2]],
                    [6, 4, ["data", 2, 4], ["data", 2, 4]],
                ],
                "local": [],
            },
        ],
    }


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "plan.version: expected 1, got 2"),
        (("version",), True, "plan.version: expected 1, got True"),
        (("version",), 1.0, "plan.version: expected 1, got 1.0"),
        (
            ("kind",),
            "all",
            "plan.kind: expected one of all-reduce, reduce-scatter, all-gather, broadcast, "
            "all-to-all, barrier, got 'all'",
        ),
        (("algorithm",), "", "plan.algorithm: expected a name of 1 to 64 characters, got ''"),
        (("algorithm",), 5, "plan.algorithm: expected a name of 1 to 64 characters, got 5"),
        (("cards",), [], "plan.cards: expected one card or more, each once, got []"),
        (("cards",), [0, 1, 1], "plan.cards: expected one card or more, each once, got [0, 1, 1]"),
        (("cards",), [0, 1, 256], "plan.cards[2]: expected a card, 0 to 255, got 256"),
        (("cards",), 3, "plan.cards: expected a list, got 3"),
        (("cards",), list(range(300)), "plan.cards: expected at most 256 entries, got 300"),
        (
            ("elements",),
            -1,
            "plan.elements: expected a number from 0 to 281474976710656, got -1",
        ),
        (
            ("elements",),
            7.0,
            "plan.elements: expected a number from 0 to 281474976710656, got 7.0",
        ),
        (
            ("tmp_elements",),
            10**30,
            "plan.tmp_elements: expected a number from 0 to 281474976710656, got " + "1" + "0" * 30,
        ),
        (("shares",), [[0]], "plan.shares[0]: expected [start, stop], got [0]"),
        (("shares",), [[3, 2]], "plan.shares[0].stop: expected 3 or more, got 2"),
        (("op",), "mean", "plan.op: expected one of sum, avg, max, min, got 'mean'"),
        (("op",), ["sum"], "plan.op: expected one of sum, avg, max, min, got ['sum']"),
        (("ordered",), 1, "plan.ordered: expected true or false, got 1"),
        (("root",), 7, "plan.root: expected a card of the plan, got 7"),
        (("phases",), {}, "plan.phases: expected a list, got {}"),
        (("phases", 0), [], "plan.phases[0]: expected an object, got []"),
        (
            ("phases", 0),
            {"sends": []},
            "plan.phases[0]: expected a field 'local', got ['sends']",
        ),
        (
            ("phases", 1, "comment"),
            "hello",
            "plan.phases[1]: expected no fields but sends, local, got 'comment'",
        ),
        (
            ("phases", 0, "sends", 2),
            [0, 1],
            "plan.phases[0].sends[2]: expected [source, target, what, to], got [0, 1]",
        ),
        (
            ("phases", 0, "sends", 2, 0),
            9,
            "plan.phases[0].sends[2].source: expected a card of the plan, got 9",
        ),
        (
            ("phases", 0, "sends", 2, 1),
            False,
            "plan.phases[0].sends[2].target: expected a card, 0 to 255, got False",
        ),
        (
            ("phases", 0, "sends", 2, 2, 0),
            "heap",
            "plan.phases[0].sends[2].what.buffer: expected one of data, out, tmp, got 'heap'",
        ),
        (
            ("phases", 0, "sends", 2, 3, 2),
            None,
            "plan.phases[0].sends[2].to.stop: expected a number from 0 to 281474976710656, "
            "got None",
        ),
        (
            ("phases", 0, "local", 1, 0),
            "add",
            "plan.phases[0].local[1].name: expected one of fold, copy, divide, got 'add'",
        ),
        (
            ("phases", 0, "local", 1),
            [],
            "plan.phases[0].local[1].name: expected one of fold, copy, divide, got []",
        ),
        (
            ("phases", 0, "local", 1),
            ["divide", 0],
            "plan.phases[0].local[1]: expected [name, card, into], got ['divide', 0]",
        ),
        (
            ("phases", 0, "local", 1, 3),
            ["data", 5, 4],
            "plan.phases[0].local[1].operand.stop: expected 5 or more, got 4",
        ),
    ],
)
def test_what_is_wrong_is_named_by_its_path(path: Any, value: Any, message: str) -> None:
    assert refusal(changed(path, value)) == message


def test_every_field_is_needed_and_no_other_is_taken() -> None:
    for name in to_json(PLAN):
        document = to_json(PLAN)
        del document[name]
        assert refusal(document).startswith(f"plan: expected a field {name!r}")
    assert "expected no fields but version" in refusal({**to_json(PLAN), "author": "me"})
    assert refusal([]) == "plan: expected an object, got []"


def test_text_that_is_no_json_is_refused() -> None:
    assert refusal("{").startswith("plan: expected JSON, got what does not parse: ")
    assert refusal(b"\xff\xfe\x00").startswith("plan: expected JSON")
    assert refusal("[" * 100_000).startswith("plan: expected JSON")
    assert refusal('{"version": ' + "9" * 10_000 + "}").startswith("plan: expected JSON")
    assert "a field appears twice" in refusal('{"version": 1, "version": 1}')


def test_what_a_file_controls_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_json, "PHASES_MAX", 1)
    assert refusal(to_json(PLAN)) == "plan.phases: expected at most 1 entries, got 2"
    monkeypatch.undo()
    monkeypatch.setattr(plan_json, "STEPS_MAX", 5)
    assert refusal(to_json(PLAN)) == "plan.phases[0].sends: expected at most 5 entries, got 6"
    monkeypatch.setattr(plan_json, "TEXT_BYTES_MAX", 10)
    assert refusal("{" * 11) == "plan: expected at most 10 bytes of JSON, got 11"


def test_long_values_are_cut_in_texts() -> None:
    assert len(refusal(changed(("algorithm",), "x" * 10_000))) < 200


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items if isinstance(value, (dict, list)) else ():
        found += places(inner, (*path, key)) if isinstance(inner, (dict, list)) else [(*path, key)]
    return found


def test_documents_with_random_damage_are_refused_or_make_a_plan() -> None:
    seed = 20_261_124
    print("seed", seed)
    rng = random.Random(seed)
    anything = (None, True, -1, 0, 3, 2**70, 1.5, "", "data", "fold", [], {}, [0, 1], "x" * 100)
    paths = places(to_json(PLAN))
    refused = 0
    for _ in range(2000):
        document = changed(rng.choice(paths), copy.deepcopy(rng.choice(anything)))
        try:
            plan = from_json(document)
        except PlanError as error:
            assert str(error).startswith("plan"), error
            refused += 1
        else:
            assert isinstance(plan, CollectivePlan)
            assert from_json(to_json(plan)) == plan
            # Of the right form, and right only if nothing that matters was changed.
            if plan != attrs.evolve(PLAN, algorithm=plan.algorithm):
                with pytest.raises(PlanError):
                    verify(plan, Topology.with_mock(4))
    assert 1000 < refused < 2000
