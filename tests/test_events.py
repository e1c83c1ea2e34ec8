"""`set_event`, `get_event`: what a run publishes about itself, and who waits for it."""

import contextvars
import threading
import time
from datetime import timedelta
from functools import partial

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

import django_durable as durable
from django_durable.models import Event, StepCheckpoint, WorkflowRun
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import echo, times
from tests.test_counts import commits, statements
from tests.threads import elsewhere, together

pytestmark = pytest.mark.django_db

HOUR = timedelta(hours=1)


@durable.step(name="mark")
def mark(what):
    Ledger.objects.create(key=str(what))


@durable.workflow(name="tests.events.publish")
def publish(*values, key="progress", then_wait=False):
    for value in values:
        durable.set_event(key, value)
        mark(value)
    if then_wait:
        durable.receive("go on")


@durable.workflow(name="tests.events.ask")
def ask(run, key="progress", timeout=None):
    value = durable.get_event(run, key, timeout=timeout, default="nothing")
    mark("asked")
    return value


# -- The latest value -----------------------------------------------------------------------------------------------


def test_the_latest_value_stands():
    run = publish.start(1, 2, {"percent": 100})
    run_until_idle()
    assert durable.get_event(run, "progress", timeout=0) == {"percent": 100}
    assert Event.objects.filter(run=run.id).count() == 1


def test_keys_and_runs_are_apart():
    runs = [publish.start(number, key=key) for number, key in enumerate(["a", "b", "a"])]
    run_until_idle()
    assert [run.get_event(key, 0, "none") for run in runs for key in ("a", "b")] == [0, "none", "none", 1, 2, "none"]


def test_an_event_says_when_it_was_set_last():
    run = publish.start(1, then_wait=True)
    run_until_idle()
    event = Event.objects.get()
    assert run.model.steps.get(kind="event").finished_at >= event.updated_at
    advance("1 hour")
    again = publish.start(1)
    run_until_idle()
    assert Event.objects.get(run=again.id).updated_at > event.updated_at


@pytest.mark.parametrize("crash", [crash_before, crash_after])
@pytest.mark.parametrize("step", ["set_event progress", "mark"])
def test_whenever_a_run_dies_its_events_are_those_of_one_execution(crash, step):
    run = publish.start("a", "b")
    with crash(step):
        run_until_idle()
    run_until_idle()
    assert run.get_event("progress", 0) == "b"
    assert (times("a"), times("b")) == (1, 1)
    assert run.model.steps.filter(kind="event").count() == 2


def test_an_older_execution_does_not_set_an_event_back():
    """A replay passes all that was set before: the value of the day must not flicker."""
    run = publish.start("a", "b", then_wait=True)
    run_until_idle()
    stamp = Event.objects.get().updated_at
    run.pause()
    run.resume()
    run_until_idle()
    assert (run.status, Event.objects.get().updated_at) == ("WAITING", stamp)


# -- From steps -----------------------------------------------------------------------------------------------------


@durable.step(name="import_rows")
def import_rows(fails):
    durable.set_event("rows", 10)
    if fails:
        raise ValueError("undone")


@durable.step(name="call_out", atomic=False)
def call_out(values):
    for value in values:
        durable.set_event("rows", value)


@durable.workflow(name="tests.events.importing")
def importing(fails=False):
    import_rows(fails)


@durable.workflow(name="tests.events.calling")
def calling(*values):
    call_out(list(values))


@pytest.mark.parametrize("fails", [False, True])
def test_an_atomic_step_sets_it_with_its_commit_or_not_at_all(fails):
    run = importing.start(fails)
    run_until_idle()
    assert run.get_event("rows", 0, "nothing") == ("nothing" if fails else 10)


def test_a_step_of_the_outside_world_shows_how_far_it_is():
    run = calling.start(1, 2, 3)
    run_until_idle()
    assert run.get_event("rows", 0) == 3
    assert [step.kind for step in run.model.steps.all()] == ["step"]


# -- Waiting in a workflow ------------------------------------------------------------------------------------------


def test_a_run_waits_as_a_row_for_the_first_value():
    publisher = publish.using(run_after=HOUR).start("now")
    run = ask.start(publisher)
    run_until_idle()
    assert (run.status, run.model.waiting_for) == ("WAITING", f"event:{publisher.id}:progress")
    advance("1 hour")
    run_until_idle()
    assert run.result(0) == "now"


def test_another_event_of_the_same_run_wakes_nobody():
    publisher = publish.start("other", key="other", then_wait=True)
    run = ask.start(publisher)
    run_until_idle()
    assert (run.status, run.model.attempt) == ("WAITING", 1)


@pytest.mark.parametrize("crash", [crash_before, crash_after])
@pytest.mark.parametrize("step", ["get_event progress", "mark"])
def test_whenever_the_asking_run_dies_it_gets_one_answer(crash, step):
    publisher = publish.start("first")
    run_until_idle()
    run = ask.start(publisher)
    with crash(step):
        run_until_idle()
    answered = StepCheckpoint.objects.filter(run=run.id, kind="event").exists()
    Event.objects.filter(run=publisher.id).update(value='"changed"')
    run_until_idle()
    assert run.result(0) == ("first" if answered else "changed")
    assert times("asked") == 1


