"""Retries of parallel steps, and results that are waited for only so long."""

import threading
from collections import Counter
from datetime import timedelta

import pytest

import django_durable as durable
from django_durable.models import StepCheckpoint
from django_durable.testing import advance, run_until_idle
from tests.parallel.common import (
    calls,
    execute_as_a_worker,
    for_real,
    history,
    in_a_test,
    in_turn,
    last,
    square,
    told_of_records,
    turns,
    wait,
)

# -- Retries ----------------------------------------------------------------------------------------------------------


LATE = {"after 1 minute": 60, "after 10 minutes": 600}


def flaky(delay, tries=2):
    @durable.step(name=f"after {delay}", atomic=False, max_attempts=tries, retry_delay=delay, retry_backoff=1)
    def try_again():
        calls.append(delay)
        if calls.count(delay) < tries:
            raise ConnectionError("not now")
        return f"{delay} s"

    return try_again


in_a_minute, in_ten_minutes = flaky(60), flaky(600)


@durable.workflow(name="tests.parallel.patient")
def patient():
    slow, slower, other = in_ten_minutes.submit(), in_a_minute.submit(), square.submit(3)
    return [slow.result(), slower.result(), other.result()]


def check_patience(run, go_on):
    go_on()
    stored = run.model
    # All have come as far as they can, also the one behind the first that has to wait.
    assert history() == [(1, "after 600", "RETRYING"), (2, "after 60", "RETRYING"), (3, "square", "SUCCEEDED")]
    assert (stored.status, stored.waiting_for, stored.worker) == ("WAITING", "retry:after 60", "")
    due = dict(StepCheckpoint.objects.values_list("name", "finished_at"))
    assert stored.wake_at == due["after 60"]
    assert Counter(calls) == {600: 1, 60: 1, 3: 1}
    advance("70 seconds")
    go_on()
    # It woke for the earlier one; the other's time has not come.
    assert Counter(calls) == {600: 1, 60: 2, 3: 1}
    assert (run.status, run.model.wake_at) == ("WAITING", due["after 600"])
    assert StepCheckpoint.objects.get(name="after 600").finished_at == due["after 600"]
    advance("11 minutes")
    go_on()
    assert run.result(timeout=0) == ["600 s", "60 s", 9]
    assert Counter(calls) == {600: 2, 60: 2, 3: 1}
    assert list(StepCheckpoint.objects.order_by("position").values_list("attempts", flat=True)) == [2, 2, 1]


@in_a_test
def test_a_retry_that_is_far_away_parks_the_run_and_is_not_made_before_its_time():
    check_patience(patient.start(), run_until_idle)


@for_real
def test_a_retry_that_is_far_away_parks_the_run_for_real():
    run = patient.start()
    check_patience(run, lambda: execute_as_a_worker(run))


@for_real
def test_a_replay_before_its_time_leaves_a_retry_alone():
    run = patient.start()
    execute_as_a_worker(run)
    # A person holds it, and lets it go on.
    run.pause()
    run.resume()
    execute_as_a_worker(run)
    assert Counter(calls) == {600: 1, 60: 1, 3: 1}
    assert (run.status, run.model.waiting_for) == ("WAITING", "retry:after 60")


@for_real
def test_the_others_go_on_while_one_waits_for_its_retry():
    @durable.workflow(name="tests.parallel.others")
    def others():
        late = in_a_minute.submit()
        slow = in_turn.submit("slow")
        return [late.result(), slow.result()]

    turns.start((2,))
    turns.gates[2].clear()
    # The body asks for the one that has to wait; the other is under way until that one's try has failed.
    opened = told_of_records(lambda facts: facts["status"] == "RETRYING" and turns.gates[2].set())
    run = others.start()
    with opened:
        execute_as_a_worker(run)
    assert history() == [(1, "after 60", "RETRYING"), (2, "in turn", "SUCCEEDED")]
    assert run.status == "WAITING"


@for_real
def test_a_retry_is_made_at_its_time_also_while_the_body_is_busy(settings):
    settings.DURABLE = {"PARK_AFTER": 0.01}

    @durable.step(name="twice", atomic=False, max_attempts=2, retry_delay=0.2)
    def twice():
        if durable.current().attempt == 1:
            raise ConnectionError
        tried_again.set()
        return "second"

    @durable.step(name="busy", atomic=False)
    def busy():
        wait(tried_again)

    @durable.workflow(name="tests.parallel.busy")
    def busy_body():
        future = twice.submit()
        busy()
        return future.result()

    tried_again = threading.Event()
    assert busy_body() == "second"


