"""Errors of parallel steps, and those of the body beside them."""

from collections import Counter

import pytest
from django.db import transaction

import django_durable as durable
from django_durable.engine import context as engine_context
from django_durable.engine.parallel import MAX_PARALLEL
from django_durable.models import StepCheckpoint, WorkflowRun
from tests.parallel.common import (
    Declined,
    calls,
    execute_as_a_worker,
    for_real,
    history,
    pay,
    square,
    squares,
    threads_of_steps,
)


@durable.workflow(name="tests.parallel.payments")
def payments(names, catch=False):
    try:
        return pay.map(names)
    except Declined as error:
        if not catch:
            raise
        return [str(error), error.code]


@for_real
def test_the_first_error_in_order_is_raised_behind_all_the_others():
    with pytest.raises(Declined, match="no: bad 1") as raised:
        payments(["a", "bad 1", "b", "bad 2", "c"])
    assert raised.value.code == 51
    assert sorted(calls) == ["a", "b", "bad 1", "bad 2", "c"]
    statuses = ["SUCCEEDED", "FAILED", "SUCCEEDED", "FAILED", "SUCCEEDED"]
    assert history() == [(n + 1, "pay", status) for n, status in enumerate(statuses)]
    run = WorkflowRun.objects.get()
    # Where it came from, through the thread.
    assert "in pay" in run.error
    assert run.failed_step == 2


@for_real
def test_an_error_that_is_caught_is_an_outcome_like_any_other():
    assert payments(["a", "bad"], catch=True) == ["no: bad", 51]


@durable.workflow(name="tests.parallel.paid_again", max_attempts=2, retry_delay=0)
def paid_again(names, how):
    if how == "map":
        return pay.map(names)
    return [future.result() for future in [pay.submit(name) for name in names]]


@for_real
@pytest.mark.parametrize("how", ["map", "submit"])
def test_a_retry_of_the_workflow_repeats_only_the_step_that_failed(how):
    assert paid_again(["a", "bad", "b", "c"], how) == ["paid by a", "paid by bad", "paid by b", "paid by c"]
    assert Counter(calls) == {"a": 1, "bad": 2, "b": 1, "c": 1}
    assert WorkflowRun.objects.get().failures == 1


@for_real
def test_resume_of_a_failed_run_repeats_only_the_step_that_failed():
    run = payments.start(["a", "bad", "b"])
    execute_as_a_worker(run)
    assert run.status == "FAILED"
    assert run.resume()
    execute_as_a_worker(run)
    assert run.result(timeout=0) == ["paid by a", "paid by bad", "paid by b"]
    assert Counter(calls) == {"a": 1, "bad": 2, "b": 1}


@durable.workflow(name="tests.parallel.forgetful")
def forgetful(fails):
    pay.submit("bad")
    pay.submit("b")
    if fails:
        raise ValueError("the body's own")


@for_real
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_what_was_submitted_comes_to_its_outcome_although_nobody_asks(fails):
    run = forgetful.start(fails)
    execute_as_a_worker(run)
    assert run.status == ("FAILED" if fails else "SUCCEEDED")
    assert history() == [(1, "pay", "FAILED"), (2, "pay", "SUCCEEDED")]
    if fails:
        assert "the body's own" in run.model.error


@for_real
def test_what_was_submitted_and_had_no_room_yet_is_done_although_the_body_has_raised():
    @durable.workflow(name="tests.parallel.crowded_out")
    def crowded_out():
        for number in range(3 * MAX_PARALLEL):
            square.submit(number)
        raise ValueError

    run = crowded_out.start()
    execute_as_a_worker(run)
    assert sorted(calls) == list(range(3 * MAX_PARALLEL))
    assert StepCheckpoint.objects.filter(status="SUCCEEDED").count() == 3 * MAX_PARALLEL


@for_real
def test_a_step_that_ends_its_thread_ends_the_run():
    @durable.step(name="leave", atomic=False)
    def leave():
        raise SystemExit(3)

    @durable.workflow(name="tests.parallel.left")
    def left():
        leave.submit()

    run = left.start()
    execute_as_a_worker(run)
    assert run.status == "FAILED"
    with pytest.raises(durable.RunFailed, match="SystemExit"):
        run.result(timeout=0)
    assert threads_of_steps() == []


@for_real
def test_inside_a_transaction_of_the_workflow_nothing_is_submitted():
    @durable.workflow(name="tests.parallel.in_a_transaction")
    def in_a_transaction():
        with transaction.atomic():
            square.submit(1)

    with pytest.raises(durable.InsideTransaction, match="Step 'square'"):
        in_a_transaction()
    assert calls == []


@for_real
def test_an_error_of_the_engine_itself_fails_the_run_although_nobody_asks():
    def refuse(context, name):
        if name == "square":
            raise LookupError("a broken hook")

    run = squares.start(3)
    engine_context.before_step.append(refuse)
    try:
        execute_as_a_worker(run)
    finally:
        engine_context.before_step.remove(refuse)
    with pytest.raises(LookupError, match="a broken hook"):
        run.result(timeout=0)
    assert calls == []
