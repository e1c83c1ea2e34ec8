"""Children of async workflows, and async children."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from asgiref.sync import async_to_sync

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import crash_after, run_until_idle
from tests.app.workflows import times
from tests.asynchronous.common import (
    child,
    double,
    finished,
    plain_child,
    seen,
)

pytestmark = pytest.mark.django_db


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
