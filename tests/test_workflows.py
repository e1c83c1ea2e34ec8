"""Starting and calling workflows: `start`, `using`, the direct call, and what they refuse."""

import threading
from datetime import UTC, datetime, timedelta

import pytest
from asgiref.sync import async_to_sync
from django import forms
from django.core.exceptions import ValidationError
from django.db import connection, transaction
from django.http import HttpResponse
from django.urls import path
from pydantic import BaseModel

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import advance, run_until_idle
from tests.app.models import Account, Ledger
from tests.app.workflows import checkout, echo, fail, ledger_of, times
from tests.threads import together

pytestmark = pytest.mark.django_db


# -- A start is an ordinary write of the caller ---------------------------------------------------------------------


def test_a_start_that_is_rolled_back_leaves_no_run():
    with transaction.atomic():
        Ledger.objects.create(key="an order")
        run = checkout.start("A")
        assert run.status == "PENDING"
        transaction.set_rollback(True)
    assert not WorkflowRun.objects.exists()
    with pytest.raises(durable.RunNotFound):
        durable.get_run(run.id)
    assert run_until_idle() == 0


@pytest.mark.django_db(transaction=True)
def test_a_started_run_is_seen_by_others_when_the_transaction_commits():
    def seen():
        return together(WorkflowRun.objects.count)[0]

    with transaction.atomic():
        run = checkout.start("A")
        assert seen() == 0
    assert seen() == 1
    assert run_until_idle() == 1
    assert run.result(timeout=0) == {"seat": "seat 1", "paid": 4900}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"run_id": "order-1"},
        {"run_after": timedelta(hours=1)},
        {"run_after": datetime(2001, 1, 1, tzinfo=UTC)},
        {"run_id": "order-1", "run_after": datetime(2101, 1, 1, tzinfo=UTC)},
        {"attributes": {"city": "Berlin"}, "priority": 3, "queue": "mail", "timeout": 60},
    ],
    ids=["plain", "id", "later", "at a past time", "id and time", "all sorts"],
)
def test_a_start_costs_one_insert(django_assert_num_queries, options):
    with django_assert_num_queries(1) as queries:
        checkout.using(**options).start("A")
    assert queries.captured_queries[0]["sql"].startswith("INSERT")


def test_a_start_with_a_related_object_costs_one_insert(django_assert_num_queries):
    account = Account.objects.create(name="Ada")
    with django_assert_num_queries(1):
        checkout.using(related=account).start("A")


def test_a_new_run_says_what_it_is():
    run = echo.start(1).model
    assert (run.workflow, run.status, run.queue, run.priority) == ("tests.echo", "PENDING", "default", 0)
    assert run.attempt == run.failures == run.recoveries == 0
    assert run.started_at is run.finished_at is run.deadline is run.wake_at is None
    for moment in (run.created_at, run.run_after):
        assert abs(datetime.now(UTC) - moment) < timedelta(minutes=5)


