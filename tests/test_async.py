"""Async workflows and steps: the same promises, on an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import subprocess
import sys
import threading
from collections.abc import Awaitable
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import transaction
from django.test import TestCase, override_settings

import django_durable as durable
from django_durable.engine import asynchronous, registry
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import times
from tests.docs.pages import blocks

pytestmark = pytest.mark.django_db


# What a test sees of the functions' executions, and the gates at which they wait for each other.
seen: list[Any] = []
gates: dict[str, asyncio.Event] = {}


@pytest.fixture(autouse=True)
def _nothing_seen_yet():
    seen.clear()
    gates.clear()


def gate(name: str) -> asyncio.Event:
    return gates.setdefault(name, asyncio.Event())


def steps_of(run: durable.RunHandle) -> list[tuple[int, str, str]]:
    return [(step.position, step.name, step.status) for step in run.model.steps.all()]


def left_on_the_loop() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks(asynchronous.event_loop())


def finished(run: durable.RunHandle) -> Any:
    """Let the time come for all that the run waits for, and return its result."""
    for _ in range(20):
        run_until_idle()
        if run.status not in ("PENDING", "WAITING"):
            break
        advance("2 hours")
    return run.result(timeout=0)


@durable.step(name="double", atomic=False)
async def double(number: int) -> int:
    seen.append(number)
    await asyncio.sleep(0)
    return number * 2


@durable.step(name="write")
def write(key: str) -> str:
    Ledger.objects.create(key=key)
    return key


@durable.step(name="write_async", atomic=False)
async def write_async(key: str) -> str:
    await Ledger.objects.acreate(key=key)
    return key


# -- Values and errors ----------------------------------------------------------------------------------------------


@durable.workflow(name="tests.async.sums")
async def sums(number: int) -> list[Any]:
    first = await double(number)
    second = await write.acall("sums")
    rest = await asyncio.gather(double(1), write_async("sums"), double.acall(3))
    return [first, second, rest]


def test_a_worker_executes_an_async_workflow():
    run = sums.start(4)
    assert run_until_idle() == 1
    assert run.result(timeout=0) == [8, "sums", [2, "sums", 6]]
    assert times("sums") == 2
    assert [(name, kind) for name, kind in run.model.steps.values_list("name", "kind")] == [
        ("double", "step"),
        ("write", "atomic"),
        ("double", "step"),
        ("write_async", "step"),
        ("double", "step"),
    ]
    assert not left_on_the_loop()


def test_a_completed_async_step_is_never_executed_again():
    run = sums.start(4)
    with crash_after("write"):
        run_until_idle()
    assert run.status == "RUNNING"
    run_until_idle()
    assert run.result(timeout=0) == [8, "sums", [2, "sums", 6]]
    assert sorted(seen) == [1, 3, 4]
    assert times("sums") == 2
    assert run.model.recoveries == 1


@pytest.mark.parametrize("crash", [crash_before, crash_after])
@pytest.mark.parametrize("step", ["double", "write", "write_async"])
def test_a_crash_anywhere_in_it_costs_no_step_that_was_recorded(crash, step):
    run = sums.start(4)
    with crash(step):
        run_until_idle()
    assert run.status == "RUNNING"
    recorded = set(steps_of(run))
    assert not left_on_the_loop()
    run_until_idle()
    assert run.result(timeout=0) == [8, "sums", [2, "sums", 6]]
    assert recorded <= set(steps_of(run))
    assert len(steps_of(run)) == 5


class Refused(Exception):
    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason, code)
        self.code = code


@durable.step(name="refuse", atomic=False)
async def refuse(reason: str) -> None:
    seen.append(reason)
    await asyncio.sleep(0)
    raise Refused(reason, 7)


@durable.step(name="write_and_refuse")
def write_and_refuse(key: str) -> None:
    Ledger.objects.create(key=key)
    raise Refused(key, 8)


@durable.workflow(name="tests.async.refused")
async def refused() -> list[Any]:
    try:
        await refuse("no")
    except Refused as error:
        caught = [type(error).__name__, error.args, error.code]
    both = await asyncio.gather(refuse("a"), write_and_refuse.acall("b"), double(5), return_exceptions=True)
    await double(6)
    return [caught, [error.args if isinstance(error, Refused) else error for error in both]]


def test_an_error_is_the_same_the_first_time_and_on_replay():
    run = refused.start()
    with crash_before("double"):
        run_until_idle()
    run_until_idle()
    assert run.result(timeout=0) == [["Refused", ("no", 7), 7], [("a", 7), ("b", 8), 10]]
    assert seen.count("no") == 1
    assert times("b") == 0
    assert [status for *_, status in steps_of(run)] == ["FAILED", "FAILED", "FAILED", "SUCCEEDED", "SUCCEEDED"]


@durable.workflow(name="tests.async.fails")
async def fails() -> None:
    await double(1)
    await refuse("for good")


def test_an_error_that_leaves_the_workflow_is_the_runs():
    run = fails.start()
    run_until_idle()
    with pytest.raises(Refused, match="for good") as caught:
        run.result(timeout=0)
    assert caught.value.code == 7
    assert run.model.failed_step == 2
    assert "refuse" in run.model.error
    assert run.resume()
    run_until_idle()
    # The step whose error left the workflow is executed again; the other is not.
    assert seen == [1, "for good", "for good"]


@durable.workflow(name="tests.async.fails_once", max_attempts=3, retry_delay=60)
async def fails_once() -> int:
    await write.acall("fails_once")
    if times_started := seen.count("started"):
        return times_started
    seen.append("started")
    await refuse("once")
    return 0


def test_a_run_is_tried_again_with_its_completed_steps_kept():
    run = fails_once.start()
    run_until_idle()
    assert (run.status, run.model.waiting_for, run.model.failures) == ("WAITING", "retry", 1)
    assert finished(run) == 1
    assert times("fails_once") == 1


@durable.workflow(name="tests.async.ends_the_process")
async def ends_the_process() -> None:
    async def leave() -> None:
        sys.exit(3)

    await asyncio.gather(double(1), leave())


def test_sys_exit_in_an_async_workflow_ends_that_run_alone():
    run, other = ends_the_process.start(), sums.start(1)
    run_until_idle()
    with pytest.raises(durable.RunFailed, match="SystemExit"):
        run.result(timeout=0)
    assert other.result(timeout=0)[0] == 2


# -- Retries and timeouts -------------------------------------------------------------------------------------------


@durable.step(name="flaky", atomic=False, max_attempts=4, retry_delay=100, retry_backoff=2, give_up_on=(LookupError,))
async def flaky(failures: int) -> int:
    tries = durable.current().attempt
    seen.append(tries)
    await asyncio.sleep(0)
    if tries <= failures:
        raise Refused("not yet", tries)
    return tries


@durable.workflow(name="tests.async.patient")
async def patient(failures: int) -> int:
    return await flaky(failures)


def test_an_async_step_is_tried_again_with_backoff_and_without_a_thread_meanwhile():
    run = patient.start(2)
    run_until_idle()
    for delay, tries in ((100, 1), (200, 2)):
        assert (run.status, run.model.waiting_for, seen) == ("WAITING", "retry:flaky", list(range(1, tries + 1)))
        advance(timedelta(seconds=delay * 0.85))
        assert run_until_idle() == 0
        advance(timedelta(seconds=delay * 0.3))
        run_until_idle()
    assert run.result(timeout=0) == 3
    (step,) = run.model.steps.all()
    assert (step.status, step.attempts) == ("SUCCEEDED", 3)


def test_the_last_try_of_an_async_step_is_the_last():
    run = patient.start(9)
    with pytest.raises(Refused):
        finished(run)
    assert seen == [1, 2, 3, 4]


@durable.step(name="soon", max_attempts=3, retry_delay=0.5)
def soon(key: str) -> str:
    Ledger.objects.create(key=key)
    if durable.current().attempt < 3:
        raise Refused(key, 0)
    return key


@durable.workflow(name="tests.async.soon")
async def soon_again() -> list[Any]:
    return await asyncio.gather(soon.acall("soon"), flaky(0))


def test_a_short_delay_of_a_plain_step_is_waited_for_here():
    run = soon_again.start()
    assert run_until_idle() == 1
    assert run.result(timeout=0) == ["soon", 1]
    assert times("soon") == 1


@durable.step(name="busy", atomic=False, max_attempts=2)
async def busy() -> str:
    seen.append(durable.current().attempt)
    if len(seen) == 1:
        raise durable.RetryAfter(600)
    return "done"


@durable.workflow(name="tests.async.asked_to_come_back")
async def asked_to_come_back() -> str:
    return await busy()


def test_retry_after_sets_the_delay():
    run = asked_to_come_back.start()
    run_until_idle()
    advance("8 minutes")
    assert run_until_idle() == 0
    advance("4 minutes")
    run_until_idle()
    assert (run.result(timeout=0), seen) == ("done", [1, 2])


@durable.step(name="endless", atomic=False, timeout=0.02, max_attempts=2, retry_delay=0)
async def endless() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        seen.append("stopped")


@durable.step(name="own_timeout", atomic=False, timeout=60)
async def own_timeout() -> None:
    raise TimeoutError("the service's")


@durable.workflow(name="tests.async.too_slow")
async def too_slow() -> list[str]:
    found = await asyncio.gather(endless(), own_timeout(), return_exceptions=True)
    return [f"{type(error).__name__}: {error}" for error in found]


def test_a_step_that_takes_too_long_is_stopped_and_tried_again():
    run = too_slow.start()
    run_until_idle()
    late, own = run.result(timeout=0)
    assert late.startswith(f"StepTimeout: Step 'endless' of run {run.id} took longer than its timeout of 0.02 s")
    assert own == "TimeoutError: the service's"
    assert seen == ["stopped", "stopped"]


# -- Positions, and the order of a replay ---------------------------------------------------------------------------

CHAINS = {"a": 3, "b": 3, "c": 2}


async def in_turn(name: str, order: list[str]) -> str:
    """Return when it is this one's turn to be finished."""
    place = order.index(name)
    if place and order[place - 1] not in seen:
        await gate(order[place - 1]).wait()
    seen.append(name)
    gate(name).set()
    return name


