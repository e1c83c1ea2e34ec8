"""What must be true in the end, whatever was killed: judged from traces that the engine does not write."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.serialization import loads
from tests.app.models import Account, Ledger


def collect() -> dict[str, Any]:
    """Everything that is judged, read from the database. An error in reading is a failure, never an empty answer."""
    runs = WorkflowRun.objects.values("id", "workflow", "status", "input", "output", "attempt", "recoveries", "worker")
    steps = StepCheckpoint.objects.order_by("run_id", "position")
    return {
        "runs": {run["id"]: run for run in runs},
        "steps": list(steps.values("run_id", "position", "name", "kind", "status", "output", "attempt")),
        "ledger": list(Ledger.objects.values_list("key", "note")),
        "seats": dict(Account.objects.values_list("name", "balance")),
    }


def expected(customer: str, card: str) -> tuple[dict[str, Any], list[str]]:
    """A checkout's result and its atomic effects, as a pure function of its input."""
    if card == "declined":
        return {"ok": False, "reason": customer}, ["reserve", "release"]
    return {"ok": True, "payment": f"paid by {customer}"}, ["reserve", "fulfil"]


def judge(facts: dict[str, Any], log: list[dict[str, Any]], run_ids: list[str]) -> None:
    """Raise AssertionError, with all that is wrong, unless every one of these checkouts was done exactly once."""
    wrong: list[str] = []
    effects: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, token in facts["ledger"]:
        run_id, _, step = key.rpartition("/")
        effects[run_id][step].append(token)
    steps: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for step in facts["steps"]:
        steps[step["run_id"]].append(step)
    charges: dict[str, list[str]] = defaultdict(list)
    for line in log:
        if line["what"] == "charge":
            charges[line["run"]].append(line["key"])
    for run_id in run_ids:
        for complaint in judge_run(facts["runs"].get(run_id), effects[run_id], steps[run_id], charges[run_id]):
            wrong.append(f"{run_id}: {complaint}")
    wrong += [f"effects of a run that does not exist: {run_id}" for run_id in effects.keys() - facts["runs"].keys()]
    wrong += [f"charge of a run that does not exist: {run_id}" for run_id in charges.keys() - facts["runs"].keys()]
    if "free" in facts["seats"]:
        taken = Counter(key.rpartition("/")[2] for key, _ in facts["ledger"])
        moved = taken["reserve"] - taken["release"]
        if facts["seats"] != {"free": -moved, "taken": moved}:
            wrong.append(f"seats {facts['seats']} after {moved} reservations that stand")
    assert not wrong, "\n".join(wrong)


def judge_run(
    run: dict[str, Any] | None, effects: dict[str, list[str]], steps: list[dict[str, Any]], charges: list[str]
) -> list[str]:
    if run is None:
        return ["lost"]
    if run["status"] != "SUCCEEDED":
        return [f"{run['status']}, not SUCCEEDED"]
    wrong = []
    given = loads(run["input"])
    arguments = dict(zip(["customer", "card"], given["args"], strict=False)) | given["kwargs"]
    wanted, atomic = expected(arguments["customer"], arguments.get("card", "good"))
    result = loads(run["output"])
    tokens = result.pop("tokens")
    result.pop("ended_by")
    if result != wanted:
        wrong.append(f"result {result}, expected {wanted}")
    if {step: len(rows) for step, rows in effects.items()} != dict.fromkeys(atomic, 1):
        wrong.append(f"effects {dict(effects)}, expected one each of {atomic}")
    elif tokens != [effects[step][0] for step in atomic]:
        wrong.append(f"effects {dict(effects)} are not those of the result's tries {tokens}")
    if not charges or len(set(charges)) != 1:
        wrong.append(f"charged with the keys {charges}, expected one key at least once")
    history = [(step["position"], step["name"], step["kind"], step["status"]) for step in steps]
    charged = "FAILED" if "reason" in wanted else "SUCCEEDED"
    story = [
        (1, atomic[0], "atomic", "SUCCEEDED"),
        (2, "charge", "step", charged),
        (3, atomic[1], "atomic", "SUCCEEDED"),
    ]
    if history != story:
        wrong.append(f"checkpoints {history}, expected {story}")
    elif [loads(steps[0]["output"]), loads(steps[2]["output"])] != tokens:
        wrong.append("the checkpoints' values are not those that the workflow returned")
    elif not steps[0]["attempt"] <= steps[1]["attempt"] <= steps[2]["attempt"] <= run["attempt"]:
        wrong.append("a later step was recorded by an earlier execution")
    return wrong
