"""`sleep`, `sleep_until`: the pause is kept, to its end and no longer, whatever becomes of the process."""

import logging
from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

import django_durable as durable
from django_durable.clock import DatabaseNow
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import echo, times
from tests.docs.test_reference import own_registry, run_examples  # noqa: F401 (a fixture)
from tests.test_counts import commits, statements

pytestmark = pytest.mark.django_db

MINUTE = timedelta(minutes=1)


@durable.step(name="happen")
def happen(what):
    Ledger.objects.create(key=what)


@durable.workflow(name="tests.timers.nap")
def nap(duration):
    happen("before")
    durable.sleep(duration)
    happen("after")
    return "slept"


@durable.workflow(name="tests.timers.until")
def until(moment):
    durable.sleep_until(moment)
    return "slept"


def database_time():
    if not WorkflowRun.objects.exists():
        echo.start()
    return WorkflowRun.objects.values_list(DatabaseNow(), flat=True)[0]


# -- A long pause ---------------------------------------------------------------------------------------------------


def test_a_run_that_sleeps_is_a_row_that_waits_and_goes_on_when_its_time_has_come():
    run = nap.start(timedelta(days=30))
    run_until_idle()
    model = run.model
    assert (model.status, model.waiting_for, model.worker) == ("WAITING", "sleep", "")
    assert timedelta(days=29, hours=23) < model.wake_at - database_time() <= timedelta(days=30)
    advance("29 days 23 hours")
    assert run_until_idle() == 0
    advance("1 hour")
    assert run_until_idle() == 1
    assert run.result(0) == "slept"
    assert (times("before"), times("after")) == (1, 1)


def test_the_checkpoint_of_a_sleep_says_when_it_ends():
    run = nap.start(60)
    run_until_idle()
    step = run.model.steps.get(kind="sleep")
    assert (step.position, step.name, step.status) == (2, "sleep", "SUCCEEDED")
    assert step.finished_at == run.model.wake_at
    assert step.finished_at - step.started_at >= timedelta(seconds=60)


@pytest.mark.parametrize("crash", [crash_before, crash_after])
@pytest.mark.parametrize("step", ["happen", "sleep"])
def test_after_a_crash_anywhere_a_run_sleeps_no_longer_and_no_shorter(crash, step):
    """A month that began anew at each restart of a server would never end."""
    run = nap.start(timedelta(days=30))
    began = database_time()
    with crash(step):
        run_until_idle()
    run_until_idle()
    ends = began + timedelta(days=30)
    assert abs(run.model.wake_at - ends) < MINUTE
    advance("29 days 23 hours 59 minutes")
    assert run_until_idle() == 0
    advance(MINUTE)
    run_until_idle()
    assert run.result(0) == "slept"
    assert (times("before"), times("after")) == (1, 1)


def test_a_crash_behind_a_sleep_does_not_sleep_again():
    run = nap.start(60)
    run_until_idle()
    advance(MINUTE)
    before = run.model.steps.get(kind="sleep").finished_at
    # The second of the two steps of this name.
    with crash_before("happen"):
        run_until_idle()
    run_until_idle()
    assert run.result(0) == "slept"
    assert run.model.steps.get(kind="sleep").finished_at == before


def test_a_pause_in_the_middle_does_not_move_the_end():
    run = nap.start(timedelta(days=10))
    run_until_idle()
    ends = run.model.wake_at
    advance("3 days")
    assert run.pause()
    advance("3 days")
    assert run_until_idle() == 0
    assert run.resume()
    run_until_idle()
    assert (run.model.waiting_for, run.model.wake_at) == ("sleep", ends)


def test_a_run_that_was_paused_beyond_its_sleep_goes_on_at_once():
    run = nap.start(60)
    run_until_idle()
    assert run.pause()
    advance("2 days")
    assert run_until_idle() == 0
    assert run.resume()
    run_until_idle()
    assert run.result(0) == "slept"


def test_a_run_that_was_cancelled_asleep_and_resumed_keeps_its_end():
    run = nap.start(timedelta(days=10))
    run_until_idle()
    ends = run.model.wake_at
    assert run.cancel()
    assert run.model.wake_at is None
    advance("1 day")
    assert run.resume()
    run_until_idle()
    assert (run.status, run.model.wake_at) == ("WAITING", ends)
    assert times("before") == 1


