"""`RunHandle` and `get_run`: a run, seen from outside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from asgiref.sync import markcoroutinefunction, sync_to_async
from django.db import connections

from django_durable.conf import as_seconds
from django_durable.engine import approvals, children, operations, steering, tokens
from django_durable.engine.asynchronous.awaitables import awaitable
from django_durable.engine.context import current_body, current_run
from django_durable.engine.starting import database_of
from django_durable.exceptions import InsideTransaction, RunNotFound
from django_durable.models import WorkflowRun
from django_durable.serialization import register_kind

if TYPE_CHECKING:
    from django_durable.primitives.streams import StreamReader


class RunHandle:
    """A run's id and database, and what can be asked of it or done to it. Every look is a fresh one."""

    __slots__ = ("database", "id")

    def __init__(self, run_id: str, database: str) -> None:
        self.id = run_id
        self.database = database

    def __repr__(self) -> str:
        return f"<RunHandle {self.id} in {self.database!r}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RunHandle) and (self.id, self.database) == (other.id, other.database)

    def __hash__(self) -> int:
        return hash((self.id, self.database))

    @property
    def model(self) -> WorkflowRun:
        """The run's row, read now. Raises RunNotFound."""
        return operations.fetch(self.database, self.id)

    @property
    def status(self) -> str:
        """The run's status now: "PENDING", "RUNNING", "WAITING", "SUCCEEDED", "FAILED", "CANCELLED" or "DEAD"."""
        runs = WorkflowRun.objects.using(self.database).filter(pk=self.id)
        status = runs.values_list("status", flat=True).first()
        if status is None:
            raise RunNotFound(self.id, self.database)
        return str(status)

    def result(self, timeout: float | timedelta | None = None) -> Any:
        """Wait for the run's end and return its value.

        `timeout`: seconds or timedelta; None waits without limit, 0 looks once. In a workflow's body the outcome is
        recorded, and the wait parks. Raises the workflow's own exception, `RunCancelled`, `RunDead`, `RunFailed` (its
        exception cannot be rebuilt), `RunNotFound`, or TimeoutError; and `InsideTransaction`, if it would wait
        without limit in a transaction that the run may be part of.
        """
        context = current_body()
        timeout = None if timeout is None else as_seconds(timeout, "timeout")
        if context is not None:
            return children.result(context, self.database, self.id, timeout)
        until = None if timeout is None else time.monotonic() + timeout
        for pause in operations.pauses():
            if (end := operations.look(self.database, self.id)) is not None:
                return operations.value_of(end)
            if timeout is None and connections[self.database].in_atomic_block:
                raise InsideTransaction.waiting(self.id, self.database)
            if (left := _left(until)) <= 0:
                raise self._timed_out(timeout, self.status)
            time.sleep(min(pause, left))

    @markcoroutinefunction
    def aresult(self, timeout: float | timedelta | None = None) -> Coroutine[Any, Any, Any]:
        """See result()."""
        if current_body() is not None:
            return awaitable("aresult", self.result, timeout)
        return self._aresult_outside(timeout)

    async def _aresult_outside(self, timeout: float | timedelta | None) -> Any:
        timeout = None if timeout is None else as_seconds(timeout, "timeout")
        until = None if timeout is None else time.monotonic() + timeout
        for pause in operations.pauses():
            if (end := await sync_to_async(operations.look)(self.database, self.id)) is not None:
                return operations.value_of(end)
            if (left := _left(until)) <= 0:
                raise self._timed_out(timeout, await self.astatus())
            await asyncio.sleep(min(pause, left))

    def _timed_out(self, timeout: float | None, status: str) -> TimeoutError:
        return TimeoutError(f"Run {self.id} has not ended after {timeout:g} s; it is {status}.")

    def cancel(self, reason: str = "", children: bool = True) -> bool:
        """Cancel the run, and with `children` all that it has started, in the caller's transaction.

        Returns whether that changed anything: an ended run stays. Once it has committed, no atomic step of the run
        commits any more and no further step starts; an outside call that is under way is still recorded.
        """
        return steering.cancel(self.database, self.id, reason, children=children)

    def pause(self) -> bool:
        """Keep the run from going on until `resume`: it is WAITING before its next step.

        Returns whether that changed anything: an ended or paused run stays. An outside call that is under way is
        still recorded; an atomic step is undone, and executed again later.
        """
        return steering.pause(self.database, self.id)

    def resume(self) -> bool:
        """Let a paused, FAILED, CANCELLED or DEAD run go on from its last completed step.

        Repeats the step whose error left the workflow, and counts failures and recoveries from zero. Returns whether
        that changed anything: other runs stay as they are.
        """
        return steering.resume(self.database, self.id)

    def fork(self, from_step: int) -> RunHandle:
        """Start a new run with this one's input and its outcomes below the position `from_step`; this one stays.

        Raises ValueError for a position that the run has not come to, and `RunNotFound`.
        """
        context = current_body()
        if context is not None and context.alias == self.database:
            return RunHandle(children.fork(context, self.id, from_step), self.database)
        return RunHandle(steering.fork(self.database, self.id, from_step), self.database)

    def restart(self) -> RunHandle:
        """Start a new run with this one's input, from the beginning; this one stays. Raises `RunNotFound`."""
        return self.fork(from_step=1)

    def send(self, message: Any, topic: str | None = None, key: str | None = None) -> None:
        """Send the run a message; see `send`."""
        from django_durable.primitives.messages import send

        send(self, message, topic, key)

    def get_event(self, key: str, timeout: float | timedelta | None = None, default: Any = None) -> Any:
        """Return what the run has published under the key; see `get_event`."""
        from django_durable.primitives.events import get_event

        return get_event(self, key, timeout, default)

    def stream(self, key: str, *, after: int = 0, timeout: float | timedelta | None = None) -> StreamReader:
        """Iterate over the values of the run's stream, from the first, waiting for more; ``async for`` does, too.

        It ends when the stream is closed, or the run has ended. `after`: begin behind this position, the `position`
        of a former reader. `timeout`: seconds or timedelta; with no next value by then it ends, and 0 takes what is
        there. Iterating raises `RunNotFound`, and `InsideTransaction` if it would wait without limit in a
        transaction that the run may be part of.
        """
        from django_durable.primitives.streams import StreamReader

        return StreamReader(self.database, self.id, key, after, timeout)

    def token(
        self, max_age: float | timedelta | None = None, *, events: Collection[str] = (), streams: Collection[str] = ()
    ) -> str:
        """Return a signed text with which a page may follow this run's status and steps, and nothing else.

        `max_age`: seconds or timedelta; None is for ever. `events`, `streams`: the keys of what it may read, too.
        """
        return tokens.sign(self.database, self.id, max_age, events=events, streams=streams)

    def decide(self, name: str, approved: bool, by: Any = None, data: Any = None, position: int | None = None) -> None:
        """Decide the approval of this name that the run waits for, in the caller's transaction.

        `by`: the user who decides. `data`: what the approval's form is to check, and without a form what the workflow
        is to get. `position`: of the step that asks, so that a late click does not decide the same name's next one.
        Raises `AlreadyDecided`, `NothingToDecide`, `InvalidInput` if the form refuses the data, Django's
        PermissionDenied, and `RunNotFound`.
        """
        approvals.decide(self.database, self.id, name, approved, by=by, data=data, position=position)

    async def amodel(self) -> WorkflowRun:
        """See model."""
        return await sync_to_async(operations.fetch)(self.database, self.id)

    async def astatus(self) -> str:
        """See status."""
        return await sync_to_async(lambda: self.status)()

    async def acancel(self, reason: str = "", children: bool = True) -> bool:
        """See cancel()."""
        return await sync_to_async(self.cancel)(reason, children)

    async def apause(self) -> bool:
        """See pause()."""
        return await sync_to_async(self.pause)()

    async def aresume(self) -> bool:
        """See resume()."""
        return await sync_to_async(self.resume)()

    async def afork(self, from_step: int) -> RunHandle:
        """See fork()."""
        return await sync_to_async(self.fork)(from_step)

    async def arestart(self) -> RunHandle:
        """See restart()."""
        return await sync_to_async(self.restart)()

    @markcoroutinefunction
    def asend(self, message: Any, topic: str | None = None, key: str | None = None) -> Coroutine[Any, Any, None]:
        """See send()."""
        return awaitable("asend", self.send, message, topic, key)

    async def adecide(
        self, name: str, approved: bool, by: Any = None, data: Any = None, position: int | None = None
    ) -> None:
        """See decide()."""
        await sync_to_async(self.decide)(name, approved, by, data, position)

    @markcoroutinefunction
    def aget_event(
        self, key: str, timeout: float | timedelta | None = None, default: Any = None
    ) -> Coroutine[Any, Any, Any]:
        """See get_event()."""
        from django_durable.primitives.events import aget_event

        return aget_event(self, key, timeout, default)


