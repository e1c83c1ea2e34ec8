"""Starting a run: an ordinary write of the caller, one run for one id, and the options of `using`."""

import threading
from datetime import UTC, datetime, timedelta

import pytest
from asgiref.sync import async_to_sync
from django.db import transaction

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import advance, run_until_idle
from tests.app.models import Account, Ledger
from tests.app.workflows import checkout, echo, ledger_of, times
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


# -- Nothing happens by itself --------------------------------------------------------------------------------------


def test_a_run_that_nobody_executes_stays():
    run = echo.start()
    with pytest.raises(TimeoutError, match=f"{run.id} has not ended.*PENDING"):
        run.result(timeout=0)
    assert run.status == "PENDING"
