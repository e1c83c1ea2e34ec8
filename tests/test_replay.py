"""Replay: completed steps answer from their checkpoints, the first execution sees what a replay would, and code that
no longer fits its history is set aside."""

from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from django.db.models import F

import django_durable as durable
from django_durable import serialization
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import crash_after, crash_before, run_until_idle
from tests.app.models import Account, Ledger
from tests.app.workflows import checkout, ledger_of, times

pytestmark = pytest.mark.django_db


class Colour(Enum):
    RED = "red"


# -- The first execution sees what a replay would -------------------------------------------------------------------

VALUES = {
    "nothing": None,
    "truth": True,
    "large": 2**4000,
    "floats": [1.5, float("inf"), -0.0],
    "text": "a\0b \ud800 größe",
    "tuple": (1, (2, [3])),
    "int keys": {1: "a", "1": "b", (1, 2): "c", None: "d"},
    "order": {"z": 1, "a": 2, "m": 3},
    "sets": [{1, 2}, frozenset("ab")],
    "bytes": b"\0\xff",
    "times": [
        datetime(2030, 1, 1, tzinfo=UTC),
        datetime(2030, 6, 1, tzinfo=ZoneInfo("Europe/Berlin")),
        datetime(2030, 1, 1),
        date(2030, 1, 1),
        timedelta(microseconds=1),
    ],
    "exact": [Decimal("1.50"), UUID(int=5)],
    "enum": Colour.RED,
    "error": ValueError("as a value", 5),
}

seen: list = []


@durable.step(name="value_of", atomic=False)
def value_of(name):
    return VALUES[name]


@durable.step(name="nothing_more")
def nothing_more(): ...


@durable.workflow(name="tests.replay.values")
def values(name):
    seen.append(value_of(name))
    nothing_more()
    return seen[-1]


def alike(one, other):
    """Equal, of the same types, all the way down."""
    return repr(one) == repr(other) and type(one) is type(other)


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_the_same_at_first_and_on_replay_and_as_the_result(name):
    seen.clear()
    run = values.start(name)
    with crash_after("value_of"):
        run_until_idle()
    with crash_before("nothing_more"):
        run_until_idle()
    with crash_after("nothing_more"):
        run_until_idle()
    run_until_idle()
    assert len(seen) == 3
    assert all(alike(value, VALUES[name]) for value in [*seen, run.result(timeout=0)])


@durable.step(name="shared", atomic=False)
def shared():
    inner = [1]
    return [inner, inner]


@durable.workflow(name="tests.replay.shared")
def sharing():
    value = shared()
    value[0].append(2)
    seen.append(value)
    nothing_more()


def test_what_a_round_trip_changes_is_changed_for_the_first_execution_already():
    """One list at two places comes back as two lists. Not seen at first, it would be a difference between the two."""
    seen.clear()
    sharing.start()
    with crash_before("nothing_more"):
        run_until_idle()
    run_until_idle()
    assert seen == [[[1, 2], [1]]] * 2


@durable.step(name="find_account")
def find_account(pk):
    account = Account.objects.get(pk=pk)
    account.name = "changed in memory, not saved"
    return account


@durable.step(name="add")
def add(pk):
    Account.objects.filter(pk=pk).update(balance=F("balance") + 1)


@durable.workflow(name="tests.replay.account")
def with_account(account):
    found = find_account(account.pk)
    seen.append([account.balance, found.name, found.balance])
    add(account.pk)
    nothing_more()
    return found


def test_a_model_instance_is_read_again_at_first_and_on_every_replay():
    seen.clear()
    account = Account.objects.create(name="Ada", balance=5)
    run = with_account.start(account)
    with crash_before("nothing_more"):
        run_until_idle()
    run_until_idle()
    assert seen == [[5, "Ada", 5], [6, "Ada", 6]]
    assert run.result(timeout=0) == account


def test_an_instance_that_is_gone_at_replay_fails_the_run_and_names_it():
    seen.clear()
    account = Account.objects.create(name="Ada")
    run = with_account.start(account)
    with crash_before("nothing_more"):
        run_until_idle()
    account.delete()
    run_until_idle()
    assert run.status == "FAILED"
    with pytest.raises(durable.SerializationError, match=r"(?i)account"):
        run.result(timeout=0)


class Refused(Exception):
    def __init__(self, order, *, reasons):
        super().__init__(order)
        self.reasons = reasons


@durable.step(name="refuse", atomic=False)
def refuse():
    raise Refused((1, 2), reasons={1: Decimal("2.50")}) from ConnectionError("the payment service")


@durable.workflow(name="tests.replay.refused")
def refused():
    try:
        refuse()
    except Refused as error:
        seen.append([type(error), error.args, error.reasons, repr(error.__cause__)])
    nothing_more()