def run_address(run: Any, what: str) -> tuple[str, str]:
    """The database and id of the run that is meant by a handle or an id: in a run, an id is one of its database."""
    if isinstance(run, RunHandle):
        return run.database, run.id
    if not isinstance(run, str):
        raise TypeError(f"{what} takes a run's handle or its id (a str), found {type(run).__name__}: {run!r}.")
    around = current_run()
    alias = around.alias if around is not None else database_of()
    # A database refuses to compare with a NUL or half a character; no run has such an id.
    if not run.isprintable():
        raise RunNotFound(run, alias)
    return alias, run


def _left(until: float | None) -> float:
    return float("inf") if until is None else until - time.monotonic()


def get_run(run_id: str, database: str | None = None) -> RunHandle:
    """Return the handle of a stored run; raise RunNotFound if there is none of this id in that database."""
    alias = database_of(database)
    if not isinstance(run_id, str):
        raise TypeError(f"get_run() takes a run's id (a str), found {type(run_id).__name__}: {run_id!r}.")
    # A database refuses to compare with a NUL or half a character; no run has such an id.
    if not run_id.isprintable() or not WorkflowRun.objects.using(alias).filter(pk=run_id).exists():
        raise RunNotFound(run_id, alias)
    return RunHandle(run_id, alias)


async def aget_run(run_id: str, database: str | None = None) -> RunHandle:
    """See get_run()."""
    return await sync_to_async(get_run)(run_id, database)


register_kind("run", RunHandle, lambda handle: [handle.id, handle.database], lambda stored: RunHandle(*stored))
