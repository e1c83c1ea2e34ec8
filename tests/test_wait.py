"""`wait`, and `result` outside a workflow: the ends of several runs, without a thread that waits for them."""

from __future__ import annotations

import random
import threading
import time
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

import django_durable as durable
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import advance, crash_after, run_until_idle
from django_durable.worker.loop import Worker
from tests.threads import together

pytestmark = pytest.mark.django_db


@durable.workflow(name="tests.wait.nap")
def nap(seconds=0, answer=None):
    durable.sleep(seconds)
    return answer


@durable.workflow(name="tests.wait.fall")
def fall():
    raise ValueError("fell")


@durable.step(name="mark", atomic=False)
def mark():
    pass


@durable.workflow(name="tests.wait.waiting")
def waiting(seconds, return_when="ALL", timeout=None):
    handles = [nap.start(each, each) for each in seconds]
    result = durable.wait(handles, return_when, timeout)
    mark()
    return [handles.index(each) for each in result.done], [handles.index(each) for each in result.pending]


def numbers(result, handles):
    return [handles.index(each) for each in result.done], [handles.index(each) for each in result.pending]


# -- In a workflow ----------------------------------------------------------------------------------------------


def test_all_means_all():
    run = waiting.using(run_id="p").start([60, 30, 90])
    run_until_idle()
    assert (run.status, run.model.waiting_for) == ("WAITING", "run:p.3"), "it is told of the last one alone"
    advance("61 seconds")
    run_until_idle()
    assert run.status == "WAITING"
    advance("30 seconds")
    run_until_idle()
    assert run.result(0) == ([0, 1, 2], [])
    assert run.model.attempt == 2, "it was woken once"


def test_the_first_is_whichever_ends_first():
    run = waiting.using(run_id="p").start([60, 30, 90], "FIRST")
    run_until_idle()
    assert (run.status, run.model.waiting_for) == ("WAITING", "children")
    advance("31 seconds")
    run_until_idle()
    assert run.result(0) == ([1], [0, 2])
    # Nobody waits any more: the others' ends wake nobody.
    advance("100 seconds")
    run_until_idle()
    assert run.model.attempt == 2


@pytest.mark.parametrize("return_when", ["ALL", "FIRST"])
def test_failed_cancelled_and_dead_have_ended_too(return_when):
    @durable.workflow(name="tests.wait.for_ends", max_recoveries=0)
    def for_ends():
        handles = [fall.start(), nap.start(60)]
        result = durable.wait(handles, return_when)
        return [each.status for each in result.done], len(result.pending)

    run = for_ends.using(run_id="p").start()
    run_until_idle()
    if return_when == "ALL":
        assert run.status == "WAITING"
        durable.get_run("p.2").cancel()
        assert run.status == "PENDING", "it was woken with the cancel"
        run_until_idle()
        assert run.result(0) == (["FAILED", "CANCELLED"], 0)
    else:
        assert run.result(0) == (["FAILED"], 1)


@pytest.mark.parametrize(("timeout", "parked"), [(0, False), (0.5, False), (20, True), (timedelta(seconds=20), True)])
@pytest.mark.parametrize("return_when", ["ALL", "FIRST"])
def test_a_wait_in_vain_returns_what_there_is(timeout, parked, return_when):
    run = waiting.using(run_id="p").start([60, 90], return_when, timeout)
    run_until_idle()
    if parked:
        assert run.status == "WAITING"
        advance("21 seconds")
        run_until_idle()
    assert run.result(0) == ([], [0, 1])


def test_an_answer_stands_on_replay_though_more_have_ended_since():
    run = waiting.using(run_id="p").start([60, 90], "FIRST")
    run_until_idle()
    advance("61 seconds")
    with crash_after("mark"):
        run_until_idle()
    advance("60 seconds")
    run_until_idle()
    assert durable.get_run("p.2").status == "SUCCEEDED"
    assert run.result(0) == ([0], [1])


def test_a_timeout_is_counted_from_the_first_execution():
    run = waiting.using(run_id="p").start([3600], "ALL", 60)
    run_until_idle()
    advance("40 seconds")
    assert run.pause()
    assert run.resume()
    run_until_idle()
    assert run.status == "WAITING"
    advance("21 seconds")
    run_until_idle()
    assert run.result(0) == ([], [0])


