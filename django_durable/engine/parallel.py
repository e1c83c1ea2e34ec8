"""Steps beside the body: they are called by it, one after the other, and come to their outcomes in threads of the run.

The body gives the positions, so that a replay finds each outcome whatever finished first, and the body alone shows
outcomes to the workflow, when it asks for them. A thread does no more than bring a step to its outcome.

What was submitted comes to its outcome before the run is parked or ends, so that the fence refuses nothing that is
under way. Only a step whose next try is far away is left for a later execution, which begins at that time.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import copy_context
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Generic, TypeVar

from django.db import Error, connections

from django_durable.conf import as_seconds, options
from django_durable.engine import checkpoints, payloads
from django_durable.engine.calls import Call, answer, body, next_call, refuse_if_ended
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.context import RunContext, current_run, inside
from django_durable.engine.parking import park
from django_durable.engine.stepper import STEP_KINDS, StepDefinition, bring_to_outcome
from django_durable.exceptions import Cancelled, LeaseLost, NotInWorkflow
from django_durable.serialization import describe_exception, dump_exception
from django_durable.states import OPEN_STEPS, StepKind, StepStatus

R = TypeVar("R")

# How many submitted steps of a run are under way at a time, unless map() says otherwise.
MAX_PARALLEL = 8

# A thread without work keeps its connection so long, or a loop of small maps would spend its time connecting. Seconds.
LINGER = 1.0


class StepFuture(ABC, Generic[R]):
    """What a submitted step will come to."""

    @abstractmethod
    def result(self, timeout: float | timedelta | None = None) -> R:
        """Wait for the step; return its value or raise its error.

        After `timeout` (seconds or timedelta; 0 looks once, None waits without limit) raises TimeoutError; the step
        goes on. In a workflow that answer is recorded: it takes a place in the history, and a replay sees it too.
        """


class Called(StepFuture[R]):
    """A step that was called at once: outside a workflow, and inside another step."""

    def __init__(self, call: Callable[[], R]) -> None:
        self._error: Exception | None = None
        try:
            self._value = call()
        except Exception as error:
            self._error = error

    def result(self, timeout: float | timedelta | None = None) -> R:
        if self._error is not None:
            raise self._error
        return self._value


class _Group:
    """Steps of which so many are under way at a time: those of one map(), or all that were submitted one by one."""

    __slots__ = ("later", "limit", "queue", "running")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = 0
        self.queue: deque[Branch[Any]] = deque()
        # To be tried again, each at its time.
        self.later: list[Branch[Any]] = []

    def ready(self, now: datetime) -> int:
        """How many could begin now."""
        if not self.queue and not self.later:
            return 0
        return min(len(self.queue) + sum(branch.due <= now for branch in self.later), self.limit - self.running)

    def take(self, now: datetime) -> Branch[Any] | None:
        if self.running >= self.limit:
            return None
        for branch in self.later:
            if branch.due <= now:
                self.later.remove(branch)
                return branch
        return self.queue.popleft() if self.queue else None


class Branch(StepFuture[R]):
    """One call of a step beside the body: its place in the history, and what it has come to."""

    def __init__(
        self, context: RunContext, step: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.context = context
        self.step = step
        self.args = args
        self.kwargs = kwargs
        self.position, self.recorded = next_call(context, step.name, STEP_KINDS)
        self.traceback: TracebackType | None = None
        if not self.done:
            checkpoints.check_not_in_transaction(context, step.name)
            with inside(context, busy=True):
                # Its thread is in the run as the body is, and then in a step of its own.
                self.scope = copy_context()

    @property
    def done(self) -> bool:
        """Whether it has an outcome."""
        return self.recorded is not None and self.recorded.status not in OPEN_STEPS

    @property
    def due(self) -> datetime:
        """When its next try is, behind one that failed."""
        if self.recorded is None:
            raise AssertionError(f"step {self.position} of run {self.context.run_id} was not tried yet")
        return self.recorded.finished_at

    def result(self, timeout: float | timedelta | None = None) -> R:
        if body("result") is not self.context:
            raise NotInWorkflow("result()", f"in another run than {self.context.run_id}, which submitted the step")
        refuse_if_ended(self.context, f"result of {self.step.name}")
        if timeout is not None:
            self._wait_so_long(as_seconds(timeout, "timeout"))
        elif not self.done:
            _of(self.context).wait_for(self)
        return self.answer()

    def answer(self) -> R:
        """Show the outcome to the workflow."""
        if self.recorded is None:
            raise AssertionError(f"step {self.position} of run {self.context.run_id} has no outcome yet")
        with inside(self.context, busy=True):
            value: R = answer(self.context, self.recorded, self.traceback)
            return value

    def go_on(self) -> None:
        """Bring the step to its outcome, or to a try that is to be repeated long after; in any thread."""
        recorded, self.traceback = bring_to_outcome(
            self.context, self.step, self.position, self.recorded, self.args, self.kwargs, beside=True
        )
        # Last: the body may be looking at it.
        self.recorded = recorded

    def _wait_so_long(self, seconds: float) -> None:
        """Wait for the outcome; record whether it came in time, as a replay would find it there."""
        call = Call(self.context, f"result {self.step.name}", StepKind.WAIT)
        if not call.done:
            if self.done or _of(self.context).wait_for(self, call, call._deadline(seconds)):
                seen = Outcome(StepStatus.SUCCEEDED, output=payloads.dump(None, call.place))
            else:
                late = TimeoutError(f"Step {self.step.name!r} has not ended after {seconds:g} s.")
                seen = Outcome(StepStatus.FAILED, error=describe_exception(late), exception=dump_exception(late))
            call.commit(lambda: seen)
        call.answer()


def submit(context: RunContext, step: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Branch[Any]:
    """Call a step beside the body. One that has its outcome already needs no thread."""
    branch: Branch[Any] = Branch(context, step, args, kwargs)
    if not branch.done:
        threads = _of(context)
        threads.add([branch], threads.submitted)
    return branch


def each(context: RunContext, step: StepDefinition, items: Iterable[Any], limit: int) -> list[Any]:
    """Call a step for each item, so many at a time; return the values in order, or raise the first error in order.

    All come to their outcomes, also behind an error.
    """
    # All items first: what makes them may call steps itself.
    branches: list[Branch[Any]] = [Branch(context, step, (item,), {}) for item in list(items)]
    new = [branch for branch in branches if not branch.done]
    if new:
        threads, group = _of(context), _Group(limit)
        threads.add(new, group)
        for branch in new:
            threads.wait_for(branch)
        threads.forget(group)
    return [branch.answer() for branch in branches]


def _of(context: RunContext) -> Threads:
    """The run's threads, from its first parallel step on."""
    if not isinstance(context.branches, Threads):
        context.branches = Threads(context)
    return context.branches


