"""No parallel step is under way when its run has ended or waits."""

import threading
from datetime import timedelta

import pytest
from django.db import connection

import django_durable as durable
from django_durable.engine.context import current_run
from django_durable.models import StepCheckpoint
from django_durable.testing import advance, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import times
from tests.parallel.common import (
    PATIENCE,
    calls,
    execute_as_a_worker,
    for_real,
    history,
    in_a_test,
    last,
    threads_of_steps,
    wait,
)
from tests.threads import together


@for_real
@pytest.mark.parametrize("how", ["sleep", "receive"])
def test_a_run_that_parks_waits_for_what_is_under_way_first(how):
    @durable.step(name="under way", atomic=False)
    def under_way(number):
        calls.append(number)
        barrier.wait(PATIENCE)
        Ledger.objects.create(key="under way")
        return number

    @durable.workflow(name=f"tests.parallel.parks.{how}")
    def parks():
        futures = [under_way.submit(number) for number in range(3)]
        # All three are under way, and none can end before the body parks.
        barrier.wait(PATIENCE)
        if how == "sleep":
            durable.sleep(3600)
        else:
            durable.receive("go")
        return [future.result() for future in futures]

    barrier = threading.Barrier(4)
    run = parks.start()
    execute_as_a_worker(run)
    assert (run.status, times("under way")) == ("WAITING", 3)
    assert threads_of_steps() == []
    assert StepCheckpoint.objects.filter(status="SUCCEEDED", name="under way").count() == 3
    # A replay does not come back to the barrier's three.
    barrier = threading.Barrier(1)
    run.send("now", "go")
    advance("2 hours")
    execute_as_a_worker(run)
    assert run.result(timeout=0) == [0, 1, 2]
    assert sorted(calls) == [0, 1, 2]


@durable.step(name="outside", atomic=False)
def outside(number):
    begun.release()
    wait(gate)
    Ledger.objects.create(key="outside")
    return number


@durable.step(name="inside")
def inside_a_transaction(number):
    if connection.vendor != "sqlite":  # whose one writer would keep the cancel waiting
        Ledger.objects.create(key="inside")
    begun.release()
    wait(gate)
    if connection.vendor == "sqlite":
        Ledger.objects.create(key="inside")
    return number


@durable.workflow(name="tests.parallel.cancelled")
def cancelled(step_name):
    step = {"outside": outside, "inside": inside_a_transaction}[step_name]
    return step.map(range(6), max_parallel=2 if step is outside or connection.vendor != "sqlite" else 1)


@for_real
@pytest.mark.parametrize("step_name", ["outside", "inside"])
def test_behind_a_cancel_none_begins_none_commits_and_what_happened_outside_is_recorded(step_name):
    if connection.vendor == "sqlite" and step_name == "inside":
        # There the step holds the file's write lock, and the cancel comes behind it. See the next test.
        return check_cancel_from_a_step()
    global gate, begun
    gate, begun = threading.Event(), threading.Semaphore(0)
    run = cancelled.using(run_id="cancelled").start(step_name)

    def cancel():
        for _ in range(2):
            assert begun.acquire(timeout=PATIENCE)
        assert run.cancel("no more")
        gate.set()

    assert together(lambda: execute_as_a_worker(run), cancel) == [None, None]
    assert run.status == "CANCELLED"
    assert times(step_name) == (2 if step_name == "outside" else 0)
    recorded = [(1, "outside", "SUCCEEDED"), (2, "outside", "SUCCEEDED")]
    assert history() == (recorded if step_name == "outside" else [])
    assert threads_of_steps() == []
    assert not begun.acquire(blocking=False), "another one has begun"
    # What is recorded is not repeated.
    assert run.resume()
    execute_as_a_worker(run)
    assert run.result(timeout=0) == list(range(6))
    assert times(step_name) == 6
    return None


def check_cancel_from_a_step():
    @durable.step(name="cancelling")
    def cancelling(number):
        calls.append(number)
        Ledger.objects.create(key="cancelling")
        durable.get_run(durable.current().run_id).cancel("enough")

    @durable.workflow(name="tests.parallel.cancels_itself")
    def cancels_itself():
        cancelling.map(range(5), max_parallel=1)
        last()

    run = cancels_itself.start()
    execute_as_a_worker(run)
    assert (run.status, run.model.cancel_reason) == ("CANCELLED", "enough")
    assert history() == [(1, "cancelling", "SUCCEEDED")]
    assert (calls, times("cancelling")) == ([0], 1)


@for_real
def test_a_parallel_step_may_cancel_its_own_run():
    check_cancel_from_a_step()


@for_real
def test_a_lost_lease_lets_none_begin_and_gives_the_run_back():
    @durable.step(name="losing", atomic=False)
    def losing(number):
        calls.append(number)
        current_run().lease.lose()
        return number

    @durable.workflow(name="tests.parallel.losing")
    def loses():
        return losing.map(range(4), max_parallel=1)

    run = loses.start()
    execute_as_a_worker(run)
    assert calls == [0]
    assert run.status == "PENDING"
    assert history() == [(1, "losing", "SUCCEEDED")]
    while run.status == "PENDING":
        done = len(calls)
        execute_as_a_worker(run)
        assert calls == list(range(done + 1))
    assert run.result(timeout=0) == [0, 1, 2, 3]


@in_a_test
def test_the_deadline_is_looked_at_before_each_of_them():
    @durable.step(name="long", atomic=False)
    def long(number):
        calls.append(number)
        advance("25 minutes")

    @durable.workflow(name="tests.parallel.timed", timeout=timedelta(hours=1))
    def timed():
        long.map(range(10))

    run = timed.start()
    run_until_idle()
    assert (run.status, run.model.cancel_reason) == ("CANCELLED", "timeout")
    assert calls == [0, 1, 2]
    assert StepCheckpoint.objects.count() == 3
