"""Parallel steps: results in order, exact on replay, none repeated behind a crash."""

import threading
from collections import Counter
from itertools import permutations

import pytest
from django.test import TestCase

import django_durable as durable
from django_durable.engine.context import current_run
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import DurableTestMixin, advance, crash_after, crash_before, run_until_idle
from tests.app.models import Account, Ledger
from tests.parallel.common import (
    calls,
    deposits,
    execute_as_a_worker,
    for_real,
    history,
    in_a_test,
    in_turn,
    last,
    square,
    squares,
    threads_of_steps,
    told_of_records,
    turns,
    wait,
)

# -- Results and replay -----------------------------------------------------------------------------------------------


EXPECTED = [[number * number for number in range(20)], [4, 0, 1], 4]


@for_real
def test_results_come_in_the_order_of_the_items_and_each_step_has_its_position():
    assert squares(20) == EXPECTED
    assert Counter(calls) == Counter([*range(20), 0, 1, 2, "last"])
    outputs = StepCheckpoint.objects.order_by("position").values_list("position", "output")[:20]
    assert [(position, int(output)) for position, output in outputs] == [(n + 1, n * n) for n in range(20)]
    assert threads_of_steps() == []


@in_a_test
def test_in_a_tests_transaction_all_of_it_runs_in_the_tests_own_thread():
    threads = set()
    with told_of_records(lambda facts: threads.add(threading.current_thread())):
        assert squares(20) == EXPECTED
        run = squares.start(20)
        assert run_until_idle() == 1
    assert run.result(timeout=0) == EXPECTED
    assert threads == {threading.current_thread()}


class InATestCase(DurableTestMixin, TestCase):
    def test_parallel_steps_see_the_tests_rows_and_are_undone_with_it(self):
        Account.objects.create(name="Ada")
        assert deposits(["Ada"] * 5) == [1, 2, 3, 4, 5]
        run = deposits.start(["Ada"] * 2)
        run_until_idle()
        assert run.result(timeout=0) == [6, 7]
        assert Account.objects.get().balance == 7


@durable.workflow(name="tests.parallel.in_turns")
def in_turns():
    found = in_turn.map("abc")
    time = current_run().time
    last()
    return [found, time]


@for_real
@pytest.mark.parametrize("order", list(permutations((1, 2, 3))))
def test_a_replay_is_exact_whatever_finished_first(order):
    turns.start(order)
    run = in_turns.start()
    seen = []
    with told_of_records(turns), told_of_records(lambda facts: seen.append(facts["position"])):
        with crash_before("last"):
            execute_as_a_worker(run)
        assert turns.seen == list(order)
        # As if its process were gone.
        run_until_idle()
    found, time = run.result(timeout=0)
    assert found == ["A", "B", "C"]
    assert sorted(calls[:3]) == ["a", "b", "c"]
    assert calls[3:] == ["last"], "a recorded step was executed again"
    assert seen == [*order, 4]
    # The run's own time is that of what it was shown, at first as on the replay.
    assert time == max(StepCheckpoint.objects.filter(name="in turn").values_list("finished_at", flat=True))


@durable.workflow(name="tests.parallel.own_time")
def own_time():
    early, late = in_turn.submit("early"), in_turn.submit("late")
    early.result()
    # The other one's outcome is there as well by now, and the body does not know of it.
    wait(turns.all_recorded)
    calls.append(current_run().time)
    last()
    late.result()
    return current_run().time


@for_real
def test_the_runs_own_time_goes_on_when_the_body_sees_a_result_and_not_when_a_thread_has_it():
    turns.start((1, 2))
    run = own_time.start()
    with told_of_records(turns):
        with crash_before("last"):
            execute_as_a_worker(run)
        run_until_idle()
    early, late = StepCheckpoint.objects.filter(name="in turn").order_by("position")
    assert early.finished_at < late.finished_at
    at_first, on_replay, _ = calls[2:]
    assert at_first == on_replay == early.finished_at
    assert run.result(timeout=0) == StepCheckpoint.objects.get(name="last").finished_at


