"""`django_durable.testing`: what users' tests are made of."""

from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.test import TestCase

import django_durable as durable
from django_durable import clock, signals
from django_durable.engine import context as engine_context
from django_durable.models import StepCheckpoint, Worker, WorkflowRun
from django_durable.testing import DurableTestMixin, advance, crash_after, crash_before, run_until_idle
from tests.app.workflows import charge, checkout, echo, fail, ledger_of

pytestmark = pytest.mark.django_db


# -- run_until_idle -------------------------------------------------------------------------------------------------


def test_it_executes_all_that_is_due_and_says_how_much():
    assert run_until_idle() == 0
    runs = [checkout.start("A"), echo.using(queue="mail").start(), fail.start(), echo.using(priority=-5).start()]
    assert run_until_idle() == 4
    assert [run.status for run in runs] == ["SUCCEEDED", "SUCCEEDED", "FAILED", "SUCCEEDED"]
    assert run_until_idle() == 0


@durable.step(name="start_more")
def start_more(count):
    if count:
        chain.start(count - 1)


@durable.workflow(name="tests.testing.chain")
def chain(count):
    start_more(count)


def test_what_is_started_meanwhile_is_executed_too():
    chain.start(3)
    assert run_until_idle() == 4


def test_it_works_in_the_tests_own_transaction_and_leaves_no_row_of_its_own():
    checkout.start("A")
    run_until_idle()
    assert connection.in_atomic_block
    assert not Worker.objects.exists()


@durable.step(name="short", atomic=False, max_attempts=3, retry_delay=1)
def short_delays():
    if durable.current().attempt < 3:
        raise ConnectionError


@durable.workflow(name="tests.testing.short")
def short():
    short_delays()


def test_short_waits_pass_by_themselves_and_long_ones_take_advance():
    run = short.start()
    run_until_idle()
    # The first second passed; two seconds are longer than PARK_AFTER.
    assert (run.status, StepCheckpoint.objects.get().attempts) == ("WAITING", 2)
    advance("3 seconds")
    run_until_idle()
    assert run.status == "SUCCEEDED"


def test_a_run_that_is_set_aside_does_not_hide_the_others():
    dead, neighbour = echo.using(priority=9).start(), echo.start()
    WorkflowRun.objects.filter(pk=dead.id).update(recoveries=101)
    run_until_idle()
    assert (dead.status, neighbour.status) == ("DEAD", "SUCCEEDED")


@pytest.mark.django_db(databases=["default", "other"])
def test_another_database_is_worked_on_when_it_is_named():
    run = echo.using(database="other").start()
    assert (run_until_idle(), run_until_idle(database="other")) == (0, 1)
    assert run.status == "SUCCEEDED"


# -- advance --------------------------------------------------------------------------------------------------------


def database_now():
    echo.using(run_id="clock").start()
    return WorkflowRun.objects.values_list(clock.DatabaseNow(), flat=True)[0]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (timedelta(days=3), timedelta(days=3)),
        ("3 days", timedelta(days=3)),
        ("1 day", timedelta(days=1)),
        ("1 hour 30 minutes", timedelta(minutes=90)),
        ("1 hour, 30 minutes and 5 seconds", timedelta(minutes=90, seconds=5)),
        ("2 Weeks", timedelta(weeks=2)),
        ("0.5 seconds", timedelta(seconds=0.5)),
        (timedelta(0), timedelta(0)),
    ],
    ids=str,
)
def test_advance_moves_the_durable_clock_and_no_other(by, expected):
    durable_before, before = database_now(), datetime.now(UTC)
    advance(by)
    assert timedelta(0) <= database_now() - durable_before - expected < timedelta(minutes=1)
    assert datetime.now(UTC) - before < timedelta(minutes=1)


def test_moves_add_up():
    before = database_now()
    advance("1 hour")
    advance("1 hour")
    assert database_now() - before >= timedelta(hours=2)


@pytest.mark.parametrize(
    "by", ["", "soon", "3", "days", "3 lightyears", "3 days ago", "-3 days", timedelta(days=-1)], ids=repr
)
def test_what_is_no_duration_is_refused(by):
    with pytest.raises(ValueError, match="advance"):
        advance(by)
    assert abs(database_now() - datetime.now(UTC)) < timedelta(minutes=1)


def test_a_move_of_another_test_is_over():
    """The tests above have moved the clock by weeks."""
    assert abs(database_now() - datetime.now(UTC)) < timedelta(minutes=5)