@durable.workflow(name="tests.async.chains")
async def chains(order: list[str]) -> list[Any]:
    came: list[str] = []

    async def chain(letter: str) -> list[str]:
        done = []
        for number in range(CHAINS[letter]):
            done.append(await durable.arun_step(f"{letter}{number}", in_turn, f"{letter}{number}", order))
            came.append(done[-1])
        return done

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(chain(letter)) for letter in CHAINS]
    last = await durable.arun_step("last", str, came)
    return [[task.result() for task in tasks], came, last]


def an_order(seed: int) -> list[str]:
    """The steps of all chains, mixed, each chain's in its own order."""
    letters = [letter for letter, length in CHAINS.items() for _ in range(length)]
    random.Random(seed).shuffle(letters)
    numbers = dict.fromkeys(CHAINS, -1)
    order = []
    for letter in letters:
        numbers[letter] += 1
        order.append(f"{letter}{numbers[letter]}")
    return order


@pytest.mark.parametrize("seed", range(12))
def test_whatever_finishes_first_a_replay_goes_the_same_way(seed):
    order = an_order(seed)
    run = chains.start(order)
    for step in random.Random(seed).sample(order, 3):
        if step in {name for _, name, _ in steps_of(run)}:
            continue
        recorded, executed = steps_of(run), len(seen)
        with crash_after(step):
            run_until_idle()
        assert set(recorded) <= set(steps_of(run))
        assert not {name for _, name, _ in recorded} & set(seen[executed:])
    with crash_before("last"):
        run_until_idle()
    before, executed = steps_of(run), list(seen)
    assert len(before) == len(order)
    run_until_idle()
    assert seen == executed
    results, came, last = run.result(timeout=0)
    assert results == [[f"{letter}{number}" for number in range(length)] for letter, length in CHAINS.items()]
    assert sorted(came) == sorted(order)
    assert last == str(came)


