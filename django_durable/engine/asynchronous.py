"""Async workflows: the body and its async steps run on an event loop, what they need of the database in one thread.

Each call gets its position when it is made, on the loop. Outcomes are shown to the body one at a time, in the order
in which they came about, and each only when the body has gone as far as it can with those before. So a replay, which
shows the recorded outcomes in the same order, meets the same calls at the same positions, whatever finished first.

A worker has one loop, in a thread of its own. The thread that holds a run serves as its database thread meanwhile:
the engine's statements and the user's thread-sensitive calls, one at a time, on that thread's connections. A workflow
that is awaited directly runs on its caller's loop, and its database work goes where asgiref sends the caller's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, sync_to_async
from django.db import Error, IntegrityError, connections

from django_durable import compat
from django_durable.compat import Trouble
from django_durable.conf import options
from django_durable.engine import checkpoints, endings, payloads
from django_durable.engine.calls import (
    LOOK_AGAIN,
    SHORTEST_PAUSE,
    Awaited,
    Blocked,
    Slot,
    answer,
    at_work_for,
    is_async,
    next_call,
    refuse_if_ended,
    slot_of,
)
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.context import RunContext, before_step, current_body, inside
from django_durable.engine.retries import jittered
from django_durable.engine.stepper import STEP_KINDS, StepDefinition, _Execution, _recorded_elsewhere
from django_durable.exceptions import (
    Cancelled,
    ContinueAsNew,
    Crash,
    Halt,
    LeaseLost,
    NotInWorkflow,
    Parked,
    StepTimeout,
)
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.serialization import describe_exception
from django_durable.states import OPEN_STEPS, RunStatus, StepKind, StepStatus

logger = logging.getLogger("django_durable.run")

T = TypeVar("T")

# After so many turns of the loop without a new call, the body has gone as far as it can: each level of gather() or
# TaskGroup takes two or three to pass an outcome on.
QUIET_TURNS = 20

# How long a call that is looked at again beside others that are under way is left alone at most, in seconds.
LONGEST_LOOK = 1.0

# What ends an execution, and no step's own error.
UNWINDING = (Cancelled, ContinueAsNew, Crash, Halt, LeaseLost, Parked)


# -- The loop, and the thread ----------------------------------------------------------------------------------------

_loop: tuple[int, asyncio.AbstractEventLoop] | None = None
_lock = threading.Lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """This process's loop for the async runs of its workers, started at the first one."""
    global _loop
    with _lock:
        # A forked child has the loop, and not its thread.
        if _loop is None or _loop[0] != os.getpid():
            loop = asyncio.new_event_loop()
            threading.Thread(target=_run_forever, args=[loop], name="durable-loop", daemon=True).start()
            _loop = os.getpid(), loop
        return _loop[1]


def _after_fork() -> None:
    # The lock may have been held by a thread that does not exist in the child.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
        except BaseException:
            # SystemExit in a task of the user's leaves the loop. It is that run's end, and not all runs'.
            logger.exception("A task of an async workflow tried to end the process")


class Lane(Executor):
    """Executes what is submitted in the thread that calls `serve`."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self._closed:
            raise RuntimeError("The run that this code belonged to has ended, and its thread is not there any more.")
        future: Future[Any] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                value = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(value)

        self._work.put(work)
        return future

    def close(self) -> None:
        self._closed = True
        self._work.put(None)

    def serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()


@contextmanager
def _own_loop() -> Iterator[None]:
    """What asgiref knows of this thread's loop is as before behind the block: a later async_to_sync() is not ours."""
    known = SyncToAsync.threadlocal
    before = {name: getattr(known, name) for name in ("main_event_loop", "main_event_loop_pid") if hasattr(known, name)}
    try:
        yield
    finally:
        for name in ("main_event_loop", "main_event_loop_pid"):
            if name in before:
                setattr(known, name, before[name])
            elif hasattr(known, name):
                delattr(known, name)


@asynccontextmanager
async def _database_thread(lane: Lane) -> AsyncIterator[None]:
    """Thread-sensitive calls of the block's code go to the lane."""
    try:
        around = ThreadSensitiveContext(executor=lane)
    except TypeError:
        # asgiref before 3.13 has no such argument. This is what it does.
        around = ThreadSensitiveContext()
        token = SyncToAsync.thread_sensitive_context.set(around)
        SyncToAsync.context_to_thread_executor[around] = lane  # type: ignore[assignment, unused-ignore]
        AsyncToSync.executors.current = None
        try:
            yield
        finally:
            SyncToAsync.context_to_thread_executor.pop(around, None)
            SyncToAsync.thread_sensitive_context.reset(token)
    else:
        async with around:
            yield


