# SPDX-License-Identifier: Apache-2.0
"""How long a modelled fleet stands still when a card fails: the cost model beside the simulator.

    python bench/recovery_prediction.py [--only WORD] [--json FILE]

`spanker.sched.cost.recovery` says it in closed form; a fleet of hollow cards in virtual time, with
the real coordinator and sessions, loses a card in the middle of a generation and does it.  Nothing
here depends on the machine it runs on.

`no token` is the time from the failure to the next token of the last sequence that it has
interrupted, `re-planned` what the fleet's own events say.  Rows without a simulation are
predictions alone: what all weights from the host would take, and the refilling of a replica whose
sequences do not wait for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import report
import trio

from spanker.actors.virtual_time import run_virtual
from spanker.device.virtual.spec import VirtualCardSpec
from spanker.events import CardLost, Event, Replanned, ReplicaLost
from spanker.fleet import Fleet, Generation, open_fleet
from spanker.sched import cost
from spanker.sched.bandwidth import REV_A, REV_B, Profile
from spanker.sched.cost import RecoveryCost, Weights
from spanker.sched.layout import card_bytes
from spanker.sched.limits import step_limits
from spanker.sched.plan import FleetPlan, Limits, ModelShape, Plan, on_cards
from spanker.sched.planner import make_plan, plan_for
from spanker.sched.planning import Request
from spanker.sched.shapes import named_shape
from spanker.sched.topology import Topology
from spanker.testing import hang, kill

RESULTS = Path(__file__).resolve().parent / "results" / "recovery_prediction.json"
# By how much a prediction may be off: a part of it, and some messages of the host.
TOLERANCE, TOLERANCE_S = 1e-3, 5e-4
# Steps that a replica has under way when it is handed a sequence.
STEPS_AHEAD = 2
FAULTS: dict[str, Callable[[Fleet, int], None]] = {"kill": kill, "hang": hang}
GIGABYTES_16 = 16 << 30


@attrs.frozen
class Case:
    """A fleet of `cards` cards that loses card `lost` when the first sequence gets its token number
    `after`; `batch` sequences with prompts of `prompt` tokens are decoding.

    `weights` says where those of the plan afterwards are; `simulated` whether a fleet does that.
    """

    name: str
    plan: str
    lost: int
    fault: str = "kill"
    hang_timeout_s: float = 10.0
    weights: Weights = Weights.PEERS
    simulated: bool = True
    shape: str = "tinyllama"
    cards: int = 4
    profile: Profile = REV_A
    ddr_bytes: int = GIGABYTES_16
    batch: int = 1
    prompt: int = 128
    after: int = 20
    tokens: int = 28
    context: int = 2048
    kv_copies: int = 0

    @property
    def kv_tokens(self) -> int:
        """A whole context for every sequence of a replica, and those that it may get."""
        return self.batch * self.context

    def made_plan(self) -> FleetPlan:
        return make_plan(self.plan, named_shape(self.shape), self.cards)

    def limits(self) -> Limits:
        limits = step_limits(named_shape(self.shape), self.context)
        pages = -(-self.kv_tokens // limits.page_positions)
        return attrs.evolve(limits, kv_pages=pages, kv_copies=self.kv_copies)


SMALL_CARDS = 512 << 20  # half of TinyLlama fits with its KV, the whole does not
CASES = (
    Case("tp4, killed", "tp", 2),
    Case("tp4, hung, noticed after 10 s", "tp", 2, fault="hang"),
    Case("tp4, hung, noticed after 0.5 s", "tp", 2, fault="hang", hang_timeout_s=0.5),
    Case("tp4, killed after 400 tokens", "tp", 2, after=400, tokens=408),
    Case("tp4, two sequences", "tp", 0, batch=2),
    Case("tp4 with copies, killed", "tp", 2, kv_copies=1),
    Case("tp4 with copies, killed after 400", "tp", 2, after=400, tokens=408, kv_copies=1),
    Case("tp4 with copies, two sequences", "tp", 0, batch=2, kv_copies=1),
    Case("pp4", "pp", 2),
    Case("tp2xpp2", "tp2xpp2", 1),
    Case("dp2xtp2, to the other", "dp2xtp2", 0, weights=Weights.HELD),
    Case("dp2xtp2, small cards", "dp2xtp2", 0, weights=Weights.HELD, ddr_bytes=SMALL_CARDS),
    Case("dp4, to another", "dp4", 0, weights=Weights.HELD),
    Case("dp4, to one that decodes", "dp4", 0, weights=Weights.HELD, batch=4),
    Case("tp4, all from the host", "tp", 2, weights=Weights.HOST, simulated=False),
    Case("dp2xtp2, filled again", "dp2xtp2", 0, simulated=False),
    Case("rev-b, tp8", "tp", 5, cards=8, profile=REV_B),
    Case("smollm2-135m, tp3", "tp", 1, shape="smollm2-135m", cards=3),
    Case("smollm2-135m, two cards", "tp", 0, shape="smollm2-135m", cards=2, batch=3, prompt=40),
)


# --- predicted --------------------------------------------------------------------------


def replica_of(case: Case) -> int:
    """The replica that the failure is about."""
    number = case.made_plan().replica_of(case.lost)
    assert number is not None
    return number


def plan_after(case: Case) -> Plan:
    """What the replica's sequences go on with."""
    model, plan, limits = named_shape(case.shape), case.made_plan(), case.limits()
    number = replica_of(case)
    others = [replica for other, replica in enumerate(plan.replicas) if other != number]
    if case.weights is Weights.HELD:
        return others[0]
    left = [c for c in range(case.cards) if c != case.lost and not _used(c, others)]
    if case.plan in ("tp", "pp"):
        return on_cards(make_plan(case.plan, model, len(left)).replicas[0], left)
    request = Request(
        model,
        case.profile,
        Topology.with_mock(case.cards).among(left),
        tuple(_free(case, model, card, limits) for card in range(case.cards)),
        limits,
        position=min(512, limits.context),
    )
    return plan_for("auto", request).replicas[0]


