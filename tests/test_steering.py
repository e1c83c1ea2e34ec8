"""Steering a stored run: cancel with its children, pause, resume, fork and restart."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

import django_durable as durable
from django_durable import signals
from django_durable.engine import claims
from django_durable.engine.leases import Lease
from django_durable.engine.replay import execute
from django_durable.models import Event, Message, StepCheckpoint, StreamItem, WorkflowRun
from django_durable.states import FINISHED, RunStatus
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from django_durable.worker.loop import Worker
from tests.app.models import Ledger
from tests.app.workflows import checkout, echo, ledger_of, times
from tests.docs.test_reference import own_registry, run_examples  # noqa: F401 (a fixture)
from tests.test_counts import commits, statements
from tests.test_worker import wait_until
from tests.threads import together

pytestmark = pytest.mark.django_db


@durable.step(name="do")
def do(what):
    Ledger.objects.create(key=what)
    return what


@durable.workflow(name="tests.steering.sleeper")
def sleeper(name="sleeper", seconds=3600):
    do(f"{name} begins")
    durable.sleep(seconds)
    do(f"{name} ends")
    return name


@durable.workflow(name="tests.steering.family")
def family(depth, width=2):
    """A tree whose leaves sleep."""
    if depth == 0:
        return sleeper.func("leaf")
    children = [family.start(depth - 1, width) for _ in range(width)]
    return [child.result() for child in children]


@durable.workflow(name="tests.steering.fragile")
def fragile(name):
    do(f"{name} begins")
    if broken:
        raise ValueError("broken")
    return do(f"{name} ends")


broken: list[bool] = []


@pytest.fixture(autouse=True)
def mended():
    broken.clear()


def statuses(**which):
    return list(WorkflowRun.objects.filter(**which).order_by("pk").values_list("status", flat=True))


def left_at(status):
    """A run of this status, by the ordinary ways."""
    if status == RunStatus.DEAD:

        @durable.workflow(name="tests.steering.mortal", max_recoveries=0)
        def mortal():
            return do("mortal")

        run = mortal.start()
        with crash_before("do"):
            run_until_idle()
        run_until_idle()
    elif status == RunStatus.FAILED:
        broken.append(True)
        run = fragile.start("failed")
        run_until_idle()
        broken.clear()
    elif status == RunStatus.CANCELLED:
        run = checkout.start("cancelled")
        run.cancel("as asked")
    elif status == RunStatus.SUCCEEDED:
        run = echo.start()
        run_until_idle()
    elif status == RunStatus.WAITING:
        run = sleeper.start()
        run_until_idle()
    elif status == RunStatus.RUNNING:
        run = checkout.start("running")
        with crash_before("charge"):
            run_until_idle()
    else:
        run = checkout.start("pending")
    assert run.status == status
    return run


# -- Cancel -----------------------------------------------------------------------------------------------------


def test_a_cancel_goes_down_the_whole_tree_and_tells_of_each():
    told = []

    def finished(run_id, status, **facts):
        told.append((run_id, status))

    run = family.using(run_id="p").start(3)
    run_until_idle()
    assert WorkflowRun.objects.count() == 15
    signals.run_finished.connect(finished, weak=False)
    try:
        with pytest.MonkeyPatch.context() as patch:
            # In a test's transaction nothing is committed: what is left for then happens at once.
            patch.setattr(transaction, "on_commit", lambda done, **options: done())
            assert run.cancel("no more")
    finally:
        signals.run_finished.disconnect(finished)
    assert set(WorkflowRun.objects.values_list("status", "cancel_reason")) == {("CANCELLED", "no more")}
    assert not WorkflowRun.objects.filter(finished_at=None).exists()
    assert len(told) == len(set(told)) == 15
    advance("2 hours")
    assert run_until_idle() == 0
    assert times("leaf ends") == 0


def test_a_cancel_without_children_leaves_them_to_go_on():
    run = family.using(run_id="p").start(1)
    run_until_idle()
    assert run.cancel(children=False)
    assert statuses() == ["CANCELLED", "WAITING", "WAITING"]
    advance("2 hours")
    run_until_idle()
    assert statuses() == ["CANCELLED", "SUCCEEDED", "SUCCEEDED"]


def test_ended_children_stay_as_they_are():
    run = family.using(run_id="p").start(1, 3)
    run_until_idle()
    durable.get_run("p.1").cancel("alone")
    run.cancel("all")
    reasons = dict(WorkflowRun.objects.values_list("pk", "cancel_reason"))
    assert reasons == {"p": "all", "p.1": "alone", "p.2": "all", "p.3": "all"}


def test_a_cancelled_child_is_told_to_its_parent_in_the_same_transaction():
    run = family.using(run_id="p").start(1)
    run_until_idle()
    with transaction.atomic():
        durable.get_run("p.1").cancel("sold out")
        assert run.status == "PENDING"
    run_until_idle()
    with pytest.raises(durable.RunCancelled, match=r"p\.1 was cancelled \(sold out\)"):
        run.result(0)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("how", ["cancel", "pause", "resume", "fork"])
def test_what_was_rolled_back_has_changed_nothing(how):
    run = family.using(run_id="p").start(1)
    run_until_idle()
    if how == "resume":
        run.pause()
    before = snapshot()
    with pytest.raises(ZeroDivisionError), transaction.atomic():  # noqa: PT012 (the rollback is the point)
        getattr(run, how)(**({"from_step": 1} if how == "fork" else {}))
        assert snapshot() != before
        raise ZeroDivisionError
    assert snapshot() == before
    if how == "resume":
        run.resume()
    advance("2 hours")
    run_until_idle()
    assert set(statuses()) == {"SUCCEEDED"}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("how", ["call", "start"])
@pytest.mark.parametrize("atomic", [True, False])
def test_a_childs_step_cancels_the_whole_tree_that_it_is_part_of(how, atomic, depth):
    """In an atomic step that is one commit: the step's own effect, its checkpoint, and the end of all of them."""

    def found_out(root):
        Ledger.objects.create(key="fraud")
        return durable.get_run(root).cancel("fraud")

    found_out_step = durable.step(name="find out", atomic=atomic)(found_out)

    @durable.workflow(name="tests.steering.detective")
    def detective(root, depth):
        sleeper.start("helper")
        if depth:
            return (detective(root, depth - 1)) if how == "call" else detective.start(root, depth - 1).result()
        found_out_step(root)
        do("behind the cancel")

    @durable.workflow(name="tests.steering.suspect")
    def suspect(depth):
        return detective(durable.current().run_id, depth - 1)

    run = suspect.start(depth)
    run_until_idle()
    assert set(WorkflowRun.objects.values_list("status", "cancel_reason")) == {("CANCELLED", "fraud")}
    assert WorkflowRun.objects.count() == 1 + 2 * depth
    assert (times("fraud"), times("behind the cancel")) == (1, 0)
    assert StepCheckpoint.objects.get(name="find out").status == "SUCCEEDED"
    with pytest.raises(durable.RunCancelled, match="fraud"):
        run.result(0)


@pytest.mark.parametrize("status", [*RunStatus])
def test_cancel_says_whether_it_changed_anything(status):
    run = left_at(status)
    assert run.cancel() is (status not in FINISHED)
    assert run.cancel() is False
    assert run.status == (status if status in FINISHED else "CANCELLED")


def test_the_cancel_of_a_tree_of_a_hundred_takes_statements_by_its_depth_and_not_by_its_size():
    counts = []
    for width in (3, 99):
        run = family.start(1, width)
        run_until_idle()
        with CaptureQueriesContext(connection) as queries:
            assert run.cancel()
        counts.append(len(statements(queries)))
        assert set(statuses()) == {"CANCELLED"}
    assert counts[0] == counts[1] <= 16


# -- Pause --------------------------------------------------------------------------------------------------------


def test_a_paused_run_that_was_due_waits_until_it_is_resumed():
    run = checkout.start("pending")
    assert run.pause() is True
    assert (run.status, run.model.waiting_for) == ("WAITING", "resume")
    assert run.pause() is False
    advance("30 days")
    assert run_until_idle() == 0
    assert run.resume() is True
    assert run.resume() is False
    run_until_idle()
    assert run.status == "SUCCEEDED"
    assert ledger_of("pending") == [1, 1, 1]


def test_paused_in_its_sleep_it_does_not_wake_up_and_keeps_the_sleeps_end():
    run = sleeper.start("s", 3600)
    run_until_idle()
    assert run.pause()
    advance("50 minutes")
    assert run.resume()
    run_until_idle()
    assert (run.status, run.model.waiting_for) == ("WAITING", "sleep")
    assert run.pause()
    advance("2 hours")
    assert run_until_idle() == 0
    assert run.resume()
    run_until_idle()
    assert run.result(0) == "s"
    assert times("s begins") == times("s ends") == 1


def test_a_message_to_a_paused_run_is_kept_for_it():
    @durable.workflow(name="tests.steering.listener")
    def listener():
        return durable.receive("topic"), durable.receive("topic", timeout=3600, default="nothing")

    run = listener.start()
    run_until_idle()
    assert run.pause()
    run.send("first", "topic")
    assert (run.status, run.model.waiting_for, run_until_idle()) == ("WAITING", "resume", 0)
    assert run.resume()
    run_until_idle()
    assert run.model.waiting_for == "message:topic"
    run.pause()
    advance("2 hours")
    assert run_until_idle() == 0, "its wait is over, and it is paused"
    run.resume()
    run_until_idle()
    assert run.result(0) == ("first", "nothing")


def test_a_child_that_ends_while_its_parent_is_paused_is_seen_behind_the_pause():
    run = family.using(run_id="p").start(1)
    run_until_idle()
    assert run.pause()
    advance("2 hours")
    run_until_idle()
    assert statuses(parent="p") == ["SUCCEEDED", "SUCCEEDED"]
    assert run.status == "WAITING"
    assert run.resume()
    run_until_idle()
    assert run.result(0) == ["leaf", "leaf"]


def test_a_paused_child_keeps_its_parent_waiting():
    run = family.using(run_id="p").start(1)
    run_until_idle()
    assert durable.get_run("p.1").pause()
    advance("2 hours")
    run_until_idle()
    assert run.status == "WAITING"
    durable.get_run("p.1").resume()
    run_until_idle()
    assert run.result(0) == ["leaf", "leaf"]


def test_a_delayed_start_keeps_its_time_over_a_pause():
    run = checkout.using(run_after=timedelta(hours=2)).start("later")
    time = run.model.run_after
    assert run.pause()
    advance("1 hour")
    assert run.resume()
    assert (run.status, run.model.waiting_for, run.model.wake_at) == ("WAITING", "start", time)
    assert run_until_idle() == 0
    advance("61 minutes")
    run_until_idle()
    assert run.status == "SUCCEEDED"

    late = checkout.using(run_after=timedelta(hours=2)).start("too late")
    late.pause()
    advance("3 hours")
    assert late.resume()
    assert late.status == "PENDING"


def test_time_limits_go_on_in_a_pause():
    run = sleeper.using(timeout=60).start()
    run_until_idle()
    run.pause()
    advance("61 seconds")
    run_until_idle()
    assert (run.status, run.model.cancel_reason) == ("CANCELLED", "timeout")


@pytest.mark.parametrize("status", [*RunStatus])
def test_pause_says_whether_it_changed_anything(status):
    run = left_at(status)
    assert run.pause() is (status not in FINISHED)
    assert run.pause() is False
    if status in FINISHED:
        assert run.status == status
    else:
        assert (run.status, run.model.waiting_for, run.model.worker) == ("WAITING", "resume", "")
        assert run.cancel(), "a paused run can be cancelled"


gates: dict[str, threading.Event] = {}


@durable.step(name="under way", atomic=False)
def outside(name):
    return under_way(name)


@durable.step(name="under way")
def inside(name):
    return under_way(name)


def under_way(name):
    Ledger.objects.create(key=f"{name}: under way")
    if gates and not gates["go on"].is_set():
        gates["begun"].set()
        assert gates["go on"].wait(20)
    return "done"