@durable.workflow(name="tests.async.first_wins")
async def first_wins(order: list[str]) -> list[Any]:
    racers = [asyncio.create_task(durable.arun_step(name, in_turn, name, order)) for name in ("x", "y", "z")]
    done, pending = await asyncio.wait(racers, return_when=asyncio.FIRST_COMPLETED)
    for racer in pending:
        racer.cancel()
    winner = [racer.result() for racer in done]
    return [*winner, await durable.arun_step("after the race", str, winner)]


def test_a_race_has_the_same_winner_on_replay_and_does_not_run_the_losers_again():
    run = first_wins.start(["y", "never", "x", "z"])
    with crash_before("after the race"):
        run_until_idle()
    assert seen == ["y"]
    assert run.model.steps.filter(name="y").get().position == 2
    run_until_idle()
    assert seen == ["y"]
    assert run.result(timeout=0) == ["y", "['y']"]
    assert run.model.steps.filter(name="after the race").get().position == 4


@durable.workflow(name="tests.async.one_fails")
async def one_fails() -> list[str]:
    async def others() -> None:
        await double(1)
        await durable.arun_step("stuck", gate("never").wait)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(others())
            group.create_task(durable.arun_step("fails", fail_when_others_are_stuck))
    except* Refused as errors:
        failed = [error.args[0] for error in errors.exceptions]
    return [*failed, await write.acall("undone")]


