"""What a workflow is: its arguments, `validate=`, and the decorator."""

import pytest
from django import forms
from django.core.exceptions import ValidationError
from pydantic import BaseModel

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import echo

pytestmark = pytest.mark.django_db


# -- Arguments ------------------------------------------------------------------------------------------------------


@durable.workflow(name="tests.workflows.shapes")
def shapes(a, /, b, *rest, c=3, **others):
    return [a, b, rest, c, others]


@pytest.mark.parametrize("how", ["start", "__call__"])
@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1,), {}), ((1, 2), {"b": 3}), ((1,), {"a": 1})])
def test_arguments_that_do_not_fit_are_refused_at_the_start(how, args, kwargs):
    with pytest.raises(TypeError, match=r"tests\.workflows\.shapes.*it takes"):
        getattr(shapes, how)(*args, **kwargs)
    assert not WorkflowRun.objects.exists()


def test_arguments_of_every_shape_arrive():
    assert shapes(1, 2) == [1, 2, (), 3, {}]
    assert shapes(1, 2, 3, 4, c=5, d=6) == [1, 2, (3, 4), 5, {"d": 6}]
    run = shapes.start(1, b=2, a=7)
    run_until_idle()
    assert run.result(timeout=0) == [1, 2, (), 3, {"a": 7}]


@pytest.mark.parametrize("how", ["start", "__call__"])
def test_an_argument_that_cannot_be_stored_names_the_workflow_and_the_place(how):
    with pytest.raises(durable.SerializationError, match=r"tests\.echo.*callback.*function"):
        getattr(echo, how)({"callback": lambda: None})
    assert not WorkflowRun.objects.exists()


def test_an_argument_that_is_too_large_is_refused_with_both_sizes(settings):
    settings.DURABLE = {"MAX_PAYLOAD_BYTES": 1000}
    with pytest.raises(durable.PayloadTooLarge, match=r"tests\.echo.*1,000.*MAX_PAYLOAD_BYTES"):
        echo.start("x" * 1000)
    with pytest.raises(durable.SerializationError):
        echo("x" * 1000)
    assert not WorkflowRun.objects.exists()
    assert echo("x" * 900) == "x" * 900


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "\ud83d\ude00", "\udc80\0"], ids=ascii)
def test_any_text_is_an_argument_and_a_result(text):
    assert echo(text) == text
    run = echo.start(text)
    run_until_idle()
    assert run.result(timeout=0) == text


@durable.workflow(name="tests.workflows.result")
def unstorable_result():
    checkout_steps = Ledger.objects.create(key="body")
    return lambda: checkout_steps


def test_a_result_that_cannot_be_stored_is_the_runs_failure():
    for _ in range(2):
        with pytest.raises(durable.SerializationError, match="The result of run one"):
            unstorable_result.using(run_id="one")()
    assert durable.get_run("one").status == "FAILED"


# -- validate= ------------------------------------------------------------------------------------------------------


class OrderForm(forms.Form):
    order = forms.CharField(max_length=5)
    quantity = forms.IntegerField(min_value=1)


class Order(BaseModel):
    order: str
    quantity: int = 1


def positive(data):
    if data["quantity"] < 1:
        raise ValidationError("A quantity is 1 or more.", code="min")
    return {**data, "quantity": data["quantity"] * 10}


def named(validate):
    name = f"tests.workflows.valid.{validate.__name__}"

    @durable.workflow(name=name, validate=validate)
    def ordered(order, quantity=1):
        return [order, quantity]

    return ordered


by_form, by_model, by_callable = named(OrderForm), named(Order), named(positive)


@pytest.mark.parametrize(
    ("workflow", "given", "seen"),
    [
        (by_form, {"order": "  A ", "quantity": "3"}, ["A", 3]),
        (by_model, {"order": "A", "quantity": "3"}, ["A", 3]),
        (by_callable, {"order": "A", "quantity": 3}, ["A", 30]),
        (by_callable, {"order": "A"}, ["A", 10]),
    ],
    ids=["form", "pydantic", "callable", "default"],
)
def test_the_cleaned_data_are_the_arguments_and_are_cleaned_once(workflow, given, seen):
    run = workflow.start(**given)
    run_until_idle()
    assert run.result(timeout=0) == seen
    assert workflow(*given.values()) == seen
    # A replay takes what was stored: quantity * 10 is not done again.
    WorkflowRun.objects.filter(pk=run.id).update(status="PENDING")
    run_until_idle()
    assert run.result(timeout=0) == seen


