"""`patched`: the code changes, and every run that is under way keeps the course that it has begun."""

import asyncio

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

import django_durable as durable
from django_durable.models import StepCheckpoint
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.models import Ledger

pytestmark = pytest.mark.django_db

# The code of the day.
code = {}
seen = []


@pytest.fixture(autouse=True)
def before_the_change():
    seen.clear()
    code["body"] = old


def step(name):
    return durable.run_step(name, seen.append, name)


def old():
    step("first")
    durable.receive("go")
    step("last")
    return "old"


def new():
    """A step more, behind the first."""
    step("first")
    if durable.patched("check"):
        step("check")
    durable.receive("go")
    step("last")
    return "new" if durable.patched("check") else "old"


def without_the_old_course():
    """The patch has done its work, and its call is gone."""
    step("first")
    step("check")
    durable.receive("go")
    step("last")
    return "newest"


@durable.workflow(name="tests.patches.flow")
def flow():
    return code["body"]()


def finish(run):
    run.send(1, "go")
    run_until_idle()
    return run.result(0)


def names(run):
    return [step.name for step in run.model.steps.all()]


# -- Which runs take it ---------------------------------------------------------------------------------------------


def test_a_new_run_takes_the_change_and_marks_it_once():
    code["body"] = new
    run = flow.start()
    run_until_idle()
    assert finish(run) == "new"
    assert names(run) == ["first", "patch check", "check", "receive go", "last"]
    assert [each.kind for each in run.model.steps.all()] == ["step", "patch", "step", "receive", "step"]


def test_a_run_that_was_past_the_point_keeps_its_course():
    run = flow.start()
    run_until_idle()
    assert run.status == "WAITING"
    code["body"] = new
    assert finish(run) == "old"
    assert names(run) == ["first", "receive go", "last"]


def test_a_run_that_was_parked_right_before_the_point_takes_the_change():
    def waits_first():
        durable.sleep(60)
        step("last")

    def patched_behind_the_sleep():
        durable.sleep(60)
        if durable.patched("check"):
            step("check")
        step("last")

    code["body"] = waits_first
    run = flow.start()
    run_until_idle()
    assert run.model.waiting_for == "sleep"
    code["body"] = patched_behind_the_sleep
    advance("2 minutes")
    run_until_idle()
    assert seen == ["check", "last"]


def test_a_run_that_waits_at_the_point_is_past_it():
    """Its wait has begun: a step in front of it would be another history."""

    def waits():
        durable.receive("go")

    def patched_before():
        if durable.patched("check"):
            step("check")
        durable.receive("go")

    code["body"] = waits
    run = flow.start()
    run_until_idle()
    code["body"] = patched_before
    finish(run)
    assert seen == []


def test_a_run_that_was_not_executed_yet_takes_the_change():
    run = flow.start()
    run.pause()
    code["body"] = new
    run.resume()
    run_until_idle()
    assert finish(run) == "new"


def test_a_crash_behind_the_mark_keeps_the_answer():
    code["body"] = new
    run = flow.start()
    with crash_after("patch check"):
        run_until_idle()
    run_until_idle()
    assert finish(run) == "new"
    assert names(run).count("patch check") == 1


def test_a_crash_before_the_mark_leaves_the_question_open():
    code["body"] = new
    run = flow.start()
    with crash_before("patch check"):
        run_until_idle()
    code["body"] = old
    run_until_idle()
    assert finish(run) == "old"


def test_in_a_loop_the_whole_run_keeps_its_first_answer():
    def loop():
        for _ in range(3):
            step("work")
            durable.receive("go")

    def patched_loop():
        for _ in range(3):
            if durable.patched("check"):
                step("check")
            step("work")
            durable.receive("go")

    code["body"] = loop
    begun = flow.start()
    run_until_idle()
    code["body"] = patched_loop
    fresh = flow.start()
    for _ in range(3):
        run_until_idle()
        begun.send(1, "go")
        fresh.send(1, "go")
    run_until_idle()
    assert names(begun) == ["work", "receive go"] * 3
    assert names(fresh) == ["patch check", *["check", "work", "receive go"] * 3]


def test_a_failed_run_that_is_resumed_keeps_its_course():
    def fails():
        step("first")
        durable.run_step("broken", int, "x")

    def mended():
        step("first")
        if durable.patched("mended"):
            step("another way")
        else:
            durable.run_step("broken", int, "7")

    code["body"] = fails
    run = flow.start()
    run_until_idle()
    code["body"] = mended
    run.resume()
    run_until_idle()
    assert run.status == "SUCCEEDED"
    # From the first step on it may go the other way, as a fork.
    fork = run.fork(from_step=2)
    run_until_idle()
    assert names(fork) == ["first", "patch mended", "another way"]


def test_beside_parallel_steps_the_point_is_where_the_code_has_come_to():
    """The second of three parallel steps had no outcome yet, the third had."""

    @durable.step(name="beside", atomic=False)
    def beside(number):
        Ledger.objects.create(key=f"beside {number}")

    def three():
        for future in [beside.submit(number) for number in range(3)]:
            future.result()

    def patched_between():
        first = beside.submit(0)
        if durable.patched("check"):
            step("check")
        for future in [first, beside.submit(1), beside.submit(2)]:
            future.result()

    code["body"] = three
    run = flow.start()
    with crash_after("beside"):
        run_until_idle()
    row = StepCheckpoint.objects.get(run=run.id)
    # As if the third had been faster than the first two.
    StepCheckpoint.objects.filter(run=run.id).delete()
    row.position = 3
    row.save(force_insert=True)
    code["body"] = patched_between
    run_until_idle()
    assert names(run) == ["beside"] * 3
    assert seen == []


# -- Forks ----------------------------------------------------------------------------------------------------------


def test_a_fork_keeps_the_course_of_the_steps_that_it_keeps():
    run = flow.start()
    run_until_idle()
    finish(run)
    code["body"] = new
    behind, before = run.fork(from_step=3), run.fork(from_step=2)
    run_until_idle()
    assert behind.result(0) == "old"
    assert finish(before) == "new"
    assert names(before) == ["first", "patch check", "check", "receive go", "last"]


def test_a_fork_of_a_run_with_the_mark_has_it_too():
    code["body"] = new
    run = flow.start()
    run_until_idle()
    finish(run)
    fork = run.fork(from_step=5)
    run_until_idle()
    assert fork.result(0) == "new"
    assert names(fork) == names(run)


# -- Several, and their end -----------------------------------------------------------------------------------------


def test_two_patches_at_one_point():
    def both():
        answers = durable.patched("one"), durable.patched("two")
        durable.receive("go")
        return answers

    code["body"] = both
    run = flow.start()
    with crash_after("patch one"):
        run_until_idle()
    run_until_idle()
    assert finish(run) == (True, True)
    assert names(run) == ["patch one", "patch two", "receive go"]


def test_a_second_patch_in_front_of_the_first():
    def second():
        step("first")
        if durable.patched("another"):
            step("another")
        if durable.patched("check"):
            step("check")
        durable.receive("go")
        step("last")

    code["body"] = new
    run = flow.start()
    run_until_idle()
    code["body"] = second
    finish(run)
    assert names(run) == ["first", "patch check", "check", "receive go", "last"]


def test_the_call_can_go_when_no_run_is_left_that_had_begun_without_it():
    code["body"] = new
    run = flow.start()
    run_until_idle()
    code["body"] = without_the_old_course
    assert finish(run) == "newest"
    assert seen == ["first", "check", "last"]


def test_a_mark_that_is_the_last_thing_of_a_history_is_not_missed():
    def ends_with_it():
        step("first")
        durable.receive("go")
        return durable.patched("check")

    code["body"] = ends_with_it
    run = flow.start()
    run_until_idle()
    run.send(1, "go")
    with crash_after("patch check"):
        run_until_idle()
    code["body"] = lambda: (step("first"), durable.receive("go"), "gone")[2]
    run_until_idle()
    assert run.result(0) == "gone"


def test_without_a_patch_the_same_change_sets_the_run_aside():
    """What patched() is for."""
    run = flow.start()
    run_until_idle()
    code["body"] = without_the_old_course
    run.send(1, "go")
    run_until_idle()
    assert run.status == "DEAD"


def test_it_costs_one_record_in_a_new_run_and_no_query_later():
    def asks_often():
        first = durable.patched("check")
        with CaptureQueriesContext(connection) as queries:
            return [first, *(durable.patched("check") for _ in range(5))], len(queries)

    code["body"] = asks_often
    assert flow() == ([True] * 6, 0)
    assert StepCheckpoint.objects.count() == 1


def test_it_belongs_to_a_workflow():
    with pytest.raises(durable.NotInWorkflow):
        durable.patched("check")
    code["body"] = lambda: durable.run_step("inside", durable.patched, "check")
    with pytest.raises(durable.NotInWorkflow, match="inside a step"):
        flow()
    code["body"] = lambda: durable.patched("")
    with pytest.raises(ValueError, match="1 to 200 characters"):
        flow()


# -- Async ----------------------------------------------------------------------------------------------------------


@durable.workflow(name="tests.patches.async")
async def async_flow():
    return await code["body"]()


async def note(name):
    await durable.arun_step(name, seen.append, name)


def test_an_async_workflow_takes_the_change_too():
    async def before():
        await note("first")
        await durable.areceive("go")
        await note("last")

    async def behind():
        await note("first")
        if await durable.apatched("check"):
            await note("check")
        await durable.areceive("go")
        await note("last")
        return await durable.apatched("check")

    code["body"] = before
    begun = async_flow.start()
    run_until_idle()
    code["body"] = behind
    fresh = async_flow.start()
    with crash_after("patch check"):
        run_until_idle()
    run_until_idle()
    assert finish(begun) is False
    assert finish(fresh) is True
    assert names(begun) == ["first", "receive go", "last"]
    assert names(fresh) == ["first", "patch check", "check", "receive go", "last"]


def test_beside_other_calls_an_async_mark_is_shown_in_its_turn():
    async def branch(name):
        await note(f"{name} begins")
        taken = await durable.apatched(name)
        await durable.areceive(name)
        await note(f"{name} ends")
        return taken

    async def several():
        return await asyncio.gather(branch("one"), branch("two"), branch("three"))

    code["body"] = several
    run = async_flow.start()
    with crash_after("patch two"):
        run_until_idle()
    run_until_idle()
    for name in ("two", "three", "one"):
        run.send(1, name)
        advance("10 seconds")
        run_until_idle()
    assert run.result(0) == [True, True, True]
    assert sorted(names(run)) == sorted(
        f"{word}{name}{end}"
        for name in ("one", "two", "three")
        for word, end in (("", " begins"), ("patch ", ""), ("receive ", ""), ("", " ends"))
    )