def test_a_lease_taken_after_a_move_has_the_moved_time():
    advance("10 days")
    run = echo.using(timeout=3600).start()
    run_until_idle()
    stored = run.model
    assert stored.started_at >= stored.created_at
    assert stored.finished_at >= stored.started_at
    assert stored.deadline > stored.created_at


class TestWithTheMixin(DurableTestMixin, TestCase):
    def test_the_clock_is_set_back_at_the_end(self):
        advance("3 days")
        assert database_now() - datetime.now(UTC) > timedelta(days=2)
        self.doCleanups()
        assert database_now() - datetime.now(UTC) < timedelta(minutes=1)

    def test_a_direct_call_and_a_worker_work_in_a_test_case(self):
        assert checkout("A")["paid"] == 4900
        run = checkout.start("B")
        with crash_after("charge"):
            run_until_idle()
        run_until_idle()
        assert run.status == "SUCCEEDED"
        assert ledger_of("B") == [1, 1, 1]


# -- Crashes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crash", "step", "effects"),
    [
        (crash_before, "reserve", [0, 0, 0]),
        (crash_after, "reserve", [1, 0, 0]),
        (crash_before, "charge", [1, 0, 0]),
        (crash_after, "charge", [1, 1, 0]),
        (crash_before, "fulfil", [1, 1, 0]),
        (crash_after, "fulfil", [1, 1, 1]),
    ],
    ids=lambda item: getattr(item, "__name__", str(item)),
)
@pytest.mark.parametrize("how", ["start", "call"])
def test_the_executor_dies_there_and_the_next_one_goes_on(crash, step, effects, how):
    run = checkout.using(run_id="1")
    with crash(step):
        if how == "call":
            run("A")
        else:
            run.start("A")
            run_until_idle()
        pytest.fail("the block goes on behind the crash")
    handle = durable.get_run("1")
    assert (handle.status, ledger_of("A")) == ("RUNNING", effects)
    assert run_until_idle() == 1
    assert (handle.status, ledger_of("A"), handle.model.recoveries) == ("SUCCEEDED", [1, 1, 1], 1)


@pytest.mark.parametrize("crash", [crash_before, crash_after])
@pytest.mark.parametrize("step", ["no such step", "tests.checkout"])
def test_a_step_that_is_never_reached_is_an_error(crash, step):
    checkout.start("A")
    with pytest.raises(AssertionError, match=f"step '{step}'.*its recorded name"), crash(step):
        run_until_idle()
    assert ledger_of("A") == [1, 1, 1]


def test_a_try_that_will_be_repeated_is_not_the_steps_outcome(settings):
    settings.DURABLE = {"PARK_AFTER": 10}
    run = short.start()
    with crash_after("short"):
        run_until_idle()
    step = StepCheckpoint.objects.get()
    assert (run.status, step.status, step.attempts) == ("RUNNING", "SUCCEEDED", 3)


def test_a_replayed_step_is_not_where_it_dies():
    checkout.using(run_id="1").start("A")
    with crash_after("charge"):
        run_until_idle()
    with pytest.raises(AssertionError), crash_after("charge"):
        run_until_idle()


def test_an_error_of_the_block_itself_is_the_tests_own():
    with pytest.raises(ZeroDivisionError), crash_after("charge"):
        1 / 0  # noqa: B018


@durable.step(name="deadly")
def deadly(): ...


@durable.workflow(name="tests.testing.swallow")
def swallow():
    try:
        deadly()
    except BaseException:
        charge("A")
    return "alive"


@pytest.mark.parametrize("crash", [crash_before, crash_after])
def test_no_workflow_survives_its_own_death(crash):
    """Dead is dead: not even `except BaseException` goes on."""
    run = swallow.start()
    with crash("deadly"):
        run_until_idle()
    assert (run.status, ledger_of("A")) == ("RUNNING", [0, 0, 0])
    run_until_idle()
    assert run.result(timeout=0) == "alive"


def test_nothing_listens_after_the_block():
    with crash_after("charge"):
        checkout("A")
    with crash_before("charge"):
        checkout("B")
    assert engine_context.before_step == []
    assert checkout("C")["paid"] == 4900
    assert all("crash" not in repr(receiver) for receiver in signals.step_recorded.receivers)


def test_one_crash_after_the_other():
    run = checkout.start("A")
    for crash, step in [(crash_after, "reserve"), (crash_before, "charge"), (crash_after, "fulfil")]:
        with crash(step):
            run_until_idle()
    run_until_idle()
    assert (run.status, run.model.recoveries, ledger_of("A")) == ("SUCCEEDED", 3, [1, 1, 1])
