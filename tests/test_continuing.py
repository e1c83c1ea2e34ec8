"""`continue_as_new`: a loop without end, whose runs have a short history each."""

import threading
import time
from datetime import timedelta

import pytest
from django.db import transaction

import django_durable as durable
from django_durable.engine import claims, steering
from django_durable.engine.heartbeat import inline_lease
from django_durable.engine.replay import execute
from django_durable.exceptions import ContinueAsNew
from django_durable.models import Event, Message, WorkflowRun
from django_durable.signals import run_finished
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import times
from tests.threads import together

pytestmark = pytest.mark.django_db


@durable.step(name="tick")
def tick(number):
    Ledger.objects.create(key=f"tick {number}")
    return number


@durable.workflow(name="tests.continuing.loop")
def loop(number, last, *, note=""):
    tick(number)
    if number < last:
        durable.continue_as_new(number + 1, last, note=note)
    return {"last": number, "note": note}


@durable.workflow(name="tests.continuing.mailbox")
def mailbox(got=()):
    """Takes one message in each of its runs."""
    message = durable.receive("m")
    if message == "end":
        return list(got)
    durable.set_event("count", len(got) + 1)
    durable.continue_as_new((*got, message))


@durable.workflow(name="tests.continuing.napping")
def napping(rounds):
    durable.sleep(60)
    if rounds:
        durable.continue_as_new(rounds - 1)
    return "rested"


@durable.workflow(name="tests.continuing.failing")
def failing(number):
    if number == 2:
        raise ValueError("the third of the line")
    durable.continue_as_new(number + 1)


@durable.workflow(name="tests.continuing.parent")
def parent(how, *args):
    if how == "call":
        return napping(*args)
    child = napping.start(*args)
    if how == "wait":
        durable.wait([child])
    return child.result()


@durable.workflow(name="tests.continuing.wrong")
def wrong(kind):
    arguments = {"many": ((1, 2), {}), "name": ((), {"sort": 1}), "none": ((), {}), "value": ((object(),), {})}
    args, kwargs = arguments[kind]
    durable.continue_as_new(*args, **kwargs)


def line_of(run_id):
    return list(WorkflowRun.objects.filter(pk__startswith=run_id).order_by("created_at").values_list("pk", flat=True))


def drain(rounds=8):
    for _ in range(rounds):
        run_until_idle()
        advance("61 seconds")
    run_until_idle()


# -- The line -------------------------------------------------------------------------------------------------------


def test_a_run_ends_and_another_goes_on_for_it():
    run = loop.using(run_id="x", attributes={"customer": 7}, priority=3).start(1, 3, note="kept")
    run_until_idle()
    assert run.result(0) == {"last": 3, "note": "kept"}
    assert line_of("x") == ["x", "x~2", "x~3"]
    rows = list(WorkflowRun.objects.order_by("created_at"))
    assert [row.status for row in rows] == ["SUCCEEDED"] * 3
    assert [row.continued_as for row in rows] == ["x~3", "x~3", ""]
    assert {(row.priority, row.attributes["customer"], row.queue) for row in rows} == {(3, 7, "default")}
    assert [row.steps.count() for row in rows] == [1, 1, 1]
    assert [times(f"tick {number}") for number in (1, 2, 3)] == [1, 1, 1]
    # Any of them leads to the end.
    assert durable.get_run("x~2").result(0)["last"] == 3


def test_a_direct_call_follows_to_the_end():
    assert loop(1, 4)["last"] == 4
    assert loop.using(run_id="again")(1, 3)["last"] == 3
    assert loop.using(run_id="again")(1, 3)["last"] == 3
    assert times("tick 1") == 2


def test_a_long_loop_has_a_short_history():
    run = loop.using(run_id="long").start(1, 200)
    run_until_idle()
    assert run.result(0)["last"] == 200
    assert WorkflowRun.objects.count() == 200
    assert {row.steps.count() for row in WorkflowRun.objects.all()} == {1}
    assert line_of("long")[-1] == "long~200"
    assert run.model.continued_as == "long~200"


def test_the_way_from_the_first_to_the_last_does_not_grow(django_assert_num_queries):
    run = loop.using(run_id="x").start(1, 30)
    run_until_idle()
    with django_assert_num_queries(1):
        assert steering.latest("default", run.id) == "x~30"
    with django_assert_num_queries(3):
        run.result(0)


