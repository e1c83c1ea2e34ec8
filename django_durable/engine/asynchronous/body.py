"""One execution of an async workflow's function, from its begin to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

from django_durable.engine.asynchronous.attempts import Attempts
from django_durable.engine.asynchronous.pending import PendingCall, PendingCalls, State
from django_durable.engine.asynchronous.threads import Result, in_thread, result_of
from django_durable.engine.asynchronous.turns import QUIET_TURNS, Turns
from django_durable.engine.calls import is_async, refuse_if_ended
from django_durable.engine.checkpoints import take_back
from django_durable.engine.context import RunContext, inside
from django_durable.exceptions import Crash, LeaseLost, NotInWorkflow
from django_durable.states import StepKind, StepStatus

_body: ContextVar[Body | None] = ContextVar("django_durable_body", default=None)


def body_of(context: RunContext, name: str) -> Body:
    """The async body that this code is part of; raise TypeError elsewhere."""
    body, loop = _body.get(), None
    with suppress(RuntimeError):
        loop = asyncio.get_running_loop()
    if not is_async(context.definition.func) or body is None or body.context is not context:
        raise TypeError(
            f"Workflow {context.definition.name!r} is a plain function and cannot await {name!r}. Make the workflow "
            "async def, or call a plain function: a plain step, or for a run .start(...) and then .result()."
        )
    if loop is not body.pending.loop:
        raise TypeError(
            f"{name!r} was called in another thread than the async workflow {context.definition.name!r}. Await it in "
            "the workflow's own code; inside sync_to_async() call plain functions, or put all of that into a step."
        )
    return body


class Body:
    """One execution of an async workflow's function: its tasks, and its calls that are under way."""

    main: asyncio.Task[Result]

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.pending = PendingCalls(context)
        # The tasks that have called us. They end with the body.
        self.tasks: set[asyncio.Task[Any]] = set()
        # The function has returned, or is not waited for any more.
        self.over = False
        # Who awaited the workflow has gone: nothing of it may stay on that loop.
        self.leaving = False

    # -- For the workflow's code --

    def call(self, name: str, attempts: Attempts) -> Coroutine[Any, Any, Any]:
        """Give the call its position; what it returns waits for the outcome."""
        refuse_if_ended(self.context, name)
        if self.over:
            raise NotInWorkflow(name, "when the workflow's function had returned")
        return self._outcome(self.context.next_position(), name, attempts)

    async def _outcome(self, position: int, name: str, attempts: Attempts) -> Any:
        if self.over:
            raise asyncio.CancelledError
        call = PendingCall(self.pending, position, name, attempts)
        if (task := asyncio.current_task()) is not None:
            self.tasks.add(task)
        self.pending.by_position[position] = call
        self.pending.note_activity()
        if not self.pending.unseen and self.context.ended is None:
            call.go()
        try:
            result = await call.future
        except asyncio.CancelledError:
            await self._abandon(call)
            raise
        return result.get()

    async def _abandon(self, call: PendingCall) -> None:
        """The body has cancelled the call: it is stopped, if it can be; its end is waited for in any case."""
        self.pending.by_position.pop(call.position, None)
        self.pending.unseen.discard(call.position)
        self.pending.note_activity()
        withdrawal = self.pending.loop.create_task(result_of(self._withdraw(call)))
        self.pending.abandoned.add(withdrawal)
        withdrawal.add_done_callback(self._withdrawn)
        if call.task is not None and not call.task.done():
            await call.attempts.stop()

    def _withdrawn(self, task: asyncio.Task[Any]) -> None:
        # Or the run would never park again: it waits for what is under way.
        self.pending.abandoned.discard(task)
        self.pending.changed.set()

    async def _withdraw(self, call: PendingCall) -> None:
        """Take back what a call has come to that the body does not see: a message taken, a question that is open."""
        if call.task is not None and not call.task.done():
            await asyncio.wait({call.task})
        recorded = self.context.recorded.get(call.position)
        if recorded is None or self.over or self.context.ended is not None:
            return
        taken = recorded.kind == StepKind.RECEIVE and recorded.status == StepStatus.SUCCEEDED
        asked = recorded.kind == StepKind.APPROVAL and recorded.status == StepStatus.WAITING
        if taken or asked:
            await in_thread(partial(take_back, self.context, call.position))

    # -- From its begin to its end --

    async def run(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run the function to its end, and let nothing of it stay on the loop; return or raise what it came to."""
        loop = self.pending.loop = asyncio.get_running_loop()
        _body.set(self)
        self.main = loop.create_task(result_of(self._function(args, kwargs)))
        self.main.add_done_callback(lambda _: self.pending.changed.set())
        conductor = loop.create_task(self._conduct())
        while not conductor.done():
            try:
                await asyncio.wait({conductor})
            except asyncio.CancelledError:
                self.leave()
        conductor.result()
        result, ended = self.main.result(), self.context.ended
        if ended is not None and not isinstance(result.error, Exception):
            # Tasks that were cancelled for it, or a group of errors with it inside, say no more.
            raise ended
        return result.get()

    async def _function(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        with inside(self.context):
            return await self.context.definition.func(*args, **kwargs)

    def leave(self) -> None:
        """Who awaited the workflow is cancelled: the run is handed back, for others to go on."""
        self.leaving = True
        self.context.end(LeaseLost(f"who awaited run {self.context.run_id} was cancelled"))
        self.pending.changed.set()

    async def _conduct(self) -> None:
        """Lead the function to its end, and behind it let nothing go on."""
        try:
            await Turns(self.pending, self.main).take()
        finally:
            self.over = self.main.done()
            await self._land()
            self.over = True
            await self._end_tasks()

    async def _land(self) -> None:
        """Let what is under way come to its outcome, which is recorded; what waits is left to another execution.

        A dead executor stores nothing more, and who is gone does not wait for a step: those are cut off.
        """
        while True:
            self.pending.changed.clear()
            ended = self.context.ended
            for call in list(self.pending.by_position.values()):
                if call.state != State.UNDER_WAY:
                    # Behind its end, the function cannot be shown anything: its other tasks are cancelled.
                    call.show(Result(error=ended)) if ended is not None else self.pending.by_position.pop(call.position)
                elif self.leaving or isinstance(ended, Crash):
                    await call.attempts.stop()
            self.pending.abandoned = {task for task in self.pending.abandoned if not task.done()}
            if not self.pending.by_position and not self.pending.abandoned:
                return
            await self.pending.changed.wait()

    async def _end_tasks(self) -> None:
        """Nothing of the body stays on the loop."""
        turns = 0
        while rest := {task for task in (self.main, *self.tasks) if not task.done()}:
            if turns < QUIET_TURNS:
                turns += 1
                await asyncio.sleep(0)
                continue
            for task in rest:
                task.cancel()
            # One that has caught its cancellation and goes on meets the next.
            await asyncio.wait(rest, timeout=1)