def test_nothing_to_wait_for_and_the_same_run_twice():
    @durable.workflow(name="tests.wait.odd")
    def odd():
        child = nap.start(60)
        none = durable.wait([]), durable.wait([], "FIRST"), durable.wait((), timeout=0)
        twice = durable.wait([child, child, child], "FIRST")
        return none, len(twice.done), len(twice.pending)

    run = odd.start()
    run_until_idle()
    advance("61 seconds")
    run_until_idle()
    assert run.result(0) == ((([], []),) * 3, 1, 0)


@pytest.mark.parametrize("where", ["in a workflow", "outside"])
def test_a_run_that_does_not_exist_and_arguments_that_make_no_sense(where):
    unknown = durable.RunHandle("never", "default")

    def ask():
        for what in ([unknown], [unknown, unknown]):
            with pytest.raises(durable.RunNotFound, match="never"):
                durable.wait(what, timeout=0)
        with pytest.raises(durable.RunNotFound, match="never"):
            unknown.result(timeout=0)
        with pytest.raises(TypeError, match="handles"):
            durable.wait(["never"])
        with pytest.raises(ValueError, match="FIRST"):
            durable.wait([], "ANY")
        with pytest.raises((TypeError, ValueError), match="timeout"):
            durable.wait([], timeout=-1)
        return "refused"

    if where == "outside":
        ask()
    else:
        assert durable.workflow(name="tests.wait.refused")(lambda: ask())() == "refused"


def test_runs_of_others_are_waited_for_too():
    mine, theirs = nap.using(run_id="theirs 1").start(50), nap.using(run_id="theirs 2").start(60)

    @durable.workflow(name="tests.wait.strangers")
    def strangers(handles, return_when):
        return [each.id for each in durable.wait(handles, return_when).done]

    first = strangers.start([mine, theirs], "FIRST")
    all_of_them = strangers.start([mine, theirs], "ALL")
    run_until_idle()
    # Of several, those of others do not tell: it looks again by itself.
    assert first.model.wake_at is not None
    assert (all_of_them.model.waiting_for, all_of_them.model.wake_at) == ("run:theirs 2", None)
    advance("51 seconds")
    run_until_idle()
    advance("6 seconds")
    run_until_idle()
    assert first.result(0) == ["theirs 1"]
    advance("10 seconds")
    run_until_idle()
    assert all_of_them.result(0) == ["theirs 1", "theirs 2"]