def test_an_error_is_the_same_at_first_and_on_replay():
    seen.clear()
    refused.start()
    with crash_before("nothing_more"):
        run_until_idle()
    run_until_idle()
    assert seen[0] == [Refused, ((1, 2),), {1: Decimal("2.50")}, "ConnectionError('the payment service')"]
    assert seen[1] == seen[0]


def test_arguments_of_the_first_execution_are_what_a_replay_gets():
    given = {"tuple": (1, 2), 3: [4]}

    @durable.workflow(name="tests.replay.arguments")
    def workflow(data):
        data[3].append("changed in the workflow")
        return data

    assert workflow(given) == {"tuple": (1, 2), 3: [4, "changed in the workflow"]}
    assert given == {"tuple": (1, 2), 3: [4]}


# -- Nothing completed is executed again ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["reserve", "charge", "fulfil"])
def test_a_crash_after_any_step_repeats_none(step):
    run = checkout.start("A")
    with crash_after(step):
        run_until_idle()
    assert run.status == "RUNNING"
    assert run_until_idle() == 1
    assert run.result(timeout=0) == {"seat": "seat 1", "paid": 4900}
    assert ledger_of("A") == [1, 1, 1]
    assert (run.model.recoveries, run.model.attempt, run.model.failures) == (1, 2, 0)


def test_the_executions_of_the_steps_are_told_apart():
    run = checkout.start("A")
    with crash_after("reserve"):
        run_until_idle()
    run_until_idle()
    assert [(step.name, step.attempt) for step in run.model.steps.all()] == [
        ("reserve", 1),
        ("charge", 2),
        ("fulfil", 2),
    ]


def test_a_finished_run_is_not_executed_again():
    checkout.start("A")
    run_until_idle()
    assert run_until_idle() == 0
    assert ledger_of("A") == [1, 1, 1]


# -- Code that no longer fits ---------------------------------------------------------------------------------------


@durable.workflow(name="tests.replay.deployed")
def deployed(): ...


def deploy(monkeypatch, body):
    monkeypatch.setattr(deployed, "func", body)


@durable.step(name="row", atomic=False)
def row(name):
    Ledger.objects.create(key=name)


def body_of(names, swallow=None):
    def body():
        done = []
        for name in names:
            try:
                durable.run_step(name, row.func, name)
            except BaseException as error:
                if swallow is None or not isinstance(error, swallow):
                    raise
            done.append(name)
        return done

    return body


CHANGES = {
    "rename": ["a", "B", "c"],
    "insert": ["a", "new", "b", "c"],
    "insert at the front": ["new", "a", "b", "c"],
    "remove": ["b", "c"],
    "reorder": ["b", "a", "c"],
}