async def fail_when_others_are_stuck() -> None:
    await sync_to_async(lambda: None)()
    raise Refused("one fails", 1)


def test_an_error_in_a_task_group_stops_its_siblings_also_on_replay():
    run = one_fails.start()
    with crash_before("write"):
        run_until_idle()
    run_until_idle()
    assert run.result(timeout=0) == ["one fails", "undone"]
    assert times("undone") == 1
    assert not left_on_the_loop()


@durable.workflow(name="tests.async.changed")
async def changed(names: str) -> None:
    await asyncio.gather(*(durable.arun_step(name, str, name) for name in seen or names))
    await durable.asleep(60)


def test_code_that_no_longer_fits_its_history_sets_the_run_aside():
    run = changed.start("ab")
    run_until_idle()
    seen.extend("ac")
    advance("2 minutes")
    run_until_idle()
    assert run.status == "DEAD"
    assert "recorded 'b', the code now calls 'c'" in run.model.error
    assert not left_on_the_loop()


# -- Waiting --------------------------------------------------------------------------------------------------------


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


@durable.workflow(name="tests.async.two_topics")
async def two_topics() -> list[Any]:
    return await asyncio.gather(durable.areceive("a"), durable.areceive("b", timeout=86400))


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


@durable.workflow(name="tests.async.cleans_up")
async def cleans_up() -> str:
    try:
        await durable.asleep(3600)
    finally:
        await write.acall("cleaned")
    return "up"


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
    await asyncio.gather(double(1), asyncio.create_task(durable.asleep(3600)))
    background.cancel()
    return "up"


def test_parking_ends_the_tasks_that_were_waiting():
    run = waits_elsewhere.start()
    run_until_idle()
    assert run.status == "WAITING"
    assert {task.get_coro().__qualname__ for task in left_on_the_loop()} == {"Event.wait"}
    assert finished(run) == "up"
    for task in left_on_the_loop():
        asynchronous.event_loop().call_soon_threadsafe(task.cancel)


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


# -- Children -------------------------------------------------------------------------------------------------------


@durable.workflow(name="tests.async.child")
async def child(name: str, wait: float = 0) -> str:
    if wait:
        await durable.asleep(wait)
    await write_async(name)
    if name == "bad":
        raise Refused(name, 1)
    return name


@durable.workflow(name="tests.async.plain_child")
def plain_child(name: str, wait: float = 0) -> str:
    if wait:
        durable.sleep(wait)
    return write(name)


@durable.workflow(name="tests.async.parent")
async def parent(wait: float) -> list[Any]:
    called = await asyncio.gather(
        child("a", wait), plain_child.acall("b", wait), child("bad", wait), child("d"), return_exceptions=True
    )
    started = [await child.astart("e", wait), await plain_child.astart("f", wait)]
    result = await durable.await_(started)
    results = await asyncio.gather(*(handle.aresult() for handle in result.done))
    return [[str(each) for each in called], results]


@pytest.mark.parametrize("wait", [0, 0.2, 60])
@pytest.mark.parametrize("how", ["start", "call"])
def test_children_are_called_started_and_waited_for(wait, how):
    result = async_to_sync(parent)(wait) if how == "call" else finished(parent.start(wait))
    assert result == [["a", "b", "('bad', 1)", "d"], ["e", "f"]]
    assert [times(name) for name in ("a", "b", "bad", "d", "e", "f")] == [1] * 6
    assert not WorkflowRun.objects.exclude(status__in=["SUCCEEDED", "FAILED"]).exists()