@for_real
def test_short_retries_are_made_in_the_thread_while_others_go_on():
    again = flaky(0.01, tries=4)

    @durable.workflow(name="tests.parallel.short")
    def short():
        future = again.submit()
        return [future.result(), square.map(range(3))]

    assert short() == ["0.01 s", [0, 1, 4]]
    assert StepCheckpoint.objects.get(position=1).attempts == 4


@durable.workflow(name="tests.parallel.nobody_asks")
def nobody_asks(error=None):
    in_a_minute.submit()
    if error:
        raise ValueError(error)
    return "the end"


@in_a_test
@pytest.mark.parametrize("error", [None, "the body's own"])
def test_a_run_does_not_end_before_a_retry_that_nobody_asks_for(error):
    run = nobody_asks.start(error)
    run_until_idle()
    assert (run.status, run.model.waiting_for) == ("WAITING", "retry:after 60")
    advance("2 minutes")
    run_until_idle()
    assert run.status == ("FAILED" if error else "SUCCEEDED")
    assert history() == [(1, "after 60", "SUCCEEDED")]


@for_real
def test_an_error_in_a_map_is_raised_behind_the_last_retry_of_the_others():
    @durable.step(name="one of them", atomic=False, max_attempts=2, retry_delay=60, give_up_on=KeyError)
    def one_of_them(what):
        calls.append(what)
        if what == "bad":
            raise KeyError(what)
        if durable.current().attempt == 1:
            raise ConnectionError
        return what

    @durable.workflow(name="tests.parallel.mixed")
    def mixed():
        return one_of_them.map(["bad", "good"])

    run = mixed.start()
    execute_as_a_worker(run)
    assert run.status == "WAITING"
    advance("2 minutes")
    execute_as_a_worker(run)
    with pytest.raises(KeyError, match="bad"):
        run.result(timeout=0)
    assert Counter(calls) == {"bad": 1, "good": 2}


# -- Waiting for so long ----------------------------------------------------------------------------------------------


@durable.workflow(name="tests.parallel.impatient")
def impatient():
    future = in_ten_minutes.submit()
    try:
        future.result(timeout=timedelta(minutes=5))
    except TimeoutError as late:
        first = str(late)
    last()
    return [first, future.result(), future.result(timeout=0)]


@in_a_test
def test_a_result_that_is_late_is_late_on_every_replay_and_the_step_goes_on():
    run = impatient.start()
    run_until_idle()
    assert run.status == "WAITING"
    assert run.model.wake_at - run.model.started_at < timedelta(minutes=6)
    advance("3 minutes")
    # Somebody lets it go on before its time: what is left is kept.
    run.pause()
    run.resume()
    run_until_idle()
    assert (run.status, calls) == ("WAITING", [600])
    advance("2 minutes 1 second")
    run_until_idle()
    assert (run.status, calls) == ("WAITING", [600, "last"])
    advance("7 minutes")
    run_until_idle()
    late = "Step 'after 600' has not ended after 300 s."
    assert run.result(timeout=0) == [late, "600 s", "600 s"]
    assert history() == [
        (1, "after 600", "SUCCEEDED"),
        (2, "result after 600", "FAILED"),
        (3, "last", "SUCCEEDED"),
        (4, "result after 600", "SUCCEEDED"),
    ]


@for_real
def test_timeout_0_looks_once_at_a_step_that_is_under_way():
    turns.start((1,))
    turns.gates[1].clear()

    @durable.workflow(name="tests.parallel.looks")
    def looks():
        future = in_turn.submit("a")
        seen = []
        for timeout in (0, 0.05):
            try:
                future.result(timeout=timeout)
            except TimeoutError:
                seen.append(timeout)
        turns.gates[1].set()
        return [*seen, future.result()]

    assert looks() == [0, 0.05, "A"]


@in_a_test
@pytest.mark.parametrize(("timeout", "error"), [("1", TypeError), (-1, ValueError), (True, TypeError)])
def test_a_timeout_that_makes_no_sense_is_refused(timeout, error):
    @durable.workflow(name="tests.parallel.no_sense")
    def no_sense():
        square.submit(1).result(timeout=timeout)

    with pytest.raises(error, match="timeout takes"):
        no_sense()
