"""The fenced checkpoint: one INSERT that is a step's outcome, or is nothing.

    INSERT INTO step (...) SELECT ... FROM run WHERE id = ? AND attempt = ? AND status = 'RUNNING' FOR SHARE

The row lock makes it a fence: a cancel or a takeover that commits first leaves no row to select, and one that comes
later waits for our commit and then sees it. It is the last statement of an atomic step's transaction, so no lock on
the run is held while the user's code runs. Lock order everywhere: the user's rows, then the run's.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from django.db import Error, IntegrityError, connections
from django.db.models import Q

from django_durable import compat, signals
from django_durable.compat import Trouble
from django_durable.engine import endings
from django_durable.engine.context import RunContext, inside
from django_durable.exceptions import Cancelled, InsideTransaction, LeaseLost
from django_durable.models import Message, StepCheckpoint, WorkflowRun
from django_durable.states import OPEN_STEPS, RunStatus, StepKind, StepStatus

T = TypeVar("T")
_ALONE = nullcontext()


class Outcome(NamedTuple):
    """What a step came to, as it is stored."""

    status: StepStatus
    output: str = ""
    error: str = ""
    exception: str = ""


_COLUMNS = (
    "position",
    "name",
    "kind",
    "status",
    "output",
    "error",
    "exception",
    "attempts",
    "attempt",
    "database",
    "started_at",
    "finished_at",
)


@lru_cache
def _insert_sql(alias: str, fence: str) -> str:
    connection = connections[alias]
    quote = connection.ops.quote_name
    step, run = quote(StepCheckpoint._meta.db_table), quote(WorkflowRun._meta.db_table)
    columns = ", ".join(quote(name) for name in ("run_id", *_COLUMNS))
    values = ", ".join(["%s"] * len(_COLUMNS))
    if fence == "none":
        return f"INSERT INTO {step} ({columns}) VALUES (%s, {values})"  # noqa: S608 (names of ours only)
    running = f" AND {quote('status')} = '{RunStatus.RUNNING}'" if fence == "running" else ""
    return (
        f"INSERT INTO {step} ({columns}) SELECT {quote('id')}, {values} FROM {run} "  # noqa: S608 (names of ours only)
        f"WHERE {quote('id')} = %s AND {run}.{quote('attempt')} = %s{running} {compat.row_share_lock(connection)}"
    )


def insert(
    context: RunContext,
    step: StepCheckpoint,
    *,
    fence: str = "running",
    alias: str | None = None,
) -> bool:
    """Store the checkpoint on the run's connection; False: the fence let it not pass.

    `fence` is "running" (this attempt holds the run), "attempt" (nobody claimed it since) or "none" (the caller
    holds the run's row already). Raises IntegrityError if the position has an outcome.
    """
    connection = connections[alias or context.alias]
    adapt = connection.ops.adapt_datetimefield_value
    values: list[Any] = [getattr(step, name) for name in _COLUMNS[:-2]]
    values += [adapt(step.started_at), adapt(step.finished_at)]
    params = [context.run_id, *values] if fence == "none" else [*values, context.run_id, context.attempt]
    statement = _insert_sql(connection.alias, fence)
    return compat.execute_often(connection, statement, params, _parameter_types(connection.alias, fence)) == 1


@lru_cache
def _parameter_types(alias: str, fence: str) -> tuple[str, ...]:
    """Of the INSERT's parameters: PostgreSQL would take all that stand in a SELECT for text."""
    step, run = StepCheckpoint._meta, WorkflowRun._meta
    values = [step.get_field(name) for name in _COLUMNS]
    key = run.get_field("id")
    fields = [key, *values] if fence == "none" else [*values, key, run.get_field("attempt")]
    return tuple(str(field.db_type(connections[alias])) for field in fields)


def checkpoint(
    context: RunContext,
    position: int,
    name: str,
    kind: StepKind,
    outcome: Outcome,
    *,
    attempts: int,
    started_at: datetime,
    database: str = "",
) -> StepCheckpoint:
    """Return the unsaved row of an outcome."""
    return StepCheckpoint(
        run_id=context.run_id,
        position=position,
        name=name,
        kind=str(kind),
        status=str(outcome.status),
        output=outcome.output,
        error=outcome.error,
        exception=outcome.exception,
        attempts=attempts,
        attempt=context.attempt,
        database=database,
        started_at=started_at,
        finished_at=context.lease.clock.now(),
    )


def check_not_in_transaction(context: RunContext, name: str) -> None:
    """Raise InsideTransaction if what is recorded now could be rolled back by the workflow's own atomic() block."""
    if compat.in_users_transaction(connections[context.alias]):
        raise InsideTransaction.step(name, context.run_id, context.alias)


def record(context: RunContext, step: StepCheckpoint, *, replaces: bool, effect_happened: bool) -> StepCheckpoint:
    """Store an outcome in a commit of its own, through lost connections; return the row that stands.

    That is another's if the position already has an outcome. A try to be repeated gives way (`replaces`).
    With `effect_happened` the outcome is kept even if the run was cancelled meanwhile, so that resume() does not
    repeat the effect. Raises Cancelled or LeaseLost when the run may not go on here.
    """

    def store(fence: str) -> bool:
        with _one_commit(context.alias, several=replaces):
            if replaces:
                drop_try(context, step.position)
            return insert(context, step, fence=fence)

    def write() -> StepCheckpoint | None:
        try:
            if store("running"):
                return step
        except IntegrityError:
            return found(context, step.position)
        if effect_happened:
            with suppress(IntegrityError):
                store("attempt")
        return None

    stored = persist(context, write)
    if stored is None:
        raise lost(context)
    announce(context, stored)
    return stored


def found(
    context: RunContext, position: int, alias: str | None = None, *, also_open: bool = False
) -> StepCheckpoint | None:
    """The outcome that stands at a position: ours, if only the answer to its COMMIT was lost, or another's.

    `also_open`: or what this attempt has left there to go on with.
    """
    rows = StepCheckpoint.objects.using(alias or context.alias).filter(run=context.run_id, position=position)
    stands = ~Q(status__in=OPEN_STEPS)
    return persist(context, rows.filter(stands | Q(attempt=context.attempt) if also_open else stands).first, alias)


def drop_try(context: RunContext, position: int) -> None:
    """Delete the record of what was to be repeated, or was waited for: the outcome takes its place."""
    rows = StepCheckpoint.objects.using(context.alias).filter(run=context.run_id, position=position)
    rows.filter(status__in=OPEN_STEPS)._raw_delete(context.alias)


def take_back(context: RunContext, position: int) -> None:
    """Forget a wait that the workflow does not want any more, and give back the message that it has taken."""

    def write() -> bool:
        with compat.write_transaction(context.alias):
            if not still_held(context):
                return False
            steps = StepCheckpoint.objects.using(context.alias).filter(run=context.run_id, position=position)
            steps.filter(kind__in=(StepKind.RECEIVE, StepKind.APPROVAL)).delete()
            taken = Message.objects.using(context.alias).filter(run=context.run_id, consumed_by=position)
            taken.update(consumed_at=None, consumed_by=None)
            return True

    with inside(context, busy=True):
        if not persist(context, write):
            raise lost(context)
    context.recorded.pop(position, None)


def _one_commit(alias: str, *, several: bool) -> Any:
    # One statement is its own transaction. In a test's transaction it takes a savepoint, or a refused row would
    # break the test's.
    if several or connections[alias].in_atomic_block:
        return compat.write_transaction(alias)
    return _ALONE


def lost(context: RunContext) -> BaseException:
    """End the execution whose fence was refused, and return what to raise: Cancelled, or LeaseLost."""
    ours = WorkflowRun.objects.using(context.alias).filter(pk=context.run_id, attempt=context.attempt)
    with inside(context, busy=True):
        status = persist(context, ours.values_list("status", flat=True).first)
    if status == RunStatus.CANCELLED:
        return context.end(Cancelled(f"run {context.run_id} was cancelled"))
    return context.end(LeaseLost(f"run {context.run_id} has another owner"))


def cancel_own(context: RunContext, reason: str) -> list[endings.Ended]:
    """Cancel the run in the transaction of its own step; return what is to be told behind its commit."""
    held = WorkflowRun.objects.using(context.alias).held(context.run_id, context.attempt)
    return endings.cancel(context.alias, context.run_id, held, reason)


def still_held(context: RunContext) -> bool:
    """Lock the run's row in the caller's transaction; False: this attempt does not execute it any more."""
    held = WorkflowRun.objects.using(context.alias).held(context.run_id, context.attempt)
    return bool(held.select_for_update().values_list("pk"))


def reconnect(context: RunContext, alias: str) -> None:
    """Wait until the database can be reached again."""
    connections[alias].close()
    persist(context, connections[alias].ensure_connection, alias)


def persist(context: RunContext, ask: Callable[[], T], alias: str | None = None) -> T:
    """Repeat an idempotent statement of the engine until the database has answered it.

    A database that is away is a pause: what is written here has happened, and giving up would lose it.
    """
    pause = 0.02
    while True:
        try:
            return ask()
        except Error as error:
            connection = connections[alias or context.alias]
            if connection.in_atomic_block or compat.trouble(error, broken=True) is Trouble.OTHER:
                raise
            connection.close()
        if context.lease.wait(pause):
            raise context.end(LeaseLost("this process stops while the database is away"))
        pause = min(2.0, pause * random.uniform(1.5, 2))  # noqa: S311 (not a secret)


def announce(context: RunContext, step: StepCheckpoint) -> None:
    signals.step_recorded.send_robust(
        StepCheckpoint,
        run_id=context.run_id,
        workflow=context.run.workflow,
        database=context.alias,
        worker=context.lease.id,
        position=step.position,
        name=step.name,
        kind=step.kind,
        status=step.status,
        attempts=step.attempts,
        attempt=context.attempt,
    )
