"""A step: what is recorded of it, what its errors become, and what it is outside a workflow."""

from contextlib import suppress

import pytest
from django.db import connection, transaction

import django_durable as durable
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import crash_after, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import charge, reserve, times

pytestmark = pytest.mark.django_db


@durable.workflow(name="tests.steps.apply")
def apply(name, *args):
    """Run one of the steps below, and what is made of its error."""
    return STEPS[name](*args)


# -- What is recorded -----------------------------------------------------------------------------------------------


@durable.step
def plain(value):
    return value


@durable.step(name="a name of its own", atomic=False)
def named(value):
    return value


@durable.workflow(name="tests.steps.both")
def both():
    return [plain(1), named(2), durable.run_step("any callable", max, 3, 4), durable.run_step("at", int, atomic=True)]


def test_a_step_is_recorded_with_its_name_kind_value_and_times():
    assert both.using(run_id="1")() == [1, 2, 4, 0]
    run = WorkflowRun.objects.get()
    steps = list(run.steps.all())
    assert [(step.position, step.name, step.kind, step.status, step.output, step.attempts) for step in steps] == [
        (1, "plain", "atomic", "SUCCEEDED", "1", 1),
        (2, "a name of its own", "step", "SUCCEEDED", "2", 1),
        (3, "any callable", "step", "SUCCEEDED", "4", 1),
        (4, "at", "atomic", "SUCCEEDED", "0", 1),
    ]
    for step in steps:
        assert run.started_at <= step.started_at <= step.finished_at <= run.finished_at
        assert (step.error, step.exception, step.database, step.attempt) == ("", "", "", 1)


def test_the_default_name_is_the_qualname():
    class Shop:
        @durable.step
        def sell(self): ...

    assert Shop.sell.name.endswith("<locals>.Shop.sell")
    assert repr(plain) == "<Step plain>"


@durable.workflow(name="tests.steps.bad_name")
def bad_name(name):
    return durable.run_step(name, int)


@pytest.mark.parametrize("name", ["", "x" * 256, "a\0b", 5], ids=["empty", "long", "NUL", "number"])
def test_a_name_that_cannot_be_recorded_is_refused_before_the_effect(name):
    with pytest.raises(ValueError, match="step's name"):
        bad_name(name)
    assert not StepCheckpoint.objects.exists()


@durable.workflow(name="tests.steps.loop")
def loop(count):
    return [durable.run_step(f"number {n}", plain.func, n) for n in range(count)]


def test_a_loop_of_steps_has_a_position_for_each():
    assert loop(5) == [0, 1, 2, 3, 4]
    assert list(StepCheckpoint.objects.values_list("position", "name")) == [(n + 1, f"number {n}") for n in range(5)]


# -- Errors ---------------------------------------------------------------------------------------------------------


class Declined(Exception):
    def __init__(self, message, *, code):
        super().__init__(message)
        self.code = code


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Hostile(Exception):
    """Neither its text nor its attributes can be stored."""

    def __init__(self):
        super().__init__(lambda: None)


def raising(error):
    Ledger.objects.create(key="the effect")
    raise error


@durable.step(name="declining")
def declining():
    raising(Declined("no funds", code=51))


@durable.step(name="declining_outside", atomic=False)
def declining_outside():
    raising(Declined("no funds", code=51))


@durable.step(name="unknown_class")
def unknown_class():
    class Local(Exception):
        pass

    raising(Local("nobody finds my class"))


@durable.step(name="hostile")
def hostile():
    raising(Hostile())


@durable.step(name="silent")
def silent():
    raising(Silent("x"))


@durable.step(name="with_nul")
def with_nul():
    raising(ValueError("a\0b \ud800"))


STEPS = {step.name: step for step in [declining, declining_outside, unknown_class, hostile, silent, with_nul]}


@pytest.mark.parametrize(("name", "effects"), [("declining", 0), ("declining_outside", 1)])
def test_a_steps_error_reaches_the_workflow_as_it_was_now_and_on_replay(name, effects):
    for _ in range(2):
        with pytest.raises(Declined) as caught:
            apply.using(run_id="1")(name)
        assert type(caught.value) is Declined
        assert caught.value.args == ("no funds",)
        assert caught.value.code == 51
    step = StepCheckpoint.objects.get()
    assert (step.status, step.attempts, step.output) == ("FAILED", 1, "")
    assert step.error.startswith("tests.test_steps.Declined: no funds\n")
    assert "in raising" in step.error
    assert times("the effect") == effects


