"""Ways in which a promise was once broken, each found by somebody who tried: they stay closed."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import connection, connections, transaction
from django.utils import timezone

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import crash_after, run_until_idle
from tests.app.models import Ledger

happened: list[str] = []


@pytest.fixture(autouse=True)
def nothing_happened():
    happened.clear()


@durable.step(name="cancel_me")
def cancel_me():
    durable.get_run(durable.current().run_id).cancel("enough")


@durable.step(name="outside", atomic=False)
def outside(what):
    happened.append(what)


@durable.workflow(name="tests.broken.cancels_itself", max_attempts=2, retry_delay=0.01)
def cancels_itself(fails):
    cancel_me()
    if fails:
        raise ValueError("behind the cancel")
    outside("after the cancel")


@pytest.mark.django_db
def test_a_steps_cancel_of_its_own_run_survives_a_crash_behind_it():
    run = cancels_itself.start(fails=False)
    with crash_after("cancel_me"):
        run_until_idle()
    run_until_idle()
    assert (run.status, run.model.cancel_reason, happened) == ("CANCELLED", "enough", [])


@pytest.mark.django_db
def test_a_steps_cancel_of_its_own_run_survives_an_error_behind_it():
    run = cancels_itself.start(fails=True)
    run_until_idle()
    assert (run.status, run.model.cancel_reason) == ("CANCELLED", "enough")


@durable.workflow(name="tests.broken.other")
def other():
    return "other"


@durable.step(name="leaves_for_later")
def leaves_for_later():
    transaction.on_commit(lambda: other.using(run_id="started after the commit").start())
    transaction.on_commit(lambda: outside("after the commit"))


@durable.workflow(name="tests.broken.later", max_attempts=2, retry_delay=0.01)
def later():
    leaves_for_later()
    if len(happened) < 2:
        happened.append("failed once")
        raise ValueError("once")
    return "replayed"


@pytest.mark.django_db(transaction=True)
def test_what_a_step_leaves_for_after_its_commit_is_part_of_the_step():
    """Not of the workflow's body: a start there is no child, and a step there takes no position of the history."""
    assert later() == "replayed"
    assert durable.get_run("started after the commit").status == "PENDING"
    assert happened == ["after the commit", "failed once"]
    run = WorkflowRun.objects.get(workflow="tests.broken.later")
    assert [step.name for step in run.steps.all()] == ["leaves_for_later"]


@durable.step(name="declined", atomic=False)
def declined():
    raise KeyError("declined")


@durable.workflow(name="tests.broken.unrelated", max_attempts=2, retry_delay=0.01)
def fails_later():
    try:
        declined()
    except KeyError:
        happened.append("caught")
    outside("charged")
    raise ValueError("unrelated")


@pytest.mark.django_db
def test_a_retry_does_not_repeat_what_completed_behind_a_caught_error():
    run = fails_later.start()
    run_until_idle()
    assert run.status == "FAILED"
    assert happened.count("charged") == 1


@durable.workflow(name="tests.broken.cleans_up", timeout=10)
def cleans_up():
    try:
        outside("before")
        from django_durable.testing import advance

        advance("1 minute")
        outside("too late")
    finally:
        raise OSError("the cleaning up fails, too")


@pytest.mark.django_db
def test_an_error_while_unwinding_does_not_take_the_place_of_why_it_ends():
    run = cleans_up.start()
    run_until_idle()
    assert (run.status, run.model.cancel_reason, happened) == ("CANCELLED", "timeout", ["before"])


@pytest.mark.django_db(transaction=True)
def test_starts_with_a_date_go_on_for_as_long_as_the_connection():
    """The server keeps the plan of a statement that is sent often, and took a date inside it for text."""
    due = timezone.now() + timedelta(days=1)
    runs = [other.using(run_after=due).start() for _ in range(8)]
    assert {run.model.wake_at for run in runs} == {due}


@durable.step(name="elsewhere", using="other")
def elsewhere():
    Ledger.objects.using("other").create(key="elsewhere")
    happened.append("executed")
    if connection.vendor == "postgresql" and len(happened) == 1:
        with connections["other"].cursor() as cursor, connection.cursor() as home:
            home.execute("SELECT pg_backend_pid()")
            cursor.execute("SELECT pg_terminate_backend(%s)", home.fetchone())


@durable.workflow(name="tests.broken.elsewhere")
def works_elsewhere():
    elsewhere()
    return "done"


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_the_runs_own_database_may_go_away_under_a_step_elsewhere():
    assert works_elsewhere() == "done"
    assert Ledger.objects.using("other").filter(key="elsewhere").count() == 1