class Threads:
    """The threads of one execution. Where other connections would not see its rows, its own thread does it all."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.submitted = _Group(MAX_PARALLEL)
        self._groups = [self.submitted]
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()
        # Those that are looking for work.
        self._idle = 0
        self._closed = False
        self._greeted = threading.local()
        connection = connections[context.alias]
        in_memory = getattr(connection, "is_in_memory_db", bool)
        self._alone = not context.lease.stored or connection.in_atomic_block or in_memory()

    # -- For the body --

    def add(self, branches: list[Branch[Any]], group: _Group) -> None:
        """Let these go on as soon as there is room for them in their group."""
        with self._changed:
            if group not in self._groups:
                self._groups.append(group)
            for branch in branches:
                (group.queue if branch.recorded is None else group.later).append(branch)
            if not self._alone:
                self._staff()
                self._changed.notify_all()
        while self._alone and (work := self._take()) is not None:
            self._go_on(*work)

    def forget(self, group: _Group) -> None:
        with self._changed:
            self._groups.remove(group)

    def wait_for(self, branch: Branch[Any], call: Call | None = None, until: datetime | None = None) -> bool:
        """Return when the branch has its outcome; False: not by then. Raise what the execution has ended with.

        Parks the run if nothing is under way and the branch's next try is far away.
        """
        context = self.context

        def far() -> bool:
            return not self._under_way() and (until is None or self._left(until) > options().PARK_AFTER)

        self._wait(lambda: branch.done or context.ended is not None or far(), until)
        if context.ended is None and not branch.done and far():
            if call is not None and (call.recorded is None or call.recorded.status != StepStatus.WAITING):
                call.commit(lambda: Outcome(StepStatus.WAITING), ends_at=until)
            self._park(until)
        if context.ended is not None:
            # The run may be handed back now: not while others are at work for it here.
            self.join()
            raise context.ended
        return branch.done

    def join(self) -> None:
        """Let all come to their outcomes, but those whose next try is far away: they are left for another execution.

        Behind the body, with the run about to end, the run is parked for them.
        """
        self._wait(lambda: not self._under_way())
        context = self.context
        over = current_run() is not context
        if over and context.ended is None and self.next_try() is not None:
            # What keeps it from being parked has ended the execution.
            with inside(context, busy=True), suppress(Cancelled, LeaseLost):
                self._park(None)

    def next_try(self) -> datetime | None:
        """When the earliest of the steps that are to be tried again is due."""
        with self._changed:
            return min((branch.due for group in self._groups for branch in group.later), default=None)

    def close(self) -> None:
        """Let the threads end, each with its connections closed; what has not begun never begins here."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    # -- Inside --

    def _park(self, until: datetime | None) -> None:
        wake_at = self.context.wake_by(until)
        if wake_at is None:
            raise AssertionError(f"Run {self.context.run_id} has no parallel step to wait for")
        due = (branch for group in self._groups for branch in group.later)
        first = min(due, key=lambda branch: branch.due)
        park(self.context, wake_at, f"retry:{first.step.name}")

    def _left(self, moment: datetime) -> float:
        return (moment - self.context.lease.clock.now()).total_seconds()

    def _under_way(self) -> bool:
        """Whether anything is going on, or will be so soon that it is not worth parking for."""
        with self._changed:
            if any(group.running for group in self._groups):
                return True
            if self.context.ended is not None:
                return False
            soon = self.context.lease.clock.now() + timedelta(seconds=options().PARK_AFTER)
            return any(group.queue or any(branch.due <= soon for branch in group.later) for group in self._groups)

    def _wait(self, over: Callable[[], bool], until: datetime | None = None) -> None:
        """Wait in the body's thread; one that is alone goes on with what is due."""
        with self._changed:
            while not over() and (until is None or self._left(until) > 0):
                if not self._alone:
                    self._staff()
                    self._changed.wait(self._pause(until))
                elif (work := self._take()) is not None:
                    self._go_on(*work)
                else:
                    self.context.lease.wait(self._pause(until) or 0.0)

    def _pause(self, until: datetime | None = None, limit: float | None = None) -> float | None:
        """Seconds until something is due; None: that is not known."""
        moments = [moment for moment in (until, self.next_try()) if moment is not None]
        pauses = [max(0.001, self._left(moment)) for moment in moments]
        return min(pauses if limit is None else [*pauses, limit], default=None)

    def _take(self) -> tuple[Branch[Any], _Group] | None:
        """Something to go on with, in its order; None: nothing is due, or there is no room."""
        with self._changed:
            if self.context.ended is not None:
                return None
            now = self.context.lease.clock.now()
            for group in self._groups:
                if (branch := group.take(now)) is not None:
                    group.running += 1
                    return branch, group
            return None

    def _go_on(self, branch: Branch[Any], group: _Group) -> None:
        try:
            if not self._alone:
                self._greet()
            branch.scope.run(branch.go_on)
        except BaseException as error:
            # No outcome: the run is cancelled, lost, or dead, and goes no further anywhere.
            self.context.end(error)
            if self._alone:
                raise
        finally:
            with self._changed:
                group.running -= 1
                if self.context.ended is None and not branch.done:
                    group.later.append(branch)
                self._changed.notify_all()

    def _staff(self) -> None:
        """Start as many threads as there is work for; with the lock."""
        now = self.context.lease.clock.now()
        missing = sum(group.ready(now) for group in self._groups) - self._idle
        for _ in range(missing if self.context.ended is None else 0):
            name = f"{threading.current_thread().name}-step"
            thread = threading.Thread(target=self._work, name=name, daemon=True)
            thread.start()
            self._threads.add(thread)
            self._idle += 1

    def _work(self) -> None:
        try:
            while (work := self._next()) is not None:
                self._go_on(*work)
                with self._changed:
                    self._idle += 1
        finally:
            connections.close_all()
            with self._changed:
                self._threads.discard(threading.current_thread())
                # If the execution has ended meanwhile, the body is to see it.
                self._changed.notify_all()

    def _next(self) -> tuple[Branch[Any], _Group] | None:
        """Wait for work in a thread of the run's; None: there is none any more."""
        lingers = True
        while True:
            with self._changed:
                work = self._take()
                over = self._closed or self.context.ended is not None
                if work is not None or over or not (lingers or self.next_try()):
                    self._idle -= 1
                    return work
                told = self._changed.wait(self._pause(limit=LINGER if lingers else None))
            if not told and lingers:
                # The thread may wait for a retry's time; its connections do not.
                lingers = False
                connections.close_all()

    def _greet(self) -> None:
        """Set up a worker's connection that is new, as its pool does for those of its own threads."""
        lease = self.context.lease
        connection = connections[lease.alias]
        if lease.kind != "worker" or not options().NOTIFY:
            return
        # The step itself will meet a database that is away.
        with suppress(Error):
            connection.ensure_connection()
            if connection.connection is not getattr(self._greeted, "connection", None):
                lease.limit_idle_transactions()
                self._greeted.connection = connection.connection
