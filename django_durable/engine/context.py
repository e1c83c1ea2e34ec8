"""What a running workflow carries with it: its history, its position, its lease, and how it was ended from outside."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from django_durable.exceptions import Cancelled, ContinueAsNew, Halt, LeaseLost, NonDeterminism
from django_durable.states import OPEN_STEPS, StepKind

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from django_durable.engine.leases import Lease
    from django_durable.engine.registry import Definition
    from django_durable.models import StepCheckpoint, WorkflowRun


class Branches(Protocol):
    """What runs beside the body; see `engine.parallel`."""

    def join(self) -> None: ...

    def next_try(self) -> datetime | None: ...

    def close(self) -> None: ...


class Undone(NamedTuple):
    """A saga that an error has left, and that was undone."""

    error: Exception
    # The positions that it spans, and those of its compensations that failed.
    first: int
    last: int
    failed: tuple[int, ...]


class Generation(NamedTuple):
    """A run, or one that it was forked from: up to the position `kept` its outcomes are those of the one before."""

    run_id: str
    started_at: datetime
    kept: int


class RunContext:
    """One execution of a run, in the thread that executes it."""

    __slots__ = (
        "alias",
        "attempt",
        "branches",
        "cancelling",
        "continuing",
        "definition",
        "delivered",
        "draws",
        "ended",
        "fresh",
        "lease",
        "lineage",
        "mark",
        "patches",
        "position",
        "recorded",
        "run",
        "run_id",
        "time",
        "undone",
    )

    def __init__(
        self, run: WorkflowRun, definition: Definition, lease: Lease, recorded: dict[int, StepCheckpoint], alias: str
    ) -> None:
        self.run = run
        self.run_id = run.pk
        self.attempt = run.attempt
        self.definition = definition
        self.lease = lease
        self.alias = alias
        self.recorded = recorded
        # No execution came before: nothing can be recorded anywhere, so nothing need be looked up.
        self.fresh = run.attempt == 1 and not recorded
        # Counts the calls of steps, in the order of the workflow's own code.
        self.position = 0
        # The errors that the workflow was shown: (error, position, last position given by then).
        self.delivered: list[tuple[BaseException, int, int]] = []
        # Why the run is to be cancelled before its next step: its deadline has passed.
        self.cancelling: str | None = None
        # continue_as_new() was called.
        self.continuing: ContinueAsNew | None = None
        # Set when this execution may not go on. Whatever the workflow catches, its next step meets it again.
        self.ended: BaseException | None = None
        # When the latest outcome came about that the workflow has seen.
        self.time: datetime | None = None
        # How many random values it has drawn, and whose they are; see `primitives.determinism`.
        self.draws = 0
        self.lineage: list[Generation] | None = None
        # The changes of its code that it has asked for, and whether it takes them; see `primitives.patches`.
        self.patches: dict[str, bool] = {}
        # The position of the mark that an async body awaits next, so that it is not passed.
        self.mark: int | None = None
        # The sagas that errors have left: their steps are no base to go on from any more.
        self.undone: list[Undone] = []
        # The threads of its parallel steps, once there are any.
        self.branches: Branches | None = None

    def next_position(self) -> int:
        self.pass_markers()
        self.position += 1
        return self.position

    def pass_markers(self) -> None:
        """Go past the marks of `patched`, which are found by their names: the call may be gone from the code."""
        while (step := self.recorded.get(self.position + 1)) is not None and step.kind == StepKind.PATCH:
            if step.position == self.mark:
                return
            self.position += 1

    def seen(self, outcome: StepCheckpoint) -> None:
        """Note that the workflow is shown this outcome: its own time goes on."""
        self.time = outcome.finished_at if self.time is None else max(self.time, outcome.finished_at)

    def join_branches(self) -> None:
        """Let the steps that are under way beside the body come to their outcome: parked, it could not be recorded."""
        if self.branches is not None:
            self.branches.join()

    def wake_by(self, moment: datetime | None) -> datetime | None:
        """When a run that waits until then has to wake: earlier, if a step beside the body is to be tried again."""
        due = self.branches.next_try() if self.branches is not None else None
        return min((at for at in (moment, due) if at is not None), default=None)

    def deliver(self, error: BaseException, position: int) -> BaseException:
        """Note that the workflow is shown this step's error, and where its code was by then."""
        self.delivered.append((error, position, self.position))
        return error

    def end(self, reason: BaseException) -> BaseException:
        """Let this execution go no further; return what to raise."""
        if self.ended is None:
            self.ended = reason
        return self.ended

    def guard(self) -> None:
        """Raise if no further step may start here: cancelled, parked, or the lease is another's now."""
        if self.ended is not None:
            raise self.ended
        # A lease that is about to run out is renewed here, and STRICT takes no query in the body.
        with inside(self, busy=True):
            valid = self.lease.valid()
        if not valid:
            raise self.end(LeaseLost(f"run {self.run_id} has another owner"))
        deadline = self.run.deadline
        if deadline is not None and self.lease.clock.now() >= deadline:
            self.cancelling = "timeout"
        if self.cancelling is not None:
            raise self.end(Cancelled(self.cancelling))

    def check_end(self) -> None:
        """Raise if the workflow returns before it has come to all that is recorded: that was another course."""
        missed = [
            step
            for position, step in self.recorded.items()
            if position > self.position and step.status not in OPEN_STEPS and step.kind != StepKind.PATCH
        ]
        if missed:
            first = min(missed, key=lambda step: step.position)
            raise self.end(Halt(NonDeterminism(self.run_id, first.position, first.name, "the end of the workflow")))

    def failure_origin(self, error: BaseException) -> tuple[int, int] | None:
        """Find the step whose error left the workflow: in the error's chain, else the last failed one.

        Of an error that has left a saga, it is the saga's beginning.
        """
        seen: set[int] = set()
        chain: list[BaseException | None] = [error]
        while chain:
            link = chain.pop()
            if link is None or id(link) in seen:
                continue
            seen.add(id(link))
            if sagas := [saga.first for saga in self.undone if saga.error is link]:
                return self._beginning(min(sagas))
            for shown, position, horizon in self.delivered:
                if shown is link:
                    return position, horizon
            chain += [link.__context__, link.__cause__]
            if isinstance(link, BaseExceptionGroup):
                # The first error first, as a plain chain would have it.
                chain += reversed(link.exceptions)
        if sagas := [saga.first for saga in self.undone if saga.last == self.position]:
            return self._beginning(min(sagas))
        if self.delivered:
            _, position, horizon = max(self.delivered, key=lambda item: item[1])
            # Steps that came after its error was caught have completed: they are not repeated for a guess.
            if horizon == self.position:
                return position, horizon
        return None

    def _beginning(self, first: int) -> tuple[int, int]:
        """Where a retry begins a saga anew: its steps are forgotten, for their effects were undone.

        If a compensation has failed, they were not: then it is that which is repeated first.
        """
        failed = [position for saga in self.undone if saga.first >= first for position in saga.failed]
        return (min(failed), self.position) if failed else (first, first - 1)