@pytest.mark.parametrize("how", ["start", "__call__"])
@pytest.mark.parametrize(
    ("workflow", "given", "words"),
    [
        (by_form, {"order": "A", "quantity": 0}, "quantity"),
        (by_model, {"order": "A", "quantity": "many"}, "quantity"),
        (by_callable, {"order": "A", "quantity": 0}, "A quantity is 1 or more"),
    ],
    ids=["form", "pydantic", "callable"],
)
def test_refused_input_is_a_validation_error_and_stores_nothing(workflow, given, words, how):
    with pytest.raises(durable.InvalidInput, match=words) as caught:
        getattr(workflow, how)(**given)
    assert isinstance(caught.value, ValidationError)
    assert isinstance(caught.value, durable.DurableError)
    assert any(words in message for message in [*caught.value.messages, str(caught.value)])
    assert not WorkflowRun.objects.exists()


def test_a_forms_errors_keep_their_fields():
    with pytest.raises(durable.InvalidInput) as caught:
        by_form.start(order="too long", quantity=0)
    assert sorted(caught.value.message_dict) == ["order", "quantity"]


def test_what_validate_must_not_return():
    @durable.workflow(name="tests.workflows.valid.none", validate=lambda data: None)
    def nothing(order): ...

    @durable.workflow(name="tests.workflows.valid.other", validate=lambda data: {"another": 1})
    def other(order): ...

    with pytest.raises(TypeError, match="must return a dict"):
        nothing.start("A")
    with pytest.raises(TypeError, match=r"tests\.workflows\.valid\.other.*validate="):
        other.start("A")


# -- Decorating -----------------------------------------------------------------------------------------------------


def test_the_default_name_is_the_functions_place():
    @durable.workflow
    def local(): ...

    assert local.name.endswith("test_workflows.test_the_default_name_is_the_functions_place.<locals>.local")
    assert repr(local) == f"<Workflow {local.name}>"
    assert local.__wrapped__.__name__ == local.__name__ == "local"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": 5}, ValueError),
        ({"name": "x" * 256}, ValueError),
        ({"name": "a\0b"}, ValueError),
        ({"queue": ""}, ValueError),
        ({"queue": 5}, TypeError),
        ({"queue": None}, (TypeError, ValueError)),
        ({"max_attempts": 0}, ValueError),
        ({"max_attempts": 1.5}, ValueError),
        ({"max_attempts": True}, ValueError),
        ({"retry_delay": -1}, ValueError),
        ({"retry_delay": "1"}, TypeError),
        ({"retry_backoff": -1}, ValueError),
        ({"retry_backoff": "2"}, ValueError),
        ({"retry_backoff": float("nan")}, ValueError),
        ({"retry_max_delay": float("nan")}, ValueError),
        ({"retry_on": ["ValueError"]}, TypeError),
        ({"retry_on": 5}, TypeError),
        ({"retry_on": (int,)}, TypeError),
        ({"timeout": "1 day"}, TypeError),
        ({"timeout": -1}, ValueError),
        ({"max_recoveries": -1}, ValueError),
        ({"max_recoveries": None}, ValueError),
        ({"validate": "a form"}, TypeError),
        ({"aliases": "old.name"}, (TypeError, ValueError)),
        ({"aliases": [""]}, ValueError),
        ({"aliases": 5}, TypeError),
    ],
    ids=repr,
)
def test_an_argument_of_the_decorator_that_makes_no_sense_is_refused_by_its_name(options, error):
    with pytest.raises(error, match="name" if "aliases" in options else next(iter(options))):
        durable.workflow(**{"name": "tests.workflows.never", **options})(lambda: None)


async def an_async_generator():
    yield 1


def a_generator():
    yield 1


@pytest.mark.parametrize("decorate", [durable.workflow, durable.step], ids=["workflow", "step"])
@pytest.mark.parametrize("func", [an_async_generator, a_generator, 5, "name"], ids=str)
def test_what_cannot_be_durable_is_refused_at_its_definition(decorate, func):
    with pytest.raises(TypeError, match=r"takes a (plain )?function"):
        decorate(func)
