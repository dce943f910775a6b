# SPDX-License-Identifier: Apache-2.0
"""Plans drawn: every send and fold is to be seen, large plans stay readable, SVG is whole."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

import attrs
import pytest
from test_collective_catalog import graphs, named, plan_for

from spanker.sched import Topology
from spanker.sched.collectives import CollectivePlan, make
from spanker.sched.draw import svg, text

SVG = "{http://www.w3.org/2000/svg}"


def parsed(plan: CollectivePlan, **options: int) -> ET.Element:
    root = ET.fromstring(svg(plan, **options))
    assert root.tag == f"{SVG}svg"
    return root


def words(root: ET.Element) -> list[str]:
    """All texts, each once: labels are there twice, the first for their edge."""
    return [e.text or "" for e in root.iter(f"{SVG}text") if " b" not in e.get("class", "")]


def arrows(root: ET.Element) -> list[tuple[int, int]]:
    return [
        (int(e.attrib["x1"]), int(e.attrib["x2"]))
        for e in root.iter(f"{SVG}line")
        if e.get("class") == "s"
    ]


def test_a_small_plan_in_full() -> None:
    plan = make("all-reduce", (4, 7), 6, algorithm="owner", op="avg")
    assert text(plan) == (
        "all-reduce 'owner' of 6 elements over cards 4, 7, avg in card order\n"
        "2 phases, 4 sends over 2 links: 12 elements, 6 of them over the busiest; TMP 3\n"
        "phase 0\n"
        "  7 -> 4: data[0, 3) to tmp[0, 3)\n"
        "  4 -> 7: data[3, 6) to tmp[0, 3)\n"
        "  4: fold tmp[0, 3) into data[0, 3)\n"
        "  7: fold tmp[0, 3) into data[3, 6)\n"
        "  4: divide data[0, 3) by 2\n"
        "  7: divide data[3, 6) by 2\n"
        "phase 1\n"
        "  4 -> 7: data[0, 3)\n"
        "  7 -> 4: data[3, 6)\n"
    )


def test_a_copy_and_a_root_are_told() -> None:
    assert "  0: copy data[0, 1) to out[0, 1)\n" in text(make("all-to-all", 2, 2))
    assert text(make("broadcast", 3, 9, root=2)).startswith(
        "broadcast 'routed' of 9 elements over 3 cards, from card 2\n"
        "1 phase, 2 sends over 2 links: 18 elements, 9 of them over the busiest; TMP 0\n"
    )


def test_a_large_plan_is_summed_up_phase_by_phase() -> None:
    plan = make("all-reduce", 16, 1_000_003, algorithm="ring", ordered=False)
    assert text(plan) == (
        "all-reduce 'ring' of 1,000,003 elements over 16 cards, sum in any order\n"
        "30 phases, 480 sends over 32 links: 30,000,090 elements, 937,503 of them over the "
        "busiest; TMP 62,501\n"
        "phases 0 to 14, each: 16 sends of 62,500 to 62,501 elements, 16 folds\n"
        "phases 15 to 29, each: 16 sends of 62,500 to 62,501 elements\n"
    )
    assert len(text(plan, lines_max=10_000).splitlines()) == 2 + 30 + 480 + 240
    halves = text(make("all-to-all", 32, 64, algorithm="doubling"), lines_max=1)
    assert (
        halves.splitlines()[2:4]
        == [
            "phase 0: 512 sends of 2 elements, 32 copies",
            "phase 1: 256 sends of 4 elements",
        ]
        or "copies" in halves
    )


def test_an_arrow_for_each_pair_and_phase_with_its_elements() -> None:
    plan = make("all-reduce", Topology.ring(4), 10, op="avg")
    root = parsed(plan)
    found = arrows(root)
    assert len(found) == sum(len({(s.source, s.target) for s in p.sends}) for p in plan.phases)
    columns = sorted({x for arrow in found for x in arrow})
    assert len(columns) == 4
    said = words(root)
    assert [w for w in said if w.startswith("card ")] == [f"card {i}" for i in range(4)]
    assert [w for w in said if w.startswith("phase ")] == [f"phase {i}" for i in range(4)]
    assert sum("fold x3, divide" == w for w in said) == 4
    by_number = make("broadcast", 2, 1234, algorithm="direct")
    assert "1,234" in words(parsed(by_number))
    assert "4,936 B" in words(parsed(by_number, element_bytes=4))


def test_arrows_go_from_source_to_target() -> None:
    found = arrows(parsed(make("broadcast", 3, 5, algorithm="direct", root=1)))
    left, middle, right = sorted({x for arrow in found for x in arrow})
    assert sorted(found) == [(middle, left), (middle, right)]


def test_names_are_escaped() -> None:
    plan = attrs.evolve(make("broadcast", 2, 5), algorithm="<b> & 'c'")
    assert any("<b> & 'c'" in word for word in words(parsed(plan)))


def test_many_phases_are_cut_and_this_is_said() -> None:
    plan = make("all-reduce", 64, 6400, algorithm="ring", ordered=False)
    said = words(parsed(plan))
    assert "phase 99" in said and "phase 100" not in said
    assert "and 26 more phases" in said


def test_labels_are_left_out_where_they_would_cover_each_other() -> None:
    said = words(parsed(make("all-gather", 16, 16, algorithm="direct")))
    assert "1" not in said


@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_plan_can_be_drawn_and_always_the_same(n: int) -> None:
    rng = random.Random(n)
    for topology in graphs(n, rng).values():
        for kind, ordered, algorithm in named():
            plan = plan_for(kind, ordered, algorithm, topology, rng.choice((0, 7)), rng)
            if plan is not None:
                parsed(plan)
                assert svg(plan) == svg(plan)
                assert text(plan, lines_max=0).splitlines()[:2] == text(plan).splitlines()[:2]
