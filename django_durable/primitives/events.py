"""`set_event`, `get_event`: what a run publishes about itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from datetime import timedelta
from functools import partial
from typing import Any

from asgiref.sync import markcoroutinefunction
from django.db import connections

from django_durable.conf import as_seconds, check_text
from django_durable.engine import endings, mailbox, operations, payloads, steering
from django_durable.engine.asynchronous.awaitables import awaitable
from django_durable.engine.asynchronous.threads import in_thread
from django_durable.engine.calls import Awaited, Call
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.context import RunContext, current_body, current_run
from django_durable.exceptions import InsideTransaction, NotInWorkflow
from django_durable.handles import RunHandle, run_address
from django_durable.states import StepKind, StepStatus


def set_event(key: str, value: Any) -> None:
    """Publish a value of the running workflow under a key (1 to 200 characters); the latest one stands.

    From a workflow's body, and in an atomic step, exactly once, with the commit. Raises NotInWorkflow outside a run.
    """
    check_text("key", key, 200)
    run, context = current_run(), current_body()
    if run is None:
        raise NotInWorkflow("set_event()")
    if context is None:
        mailbox.publish(run.alias, run.run_id, key, payloads.dump(value, f"Event {key!r} of run {run.run_id}"))
        return
    call = Call(context, f"set_event {key}", StepKind.EVENT)
    if not call.done:
        text = payloads.dump(value, call.place)

        def act() -> Outcome:
            mailbox.publish(context.alias, context.run_id, key, text)
            return Outcome(StepStatus.SUCCEEDED, output=payloads.dump(None, call.place))

        call.commit(act)
    call.answer()


def get_event(run: RunHandle | str, key: str, timeout: float | timedelta | None = None, default: Any = None) -> Any:
    """Return the latest value that a run has published under the key, waiting for the first one.

    `timeout`: seconds or timedelta; 0 looks once, None waits without limit. Then, and if the run has ended without
    publishing it, returns `default`. In a workflow's body the answer is recorded, and the wait parks. Raises
    `RunNotFound`, and `InsideTransaction` where it would wait without limit in a transaction.
    """
    alias, run_id = run_address(run, "get_event()")
    check_text("key", key, 200)
    seconds = None if timeout is None else as_seconds(timeout, "timeout")
    context = current_body()
    if context is not None:
        return _get_in_body(context, alias, run_id, key, seconds, default)
    until = None if seconds is None else time.monotonic() + seconds
    for pause in operations.pauses():
        found, may_come = _look_outside(alias, run_id, key)
        left = float("inf") if until is None else until - time.monotonic()
        if found or left <= 0 or not may_come:
            return found[0] if found else default
        if seconds is None and connections[alias].in_atomic_block:
            raise InsideTransaction.waiting(run_id, alias, "get_event()")
        time.sleep(min(pause, left))


@markcoroutinefunction
def aset_event(key: str, value: Any) -> Coroutine[Any, Any, None]:
    """See set_event()."""
    return awaitable("aset_event", set_event, key, value)


@markcoroutinefunction
def aget_event(
    run: RunHandle | str, key: str, timeout: float | timedelta | None = None, default: Any = None
) -> Coroutine[Any, Any, Any]:
    """See get_event()."""
    if current_body() is not None:
        return awaitable("aget_event", get_event, run, key, timeout, default)
    return _aget_outside(run, key, timeout, default)


async def _aget_outside(run: RunHandle | str, key: str, timeout: float | timedelta | None, default: Any) -> Any:
    alias, run_id = run_address(run, "aget_event()")
    check_text("key", key, 200)
    until = None if timeout is None else time.monotonic() + as_seconds(timeout, "timeout")
    for pause in operations.pauses():
        found, may_come = await in_thread(partial(_look_outside, alias, run_id, key))
        left = float("inf") if until is None else until - time.monotonic()
        if found or left <= 0 or not may_come:
            return found[0] if found else default
        await asyncio.sleep(min(pause, left))


def _look_outside(alias: str, run_id: str, key: str) -> tuple[list[Any], bool]:
    """The value, if it is there, and whether it may still come."""
    last = steering.latest(alias, run_id)
    # Asked first: what is published between the two looks is seen.
    may_come = mailbox.may_come(alias, last)
    text = mailbox.read(alias, last, key)
    return [] if text is None else [payloads.load(text, f"Event {key!r} of run {run_id}")], may_come


def _get_in_body(context: RunContext, alias: str, run_id: str, key: str, timeout: float | None, default: Any) -> Any:
    call = Call(context, f"get_event {key}", StepKind.EVENT)
    if call.done:
        return call.answer()

    def otherwise() -> Outcome:
        return Outcome(StepStatus.SUCCEEDED, output=payloads.dump(default, call.place))

    def look() -> Outcome | None:
        last = steering.latest(alias, run_id)
        may_come = mailbox.may_come(alias, last)
        text = mailbox.read(alias, last, key)
        if text is not None:
            return Outcome(StepStatus.SUCCEEDED, output=text)
        return None if may_come else otherwise()

    def whom() -> Awaited:
        last = steering.latest(alias, run_id)
        at_home = alias == context.alias
        return Awaited(endings.event_key(last, key), (last,) if at_home else (), look_again=not at_home)

    return call.wait(look, whom, timeout=timeout, otherwise=otherwise)