def _used(card: int, plans: Sequence[Plan]) -> bool:
    return any(card in plan.cards for plan in plans)


def _free(case: Case, model: ModelShape, card: int, limits: Limits) -> int:
    """What it will have: the replica's own cards are given back."""
    replicas = case.made_plan().replicas
    others = [plan for number, plan in enumerate(replicas) if number != replica_of(case)]
    return case.ddr_bytes - sum(
        card_bytes(model, plan, card, limits) for plan in others if card in plan.cards
    )


def share_of(case: Case, replica: int) -> int:
    """Sequences of a replica: each goes where there are the fewest."""
    replicas = len(case.made_plan().replicas)
    return len(range(replica, case.batch, replicas))


def predict(case: Case) -> RecoveryCost:
    """What the cost model says."""
    plan, number = case.made_plan(), replica_of(case)
    serving: tuple[int, ...] = ()
    if case.weights is Weights.HELD:
        # The heir is the first that has the fewest sequences.
        heir = 0 if number else 1
        serving = (case.prompt + case.after,) * share_of(case, heir)
    return cost.recovery(
        named_shape(case.shape),
        plan.replicas[number],
        (case.lost,),
        plan_after(case),
        case.profile,
        Topology.with_mock(case.cards),
        case.limits(),
        positions=(case.prompt + case.after,) * share_of(case, number),
        weights=case.weights,
        others=[replica for other, replica in enumerate(plan.replicas) if other != number],
        serving=serving,
        hang_timeout_s=case.hang_timeout_s if case.fault == "hang" else None,
    )


def allowance_s(case: Case) -> float:
    """How much later than predicted the token may come: an heir first ends the steps that it has
    under way."""
    plan, number = case.made_plan(), replica_of(case)
    heir = 0 if number else 1
    if case.weights is not Weights.HELD or not share_of(case, heir):
        return 0.0
    step = cost.decode(
        named_shape(case.shape),
        plan.replicas[heir],
        case.profile,
        Topology.with_mock(case.cards),
        batch=share_of(case, heir),
        context=case.prompt + case.after + STEPS_AHEAD,
    )
    return STEPS_AHEAD * step.seconds


# --- simulated --------------------------------------------------------------------------


@attrs.frozen
class Simulated:
    """Seconds of what happened, from the failure on: when the card was lost, what re-planning took
    (or giving up the replica, to another), and when the last interrupted sequence had its next
    token; the plan by then."""

    detection_s: float
    replan_s: float
    seconds: float
    plan: str


def simulate(case: Case) -> Simulated:
    """What a fleet of hollow cards does."""
    return run_virtual(_simulate, case)


