"""What a running workflow carries with it: its history, its position, its lease, and how it was ended from outside."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from django_durable.exceptions import Cancelled, Halt, LeaseLost, NonDeterminism
from django_durable.states import StepStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from django_durable.engine.leases import Lease
    from django_durable.engine.registry import Definition
    from django_durable.models import StepCheckpoint, WorkflowRun


class RunContext:
    """One execution of a run, in the thread that executes it."""

    __slots__ = (
        "alias",
        "attempt",
        "busy",
        "cancelling",
        "definition",
        "delivered",
        "ended",
        "fresh",
        "lease",
        "position",
        "recorded",
        "run",
        "run_id",
        "step",
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
        # The step that is being executed, if any: a step within it is part of it.
        self.step: StepContext | None = None
        # The errors that the workflow was shown: (error, position, last position given by then).
        self.delivered: list[tuple[BaseException, int, int]] = []
        # Why the run is to be cancelled before its next step: its deadline, or a wish that committed with a step.
        self.cancelling: str | None = None
        # Set when this execution may not go on. Whatever the workflow catches, its next step meets it again.
        self.ended: BaseException | None = None
        # Inside a step, or the engine's own statements: where STRICT lets queries pass.
        self.busy = False

    def next_position(self) -> int:
        self.position += 1
        return self.position

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
        if not self.lease.valid():
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
            if position > self.position and step.status != StepStatus.RETRYING
        ]
        if missed:
            first = min(missed, key=lambda step: step.position)
            raise self.end(Halt(NonDeterminism(self.run_id, first.position, first.name, "the end of the workflow")))

    def failure_origin(self, error: BaseException) -> tuple[int, int] | None:
        """Find the step whose error left the workflow: in the error's chain, else the last failed one."""
        seen: set[int] = set()
        chain: list[BaseException | None] = [error]
        while chain:
            link = chain.pop()
            if link is None or id(link) in seen:
                continue
            seen.add(id(link))
            for shown, position, horizon in self.delivered:
                if shown is link:
                    return position, horizon
            chain += [link.__context__, link.__cause__]
        if self.delivered:
            _, position, horizon = max(self.delivered, key=lambda item: item[1])
            # Steps that came after its error was caught have completed: they are not repeated for a guess.
            if horizon == self.position:
                return position, horizon
        return None


class StepContext:
    """One try of a step."""

    __slots__ = ("atomic", "attempt", "name", "position", "run")

    def __init__(self, run: RunContext, position: int, name: str, attempt: int, *, atomic: bool) -> None:
        self.run = run
        self.position = position
        self.name = name
        self.atomic = atomic
        self.attempt = attempt


# What `django_durable.testing` is told before a step is executed. Empty otherwise.
before_step: list[Callable[[RunContext, str], None]] = []

_current: ContextVar[RunContext | None] = ContextVar("django_durable_run", default=None)

current_run: Callable[[], RunContext | None] = _current.get
enter = _current.set
leave = _current.reset


class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds the run's id, workflow, step and attempt to every record, as attributes."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs
