"""A worker is killed while the steps of a run are under way in several of its threads."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from django.db import connection

from django_durable.models import StepCheckpoint, Worker
from tests.app.models import Account, Ledger
from tests.scenarios.harness import Stage, connections_of
from tests.scenarios.workflows import journey, probe

PLACES = ["train", "hotel", "museum", "dinner"]
PEOPLE = ["ada", "bob", "cyd", "dan"]


@pytest.fixture(autouse=True)
def seats(stage: Stage) -> None:
    Account.objects.bulk_create([Account(name="free"), Account(name="taken")])


def check(run_id: str) -> None:
    """Everything was booked once, and the result is made of what stands."""
    booked = dict(Ledger.objects.filter(key__startswith=f"{run_id}/").values_list("key", "note"))
    assert Ledger.objects.filter(key__startswith=f"{run_id}/").count() == len(PLACES)
    assert journey.using(run_id=run_id).start().result(timeout=0) == {
        "booked": [booked[f"{run_id}/book {place}"] for place in PLACES],
        "asked": [f"{whom} says yes" for whom in PEOPLE],
    }
    names = StepCheckpoint.objects.filter(run=run_id).order_by("position").values_list("name", "status")
    assert list(names) == [("ask", "SUCCEEDED")] * 4 + [("book", "SUCCEEDED")] * 4


def test_a_worker_that_is_killed_under_several_steps_repeats_only_what_was_under_way(stage: Stage) -> None:
    worker = stage.worker()
    run = journey.using(run_id="journey").start("gate")
    stage.until(lambda: StepCheckpoint.objects.count() == 6, "all but bob and dan have answered")
    assert len(stage.log("asked")) == 4
    worker.kill()
    stage.open("gate")
    stage.finish()

    check(run.id)
    asked = Counter(line["whom"] for line in stage.log("asked"))
    assert asked == {"ada": 1, "bob": 2, "cyd": 1, "dan": 2}
    # Who was asked twice was asked with the same key.
    assert {line["key"] for line in stage.log("asked")} == {f"journey:{position}" for position in range(1, 5)}
    assert Account.objects.get(name="taken").balance == 4
    assert run.model.recoveries == 1


@pytest.mark.parametrize("moment", ["begins", "ends", "committed"])
@pytest.mark.parametrize("place", ["train", "dinner"])
def test_a_worker_that_is_killed_inside_one_of_them_books_nothing_twice(stage: Stage, place: str, moment: str) -> None:
    run = journey.using(run_id="journey").start()
    worker = stage.worker_that_may_die("--burst", plan={f"book {place} {moment}": "kill"})
    assert worker.wait() == -9, worker.said()
    assert stage.log("struck", moment=f"book {place} {moment}")
    stage.finish()

    check(run.id)
    assert Account.objects.get(name="taken").balance == 4
    assert run.model.recoveries == 1


def test_a_worker_has_no_more_threads_and_connections_behind_parallel_runs_than_before(stage: Stage) -> None:
    stage.open("gate")
    worker = stage.worker("--concurrency=1")

    def counts() -> tuple[int, int]:
        return connections_of(worker), len(os.listdir(f"/proc/{worker.pid}/task"))

    # Its one thread has its connection now, and its heartbeat too.
    assert probe.start().result(timeout=30) == worker.pid
    row = Worker.objects.get()
    stage.until(lambda: Worker.objects.get().last_seen > row.last_seen, "its heart beats")
    connected, threads = counts()
    runs = [journey.using(run_id=f"journey-{number}").start("gate") for number in range(8)]
    stage.ended(*[run.id for run in runs])
    # SQLite leaves the file open behind a connection that closes while another lives, and takes it for the next one:
    # there are as many as were open at a time, and no more.
    left_open = 7 if connection.vendor == "sqlite" else 0

    def at_rest() -> bool:
        connected_now, threads_now = counts()
        return connected_now <= connected + left_open and threads_now <= threads

    stage.until(at_rest, f"from {counts()} it is back at {connected} connections and {threads} threads")
    for run in runs:
        check(run.id)