def test_what_fails_behind_a_sleep_and_is_tried_again_does_not_sleep_again():
    tries = []

    @durable.step(name="flaky", atomic=False)
    def flaky():
        tries.append(database_time())
        if len(tries) == 1:
            raise ConnectionError

    @durable.workflow(name="tests.timers.tried_again", max_attempts=2, retry_delay=5)
    def tried_again():
        durable.sleep(3600)
        flaky()

    run = tried_again.start()
    run_until_idle()
    advance("1 hour")
    run_until_idle()
    advance("10 seconds")
    run_until_idle()
    assert run.status == "SUCCEEDED"
    assert tries[1] - tries[0] < MINUTE


def test_thousands_of_sleepers_wake_in_the_order_of_their_times():
    runs = [nap.start(timedelta(hours=hours)) for hours in (3, 1, 2)]
    run_until_idle()
    woken = []
    for _ in range(3):
        advance("1 hour")
        run_until_idle()
        woken.append([run.status for run in runs])
    assert woken == [
        ["WAITING", "SUCCEEDED", "WAITING"],
        ["WAITING", "SUCCEEDED", "SUCCEEDED"],
        ["SUCCEEDED", "SUCCEEDED", "SUCCEEDED"],
    ]


def test_in_a_direct_call_sleep_waits_and_in_a_test_it_moves_the_clock():
    began = database_time()
    assert nap(timedelta(days=30)) == "slept"
    assert timedelta(days=30) <= database_time() - began < timedelta(days=30, minutes=1)


# -- A short pause --------------------------------------------------------------------------------------------------


def test_a_short_sleep_stays_in_its_thread_and_is_recorded_all_the_same():
    run = nap.start(0.5)
    assert run_until_idle() == 1
    assert run.result(0) == "slept"
    assert [(step.kind, step.status) for step in run.model.steps.all()] == [
        ("atomic", "SUCCEEDED"),
        ("sleep", "SUCCEEDED"),
        ("atomic", "SUCCEEDED"),
    ]


@pytest.mark.parametrize("crash", [crash_before, crash_after])
def test_a_short_sleep_survives_a_crash(crash):
    run = nap.start(0.9)
    began = database_time()
    with crash("sleep"):
        run_until_idle()
    run_until_idle()
    assert run.result(0) == "slept"
    ended = run.model.finished_at
    assert timedelta(seconds=0.9) <= ended - began < timedelta(seconds=30)


@pytest.mark.parametrize("seconds", [1.0, 1.001])
def test_park_after_is_the_longest_pause_that_a_thread_is_held_for(seconds):
    run = nap.start(seconds)
    run_until_idle()
    # The second execution is the one behind the parking.
    assert (run.result(0), run.model.attempt) == ("slept", 1 if seconds == 1.0 else 2)


def test_a_sleep_of_nothing_is_recorded_and_costs_no_time():
    run = nap.start(0)
    assert run_until_idle() == 1
    assert run.result(0) == "slept"


# -- sleep_until ----------------------------------------------------------------------------------------------------


def test_sleep_until_a_moment():
    moment = database_time() + timedelta(days=3)
    run = until.start(moment)
    run_until_idle()
    assert (run.status, run.model.wake_at) == ("WAITING", moment)
    advance("3 days")
    run_until_idle()
    assert run.result(0) == "slept"


@pytest.mark.parametrize("moment", [datetime(1990, 1, 1, tzinfo=UTC), datetime.min.replace(tzinfo=UTC)])
def test_sleep_until_a_moment_that_has_passed_goes_on_at_once(moment):
    run = until.start(moment)
    assert run_until_idle() == 1
    assert run.result(0) == "slept"
    step = run.model.steps.get()
    assert step.finished_at >= step.started_at


def test_the_first_executions_moment_stands_for_every_replay():
    """A time that is worked out anew in each replay would move on before the run, for ever."""

    @durable.workflow(name="tests.timers.moving")
    def moving():
        durable.sleep_until(database_time() + timedelta(days=1))

    run = moving.start()
    run_until_idle()
    ends = run.model.wake_at
    advance("12 hours")
    assert run.pause()
    assert run.resume()
    run_until_idle()
    assert run.model.wake_at == ends