def test_a_parent_of_several_waiting_children_is_woken_by_each_of_them():
    run = parent.start(60)
    run_until_idle()
    assert (run.status, run.model.waiting_for, run.model.wake_at) == ("WAITING", "children", None)


def test_a_crash_while_children_run_beside_each_other_repeats_none():
    run = parent.start(0)
    with crash_after("write_async"):
        run_until_idle()
    assert finished(run) == [["a", "b", "('bad', 1)", "d"], ["e", "f"]]
    assert [times(name) for name in ("b", "f")] == [1, 1]
    assert WorkflowRun.objects.count() == 7


@durable.workflow(name="tests.async.plain_parent")
def plain_parent() -> list[Any]:
    handle = child.start("g", 30)
    return [handle.result(), durable.wait([child.start("h")]).done[0].result()]


def test_a_plain_workflow_starts_async_children():
    assert finished(plain_parent.start()) == ["g", "h"]
    assert plain_parent() == ["g", "h"]


@durable.workflow(name="tests.async.rounds")
async def rounds(left: int) -> str:
    await double(left)
    if left:
        durable.continue_as_new(left - 1)
    return "over"


def test_an_async_run_goes_on_as_a_new_one():
    assert finished(rounds.start(2)) == "over"
    assert seen == [2, 1, 0]
    assert WorkflowRun.objects.count() == 3


# -- Called directly ------------------------------------------------------------------------------------------------


class DirectCalls(TestCase):
    """On the caller's own loop, in the test's own transaction."""

    async def test_an_async_workflow_is_awaited(self):
        assert await sums(4) == [8, "sums", [2, "sums", 6]]
        assert await sums.using(run_id="awaited").acall(5) == [10, "sums", [2, "sums", 6]]
        assert await Ledger.objects.filter(key="sums").acount() == 4
        run = await durable.aget_run("awaited")
        assert await run.astatus() == "SUCCEEDED"

    async def test_the_same_id_again_is_the_same_run(self):
        first = await sums.using(run_id="twice")(4)
        assert await sums.using(run_id="twice")(1) == first
        assert sorted(seen) == [1, 3, 4]

    async def test_its_error_is_raised(self):
        with pytest.raises(Refused):
            await fails()

    async def test_a_wait_moves_the_tests_clock(self):
        assert await cleans_up() == "up"

    async def test_two_at_once(self):
        assert [found[0] for found in await asyncio.gather(sums(1), sums(2), cleans_up())] == [2, 4, "u"]

    async def test_what_validates_the_arguments_may_ask_the_database(self):
        await Ledger.objects.acreate(key="known")
        assert await checked("known") == "known"
        with pytest.raises(durable.InvalidInput):
            await checked("unknown")
        with pytest.raises(TypeError):
            await checked()

    async def test_steps_are_plain_functions_outside_a_workflow(self):
        assert await double(2) == 4
        assert await write.acall("outside") == "outside"
        assert await write_async.acall("outside") == "outside"
        assert await durable.arun_step("double", double.func, 3) == 6
        assert await Ledger.objects.filter(key="outside").acount() == 2
        assert await StepCheckpoint.objects.acount() == 0

    async def test_what_works_anywhere_works_here(self):
        run = await two_topics.astart()
        await durable.asend(run, "x", "a")
        assert await durable.aget_event(run, "nothing", timeout=0, default="none") == "none"
        assert (await durable.await_([run], timeout=0)).pending == [run]
        with pytest.raises(durable.NotInWorkflow):
            await durable.asleep(1)


def known(arguments: dict[str, Any]) -> dict[str, Any]:
    if not Ledger.objects.filter(key=arguments["key"]).exists():
        raise ValueError("unknown")
    return arguments


@durable.workflow(name="tests.async.checked", validate=known)
async def checked(key: str) -> str:
    return key


@pytest.mark.django_db(transaction=True)
def test_a_direct_call_inside_a_transaction_is_refused():
    with transaction.atomic(), pytest.raises(durable.InsideTransaction):
        async_to_sync(sums)(1)
    assert not WorkflowRun.objects.exists()
    assert async_to_sync(sums)(1)[0] == 2