@durable.workflow(name="tests.steering.busy")
def busy(name, atomic):
    do(f"{name}: before")
    result = (inside if atomic else outside)(name)
    if gates and atomic:
        # On SQLite nobody else gets to write before the step has committed.
        assert gates["struck"].wait(20)
    do(f"{name}: after")
    return result


@durable.workflow(name="tests.steering.busy_parent")
def busy_parent(name, atomic):
    return busy(name, atomic)


@pytest.fixture
def worker():
    """A worker in a thread, and the gates at which its run stops."""
    gates.update({name: threading.Event() for name in ("begun", "go on", "struck")})
    worker = Worker("default", concurrency=2)
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    yield worker
    gates["go on"].set()
    worker.stop()
    thread.join(timeout=20)
    assert not thread.is_alive()
    gates.clear()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("parent", [False, True], ids=["alone", "called by a parent"])
@pytest.mark.parametrize("how", ["pause", "cancel"])
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "outside"])
def test_stopped_while_a_step_is_under_way(worker, atomic, how, parent):
    """An atomic step is undone and done again; an outside call is recorded and not repeated; nothing else begins."""
    run = (busy_parent if parent else busy).using(run_id="r").start("busy", atomic)
    assert gates["begun"].wait(20)
    target = durable.get_run("r.1") if parent and how == "pause" else run
    undone = atomic and connection.features.has_select_for_update
    if undone:
        assert getattr(target, how)()
        gates["go on"].set()
    else:
        striker = threading.Thread(target=lambda: together(getattr(target, how)), daemon=True)
        striker.start()
        if not atomic:
            striker.join(20)
        # On SQLite the step is the only writer until it has committed.
        gates["go on"].set()
        striker.join(20)
    gates["struck"].set()
    wait_until(lambda: not worker.lease.active)
    stopped = "WAITING" if how == "pause" else "CANCELLED"
    assert target.status == stopped
    assert times("busy: after") == 0, "a step began behind the stop"
    assert times("busy: under way") == (0 if undone else 1)
    assert StepCheckpoint.objects.filter(name="under way").count() == (0 if undone else 1)

    assert target.resume()
    wait_until(lambda: run.status in FINISHED)
    assert run.result(0) == "done"
    assert [times(f"busy: {what}") for what in ("before", "under way", "after")] == [1, 1, 1]


@pytest.mark.django_db(transaction=True)
def test_a_parent_that_is_paused_while_it_executes_its_child_goes_on_behind_the_pause(worker):
    run = busy_parent.using(run_id="r").start("busy", False)
    assert gates["begun"].wait(20)
    assert run.pause()
    gates["go on"].set()
    child = durable.get_run("r.1")
    wait_until(lambda: child.status == "SUCCEEDED")
    wait_until(lambda: not worker.lease.active)
    assert (run.status, run.model.waiting_for) == ("WAITING", "resume")
    assert run.resume()
    wait_until(lambda: run.status in FINISHED)
    assert run.result(0) == "done"
    assert times("busy: under way") == 1


def test_a_step_pauses_its_own_run():
    @durable.step(name="call", atomic=False)
    def call():
        return durable.get_run(durable.current().run_id).pause()

    @durable.step(name="call inside")
    def call_inside():
        durable.get_run(durable.current().run_id).pause()

    @durable.workflow(name="tests.steering.self_pausing")
    def self_pausing():
        result = call()
        do("behind the pause")
        with pytest.raises(durable.InsideTransaction, match="atomic=False"):
            call_inside()
        return result

    run = self_pausing.start()
    run_until_idle()
    assert (run.status, run.model.waiting_for, times("behind the pause")) == ("WAITING", "resume", 0)
    run.resume()
    run_until_idle()
    assert run.result(0) is True


# -- Resume -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [*RunStatus])
def test_resume_is_for_runs_that_ended_badly(status):
    run = left_at(status)
    before = snapshot()
    resumable = status in ("FAILED", "CANCELLED", "DEAD")
    assert run.resume() is resumable
    if resumable:
        assert run.status == "PENDING"
        fields = ("finished_at", "error", "exception", "cancel_reason", "failures", "recoveries", "worker")
        assert [getattr(run.model, field) for field in fields] == [None, "", "", "", 0, 0, ""]
        run_until_idle()
        assert run.status == "SUCCEEDED"
        assert run.resume() is False
    else:
        assert snapshot() == before


