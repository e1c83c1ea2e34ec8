"""`wait`: the end of several runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NamedTuple

from asgiref.sync import markcoroutinefunction
from django.db import connections

from django_durable.conf import as_seconds
from django_durable.engine import children, operations
from django_durable.engine.asynchronous.awaitables import awaitable
from django_durable.engine.asynchronous.threads import in_thread
from django_durable.engine.context import current_body
from django_durable.exceptions import InsideTransaction
from django_durable.handles import RunHandle
from django_durable.serialization import register_kind


class WaitResult(NamedTuple):
    """Which of the runs have ended, and which have not; each in the order in which they were given."""

    done: list[RunHandle]
    pending: list[RunHandle]


def wait(
    handles: Sequence[RunHandle],
    return_when: Literal["ALL", "FIRST"] = "ALL",
    timeout: float | timedelta | None = None,
) -> WaitResult:
    """Wait until all of these runs have ended, however they ended, or with "FIRST" one of them.

    After `timeout` (seconds or timedelta; 0 looks once, None waits without limit) it returns what there is. In a
    workflow's body the answer is recorded, and the wait parks. Raises TypeError or ValueError for arguments that
    make no sense, `RunNotFound`, and `InsideTransaction`, if it would wait without limit in a transaction that the
    runs may be part of.
    """
    handles = list(dict.fromkeys(handles))
    for handle in handles:
        if not isinstance(handle, RunHandle):
            raise TypeError(f"wait() takes handles of runs, found {type(handle).__name__}: {handle!r}.")
    if return_when not in ("ALL", "FIRST"):
        raise ValueError(f'wait() takes return_when="ALL" or "FIRST", found {return_when!r}.')
    seconds = None if timeout is None else as_seconds(timeout, "timeout")
    addresses = [(handle.database, handle.id) for handle in handles]
    first, context = return_when == "FIRST" and bool(handles), current_body()
    if context is not None:
        over = set(children.wait(context, addresses, first, seconds))
    else:
        over = _wait_outside(addresses, first, seconds)
    return WaitResult(
        [handle for handle in handles if (handle.database, handle.id) in over],
        [handle for handle in handles if (handle.database, handle.id) not in over],
    )


@markcoroutinefunction
def await_(
    handles: Sequence[RunHandle],
    return_when: Literal["ALL", "FIRST"] = "ALL",
    timeout: float | timedelta | None = None,
) -> Coroutine[Any, Any, WaitResult]:
    """See wait()."""
    if current_body() is not None:
        return awaitable("await_", wait, handles, return_when, timeout)
    return _await_outside(handles, return_when, timeout)


async def _await_outside(
    handles: Sequence[RunHandle], return_when: Literal["ALL", "FIRST"], timeout: float | timedelta | None
) -> WaitResult:
    until = None if timeout is None else time.monotonic() + as_seconds(timeout, "timeout")
    for pause in operations.pauses():
        result = await in_thread(partial(wait, handles, return_when, 0))
        left = float("inf") if until is None else until - time.monotonic()
        if not result.pending or (return_when == "FIRST" and result.done) or left <= 0:
            return result
        await asyncio.sleep(min(pause, left))
    raise AssertionError("unreachable: pauses() has no end")


def _wait_outside(addresses: list[tuple[str, str]], first: bool, timeout: float | None) -> set[tuple[str, str]]:
    until = None if timeout is None else time.monotonic() + timeout
    for pause in operations.pauses():
        over = children.ended(addresses)
        left = float("inf") if until is None else until - time.monotonic()
        if len(over) >= (1 if first else len(addresses)) or left <= 0:
            return over
        for alias, run_id in addresses:
            if timeout is None and (alias, run_id) not in over and connections[alias].in_atomic_block:
                raise InsideTransaction.waiting(run_id, alias, "wait()")
        time.sleep(min(pause, left))
    raise AssertionError("unreachable: pauses() has no end")


register_kind("wait", WaitResult, list, lambda stored: WaitResult(*stored))
