"""The tables say something else than what is: rows were deleted, or an answer never came."""

from __future__ import annotations

from django.db import transaction
from django.db.models import F

from django_durable.models import Worker, WorkflowRun
from tests.app.models import Ledger
from tests.scenarios.harness import LONG_LEASE, Stage
from tests.scenarios.workflows import checkout, long


def claimed_in_silence(run_id: str, worker: Worker) -> None:
    """Start a run as if this worker had claimed it and had never got the answer."""
    with transaction.atomic():
        checkout.using(run_id=run_id).start("ada")
        claimed = WorkflowRun.objects.filter(pk=run_id)
        assert claimed.update(status="RUNNING", worker=worker.pk, attempt=F("attempt") + 1)


def test_a_claim_whose_answer_was_lost_is_executed_while_its_worker_lives(stage: Stage) -> None:
    process = stage.worker()
    row = Worker.objects.get()
    claimed_in_silence("unknown", row)
    stage.ended("unknown")

    facts = stage.judge("unknown")
    assert facts["runs"]["unknown"]["recoveries"] == 0
    assert facts["runs"]["unknown"]["attempt"] == 2
    assert Worker.objects.get().pk == row.pk
    assert process.code is None


def test_a_busy_worker_gives_such_a_run_to_another(stage: Stage) -> None:
    busy = stage.worker("--concurrency=1")
    holder = long.start("gate")
    stage.sees("holding", pid=busy.pid)
    claimed_in_silence("unknown", Worker.objects.get())
    other = stage.worker()
    stage.ended("unknown")

    stage.judge("unknown")
    assert WorkflowRun.objects.get(pk="unknown").recoveries == 0
    assert checkout.using(run_id="unknown").start("ada").result()["ended_by"] == other.pid
    assert holder.status == "RUNNING"
    stage.open("gate")
    assert holder.result(timeout=30) == busy.pid


def test_runs_go_on_when_the_workers_rows_are_deleted(stage: Stage) -> None:
    stage.options = {**LONG_LEASE, "HEARTBEAT_SECONDS": 0.3}
    workers = [stage.worker("--concurrency=2") for _ in range(2)]
    held = [long.using(run_id=f"long-{number}").start("gate") for number in range(4)]
    stage.until(lambda: len({line["run"] for line in stage.log("holding")}) == 4, "all four are under way")
    waiting = [checkout.using(run_id=f"checkout-{number}").start("ada") for number in range(4)]
    rows = set(Worker.objects.values_list("pk", flat=True))
    assert len(rows) == 2
    Worker.objects.all().delete()

    stage.until(lambda: Worker.objects.exclude(pk__in=rows).count() == 2, "both workers register again")
    stage.until(lambda: not WorkflowRun.objects.filter(worker__in=rows).exists(), "nothing is left with the lost rows")
    stage.open("gate")
    stage.ended(*[run.id for run in held + waiting])
    stage.judge(*[run.id for run in waiting])
    for run in held:
        assert Ledger.objects.filter(key=f"{run.id}/after").count() == 2
    assert all(worker.code is None for worker in workers)
