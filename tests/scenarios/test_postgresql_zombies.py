"""A worker is frozen inside a step's transaction, and wakes up after another has taken over its run.

On SQLite a process that is frozen inside a transaction keeps the whole file to itself: see test_sqlite_file.py.
"""

from __future__ import annotations

import pytest

from django_durable.models import Worker
from tests.app.models import Account, Ledger
from tests.scenarios.harness import SHORT_LEASE, Stage
from tests.scenarios.workflows import checkout, long, probe


@pytest.mark.parametrize("moment", ["reserve ends", "fulfil ends"])
def test_a_zombies_transaction_is_rolled_back(stage: Stage, moment: str) -> None:
    stage.options = SHORT_LEASE
    zombie = stage.worker("--concurrency=1", "--queue=default", "--queue=probes", plan={moment: "freeze"})
    run = checkout.using(run_id="checkout").start("ada")
    stage.until(lambda: zombie.state == "T", "the first worker freezes")

    successor = stage.worker("--queue=default", plan={moment: "wait:gate"})
    stage.sees("struck", moment=moment, pid=successor.pid)
    zombie.thaw()
    assert probe.using(queue="probes").start().result(timeout=30) == zombie.pid

    # No checkpoint stood in its way yet: it was the fence that refused it.
    step = moment.removesuffix(" ends")
    assert not Ledger.objects.filter(key=f"checkout/{step}").exists()
    assert not run.model.steps.filter(name=step).exists()
    stage.open("gate")
    stage.ended(run.id)
    stage.judge(run.id)
    assert Ledger.objects.get(key=f"checkout/{step}").note.startswith(f"{successor.pid}-")


def test_a_successor_waits_for_the_rows_that_a_zombie_has_locked(stage: Stage) -> None:
    stage.options = SHORT_LEASE
    Account.objects.bulk_create([Account(name="free"), Account(name="taken")])
    zombie = stage.worker("--queue=default", plan={"reserve ends": "freeze"})
    run = checkout.using(run_id="checkout").start("ada")
    stage.until(lambda: zombie.state == "T", "the first worker freezes")
    successor = stage.worker("--queue=default")
    stage.until(lambda: run.model.attempt == 2, "the second takes over")
    zombie.thaw()
    stage.ended(run.id)
    stage.judge(run.id)
    assert run.result()["ended_by"] == successor.pid


def test_frozen_between_the_fence_and_the_commit(stage: Stage) -> None:
    """It holds the run's row, so nobody can take over before it has committed or died; and other runs go on."""
    stage.options = SHORT_LEASE
    zombie = stage.act("frozen_at_commit_of", "fulfil", "worker", "--queue=default")
    run = checkout.using(run_id="checkout").start("ada")
    stage.until(lambda: zombie.state == "T", "the first worker freezes")
    successor = stage.worker()
    stage.until(lambda: not Worker.objects.filter(pid=zombie.pid).exists(), "the first worker is declared dead")
    assert probe.start().result(timeout=30) == successor.pid
    assert run.model.attempt == 1
    zombie.thaw()
    stage.ended(run.id)
    stage.judge(run.id)
    assert Ledger.objects.get(key="checkout/fulfil").note.startswith(f"{zombie.pid}-")


def test_killed_between_the_fence_and_the_commit(stage: Stage) -> None:
    stage.options = SHORT_LEASE
    zombie = stage.act("frozen_at_commit_of", "fulfil", "worker", "--queue=default")
    run = checkout.using(run_id="checkout").start("ada")
    stage.until(lambda: zombie.state == "T", "the first worker freezes")
    successor = stage.worker()
    zombie.kill()
    stage.ended(run.id)
    stage.judge(run.id)
    assert Ledger.objects.get(key="checkout/fulfil").note.startswith(f"{successor.pid}-")


def test_nothing_commits_after_a_cancel_has(stage: Stage) -> None:
    stage.worker("--concurrency=1")
    run = long.using(run_id="cancelled").start("gate", in_transaction=True)
    stage.sees("holding")
    assert run.cancel("changed my mind")
    stage.open("gate")
    probe.start().result(timeout=30)
    assert run.status == "CANCELLED"
    assert list(Ledger.objects.values_list("key", flat=True)) == ["cancelled/after"]
    assert [step.name for step in run.model.steps.all()] == ["after"]