def drive(context: RunContext, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Run the async body on the process's loop; this thread serves as its database thread until it ends."""
    lane, ended = Lane(), Result()
    body = Body(context)

    async def run() -> None:
        nonlocal ended
        try:
            async with _database_thread(lane):
                ended = await result_of(body.run(args, kwargs))
        finally:
            lane.close()

    asyncio.run_coroutine_threadsafe(run(), event_loop())
    with _own_loop():
        try:
            lane.serve()
        except BaseException:
            # Ctrl-C: what is under way on the loop ends before its thread leaves it.
            event_loop().call_soon_threadsafe(body.leave)
            lane.serve()
            raise
    return ended.get()


class Result(NamedTuple):
    """What a function returned or raised: a Future refuses StopIteration, and would cancel who awaits it."""

    value: Any = None
    error: BaseException | None = None

    def get(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


async def result_of(coroutine: Awaitable[Any]) -> Result:
    try:
        return Result(await coroutine)
    except BaseException as error:
        return Result(error=error)


async def in_thread(function: Callable[[], T]) -> T:
    """Call it in the run's database thread."""

    def call() -> Result:
        try:
            return Result(function())
        except BaseException as error:
            return Result(error=error)

    result = await sync_to_async(call, thread_sensitive=True)()
    value: T = result.get()
    return value


# -- The calls of a body ---------------------------------------------------------------------------------------------


class Inline(BaseException):
    """In the thread of an async call, another async workflow is to be executed: the loop does that, and asks again."""

    def __init__(self, execution: Callable[[], Awaitable[Any]]) -> None:
        self.execution = execution
        super().__init__("an async workflow is executed on the loop")


def hands_over() -> bool:
    """Whether this thread is at work for a call of an async body, whose loop can execute an async child."""
    context = current_body()
    return context is not None and slot_of(context) is not None


_body: ContextVar[Body | None] = ContextVar("django_durable_body", default=None)


def awaited(name: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> Coroutine[Any, Any, T]:
    """Let a plain function, which makes one recorded call, be awaited; in an async body that is a call of the body's.

    It has its position when this returns.
    """
    context = current_body()
    call = partial(function, *args, **kwargs)
    return in_thread(call) if context is None else body_of(context, name).call(name, Attempts(call))


def call_step(
    context: RunContext, step: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Coroutine[Any, Any, Any]:
    """Call a step, async or not, from an async body."""
    body = body_of(context, step.name)
    if is_async(step.func):
        return body.call(step.name, AsyncAttempts(context, step, args, kwargs))
    return body.call(step.name, Attempts(partial(_perform, context, step, args, kwargs)))


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
    if loop is not body.loop:
        raise TypeError(
            f"{name!r} was called in another thread than the async workflow {context.definition.name!r}. Await it in "
            "the workflow's own code; inside sync_to_async() call plain functions, or put all of that into a step."
        )
    return body


class State:
    """Of a call: where it stands."""

    # Not begun: it may have no outcome yet, or one that is recorded.
    NEW = "new"
    # Something is at work for it.
    UNDER_WAY = "under way"
    # It waits for a time, or for others.
    BLOCKED = "blocked"
    # Its outcome waits for its turn to be shown.
    READY = "ready"


class Flight:
    """One call of an async body, from when it is awaited to when it is shown its outcome."""

    def __init__(self, body: Body, position: int, name: str, attempts: Attempts) -> None:
        self.body = body
        self.position = position
        self.name = name
        self.attempts = attempts
        self.state = State.NEW
        # What is done for it is done in the context of who awaits it.
        self.scope = copy_context()
        self.future: asyncio.Future[Result] = body.loop.create_future()
        self.task: asyncio.Task[None] | None = None
        self.result = Result()
        self.outcome: StepCheckpoint | None = None
        self.blocked: Blocked | None = None
        self.pause = SHORTEST_PAUSE
        self.look_at: datetime | None = None

    @property
    def recorded(self) -> StepCheckpoint | None:
        """Its recorded outcome."""
        found = self.body.context.recorded.get(self.position)
        return found if found is not None and found.status not in OPEN_STEPS else None

    @property
    def finished(self) -> tuple[datetime, int]:
        """When its outcome came about: outcomes are shown in this order."""
        outcome = self.outcome or self.recorded
        return (outcome.finished_at if outcome is not None else self.body.last, self.position)

    def go(self) -> None:
        """Begin, or look again."""
        self.state = State.UNDER_WAY
        self.task = self.body.loop.create_task(self._go(), context=self.scope)

    async def _go(self) -> None:
        body, slot = self.body, Slot(self.body.context, self.position, self.body.stamp)
        try:
            result = await result_of(self.attempts.attempt(slot))
        finally:
            body.changed.set()
        self.outcome = slot.answered
        if slot.call is not None and slot.call.recorded is not None:
            # The next look, in this execution, goes on from what is known now.
            body.context.recorded[self.position] = slot.call.recorded
        if isinstance(result.error, Blocked):
            self._block(result.error)
            return
        if isinstance(result.error, UNWINDING):
            body.context.end(result.error)
        self.result = result
        self.state = State.READY

    def _block(self, blocked: Blocked) -> None:
        self.state, self.blocked = State.BLOCKED, blocked
        if blocked.wait is None:
            self.look_at = blocked.until
            return
        self.look_at = self.body.now() + timedelta(seconds=self.pause)
        self.pause = min(LONGEST_LOOK, self.pause * 2)
        if blocked.until is not None:
            self.look_at = min(self.look_at, blocked.until)

    def show(self, result: Result) -> None:
        """Let the body go on with this."""
        self.body.flights.pop(self.position, None)
        self.body.active()
        if not self.future.done():
            self.future.set_result(result)


class Attempts:
    """The looks of a call whose work is done in the run's thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    async def attempt(self, slot: Slot) -> Any:
        def work() -> Any:
            with at_work_for(slot):
                return self.function()

        while True:
            try:
                return await in_thread(work)
            except Inline as inline:
                if slot.call is not None and slot.call.recorded is not None:
                    slot.context.recorded[slot.position] = slot.call.recorded
                await inline.execution()

    async def stop(self) -> None:
        """The body does not want it any more. What a thread is at work for cannot be stopped."""


class AsyncAttempts(Attempts):
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
            self.task = asyncio.get_running_loop().create_task(result_of(execution.call()))
            await asyncio.wait({self.task})
            if self.task.cancelled():
                # Before it had begun.
                raise asyncio.CancelledError
            recorded, again = await in_thread(in_slot(partial(execution.end, self.task.result()))), True
        return await in_thread(in_slot(partial(_answer, self.context, recorded, execution.traceback)))

    def _begin(self) -> tuple[StepCheckpoint | None, _Tries]:
        position, recorded = next_call(self.context, self.step.name, STEP_KINDS)
        execution = _Tries(self.context, self.step, position, recorded, self.args, self.kwargs, beside=True)
        if recorded is not None and recorded.status in OPEN_STEPS:
            _wait_for_next_try(self.context, recorded)
            recorded = None
        return recorded, execution

    async def stop(self) -> None:
        self.stopped = True
        if self.task is not None and not self.task.done():
            self.task.cancel()
            await asyncio.wait({self.task})


class _Tries(_Execution):
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
                stands = _recorded_elsewhere(context, position, step)
            if stands is None:
                execution = _Tries(context, step, position, recorded, args, kwargs, beside=True)
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


# -- The body --------------------------------------------------------------------------------------------------------


class Body:
    """One execution of an async workflow's function: its tasks, and its calls that are under way."""

    loop: asyncio.AbstractEventLoop
    main: asyncio.Task[Result]

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.flights: dict[int, Flight] = {}
        # At work for calls that the body has cancelled.
        self.abandoned: set[asyncio.Task[None]] = set()
        # The tasks that have called us. They end with the body.
        self.tasks: set[asyncio.Task[Any]] = set()
        # The function has returned, or is not waited for any more.
        self.over = False
        # Who awaited the workflow has gone: nothing of it may stay on that loop.
        self.leaving = False
        self.changed = asyncio.Event()
        # Counts calls, and outcomes that were shown: what others may follow from at once.
        self.activity = 0
        outcomes = [step for step in context.recorded.values() if step.status not in OPEN_STEPS]
        # What of the history was not shown to the body yet.
        self.unseen = {step.position for step in outcomes}
        # A sleep's outcome has the time of its end.
        times = [step.finished_at for step in outcomes if step.kind != StepKind.SLEEP]
        self.last = max(times, default=datetime.min.replace(tzinfo=UTC))

    def stamp(self, moment: datetime) -> datetime:
        """Return the moment, or one behind all outcomes so far: clocks differ, and one may be set back."""
        self.last = max(moment, self.last + timedelta(microseconds=1))
        return self.last

    def now(self) -> datetime:
        return self.context.lease.clock.now()

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
        flight = Flight(self, position, name, attempts)
        if (task := asyncio.current_task()) is not None:
            self.tasks.add(task)
        self.flights[flight.position] = flight
        self.active()
        if not self.unseen and self.context.ended is None:
            flight.go()
        try:
            result = await flight.future
        except asyncio.CancelledError:
            await self._abandon(flight)
            raise
        return result.get()

    async def _abandon(self, flight: Flight) -> None:
        """The body has cancelled the call: it is stopped, if it can be; its end is waited for in any case."""
        self.flights.pop(flight.position, None)
        self.unseen.discard(flight.position)
        self.active()
        if flight.task is not None and not flight.task.done():
            self.abandoned.add(flight.task)
            await flight.attempts.stop()

    def active(self) -> None:
        self.activity += 1
        self.changed.set()

    # -- From its begin to its end --

    async def run(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run the function to its end, and let nothing of it stay on the loop; return or raise what it came to."""
        self.loop = asyncio.get_running_loop()
        _body.set(self)
        self.main = self.loop.create_task(result_of(self._function(args, kwargs)))
        self.main.add_done_callback(lambda _: self.changed.set())
        conductor = self.loop.create_task(self._conduct())
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
        self.changed.set()

    async def _conduct(self) -> None:
        """Let the calls begin, wait and be shown their outcomes, until the function has ended."""
        quiet = -1
        try:
            while self.context.ended is None and not self.main.done():
                self.changed.clear()
                if quiet != self.activity:
                    quiet = await self._settle_down()
                elif not await self._advance():
                    await self._change(self._pause())
        finally:
            self.over = self.main.done()
            await self._land()
            self.over = True
            await self._end_tasks()

    async def _settle_down(self) -> int:
        """Let the body go as far as it can; return the activity since which nothing has happened."""
        seen, turns = self.activity, 0
        while turns < QUIET_TURNS and self.context.ended is None and not self.main.done():
            await asyncio.sleep(0)
            turns += 1
            if self.activity != seen:
                seen, turns = self.activity, 0
        return seen

    async def _advance(self) -> bool:
        """Do what is next, where the body waits for us; False: wait for a change."""
        new = self._in(State.NEW)
        coming = self._in(State.READY) + [flight for flight in new if flight.recorded is not None]
        if coming:
            return self._show_first(coming)
        if new:
            # Behind the whole history: what the body has cancelled by then does not begin again.
            for flight in new:
                flight.go()
            return True
        blocked, now = self._in(State.BLOCKED), self.now()
        due = [flight for flight in blocked if flight.look_at is not None and flight.look_at <= now]
        for flight in due:
            flight.go()
        if due or not blocked or self.abandoned or self._in(State.UNDER_WAY):
            return bool(due)
        return await self._wait_for_all(blocked)

    def _in(self, state: str) -> list[Flight]:
        return [self.flights[position] for position in sorted(self.flights) if self.flights[position].state == state]

    def _show_first(self, coming: list[Flight]) -> bool:
        """Let the body see the earliest of these outcomes; False: an earlier one is being read."""
        first = min(coming, key=lambda flight: flight.finished)
        now = self.now()
        for flight in self._in(State.BLOCKED):
            # A sleep that had ended by then.
            if flight.recorded is not None and flight.finished < first.finished and flight.finished[0] <= now:
                flight.go()
        earlier = (
            flight.recorded is not None and flight.finished < first.finished for flight in self._in(State.UNDER_WAY)
        )
        if any(earlier):
            return False
        if first.state == State.NEW:
            first.go()
            return False
        outcome, error = first.outcome, first.result.error
        if outcome is not None:
            self.context.seen(outcome)
            if error is not None and outcome.status == StepStatus.FAILED:
                self.context.deliver(error, first.position)
        self.unseen.discard(first.position)
        first.show(first.result)
        return True

    async def _wait_for_all(self, blocked: list[Flight]) -> bool:
        """All that the body waits for has to wait: park the run, if that takes long."""
        ends = [flight.blocked.until for flight in blocked if flight.blocked is not None and flight.blocked.until]
        left = (min(ends) - self.now()).total_seconds() if ends else None
        # A delay of just PARK_AFTER may have been drawn out by its 10 %.
        if left is None or left > options().PARK_AFTER * 1.1:
            try:
                found = await in_thread(partial(self._park, blocked))
            except Exception as error:
                blocked[0].show(Result(error=error))
                return True
            for flight in found:
                flight.go()
            return True
        lease = self.context.lease
        if not lease.stored:
            # A test's wait moves the clock.
            await in_thread(lambda: lease.wait(max(0.0, left)))
        return not lease.stored

    def _pause(self) -> float | None:
        """Seconds until something is to be looked at; None: that is not known."""
        looks = [flight.look_at for flight in self._in(State.BLOCKED) if flight.look_at is not None]
        return max(0.001, (min(looks) - self.now()).total_seconds()) if looks else None

    async def _change(self, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.changed.wait()

    async def _land(self) -> None:
        """Let what is under way come to its outcome, which is recorded; what waits is left to another execution.

        A dead executor stores nothing more, and who is gone does not wait for a step: those are cut off.
        """
        while True:
            self.changed.clear()
            ended = self.context.ended
            for flight in list(self.flights.values()):
                if flight.state != State.UNDER_WAY:
                    # Behind its end, the function cannot be shown anything: its other tasks are cancelled.
                    flight.show(Result(error=ended)) if ended is not None else self.flights.pop(flight.position)
                elif self.leaving or isinstance(ended, Crash):
                    await flight.attempts.stop()
            self.abandoned = {task for task in self.abandoned if not task.done()}
            if not self.flights and not self.abandoned:
                return
            await self.changed.wait()

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

    # -- In the run's thread --

    def _park(self, flights: list[Flight]) -> list[Flight]:
        """Park the run until the first of these calls is due; return those that have their outcome already, if any.

        Then the run is not parked.
        """
        context = self.context
        with inside(context, busy=True), at_work_for(Slot(context, 0, self.stamp)):
            context.guard()
            checkpoints.check_not_in_transaction(context, flights[0].name)
            found = checkpoints.persist(context, partial(self._park_once, flights))
            if found is None:
                raise checkpoints.lost(context)
            for flight, row in found:
                row._state.adding = False
                context.recorded[flight.position] = row
                checkpoints.announce(context, row)
            if not found:
                context.end(Parked(f"run {context.run_id} waits"))
        return [flight for flight, _ in found]

    def _park_once(self, flights: list[Flight]) -> list[tuple[Flight, StepCheckpoint]] | None:
        context = self.context
        waits = [(flight, flight.blocked.wait) for flight in flights if flight.blocked and flight.blocked.wait]
        found: list[tuple[Flight, StepCheckpoint]] = []
        whom: list[Awaited] = []
        try:
            with compat.write_transaction(context.alias):
                for flight, wait in waits:
                    looked = wait.call._look(wait.look, wait.whom)
                    if looked is None:
                        return None
                    outcome, awaited = looked
                    whom.append(awaited)
                    if outcome is not None:
                        found.append((flight, wait.call.settle(outcome)))
                if found:
                    return found
                key, wake_at = self._wake_up(flights, whom)
                held = WorkflowRun.objects.using(context.alias).held(context.run_id, context.attempt)
                if not held.move(RunStatus.WAITING, wake_at=wake_at, waiting_for=key, worker=""):
                    return None
                for (flight, wait), awaited in zip(waits, whom, strict=True):
                    wait.call.begin_to_wait(awaited, flight.blocked.until if flight.blocked else None, wait.note)
        except IntegrityError:
            # Only the answer to our own COMMIT was lost.
            stand = [(flight, checkpoints.found(context, flight.position)) for flight, _ in waits]
            found = [(flight, row) for flight, row in stand if row is not None]
            if not found:
                raise
        return found

    def _wake_up(self, flights: list[Flight], whom: list[Awaited]) -> tuple[str, datetime | None]:
        """The key under which the run is woken, and the time at which it wakes by itself.

        A run has one key. Children of its own share one; of other things the first one's tells, and the run looks
        after the others by itself.
        """
        blocked = [flight.blocked for flight in flights if flight.blocked is not None]
        timers = [(each.until, each.key) for each in blocked if each.until is not None]
        wake_at, key = min(timers, default=(None, ""))
        if whom:
            key = whom[0].key
        look_again = any(awaited.look_again for awaited in whom)
        if len({awaited.key for awaited in whom}) > 1:
            runs = {run for awaited in whom for run in awaited.runs}
            ends = all(awaited.key in (endings.ANY_CHILD, *map(endings.run_key, awaited.runs)) for awaited in whom)
            children = WorkflowRun.objects.using(self.context.alias).filter(pk__in=runs, parent=self.context.run_id)
            if ends and children.count() == len(runs):
                key = endings.ANY_CHILD
            else:
                look_again = True
        if look_again:
            soon = self.now() + timedelta(seconds=LOOK_AGAIN)
            wake_at = soon if wake_at is None else min(soon, wake_at)
        return key, wake_at
