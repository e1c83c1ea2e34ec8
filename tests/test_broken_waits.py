"""Promises of waiting that were broken once: each test failed on the code as it was."""

import asyncio
import threading
import time
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.db import connections, transaction

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import advance, run_until_idle
from django_durable.worker.loop import Worker
from tests.app.models import Ledger
from tests.app.workflows import echo, times

pytestmark = pytest.mark.django_db


@durable.step(name="note")
def note(what):
    Ledger.objects.create(key=str(what))
    return what


def pass_time():
    for _ in range(3):
        run_until_idle()
        advance("101 seconds")
    run_until_idle()


# -- STRICT: the engine's own statements are no queries of the body ----------------------------------------------------


@durable.workflow(name="tests.broken.leaf")
def leaf(wait=False):
    if wait:
        durable.sleep(100)
    return note("leaf")


@durable.workflow(name="tests.broken.async_leaf")
async def async_leaf(wait=False):
    if wait:
        await durable.asleep(100)
    return await note.acall("leaf")


@durable.workflow(name="tests.broken.parent")
def parent(wait=False):
    return leaf(wait)


@durable.workflow(name="tests.broken.async_parent")
async def async_parent(wait=False):
    return await async_leaf(wait)


@durable.workflow(name="tests.broken.mixed_parent")
async def mixed_parent(wait=False):
    return await leaf.acall(wait)


@pytest.fixture
def strict(settings):
    settings.DURABLE = {"STRICT": True}


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("which", [parent, async_parent, mixed_parent], ids=lambda each: each.name)
def test_a_strict_run_may_call_a_child_and_sleep(which, wait):
    run = which.start(wait)
    pass_time()
    assert run.result(0) == "leaf"


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("which", [parent, async_parent, mixed_parent], ids=lambda each: each.name)
def test_a_strict_direct_call_may_call_a_child(which):
    assert (async_to_sync(which)() if which.is_async else which()) == "leaf"


@durable.workflow(name="tests.broken.everything")
def everything():
    child = leaf.start()
    durable.wait([child], timeout=5)
    value = child.result()
    durable.set_event("a", 1)
    event = durable.get_event(child, "none", default=5)
    durable.send(child, 3)
    message = durable.receive(timeout=0)
    durable.stream("x").write(1)
    durable.stream("x").close()
    decision = durable.approval("boss", timeout=0.1)
    durable.patched("q")
    durable.now(), durable.random(), durable.uuid4()
    note.submit("p").result(timeout=3)
    note.map(["a", "b"])
    with durable.saga() as undo:
        undo.add(note, "undone")
    durable.sleep(0.1)
    return value, event, message, decision.timed_out


@pytest.mark.usefixtures("strict")
def test_a_strict_run_may_use_whatever_waits():
    run = everything.start()
    pass_time()
    assert run.result(0) == ("leaf", 5, None, True)


# -- What is not there is an answer, too -------------------------------------------------------------------------------


@durable.workflow(name="tests.broken.unknown")
def unknown(how):
    try:
        if how == "send":
            durable.send("later", "hi")
        elif how == "event":
            durable.get_event("later", "k", timeout=0)
        else:
            echo.using(run_id="taken").start(1)
    except (durable.RunNotFound, durable.RunIdInUse):
        note("not there")
    return durable.receive()


@pytest.mark.parametrize("how", ["send", "event", "start"])
def test_a_run_that_comes_or_goes_later_changes_no_course(how):
    leaf.using(run_id="taken").start()
    run = unknown.start(how)
    run_until_idle()
    echo.using(run_id="later").start(1)
    WorkflowRun.objects.filter(pk="taken").delete()
    run.send("on")
    run_until_idle()
    assert run.result(0) == "on"
    assert times("not there") == 1


# -- Calls that an async body cancels ----------------------------------------------------------------------------------


@durable.step(name="tell", atomic=False)
def tell():
    durable.send(durable.current().run_id, "m", "x")
    # Longer than the other call's next look.
    time.sleep(0.3)


@durable.workflow(name="tests.broken.cancels_its_receive")
async def cancels_its_receive():
    waiting = asyncio.create_task(durable.areceive("x"))
    await note.acall("first")
    await tell.acall()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    return await durable.areceive("x", timeout=0.5, default="lost")


@pytest.mark.django_db(transaction=True)
def test_a_message_that_a_cancelled_receive_has_taken_is_there_again():
    assert async_to_sync(cancels_its_receive)() == "m"


@durable.workflow(name="tests.broken.asks_again")
async def asks_again():
    asked = asyncio.create_task(durable.aapproval("boss"))
    changed = asyncio.create_task(durable.areceive("changed"))
    await asyncio.wait({asked, changed}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    return (await durable.aapproval("boss")).approved


def test_a_decision_goes_to_the_question_that_is_asked_now():
    run = asks_again.start()
    run_until_idle()
    run.send(1, "changed")
    pass_time()
    run.decide("boss", True)
    pass_time()
    assert run.result(0) is True


@durable.step(name="endless", atomic=False)
async def endless():
    await asyncio.sleep(3600)


@durable.workflow(name="tests.broken.cancels_its_step")
async def cancels_its_step():
    step = asyncio.create_task(endless())
    await note.acall("first")
    step.cancel()
    await asyncio.gather(step, return_exceptions=True)
    return await durable.areceive("x")


@pytest.mark.django_db(transaction=True)
def test_a_run_that_has_cancelled_a_step_parks():
    run = cancels_its_step.start()
    worker = Worker("default", concurrency=2)

    def work():
        try:
            worker.run()
        finally:
            connections.close_all()

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 20
    while run.status != "WAITING" and time.monotonic() < deadline:
        time.sleep(0.02)
    status = run.status
    worker.stop(at_once=True)
    thread.join(20)
    assert status == "WAITING"


# -- Others ------------------------------------------------------------------------------------------------------------

flaky_calls: list = []


@durable.step(name="flaky", atomic=False)
async def flaky():
    flaky_calls.append(1)
    if len(flaky_calls) == 1:
        raise ValueError("once")


@durable.workflow(name="tests.broken.group", max_attempts=2, retry_delay=0)
async def group():
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(flaky())
    finally:
        await note.acall("cleaned up")


def test_a_retry_repeats_the_step_whose_error_left_in_a_group():
    flaky_calls.clear()
    run = group.start()
    pass_time()
    assert run.status == "SUCCEEDED"
    assert len(flaky_calls) == 2


validated: list = []


def look_at(data):
    validated.append(data)
    return data


@durable.workflow(name="tests.broken.validated", validate=look_at)
def checked(value):
    return value


@durable.workflow(name="tests.broken.calls_checked")
def calls_checked():
    checked(1)
    checked.start(2)
    return durable.receive()


def test_a_childs_input_is_validated_once_and_not_on_replay():
    validated.clear()
    run = calls_checked.start()
    run_until_idle()
    run.send("on")
    run_until_idle()
    assert run.result(0) == "on"
    assert len(validated) == 2


@durable.workflow(name="tests.broken.middle")
def middle():
    return patient.start()


@durable.workflow(name="tests.broken.patient")
def patient():
    return durable.receive()


@durable.workflow(name="tests.broken.top")
def top():
    middle()
    return durable.receive()


def test_cancel_goes_down_past_a_child_that_has_ended():
    run = top.start()
    run_until_idle()
    assert run.cancel()
    assert WorkflowRun.objects.get(workflow="tests.broken.patient").status == "CANCELLED"


@durable.workflow(name="tests.broken.swallows")
def swallows(count=0):
    try:
        if count < 2:
            durable.continue_as_new(count + 1)
    except BaseException:
        pass
    return count


def test_a_body_that_swallows_continue_as_new_goes_on_as_new_all_the_same():
    run = swallows.start()
    run_until_idle()
    assert run.result(0) == 2


@durable.workflow(name="tests.broken.restarts")
def restarts(other):
    made = durable.get_run(other).restart()
    durable.receive()
    return made.id


def test_a_restart_in_a_body_is_made_once():
    other = echo.start(1)
    run = restarts.start(other.id)
    run_until_idle()
    run.send("on")
    run_until_idle()
    assert list(WorkflowRun.objects.filter(forked_from=other.id).values_list("pk", flat=True)) == [run.result(0)]


def test_every_wait_takes_a_timedelta_and_none_waits_for_ever_in_a_transaction():
    run = patient.start()
    with pytest.raises(TimeoutError):
        run.result(timeout=timedelta(0))
    with transaction.atomic(), pytest.raises(durable.InsideTransaction, match="get_event"):
        run.get_event("k")