@pytest.mark.parametrize("swallow", [None, Exception, BaseException], ids=["plain", "Exception", "BaseException"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_that_is_not_the_recorded_one_makes_the_run_dead_at_once(monkeypatch, change, swallow):
    deploy(monkeypatch, body_of(["a", "b", "c"]))
    run = deployed.start()
    with crash_after("b"):
        run_until_idle()
    deploy(monkeypatch, body_of(CHANGES[change], swallow))
    assert run_until_idle() == 1
    stored = run.model
    assert stored.status == "DEAD"
    assert "NonDeterminism" in stored.error
    recorded, called = next(pair for pair in zip(["a", "b"], CHANGES[change], strict=False) if pair[0] != pair[1])
    assert f"recorded {recorded!r}, the code now calls {called!r}" in stored.error
    assert stored.finished_at is not None
    # No step of the wrong course was executed.
    assert [times(name) for name in ("a", "b", "c", "B", "new")] == [1, 1, 0, 0, 0]
    assert run_until_idle() == 0
    with pytest.raises(durable.RunDead, match=f"{run.id}.*NonDeterminism") as caught:
        run.result(timeout=0)
    assert isinstance(caught.value.__cause__, durable.NonDeterminism)
    # The old code again, and it goes on where it was.
    deploy(monkeypatch, body_of(["a", "b", "c"]))
    assert run.resume() is True
    run_until_idle()
    assert run.result(timeout=0) == ["a", "b", "c"]
    assert [times(name) for name in ("a", "b", "c")] == [1, 1, 1]


def test_a_course_that_ends_before_a_recorded_step_is_not_the_recorded_one(monkeypatch):
    """The money was taken in step 2; a result that knows nothing of it may not be the run's."""
    deploy(monkeypatch, body_of(["a", "b", "c"]))
    run = deployed.start()
    with crash_after("b"):
        run_until_idle()
    deploy(monkeypatch, body_of(["a"]))
    run_until_idle()
    assert run.status == "DEAD"
    assert "'b'" in run.model.error


def test_steps_may_be_added_behind_the_recorded_ones(monkeypatch):
    deploy(monkeypatch, body_of(["a", "b"]))
    run = deployed.start()
    with crash_after("b"):
        run_until_idle()
    deploy(monkeypatch, body_of(["a", "b", "c"]))
    run_until_idle()
    assert run.result(timeout=0) == ["a", "b", "c"]


def test_a_run_that_does_not_fit_is_not_tried_again_whatever_its_attempts(monkeypatch):
    @durable.workflow(name="tests.replay.attempts", max_attempts=5, retry_delay=0)
    def workflow(): ...

    monkeypatch.setattr(workflow, "func", body_of(["a", "b"]))
    run = workflow.start()
    with crash_after("a"):
        run_until_idle()
    monkeypatch.setattr(workflow, "func", body_of(["x", "b"]))
    assert run_until_idle() == 1
    assert (run.status, run.model.failures) == ("DEAD", 0)


def test_a_direct_call_of_a_run_that_does_not_fit_raises_run_dead(monkeypatch):
    deploy(monkeypatch, body_of(["a", "b"]))
    with crash_after("a"):
        deployed.using(run_id="1")()
    deploy(monkeypatch, body_of(["x", "b"]))
    with pytest.raises(durable.RunDead, match=r"'a'.*'x'"):
        deployed.using(run_id="1")()


@durable.step(name="fails", atomic=False)
def fails():
    raise ValueError("recorded")


def test_a_recorded_failure_at_another_step_is_noticed_too(monkeypatch):
    def old():
        with suppress(ValueError):
            fails()
        nothing_more()

    deploy(monkeypatch, old)
    run = deployed.start()
    with crash_before("nothing_more"):
        run_until_idle()
    deploy(monkeypatch, body_of(["a", "b"]))
    run_until_idle()
    assert run.status == "DEAD"


def test_a_step_to_be_retried_under_another_name_is_noticed_too(monkeypatch):
    @durable.step(name="slow", atomic=False, max_attempts=2, retry_delay=3600)
    def slow():
        raise ConnectionError

    deploy(monkeypatch, lambda: slow())
    run = deployed.start()
    run_until_idle()
    assert run.status == "WAITING"
    deploy(monkeypatch, body_of(["a"]))
    WorkflowRun.objects.update(wake_at=datetime(2001, 1, 1, tzinfo=UTC))
    run_until_idle()
    assert run.status == "DEAD"
    assert times("a") == 0


# -- History that cannot be read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[1", '{"$": "of tomorrow"}', "null null"], ids=repr)
@pytest.mark.parametrize("swallow", [None, BaseException], ids=["plain", "swallowed"])
def test_a_recorded_value_that_cannot_be_read_fails_the_run_and_names_the_step(monkeypatch, text, swallow):
    deploy(monkeypatch, body_of(["a", "b"], swallow))
    run = deployed.start()
    with crash_after("a"):
        run_until_idle()
    StepCheckpoint.objects.update(output=text)
    run_until_idle()
    assert (run.status, times("b")) == ("FAILED", 0)
    with pytest.raises(durable.SerializationError, match=r"step 1 \(a\)"):
        run.result(timeout=0)


def test_arguments_that_cannot_be_read_fail_the_run():
    run = checkout.start("A")
    WorkflowRun.objects.update(input="{")
    run_until_idle()
    assert run.status == "FAILED"
    with pytest.raises(durable.SerializationError, match=f"arguments of run {run.id}"):
        run.result(timeout=0)


@pytest.mark.parametrize("text", ["[]", "{}", '{"args": 5, "kwargs": {}}', "null"])
def test_arguments_that_are_none_fail_the_run_and_harm_no_other(text):
    run = checkout.start("A")
    WorkflowRun.objects.update(input=text)
    other = checkout.start("B")
    run_until_idle()
    assert (run.status, other.status) == ("FAILED", "SUCCEEDED")


def test_a_recorded_error_that_cannot_be_read_harms_no_other_run(monkeypatch):
    deploy(monkeypatch, lambda: fails())
    run = deployed.start()
    with crash_after("fails"):
        run_until_idle()
    StepCheckpoint.objects.update(exception="not json")
    other = checkout.start("A")
    run_until_idle()
    assert (run.status, other.status) == ("FAILED", "SUCCEEDED")


def test_arguments_that_the_new_code_does_not_take_fail_the_run(monkeypatch):
    run = checkout.start("A")
    monkeypatch.setattr(checkout, "func", lambda order, email: None)
    run_until_idle()
    assert run.status == "FAILED"
    with pytest.raises(TypeError, match="email"):
        run.result(timeout=0)


# -- A serializer of one's own --------------------------------------------------------------------------------------


class Reversed:
    """Stores everything back to front."""

    def dumps(self, value):
        return serialization.dumps(value)[::-1]

    def loads(self, text):
        return serialization.loads(text[::-1])


def test_a_serializer_of_the_settings_stores_arguments_values_and_results(settings):
    settings.DURABLE = {"SERIALIZER": "tests.test_replay.Reversed"}
    run = checkout.start("A")
    with crash_after("charge"):
        run_until_idle()
    run_until_idle()
    assert run.result(timeout=0) == {"seat": "seat 1", "paid": 4900}
    assert StepCheckpoint.objects.get(name="charge").output == "0094"
