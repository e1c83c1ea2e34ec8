"""What all waits have in common: how a workflow is parked and goes on, and the net under the wake-ups."""

import logging
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

import django_durable as durable
from django_durable.engine import sweep
from django_durable.engine.sweep import wake_overlooked
from django_durable.models import Event, Message, StepCheckpoint, WorkflowRun
from django_durable.primitives.continuing import continue_as_new
from django_durable.testing import advance, run_until_idle
from django_durable.worker import loop
from tests.app.models import Ledger
from tests.app.workflows import echo, times
from tests.test_counts import statements

pytestmark = pytest.mark.django_db

HOUR = timedelta(hours=1)


@durable.step(name="tidy")
def tidy(what="tidied"):
    Ledger.objects.create(key=what)


WAITS = {
    "sleep": lambda: durable.sleep(60),
    "sleep_until": lambda: durable.sleep_until(durable.get_run(durable.current().run_id).model.created_at + HOUR),
    "receive": lambda: durable.receive("t", timeout=60, default="nothing"),
    "get_event": lambda: durable.get_event(durable.current().run_id, "k", timeout=60, default="nothing"),
    "child": lambda: durable.wait([echo.using(run_after=HOUR).start()], timeout=60),
}
CALLS = {
    **WAITS,
    "send": lambda: durable.send(durable.current().run_id, "m"),
    "set_event": lambda: durable.set_event("k", 1),
}


def step_through(run):
    """Let time pass until the run has ended."""
    for _ in range(4):
        run_until_idle()
        advance("1 hour")
    return run


# -- Inside the user's own transaction ------------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("call", CALLS)
def test_in_an_atomic_block_of_the_body_nothing_is_recorded_that_could_be_rolled_back(call):
    @durable.workflow(name="tests.waiting.in_a_block")
    def in_a_block():
        with transaction.atomic():
            CALLS[call]()

    run = in_a_block.start()
    run_until_idle()
    with pytest.raises(durable.InsideTransaction):
        run.result(0)
    assert not run.model.steps.exclude(kind="child").exists()
    assert not Message.objects.exists()
    assert not Event.objects.exists()


# -- Another call than the recorded one -----------------------------------------------------------------------------


@pytest.mark.parametrize("second", [call for call in CALLS if call != "receive"])
def test_another_call_where_a_run_waits_is_found_out_and_sets_it_aside(second):
    """The code was changed under a run that waits for a message."""
    code = ["receive"]

    @durable.workflow(name="tests.waiting.changed")
    def changed():
        CALLS[code[0]]()

    run = changed.start()
    run_until_idle()
    assert run.status == "WAITING"
    code[0] = second
    durable.send(run, "m", "t")
    run_until_idle()
    assert run.status == "DEAD"
    with pytest.raises(durable.RunDead, match="receive t"):
        run.result(0)
    # After the code is right again it goes on, and the message is there.
    code[0] = "receive"
    assert run.resume()
    run_until_idle()
    assert run.status == "SUCCEEDED"
    assert Message.objects.get().consumed_by == 1


@pytest.mark.parametrize("code", [lambda: durable.receive("other"), tidy], ids=["another topic", "a step"])
def test_another_name_or_a_step_in_the_place_of_an_answered_receive_is_found_out(code):
    calls = [lambda: durable.receive("t")]

    @durable.workflow(name="tests.waiting.renamed")
    def renamed():
        calls[0]()
        durable.sleep(60)

    run = renamed.start()
    durable.send(run, "m", "t")
    run_until_idle()
    assert run.model.waiting_for == "sleep"
    calls[0] = code
    advance("1 minute")
    run_until_idle()
    assert run.status == "DEAD"
    with pytest.raises(durable.RunDead, match=r"receive t.*(receive other|tidy)"):
        run.result(0)
    assert times("tidied") == 0


def test_a_step_of_a_primitives_name_does_not_take_its_place():
    @durable.step(name="receive t")
    def imposter():
        tidy("imposter")

    calls = [lambda: durable.receive("t")]

    @durable.workflow(name="tests.waiting.imposter")
    def body():
        calls[0]()
        durable.sleep(60)

    run = body.start()
    durable.send(run, "m", "t")
    run_until_idle()
    calls[0] = imposter
    advance("1 minute")
    run_until_idle()
    assert (run.status, times("imposter")) == ("DEAD", 0)


# -- except and finally ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", WAITS)
def test_except_exception_does_not_see_that_a_run_is_parked(wait):
    @durable.workflow(name="tests.waiting.catches")
    def catches():
        try:
            WAITS[wait]()
        except Exception as error:
            tidy("caught")
            return repr(error)
        return "went on"

    run = step_through(catches.start())
    assert (run.result(0), times("caught")) == ("went on", 0)