def test_many_runs_may_wait_for_one_event():
    publisher = publish.using(run_after=HOUR).start("now")
    runs = [ask.start(publisher) for _ in range(5)]
    run_until_idle()
    assert {run.status for run in runs} == {"WAITING"}
    advance("1 hour")
    run_until_idle()
    assert [run.result(0) for run in runs] == ["now"] * 5


@pytest.mark.parametrize("how", ["succeeds", "fails", "is cancelled"])
def test_a_run_that_ends_without_the_event_lets_nobody_wait_for_ever(how):
    publisher = importing.using(run_after=HOUR).start(how == "fails")
    run = ask.start(publisher)
    run_until_idle()
    assert run.status == "WAITING"
    if how == "is cancelled":
        assert publisher.cancel()
    advance("1 hour")
    run_until_idle()
    assert run.result(0) == "nothing"


def test_a_run_that_had_ended_before_is_not_waited_for():
    publisher = echo.start()
    run_until_idle()
    run = ask.start(publisher)
    assert run_until_idle() == 1
    assert run.result(0) == "nothing"


def test_an_ended_run_still_tells_what_it_has_published():
    publisher = publish.start("last words")
    run_until_idle()
    run = ask.start(publisher)
    run_until_idle()
    assert run.result(0) == "last words"


def test_after_the_timeout_the_default_is_recorded_and_stays():
    publisher = publish.using(run_after=HOUR).start("too late")
    run = ask.start(publisher, timeout=60)
    run_until_idle()
    advance("61 seconds")
    with crash_before("mark"):
        run_until_idle()
    advance("1 hour")
    run_until_idle()
    assert publisher.status == "SUCCEEDED"
    assert run.result(0) == "nothing"


@pytest.mark.parametrize("timeout", [0, 0.5])
def test_a_short_timeout_parks_nothing(timeout):
    publisher = publish.using(run_after=HOUR).start("too late")
    run = ask.start(publisher, timeout=timeout)
    assert run_until_idle() == 1
    assert run.result(0) == "nothing"


def test_an_event_of_the_run_itself_is_there_at_once():
    @durable.workflow(name="tests.events.own")
    def own():
        durable.set_event("k", 1)
        return durable.get_event(durable.current().run_id, "k")

    assert own() == 1


def test_an_unknown_run_is_an_error_that_the_workflow_can_catch():
    @durable.workflow(name="tests.events.of_nobody")
    def of_nobody():
        try:
            durable.get_event("nobody", "k", timeout=60)
        except durable.RunNotFound:
            return "caught"

    run = of_nobody.start()
    run_until_idle()
    assert run.result(0) == "caught"


@pytest.mark.django_db(databases=["default", "other"])
def test_an_event_of_a_run_in_another_database_is_looked_for_every_few_seconds():
    publisher = publish.using(database="other", run_after=HOUR).start("there")
    run = ask.start(publisher)
    run_until_idle()
    assert run.status == "WAITING"
    assert run.model.wake_at is not None
    advance("1 hour")
    run_until_idle("other")
    run_until_idle()
    assert run.result(0) == "there"


# -- Asking from outside --------------------------------------------------------------------------------------------


def test_a_view_looks_and_does_not_wait():
    run = publish.start("now", then_wait=True)
    assert run.get_event("progress", timeout=0, default="not yet") == "not yet"
    run_until_idle()
    assert run.get_event("progress", timeout=0, default="not yet") == "now"


def test_none_is_a_value_and_no_default_takes_its_place():
    run = publish.start(None)
    run_until_idle()
    assert run.get_event("progress", timeout=0, default="not set") is None


@pytest.mark.django_db(transaction=True)
def test_outside_it_waits_for_the_value():
    run = publish.start("now", then_wait=True)
    asked = threading.Event()

    def wait():
        asked.set()
        return run.get_event("progress", timeout=20)

    def work():
        asked.wait(10)
        return run_until_idle()

    assert together(wait, work) == ["now", 1]


@pytest.mark.django_db(transaction=True)
def test_outside_nobody_waits_for_a_run_that_has_ended():
    run = echo.start()
    assert together(lambda: run.get_event("k", default="nothing"), run_until_idle) == ["nothing", 1]


def test_outside_the_default_comes_after_the_timeout():
    run = publish.start("never executed")
    began = time.monotonic()
    assert run.get_event("progress", timeout=0.05, default="nothing") == "nothing"
    assert time.monotonic() - began >= 0.05


@pytest.mark.django_db(transaction=True)
def test_an_event_of_an_unknown_run_is_a_clear_answer_and_the_views_transaction_goes_on():
    with transaction.atomic():
        Ledger.objects.create(key="before")
        for run_id in ("nobody", "a\0", "\ud800"):
            with pytest.raises(durable.RunNotFound):
                durable.get_event(run_id, "k", timeout=0)
        Ledger.objects.create(key="after")
    assert (times("before"), times("after")) == (1, 1)


# -- Many at once ---------------------------------------------------------------------------------------------------


@durable.step(name="shout", atomic=False)
def shout(numbers):
    # Threads that a step starts are part of it if they are given its context.
    here = [contextvars.copy_context() for _ in numbers]
    calls = [
        partial(each.run, durable.set_event, "k", [number] * 50) for number, each in zip(numbers, here, strict=True)
    ]
    assert together(*calls) == [None] * len(numbers)


@durable.workflow(name="tests.events.shouting")
def shouting(count):
    shout(list(range(count)))


@pytest.mark.django_db(transaction=True)
def test_of_many_writers_of_one_key_the_last_one_stands_whole():
    run = shouting.start(8)
    run_until_idle()
    assert run.status == "SUCCEEDED"
    value = run.get_event("k", 0)
    assert value in [[number] * 50 for number in range(8)]
    assert Event.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_what_is_not_committed_is_not_seen():
    def look():
        return elsewhere(lambda: durable.get_event(seen[0], "rows", timeout=0, default="nothing"))

    seen, looked = [], []

    @durable.step(name="look_from_inside")
    def look_from_inside():
        durable.set_event("rows", 10)
        seen.append(durable.current().run_id)
        looked.append(look())

    @durable.workflow(name="tests.events.looked_at")
    def looked_at():
        look_from_inside()

    run = looked_at.start()
    run_until_idle()
    assert (looked, run.get_event("rows", 0)) == (["nothing"], 10)


# -- What is refused ------------------------------------------------------------------------------------------------


def test_outside_a_run_there_is_nothing_to_publish():
    with pytest.raises(durable.NotInWorkflow):
        durable.set_event("k", 1)


@pytest.mark.parametrize("name", ["set_event", "get_event"])
@pytest.mark.parametrize(
    ("key", "error"),
    [("", ValueError), ("x" * 201, ValueError), ("a\0", ValueError), ("\ud800", ValueError), (1, TypeError)],
    ids=["empty", "long", "nul", "surrogate", "number"],
)
def test_a_key_is_short_readable_text(name, key, error):
    @durable.workflow(name="tests.events.bad_key")
    def bad_key():
        if name == "set_event":
            durable.set_event(key, 1)
        else:
            durable.get_event("nobody", key)

    with pytest.raises(error, match="key takes"):
        bad_key()


def test_a_value_that_cannot_be_stored_is_refused_and_named():
    run = publish.start(1)

    @durable.workflow(name="tests.events.unstorable")
    def unstorable():
        durable.set_event("k", threading.Lock())

    bad = unstorable.start()
    run_until_idle()
    with pytest.raises(durable.SerializationError, match="step 1"):
        bad.result(0)
    assert run.status == "SUCCEEDED"
    assert not Event.objects.filter(run=bad.id).exists()


@pytest.mark.parametrize(
    "value",
    ["\0", "\ud800", {"b": 1, "a": [float("-inf")]}, b"\0", (1,)],
    ids=["nul", "half", "dict", "bytes", "tuple"],
)
def test_a_value_comes_as_it_was_set(value):
    @durable.workflow(name="tests.events.any_value")
    def any_value():
        durable.set_event("k", value)
        return durable.get_event(durable.current().run_id, "k")

    found = any_value()
    assert (found, type(found)) == (value, type(value))


def test_the_longest_ids_and_keys_work():
    publisher = publish.using(run_id="r" * 200, run_after=HOUR).start(1, key="k" * 200)
    run = ask.start(publisher, "k" * 200)
    run_until_idle()
    assert run.status == "WAITING"
    advance("1 hour")
    run_until_idle()
    assert run.result(0) == 1


# -- What it costs --------------------------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_an_event_from_the_body_is_one_commit_of_four_statements():
    counts = []
    for count in (1, 11):
        publish_only.start(count)
        with CaptureQueriesContext(connection) as queries:
            run_until_idle()
        counts.append((len(statements(queries)), commits(queries)))
    (one, one_commits), (eleven, eleven_commits) = counts
    # The value, no wait begins meanwhile, who waits is due, the checkpoint.
    assert (eleven - one, eleven_commits - one_commits) == (40, 10)


@durable.workflow(name="tests.events.publish_only")
def publish_only(count):
    for number in range(count):
        durable.set_event("k", number)


@pytest.mark.django_db(transaction=True)
def test_a_look_from_a_view_is_three_statements_and_no_write():
    run = publish_only.start(1)
    run_until_idle()
    with CaptureQueriesContext(connection) as queries:
        run.get_event("k", timeout=0)
    # The run's line, whether it may still come, the value.
    assert [sql.split()[0] for sql in statements(queries)] == ["WITH", "SELECT", "SELECT"]
    assert commits(queries) == 0


@pytest.mark.django_db(transaction=True)
def test_the_end_of_a_run_that_nobody_waits_for_stays_one_statement():
    run = publish_only.start(1)
    with CaptureQueriesContext(connection) as queries:
        run_until_idle()
    assert run.status == "SUCCEEDED"
    last = statements(queries)
    ends = [
        sql for sql in last if sql.startswith("UPDATE") and WorkflowRun._meta.db_table in sql and "finished_at" in sql
    ]
    assert len(ends) == 1