# -- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "error", "text"),
    [
        ("3 days", TypeError, "found str: '3 days'"),
        (None, TypeError, "found NoneType"),
        (True, TypeError, "found bool"),
        (-1, ValueError, "from 0 to 100 years"),
        (timedelta(seconds=-1), ValueError, "from 0 to 100 years"),
        (float("nan"), ValueError, "found nan"),
        (float("inf"), ValueError, "found inf"),
        (1e12, ValueError, "from 0 to 100 years"),
    ],
)
def test_what_is_no_duration_is_a_clear_error_in_the_workflow(duration, error, text):
    run = nap.start(duration)
    run_until_idle()
    with pytest.raises(error, match=text):
        run.result(0)
    assert times("after") == 0


@pytest.mark.parametrize(
    ("moment", "error", "text"),
    [
        (datetime(2040, 1, 1), ValueError, "a datetime with a time zone"),
        (datetime(2040, 1, 1, tzinfo=UTC).date(), TypeError, "takes a datetime, found date"),
        (3600, TypeError, "takes a datetime, found int"),
    ],
)
def test_what_is_no_moment_is_a_clear_error_in_the_workflow(moment, error, text):
    run = until.start(moment)
    run_until_idle()
    with pytest.raises(error, match=text):
        run.result(0)


def test_a_refused_duration_takes_no_position():
    @durable.workflow(name="tests.timers.corrected")
    def corrected():
        with pytest.raises(ValueError, match="from 0"):
            durable.sleep(-1)
        durable.sleep(0)

    run = corrected.start()
    run_until_idle()
    assert run.status == "SUCCEEDED"
    assert run.model.steps.get().position == 1


@pytest.mark.parametrize(
    "call", [lambda: durable.sleep(1), lambda: durable.sleep_until(datetime.now(UTC))], ids=["sleep", "sleep_until"]
)
def test_outside_a_workflow_there_is_nothing_that_could_sleep(call):
    with pytest.raises(durable.NotInWorkflow, match="outside a workflow"):
        call()

    @durable.step(name="sleeps_in_a_step")
    def sleeps_in_a_step():
        call()

    @durable.workflow(name="tests.timers.in_a_step")
    def in_a_step():
        sleeps_in_a_step()

    with pytest.raises(durable.NotInWorkflow, match="inside a step"):
        in_a_step()


# -- What it costs --------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_a_long_sleep_is_one_commit_and_so_is_waking_from_it():
    @durable.workflow(name="tests.timers.counted")
    def counted(seconds):
        durable.sleep(seconds)

    counts = {}
    for seconds in (0, 3600):
        run = counted.start(seconds)
        with CaptureQueriesContext(connection) as queries:
            run_until_idle()
        counts[seconds] = commits(queries)
        table = StepCheckpoint._meta.db_table
        assert len([sql for sql in statements(queries) if sql.startswith("INSERT") and table in sql]) == 1
        if seconds:
            assert run.status == "WAITING"
            advance("1 hour")
            with CaptureQueriesContext(connection) as queries:
                run_until_idle()
            # Made due and ended, beside the claim: nothing is recorded of a wake-up.
            assert commits(queries) == 2
            assert not [sql for sql in statements(queries) if sql.startswith("INSERT")]
    # Beside the claim: recorded and ended; or recorded and parked, in one.
    assert counts == {0: 2, 3600: 1}


def test_a_sleep_in_a_loop_is_a_checkpoint_each_and_nothing_else(caplog):
    @durable.workflow(name="tests.timers.often")
    def often():
        for _ in range(5):
            durable.sleep(60)

    run = often.start()
    with caplog.at_level(logging.WARNING, "django_durable"):
        for _ in range(6):
            run_until_idle()
            advance(MINUTE)
    assert run.status == "SUCCEEDED"
    assert run.model.steps.count() == 5
    assert not caplog.records


# -- The page -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_registry")
def test_the_examples_of_the_page_do_what_they_say():
    run_examples("docs/how-to/timers.md")