@durable.workflow(name="tests.steps.compensate")
def compensate():
    try:
        declining_outside()
    except Declined as error:
        seen = [type(error).__name__, error.args, error.code]
    plain("compensated")
    return seen


def test_a_caught_error_is_the_same_one_on_replay_and_its_step_is_not_repeated():
    with crash_after("plain"):
        compensate.using(run_id="1").start()
        run_until_idle()
    assert run_until_idle() == 1
    assert durable.get_run("1").result(timeout=0) == ["Declined", ("no funds",), 51]
    assert times("the effect") == 1


@pytest.mark.parametrize(
    ("name", "type_name", "text"),
    [
        ("unknown_class", "tests.test_steps.unknown_class.<locals>.Local", "nobody finds my class"),
        ("hostile", "tests.test_steps.Hostile", "function"),
    ],
)
def test_an_error_that_cannot_be_rebuilt_is_a_step_failed_with_its_type_and_text(name, type_name, text):
    for _ in range(2):
        with pytest.raises(durable.StepFailed) as caught:
            apply.using(run_id="1")(name)
        assert type(caught.value) is durable.StepFailed
        assert caught.value.type_name == type_name
        assert text in caught.value.text
        assert name in str(caught.value)
        assert type_name in str(caught.value)
    with pytest.raises(durable.StepFailed):
        durable.get_run("1").result(timeout=0)


@durable.workflow(name="tests.steps.body")
def raises_in_body(name):
    {"unknown": unknown_class, "hostile": hostile, "silent": silent, "nul": with_nul}[name].func()


@pytest.mark.parametrize("name", ["unknown", "hostile"])
def test_a_runs_error_that_cannot_be_rebuilt_is_a_run_failed(name):
    for _ in range(2):
        with pytest.raises(durable.RunFailed, match="Run 1 failed with tests"):
            raises_in_body.using(run_id="1")(name)
    with pytest.raises(durable.RunFailed):
        durable.get_run("1").result(timeout=0)


@pytest.mark.parametrize("workflow", [apply, raises_in_body], ids=["step", "body"])
def test_an_error_without_a_readable_text_is_recorded_all_the_same(workflow):
    for _ in range(2):
        with pytest.raises(Silent):
            workflow.using(run_id="1")("silent")
    run = WorkflowRun.objects.get()
    assert run.status == "FAILED"
    assert "Silent" in run.error


@pytest.mark.parametrize(("workflow", "name"), [(apply, "with_nul"), (raises_in_body, "nul")], ids=["step", "body"])
def test_no_text_of_an_error_can_prevent_its_recording(workflow, name):
    for _ in range(2):
        with pytest.raises(ValueError, match="a\0b"):
            workflow.using(run_id="1")(name)
    run = WorkflowRun.objects.get()
    assert run.status == "FAILED"
    assert r"a\x00b \ud800" in run.error


@durable.step(name="huge", atomic=False)
def huge():
    raise ValueError("x" * 5_000_000)


@durable.workflow(name="tests.steps.huge")
def huge_error():
    huge()


def test_an_error_of_five_megabytes_is_recorded_shortened():
    with pytest.raises((ValueError, durable.StepFailed)):
        huge_error.using(run_id="1")()
    run = WorkflowRun.objects.get()
    assert run.status == "FAILED"
    assert len(run.error) < 100_000
    assert len(StepCheckpoint.objects.get().exception) < 1_000_000


@durable.step(name="unstorable", atomic=False)
def unstorable():
    Ledger.objects.create(key="the effect")
    return open  # a builtin function


@durable.workflow(name="tests.steps.unstorable")
def unstorable_value():
    return unstorable()


def test_a_value_that_cannot_be_stored_names_run_and_step_and_is_not_tried_again():
    for _ in range(2):
        with pytest.raises(durable.SerializationError, match=r"Run one, step 1 \(unstorable\).*function"):
            unstorable_value.using(run_id="one")()
    assert times("the effect") == 1
    assert StepCheckpoint.objects.get().status == "FAILED"


# -- Steps beside workflows -----------------------------------------------------------------------------------------


