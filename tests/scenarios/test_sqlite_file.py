"""One SQLite file, many processes, and each may die or freeze with the file's only write lock in its hand."""

from __future__ import annotations

import random
import signal

from django.db import connection, transaction

from tests.app.models import Account
from tests.scenarios.harness import SHORT_LEASE, Process, Stage
from tests.scenarios.workflows import checkout, probe


def intact() -> bool:
    with connection.cursor() as cursor:
        return cursor.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_four_workers_killed_at_random_lose_nothing_and_double_nothing(stage: Stage) -> None:
    Account.objects.bulk_create([Account(name="free"), Account(name="taken")])
    chance = random.Random(7)
    ids = [f"run-{number}" for number in range(200)]
    with transaction.atomic():
        for number, run_id in enumerate(ids):
            checkout.using(run_id=run_id).start("ada", "declined" if number % 5 == 0 else "good")
    workers = [stage.worker() for _ in range(4)]
    deaths = 0
    for share in range(10, 190, 15):
        stage.until(lambda share=share: len(stage.log("charge")) >= share, f"{share} charges")
        victim = chance.choice(workers)
        victim.kill()
        deaths += 1
        workers[workers.index(victim)] = stage.worker()
    stage.ended(*ids, patience=60)

    facts = stage.judge(*ids)
    assert deaths == 12
    assert sum(facts["runs"][run_id]["recoveries"] for run_id in ids) > 0
    assert intact()
    complaints = [process.said() for process in stage.processes if "locked" in process.said()]
    assert not complaints


def test_a_writer_that_keeps_the_file_for_longer_than_the_lease(stage: Stage) -> None:
    stage.options = SHORT_LEASE
    workers = [stage.worker() for _ in range(2)]
    ids = [f"run-{number}" for number in range(40)]
    with transaction.atomic():
        for run_id in ids:
            checkout.using(run_id=run_id).start("ada")
    stage.until(lambda: len(stage.log("charge")) >= 5, "the runs are under way")
    # No worker can renew its lease meanwhile.
    with transaction.atomic():
        Account.objects.create(name="of somebody else")
        stage.pass_time(SHORT_LEASE["LEASE_SECONDS"] * 1.5)
    stage.ended(*ids)
    stage.judge(*ids)
    assert all(worker.code is None for worker in workers)
    assert intact()


def test_a_worker_frozen_in_its_transaction_holds_the_file_until_it_is_killed(stage: Stage) -> None:
    stage.options = SHORT_LEASE
    survivor = stage.worker("--queue=probes")
    frozen = stage.worker("--queue=default", plan={"fulfil ends": "freeze"})
    run = checkout.using(run_id="checkout").start("ada")
    stage.until(lambda: frozen.state == "T", "the worker freezes")
    frozen.kill()
    assert probe.using(queue="probes").start().result(timeout=30) == survivor.pid
    successor = stage.worker("--queue=default")
    stage.ended(run.id)
    stage.judge(run.id)
    assert run.result()["ended_by"] == successor.pid
    assert intact()


def test_an_idle_worker_sends_at_most_two_statements_a_second(stage: Stage) -> None:
    # The defaults, as a user gets them.
    stage.options = {}
    worker = stage.act("metered_worker")
    run = checkout.using(run_id="first").start("ada")
    stage.ended(run.id)
    # After work, it looks often for a moment.
    stage.pass_time(2)
    before = asked(stage, worker, 1)
    stage.pass_time(10)
    after = asked(stage, worker, 2)
    sent = after["count"] - before["count"]
    # Beats and looks were among them: the meter works, and the worker lives.
    assert 5 <= sent <= 20, "\n".join(after["last"][-sent:])


def asked(stage: Stage, worker: Process, times: int) -> dict:
    worker.strike(signal.SIGUSR1)
    return stage.until(lambda: stage.log("statements")[times - 1 : times], "the worker's count")[0]
