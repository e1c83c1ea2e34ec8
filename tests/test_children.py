"""Child runs: started, called and awaited by their parent, exactly once, whatever dies in between."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from django.db import connections

import django_durable as durable
from django_durable.exceptions import Crash
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from django_durable.worker.loop import Worker
from tests.app.models import Ledger
from tests.app.workflows import times
from tests.docs.test_reference import own_registry, run_examples  # noqa: F401 (a fixture)

pytestmark = pytest.mark.django_db

# What a test lets happen: "<name>" fails so often yet.
failures: dict[str, int] = {}


@pytest.fixture(autouse=True)
def all_goes_well():
    failures.clear()


class OutOfStock(Exception):
    def __init__(self, item, missing):
        super().__init__(item, missing)
        self.missing = missing


def may_fail(what):
    if failures.get(what, 0):
        failures[what] -= 1
        raise OutOfStock(what, 3)


@durable.step(name="do")
def do(what):
    may_fail(what)
    Ledger.objects.create(key=what)
    return what


@durable.workflow(name="tests.children.part")
def part(what, wait=0):
    do(f"{what} begins")
    if wait:
        durable.sleep(wait)
    do(f"{what} ends")
    return {"part": what}


@durable.workflow(name="tests.children.other_part")
def other_part(what):
    return ["other", do(what)]


@durable.workflow(name="tests.children.starting")
def starting(wait=0):
    handle = part.start("started", wait)
    do("between")
    return handle.id, handle.result()


@durable.workflow(name="tests.children.calling")
def calling(wait=0):
    result = part("called", wait)
    do("behind")
    return result


def children_of(run):
    return list(WorkflowRun.objects.filter(parent=run.id).order_by("created_at").values_list("pk", flat=True))


def story(run):
    return [(step.position, step.name, step.kind, step.status) for step in run.model.steps.all()]


def drain(minutes=1):
    """Execute all there is, and what would be due in a few minutes."""
    run_until_idle()
    for _ in range(minutes):
        advance("1 minute")
        run_until_idle()


# -- Ids --------------------------------------------------------------------------------------------------------


def test_a_childs_id_comes_from_its_parents_and_the_place_of_the_call():
    run = starting.using(run_id="order-7").start()
    run_until_idle()
    assert run.result(0) == ("order-7.1", {"part": "started"})
    assert children_of(run) == ["order-7.1"]
    assert story(run) == [
        (1, "start tests.children.part", "child", "SUCCEEDED"),
        (2, "do", "atomic", "SUCCEEDED"),
        (3, "result order-7.1", "wait", "SUCCEEDED"),
    ]


def test_a_called_child_is_a_run_of_its_own():
    run = calling.using(run_id="order-7").start()
    assert run_until_idle() == 1, "it was executed where it was called"
    assert run.result(0) == {"part": "called"}
    child = durable.get_run("order-7.1").model
    assert (child.parent_id, child.status, child.attempt) == ("order-7", "SUCCEEDED", 1)
    assert child.steps.count() == 2
    assert story(run) == [(1, "tests.children.part", "child", "SUCCEEDED"), (2, "do", "atomic", "SUCCEEDED")]


@pytest.mark.parametrize("length", [190, 199, 200])
def test_a_long_parents_child_has_an_id_that_fits_and_is_its_own(length):
    ids = {}
    for letter in "ab":
        # They differ at the end alone: a part that is cut off there would make them the same.
        parent = starting.using(run_id="x" * (length - 1) + letter).start()
        run_until_idle()
        ids[letter], _ = parent.result(0)
        assert children_of(parent) == [ids[letter]]
    assert len(set(ids.values())) == 2
    assert all(len(each) <= 200 for each in ids.values())


def test_a_long_grandchild_has_an_id_that_fits():
    @durable.workflow(name="tests.children.nested_once")
    def nested_once(depth):
        return nested_once(depth - 1) if depth else durable.current().run_id

    last = nested_once.using(run_id="x" * 200)(12)
    assert len(last) <= 200
    assert WorkflowRun.objects.count() == 13


@durable.workflow(name="tests.children.two_courses", max_attempts=2, retry_delay=0)
def two_courses():
    try:
        do("first try")
    except OutOfStock:
        other_part.start("clean up")
        raise
    return part.start("main").id


def test_a_parent_that_takes_another_course_gets_a_new_child_and_leaves_the_old_one_alone():
    failures["first try"] = 1
    run = two_courses.using(run_id="p").start()
    run_until_idle()
    assert run.result(0) == "p.2-2"
    assert children_of(run) == ["p.2", "p.2-2"]
    assert times("clean up") == times("main ends") == 1
    assert durable.get_run("p.2").result(0) == ["other", "clean up"]


def test_the_new_course_keeps_its_child_over_a_crash():
    failures["first try"] = 1
    run = two_courses.using(run_id="p").start()
    with crash_before("do"):
        run_until_idle()
    run_until_idle()
    assert run.result(0) == "p.2-2"
    assert children_of(run) == ["p.2", "p.2-2"]


def test_a_child_with_an_id_of_the_callers_choice():
    @durable.workflow(name="tests.children.chosen")
    def chosen():
        return other_part.using(run_id="invoice-7")("a"), other_part.using(run_id="invoice-7").start("b").result()

    run = chosen.start()
    run_until_idle()
    assert run.result(0) == (["other", "a"], ["other", "a"])
    assert times("a") == 1
    assert times("b") == 0
    assert children_of(run) == ["invoice-7"]


def test_the_id_of_another_workflows_run_is_refused_in_a_body_too():
    part.using(run_id="taken").start("x")

    @durable.workflow(name="tests.children.clashing")
    def clashing():
        with pytest.raises(durable.RunIdInUse):
            other_part.using(run_id="taken").start("y")
        with pytest.raises(durable.RunIdInUse):
            other_part.using(run_id="taken")("y")
        return "refused"

    assert clashing() == "refused"
    assert times("y") == 0


# -- Handles ----------------------------------------------------------------------------------------------------


def test_a_handle_is_passed_to_a_child_and_returned_from_it():
    @durable.workflow(name="tests.children.messenger")
    def messenger(handle):
        return handle, handle.result()["part"]

    @durable.workflow(name="tests.children.introducing")
    def introducing():
        first = part.start("first", wait=60)
        again, what = messenger(first)
        assert again == first
        return again, what, again.result()

    run = introducing.start()
    drain()
    handle, what, result = run.result(0)
    assert (handle.status, what, result) == ("SUCCEEDED", "first", {"part": "first"})
    assert times("first ends") == 1


def test_a_child_may_wait_for_its_sister():
    @durable.workflow(name="tests.children.second")
    def second(first):
        return durable.wait([first]).done == [first] and other_part(f"behind {first.result()['part']}")

    @durable.workflow(name="tests.children.sisters")
    def sisters():
        return second.start(part.start("first", wait=60)).result()

    run = sisters.start()
    drain()
    assert run.result(0) == ["other", "behind first"]


# -- One commit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash", [crash_before, crash_after])
@pytest.mark.parametrize(
    ("workflow", "step"),
    [
        (starting, "start tests.children.part"),
        (starting, "result p.1"),
        (calling, "tests.children.part"),
        (starting, "do"),
        (calling, "do"),
    ],
)
@pytest.mark.parametrize("wait", [0, 60])
def test_a_crash_around_a_childs_checkpoint_changes_nothing(crash, workflow, step, wait):
    run = workflow.using(run_id="p").start(wait)
    with crash(step):
        run_until_idle()
        if wait:
            advance("61 seconds")
            run_until_idle()
    drain(2)
    assert run.status == "SUCCEEDED"
    assert children_of(run) == ["p.1"]
    rows = list(Ledger.objects.values_list("key", flat=True))
    assert len(rows) == len(set(rows)) == 3, "each step of both took effect once"


def test_a_child_is_not_stored_if_its_parent_was_cancelled_meanwhile():
    @durable.step(name="cancel own", atomic=False)
    def cancel_own():
        durable.get_run(durable.current().run_id).cancel("enough")

    @durable.workflow(name="tests.children.cancelled_parent")
    def cancelled_parent(how):
        cancel_own()
        return part("late") if how == "call" else part.start("late")

    for how in ("call", "start"):
        run = cancelled_parent.start(how)
        run_until_idle()
        assert run.status == "CANCELLED"
        assert children_of(run) == []


# -- Waiting ----------------------------------------------------------------------------------------------------


def test_a_parent_waits_as_long_as_its_called_child():
    run = calling.using(run_id="p").start(wait=60)
    assert run_until_idle() == 1
    assert (run.status, run.model.waiting_for) == ("WAITING", "run:p.1")
    child = durable.get_run("p.1")
    assert (child.status, child.model.waiting_for) == ("WAITING", "sleep")
    advance("61 seconds")
    run_until_idle()
    assert run.result(0) == {"part": "called"}
    assert child.result(0) == {"part": "called"}
    assert [times(f"called {moment}") for moment in ("begins", "ends")] == [1, 1]


def test_a_parent_whose_child_was_called_by_nobody_else_executes_it_after_its_own_crash():
    run = calling.using(run_id="p").start()
    with crash_before("do"):
        run_until_idle()
    assert [run.status, durable.get_run("p.1").status] == ["RUNNING", "RUNNING"]
    run_until_idle()
    assert run.result(0) == {"part": "called"}
    assert times("called begins") == times("called ends") == times("behind") == 1


def test_in_a_direct_call_the_tree_is_executed_here_without_any_worker():
    assert calling() == {"part": "called"}
    assert starting.using(run_id="p")()[1] == {"part": "started"}
    assert calling.using(run_id="slow")(wait=3 * 86400) == {"part": "called"}
    assert starting.using(run_id="slow start")(wait=3 * 86400)[1] == {"part": "started"}
    assert not WorkflowRun.objects.exclude(status="SUCCEEDED").exists()


@pytest.mark.django_db(transaction=True)
def test_a_direct_call_executes_started_children_if_no_worker_does():
    identity, result = starting.using(run_id="p")()
    assert result == {"part": "started"}
    assert durable.get_run(identity).model.parent_id == "p"


@durable.workflow(name="tests.children.tree")
def tree(depth, how):
    if depth == 0:
        return do(durable.current().run_id)
    children = [tree.start(depth - 1, how), tree.start(depth - 1, how)] if how == "start" else []
    called = tree(depth - 1, how) if how == "call" else None
    return [child.result() for child in children] or [called]


def flat(value):
    return [each for item in value for each in flat(item)] if isinstance(value, list) else [value]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("how", ["start", "call"])
def test_a_tree_of_depth_five_needs_one_thread(how):
    run = tree.start(5, how)
    ended = threading.Event()

    def work():
        Worker("default", concurrency=1, burst=True).run()
        ended.set()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(timeout=60)
    assert ended.is_set(), "parents keep the only thread from their children"
    leaves = flat(run.result(0))
    assert len(leaves) == len(set(leaves)) == (32 if how == "start" else 1)
    assert all(times(leaf) == 1 for leaf in leaves)


# -- Errors -----------------------------------------------------------------------------------------------------


@durable.workflow(name="tests.children.catching")
def catching(how, wait=0):
    try:
        return part("doomed", wait) if how == "call" else part.start("doomed", wait).result()
    except OutOfStock as error:
        durable.run_step("note", do.func, "caught")
        return type(error).__name__, error.args, error.missing


@pytest.mark.parametrize("wait", [0, 60])
@pytest.mark.parametrize("how", ["call", "start"])
def test_a_childs_error_reaches_its_parent_with_class_and_args_and_on_replay_too(how, wait):
    failures["doomed ends"] = 1
    run = catching.start(how, wait)
    # The parent dies behind the error that it has caught, and sees it again from its own history.
    with crash_after("note"):
        drain(2)
    drain()
    assert run.result(0) == ("OutOfStock", ("doomed ends", 3), 3)
    assert times("doomed begins") == times("caught") == 1


@durable.workflow(name="tests.children.trying_again", max_attempts=2, retry_delay=0)
def trying_again(how):
    do("parent begins")
    result = part("fragile") if how == "call" else part.start("fragile").result()
    do("parent ends")
    return result


@pytest.mark.parametrize("how", ["call", "start"])
def test_a_parent_that_is_retried_lets_its_failed_child_go_on_from_its_last_completed_step(how):
    failures["fragile ends"] = 1
    run = trying_again.using(run_id="p").start(how)
    drain()
    assert run.result(0) == {"part": "fragile"}
    assert (run.model.failures, run.model.attempt > 1) == (1, True)
    assert len(children_of(run)) == 1
    keys = ["parent begins", "fragile begins", "fragile ends", "parent ends"]
    assert [times(key) for key in keys] == [1, 1, 1, 1]


@pytest.mark.parametrize("how", ["call", "start"])
def test_a_failed_parent_that_is_resumed_lets_its_failed_child_go_on(how):
    failures["fragile ends"] = 2
    run = trying_again.using(run_id="p").start(how)
    drain()
    assert run.status == "FAILED"
    assert run.resume()
    assert WorkflowRun.objects.get(parent=run.id).status == "PENDING", "both go on in one commit"
    drain()
    assert run.result(0) == {"part": "fragile"}
    keys = ["parent begins", "fragile begins", "fragile ends", "parent ends"]
    assert [times(key) for key in keys] == [1, 1, 1, 1]


def test_a_whole_line_of_failed_descendants_goes_on():
    failures["leaf ends"] = 1

    @durable.workflow(name="tests.children.line")
    def line(depth):
        return line(depth - 1) if depth else part("leaf")

    run = line.start(3)
    drain()
    assert set(WorkflowRun.objects.values_list("status", flat=True)) == {"FAILED"}
    assert run.resume()
    drain()
    assert run.result(0) == {"part": "leaf"}
    assert times("leaf begins") == times("leaf ends") == 1
    assert set(WorkflowRun.objects.values_list("status", flat=True)) == {"SUCCEEDED"}


@durable.workflow(name="tests.children.persistent", max_attempts=3, retry_delay=0)
def persistent():
    return part.start("steered", wait=60).result()


def test_what_a_person_has_cancelled_no_parents_retry_lets_go_on():
    run = persistent.using(run_id="p").start()
    run_until_idle()
    child = durable.get_run("p.1")
    assert child.cancel("not any more")
    drain(3)
    assert child.status == "CANCELLED"
    with pytest.raises(durable.RunCancelled, match=r"p\.1 was cancelled \(not any more\)"):
        run.result(0)
    assert run.model.failures == 3
    assert times("steered ends") == 0


def test_a_person_who_resumes_the_parent_means_its_cancelled_child_too():
    run = persistent.using(run_id="p").start()
    run_until_idle()
    durable.get_run("p.1").cancel()
    drain(3)
    assert run.status == "FAILED"
    assert run.resume()
    drain(2)
    assert run.result(0) == {"part": "steered"}


@durable.workflow(name="tests.children.fatal", max_recoveries=0)
def fatal():
    do("fatal")


@durable.workflow(name="tests.children.mourning", max_attempts=2, retry_delay=0)
def mourning():
    return fatal.start().result()


def test_a_dead_child_is_its_parents_run_dead_and_stays_dead_until_a_person_acts():
    run = mourning.using(run_id="p").start()
    with crash_before("do"):
        run_until_idle()
    run_until_idle()
    child = durable.get_run("p.1")
    assert child.status == "DEAD"
    with pytest.raises(durable.RunDead, match=r"p\.1"):
        run.result(0)
    assert run.model.failures == 2
    assert run.resume()
    drain()
    assert (run.status, child.status) == ("SUCCEEDED", "SUCCEEDED")


def test_the_parent_of_a_cancelled_child_sees_it_and_may_go_on():
    @durable.workflow(name="tests.children.forgiving")
    def forgiving():
        try:
            return part("unwanted", wait=60)
        except durable.RunCancelled as error:
            return error.run_id, error.reason

    run = forgiving.using(run_id="p").start()
    run_until_idle()
    durable.get_run("p.1").cancel("sold out")
    assert run.status == "PENDING", "it was woken in the transaction of the cancel"
    run_until_idle()
    assert run.result(0) == ("p.1", "sold out")


# -- result(timeout) --------------------------------------------------------------------------------------------


@durable.workflow(name="tests.children.impatient")
def impatient(seconds):
    child = part.start("slow", wait=86400)
    try:
        child.result(timeout=seconds)
    except TimeoutError as error:
        do("too late")
        durable.sleep(60)
        return str(error)


@pytest.mark.parametrize("seconds", [0, 0.5, 30])
def test_a_result_that_does_not_come_in_time_is_a_timeout_error_and_stays_one(seconds):
    run = impatient.using(run_id="p").start(seconds)
    run_until_idle()
    if seconds == 30:
        assert run.status == "WAITING"
        advance("31 seconds")
        run_until_idle()
    # Woken a day later, when the child has ended: what it saw is what it sees.
    advance("25 hours")
    run_until_idle()
    assert run.result(0) == f"Run p.1 has not ended after {seconds:g} s."
    assert durable.get_run("p.1").status == "SUCCEEDED"
    assert times("too late") == 1


def test_a_parent_retried_for_a_timeout_waits_anew():
    @durable.workflow(name="tests.children.waiting_anew", max_attempts=2, retry_delay=0)
    def waiting_anew():
        return part.start("slow", wait=50).result(timeout=30)

    run = waiting_anew.start()
    run_until_idle()
    advance("31 seconds")
    run_until_idle()
    assert (run.status, run.model.failures) == ("WAITING", 1)
    advance("20 seconds")
    run_until_idle()
    assert run.result(0) == {"part": "slow"}


# -- Deadlines --------------------------------------------------------------------------------------------------


@durable.workflow(name="tests.children.limited", timeout=100)
def limited(how, own=None):
    durable.sleep(40)
    child = part.using(timeout=own)
    return child("late", wait=86400) if how == "call" else child.start("late", wait=86400).result()


@pytest.mark.parametrize("how", ["call", "start"])
def test_a_child_has_what_is_left_of_its_parents_time(how):
    run = limited.using(run_id="p").start(how)
    run_until_idle()
    advance("41 seconds")
    run_until_idle()
    child = durable.get_run("p.2")
    assert child.model.deadline == run.model.deadline
    advance("55 seconds")
    run_until_idle()
    assert (run.status, child.status) == ("WAITING", "WAITING")
    advance("5 seconds")
    run_until_idle()
    assert {(run.status, run.model.cancel_reason), (child.status, child.model.cancel_reason)} == {
        ("CANCELLED", "timeout")
    }


@pytest.mark.parametrize("how", ["call", "start"])
@pytest.mark.parametrize(("own", "sooner"), [(10, True), (1000, False)])
def test_of_a_childs_own_timeout_and_what_is_left_the_shorter_one_counts(how, own, sooner):
    run = limited.using(run_id="p").start(how, own)
    run_until_idle()
    advance("41 seconds")
    run_until_idle()
    child = durable.get_run("p.2").model
    assert (child.deadline < run.model.deadline) is sooner
    if sooner:
        assert child.deadline - child.started_at == timedelta(seconds=10)
        advance("11 seconds")
        run_until_idle()
        with pytest.raises(durable.RunCancelled, match="timeout"):
            run.result(0)
        assert run.status == "FAILED"


# -- Another database -------------------------------------------------------------------------------------------


@durable.workflow(name="tests.children.far", timeout=1000)
def far(how):
    child = other_part.using(database="other")
    if how == "call":
        return child("there")
    handle = child.start("there")
    assert handle.database == "other"
    return handle.result()


def in_both_databases():
    for _ in range(3):
        run_until_idle()
        run_until_idle("other")
        # Nobody tells a run of an end in another database: it looks every few seconds.
        advance("6 seconds")
    run_until_idle()


@pytest.mark.django_db(databases=["default", "other"])
@pytest.mark.parametrize("how", ["call", "start"])
def test_a_child_in_another_database_is_executed_there(how):
    run = far.using(run_id="p").start(how)
    in_both_databases()
    assert run.result(0) == ["other", "there"]
    child = WorkflowRun.objects.using("other").get()
    assert (child.pk, child.parent_id) == ("p.1", None)
    assert child.deadline == run.model.deadline
    assert WorkflowRun.objects.using("default").count() == 1
    assert times("there") == 1


@pytest.mark.django_db(databases=["default", "other"])
@pytest.mark.parametrize(
    ("how", "step"), [("call", "tests.children.other_part"), ("start", "start tests.children.other_part")]
)
def test_a_crash_between_the_two_databases_starts_no_second_child(how, step):
    run = far.using(run_id="p").start(how)

    def dies(execute, sql, params, many, context):
        answer = execute(sql, params, many, context)
        if sql.startswith("INSERT") and "workflowrun" in sql:
            raise Crash("between the two commits")
        return answer

    with connections["other"].execute_wrapper(dies), pytest.raises(Crash):
        run_until_idle()
    assert (StepCheckpoint.objects.count(), WorkflowRun.objects.using("other").count()) == (0, 1)
    in_both_databases()
    assert run.result(0) == ["other", "there"]
    assert WorkflowRun.objects.using("other").count() == 1


# -- The page about it ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_registry")
def test_the_pages_examples_do_what_they_say():
    run_examples("docs/how-to/child-runs.md")
