"""What is around an async step: connections, context variables, logs, the loop."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import subprocess
import sys
import threading
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.test import TestCase, override_settings

import django_durable as durable
from django_durable.engine.asynchronous.loop import event_loop
from django_durable.testing import run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import times
from tests.asynchronous.common import (
    gate,
    write_async,
)

pytestmark = pytest.mark.django_db


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
    assert found[0][0] == id(event_loop())
    assert found[0][1] != found[0][2] == threading.get_ident()
    # A later async_to_sync() of this thread has a loop of its own, as before.
    assert async_to_sync(which_loop.func)()[0] != found[0][0]


def test_importing_it_starts_no_thread_and_no_loop(process_env):
    script = (
        "import django, threading; django.setup(); import django_durable as durable\n"
        f"import {__name__}\nfrom django_durable.engine.asynchronous import loop\n"
        "assert loop._loop is None and threading.active_count() == 1, threading.enumerate()\n"
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