def test_ids_are_in_the_order_of_the_starts():
    ids = [echo.start().id for _ in range(20)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 20
    assert {run_id[14] for run_id in ids} == {"7"}  # UUID version 7


def test_start_from_async_code():
    run = async_to_sync(echo.using(run_id="async").astart)(5)
    assert run == durable.get_run("async")
    run_until_idle()
    assert async_to_sync(run.aresult)() == 5


# -- The same id is one run ----------------------------------------------------------------------------------------


def test_the_same_id_starts_one_run_and_the_first_arguments_stand():
    first = checkout.using(run_id="order-1").start("A")
    second = checkout.using(run_id="order-1", priority=9, queue="other").start("B")
    assert first == second
    assert run_until_idle() == 1
    assert ledger_of("A") == [1, 1, 1]
    assert ledger_of("B") == [0, 0, 0]
    assert (second.model.priority, second.model.queue) == (0, "default")
    # Also after its end, and by a direct call.
    assert checkout.using(run_id="order-1").start("C").status == "SUCCEEDED"
    assert checkout.using(run_id="order-1")("D") == {"seat": "seat 1", "paid": 4900}
    assert WorkflowRun.objects.count() == 1


def test_a_run_id_taken_in_a_transaction_does_not_break_it():
    with transaction.atomic():
        echo.using(run_id="1").start("first")
        echo.using(run_id="1").start("second")
        Ledger.objects.create(key="the view goes on")
    assert times("the view goes on") == 1


@pytest.mark.django_db(transaction=True)
def test_two_threads_that_start_the_same_id_start_one_run():
    handles = together(*(lambda n=n: checkout.using(run_id="order-1").start(f"order {n}") for n in range(4)))
    assert handles == [durable.get_run("order-1")] * 4
    assert run_until_idle() == 1
    assert Ledger.objects.count() == 3


meeting: dict[str, threading.Barrier] = {}


@durable.step(name="met", atomic=False)
def met():
    """Goes on when the other call is about to be made."""
    meeting["met"].wait(timeout=10)
    Ledger.objects.create(key="met")
    return "the one result"


@durable.workflow(name="tests.workflows.meet")
def meet():
    return met()


@pytest.mark.django_db(transaction=True)
def test_a_second_direct_call_waits_for_the_first_and_gets_its_result():
    meeting["met"] = threading.Barrier(2)

    def first():
        return meet.using(run_id="one")()

    def second():
        # The first is inside its step now, the run is RUNNING.
        meeting["met"].wait(timeout=10)
        return meet.using(run_id="one")()

    assert together(first, second) == ["the one result"] * 2
    assert times("met") == 1
    assert WorkflowRun.objects.get().attempt == 1


@pytest.mark.django_db(transaction=True)
def test_direct_calls_of_one_id_at_the_same_moment_run_the_body_once():
    results = together(*[lambda: checkout.using(run_id="order-1")("A")] * 4)
    assert results == [{"seat": "seat 1", "paid": 4900}] * 4
    assert ledger_of("A") == [1, 1, 1]


@pytest.mark.parametrize("how", ["start", "__call__"])
def test_an_id_of_another_workflow_is_refused(how):
    echo.using(run_id="order-1").start("mine")
    with pytest.raises(durable.RunIdInUse, match=r"order-1.*tests\.echo.*tests\.checkout"):
        getattr(checkout.using(run_id="order-1"), how)("A")
    assert WorkflowRun.objects.get().workflow == "tests.echo"


@durable.workflow(name="tests.workflows.renamed", aliases=["tests.workflows.old", "tests.workflows.older"])
def renamed(value):
    return value


def test_a_run_of_a_former_name_is_the_same_workflow_and_stays_runnable():
    renamed.using(run_id="1").start("value")
    WorkflowRun.objects.update(workflow="tests.workflows.older")
    assert renamed.using(run_id="1").start("another").model.workflow == "tests.workflows.older"
    assert run_until_idle() == 1
    assert durable.get_run("1").result(timeout=0) == "value"


@pytest.mark.parametrize(
    "run_id",
    ["", "x" * 201, "a\0b", "a\nb", "\ud800", "a\u200bb"],
    ids=["empty", "long", "NUL", "line", "half", "zero"],
)
def test_an_id_that_cannot_be_one_is_refused_at_once(run_id):
    with pytest.raises(ValueError, match="run_id"):
        echo.using(run_id=run_id)


def test_ids_of_200_characters_of_any_language_are_ids():
    for run_id in ("x" * 200, "Bestellung Nr. 5: größer", "注文" * 100, "a/b?c=d&e'f\"g%s"):
        assert durable.get_run(echo.using(run_id=run_id).start().id).id == run_id


@pytest.mark.parametrize("run_id", ["gone", "", "a\0b", "\ud800", "x" * 10_000])
def test_an_unknown_id_is_not_found(run_id):
    with pytest.raises(durable.RunNotFound, match="There is no run"):
        durable.get_run(run_id)


# -- Options --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_due_later_waits_for_its_time():
    run = echo.using(run_after=timedelta(hours=2)).start("later")
    assert (run.status, run.model.waiting_for) == ("WAITING", "start")
    assert run_until_idle() == 0
    advance("1 hour 59 minutes")
    assert run_until_idle() == 0
    advance("2 minutes")
    assert run_until_idle() == 1
    assert run.result(timeout=0) == "later"
    assert run.model.waiting_for == ""


def test_a_datetime_says_when_and_one_in_the_past_is_now():
    now = datetime.now(UTC)
    later = echo.using(run_after=now + timedelta(days=1)).start()
    past = echo.using(run_after=now - timedelta(days=1)).start()
    ago = echo.using(run_after=timedelta(days=-1)).start()
    assert [run.status for run in (later, past, ago)] == ["WAITING", "PENDING", "PENDING"]
    # It does not overtake what was due before it was started.
    assert past.model.run_after >= now - timedelta(minutes=5)
    assert run_until_idle() == 2
    advance(timedelta(days=1, minutes=1))
    assert run_until_idle() == 1
    assert later.status == "SUCCEEDED"


def test_a_direct_call_with_a_time_waits_for_it():
    assert echo.using(run_after=timedelta(minutes=1))("at last") == "at last"
    run = WorkflowRun.objects.get()
    assert run.started_at - run.created_at >= timedelta(minutes=1)


order_of_execution: list[str] = []


@durable.workflow(name="tests.workflows.noted")
def noted(name):
    order_of_execution.append(name)


def test_the_more_important_goes_first_then_the_older():
    order_of_execution.clear()
    for name, priority in [("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5)]:
        noted.using(priority=priority).start(name)
    run_until_idle()
    assert order_of_execution == ["b", "e", "a", "c", "d"]


def test_a_run_that_was_delayed_queues_up_by_the_time_it_was_due():
    order_of_execution.clear()
    noted.using(run_after=timedelta(minutes=1)).start("delayed")
    advance("2 minutes")
    noted.start("started later")
    run_until_idle()
    assert order_of_execution == ["delayed", "started later"]


@durable.workflow(name="tests.workflows.mailing", queue="mail", timeout=timedelta(minutes=10))
def mailing():
    return "sent"


def test_the_queue_is_the_workflows_unless_the_start_says_otherwise():
    assert mailing.start().model.queue == "mail"
    assert mailing.using(queue="slow").start().model.queue == "slow"
    assert mailing.using(priority=1).start().model.queue == "mail"


def test_the_time_limit_runs_from_the_first_execution():
    run = mailing.start()
    advance("1 hour")
    run_until_idle()
    stored = run.model
    assert run.status == "SUCCEEDED"
    assert stored.deadline - stored.started_at == timedelta(minutes=10)
    assert mailing.using(timeout=30).start().model.timeout == 30
    assert mailing.using(timeout=timedelta(days=1)).start().model.timeout == 86400


@durable.step(name="takes_an_hour", atomic=False)
def takes_an_hour():
    Ledger.objects.create(key="an hour of work")
    advance("1 hour")


@durable.workflow(name="tests.workflows.long", timeout=timedelta(minutes=90))
def long_work():
    for _ in range(5):
        takes_an_hour()


@pytest.mark.parametrize("call", [False, True], ids=["started", "called"])
def test_a_run_beyond_its_time_starts_no_further_step_and_is_cancelled(call):
    run = long_work.using(run_id="long")
    if call:
        with pytest.raises(durable.RunCancelled, match="timeout"):
            run()
    else:
        run.start()
        run_until_idle()
    stored = WorkflowRun.objects.get()
    assert (stored.status, stored.cancel_reason) == ("CANCELLED", "timeout")
    assert times("an hour of work") == 2
    assert stored.finished_at is not None


@durable.workflow(name="tests.workflows.retrying", max_attempts=100, retry_delay=600, retry_backoff=1, timeout=3600)
def retrying():
    raise ConnectionError("away")


def test_waiting_and_retries_count_towards_the_time_limit():
    run = retrying.start()
    for _ in range(10):
        run_until_idle()
        advance("11 minutes")
    run_until_idle()
    assert (run.status, run.model.cancel_reason) == ("CANCELLED", "timeout")
    assert 5 <= run.model.failures <= 7
    with pytest.raises(durable.RunCancelled):
        run.result(timeout=0)


@durable.workflow(name="tests.workflows.short", max_attempts=3, retry_delay=10, timeout=5)
def short_of_time():
    order_of_execution.append("attempt")
    raise ConnectionError("away")


@pytest.mark.parametrize("how", ["started", "called"])
def test_a_run_whose_next_attempt_lies_beyond_its_time_is_cancelled_without_it(how):
    order_of_execution.clear()
    if how == "called":
        with pytest.raises(durable.RunCancelled, match="timeout"):
            short_of_time()
    else:
        short_of_time.start()
        run_until_idle()
        advance("1 minute")
        run_until_idle()
    assert order_of_execution == ["attempt"]
    assert WorkflowRun.objects.get().cancel_reason == "timeout"


def test_resume_gives_a_passed_time_limit_its_length_again():
    run = long_work.start()
    run_until_idle()
    assert run.resume()
    assert run.model.deadline is None
    run_until_idle()
    stored = run.model
    assert (stored.status, stored.cancel_reason) == ("CANCELLED", "timeout")
    assert times("an hour of work") == 4
    assert timedelta(hours=3) < stored.deadline - stored.started_at < timedelta(hours=4)


def test_attributes_can_be_searched():
    run = echo.using(attributes={"city": "Berlin", "items": [1, 2], "paid": True, "note": "größe 注文"}).start()
    echo.using(attributes={"city": "Rome"}).start()
    found = WorkflowRun.objects.filter(attributes__city="Berlin", attributes__paid=True)
    assert [each.pk for each in found] == [run.id]
    assert run.model.attributes == {"city": "Berlin", "items": [1, 2], "paid": True, "note": "größe 注文"}


@pytest.mark.parametrize(
    ("attributes", "error"),
    [
        (["city"], TypeError),
        ({"city": object()}, durable.SerializationError),
        ({"city": float("nan")}, durable.SerializationError),
        ({"city": "a\0b"}, durable.SerializationError),
        ({"a\0b": "city"}, durable.SerializationError),
        ({"city": "\ud800"}, durable.SerializationError),
        ({("a", "b"): 1}, durable.SerializationError),
    ],
    ids=repr,
)
def test_attributes_that_no_database_could_search_are_refused_at_once(attributes, error):
    with pytest.raises(error, match="attributes"):
        echo.using(attributes=attributes)


def test_attributes_may_talk_about_escapes():
    run = echo.using(attributes={"path": r"C:\u0000"}).start()
    assert run.model.attributes == {"path": r"C:\u0000"}


def test_runs_of_an_object_are_found_by_it():
    ada, bob = Account.objects.create(name="Ada"), Account.objects.create(name="Bob")
    first, second = echo.using(related=ada).start(1), echo.using(related=ada).start(2)
    echo.using(related=bob).start(3)
    echo.start(4)
    assert {run.pk for run in WorkflowRun.objects.for_object(ada)} == {first.id, second.id}
    assert first.model.related == ada
    ada.delete()
    assert first.model.related is None
    assert echo.start().model.related is None
    # An object of another model with the same key is another object.
    assert not WorkflowRun.objects.for_object(Ledger(pk=bob.pk)).exists()


@pytest.mark.django_db(databases=["default", "other"])
def test_a_run_lives_in_the_database_that_it_is_started_in():
    run = checkout.using(database="other", run_id="there").start("A")
    assert run.database == "other"
    assert durable.get_run("there", database="other") == run
    with pytest.raises(durable.RunNotFound, match="default"):
        durable.get_run("there")
    assert run_until_idle() == 0
    assert run_until_idle(database="other") == 1
    assert run.result(timeout=0) == {"seat": "seat 1", "paid": 4900}
    assert run.model.steps.using("other").count() == 3


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"run_id": 5}, TypeError),
        ({"queue": ""}, ValueError),
        ({"queue": "x" * 101}, ValueError),
        ({"queue": 5}, TypeError),
        ({"priority": "high"}, ValueError),
        ({"priority": 2**31}, ValueError),
        ({"priority": True}, ValueError),
        ({"run_after": datetime(2030, 1, 1)}, ValueError),
        ({"run_after": 60}, TypeError),
        ({"timeout": "60"}, TypeError),
        ({"timeout": -1}, ValueError),
        ({"timeout": float("inf")}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"related": "an order"}, ValueError),
        ({"related": Account(name="unsaved")}, ValueError),
        ({"database": "nowhere"}, ValueError),
    ],
    ids=repr,
)
def test_an_option_that_makes_no_sense_is_refused_by_its_name(options, error):
    with pytest.raises(error, match=next(iter(options))):
        echo.using(**options)


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="run_at"):
        echo.using(run_at=5)


