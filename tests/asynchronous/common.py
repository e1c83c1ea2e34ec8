"""Steps, errors and workflows that several tests of async code use, and what they see of an execution."""

from __future__ import annotations

import asyncio
from typing import Any

import django_durable as durable
from django_durable.engine.asynchronous.loop import event_loop
from django_durable.testing import advance, run_until_idle
from tests.app.models import Ledger

# What a test sees of the functions' executions, and the gates at which they wait for each other.
seen: list[Any] = []
gates: dict[str, asyncio.Event] = {}


def gate(name: str) -> asyncio.Event:
    return gates.setdefault(name, asyncio.Event())


def steps_of(run: durable.RunHandle) -> list[tuple[int, str, str]]:
    return [(step.position, step.name, step.status) for step in run.model.steps.all()]


def left_on_the_loop() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks(event_loop())


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


@durable.workflow(name="tests.async.sums")
async def sums(number: int) -> list[Any]:
    first = await double(number)
    second = await write.acall("sums")
    rest = await asyncio.gather(double(1), write_async("sums"), double.acall(3))
    return [first, second, rest]


class Refused(Exception):
    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason, code)
        self.code = code


@durable.step(name="refuse", atomic=False)
async def refuse(reason: str) -> None:
    seen.append(reason)
    await asyncio.sleep(0)
    raise Refused(reason, 7)


@durable.workflow(name="tests.async.fails")
async def fails() -> None:
    await double(1)
    await refuse("for good")


@durable.step(name="soon", max_attempts=3, retry_delay=0.5)
def soon(key: str) -> str:
    Ledger.objects.create(key=key)
    if durable.current().attempt < 3:
        raise Refused(key, 0)
    return key


@durable.workflow(name="tests.async.two_topics")
async def two_topics() -> list[Any]:
    return await asyncio.gather(durable.areceive("a"), durable.areceive("b", timeout=86400))


@durable.workflow(name="tests.async.cleans_up")
async def cleans_up() -> str:
    try:
        await durable.asleep(3600)
    finally:
        await write.acall("cleaned")
    return "up"


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
