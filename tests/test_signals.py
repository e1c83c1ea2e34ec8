"""The signals: sent after commit with their facts, and their receivers can do no harm."""

from contextlib import ExitStack, contextmanager

import pytest
from django.db import connection, transaction

import django_durable as durable
from django_durable import signals
from django_durable.models import StepCheckpoint, Worker, WorkflowRun
from django_durable.testing import advance, crash_after, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import charge, checkout, echo, fail, ledger_of
from tests.threads import elsewhere

pytestmark = pytest.mark.django_db

NAMES = ("run_started", "step_recorded", "run_finished", "run_recovered")
COMMON = {"run_id", "workflow", "database", "worker"}


@contextmanager
def receiving(receiver):
    with ExitStack() as stack:
        for name in NAMES:
            signal = getattr(signals, name)

            def receive(sender, signal, *, which=name, **facts):
                receiver(which, facts)

            signal.connect(receive, weak=False)
            stack.callback(signal.disconnect, receive)
        yield


@pytest.fixture
def told():
    heard = []
    with receiving(lambda name, facts: heard.append((name, facts))):
        yield heard


def test_a_run_tells_what_happens_to_it(told):
    run = checkout.start("A")
    assert told == []
    run_until_idle()
    assert [name for name, _ in told] == ["run_started", *["step_recorded"] * 3, "run_finished"]
    for _, facts in told:
        assert set(facts) >= COMMON
        assert (facts["run_id"], facts["workflow"], facts["database"]) == (run.id, "tests.checkout", "default")
        assert facts["worker"] == run.model.worker
        assert facts["attempt"] == 1
    steps = [facts for name, facts in told if name == "step_recorded"]
    assert [
        (facts["position"], facts["name"], facts["kind"], facts["status"], facts["attempts"]) for facts in steps
    ] == [
        (1, "reserve", "atomic", "SUCCEEDED", 1),
        (2, "charge", "step", "SUCCEEDED", 1),
        (3, "fulfil", "atomic", "SUCCEEDED", 1),
    ]
    assert told[-1][1]["status"] == "SUCCEEDED"


def test_a_replay_tells_of_nothing_twice(told):
    with crash_after("charge"):
        checkout.start("A")
        run_until_idle()
    run_until_idle()
    assert [name for name, _ in told] == [
        "run_started",
        "step_recorded",
        "step_recorded",
        "run_recovered",
        "step_recorded",
        "run_finished",
    ]
    recovered = told[3][1]
    assert (recovered["recoveries"], recovered["workflow"]) == (1, "tests.checkout")
    # The dead one's id, not the one's that takes over.
    assert recovered["worker"] == told[0][1]["worker"] != told[-1][1]["worker"]
    assert [facts["attempt"] for name, facts in told if name == "step_recorded"] == [1, 1, 2]


@durable.step(name="flaky", atomic=False, max_attempts=2, retry_delay=0)
def flaky():
    raise ConnectionError


@durable.workflow(name="tests.signals.flaky", max_attempts=2, retry_delay=0)
def failing_twice():
    flaky()


def test_tries_that_will_be_repeated_are_told_apart_from_outcomes(told):
    failing_twice.start()
    run_until_idle()
    statuses = [(facts["status"], facts["attempts"]) for name, facts in told if name == "step_recorded"]
    assert statuses == [("RETRYING", 1), ("FAILED", 2)] * 2
    # A run that tries again has not ended.
    assert [facts["status"] for name, facts in told if name == "run_finished"] == ["FAILED"]


def test_every_end_is_told(told, django_capture_on_commit_callbacks):
    fail.start()
    with django_capture_on_commit_callbacks(execute=True):
        echo.start().cancel()
    dead = checkout.start("A")
    WorkflowRun.objects.filter(pk=dead.id).update(recoveries=101)
    run_until_idle()
    run_until_idle()
    overdue = echo.using(timeout=1).start()
    WorkflowRun.objects.filter(pk=overdue.id).update(deadline=overdue.model.created_at)
    advance("1 minute")
    run_until_idle()
    ends = [facts["status"] for name, facts in told if name == "run_finished"]
    assert sorted(ends) == ["CANCELLED", "CANCELLED", "DEAD", "FAILED"]


@pytest.mark.django_db(transaction=True)
def test_what_a_receiver_is_told_is_committed():
    heard = []

    def look(name, facts):
        def stored():
            run = WorkflowRun.objects.get(pk=facts["run_id"])
            return run.status, run.steps.count()

        heard.append((name, connection.in_atomic_block, elsewhere(stored)))

    with receiving(look):
        checkout("A")
    assert heard == [
        ("run_started", False, ("RUNNING", 0)),
        ("step_recorded", False, ("RUNNING", 1)),
        ("step_recorded", False, ("RUNNING", 2)),
        ("step_recorded", False, ("RUNNING", 3)),
        ("run_finished", False, ("SUCCEEDED", 3)),
    ]


@pytest.mark.django_db(transaction=True)
def test_a_cancel_that_is_rolled_back_is_not_told(told):
    run = echo.start()
    with transaction.atomic():
        run.cancel()
        transaction.set_rollback(True)
    assert told == []
    with transaction.atomic():
        run.cancel()
        assert told == []
    assert [(name, facts["status"]) for name, facts in told] == [("run_finished", "CANCELLED")]


@pytest.mark.parametrize("error", [ValueError, durable.DurableError], ids=lambda error: error.__name__)
def test_a_receivers_error_changes_nothing(error):
    def broken(name, facts):
        raise error(name)

    with receiving(broken):
        assert checkout("A") == {"seat": "seat 1", "paid": 4900}
    assert ledger_of("A") == [1, 1, 1]
    assert StepCheckpoint.objects.filter(status="SUCCEEDED").count() == 3


def test_a_receiver_may_use_the_database():
    with receiving(lambda name, facts: Ledger.objects.create(key=f"heard {name}")):
        checkout("A")
    assert Ledger.objects.filter(key="heard step_recorded").count() == 3


def test_a_recovery_is_told_once_for_each_run(told):
    for name in "ab":
        run = echo.start(name)
        WorkflowRun.objects.filter(pk=run.id).update(status="RUNNING", worker="dead", attempt=1)
    run_until_idle()
    assert [facts["worker"] for name, facts in told if name == "run_recovered"] == ["dead", "dead"]
    assert not Worker.objects.exists()


def test_a_step_outside_a_workflow_tells_nothing(told):
    charge("A")
    assert told == []
