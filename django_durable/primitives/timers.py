"""`sleep`, `sleep_until`: pauses that survive restarts and hold no thread."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any

from asgiref.sync import markcoroutinefunction
from django.utils import timezone

from django_durable.conf import as_seconds, options
from django_durable.engine import payloads
from django_durable.engine.asynchronous.awaitables import awaitable
from django_durable.engine.calls import Blocked, Call, body, slot_of
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.context import RunContext
from django_durable.engine.parking import park
from django_durable.states import StepKind, StepStatus


def sleep(duration: float | timedelta) -> None:
    """Let the workflow go on after so many seconds, or a timedelta.

    The end is fixed by the first call and kept over restarts. Over ``DURABLE["PARK_AFTER"]`` seconds the run is
    WAITING meanwhile: it holds no thread and no memory. Raises NotInWorkflow outside a workflow's body, TypeError or
    ValueError for what is no duration.
    """
    context = body("sleep")
    seconds = as_seconds(duration, "sleep()")
    _sleep(Call(context, "sleep", StepKind.SLEEP), lambda: context.lease.clock.now() + timedelta(seconds=seconds))


def sleep_until(moment: datetime) -> None:
    """Let the workflow go on at this time, at once if it has passed. As `sleep` otherwise.

    Raises ValueError for a datetime without a time zone.
    """
    context = body("sleep_until")
    if not isinstance(moment, datetime):
        raise TypeError(f"sleep_until() takes a datetime, found {type(moment).__name__}: {moment!r}.")
    if timezone.is_naive(moment):
        raise ValueError(f"sleep_until() takes a datetime with a time zone, found a naive one: {moment!r}.")
    _sleep(Call(context, "sleep_until", StepKind.SLEEP), lambda: moment)


@markcoroutinefunction
def asleep(duration: float | timedelta) -> Coroutine[Any, Any, None]:
    """See sleep()."""
    return awaitable("asleep", sleep, duration)


@markcoroutinefunction
def asleep_until(moment: datetime) -> Coroutine[Any, Any, None]:
    """See sleep_until()."""
    return awaitable("asleep_until", sleep_until, moment)


def _sleep(call: Call, end: Callable[[], datetime]) -> None:
    context = call.context
    if slot_of(context) is not None:
        return _sleep_beside_others(call, end)
    until = call.answer() if call.done else end()
    long = _left(context, until) > options().PARK_AFTER
    if not call.done:
        outcome = Outcome(StepStatus.SUCCEEDED, output=payloads.dump(until, call.place))
        if long:
            call.check()
            raise park(context, until, "sleep", call.unsaved(outcome, ends_at=until))
        call.commit(lambda: outcome, ends_at=max(until, call.started_at))
        call.answer()
    elif long:
        # It was woken before its time: resumed, or recovered from a crash.
        raise park(context, until, "sleep")
    while (left := _left(context, until)) > 0 and not context.lease.wait(left):
        context.guard()


def _left(context: RunContext, until: datetime) -> float:
    return (until - context.lease.clock.now()).total_seconds()


def _sleep_beside_others(call: Call, end: Callable[[], datetime]) -> None:
    """In an async body: the end is recorded at once, and the body's other calls go on meanwhile."""
    if not call.done:
        until = end()
        outcome = Outcome(StepStatus.SUCCEEDED, output=payloads.dump(until, call.place))
        call.commit(lambda: outcome, ends_at=max(until, call.started_at))
    until = call.answer()
    if _left(call.context, until) > 0:
        raise Blocked("sleep", until)