def test_the_error_of_the_last_is_the_first_ones():
    run = failing.start(0)
    run_until_idle()
    with pytest.raises(ValueError, match="the third of the line"):
        run.result(0)
    with pytest.raises(ValueError, match="the third of the line"):
        failing(0)


def test_an_id_that_is_taken_is_passed_over():
    loop.using(run_id="x~2").start(7, 7)
    run = loop.using(run_id="x").start(1, 2)
    run_until_idle()
    assert run.result(0)["last"] == 2
    assert line_of("x") == ["x~2", "x", "x~3"]


def test_an_id_that_only_looks_like_one_of_a_line_is_none():
    other = loop.using(run_id="order").start(1, 1)
    run = loop.using(run_id="order~7").start(1, 3)
    run_until_idle()
    assert run.result(0)["last"] == 3
    assert other.model.continued_as == ""
    assert line_of("order~")[-1] == "order~7~3"


@pytest.mark.parametrize("length", [197, 198, 200])
def test_a_long_id_has_a_line_too(length):
    run = loop.using(run_id="x" * length).start(1, 12)
    run_until_idle()
    assert run.result(0)["last"] == 12
    assert WorkflowRun.objects.count() == 12


def test_who_follows_the_runs_hears_of_each_end():
    ended = []

    def receiver(**facts):
        ended.append((facts["run_id"], facts["status"]))

    run_finished.connect(receiver)
    try:
        loop.using(run_id="x").start(1, 3)
        run_until_idle()
    finally:
        run_finished.disconnect(receiver)
    assert ended == [("x", "SUCCEEDED"), ("x~2", "SUCCEEDED"), ("x~3", "SUCCEEDED")]


# -- Where it is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["many", "name", "none"])
def test_arguments_that_do_not_fit_are_refused_where_it_is_called(kind):
    with pytest.raises(TypeError, match=r"continue_as_new\(\) of workflow 'tests.continuing.wrong'.*it takes \(kind\)"):
        wrong(kind)
    assert WorkflowRun.objects.get().status == "FAILED"


def test_arguments_that_cannot_be_stored_are_refused_where_it_is_called():
    with pytest.raises(durable.SerializationError, match=r"arguments of workflow 'tests.continuing.wrong'"):
        wrong("value")
    assert WorkflowRun.objects.get().status == "FAILED"


def test_it_belongs_to_a_workflow():
    with pytest.raises(durable.NotInWorkflow):
        durable.continue_as_new()

    @durable.workflow(name="tests.continuing.step")
    def inside():
        durable.run_step("step", durable.continue_as_new)

    with pytest.raises(durable.NotInWorkflow, match="inside a step"):
        inside()


def test_a_body_that_catches_exceptions_does_not_catch_it():
    @durable.workflow(name="tests.continuing.catching")
    def catching(number):
        try:
            if number < 3:
                durable.continue_as_new(number + 1)
            return number
        except Exception:
            return "caught"
        finally:
            tick(number)

    assert catching(1) == 3
    # What a finally does is part of the run that ends.
    assert [times(f"tick {number}") for number in (1, 2, 3)] == [1, 1, 1]
    assert issubclass(ContinueAsNew, BaseException)
    assert not issubclass(ContinueAsNew, Exception)


def test_a_run_whose_code_ends_too_early_does_not_go_on():
    """Its history has a step more than today's code: that is another course, also for one that goes on."""
    code = {"steps": 2}

    @durable.workflow(name="tests.continuing.shortened")
    def shortened(number):
        for step in range(code["steps"]):
            tick(step)
        if number == 0:
            durable.receive("go")
            durable.continue_as_new(1)

    run = shortened.start(0)
    run_until_idle()
    code["steps"] = 1
    run.send(1, "go")
    run_until_idle()
    assert run.status == "DEAD"
    assert WorkflowRun.objects.count() == 1


# -- What goes along ------------------------------------------------------------------------------------------------


def test_unread_messages_go_along_in_their_order():
    run = mailbox.using(run_id="x").start()
    for number in range(5):
        run.send(number, "m")
    run.send("other", "another topic")
    run.send("end", "m")
    run_until_idle()
    assert run.result(0) == [0, 1, 2, 3, 4]
    # Each was taken by one run of the line; what nobody asked for is with the last.
    assert sorted(Message.objects.filter(consumed_at=None).values_list("run_id", "topic")) == [("x~6", "another topic")]
    assert Message.objects.filter(topic="m", consumed_at__isnull=False).count() == 6


