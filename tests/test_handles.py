"""`RunHandle` and `get_run`: looking at a run from outside, cancelling it, letting it go on."""

import threading
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.db import transaction

import django_durable as durable
from django_durable.engine.operations import pauses
from django_durable.models import WorkflowRun
from django_durable.testing import advance, crash_after, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import checkout, echo, fail, ledger_of, times
from tests.threads import together

pytestmark = pytest.mark.django_db


# -- Looking --------------------------------------------------------------------------------------------------------


def test_a_handle_shows_the_run_as_it_is_now():
    run = checkout.start("A")
    assert (run.status, run.model.status, run.database) == ("PENDING", "PENDING", "default")
    assert type(run.status) is str
    run_until_idle()
    assert (run.status, run.model.status) == ("SUCCEEDED", "SUCCEEDED")
    assert run.result() == run.result(timeout=0) == {"seat": "seat 1", "paid": 4900}


def test_handles_of_one_run_are_equal():
    run = echo.using(run_id="1").start()
    assert run == durable.get_run("1")
    assert len({run, durable.get_run("1"), durable.RunHandle("1", "default")}) == 1
    assert run != durable.RunHandle("1", "other")
    assert run != "1"
    assert repr(run) == "<RunHandle 1 in 'default'>"


def test_a_handle_of_a_run_that_is_gone_says_so():
    run = echo.start()
    WorkflowRun.objects.all().delete()
    for look in (lambda: run.status, lambda: run.model, run.result, lambda: run.result(timeout=0)):
        with pytest.raises(durable.RunNotFound, match=run.id):
            look()
    assert run.cancel() is run.resume() is False


@pytest.mark.parametrize("run_id", [None, 5, echo], ids=["None", "int", "workflow"])
def test_get_run_takes_text(run_id):
    with pytest.raises(TypeError, match="get_run"):
        durable.get_run(run_id)


@durable.workflow(name="tests.handles.passed")
def passed(handle):
    return [handle, durable.run_step("look", lambda: handle)]


def test_a_handle_goes_through_workflows_and_steps():
    other = echo.start()
    run = passed.start(other)
    run_until_idle()
    assert run.result(timeout=0) == [other, other]


@pytest.mark.parametrize("timeout", [0, 0.03])
def test_a_result_that_is_not_there_in_time_is_a_timeout(timeout):
    with pytest.raises(TimeoutError, match="PENDING"):
        echo.start().result(timeout=timeout)
    with pytest.raises(TimeoutError):
        async_to_sync(echo.start().aresult)(timeout=timeout)


def test_looks_become_rarer_but_never_rarer_than_four_times_a_second():
    looks = [pause for pause, _ in zip(pauses(), range(50), strict=False)]
    assert looks == sorted(looks)
    assert (looks[0], looks[-1]) == (0.01, 0.25)


@pytest.mark.django_db(transaction=True)
def test_result_waits_for_a_run_that_somebody_else_executes():
    run = echo.start("value")
    assert together(run.result, run_until_idle) == ["value", 1]


def test_every_end_has_its_own_error():
    failed, cancelled = fail.start("mine"), echo.start()
    cancelled.cancel("changed my mind")
    run_until_idle()
    with pytest.raises(ValueError, match="mine"):
        failed.result(timeout=0)
    with pytest.raises(durable.RunCancelled, match="changed my mind") as caught:
        cancelled.result(timeout=0)
    assert (caught.value.run_id, caught.value.reason) == (cancelled.id, "changed my mind")


def test_the_async_twins_do_the_same():
    async def look():
        run = await durable.aget_run("1")
        assert await run.astatus() == "PENDING"
        assert (await run.amodel()).pk == "1"
        assert await run.acancel("twin") is True
        with pytest.raises(durable.RunCancelled, match="twin"):
            await run.aresult()
        assert await run.aresume() is True
        return await run.astatus()

    echo.using(run_id="1").start("value")
    assert async_to_sync(look)() == "PENDING"
    run_until_idle()
    assert async_to_sync(durable.get_run("1").aresult)() == "value"
    with pytest.raises(durable.RunNotFound):
        async_to_sync(durable.aget_run)("gone")


