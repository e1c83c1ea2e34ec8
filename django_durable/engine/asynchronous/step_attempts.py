"""Steps of an async body: async ones on the loop, plain ones in the run's thread. No delay between tries holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from django.db import Error, connections

from django_durable import compat
from django_durable.compat import Trouble
from django_durable.engine import checkpoints, payloads
from django_durable.engine.asynchronous.attempts import Attempts
from django_durable.engine.asynchronous.threads import Result, in_thread, result_of
from django_durable.engine.calls import Blocked, Slot, answer, at_work_for, is_async, next_call, slot_of
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.context import RunContext, before_step, inside
from django_durable.engine.retries import jittered
from django_durable.engine.stepper import STEP_KINDS, StepDefinition, StepExecution, recorded_elsewhere
from django_durable.exceptions import StepTimeout
from django_durable.models import StepCheckpoint
from django_durable.serialization import describe_exception
from django_durable.states import OPEN_STEPS, StepStatus

T = TypeVar("T")


def attempts_of(context: RunContext, step: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attempts:
    """The tries of a step, async or not."""
    if is_async(step.func):
        return AsyncStepAttempts(context, step, args, kwargs)
    return Attempts(partial(_perform, context, step, args, kwargs))


class AsyncStepAttempts(Attempts):
    """The tries of an async step: on the loop, as a task of its own, with its outcome stored in the run's thread."""

    def __init__(
        self, context: RunContext, step: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.context = context
        self.step = step
        self.args = args
        self.kwargs = kwargs
        self.task: asyncio.Task[Result] | None = None
        self.stopped = False

    async def attempt(self, slot: Slot) -> Any:
        def in_slot(function: Callable[[], T]) -> Callable[[], T]:
            def work() -> T:
                with at_work_for(slot), inside(self.context, busy=True):
                    return function()

            return work

        recorded, execution = await in_thread(in_slot(self._begin))
        again = False
        while recorded is None:
            await in_thread(in_slot(partial(execution.begin, again=again)))
            if self.stopped:
                raise asyncio.CancelledError
            call = execution.call()
            self.task = asyncio.get_running_loop().create_task(result_of(call))
            await asyncio.wait({self.task})
            if self.task.cancelled():
                # Before it had begun: Python would warn of a coroutine that nobody awaited.
                call.close()
                raise asyncio.CancelledError
            recorded, again = await in_thread(in_slot(partial(execution.end, self.task.result()))), True
        return await in_thread(in_slot(partial(_answer, self.context, recorded, execution.traceback)))

    def _begin(self) -> tuple[StepCheckpoint | None, StepExecutionBeside]:
        position, recorded = next_call(self.context, self.step.name, STEP_KINDS)
        execution = StepExecutionBeside(
            self.context, self.step, position, recorded, self.args, self.kwargs, beside=True
        )
        if recorded is not None and recorded.status in OPEN_STEPS:
            _wait_for_next_try(self.context, recorded)
            recorded = None
        return recorded, execution

    async def stop(self) -> None:
        self.stopped = True
        if self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait({self.task})


class StepExecutionBeside(StepExecution):
    """The tries of a step of an async body: no delay between them holds the run's thread."""

    driver: Any = None

    def begin(self, *, again: bool) -> None:
        """What comes before the function of an async step; `again`: behind a lost connection, which is no try."""
        self.context.guard()
        checkpoints.check_not_in_transaction(self.context, self.step.name)
        if not again:
            for told in before_step:
                told(self.context, self.step.name)
            self.tries += 1
        self.driver = connections[self.context.alias].connection

    async def call(self) -> Any:
        with self._inside():
            try:
                async with asyncio.timeout(self.step.timeout) as limit:
                    return await self.step.func(*self.args, **self.kwargs)
            except TimeoutError as error:
                if self.step.timeout is None or not limit.expired():
                    raise
                raise StepTimeout(self.step.name, self.context.run_id, self.step.timeout) from error

    def end(self, result: Result) -> StepCheckpoint | None:
        """Store what the function came to; None: it met a database that went away, and is called again."""
        error = result.error
        if error is None:
            try:
                with self._inside():
                    output = payloads.dump(result.value, self.place)
                return self._record(Outcome(StepStatus.SUCCEEDED, output=output), effect_happened=True)
            except Exception as refused:
                error = refused
        if not isinstance(error, Exception):
            raise error
        connection = connections[self.context.alias]
        if isinstance(error, Error) and not connection.in_atomic_block:
            broken = connection.connection is not self.driver or not compat.usable(connection)
            if compat.trouble(error, broken=broken) is Trouble.LOST:
                self._prepare_rerun(Trouble.LOST, self.context.alias)
                return None
        delay = self.step.retry.wait(error, self.tries)
        return self._record_failure(error) if delay is None else self._record_try(error, delay)

    def _row(self, outcome: Outcome, database: str = "") -> StepCheckpoint:
        row = super()._row(outcome, database)
        if (slot := slot_of(self.context)) is not None:
            row.finished_at = slot.stamp(row.finished_at)
        return row

    def _record_try(self, error: Exception, delay: float) -> StepCheckpoint | None:
        row = self._row(Outcome(StepStatus.RETRYING, error=describe_exception(error)))
        row.finished_at = self.context.lease.clock.now() + timedelta(seconds=jittered(delay))
        return checkpoints.record(self.context, row, replaces=self.retrying, effect_happened=not self.step.atomic)


def _perform(context: RunContext, step: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`stepper.perform` for a plain step of an async body, in the run's thread."""
    position, recorded = next_call(context, step.name, STEP_KINDS)
    with inside(context, busy=True):
        traceback = None
        if recorded is None or recorded.status in OPEN_STEPS:
            checkpoints.check_not_in_transaction(context, step.name)
            if recorded is not None:
                _wait_for_next_try(context, recorded)
            stands = None
            if recorded is None and not context.fresh and step.using not in (None, context.alias):
                stands = recorded_elsewhere(context, position, step)
            if stands is None:
                execution = StepExecutionBeside(context, step, position, recorded, args, kwargs, beside=True)
                stands, traceback = execution.outcome(), execution.traceback
            recorded = stands
        return _answer(context, recorded, traceback)


def _answer(context: RunContext, recorded: StepCheckpoint, traceback: Any) -> Any:
    if recorded.status in OPEN_STEPS:
        context.recorded[recorded.position] = recorded
        raise _next_try(recorded)
    return answer(context, recorded, traceback)


def _wait_for_next_try(context: RunContext, recorded: StepCheckpoint) -> None:
    if recorded.finished_at > context.lease.clock.now():
        raise _next_try(recorded)


def _next_try(recorded: StepCheckpoint) -> Blocked:
    return Blocked(f"retry:{recorded.name}", recorded.finished_at)