def test_a_message_to_the_first_reaches_the_last():
    run = mailbox.using(run_id="x").start()
    run_until_idle()
    for number in range(3):
        run.send(number, "m", key=f"k{number}")
        run_until_idle()
    durable.send("x", "end", "m")
    run_until_idle()
    assert run.result(0) == [0, 1, 2]
    assert run.get_event("count", 0) == 3


def test_events_go_along():
    run = mailbox.using(run_id="x").start()
    run_until_idle()
    run.send("a", "m")
    run_until_idle()
    assert sorted(Event.objects.values_list("run_id", "key", "value")) == [("x", "count", "1"), ("x~2", "count", "1")]
    assert run.get_event("count", 0) == 1


def test_a_child_goes_along_with_its_parent():
    @durable.workflow(name="tests.continuing.handing_on")
    def handing_on(child=None):
        if child is None:
            durable.continue_as_new(napping.start(0))
        return child.result()

    run = handing_on.using(run_id="x").start()
    drain(3)
    assert run.result(0) == "rested"
    (child,) = WorkflowRun.objects.filter(workflow="tests.continuing.napping")
    assert child.parent_id == "x~2"


def test_cancelling_the_first_cancels_the_last_and_its_children():
    @durable.workflow(name="tests.continuing.with_child")
    def with_child(child=None):
        if child is None:
            durable.continue_as_new(napping.start(5))
        durable.receive("never")

    run = with_child.using(run_id="x").start()
    run_until_idle()
    assert run.cancel("enough")
    assert not run.cancel("enough")
    assert sorted(WorkflowRun.objects.values_list("workflow", "status")) == [
        ("tests.continuing.napping", "CANCELLED"),
        ("tests.continuing.with_child", "CANCELLED"),
        ("tests.continuing.with_child", "SUCCEEDED"),
    ]
    with pytest.raises(durable.RunCancelled):
        run.result(0)
    assert run.resume()


def test_pausing_and_resuming_the_first_is_done_to_the_last():
    run = napping.using(run_id="x").start(1)
    run_until_idle()
    advance("61 seconds")
    run_until_idle()
    assert run.pause()
    assert durable.get_run("x~2").model.waiting_for == "resume"
    advance("1 hour")
    assert run_until_idle() == 0
    assert run.resume()
    run_until_idle()
    assert run.result(0) == "rested"


def test_resuming_the_first_resumes_the_last_that_failed():
    run = failing.start(0)
    run_until_idle()
    assert run.resume()
    assert run_until_idle() == 1


@pytest.mark.parametrize("how", ["call", "start", "wait"])
def test_a_parent_waits_for_the_whole_line(how):
    run = parent.start(how, 3)
    drain()
    assert run.result(0) == "rested"
    assert WorkflowRun.objects.filter(workflow="tests.continuing.napping").count() == 4


@pytest.mark.parametrize("how", ["call", "start", "wait"])
def test_a_parent_that_is_called_directly_waits_for_the_whole_line(how):
    assert parent(how, 3) == "rested"


def test_somebody_who_waits_for_an_event_gets_it_from_a_later_one():
    @durable.workflow(name="tests.continuing.late_event")
    def late_event(number=0):
        durable.receive("go")
        if number < 2:
            durable.continue_as_new(number + 1)
        durable.set_event("ready", number)

    @durable.workflow(name="tests.continuing.listener")
    def listener(run):
        return durable.get_event(run, "ready")

    run = late_event.using(run_id="x").start()
    listening = listener.start(run)
    run_until_idle()
    for _ in range(3):
        assert listening.status == "WAITING"
        run.send(1, "go")
        run_until_idle()
    assert listening.result(0) == 2


# -- Time limits ----------------------------------------------------------------------------------------------------


def test_each_run_has_the_whole_timeout():
    run = napping.using(run_id="x", timeout=100).start(3)
    drain()
    assert run.result(0) == "rested"
    rows = list(WorkflowRun.objects.all())
    assert [row.deadline - row.started_at for row in rows] == [timedelta(seconds=100)] * 4


