"""A step, from its call to its one outcome: answered from the history, or executed, retried and recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Protocol

from django.db import Error, connections, transaction

from django_durable import compat
from django_durable.compat import Trouble
from django_durable.conf import options
from django_durable.engine import checkpoints, endings, payloads
from django_durable.engine.calls import answer, next_call
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.context import RunContext, StepContext, before_step, inside
from django_durable.engine.parking import park
from django_durable.engine.retries import RetryPolicy, jittered
from django_durable.exceptions import (
    Cancelled,
    LeaseLost,
    StepTimeout,
)
from django_durable.models import StepCheckpoint
from django_durable.serialization import describe_exception, dump_exception
from django_durable.states import OPEN_STEPS, StepKind, StepStatus

logger = logging.getLogger("django_durable.run")

# How often a step whose transaction the database refuses is run again before the error is its own.
MAX_RERUNS = 20
# How often one that loses its connection is run again before the run is handed back, as by a crash.
MAX_LOSSES = 50


class StepDefinition(Protocol):
    """What the engine has to know of a step."""

    name: str
    func: Callable[..., Any]
    atomic: bool
    using: str | None
    isolation: str | None
    timeout: float | None
    retry: RetryPolicy


# A step may become atomic, or cease to be, without another history.
STEP_KINDS = (StepKind.STEP, StepKind.ATOMIC)


class _Refused(Exception):
    """The fence matched no row: rolls the step's transaction back."""