def test_options_that_are_set_one_after_the_other_add_up():
    run = echo.using(run_id="1").using(queue="mail").start()
    assert (run.id, run.model.queue) == ("1", "mail")


def test_using_changes_the_copy_alone():
    echo.using(queue="mail", priority=5)
    assert (echo.start().model.queue, echo.start().model.priority) == ("default", 0)


@pytest.mark.parametrize("timeout", [1e12, 1e300], ids=repr)
def test_an_endless_time_limit_harms_nobody(timeout):
    """It is refused, or it works. It must not raise in the worker that claims the run, which would end the worker."""
    try:
        run = echo.using(timeout=timeout).start("value")
    except ValueError:
        return
    neighbour = echo.start("neighbour")
    run_until_idle()
    assert (run.status, neighbour.status) == ("SUCCEEDED", "SUCCEEDED")


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
@pytest.mark.urls("tests.test_workflows")
def test_a_view_under_atomic_requests_may_start_but_not_call(client, monkeypatch):
    assert client.get("/buy/?order=A").content == b"4900"
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)
    response = client.get("/buy/?order=B")
    assert (response.status_code, response.content) == (202, b"PENDING")
    assert WorkflowRun.objects.count() == 2
    assert ledger_of("B") == [0, 0, 0]


@durable.workflow(name="tests.workflows.outer")
def outer(how):
    return getattr(echo, how)("inner")


@pytest.mark.parametrize("how", ["start", "__call__"])
def test_a_workflow_in_another_ones_body_is_refused(how):
    with pytest.raises(durable.InsideWorkflow, match="atomic step"):
        outer(how)
    assert WorkflowRun.objects.get().workflow == "tests.workflows.outer"


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


async def an_async_function(): ...


async def an_async_generator():
    yield 1


def a_generator():
    yield 1


@pytest.mark.parametrize("decorate", [durable.workflow, durable.step], ids=["workflow", "step"])
@pytest.mark.parametrize("func", [an_async_function, an_async_generator, a_generator, 5, "name"], ids=str)
def test_what_cannot_be_durable_is_refused_at_its_definition(decorate, func):
    with pytest.raises(TypeError, match=r"takes a (plain )?function"):
        decorate(func)


# -- Nothing happens by itself --------------------------------------------------------------------------------------


def test_a_run_that_nobody_executes_stays():
    run = echo.start()
    with pytest.raises(TimeoutError, match=f"{run.id} has not ended.*PENDING"):
        run.result(timeout=0)
    assert run.status == "PENDING"
