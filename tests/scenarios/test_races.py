"""No wake-up is lost: what is waited for comes true just when a run begins to wait, ten thousand times.

Nothing but the wake-up itself helps a run here: one that was overlooked is seen by the first look of the safety net,
and is a failure. DURABLE_RACES=10000 runs as many of each kind.
"""

from __future__ import annotations

import os
import time

import pytest
from django.db.models import Count

import django_durable as durable
from django_durable.engine.sweep import wake_overlooked
from django_durable.models import Message, StepCheckpoint, WorkflowRun
from django_durable.states import FINISHED
from tests.scenarios import waiting_workflows
from tests.scenarios.harness import LONG_LEASE, Stage
from tests.scenarios.waiting_workflows import EXPECTED, RIVALS, ROUNDS

RACES = int(os.environ.get("DURABLE_RACES", "300"))
# So long may nothing be recorded, on a busy machine.
SILENCE = 30.0

pytestmark = pytest.mark.timeout(60 + RACES)


@pytest.mark.parametrize("kind", EXPECTED)
def test_no_wake_up_is_lost(stage: Stage, kind: str) -> None:
    # Nobody dies here, and polling may not stand in for a wake-up: what is woken is PENDING, whoever looks.
    stage.options = {**LONG_LEASE, "HEARTBEAT_SECONDS": 5, "POLL_INTERVAL": 0.05}
    for number in range(RIVALS):
        stage.act("rival", number)
    stage.until(lambda: len(list(stage.folder.glob("rival-*"))) == RIVALS, "the rivals listen")
    workers = [stage.worker("--concurrency=2", "--queue=default") for _ in range(2)]
    runs = [getattr(waiting_workflows, kind).start() for _ in range(max(1, RACES // ROUNDS))]

    watch(stage, [run.id for run in runs])
    stage.open("over")
    for worker in workers:
        worker.terminate()
        assert worker.wait() == 0

    assert [result for run in runs if (result := run.result(0)) != EXPECTED[kind]] == []
    assert not stage.log("rival failed")
    for process in stage.processes:
        assert "A wake-up was lost" not in process.said()
        assert "Traceback" not in process.said(), process.said()
    # Each was taken once, and by one step.
    assert not Message.objects.filter(consumed_at=None).exists()
    taken = Message.objects.values("run", "consumed_by").annotate(times=Count("pk"))
    assert not taken.filter(times__gt=1).exists()
    if kind == "receiver":
        assert Message.objects.count() == len(runs) * ROUNDS
    assert not StepCheckpoint.objects.filter(run__in=[run.id for run in runs], status="WAITING").exists()
    print(report(kind, runs))


def watch(stage: Stage, ids: list[str]) -> None:
    """Wait for the end of all of them; fail at the first one that is overlooked, or when nothing moves any more."""
    last, since = -1, time.monotonic()
    while True:
        assert wake_overlooked("default") == 0, "a run was WAITING for what had already happened"
        left = WorkflowRun.objects.filter(pk__in=ids).exclude(status__in=FINISHED)
        if not left.exists():
            return
        now, recorded = time.monotonic(), StepCheckpoint.objects.count()
        if recorded != last:
            last, since = recorded, now
        assert now - since < SILENCE, list(left.values_list("pk", "status", "waiting_for")[:10])
        stage.pass_time(0.5)


def report(kind: str, runs: list[durable.RunHandle]) -> str:
    """How often the run came first, and how often what it waited for: both sides are to win."""
    wait = {"receiver": "receive", "follower": "event", "parent": "wait"}[kind]
    at_once, parked = 0, 0
    steps = StepCheckpoint.objects.filter(run__in=[run.id for run in runs]).order_by("run", "position")
    before = {run.id: 1 for run in runs}
    for run_id, step_kind, attempt in steps.values_list("run", "kind", "attempt"):
        if step_kind == wait:
            # Answered by a later execution than the one that got there.
            parked += attempt > before[run_id]
            at_once += attempt == before[run_id]
        before[run_id] = attempt
    assert min(at_once, parked) > 0, (at_once, parked)
    return f"{kind}: {at_once + parked} waits, {at_once} answered at once, {parked} parked"
