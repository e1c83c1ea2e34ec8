"""`durable_worker --processes 2`: one command, several processes, and what becomes of the runs of one that dies."""

from __future__ import annotations

import os
import signal

from django_durable.models import Worker, WorkflowRun
from tests.scenarios.harness import Process, Stage, answer, free_port, gone
from tests.scenarios.workflows import checkout, long, poison


def children() -> dict[int, str]:
    """The pids of the worker processes, and their rows' ids."""
    return dict(Worker.objects.values_list("pid", "pk"))


def two_processes(stage: Stage, *arguments: str) -> Process:
    parent = stage.command("durable_worker", "--processes=2", *arguments)
    stage.until(lambda: len(children()) == 2 or parent.code is not None, "two processes work")
    assert parent.code is None, parent.said()
    return parent


def test_a_killed_process_is_replaced_and_its_runs_go_on_at_once(stage: Stage) -> None:
    parent = two_processes(stage)
    before = children()
    run = long.using(run_id="long").start("gate")
    victim = stage.sees("holding")["pid"]
    os.kill(victim, signal.SIGKILL)

    successor = stage.until(
        lambda: next((line["pid"] for line in stage.log("holding") if line["pid"] != victim), None),
        "the run goes on in another process",
    )
    stage.until(lambda: len(children()) == 2 and victim not in children(), "there are two processes again")
    assert successor in children()
    assert len(set(children()) - set(before)) == 1
    stage.open("gate")
    assert run.result(timeout=30) == successor
    assert run.model.recoveries == 1
    parent.terminate()
    assert parent.wait() == 0, parent.said()
    assert not Worker.objects.exists()


def test_sigterm_to_the_parent_ends_all_in_order(stage: Stage) -> None:
    parent = two_processes(stage)
    pids = children()
    runs = [long.using(run_id=f"long-{number}").start("gate") for number in range(4)]
    stage.until(lambda: len({line["run"] for line in stage.log("holding")}) == 4, "all are under way")
    parent.terminate()
    stage.open("gate")
    assert parent.wait() == 0, parent.said()
    stage.ended(*[run.id for run in runs], patience=0)
    assert all(run.model.recoveries == 0 and run.model.attempt == 1 for run in runs)
    assert all(gone(pid) for pid in pids)
    assert not Worker.objects.exists()


def test_the_processes_of_a_killed_parent_end_by_themselves(stage: Stage) -> None:
    parent = two_processes(stage)
    pids = children()
    run = long.using(run_id="long").start("gate")
    stage.sees("holding")
    parent.kill()
    stage.open("gate")
    stage.until(lambda: all(gone(pid) for pid in pids), "the processes end")
    stage.ended(run.id, patience=0)
    assert run.model.recoveries == 0
    assert not Worker.objects.exists()


def test_a_run_that_kills_its_worker_every_time_is_set_aside_and_its_neighbours_finish(stage: Stage) -> None:
    parent = two_processes(stage)
    before = [checkout.using(run_id=f"before-{number}").start("ada") for number in range(10)]
    poisoned = poison.start()
    after = [checkout.using(run_id=f"after-{number}").start("bob", "declined") for number in range(10)]

    stage.ended(poisoned.id, status="DEAD", patience=90)
    stage.ended(*[run.id for run in before + after])
    stage.judge(*[run.id for run in before + after])
    # max_recoveries=3: it is the fourth death that is one too many.
    assert len(stage.log("poisoned")) == 4
    assert poisoned.model.recoveries == 4
    # The fleet has survived it.
    assert parent.code is None, parent.said()
    later = checkout.using(run_id="later").start("cyd")
    stage.ended(later.id)
    assert not WorkflowRun.objects.filter(status__in=["PENDING", "RUNNING", "WAITING"]).exists()


def test_a_process_that_was_taken_for_dead_is_ready_again_and_is_buried_under_its_new_name(stage: Stage) -> None:
    port = free_port()
    parent = two_processes(stage, f"--health-port={port}")
    stage.until(lambda: answer(port, "/readyz") == 200, "both are ready")
    victim, old = next(iter(children().items()))
    Worker.objects.filter(pk=old).delete()
    stage.until(lambda: children().get(victim, old) != old, "it goes on under another id")
    stage.until(lambda: answer(port, "/readyz") == 200, "both are ready again")
    os.kill(victim, signal.SIGKILL)
    stage.until(lambda: len(children()) == 2 and victim not in children(), "another takes its place")
    parent.terminate()
    assert parent.wait() == 0, parent.said()


def test_all_processes_killed_at_once_are_replaced(stage: Stage) -> None:
    parent = two_processes(stage)
    before = children()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    stage.until(lambda: len(set(children()) - set(before)) == 2 or parent.code is not None, "two new processes work")
    assert parent.code is None, f"the parent has ended with {parent.code}:\n{parent.said()}"
    run = checkout.using(run_id="checkout").start("ada")
    stage.ended(run.id)
    stage.judge(run.id)
