"""Async workflows and steps: the same promises, on an event loop. Values, errors, retries."""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from typing import Any

import pytest

import django_durable as durable
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import times
from tests.asynchronous.common import (
    Refused,
    double,
    fails,
    finished,
    left_on_the_loop,
    refuse,
    seen,
    soon,
    steps_of,
    sums,
    write,
)

pytestmark = pytest.mark.django_db


# -- Values and errors ------------------------------------------------------------------------------------------------


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


# -- Retries and timeouts ---------------------------------------------------------------------------------------------


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
