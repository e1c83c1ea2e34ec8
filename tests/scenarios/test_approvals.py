"""A person decides while workers die: the decision stands, what was undone is done once more, and nothing twice.

Before a statement is behind the one before it, so that each moment is struck once. The sweep over a worker's statements
is a long one: DURABLE_SWEEP_STRIDE=1 strikes at each of them, otherwise at every eleventh.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import count

import pytest

import django_durable as durable
from django_durable.engine import approvals
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.states import UNFINISHED
from tests.app.models import Ledger
from tests.scenarios.approval_workflows import allow, trip
from tests.scenarios.harness import LONG_LEASE, Stage

# The lease stays out of it: what a dead process held is free because it is seen to be dead.
OPTIONS = {**LONG_LEASE, "HEARTBEAT_SECONDS": 60, "NOTIFY": False, "PARK_AFTER": 0.001, "POLL_INTERVAL": 0.05}
STRIDE = int(os.environ.get("DURABLE_SWEEP_STRIDE", "11"))


def allow_what_waits() -> None:
    """The person at the other end: says yes to whatever is asked."""
    for run_id in WorkflowRun.objects.filter(waiting_for="approval:go").values_list("pk", flat=True):
        for asked in approvals.pending("default", run_id):
            approvals.decide("default", run_id, "go", True, data=f"yes to {run_id}", position=asked.position)


def finished() -> bool:
    allow_what_waits()
    return not WorkflowRun.objects.filter(status__in=UNFINISHED).exists()


def finish(stage: Stage) -> None:
    worker = stage.act("worker")
    stage.until(finished, "a clean worker finishes it")
    worker.end()


def judge(ids: list[str]) -> None:
    """Each trip has two legs; of each leg's bookings one stands, and was allowed once."""
    runs = {run.pk: run for run in WorkflowRun.objects.all()}
    assert set(runs) == {leg for run_id in ids for leg in (run_id, f"{run_id}~2")}
    assert {run.status for run in runs.values()} == {"SUCCEEDED"}
    effects = Counter(Ledger.objects.values_list("key", flat=True))
    for run_id in runs:
        assert effects[f"{run_id}/booked"] - effects[f"{run_id}/given back"] == 1
        # Refused once: undone once, if it was told in time that it was refused.
        assert effects[f"{run_id}/booked"] <= 2
        names = StepCheckpoint.objects.filter(run=run_id).order_by("position").values_list("name", flat=True)
        assert list(names) == ["patch sweep", "approval go", "book trip", "pay"]
    for run_id in ids:
        assert trip.using(run_id=run_id).start().result(0) == [f"yes to {run_id}", f"yes to {run_id}~2"]


def test_the_worker_that_asked_is_killed_and_the_person_decides_meanwhile(stage: Stage) -> None:
    stage.options = OPTIONS
    run = trip.using(run_id="trip").start()
    worker = stage.worker()
    stage.until(lambda: run.model.waiting_for == "approval:go", "it waits for a person")
    worker.kill()

    # No worker is there.
    run.decide("go", True, data="yes to trip")
    with pytest.raises(durable.AlreadyDecided):
        run.decide("go", False)
    assert run.status == "PENDING"

    finish(stage)
    judge(["trip"])
    # Parked, it was nobody's: its worker's death has cost it nothing.
    assert run.model.recoveries == 0


@pytest.mark.timeout(120 if STRIDE > 1 else 1200)
def test_a_worker_is_killed_at_any_statement(stage: Stage) -> None:
    stage.options = OPTIONS
    ids = []
    for nth in count(STRIDE, STRIDE):
        run = trip.using(run_id=f"trip-{nth}").start()
        ids.append(run.id)
        victim = stage.act("dying_at_statement", nth, "after", "worker", "--concurrency=1")
        stage.until(lambda victim=victim: finished() or victim.code is not None, "the worker dies, or ends it")
        if victim.code is None:
            victim.end()
            break
        assert victim.code == -9, victim.said()
        finish(stage)
    judge(ids)
    # The last one may have been struck at the very end.
    assert len(stage.log("killed at statement")) in (len(ids) - 1, len(ids))
    # Two legs of a mark, a wait, four steps, a retry and an end.
    assert nth > 60


def test_a_decider_is_killed_at_any_statement(stage: Stage) -> None:
    """All of the decision is there, or nothing: then the person is asked still."""
    stage.options = OPTIONS
    ids, stood, deaths = [], 0, 0
    for nth in count(1):
        run = trip.using(run_id=f"trip-{nth}").start()
        ids.append(run.id)
        worker = stage.act("worker")
        stage.until(lambda run=run: run.model.waiting_for == "approval:go", "it waits for a person")
        worker.end()
        victim = stage.act("dying_at_statement", nth, "after", "allow", run.id, f"yes to {run.id}")
        code = victim.wait()
        assert code in (0, -9), victim.said()
        decided = not approvals.pending("default", run.id)
        assert run.status == ("PENDING" if decided else "WAITING")
        deaths += code == -9
        stood += decided
        if decided:
            with pytest.raises(durable.AlreadyDecided):
                allow(run.id, "another")
        else:
            allow(run.id, f"yes to {run.id}")
        finish(stage)
        if code == 0:
            break
    judge(ids)
    # Only one that has committed stands: killed right behind its COMMIT, or not at all.
    assert stood == 2
    assert deaths == nth - 1 >= 6
