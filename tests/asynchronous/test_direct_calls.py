"""An async workflow that async code awaits, on the caller's own loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import transaction
from django.test import TestCase

import django_durable as durable
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import times
from tests.asynchronous.common import (
    Refused,
    cleans_up,
    double,
    fails,
    seen,
    sums,
    two_topics,
    write,
    write_async,
)

pytestmark = pytest.mark.django_db


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