@pytest.mark.parametrize("wait", WAITS)
def test_finally_runs_each_time_a_run_is_parked_and_once_more_when_it_gets_there(wait):
    passed = []

    @durable.workflow(name="tests.waiting.finally")
    def with_finally():
        try:
            WAITS[wait]()
        finally:
            passed.append(wait)
        return "went on"

    run = with_finally.start()
    run_until_idle()
    assert (run.status, len(passed)) == ("WAITING", 1)
    run = step_through(run)
    assert run.result(0) == "went on"
    assert len(passed) == 2


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("call", ["step", *CALLS])
def test_what_is_called_in_a_finally_while_parking_is_not_executed_and_that_is_said(wait, call, caplog):
    """A refund in a finally would be made each time that the run waits."""

    @durable.workflow(name="tests.waiting.calls_in_finally")
    def calls_in_finally():
        try:
            WAITS[wait]()
        finally:
            tidy() if call == "step" else CALLS[call]()
        return "went on"

    run = calls_in_finally.start()
    with caplog.at_level(logging.ERROR, "django_durable.run"):
        run_until_idle()
    assert run.status == "WAITING"
    (said,) = [record for record in caplog.records if record.name == "django_durable.run"]
    assert "in a finally or except block while the run was being parked" in said.getMessage()
    assert said.run_id == run.id
    assert times("tidied") == 0
    assert not run.model.steps.exclude(kind__in=["child"]).filter(position__gt=2).exists()
    run = step_through(run)
    assert run.result(0) == "went on"
    assert times("tidied") == (1 if call == "step" else 0)


def test_a_workflow_that_swallows_everything_is_parked_all_the_same(caplog):
    @durable.workflow(name="tests.waiting.swallows")
    def swallows():
        try:
            durable.receive("t")
        except BaseException:
            tidy("swallowed")
        tidy("behind")
        return "went on"

    run = swallows.start()
    with caplog.at_level(logging.ERROR, "django_durable.run"):
        run_until_idle()
    assert (run.status, times("swallowed"), times("behind")) == ("WAITING", 0, 0)
    durable.send(run, "m", "t")
    run_until_idle()
    assert (run.result(0), times("swallowed"), times("behind")) == ("went on", 0, 1)


def test_an_own_error_from_a_finally_does_not_end_a_parked_run():
    first = [True]

    @durable.workflow(name="tests.waiting.bad_finally")
    def bad_finally():
        try:
            return durable.receive("t")
        finally:
            if first.pop() if first else False:
                raise ValueError("from the finally")

    run = bad_finally.start()
    run_until_idle()
    assert run.status == "WAITING"
    durable.send(run, "m", "t")
    run_until_idle()
    assert run.result(0) == "m"


def test_a_context_managers_exit_is_a_finally_too():
    entered = []

    class Resource:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *error):
            entered.append("out")

    @durable.workflow(name="tests.waiting.resource")
    def resource():
        with Resource():
            durable.sleep(60)

    run = resource.start()
    run_until_idle()
    assert (run.status, entered) == ("WAITING", ["in", "out"])
    advance("1 minute")
    run_until_idle()
    assert (run.status, entered) == ("SUCCEEDED", ["in", "out", "in", "out"])


# -- The net --------------------------------------------------------------------------------------------------------


@durable.workflow(name="tests.waiting.listen")
def listen(topic=None):
    return durable.receive(topic)


@durable.workflow(name="tests.waiting.follow")
def follow(run, key="k"):
    return durable.get_event(run, key, default="nothing")


@durable.workflow(name="tests.waiting.parent")
def parent(first):
    children = [listen.start("t") for _ in range(3)]
    return len(durable.wait(children, "FIRST" if first else "ALL").done)


def lose_message(run, topic=""):
    """A message that is stored without waking anybody."""
    Message.objects.create(run_id=run.id, topic=topic, body='"m"', created_at=timezone.now())


def lose_end(run_ids, **changes):
    """Runs that are ended by hand."""
    facts = {"status": "SUCCEEDED", "finished_at": timezone.now(), "output": '"by hand"', **changes}
    WorkflowRun.objects.filter(pk__in=run_ids).update(**facts)


def found(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "django_durable.worker"]