def test_outside_a_workflow_a_step_is_the_plain_function():
    assert charge("A") == 4900
    assert reserve("A") == "seat 1"
    assert durable.run_step("any name", max, 3, 4) == 4
    assert not StepCheckpoint.objects.exists()
    with pytest.raises(Declined):
        declining_outside()


def test_outside_a_workflow_an_atomic_step_is_one_transaction():
    with pytest.raises(Declined):
        declining()
    assert times("the effect") == 0

    @durable.step
    def in_a_block():
        return connection.in_atomic_block

    assert in_a_block() is True


@durable.step(name="outer")
def outer():
    Ledger.objects.create(key="outer")
    with suppress(Declined):
        declining()
    return [reserve("A"), charge("A")]


@durable.workflow(name="tests.steps.nested")
def nested():
    return outer()


def test_a_step_within_a_step_is_part_of_it():
    assert nested() == ["seat 1", 4900]
    step = StepCheckpoint.objects.get()
    assert (step.name, step.position) == ("outer", 1)
    # An atomic one is a savepoint there: what it wrote before it failed is undone, the rest stays.
    assert [times(key) for key in ("outer", "the effect", "A: reserved", "A: charged")] == [1, 0, 1, 1]


@durable.workflow(name="tests.steps.own_block")
def own_block():
    with transaction.atomic():
        reserve("A")


def test_a_step_in_a_transaction_of_the_body_is_refused_before_its_effect():
    with pytest.raises(durable.InsideTransaction, match=r"reserve.*Move the atomic\(\) block into an atomic step"):
        own_block()
    assert times("A: reserved") == 0
    assert WorkflowRun.objects.get().status == "FAILED"


# -- current() ------------------------------------------------------------------------------------------------------


@durable.step(name="who", atomic=False, max_attempts=3, retry_delay=0)
def who():
    current = durable.current()
    Ledger.objects.create(key=current.idempotency_key, note=str(current.attempt))
    if current.attempt < 3:
        raise ConnectionError
    return [current.run_id, current.workflow, current.step, current.attempt, current.idempotency_key]


@durable.workflow(name="tests.steps.who")
def who_am_i():
    body = durable.current()
    return [[body.run_id, body.workflow, body.step, body.attempt], who(), who()]


def test_current_says_which_run_and_step_this_is():
    body, first, second = who_am_i.using(run_id="one")()
    assert body == ["one", "tests.steps.who", None, 1]
    assert first[:4] == ["one", "tests.steps.who", "who", 3]
    assert first[4] != second[4]
    # One key for all tries of a step, so that a payment service sees that they are one.
    assert times(first[4]) == 3
    assert list(Ledger.objects.filter(key=first[4]).values_list("note", flat=True).order_by("pk")) == ["1", "2", "3"]


def test_current_is_for_workflows_only():
    for outside in (durable.current, lambda: named.func(durable.current())):
        with pytest.raises(durable.NotInWorkflow, match=r"current\(\) was called outside a workflow"):
            outside()
    who_am_i()
    with pytest.raises(durable.NotInWorkflow):
        durable.current()


# -- Decorating -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": 5}, ValueError),
        ({"name": "x" * 256}, ValueError),
        ({"max_attempts": 0}, ValueError),
        ({"max_attempts": "3"}, ValueError),
        ({"retry_delay": -1}, ValueError),
        ({"retry_delay": None}, TypeError),
        ({"retry_backoff": "2"}, ValueError),
        ({"retry_max_delay": -1}, ValueError),
        ({"retry_on": "ValueError"}, TypeError),
        ({"retry_on": 5}, TypeError),
        ({"give_up_on": [ValueError()]}, TypeError),
        ({"give_up_on": None}, TypeError),
        ({"timeout": "5"}, TypeError),
        ({"timeout": float("nan")}, ValueError),
        ({"isolation": "snapshot"}, ValueError),
        ({"isolation": 5}, (TypeError, ValueError)),
        ({"using": "other", "atomic": False}, ValueError),
        ({"isolation": "serializable", "atomic": False}, ValueError),
    ],
    ids=repr,
)
def test_an_argument_of_the_decorator_that_makes_no_sense_is_refused_by_its_name(options, error):
    with pytest.raises(error, match=next(iter(options))):
        durable.step(**options)(lambda: None)


def test_a_misspelt_argument_of_the_decorator_is_refused():
    with pytest.raises(TypeError, match="retries"):
        durable.step(retries=5)
