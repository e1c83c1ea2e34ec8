"""Where trees of runs meet row locks: whoever ends, cancels, waits or resumes at the same time, nobody is refused."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from typing import Any

import pytest
from django.db import connection, connections, transaction

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.states import UNFINISHED
from django_durable.testing import run_until_idle
from django_durable.worker.loop import Worker

pytestmark = pytest.mark.django_db(transaction=True)


# So many verbs that changed something, by so many threads.
ROUNDS, STRIKERS = 500, 3


# -- The one moment ---------------------------------------------------------------------------------------------


@durable.workflow(name="trees.nap")
def nap(seconds: float = 3600) -> str:
    durable.sleep(seconds)
    return "awake"


@durable.workflow(name="trees.watcher")
def watcher(whom: durable.RunHandle, how: str) -> Any:
    if how == "wait":
        return len(durable.wait([whom], "FIRST").done)
    return durable.get_event(whom, "news") if how == "event" else whom.result()


@durable.workflow(name="trees.watched")
def watched(whom: str, how: str) -> None:
    """The elder child is watched by the younger one; or this run itself is."""
    elder = nap.start()
    me = durable.RunHandle(durable.current().run_id, "default")
    watcher.start(elder if whom == "sister" else me, how)
    durable.receive("what never comes")


class Crossing:
    """Lets a cancel and a run that begins to wait meet at one row, the cancel in front, while each may hold others."""

    def __init__(self, waiter: str, target: str, cancel: Any) -> None:
        self.waiter, self.target = waiter, target
        self.cancel = cancel
        self.holds_target, self.met = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.threads = [threading.Thread(target=act, daemon=True) for act in (self.hold, self.strike)]

    def __call__(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if not self.met.is_set() and "FOR UPDATE" in sql and {self.waiter, self.target} <= set(params or ()):
            self.met.set()
            hold, strike = self.threads
            hold.start()
            assert self.holds_target.wait(10)
            strike.start()
            self.until_blocked(1)
        return execute(sql, params, many, context)

    def hold(self) -> None:
        """Keep the row from both, until they stand in line for it."""
        try:
            with transaction.atomic():
                list(WorkflowRun.objects.filter(pk=self.target).select_for_update())
                self.holds_target.set()
                self.until_blocked(2)
        finally:
            connections.close_all()

    def strike(self) -> None:
        try:
            self.cancel()
        except BaseException as error:
            self.error = error
        finally:
            connections.close_all()

    def until_blocked(self, count: int) -> None:
        import psycopg

        # On a connection of its own: within a transaction the statistics stand still.
        given = connection.get_connection_params()
        where = {key: given[key] for key in ("host", "port", "user", "password", "dbname") if given.get(key)}
        question = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        with psycopg.connect(autocommit=True, **where) as other:
            until = time.monotonic() + 10
            while other.execute(question).fetchone()[0] < count:
                assert time.monotonic() < until, f"{count} were to stand in line"
                time.sleep(0.002)


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize("how", ["result", "wait", "event"])
@pytest.mark.parametrize(("whom", "target"), [("sister", "p.1"), ("parent", "p")])
def test_a_tree_is_cancelled_just_when_a_child_begins_to_wait(
    whom: str, target: str, how: str, in_transaction: bool
) -> None:
    """Each wants what the other wants: a child that held its own row meanwhile would keep the cancel from ending."""
    run = watched.using(run_id="p").start(whom, how)

    def cancel() -> None:
        if in_transaction:
            with transaction.atomic():
                assert run.cancel("enough")
        else:
            assert run.cancel("enough")

    crossing = Crossing("p.2", target, cancel)
    connection.ensure_connection()
    with connection.execute_wrapper(crossing):
        run_until_idle()
    assert crossing.met.is_set(), "the moment never came"
    for thread in crossing.threads:
        thread.join(20)
    assert crossing.error is None
    run_until_idle()
    assert set(WorkflowRun.objects.values_list("status", "cancel_reason")) == {("CANCELLED", "enough")}


# -- All moments ------------------------------------------------------------------------------------------------


@durable.step(name="tick")
def tick(number: int) -> int:
    return number


@durable.workflow(name="trees.leaf")
def leaf(number: int, elder: durable.RunHandle | None = None, parent: durable.RunHandle | None = None) -> int:
    tick(number)
    if elder is not None:
        durable.wait([elder])
    if parent is not None:
        durable.get_event(parent, "go")
    return tick(number)


@durable.workflow(name="trees.branch")
def branch(number: int) -> int:
    me = durable.RunHandle(durable.current().run_id, "default")
    first = leaf.start(number)
    handles = [first, leaf.start(number, first), leaf.start(number, None, me)]
    durable.set_event("go", True)
    if number % 2:
        while handles:
            handles = durable.wait(handles, "FIRST").pending
    else:
        durable.wait(handles)
    return number


@durable.workflow(name="trees.root")
def root(number: int) -> int:
    durable.wait([branch.start(number), branch.start(number + 1)])
    return number


VERBS = ("cancel", "cancel in a transaction", "pause", "resume", "resume", "resume")


class Striker(threading.Thread):
    """Does to runs what a person may, without looking; notes what was refused."""

    def __init__(self, seed: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.dice = random.Random(seed)
        self.stopped = stop
        self.acts: Counter[str] = Counter()
        self.errors: list[str] = []

    def run(self) -> None:
        try:
            while not self.stopped.is_set():
                ids = list(WorkflowRun.objects.filter(status__in=UNFINISHED).values_list("pk", flat=True)[:200])
                if not ids:
                    self.stopped.wait(0.005)
                    continue
                self.strike(durable.RunHandle(self.dice.choice(ids), "default"), self.dice.choice(VERBS))
        finally:
            connections.close_all()

    def strike(self, run: durable.RunHandle, verb: str) -> None:
        try:
            if verb == "cancel in a transaction":
                with transaction.atomic():
                    self.acts[verb] += run.cancel()
            else:
                self.acts[verb] += getattr(run, verb)()
        except BaseException as error:
            self.errors.append(f"{verb} of {run.id}: {type(error).__name__}: {error}")


@pytest.mark.timeout(300)
def test_trees_end_while_they_are_cancelled_paused_and_resumed() -> None:
    seed, stop = str(random.randrange(2**32)), threading.Event()
    workers = [Worker("default", concurrency=4) for _ in range(2)]
    at_work = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
    strikers = [Striker(f"{seed}-{number}", stop) for number in range(STRIKERS)]
    for thread in [*at_work, *strikers]:
        thread.start()
    until, number = time.monotonic() + 240, 0
    while sum(sum(striker.acts.values()) for striker in strikers) < ROUNDS:
        assert time.monotonic() < until
        if WorkflowRun.objects.filter(status__in=UNFINISHED, workflow="trees.root").count() < 6:
            root.using(run_id=f"{number}").start(number)
            number += 1
        time.sleep(0.01)
    stop.set()
    for striker in strikers:
        striker.join(20)
    while left := list(WorkflowRun.objects.filter(status__in=UNFINISHED).values_list("pk", "status", "waiting_for")):
        assert time.monotonic() < until, f"stuck, with seed {seed}: {left[:10]}"
        for paused in WorkflowRun.objects.filter(status="WAITING", waiting_for="resume"):
            durable.RunHandle(paused.pk, "default").resume()
        time.sleep(0.05)
    for worker in workers:
        worker.stop()
    for thread in at_work:
        thread.join(30)
    assert [error for striker in strikers for error in striker.errors] == [], f"seed {seed}"
    ended = Counter(WorkflowRun.objects.values_list("status", flat=True))
    assert set(ended) <= {"SUCCEEDED", "CANCELLED"}, "a run has met an error of the database"
    assert min(ended.values()) > 0