def test_the_net_finds_a_run_whose_message_woke_nobody(caplog):
    lost, other, right = listen.start(), listen.start("t"), listen.start()
    run_until_idle()
    lose_message(lost)
    lose_message(other, "another topic")
    assert wake_overlooked("default") == 1
    assert [run.status for run in (lost, other, right)] == ["PENDING", "WAITING", "WAITING"]
    (said,) = found(caplog)
    assert said.startswith("1 runs were WAITING for what had already happened")
    assert lost.id in said
    run_until_idle()
    assert lost.result(0) == "m"
    assert wake_overlooked("default") == 0
    assert len(found(caplog)) == 1


@pytest.mark.parametrize("awaited", [False, True], ids=["mark gone", "mark there"])
@pytest.mark.parametrize("status", ["SUCCEEDED", "CANCELLED"])
def test_the_net_finds_a_run_that_nobody_told_of_another_runs_end(caplog, status, awaited):
    @durable.workflow(name="tests.waiting.for_result")
    def for_result(run):
        try:
            return run.result()
        except durable.RunCancelled:
            return "cancelled"

    other = listen.start("t")
    run = for_result.start(other)
    run_until_idle()
    lose_end([other.id], status=status, awaited=awaited)
    assert wake_overlooked("default") == 1
    run_until_idle()
    assert run.result(0) == ("by hand" if status == "SUCCEEDED" else "cancelled")
    assert wake_overlooked("default") == 0


@pytest.mark.parametrize("first", [False, True], ids=["ALL", "FIRST"])
def test_the_net_finds_a_parent_that_nobody_told_of_its_children(first):
    run = parent.start(first)
    run_until_idle()
    assert run.status == "WAITING"
    children = list(run.model.children.order_by("pk").values_list("pk", flat=True))
    lose_end(children[:1] if first else children)
    assert wake_overlooked("default") == 1
    run_until_idle()
    assert run.result(0) == (1 if first else 3)
    assert wake_overlooked("default") == 0


def test_a_parent_that_goes_on_waiting_for_others_is_not_found_again(caplog):
    @durable.workflow(name="tests.waiting.one_by_one")
    def one_by_one():
        pending, rounds = [listen.start("t") for _ in range(3)], 0
        while pending:
            pending, rounds = durable.wait(pending, "FIRST").pending, rounds + 1
        return rounds

    run = one_by_one.start()
    run_until_idle()
    children = list(run.model.children.order_by("pk").values_list("pk", flat=True))
    lose_end(children[:1])
    assert wake_overlooked("default") == 1
    run_until_idle()
    assert run.status == "WAITING"
    assert wake_overlooked("default") == 0
    for child in children[1:]:
        durable.send(child, "m", "t")
        run_until_idle()
        assert wake_overlooked("default") == 0
    assert run.result(0) == 3


@pytest.mark.parametrize("key", ["k", "a:b", ":", "%_"])
@pytest.mark.parametrize("run_id", ["publisher", "order:7:x"])
def test_the_net_finds_a_run_that_nobody_told_of_an_event(run_id, key):
    publisher = listen.using(run_id=run_id).start("t")
    run, other = follow.start(publisher, key), follow.start(publisher, "other")
    run_until_idle()
    assert wake_overlooked("default") == 0
    Event.objects.create(run_id=run_id, key=key, value="1", updated_at=timezone.now())
    assert wake_overlooked("default") == 1
    run_until_idle()
    assert (run.result(0), other.status) == (1, "WAITING")
    assert wake_overlooked("default") == 0


def test_the_net_finds_a_run_whose_event_cannot_come_any_more():
    publisher = listen.using(run_id="publisher").start("t")
    run = follow.start(publisher)
    run_until_idle()
    lose_end([publisher.id])
    assert wake_overlooked("default") == 1
    run_until_idle()
    assert run.result(0) == "nothing"


def test_the_net_leaves_who_waits_for_something_else(caplog):
    """Asleep, delayed, paused, or told already: nothing of it is a lost wake-up."""
    asleep = parent.using(run_after=HOUR).start(True)
    paused, told = listen.start(), listen.start()
    run_until_idle()
    paused.pause()
    durable.send(paused, "m")
    durable.send(told, "m")
    ended = echo.start()
    run_until_idle()
    durable.send(ended, "to one that has ended")
    assert wake_overlooked("default") == 0
    assert (asleep.status, paused.status, told.status) == ("WAITING", "WAITING", "SUCCEEDED")
    assert not found(caplog)


@pytest.mark.django_db(databases=["default", "other"])
def test_the_net_does_not_take_a_namesake_in_this_database_for_a_run_in_another():
    @durable.workflow(name="tests.waiting.for_other")
    def for_other(run):
        return run.result()

    there = listen.using(run_id="twin", database="other").start("t")
    run = for_other.start(there)
    echo.using(run_id="twin").start()
    run_until_idle()
    assert (run.status, run.model.waiting_for) == ("WAITING", "run:twin")
    assert wake_overlooked("default") == 0


