"""A worker is told to stop, as by every deployment: nothing is lost, and nothing counts as a crash."""

from __future__ import annotations

from datetime import timedelta

from django.db import transaction

import django_durable as durable
from django_durable.models import Worker, WorkflowRun
from tests.app.models import Ledger
from tests.scenarios.harness import Stage, answer, free_port, gone
from tests.scenarios.workflows import checkout, long, probe


def test_sigterm_lets_what_runs_end_and_begins_nothing_more(stage: Stage) -> None:
    port = free_port()
    worker = stage.worker(f"--health-port={port}")
    run = long.start("gate")
    stage.sees("holding")
    assert answer(port, "/healthz") == answer(port, "/readyz") == 200
    assert answer(port, "/elsewhere") == 404

    worker.terminate()
    stage.until(lambda: answer(port, "/readyz") == 503, "the worker says that it stops")
    assert answer(port, "/healthz") == 200
    later = probe.start()
    stage.open("gate")
    assert worker.wait() == 0, worker.said()

    assert run.result(timeout=0) == worker.pid
    assert run.model.recoveries == 0
    assert later.status == "PENDING"
    assert not Worker.objects.exists()


def test_what_does_not_end_within_the_grace_goes_on_elsewhere_at_once(stage: Stage) -> None:
    worker = stage.worker("--grace=0.2")
    run = long.using(run_id="long").start("gate")
    stage.sees("holding", pid=worker.pid)
    other = stage.worker()

    worker.terminate()
    stage.sees("holding", pid=other.pid)
    assert worker.wait() == 0, worker.said()
    stage.open("gate")
    assert run.result(timeout=30) == other.pid
    assert run.model.recoveries == 0
    assert run.model.attempt == 2
    assert Ledger.objects.filter(key="long/after").count() == 2


def test_a_transaction_that_does_not_end_within_the_grace_leaves_nothing(stage: Stage) -> None:
    worker = stage.worker("--grace=0.2")
    run = long.using(run_id="long").start("gate", in_transaction=True)
    stage.sees("holding", pid=worker.pid)

    # On SQLite this step keeps all others from writing, its own worker's hand-back too.
    worker.terminate()
    assert worker.wait(patience=15) == 0, worker.said()
    other = stage.worker()
    stage.sees("holding", pid=other.pid)
    stage.open("gate")
    assert run.result(timeout=30) == other.pid
    assert Ledger.objects.filter(key="long/hold").count() == 1


def test_a_second_sigterm_stops_at_once(stage: Stage) -> None:
    worker = stage.worker("--grace=600")
    run = long.using(run_id="long").start("gate")
    stage.sees("holding", pid=worker.pid)
    other = stage.worker()

    worker.terminate()
    # One that follows within half a second is the same wish, told twice.
    stage.pass_time(0.6)
    assert worker.code is None
    worker.terminate()
    assert worker.wait() == 128 + 15
    stage.sees("holding", pid=other.pid)
    stage.open("gate")
    assert run.result(timeout=30) == other.pid
    assert run.model.recoveries == 0


def test_burst_ends_when_nothing_is_due(stage: Stage) -> None:
    due = [checkout.using(run_id=f"checkout-{number}").start("ada") for number in range(20)]
    tomorrow = checkout.using(run_id="tomorrow", run_after=timedelta(days=1)).start("ada")
    worker = stage.act("worker", "--burst")
    assert worker.wait() == 0, worker.said()
    stage.judge(*[run.id for run in due])
    assert tomorrow.status == "WAITING"
    assert not Worker.objects.exists()


def test_a_worker_keeps_to_its_queues(stage: Stage) -> None:
    ours = checkout.using(run_id="ours", queue="mail").start("ada")
    theirs = checkout.using(run_id="theirs", queue="video").start("ada")
    worker = stage.act("worker", "--burst", "--queue=mail", "--queue=sms")
    assert worker.wait() == 0, worker.said()
    stage.judge(ours.id)
    assert theirs.status == "PENDING"


def test_a_workflow_that_the_worker_does_not_know_stays_pending_and_is_reported_once(stage: Stage) -> None:
    stage.options["HEARTBEAT_SECONDS"] = 0.1
    unknown = probe.start()
    WorkflowRun.objects.filter(pk=unknown.id).update(workflow="shop.forgotten")
    worker = stage.worker()
    stage.until(lambda: "shop.forgotten" in worker.said(), "the worker reports it")
    # Another name, which comes later, shows that it has looked again.
    for name in ("shop.second", "shop.third"):
        with transaction.atomic():
            WorkflowRun.objects.filter(pk=probe.start().id).update(workflow=name)
        stage.until(lambda name=name: name in worker.said(), "the worker reports the next one")
    assert worker.said().count("shop.forgotten") == 1
    assert unknown.status == "PENDING"
    assert unknown.model.attempt == 0
    known = checkout.using(run_id="known").start("ada")
    stage.ended(known.id)
    stage.judge(known.id)


WORKFLOWS = """
import django_durable as durable

@durable.workflow(name="edited")
def edited():
    return {value!r}
"""


def test_autoreload_starts_anew_with_the_changed_code_and_hands_back(stage: Stage) -> None:
    app = stage.folder / "edited_app"
    app.mkdir()
    (app / "__init__.py").touch()
    code = app / "workflows.py"
    code.write_text(WORKFLOWS.format(value="before"))
    path = ":".join([str(stage.folder), *filter(None, [stage.environment.get("PYTHONPATH")])])
    worker = stage.command("durable_worker", "--autoreload", PYTHONPATH=path, SCENARIO_APP="edited_app")
    run = long.using(run_id="long").start("gate")
    first = stage.sees("holding")["pid"]
    assert edited_run("first").result(timeout=30) == "before"

    def edited_until_seen() -> bool:
        # Django's reloader misses a change from before its first look.
        code.write_text(WORKFLOWS.format(value="after"))
        return gone(first)

    stage.until(edited_until_seen, "the old process ends")
    second = stage.until(lambda: other_than(first, stage.log("holding")), "the new process goes on with the run")
    assert edited_run("second").result(timeout=30) == "after"
    stage.open("gate")
    assert run.result(timeout=30) == second
    assert run.model.recoveries == 0
    assert worker.code is None
    worker.terminate()
    assert worker.wait() == 0, worker.said()


def other_than(pid: int, lines: list[dict]) -> int | None:
    return next((line["pid"] for line in lines if line["pid"] != pid), None)


def edited_run(run_id: str) -> durable.RunHandle:
    """Start a run of the workflow that only the worker has."""
    with transaction.atomic():
        WorkflowRun.objects.filter(pk=probe.using(run_id=run_id).start().id).update(workflow="edited")
    return durable.get_run(run_id)