@for_real
def test_recorded_steps_are_answered_without_a_thread_and_without_a_query():
    run = squares.start(5)
    with crash_after("last"):
        execute_as_a_worker(run)
    run_until_idle()
    assert run.result(timeout=0)[0] == [0, 1, 4, 9, 16]
    again = squares.start(5)
    execute_as_a_worker(again)
    WorkflowRun.objects.filter(pk=again.id).update(status="PENDING", worker="", finished_at=None)
    started = []
    original = threading.Thread.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: (started.append(thread.name), original(thread)))
        execute_as_a_worker(again)
    assert again.result(timeout=0) == run.result(timeout=0)
    assert started == []


@in_a_test
def test_code_that_submits_another_step_than_the_recorded_one_is_set_aside():
    @durable.workflow(name="tests.parallel.changed")
    def changed():
        steps = [square, last] if current_run().attempt == 1 else [last, square]
        for step, arguments in zip(steps, ([3], []) if steps[0] is square else ([], [3]), strict=True):
            step.submit(*arguments)
        durable.sleep(60)

    run = changed.start()
    run_until_idle()
    advance("2 minutes")
    run_until_idle()
    assert run.status == "DEAD"
    assert "recorded 'square', the code now calls 'last'" in run.model.error


@in_a_test
def test_what_makes_the_items_may_call_steps_itself():
    @durable.workflow(name="tests.parallel.from_steps")
    def from_steps():
        return square.map(square(number) for number in range(3))

    run = from_steps.start()
    with crash_after("square"):
        run_until_idle()
    run_until_idle()
    assert run.result(timeout=0) == [0, 1, 16]
    assert calls == [0, 1, 2, 0, 1, 4]


# -- Crashes ----------------------------------------------------------------------------------------------------------


@for_real
@pytest.mark.parametrize("limit", [1, 3])
def test_a_crash_behind_some_of_them_repeats_only_the_others(limit):
    Account.objects.create(name="Ada")
    run = deposits.start(["Ada"] * 6, limit)
    with crash_after("deposit"):
        execute_as_a_worker(run)
    recorded = StepCheckpoint.objects.count()
    # What was under way beside the one that it died behind may have come through.
    assert 1 <= recorded <= limit
    assert Account.objects.get().balance == recorded
    run_until_idle()
    assert run.result(timeout=0) == [1, 2, 3, 4, 5, 6]
    assert Account.objects.get().balance == 6
    assert Counter(Ledger.objects.values_list("key", flat=True)) == {
        f"deposit {run.id}:{position}": 1 for position in range(1, 7)
    }
    assert run.model.recoveries == 1


@for_real
def test_a_crash_in_a_thread_ends_the_body_although_it_never_asks():
    @durable.workflow(name="tests.parallel.never_asks")
    def never_asks():
        future = square.submit(1)
        wait(crashed)
        calls.append("the body goes on")
        last()
        return future.result()

    crashed = threading.Event()
    run = never_asks.start()
    with told_of_records(lambda facts: crashed.set()), crash_after("square"):
        execute_as_a_worker(run)
    # It had no outcome yet that a process which died there would have left.
    assert history() == [(1, "square", "SUCCEEDED")]
    assert calls == [1, "the body goes on"]
    run_until_idle()
    assert run.result(timeout=0) == 1
    assert calls[2:] == ["the body goes on", "last"]


@for_real
@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_parallel_steps_in_another_database_commit_once():
    @durable.step(name="there", using="other")
    def there(number):
        Ledger.objects.using("other").create(key=f"there {number}")
        return number

    @durable.workflow(name="tests.parallel.there")
    def all_there():
        return there.map(range(6), max_parallel=3)

    run = all_there.start()
    with crash_after("there"):
        execute_as_a_worker(run)
    # A process that died between the two commits has left an outcome that its run does not know of.
    StepCheckpoint.objects.using("default").delete()
    before = Ledger.objects.using("other").count()
    assert before >= 1
    execute_as_a_worker_after_recovery(run)
    assert run.result(timeout=0) == list(range(6))
    assert sorted(Ledger.objects.using("other").values_list("key", flat=True)) == [f"there {n}" for n in range(6)]


def execute_as_a_worker_after_recovery(run):
    WorkflowRun.objects.filter(pk=run.id).update(status="PENDING", worker="")
    execute_as_a_worker(run)