def test_a_child_that_goes_on_as_another_run_is_no_lost_wake_up():
    @durable.workflow(name="tests.waiting.loops")
    def loops(count):
        durable.receive("t")
        if count:
            continue_as_new(count - 1)
        return "the last"

    @durable.workflow(name="tests.waiting.parent_of_loops")
    def parent_of_loops():
        return len(durable.wait([loops.start(2), loops.start(2)], "FIRST").done)

    run = parent_of_loops.start()
    run_until_idle()
    first = run.model.children.order_by("pk").first().pk
    for _ in range(3):
        assert run.status == "WAITING"
        durable.send(first, "m", "t")
        run_until_idle()
        assert wake_overlooked("default") == 0
    assert run.result(0) == 1


def test_the_net_wakes_thousands_in_batches(monkeypatch, caplog):
    runs = [listen.start() for _ in range(25)]
    run_until_idle()
    for run in runs:
        lose_message(run)
    monkeypatch.setattr(sweep, "BATCH", 10)
    assert wake_overlooked("default") == 25
    (said,) = found(caplog)
    assert len([run for run in runs if run.id in said]) == sweep.NAMED
    assert {run.status for run in runs} == {"PENDING"}


@pytest.mark.django_db(transaction=True)
def test_a_net_that_finds_nothing_is_four_looks_however_many_wait():
    for count in (0, 60):
        now = timezone.now()
        WorkflowRun.objects.bulk_create(
            WorkflowRun(
                id=f"{kind}{number}",
                workflow="tests.echo",
                status="WAITING",
                input="[]",
                created_at=now,
                run_after=now,
                waiting_for=waiting_for,
            )
            for number in range(count)
            for kind, waiting_for in [("m", "message:t"), ("r", "run:x"), ("c", "children"), ("e", "event:x:k")]
        )
        with CaptureQueriesContext(connection) as queries:
            assert wake_overlooked("default") == 0
        assert [sql.split()[0] for sql in statements(queries)] == ["SELECT"] * 4


@pytest.mark.django_db(transaction=True)
def test_postgresql_finds_all_of_it_by_index_when_there_are_many():
    """With many rows that are finished, asleep or unread for ever, no look may read a whole table of them."""
    if connection.vendor != "postgresql":
        # Its plans are the same for any number of rows: each look is driven by an index.
        for look in sweep._overlooked("default"):
            plan = look[:500].explain()
            assert "SCAN" not in plan, plan
        return
    now = timezone.now()
    waits = {"m": "message:t", "r": "run:f{}", "c": "children", "e": "event:f{}:k", "s": "sleep"}
    many = 1000

    def row(run_id, **facts):
        return WorkflowRun(id=run_id, workflow="w", input="[]", created_at=now, run_after=now, **facts)

    WorkflowRun.objects.bulk_create(
        [
            *(
                row(f"{kind}{number}", status="WAITING", waiting_for=waiting_for.format(number))
                for kind, waiting_for in waits.items()
                for number in range(20)
            ),
            *(row(f"z{number}", status="SUCCEEDED", finished_at=now) for number in range(20 * many)),
        ],
        batch_size=2000,
    )
    StepCheckpoint.objects.bulk_create(
        StepCheckpoint(
            run_id=f"e{number}",
            position=1,
            name="get_event k",
            kind="event",
            status="WAITING",
            attempt=1,
            started_at=now,
            finished_at=now,
        )
        for number in range(20)
    )
    Event.objects.bulk_create(
        (Event(run_id=f"z{number}", key="k", value="1", updated_at=now) for number in range(10 * many)), batch_size=2000
    )
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE")
    for look in sweep._overlooked("default"):
        plan = look[:500].explain()
        assert "Seq Scan on django_durable_workflowrun" not in plan, plan
        assert "Seq Scan on django_durable_event" not in plan, plan


@pytest.mark.django_db(transaction=True)
def test_a_worker_looks_for_lost_wake_ups_by_itself(monkeypatch, caplog):
    run = listen.start()
    run_until_idle()
    lose_message(run)
    worker = loop.Worker("default", burst=True)
    worker.run()
    # Not at each turn: it never finds one.
    assert run.status == "WAITING"
    monkeypatch.setattr(loop, "SAFETY_PAUSE", 0.0)
    loop.Worker("default", burst=True).run()
    assert run.result(0) == "m"
    assert len([said for said in found(caplog) if "A wake-up was lost" in said]) == 1