def test_a_child_that_goes_on_is_held_to_its_parents_limit():
    run = parent.using(timeout=150).start("start", 9)
    drain()
    assert (run.status, run.model.cancel_reason) == ("CANCELLED", "timeout")
    children = WorkflowRun.objects.filter(workflow="tests.continuing.napping")
    assert {child.deadline for child in children} == {run.model.deadline}
    assert children.filter(status="CANCELLED").count() == 1
    assert not children.exclude(status__in=["CANCELLED", "SUCCEEDED"]).exists()


# -- Crashes and races ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash", [crash_before, crash_after])
def test_a_crash_in_any_of_them_repeats_nothing(crash):
    run = loop.using(run_id="x").start(1, 3)
    for _ in range(3):
        with crash("tick"):
            run_until_idle()
    run_until_idle()
    assert run.result(0)["last"] == 3
    assert [times(f"tick {number}") for number in (1, 2, 3)] == [1, 1, 1]
    assert line_of("x") == ["x", "x~2", "x~3"]


@pytest.mark.django_db(transaction=True)
def test_a_run_that_lost_its_lease_does_not_go_on():
    run = loop.using(run_id="x").start(1, 2)
    lease = inline_lease("default")
    (claim,) = claims.claim(lease, 1, run_id="x")
    WorkflowRun.objects.filter(pk="x").update(attempt=9, worker="another")
    assert execute(claim, lease) is None
    assert line_of("x") == ["x"]
    assert run.status == "RUNNING"


def execute_line(run_id):
    lease = inline_lease("default")
    while claimed := claims.claim(lease, 1, run_id=steering.latest("default", run_id)):
        execute(claimed[0], lease)


@pytest.mark.django_db(transaction=True)
def test_a_cancel_that_meets_the_hand_over_is_not_lost():
    """However the two meet: either the run is cancelled before it goes on, or the one that goes on for it is."""
    met = 0
    for number in range(12):
        run = loop.using(run_id=f"race-{number}").start(1, 200)
        cancelled = []

        def cancel(run=run, cancelled=cancelled):
            while not times("tick 3"):
                time.sleep(0.001)
            cancelled.append(run.cancel("stop"))

        outcomes = together(cancel, lambda run=run: execute_line(run.id))
        assert outcomes == [None, None]
        last = WorkflowRun.objects.get(pk=steering.latest("default", run.id))
        # Where there is one write lock, and no turn for who waits for it, the line may have come to its end before.
        assert cancelled == [last.status == "CANCELLED"]
        met += last.status == "CANCELLED"
        Ledger.objects.all().delete()
    assert met > 6


@pytest.mark.django_db(transaction=True)
def test_no_message_is_lost_between_two_runs():
    run = mailbox.using(run_id="x").start()
    ended = threading.Event()

    def send(sender):
        for number in range(20):
            run.send(f"{sender}-{number}", "m")

    def work():
        while not ended.is_set() or run_is_due():
            claims.wake_due("default")
            execute_line(run.id)

    def run_is_due():
        return WorkflowRun.objects.filter(status="PENDING").exists()

    def senders():
        together(lambda: send("a"), lambda: send("b"))
        run.send("end", "m")
        ended.set()

    assert together(senders, work) == [None, None]
    got = run.result(0)
    assert sorted(got) == sorted(f"{sender}-{number}" for sender in "ab" for number in range(20))
    # Of one sender, in its order.
    assert [each for each in got if each.startswith("a")] == [f"a-{number}" for number in range(20)]


@pytest.mark.django_db(transaction=True)
def test_a_long_direct_call_goes_from_run_to_run():
    assert loop.using(run_id="x")(1, 10)["last"] == 10
    assert WorkflowRun.objects.filter(status="SUCCEEDED").count() == 10


@pytest.mark.django_db(transaction=True)
def test_a_hand_over_is_one_commit():
    """The run that ends and the one that goes on: nobody sees the one without the other."""
    with transaction.atomic():
        run = loop.using(run_id="x").start(1, 2)
    seen = []

    def watch():
        while not seen or seen[-1] != ("SUCCEEDED", True):
            with transaction.atomic():
                row = WorkflowRun.objects.filter(pk="x").values_list("status", "continued_as").get()
            seen.append((row[0], bool(row[1]) and WorkflowRun.objects.filter(pk=row[1]).exists()))

    assert together(watch, lambda: execute_line("x")) == [None, None]
    assert set(seen) <= {("PENDING", False), ("RUNNING", False), ("SUCCEEDED", True)}
    assert run.result(0)["last"] == 2