# -- Cancelling -----------------------------------------------------------------------------------------------------


def test_cancel_ends_a_run_at_once_and_only_once():
    run = checkout.start("A")
    assert run.cancel("sold out") is True
    stored = run.model
    assert (stored.status, stored.cancel_reason) == ("CANCELLED", "sold out")
    assert stored.finished_at is not None
    assert run.cancel("again") is False
    assert run.model.cancel_reason == "sold out"
    assert run_until_idle() == 0
    assert ledger_of("A") == [0, 0, 0]


def test_cancel_is_rolled_back_with_the_callers_transaction():
    run = checkout.start("A")
    with transaction.atomic():
        assert run.cancel() is True
        transaction.set_rollback(True)
    assert run.status == "PENDING"


def test_a_waiting_run_that_is_cancelled_waits_for_nothing():
    run = echo.using(run_after=timedelta(hours=1)).start()
    assert run.cancel() is True
    advance("2 hours")
    assert run_until_idle() == 0
    assert (run.model.wake_at, run.model.waiting_for) == (None, "")


def test_an_ended_run_is_not_cancelled():
    done, failed = echo.start(), fail.start()
    run_until_idle()
    assert done.cancel() is failed.cancel() is False
    assert (done.status, failed.status) == ("SUCCEEDED", "FAILED")


@pytest.mark.parametrize("reason", ["a\0b", "\ud800", "x" * 100_000, "größe 注文"], ids=["NUL", "half", "long", "any"])
def test_any_text_is_a_reason(reason):
    run = echo.start()
    assert run.cancel(reason) is True
    with pytest.raises(durable.RunCancelled):
        run.result(timeout=0)


@durable.step(name="cancel_me", atomic=False)
def cancel_me(during):
    Ledger.objects.create(key="outside effect")
    if during:
        durable.get_run(durable.current().run_id).cancel("during the step")
    return "effect"


@durable.step(name="after")
def after():
    Ledger.objects.create(key="after")


@durable.workflow(name="tests.handles.cancelled")
def cancelled_within(during):
    value = cancel_me(during)
    try:
        after()
    except Exception:
        Ledger.objects.create(key="cancellation was caught as an error")
    return value


@pytest.mark.parametrize("how", ["started", "called"])
def test_an_outside_call_under_way_is_recorded_and_no_further_step_starts(how):
    if how == "called":
        with pytest.raises(durable.RunCancelled, match="during the step"):
            cancelled_within.using(run_id="1")(True)
    else:
        cancelled_within.using(run_id="1").start(True)
        run_until_idle()
    run = durable.get_run("1")
    assert run.status == "CANCELLED"
    assert [(step.name, step.status) for step in run.model.steps.all()] == [("cancel_me", "SUCCEEDED")]
    assert times("after") == times("cancellation was caught as an error") == 0
    # So the effect is not repeated when a person lets it go on.
    assert run.resume() is True
    run_until_idle()
    assert run.result(timeout=0) == "effect"
    assert (times("outside effect"), times("after")) == (1, 1)


own_cancels: list[int] = []


@durable.step(name="cancel_own_run")
def cancel_own_run():
    own_cancels.append(1)
    if len(own_cancels) > 5:
        raise RuntimeError("it goes on for ever")
    durable.get_run(durable.current().run_id).cancel("from within")


@durable.workflow(name="tests.handles.own")
def cancels_itself():
    cancel_own_run()


def test_a_step_that_cancels_its_own_run_is_not_repeated_for_ever():
    """The fence refuses its transaction, and with it the cancel. That is an error to be told, not to be repeated."""
    own_cancels.clear()
    run = cancels_itself.start()
    run_until_idle()
    assert len(own_cancels) == 1
    assert run.status in ("CANCELLED", "FAILED")