@pytest.mark.django_db(transaction=True)
def test_a_caller_that_is_cancelled_leaves_the_run_to_the_workers():
    async def leave() -> None:
        task = asyncio.create_task(stays.using(run_id="left")(0))
        while "waiting" not in seen:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async_to_sync(leave)()
    run = durable.get_run("left")
    assert (run.status, run.model.recoveries) == ("PENDING", 0)
    assert seen == ["waiting", "stopped"]
    run_until_idle()
    assert run.result(timeout=0) == "stayed"
    assert times("stays") == 1


@durable.step(name="stay", atomic=False)
async def stay() -> str:
    if "waiting" in seen:
        return "stayed"
    seen.append("waiting")
    try:
        await asyncio.Event().wait()
    finally:
        seen.append("stopped")
    return "never"


@durable.workflow(name="tests.async.stays")
async def stays(number: int) -> str:
    await write.acall("stays")
    return await stay()


# -- Connections, context, logs -------------------------------------------------------------------------------------


class InTheTestsTransaction(TestCase):
    def test_what_an_async_step_writes_is_seen_by_the_test_and_undone_with_it(self):
        Ledger.objects.create(key="before")
        run = counts.start()
        run_until_idle()
        assert run.result(timeout=0) == 1
        assert times("counted") == 1

    def test_nothing_is_left_of_another_test(self):
        assert not Ledger.objects.exists()


@durable.step(name="count", atomic=False)
async def count() -> int:
    await Ledger.objects.acreate(key="counted")
    return await Ledger.objects.filter(key="before").acount()


@durable.workflow(name="tests.async.counts")
async def counts() -> int:
    return await count()


language: contextvars.ContextVar[str] = contextvars.ContextVar("language", default="none")


@durable.step(name="describe", atomic=False)
async def describe(name: str, other: str) -> list[Any]:
    gate(name).set()
    # Both are under way now.
    await gate(other).wait()
    here = durable.current()
    here.logger.info("described")
    with_thread = await sync_to_async(lambda: durable.current().idempotency_key)()
    return [here.step, here.idempotency_key == with_thread, here.idempotency_key[-1], language.get()]


@durable.workflow(name="tests.async.described")
async def described() -> list[Any]:
    async def one(name: str, other: str) -> list[Any]:
        language.set(name)
        return await describe(name, other)

    both = await asyncio.gather(one("en", "fr"), one("fr", "en"))
    return [*both, durable.current().step, language.get()]


def test_each_of_several_steps_knows_which_one_it_is(caplog):
    run = described.start()
    with caplog.at_level(logging.INFO, "django_durable.run"):
        run_until_idle()
    expected = [["describe", True, "1", "en"], ["describe", True, "2", "fr"], None, "none"]
    assert run.result(timeout=0) == expected
    (one, two) = [record for record in caplog.records if record.getMessage() == "described"]
    assert {(record.run_id, record.step, record.attempt) for record in (one, two)} == {(run.id, "describe", 1)}
    assert {one.workflow, two.workflow} == {"tests.async.described"}
    assert language.get() == "none"


@durable.step(name="which_loop", atomic=False)
async def which_loop() -> list[int]:
    in_thread = await sync_to_async(threading.get_ident)()
    return [id(asyncio.get_running_loop()), threading.get_ident(), in_thread]


@durable.workflow(name="tests.async.loops")
async def loops() -> list[int]:
    return await which_loop()


def test_all_runs_share_one_loop_and_each_uses_its_own_threads_connection():
    runs = [loops.start() for _ in range(3)]
    run_until_idle()
    found = [run.result(timeout=0) for run in runs]
    assert found[0] == found[1] == found[2]
    assert found[0][0] == id(asynchronous.event_loop())
    assert found[0][1] != found[0][2] == threading.get_ident()
    # A later async_to_sync() of this thread has a loop of its own, as before.
    assert async_to_sync(which_loop.func)()[0] != found[0][0]


