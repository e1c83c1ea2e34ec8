"""Calling a workflow: here and now, durably, and where that is refused."""

import pytest
from asgiref.sync import async_to_sync
from django.db import connection, transaction
from django.http import HttpResponse
from django.urls import path

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import run_until_idle
from tests.app.workflows import checkout, echo, fail, ledger_of

pytestmark = pytest.mark.django_db


# -- The direct call ------------------------------------------------------------------------------------------------


def test_a_direct_call_returns_the_result_and_leaves_a_run():
    assert checkout.using(run_id="order-1")("A") == {"seat": "seat 1", "paid": 4900}
    run = WorkflowRun.objects.get()
    assert (run.pk, run.status, run.attempt) == ("order-1", "SUCCEEDED", 1)
    assert run.created_at <= run.started_at <= run.finished_at
    assert [(step.position, step.name, step.kind) for step in run.steps.all()] == [
        (1, "reserve", "atomic"),
        (2, "charge", "step"),
        (3, "fulfil", "atomic"),
    ]
    assert run_until_idle() == 0


def test_a_direct_call_from_async_code():
    assert async_to_sync(checkout.acall)("A") == {"seat": "seat 1", "paid": 4900}


class CardDeclined(Exception):
    def __init__(self, message, code):
        super().__init__(message)
        self.code = code
        self.seen_by = ["shop"]


@durable.workflow(name="tests.workflows.declined")
def declined():
    raise CardDeclined("no funds", 51)


def test_a_direct_call_raises_the_workflows_own_error_now_and_later():
    for _ in range(2):
        with pytest.raises(CardDeclined) as caught:
            declined.using(run_id="1")()
        assert type(caught.value) is CardDeclined
        assert caught.value.args == ("no funds",)
        assert (caught.value.code, caught.value.seen_by) == (51, ["shop"])
    run = WorkflowRun.objects.get()
    assert (run.status, run.failures) == ("FAILED", 1)
    assert "CardDeclined: no funds" in run.error.splitlines()[0]
    assert "in declined" in run.error
    with pytest.raises(CardDeclined):
        durable.get_run("1").result()


def test_the_traceback_of_a_direct_call_leads_to_the_users_code():
    with pytest.raises(ValueError, match="as asked") as caught:
        fail()
    assert caught.traceback[-1].name == "fail"


@pytest.mark.django_db(transaction=True)
def test_a_direct_call_in_a_transaction_is_refused_before_anything_is_stored():
    words = r"tests\.checkout.*\.start\(\)"
    with transaction.atomic(), pytest.raises(durable.InsideTransaction, match=words) as caught:
        checkout("A")
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, durable.DurableError)
    connection.set_autocommit(False)
    try:
        with pytest.raises(durable.InsideTransaction):
            checkout("A")
    finally:
        connection.rollback()
        connection.set_autocommit(True)
    assert not WorkflowRun.objects.exists()
    assert ledger_of("A") == [0, 0, 0]


def test_a_test_cases_own_transaction_is_exempt_but_not_a_block_within_it():
    assert checkout("A")["paid"] == 4900
    with transaction.atomic(), pytest.raises(durable.InsideTransaction):
        checkout("B")
    assert WorkflowRun.objects.count() == 1


def buy(request):
    try:
        return HttpResponse(str(checkout(request.GET["order"])["paid"]))
    except durable.InsideTransaction:
        return HttpResponse(checkout.start(request.GET["order"]).status, status=202)


urlpatterns = [path("buy/", buy)]


@pytest.mark.django_db(transaction=True)
@pytest.mark.urls("tests.test_direct_calls")
def test_a_view_under_atomic_requests_may_start_but_not_call(client, monkeypatch):
    assert client.get("/buy/?order=A").content == b"4900"
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)
    response = client.get("/buy/?order=B")
    assert (response.status_code, response.content) == (202, b"PENDING")
    assert WorkflowRun.objects.count() == 2
    assert ledger_of("B") == [0, 0, 0]


@durable.step(name="start_inner")
def start_inner(message):
    run = echo.using(run_id="inner").start(message)
    if message == "fail":
        raise ValueError("after the start")
    return run


@durable.workflow(name="tests.workflows.starter")
def starter(message):
    return start_inner(message)


def test_a_workflow_started_in_an_atomic_step_starts_with_its_commit():
    handle = starter("hello")
    assert handle == durable.get_run("inner")
    assert run_until_idle() == 1
    assert handle.result() == "hello"


def test_a_workflow_started_in_an_atomic_step_that_fails_does_not_start():
    with pytest.raises(ValueError, match="after the start"):
        starter("fail")
    with pytest.raises(durable.RunNotFound):
        durable.get_run("inner")


@durable.step(name="call_inner", atomic=False)
def call_inner():
    return checkout.using(run_id="inner")("A")


@durable.workflow(name="tests.workflows.caller")
def caller():
    return call_inner()


@pytest.mark.django_db(transaction=True)
def test_a_workflow_called_in_a_step_outside_is_a_run_of_its_own():
    assert caller() == {"seat": "seat 1", "paid": 4900}
    assert [step.name for step in durable.get_run("inner").model.steps.all()] == ["reserve", "charge", "fulfil"]