# -- Letting it go on -----------------------------------------------------------------------------------------------


def test_resume_repeats_the_failed_step_and_nothing_else():
    done: list[str] = []

    @durable.step(name="well", atomic=False)
    def well():
        done.append("well")

    @durable.step(name="broken", atomic=False)
    def broken():
        done.append("broken")
        if len(done) < 3:
            raise ValueError("not mended yet")
        return "mended"

    @durable.workflow(name="tests.handles.mended")
    def workflow():
        well()
        return broken()

    run = workflow.start()
    run_until_idle()
    assert (run.status, run.model.failures) == ("FAILED", 1)
    assert run.resume() is True
    stored = run.model
    assert (stored.status, stored.failures, stored.recoveries, stored.error) == ("PENDING", 0, 0, "")
    assert stored.finished_at is None
    run_until_idle()
    assert run.result(timeout=0) == "mended"
    assert done == ["well", "broken", "broken"]
    assert run.model.failures == 0


def test_a_resumed_run_has_all_its_attempts_again():
    @durable.workflow(name="tests.handles.attempts", max_attempts=2, retry_delay=0)
    def workflow():
        raise ValueError(str(durable.current().attempt))

    run = workflow.start()
    run_until_idle()
    run.resume()
    run_until_idle()
    assert (run.status, run.model.failures, run.model.attempt) == ("FAILED", 2, 4)


def test_resume_goes_with_the_callers_transaction():
    run = fail.start()
    run_until_idle()
    with transaction.atomic():
        assert run.resume() is True
        transaction.set_rollback(True)
    assert run.status == "FAILED"
    with pytest.raises(ValueError, match="as asked"):
        run.result(timeout=0)


def test_a_cancelled_run_goes_on_from_its_last_completed_step():
    run = checkout.start("A")
    with crash_after("charge"):
        run_until_idle()
    run.cancel()
    assert run_until_idle() == 0
    run.resume()
    run_until_idle()
    assert run.status == "SUCCEEDED"
    assert ledger_of("A") == [1, 1, 1]
    assert run.model.cancel_reason == ""


def test_resume_does_nothing_to_a_run_that_is_not_set_aside():
    pending, waiting, done = echo.start(), echo.using(run_after=timedelta(hours=1)).start(), echo.start()
    done_id = done.id
    WorkflowRun.objects.exclude(pk=done_id).update(priority=-1)
    pending.cancel()
    run_until_idle()
    assert pending.resume() is True
    for run, status in [(pending, "PENDING"), (waiting, "WAITING"), (done, "SUCCEEDED")]:
        assert run.resume() is False
        assert run.status == status


@pytest.mark.django_db(transaction=True)
def test_two_people_who_resume_at_once_resume_it_once():
    run = fail.start()
    run_until_idle()
    assert sorted(together(run.resume, run.resume)) == [False, True]


@pytest.mark.django_db(transaction=True)
def test_a_cancel_and_an_end_at_the_same_moment_leave_one_of_them():
    gate = threading.Event()

    @durable.workflow(name="tests.handles.race")
    def workflow():
        gate.wait(10)
        return "result"

    run = workflow.start()

    def cancel():
        while run.status != "RUNNING":
            assert not gate.wait(0.005)
        gate.set()
        return run.cancel("race")

    _, cancelled = together(run_until_idle, cancel)
    assert run.status == ("CANCELLED" if cancelled else "SUCCEEDED")


# -- A crash in a direct call ---------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
def test_calling_again_after_a_crash_goes_on_with_the_run():
    """In a test's own transaction, too: the dead executor is nobody's to wait for."""
    with crash_after("charge"):
        checkout.using(run_id="order-1")("A")
    assert durable.get_run("order-1").status == "RUNNING"
    assert checkout.using(run_id="order-1")("A") == {"seat": "seat 1", "paid": 4900}
    assert ledger_of("A") == [1, 1, 1]