def test_importing_it_starts_no_thread_and_no_loop(process_env):
    script = (
        "import django, threading; django.setup(); import django_durable as durable\n"
        "from tests import test_async\nfrom django_durable.engine import asynchronous\n"
        "assert asynchronous._loop is None and threading.active_count() == 1, threading.enumerate()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=process_env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@durable.workflow(name="tests.async.looks_in_its_body")
async def looks_in_its_body() -> int:
    await write_async("strict")
    return await Ledger.objects.acount()


@pytest.mark.parametrize("how", ["start", "call"])
def test_strict_lets_no_query_of_the_body_pass(how):
    with override_settings(DURABLE={"STRICT": True}):
        if how == "start":
            run = looks_in_its_body.start()
            run_until_idle()
            with pytest.raises(durable.QueryOutsideStep):
                run.result(timeout=0)
        else:
            with pytest.raises(durable.QueryOutsideStep):
                async_to_sync(looks_in_its_body)()
    assert times("strict") == 1


# -- The right form -------------------------------------------------------------------------------------------------


async def an_async_function() -> None: ...


@pytest.mark.parametrize("decorate", [durable.step, durable.step(atomic=True)], ids=["plain", "atomic"])
def test_an_atomic_async_step_is_refused_and_told_what_to_write(decorate):
    with pytest.raises(TypeError, match=r"'an_async_function' .* write @durable\.step\(atomic=False\)"):
        decorate(an_async_function)


async def an_async_generator():
    yield 1


@pytest.mark.parametrize("decorate", [durable.workflow, durable.step(atomic=False)], ids=["workflow", "step"])
def test_an_async_generator_is_refused(decorate):
    with pytest.raises(TypeError, match="is a generator"):
        decorate(an_async_generator)


WRONG_FORMS: dict[str, Any] = {
    "await write.acall(...)": lambda: write("x"),
    "await outside.acall(...)": lambda: durable.run_step("outside", str),
    "await durable.asleep(...)": lambda: durable.sleep(1),
    "await durable.asleep_until(...)": lambda: durable.sleep_until(durable.now()),
    "await durable.areceive(...)": lambda: durable.receive("topic"),
    "await durable.asend(...)": lambda: durable.send("nobody", 1),
    "await durable.aset_event(...)": lambda: durable.set_event("key", 1),
    "await durable.aget_event(...)": lambda: durable.get_event("nobody", "key"),
    "await durable.await_(...)": lambda: durable.wait([durable.RunHandle("nobody", "default")]),
    "await handle.aresult(...)": lambda: durable.RunHandle("nobody", "default").result(),
    "await tests.async.plain_child.acall(...)": lambda: plain_child("x"),
    "await tests.async.plain_child.astart(...)": lambda: plain_child.start("x"),
}


@durable.workflow(name="tests.async.wrong_form")
async def wrong_form(form: str) -> None:
    WRONG_FORMS[form]()


@pytest.mark.parametrize("form", WRONG_FORMS)
def test_a_plain_call_in_an_async_workflow_is_told_what_to_write(form):
    run = wrong_form.start(form)
    run_until_idle()
    with pytest.raises(TypeError) as caught:
        run.result(timeout=0)
    assert f"'tests.async.wrong_form' is an async function, which has to await what it calls: write {form}" in str(
        caught.value
    )


AWAITABLES: dict[str, Any] = {
    "double": lambda: double(1),
    "write": lambda: write.acall("x"),
    "tests.async.child": lambda: child("x"),
    "asleep": lambda: durable.asleep(1),
    "areceive": lambda: durable.areceive(),
}


@durable.workflow(name="tests.async.cannot_await")
def cannot_await(name: str) -> Awaitable[Any]:
    return AWAITABLES[name]()


@pytest.mark.parametrize("name", AWAITABLES)
def test_an_awaitable_in_a_plain_workflow_is_refused_and_told_what_to_write(name):
    run = cannot_await.start(name)
    run_until_idle()
    with pytest.raises(TypeError, match=f"plain function and cannot await '{name}'"):
        run.result(timeout=0)


@durable.workflow(name="tests.async.from_a_thread")
async def from_a_thread() -> Any:
    return await sync_to_async(lambda: double(1))()


def test_a_step_cannot_be_called_from_a_helpers_thread():
    run = from_a_thread.start()
    run_until_idle()
    with pytest.raises(TypeError, match="was called in another thread"):
        run.result(timeout=0)


# -- The docs -------------------------------------------------------------------------------------------------------


def test_the_how_to_does_what_it_says(monkeypatch):
    monkeypatch.setattr(registry, "_workflows", dict(registry._workflows))
    namespace: dict[str, Any] = {"__name__": "an_example"}
    for block in blocks("docs/how-to/async.md"):
        exec(compile(block.text, "docs/how-to/async.md", "exec"), namespace)
    assert times("mall") == 1