@pytest.mark.timeout(300)
def test_the_first_of_two_hundred_two_hundred_times():
    count = 200

    @durable.workflow(name="tests.wait.as_they_come")
    def as_they_come():
        pending = [nap.start(number, number) for number in range(2, count + 2)]
        order = []
        while pending:
            result = durable.wait(pending, "FIRST")
            pending = result.pending
            order += [each.result() for each in result.done]
        return order

    run = as_they_come.start()
    run_until_idle()
    for _ in range(count // 10 + 1):
        advance("10 seconds")
        run_until_idle()
    assert sorted(run.result(0)) == list(range(2, count + 2))
    assert run.model.attempt <= count + 1, "woken at most once for each"


# -- How often a parent is woken ----------------------------------------------------------------------------------


def work_off(concurrency=8):
    """A worker of our own until nothing is due."""
    worker = threading.Thread(target=Worker("default", concurrency=concurrency, burst=True).run, daemon=True)
    worker.start()
    worker.join(timeout=100)
    assert not worker.is_alive()


@durable.workflow(name="tests.wait.crowd")
def crowd(count):
    handles = [nap.start(0, number) for number in range(count)]
    done, pending = durable.wait(handles)
    return len(done), len(pending)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(("threads", "executions"), [(1, 2), (8, 10)])
def test_a_parent_of_a_thousand_is_woken_a_few_times(threads, executions):
    count = 1000
    run = crowd.start(count)
    work_off(threads)
    assert run.result(0) == (count, 0)
    assert WorkflowRun.objects.filter(parent=run.id, status="SUCCEEDED").count() == count
    # Once for the last, and once for each that was still under way beside it.
    assert run.model.attempt <= executions


# -- Outside a workflow -------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_outside_it_looks_until_they_have_ended():
    handles = [nap.start(0, number) for number in range(3)]
    begun = threading.Event()

    def wait():
        begun.set()
        return numbers(durable.wait(handles), handles)

    def work():
        begun.wait()
        Worker("default", concurrency=1, burst=True).run()

    assert together(wait, work)[0] == ([0, 1, 2], [])


@pytest.mark.django_db(transaction=True)
def test_outside_a_wait_in_vain_returns_what_there_is():
    handles = [nap.start(), nap.start(3600)]
    assert numbers(durable.wait(handles, timeout=0), handles) == ([], [0, 1])
    run_until_idle()
    assert numbers(durable.wait(handles, timeout=0.05), handles) == ([0], [1])
    assert numbers(durable.wait(handles, "FIRST"), handles) == ([0], [1])
    assert numbers(durable.wait(handles, timeout=timedelta(0)), handles) == ([0], [1])
    with pytest.raises(TimeoutError, match="WAITING"):
        handles[1].result(timeout=0.05)


def test_outside_in_a_transaction_it_waits_for_no_run_that_may_be_part_of_it():
    handles = [nap.start(), nap.start()]
    with pytest.raises(durable.InsideTransaction, match=handles[0].id):
        durable.wait(handles)
    with pytest.raises(durable.InsideTransaction):
        handles[0].result()
    assert len(durable.wait(handles, timeout=0).pending) == 2
    run_until_idle()
    assert len(durable.wait(handles).done) == 2


@pytest.mark.django_db(transaction=True)
def test_outside_looking_at_a_thousand_runs_is_two_statements():
    now = nap.start().model
    rows = [WorkflowRun(**{field.attname: getattr(now, field.attname) for field in now._meta.concrete_fields})]
    for number, row in enumerate(rows * 999):
        row.pk = f"many {number}"
        row.save(force_insert=True)
    handles = [durable.RunHandle(f"many {number}", "default") for number in range(999)]
    with CaptureQueriesContext(connection) as queries:
        assert len(durable.wait(handles, timeout=0).pending) == 999
    assert len(queries) == 2


@pytest.mark.django_db(transaction=True)
def test_a_wait_in_a_direct_call_needs_no_worker():
    begun = time.monotonic()
    assert waiting([0, 0, 0]) == ([0, 1, 2], [])
    assert waiting([3600], "ALL", 0.2) == ([], [0])
    assert time.monotonic() - begun < 60
    assert not StepCheckpoint.objects.filter(status="WAITING", run__status="SUCCEEDED").exists()


def test_in_a_test_a_direct_call_moves_the_clock():
    assert waiting([86400, 60]) == ([0, 1], [])
    assert waiting([86400, 60], "FIRST") == ([1], [0])
    assert waiting([86400], "ALL", 3600) == ([], [0])


# -- No wake-up is lost -------------------------------------------------------------------------------------------


@durable.workflow(name="tests.wait.relay")
def relay(handles, return_when):
    return [each.id for each in durable.wait(handles, return_when).done]


@durable.workflow(name="tests.wait.single")
def single(handle):
    return handle.result()


@pytest.mark.django_db(transaction=True)
def test_an_end_beside_the_beginning_of_a_wait_is_not_missed():
    """Many parents begin to wait at the moment at which what they wait for ends, in other threads."""
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    runs = []
    for _ in range(60):
        child = nap.start(0, "awake")
        runs += [single.start(child), relay.start([child], "FIRST")]
    dice.shuffle(runs)
    work_off(concurrency=6)
    stuck = list(WorkflowRun.objects.exclude(status="SUCCEEDED").values_list("pk", "status", "waiting_for"))
    assert stuck == [], f"seed {seed}"


@pytest.mark.django_db(transaction=True)
def test_an_end_that_is_rolled_back_wakes_nobody():
    child = nap.start(3600)
    run = single.start(child)
    run_until_idle()
    assert run.status == "WAITING"
    with pytest.raises(ZeroDivisionError), transaction.atomic():  # noqa: PT012 (the rollback is the point)
        assert child.cancel()
        assert run.status == "PENDING"
        raise ZeroDivisionError
    assert (run.status, child.status) == ("WAITING", "WAITING")
    assert child.cancel()
    run_until_idle()
    with pytest.raises(durable.RunCancelled):
        run.result(0)
