"""A parent's and its children's process dies at each statement: none is lost, and none happens twice."""

from __future__ import annotations

from itertools import count

import pytest

from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.serialization import loads
from tests.app.models import Ledger
from tests.scenarios.harness import LONG_LEASE, Stage
from tests.scenarios.workflows import family

# The first processes of a parent and its children take more statements than this until they park.
FEWEST = 25

HISTORY = [
    (1, "first", "atomic", "SUCCEEDED"),
    (2, "start member", "child", "SUCCEEDED"),
    (3, "member", "child", "SUCCEEDED"),
    (4, "wait", "wait", "SUCCEEDED"),
    (5, "result {}.2", "wait", "SUCCEEDED"),
    (6, "second", "atomic", "SUCCEEDED"),
]


@pytest.mark.timeout(300)
def test_killed_at_any_statement_a_parent_and_its_children_still_happen_once(stage: Stage) -> None:
    # The lease stays out of it: what a dead process held is free because it is seen to be dead.
    stage.options = {**LONG_LEASE, "HEARTBEAT_SECONDS": 60, "NOTIFY": False}
    began = []
    for nth in count(1):
        run = family.using(run_id=f"family-{nth}").start("ada")
        began.append(run.id)
        victim = stage.act("dying_at_statement", nth, "after", "worker", "--burst", "--concurrency=1")
        code = victim.wait()
        assert code in (0, -9), victim.said()
        stage.finish()
        if code == 0:
            break
    deaths = stage.log("killed at statement")
    assert [line["nth"] for line in deaths] == list(range(1, nth))
    assert len(deaths) >= FEWEST
    assert "COMMIT" in {line["statement"] for line in deaths}
    for run_id in began:
        judge(run_id)
    assert WorkflowRun.objects.count() == 3 * len(began), "there is a child too many"


def judge(run_id: str) -> None:
    """Fail unless the parent and its two children were executed once, and each saw the others' own results."""
    runs = {run.pk: run for run in WorkflowRun.objects.filter(pk__startswith=f"{run_id}.")}
    runs[run_id] = WorkflowRun.objects.get(pk=run_id)
    assert {pk: run.status for pk, run in runs.items()} == dict.fromkeys(
        [run_id, f"{run_id}.2", f"{run_id}.3"], "SUCCEEDED"
    )
    effects = {pk: dict(Ledger.objects.filter(key__startswith=f"{pk}/").values_list("key", "note")) for pk in runs}
    assert {pk: sorted(found) for pk, found in effects.items()} == {pk: [f"{pk}/first", f"{pk}/second"] for pk in runs}
    assert Ledger.objects.filter(key__startswith=f"{run_id}/").count() == 2
    started, called = (
        [f"ada, {how}", effects[pk][f"{pk}/first"], effects[pk][f"{pk}/second"]]
        for how, pk in (("started", f"{run_id}.2"), ("called", f"{run_id}.3"))
    )
    own = effects[run_id]
    expected = [own[f"{run_id}/first"], started, called, 1, 0, own[f"{run_id}/second"]]
    assert loads(runs[run_id].output) == expected
    history = StepCheckpoint.objects.filter(run=run_id).values_list("position", "name", "kind", "status")
    assert list(history) == [(at, name.format(run_id), *rest) for at, name, *rest in HISTORY]