async def _simulate(case: Case) -> Simulated:
    specs = [VirtualCardSpec(ddr_bytes=case.ddr_bytes, hollow=True)] * case.cards
    async with open_fleet(specs, profile=case.profile, hang_timeout_s=case.hang_timeout_s) as fleet:
        model = await fleet.load_shape(
            case.shape,
            plan=case.plan,
            ctx=case.context,
            kv_tokens=case.kv_tokens,
            kv_copies=case.kv_copies,
        )
        replanned = trio.Event()

        def hear(event: Event) -> None:
            if isinstance(event, Replanned | ReplicaLost):
                replanned.set()

        fleet.events.listen(hear)
        times: list[list[float]] = [[] for _ in range(case.batch)]
        failed_s = 0.0

        async def take(number: int, generation: Generation) -> None:
            nonlocal failed_s
            async for token in generation:
                if token.id is None:
                    continue
                times[number].append(trio.current_time())
                if number == first and len(times[number]) == case.after:
                    FAULTS[case.fault](fleet, case.lost)
                    failed_s = trio.current_time()

        first = replica_of(case)
        generations = [
            model.generate([1] * case.prompt, max_tokens=case.tokens, ignore_eos=True)
            for _ in range(case.batch)
        ]
        async with trio.open_nursery() as nursery:
            for number, generation in enumerate(generations):
                nursery.start_soon(take, number, generation)
        # A replica whose sequences go on elsewhere may not be filled again by then.
        await replanned.wait()
        history = fleet.events.history
        (lost,) = (event for event in history if isinstance(event, CardLost))
        (moved,) = (event for event in history if isinstance(event, Replanned | ReplicaLost))
        hit = times[first :: len(case.made_plan().replicas)]
        return Simulated(
            detection_s=lost.time_s - failed_s,
            replan_s=moved.time_s - lost.time_s,
            seconds=max(min(t for t in taken if t > failed_s) for taken in hit) - failed_s,
            plan=model.plan.name,
        )


# --- both -------------------------------------------------------------------------------


def compare(case: Case) -> dict[str, Any]:
    """A record of a case; `difference` is the prediction's, as a part of what was simulated, and
    `later_s` how much later than predicted that was."""
    said = predict(case)
    record: dict[str, Any] = {
        "case": case.name,
        "shape": case.shape,
        "cards": case.cards,
        "profile": case.profile.name,
        "before": case.made_plan().name,
        "after": plan_after(case).name,
        "weights": case.weights.value,
        "sequences": share_of(case, replica_of(case)),
        "positions": case.prompt + case.after,
        "predicted": {
            **attrs.asdict(said),
            "replan_s": said.replan_s,
            "seconds": said.seconds,
            "later_at_most_s": allowance_s(case),
        },
        "simulated": None,
        "difference": None,
        "later_s": None,
    }
    if case.simulated:
        happened = simulate(case)
        record["simulated"] = attrs.asdict(happened)
        record["difference"] = said.seconds / happened.seconds - 1
        record["later_s"] = happened.seconds - said.seconds
    return record


def agrees(record: dict[str, Any]) -> bool:
    """Whether the prediction is what was simulated, within the bound."""
    said, happened = record["predicted"], record["simulated"]
    if happened is None:
        return True
    later = {"seconds": said["later_at_most_s"]}
    # Who has an heir does not wait for its own cards.
    names = (
        ["detection_s", "replan_s", "seconds"] if said["replan_s"] else ["detection_s", "seconds"]
    )
    for name in names:
        bound_s, later_s = TOLERANCE * said[name] + TOLERANCE_S, later.get(name, 0.0)
        if not -bound_s <= happened[name] - said[name] <= bound_s + later_s:
            return False
    return True


def save(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Write the record; what the two differ by shows in the seventh digit."""
    record = {"tolerance": TOLERANCE, "tolerance_s": TOLERANCE_S, "cases": records}
    text = json.dumps(report.rounded(record, digits=8), indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def show(records: Sequence[dict[str, Any]]) -> None:
    rows = []
    for record in records:
        said, happened = record["predicted"], record["simulated"] or {}
        off = record["difference"]
        rows.append(
            (
                record["case"],
                record["after"],
                said["detection_s"],
                said["release_s"] + said["weights_s"],
                said["programs_s"],
                said["kv_s"],
                said["seconds"],
                happened.get("seconds"),
                None if off is None else f"{off:+.3%}",
                happened.get("replan_s"),
            )
        )
    columns = (
        *("case", "goes on with", "noticed", "weights", "programs", "KV", "no token, s"),
        *("simulated", "difference", "re-planned"),
    )
    report.show_table("seconds without a token when a card fails", columns, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this in their name")
    parser.add_argument("--json", metavar="FILE", help="write the record here")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"no case has {options.only!r} in its name")
    records = [compare(case) for case in cases]
    show(records)
    path = options.json or (None if options.only else RESULTS)
    if path:
        save(path, records)
    wrong = [record["case"] for record in records if not agrees(record)]
    for name in wrong:
        print(f"{name}: prediction and simulation do not agree", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
