"""`RunHandle` and `get_run`: a run, seen from outside."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from asgiref.sync import sync_to_async
from django.db import connections

from django_durable.engine import operations
from django_durable.exceptions import InsideTransaction, RunNotFound
from django_durable.models import WorkflowRun
from django_durable.serialization import register_kind


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

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the run's end and return its value.

        `timeout` in seconds; None waits without limit, 0 looks once. Raises the workflow's own exception,
        `RunCancelled`, `RunDead`, `RunFailed` (its exception cannot be rebuilt), `RunNotFound`, or TimeoutError; and
        `InsideTransaction`, if it would wait without limit in a transaction that the run may be part of.
        """
        until = None if timeout is None else time.monotonic() + timeout
        for pause in operations.pauses():
            if (end := operations.look(self.database, self.id)) is not None:
                return operations.value_of(end)
            if timeout is None and connections[self.database].in_atomic_block:
                raise InsideTransaction.waiting(self.id, self.database)
            if (left := _left(until)) <= 0:
                raise self._timed_out(timeout, self.status)
            time.sleep(min(pause, left))

    async def aresult(self, timeout: float | None = None) -> Any:
        """See result()."""
        until = None if timeout is None else time.monotonic() + timeout
        for pause in operations.pauses():
            if (end := await sync_to_async(operations.look)(self.database, self.id)) is not None:
                return operations.value_of(end)
            if (left := _left(until)) <= 0:
                raise self._timed_out(timeout, await self.astatus())
            await asyncio.sleep(min(pause, left))

    def _timed_out(self, timeout: float | None, status: str) -> TimeoutError:
        return TimeoutError(f"Run {self.id} has not ended after {timeout:g} s; it is {status}.")

    def cancel(self, reason: str = "") -> bool:
        """Cancel the run, in the caller's transaction. Returns whether that changed anything: an ended run stays.

        Once it has committed, no atomic step of the run commits any more and no further step starts; an outside
        call that is under way is still recorded.
        """
        return operations.cancel(self.database, self.id, reason)

    def resume(self) -> bool:
        """Let a FAILED, CANCELLED or DEAD run go on from its last completed step.

        Repeats the step whose error left the workflow, and counts failures and recoveries from zero. Returns whether
        that changed anything: other runs stay as they are.
        """
        return operations.resume(self.database, self.id)

    async def amodel(self) -> WorkflowRun:
        """See model."""
        return await sync_to_async(operations.fetch)(self.database, self.id)

    async def astatus(self) -> str:
        """See status."""
        return await sync_to_async(lambda: self.status)()

    async def acancel(self, reason: str = "") -> bool:
        """See cancel()."""
        return await sync_to_async(self.cancel)(reason)

    async def aresume(self) -> bool:
        """See resume()."""
        return await sync_to_async(self.resume)()


def _left(until: float | None) -> float:
    return float("inf") if until is None else until - time.monotonic()


def get_run(run_id: str, database: str | None = None) -> RunHandle:
    """Return the handle of a stored run; raise RunNotFound if there is none of this id in that database."""
    alias = operations.database_of(database)
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