class StepContext:
    """One try of a step."""

    __slots__ = ("atomic", "attempt", "cancelling", "name", "position", "run")

    def __init__(self, run: RunContext, position: int, name: str, attempt: int, *, atomic: bool) -> None:
        self.run = run
        self.position = position
        self.name = name
        self.atomic = atomic
        self.attempt = attempt
        # The step has cancelled its own run: that commits with it.
        self.cancelling: str | None = None


# What `django_durable.testing` is told before a step is executed. Empty otherwise.
before_step: list[Callable[[RunContext, str], None]] = []


class _Place(NamedTuple):
    """Where the code that asks is: in a workflow's body, or in a step; `busy` where STRICT lets queries pass."""

    run: RunContext
    step: StepContext | None = None
    busy: bool = False


# A context variable: parallel steps have a thread or a task each, and each is in a step of its own.
_place: ContextVar[_Place | None] = ContextVar("django_durable_place", default=None)


def current_run() -> RunContext | None:
    """The run whose body or step this code is part of."""
    place = _place.get()
    return place.run if place else None


def current_step() -> StepContext | None:
    """The step that this code is part of."""
    place = _place.get()
    return place.step if place else None


def current_body() -> RunContext | None:
    """The run whose body this code is part of, outside its steps."""
    place = _place.get()
    return place.run if place and place.step is None else None


def is_busy() -> bool:
    """Whether this is a step, or the engine at work for one: not the workflow's own code."""
    place = _place.get()
    return place is not None and (place.busy or place.step is not None)


@contextmanager
def inside(run: RunContext, step: StepContext | None = None, *, busy: bool = False) -> Iterator[None]:
    """The code of this block belongs to the run, or to its step."""
    token: Token[_Place | None] = _place.set(_Place(run, step, busy))
    try:
        yield
    finally:
        _place.reset(token)


class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds the run's id, workflow, step and attempt to every record, as attributes."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs
