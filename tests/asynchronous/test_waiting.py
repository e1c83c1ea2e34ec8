"""An async run that waits, for several things at once, is parked and holds nothing."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Any

import pytest

import django_durable as durable
from django_durable.engine.asynchronous.loop import event_loop
from django_durable.models import WorkflowRun
from django_durable.testing import advance, crash_after, run_until_idle
from tests.app.workflows import times
from tests.asynchronous.common import (
    cleans_up,
    double,
    finished,
    left_on_the_loop,
    seen,
    soon,
    steps_of,
    two_topics,
)

pytestmark = pytest.mark.django_db


@durable.workflow(name="tests.async.waits")
async def waits() -> list[Any]:
    found = await asyncio.gather(durable.areceive("go"), durable.asleep(86400), double(4))
    try:
        late = await durable.areceive("never", timeout=3600, default="nobody")
    except Exception:
        seen.append("an error handler saw the parking")
        raise
    await durable.asleep(0.2)
    await durable.asleep_until(durable.now() + timedelta(hours=1))
    await durable.aset_event("done", [*found, late])
    return [*found, late, await durable.aget_event(durable.current().run_id, "done")]


def test_it_waits_for_several_things_at_once_and_holds_nothing_meanwhile():
    run = waits.start()
    run_until_idle()
    assert (run.status, run.model.waiting_for) == ("WAITING", "message:go")
    assert run.model.wake_at - WorkflowRun.objects.get().created_at > timedelta(hours=23)
    assert not left_on_the_loop()
    assert run_until_idle() == 0
    run.send("a message", "go")
    run_until_idle()
    assert (run.status, run.model.waiting_for) == ("WAITING", "sleep")
    advance("25 hours")
    run_until_idle()
    assert (run.status, run.model.waiting_for) == ("WAITING", "message:never")
    expected = ["a message", None, 8, "nobody"]
    assert finished(run) == [*expected, expected]
    assert run.get_event("done", timeout=0) == expected
    assert seen == [4]


@durable.step(name="look_at_the_run", atomic=False)
async def look_at_the_run() -> str:
    run = await WorkflowRun.objects.aget(pk=durable.current().run_id)
    seen.append(run.status)
    return str(run.status)


@durable.workflow(name="tests.async.busy_and_waiting")
async def busy_and_waiting() -> list[Any]:
    async def busy() -> str:
        await asyncio.gather(*(double(number) for number in range(5)))
        return await look_at_the_run()

    return await asyncio.gather(durable.areceive("go"), busy(), soon.acall("busy"))


def test_a_run_is_not_parked_while_another_of_its_steps_is_under_way():
    run = busy_and_waiting.start()
    assert run_until_idle() == 1
    assert seen[-1] == "RUNNING"
    assert (run.status, run.model.waiting_for) == ("WAITING", "message:go")
    assert [status for _, name, status in steps_of(run) if name != "receive go"] == ["SUCCEEDED"] * 7
    run.send(1, "go")
    assert run_until_idle() == 1
    assert run.result(timeout=0) == [1, "RUNNING", "busy"]
    assert run.model.attempt == 2


@pytest.mark.parametrize("topics", ["ab", "ba"])
def test_a_run_that_waits_for_two_topics_looks_after_both(topics):
    run = two_topics.start()
    run_until_idle()
    assert run.status == "WAITING"
    run.send("first", topics[0])
    advance("6 seconds")
    run_until_idle()
    assert run.status == "WAITING"
    run.send("second", topics[1])
    advance("6 seconds")
    run_until_idle()
    assert sorted(run.result(timeout=0)) == ["first", "second"]


def test_a_step_in_a_finally_block_is_not_executed_while_the_run_is_parked(caplog):
    run = cleans_up.start()
    with caplog.at_level(logging.ERROR, "django_durable.run"):
        run_until_idle()
    assert "'write' was called in a finally or except block while the run was being parked" in caplog.text
    assert times("cleaned") == 0
    assert finished(run) == "up"
    assert times("cleaned") == 1


@durable.workflow(name="tests.async.waits_elsewhere")
async def waits_elsewhere() -> str:
    background = asyncio.create_task(asyncio.Event().wait())
    # The loop's own reference is a weak one: once the function has ended, a collection would take the task away.
    seen.append(background)
    await asyncio.gather(double(1), asyncio.create_task(durable.asleep(3600)))
    background.cancel()
    return "up"


def test_parking_ends_the_tasks_that_were_waiting():
    run = waits_elsewhere.start()
    run_until_idle()
    assert run.status == "WAITING"
    # Of what the body has begun beside us the loop itself holds no reference: it may be gone, too.
    assert {task.get_coro().__qualname__ for task in left_on_the_loop()} <= {"Event.wait"}
    assert finished(run) == "up"
    for task in left_on_the_loop():
        event_loop().call_soon_threadsafe(task.cancel)


def test_a_message_to_another_run_is_sent_once():
    receiver = two_topics.start()
    run = sends.start(receiver)
    with crash_after("send a"):
        run_until_idle()
    for _ in range(3):
        run_until_idle()
        advance("6 seconds")
    assert run.result(timeout=0) is None
    assert receiver.result(timeout=0) == ["to a", "to b"]
    assert receiver.model.messages.count() == 2


@durable.workflow(name="tests.async.sends")
async def sends(receiver: durable.RunHandle) -> None:
    await asyncio.gather(durable.asend(receiver, "to a", "a"), receiver.asend("to b", "b"))


@durable.workflow(name="tests.async.cancels_itself")
async def cancels_itself() -> None:
    await durable.arun_step("cancel", durable.RunHandle("self-cancelling", "default").acancel, "enough")
    await double(1)


def test_a_run_can_cancel_itself():
    run = cancels_itself.using(run_id="self-cancelling").start()
    run_until_idle()
    assert (run.status, run.model.cancel_reason, seen) == ("CANCELLED", "enough", [])