def test_a_failed_run_goes_on_from_its_last_completed_step():
    broken.append(True)
    run = fragile.start("fragile")
    run_until_idle()
    with pytest.raises(ValueError, match="broken"):
        run.result(0)
    broken.clear()
    assert run.resume()
    run_until_idle()
    assert run.result(0) == "fragile ends"
    assert times("fragile begins") == times("fragile ends") == 1


def test_a_cancelled_tree_goes_on_as_a_tree():
    """What one cancel has stopped, one resume lets go on; what had been cancelled before stays so."""
    run = family.using(run_id="p").start(2)
    run_until_idle()
    durable.get_run("p.1.2").cancel("before")
    run.cancel("all")
    assert set(statuses()) == {"CANCELLED"}
    with CaptureQueriesContext(connection) as queries:
        assert run.resume()
    assert len(statements(queries)) <= 12
    assert dict(WorkflowRun.objects.values_list("pk", "status")) == {
        "p": "PENDING",
        "p.1": "PENDING",
        "p.1.1": "PENDING",
        "p.1.2": "CANCELLED",
        "p.2": "PENDING",
        "p.2.1": "PENDING",
        "p.2.2": "PENDING",
    }
    advance("2 hours")
    run_until_idle()
    with pytest.raises(durable.RunCancelled, match="before"):
        run.result(0)
    assert durable.get_run("p.2").result(0) == ["leaf", "leaf"]
    assert run.resume(), "and the one that keeps it from its result goes on when it is asked for again"
    run_until_idle()
    assert run.result(0) == [["leaf", "leaf"], ["leaf", "leaf"]]
    assert times("leaf begins") == times("leaf ends") == 4


def test_a_tree_that_ran_out_of_time_goes_on_with_all_of_it_again():
    run = family.using(run_id="p", timeout=60).start(1)
    run_until_idle()
    advance("61 seconds")
    run_until_idle()
    assert set(statuses()) == {"CANCELLED"}
    assert run.resume()
    run_until_idle()
    left = run.model.deadline - run.model.started_at
    assert left > timedelta(seconds=100), "the passed deadline has its length again"
    assert set(statuses()) == {"WAITING"}


def test_a_child_that_was_cancelled_alone_is_resumed_alone():
    run = family.using(run_id="p").start(1)
    run_until_idle()
    child = durable.get_run("p.1")
    child.cancel()
    assert child.resume()
    assert (child.status, durable.get_run("p.2").status) == ("PENDING", "WAITING")
    run_until_idle()
    assert run.status == "WAITING", "it was woken, looked, and waits again"
    advance("2 hours")
    run_until_idle()
    assert run.result(0) == ["leaf", "leaf"]


# -- Fork and restart ---------------------------------------------------------------------------------------------


def snapshot(run_id=None):
    """Everything that is stored, row by row; of one run, if it is named."""
    rows = []
    for model in (WorkflowRun, StepCheckpoint, Message, Event, StreamItem):
        found = model.objects.order_by("pk")
        if run_id is not None:
            found = found.filter(**{"pk" if model is WorkflowRun else "run": run_id})
        rows += [[getattr(row, field.attname) for field in model._meta.concrete_fields] for row in found]
    return rows


@durable.workflow(name="tests.steering.rich")
def rich():
    """Leaves a trace in every table."""
    do("one")
    child = echo.start("child's")
    durable.set_event("phase", "early")
    received = durable.receive("topic")
    result = child.result()
    durable.set_event("phase", "late")
    called = echo("called")
    do("last")
    return received, result, called


def finished_rich():
    run = rich.using(run_id="original", queue="heavy", priority=5, attributes={"shop": 7}).start()
    run.send("hello", "topic")
    run.send("unread", "topic")
    run_until_idle()
    assert run.result(0) == ("hello", "child's", "called")
    return run


@pytest.mark.parametrize("from_step", range(1, 10))
def test_a_fork_from_any_step_keeps_what_came_before_and_leaves_the_original_untouched(from_step):
    run = finished_rich()
    before = [snapshot(each) for each in ("original", "original.2", "original.7")]
    fork = run.fork(from_step=from_step)
    made = fork.model
    assert (made.forked_from_id, made.parent_id, made.status) == ("original", None, "PENDING")
    kept = ("workflow", "queue", "priority", "attributes", "input")
    assert [getattr(made, field) for field in kept] == [getattr(run.model, field) for field in kept]
    fields = ("position", "name", "kind", "status", "output", "started_at", "finished_at")
    original = list(run.model.steps.filter(position__lt=from_step).values_list(*fields))
    assert list(made.steps.values_list(*fields)) == original

    run_until_idle()
    if from_step <= 4:
        assert fork.model.waiting_for == "message:topic", "the messages are the original's"
        fork.send("to the fork", "topic")
        run_until_idle()
    assert fork.result(0) == ("hello" if from_step > 4 else "to the fork", "child's", "called")
    assert times("one") == (2 if from_step == 1 else 1)
    assert times("last") == (1 if from_step == 9 else 2)
    assert fork.get_event("phase", timeout=0) == "late", "kept, or published anew"
    assert [snapshot(each) for each in ("original", "original.2", "original.7")] == before
    # A child that the fork has started or called itself is its own.
    mine = {f"{fork.id}.{position}" for position in (2, 7) if position >= from_step}
    assert set(WorkflowRun.objects.filter(parent=fork.id).values_list("pk", flat=True)) == mine


def test_a_fork_has_the_events_of_the_steps_that_it_keeps():
    run = finished_rich()
    phases = [run.fork(from_step=step).get_event("phase", timeout=0, default="none") for step in (1, 3, 6, 7, 9)]
    # Of the earlier value nothing is left: it is published again behind step 6.
    assert phases == ["none", "none", "none", "late", "late"]


@pytest.mark.parametrize("from_step", [0, -1, 10, 10**9])
def test_a_fork_from_a_step_that_there_is_not_is_refused(from_step):
    run = finished_rich()
    count = WorkflowRun.objects.count()
    with pytest.raises(ValueError, match=r"from 1 to 9, found"):
        run.fork(from_step=from_step)
    assert WorkflowRun.objects.count() == count


@pytest.mark.parametrize("from_step", ["1", 1.0, True, None])
def test_a_fork_from_what_is_no_position_is_refused(from_step):
    with pytest.raises(TypeError, match="position"):
        echo.start().fork(from_step=from_step)


def test_a_fork_of_a_run_that_does_not_exist():
    for verb in (lambda run: run.fork(1), lambda run: run.restart()):
        with pytest.raises(durable.RunNotFound):
            verb(durable.RunHandle("never", "default"))


@pytest.mark.parametrize("status", [*RunStatus])
def test_a_run_of_any_status_can_be_forked_and_restarted(status):
    run = left_at(status)
    before = snapshot(run.id)
    again, fork = run.restart(), run.fork(from_step=1)
    assert snapshot(run.id) == before
    assert [each.model.forked_from_id for each in (again, fork)] == [run.id, run.id]
    assert [(each.status, each.model.attempt, each.model.steps.count()) for each in (again, fork)] == [
        ("PENDING", 0, 0)
    ] * 2
    again.cancel()
    run_until_idle()
    if status == RunStatus.WAITING:
        advance("2 hours")
        run_until_idle()
    assert fork.status == "SUCCEEDED"


def test_a_fork_of_a_running_run_goes_its_own_way():
    run = checkout.start("forked")
    with crash_after("reserve"):
        run_until_idle()
    assert run.status == "RUNNING"
    fork = run.fork(from_step=2)
    run_until_idle()
    assert run.result(0) == fork.result(0)
    assert ledger_of("forked") == [1, 2, 2]
    assert run.model.recoveries == 1
    assert fork.model.recoveries == 0


def test_a_fork_of_a_run_that_waits_begins_that_wait_anew():
    run = sleeper.start("w", 3600)
    run_until_idle()
    advance("50 minutes")
    fork = run.fork(from_step=2)
    run_until_idle()
    advance("11 minutes")
    run_until_idle()
    assert (run.status, fork.status) == ("SUCCEEDED", "WAITING")
    advance("50 minutes")
    run_until_idle()
    assert fork.result(0) == "w"