def perform(context: RunContext, step: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the step's recorded value or raise its recorded error, executing it if it has none yet."""
    position, recorded = next_call(context, step.name, STEP_KINDS)
    with inside(context, busy=True):
        traceback = None
        if recorded is None or recorded.status in OPEN_STEPS:
            checkpoints.check_not_in_transaction(context, step.name)
            recorded, traceback = bring_to_outcome(context, step, position, recorded, args, kwargs)
        return answer(context, recorded, traceback)


def bring_to_outcome(
    context: RunContext,
    step: StepDefinition,
    position: int,
    recorded: StepCheckpoint | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    beside: bool = False,
) -> tuple[StepCheckpoint, TracebackType | None]:
    """Execute a step that has no outcome yet; return the row of its outcome, and the traceback of its error.

    One that is executed `beside` the body cannot park the run: the row may be that of a try, to be repeated at its
    `finished_at`.
    """
    if recorded is None and not context.fresh and step.using not in (None, context.alias):
        stands = recorded_elsewhere(context, position, step)
        if stands is not None:
            return stands, None
    execution = StepExecution(context, step, position, recorded, args, kwargs, beside=beside)
    return execution.outcome(), execution.traceback


class _HomeLost(Exception):
    """The run's own database went away under a step whose data live in another."""


class StepExecution:
    """The tries of one step."""

    def __init__(
        self,
        context: RunContext,
        step: StepDefinition,
        position: int,
        recorded: StepCheckpoint | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        beside: bool = False,
    ) -> None:
        self.context = context
        self.step = step
        self.position = position
        self.args = args
        self.kwargs = kwargs
        self.beside = beside
        self.kind = StepKind.ATOMIC if step.atomic else StepKind.STEP
        # A recorded try that failed; the outcome takes its place.
        self.retrying = recorded is not None
        self.tries = recorded.attempts if recorded is not None else 0
        self.started_at: datetime = context.lease.clock.now()
        self.traceback: TracebackType | None = None
        # How often the function was run again without that being a try, and how often its connection was lost.
        self.reruns = 0
        self.losses = 0
        # The run and its children, if it cancelled itself.
        self.cancelled: list[endings.Ended] = []
        self.place = f"Run {context.run_id}, step {position} ({step.name})"

    def outcome(self) -> StepCheckpoint:
        """Try until there is an outcome and return its row; unwinds the workflow if the run may not go on here."""
        run_once = self._atomically if self.step.atomic else self._outside
        while True:
            self.context.guard()
            for told in before_step:
                told(self.context, self.step.name)
            self.tries += 1
            try:
                return run_once()
            except Exception as error:
                failure = error
            delay = self.step.retry.wait(failure, self.tries)
            if delay is None:
                return self._record_failure(failure)
            if (stands := self._record_try(failure, delay)) is not None:
                return stands

    def _call(self) -> str:
        """Run the user's function and return its value as it will be stored."""
        return payloads.dump(self.step.func(*self.args, **self.kwargs), self.place)

    @contextmanager
    def _inside(self) -> Iterator[StepContext]:
        """The try, with what the user's code leaves for after its commit: steps called there are part of it too."""
        now = StepContext(self.context, self.position, self.step.name, self.tries, atomic=self.step.atomic)
        with inside(self.context, now):
            yield now

    def _row(self, outcome: Outcome, database: str = "") -> StepCheckpoint:
        return checkpoints.checkpoint(
            self.context,
            self.position,
            self.step.name,
            self.kind,
            outcome,
            attempts=self.tries,
            started_at=self.started_at,
            database=database,
        )

    def _outside(self) -> StepCheckpoint:
        """No transaction is held while the function runs; its outcome is a commit of its own."""
        connection = connections[self.context.alias]
        while True:
            driver = connection.connection
            try:
                with self._inside():
                    output = self._call()
                break
            except Error as error:
                # The function's own query met our database going away. That is a pause for the run, and no outcome
                # of a function that may be repeated.
                broken = connection.connection is not driver or not compat.usable(connection)
                if connection.in_atomic_block or compat.trouble(error, broken=broken) is not Trouble.LOST:
                    raise
            self._prepare_rerun(Trouble.LOST, self.context.alias)
        return self._record(Outcome(StepStatus.SUCCEEDED, output=output), effect_happened=True)

    def _atomically(self) -> StepCheckpoint:
        """The function's writes and its checkpoint, in one commit."""
        context, step = self.context, self.step
        alias = step.using or context.alias
        elsewhere = alias != context.alias
        connection = connections[alias]
        while True:
            driver, row = None, None
            try:
                with ExitStack() as fence, self._inside() as now, compat.write_transaction(alias, durable=True):
                    driver = connection.connection
                    compat.set_transaction(connection, step.isolation, step.timeout)
                    output = self._call()
                    if not compat.in_transaction(connection):
                        raise Error("The database rolled the step's transaction back by itself.")
                    row = self._row(Outcome(StepStatus.SUCCEEDED, output=output), alias if elsewhere else "")
                    if elsewhere:
                        self._hold_run(fence)
                    self._insert(row, elsewhere, now.cancelling)
                    # What runs after the commit cancels by a statement of its own.
                    now.atomic = False
                return self._committed(row, elsewhere, now.cancelling)
            except _Refused:
                raise checkpoints.lost(context) from None
            except _HomeLost:
                self._prepare_rerun(Trouble.LOST, context.alias)
                continue
            except Exception as error:
                failure = error
            # Django closes a connection that cannot even roll back. Whatever the function made of that, its
            # transaction is gone, and it may be run again.
            broken = connection.connection is not driver
            timed_out = compat.sqlstate(failure) in compat.TIMEOUT_STATES
            verdict = Trouble.LOST if broken and driver and not timed_out else compat.trouble(failure, broken=broken)
            # Behind our INSERT there may be an outcome after all: another's, whose key it met; ours, if only the
            # answer to the COMMIT was lost, or if what failed had been left for after the commit.
            if row is not None and (stands := checkpoints.found(context, self.position, alias)) is not None:
                if not isinstance(failure, Error):
                    self._log_callback(failure)
                return self._committed(stands, elsewhere, now.cancelling)
            # In a test's transaction nothing can be run again: what is lost, is lost with the test.
            if verdict is Trouble.OTHER or self.reruns >= MAX_RERUNS or connection.in_atomic_block:
                raise self._explained(failure) from failure.__cause__
            self._prepare_rerun(verdict, alias)

    def _hold_run(self, fence: ExitStack) -> None:
        """Lock the run's row in its own database, until the step's has committed: no cancel comes in between."""
        alias = self.context.alias
        in_a_test = connections[alias].in_atomic_block
        try:
            fence.enter_context(compat.write_transaction(alias))
            held = checkpoints.still_held(self.context)
        except Error as error:
            if in_a_test or compat.trouble(error, broken=True) is not Trouble.LOST:
                raise
            raise _HomeLost from error
        if not held:
            raise _Refused

    def _prepare_rerun(self, verdict: Trouble, alias: str) -> None:
        """Wait until the function may be run again, behind a database that asked for it or went away."""
        if verdict is Trouble.AGAIN:
            self.reruns += 1
            self.context.lease.wait(jittered(min(1.0, 0.005 * 2**self.reruns)))
        else:
            # An infrastructure's failure is no outcome of the step, however often it comes.
            self.losses += 1
            logger.warning("%s: its connection to %r was lost; it is run again", self.place, alias, extra=self._facts())
            if self.losses > MAX_LOSSES:
                raise self.context.end(LeaseLost(f"{self.place} loses its connection every time", crashed=True))
            self.context.lease.wait(jittered(0.02))
            checkpoints.reconnect(self.context, alias)
        self.context.guard()

    def _log_callback(self, error: Exception) -> None:
        logger.error("%s: a callback after its commit failed", self.place, exc_info=error, extra=self._facts())

    def _facts(self) -> dict[str, object]:
        run = self.context.run
        return {
            "run_id": run.pk,
            "workflow": run.workflow,
            "step": self.step.name,
            "attempt": run.attempt,
            "database": self.context.alias,
            "worker": self.context.lease.id,
        }

    def _insert(self, row: StepCheckpoint, elsewhere: bool, cancelling: str | None) -> None:
        """The checkpoint, as the last statement of the step's transaction."""
        if not elsewhere:
            if self.retrying:
                checkpoints.drop_try(self.context, self.position)
            self.context.lease.renew_in_transaction()
            if not checkpoints.insert(self.context, row):
                raise _Refused
            if cancelling is not None:
                # In the same commit, or a crash behind it would lose the wish.
                self.cancelled = checkpoints.cancel_own(self.context, cancelling)
            return
        checkpoints.insert(self.context, row, fence="none", alias=row.database)

    def _committed(self, row: StepCheckpoint, elsewhere: bool, cancelling: str | None) -> StepCheckpoint:
        """Tell of the outcome. One in the step's own database is stored among the run's steps first."""
        context = self.context
        if elsewhere:
            stored = checkpoints.record(context, row, replaces=self.retrying, effect_happened=True)
            context.cancelling = cancelling or context.cancelling
            return stored
        checkpoints.announce(context, row)
        if cancelling is not None and row.attempt == context.attempt:
            context.end(Cancelled(cancelling))
            endings.tell_cancelled(context.alias, self.cancelled)
        return row

    def _record(self, outcome: Outcome, *, effect_happened: bool) -> StepCheckpoint:
        return checkpoints.record(
            self.context, self._row(outcome), replaces=self.retrying, effect_happened=effect_happened
        )

    def _record_failure(self, error: Exception) -> StepCheckpoint:
        final = RetryPolicy.final(error)
        self.traceback = error.__traceback__
        failed = Outcome(StepStatus.FAILED, error=describe_exception(error), exception=dump_exception(final))
        return self._record(failed, effect_happened=not self.step.atomic)

    def _record_try(self, error: Exception, delay: float) -> StepCheckpoint | None:
        """Store a failed try that will be repeated, then wait: here, or parked if that takes long.

        Returns an outcome of another's making, if there turned out to be one, or a try to be repeated much later.
        """
        row = self._row(Outcome(StepStatus.RETRYING, error=describe_exception(error)))
        pause = jittered(delay)
        if delay > options().PARK_AFTER:
            until = self.context.lease.clock.now() + timedelta(seconds=pause)
            if not self.beside:
                raise park(self.context, until, f"retry:{self.step.name}", row, replaces=self.retrying)
            row.finished_at = until
        stands = checkpoints.record(self.context, row, replaces=self.retrying, effect_happened=not self.step.atomic)
        if stands is not row or delay > options().PARK_AFTER:
            return stands
        self.retrying = True
        self.context.lease.wait(pause)
        return None

    def _explained(self, error: Exception) -> Exception:
        """The error that an atomic step's transaction ended with, in words that say what to do."""
        state = compat.sqlstate(error)
        if state in compat.TIMEOUT_STATES and self.step.timeout is not None:
            connections[self.step.using or self.context.alias].close_if_unusable_or_obsolete()
            return StepTimeout(self.step.name, self.context.run_id, self.step.timeout)
        if state == compat.ABORTED_STATE or isinstance(error, transaction.TransactionManagementError):
            error.add_note(
                f"{self.place} caught a database error and went on; the database had already undone its transaction, "
                "so nothing of this try was stored. Let the error leave the step, or put what may fail into "
                "transaction.atomic() inside the step."
            )
        return error


def recorded_elsewhere(context: RunContext, position: int, step: StepDefinition) -> StepCheckpoint | None:
    """An outcome that was committed in the step's own database, by a process that died before it said so here."""
    row = checkpoints.found(context, position, step.using)
    if row is None:
        return None
    return checkpoints.record(context, row, replaces=False, effect_happened=True)
