"""Whoever writes the wrong form, plain or async, is told the right one; and the how-to does what it says."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest
from asgiref.sync import sync_to_async

import django_durable as durable
from django_durable.engine import registry
from django_durable.testing import run_until_idle
from tests.app.workflows import times
from tests.asynchronous.common import (
    child,
    double,
    plain_child,
    write,
)
from tests.docs.pages import blocks

pytestmark = pytest.mark.django_db


# -- The right form ---------------------------------------------------------------------------------------------------


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


# -- The docs ---------------------------------------------------------------------------------------------------------


def test_the_how_to_does_what_it_says(monkeypatch):
    monkeypatch.setattr(registry, "_workflows", dict(registry._workflows))
    namespace: dict[str, Any] = {"__name__": "an_example"}
    for block in blocks("docs/how-to/async.md"):
        exec(compile(block.text, "docs/how-to/async.md", "exec"), namespace)
    assert times("mall") == 1