def test_a_fork_of_a_fork():
    run = finished_rich()
    fork = run.fork(from_step=6).fork(from_step=6)
    run_until_idle()
    assert fork.result(0) == ("hello", "child's", "called")
    assert WorkflowRun.objects.get(pk=fork.model.forked_from_id).forked_from_id == "original"


@durable.step(name="there", using="other")
def there(what):
    Ledger.objects.using("other").create(key=what)
    return f"{what} there"


@pytest.mark.django_db(databases=["default", "other"])
@pytest.mark.parametrize(("from_step", "again"), [(1, 1), (2, 1), (3, 0)])
def test_a_fork_keeps_the_outcomes_of_steps_in_another_database(from_step, again):
    @durable.workflow(name="tests.steering.two_databases")
    def two_databases():
        return do("here"), there("far"), do("here too")

    run = two_databases.start()
    run_until_idle()
    elsewhere = list(StepCheckpoint.objects.using("other").values())
    fork = run.fork(from_step=from_step)
    with crash_before("do") if from_step != 2 else crash_after("there"):
        run_until_idle()
    run_until_idle()
    assert fork.result(0) == ("here", "far there", "here too")
    assert StepCheckpoint.objects.using("other").filter(run=fork.id).count() == again
    assert list(StepCheckpoint.objects.using("other").filter(run=run.id).values()) == elsewhere


def test_a_handle_follows_no_fork():
    run = finished_rich()
    fork = run.restart()
    assert fork.id != run.id
    assert run.status == "SUCCEEDED"


# -- What it costs ------------------------------------------------------------------------------------------------


@durable.workflow(name="tests.steering.parent_of")
def parent_of(number, how):
    for _ in range(number):
        if how == "start":
            echo.start()
        elif how == "call":
            echo()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("how", "verbs", "commits_each"),
    [
        # The child, and the checkpoint that names it.
        ("start", ["INSERT", "INSERT"], 1),
        # Those; the child's end; and its outcome in place of what waited for it.
        ("call", ["INSERT", "INSERT", "UPDATE", "DELETE", "INSERT"], 3),
    ],
)
def test_what_a_child_costs_its_parent(how, verbs, commits_each):
    found = []
    for number in (0, 10):
        run = parent_of.start(number, how)
        lease = Lease("default", "worker", stored=False)
        with CaptureQueriesContext(connection) as queries:
            for claim in claims.claim(lease, 1, run_id=run.id):
                execute(claim, lease)
        found.append(([sql.split()[0] for sql in statements(queries)], commits(queries)))
    (none, commits_of_none), (ten, commits_of_ten) = found
    # All but the end of the parent itself.
    assert ten == [*none[:-1], *verbs * 10, none[-1]]
    assert commits_of_ten - commits_of_none == 10 * commits_each


@pytest.mark.django_db(transaction=True)
def test_an_end_is_one_statement_unless_somebody_waits_for_it():
    with CaptureQueriesContext(connection) as queries:
        echo.start()
        run_until_idle()
    ends = [query["sql"] for query in queries if query["sql"].startswith("UPDATE") and "finished_at" in query["sql"]]
    assert len(ends) == 1

    child = sleeper.start("awaited", 60)
    other = sleeper.start("nobody's", 60)

    @durable.workflow(name="tests.steering.awaiting")
    def awaiting(handle):
        return handle.result()

    awaiting.start(child)
    run_until_idle()
    advance("61 seconds")
    with CaptureQueriesContext(connection) as queries:
        run_until_idle()
    updates = [query["sql"] for query in queries if "SUCCEEDED" in query["sql"] and query["sql"].startswith("UPDATE")]
    of = {run.id: [sql for sql in updates if run.id in sql] for run in (child, other)}
    assert len(of[other.id]) == 1
    # The first one met the mark and changed nothing; the second woke who waits.
    assert len(of[child.id]) == 2


# -- The page about it --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_registry")
def test_the_pages_examples_do_what_they_say():
    run_examples("docs/how-to/cancel-pause-fork.md")
