"""The verbs: start, call, cancel, resume, look. Handles, commands and the admin say them; nothing else moves a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from django.db import Error, connections, models, router, transaction
from django.db.models import Case, DateTimeField, F, Q, Value, When, sql
from django.db.models.constants import OnConflict
from django.db.models.lookups import GreaterThan
from django.utils import timezone

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.compat import Trouble
from django_durable.conf import as_seconds, options
from django_durable.engine import claims, payloads, registry
from django_durable.engine.bell import ring_after_commit
from django_durable.engine.claims import Claim
from django_durable.engine.context import current_run
from django_durable.engine.heartbeat import inline_lease
from django_durable.engine.ids import new_id
from django_durable.engine.leases import Lease, bury, end_here, recover
from django_durable.engine.replay import End, dump_input, execute, failure_of, rewind
from django_durable.exceptions import (
    Cancelled,
    InsideTransaction,
    InsideWorkflow,
    RunCancelled,
    RunDead,
    RunIdInUse,
    RunNotFound,
    SerializationError,
)
from django_durable.models import WorkflowRun
from django_durable.serialization import clean_text, load_exception
from django_durable.states import RESUMABLE, RunStatus

# How often a direct call asks again whether its run was stored, when the connection was lost in between.
ANSWER_TRIES = 50


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """How a run is started, beside its arguments; see `Workflow.using`."""

    run_id: str | None = None
    queue: str | None = None
    priority: int = 0
    run_after: datetime | timedelta | None = None
    timeout: float | timedelta | None = None
    attributes: dict[str, Any] | None = None
    related: models.Model | None = None
    database: str | None = None

    def __post_init__(self) -> None:
        if self.run_id is not None:
            check_text("run_id", self.run_id, 200)
        if self.queue is not None:
            check_text("queue", self.queue, 100)
        if (
            isinstance(self.priority, bool)
            or not isinstance(self.priority, int)
            or not -(2**31) <= self.priority < 2**31
        ):
            raise ValueError(f"priority takes a whole number of 32 bits, found {self.priority!r}.")
        if isinstance(self.run_after, datetime) and timezone.is_naive(self.run_after):
            raise ValueError(f"run_after takes a datetime with a time zone, found a naive one: {self.run_after!r}.")
        if not isinstance(self.run_after, datetime | timedelta | None):
            raise TypeError(f"run_after takes a datetime or a timedelta, found {self.run_after!r}.")
        if isinstance(self.run_after, timedelta):
            as_seconds(abs(self.run_after), "run_after")
        if self.timeout is not None:
            as_seconds(self.timeout, "timeout")
        if self.attributes is not None:
            _check_attributes(self.attributes)
        if self.related is not None and (not isinstance(self.related, models.Model) or self.related.pk is None):
            raise ValueError(
                f"related takes a saved model instance, found {type(self.related).__name__} without a key."
            )
        if self.database is not None and self.database not in connections:
            raise ValueError(f"database takes one of {sorted(connections)}, found {self.database!r}.")


def check_text(name: str, value: Any, limit: int) -> None:
    """Raise TypeError or ValueError if the value cannot be stored as this option."""
    if not isinstance(value, str):
        raise TypeError(f"{name} takes a str, found {type(value).__name__}: {value!r}.")
    if not 1 <= len(value) <= limit:
        raise ValueError(f"{name} takes 1 to {limit} characters, found {len(value)}: {value[:50]!r}.")
    if not value.isprintable():
        raise ValueError(f"{name} takes printable characters, found {value!r}.")


def _check_attributes(attributes: Any) -> None:
    if not isinstance(attributes, dict):
        raise TypeError(f"attributes takes a dict, found {type(attributes).__name__}.")
    try:
        text = json.dumps(attributes, allow_nan=False, ensure_ascii=False)
        text.encode()
        if json.loads(text) != attributes:
            raise TypeError("tuples and keys that are no text would come back as others")
    except (TypeError, ValueError, RecursionError) as error:
        raise SerializationError(
            f"they must be plain JSON, so that they can be searched: {error}. Pass text and numbers.", "attributes"
        ) from error
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise SerializationError("they hold a NUL character, which a database cannot search. Remove it.", "attributes")


def database_of(given: str | None = None) -> str:
    """The alias of the database that a new run lives in: the one named, the setting's, or the router's choice."""
    return given or options().DATABASE or router.db_for_write(WorkflowRun)


# -- Start ------------------------------------------------------------------------------------------------------


def start(definition: registry.Definition, given: StartOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Store a run for a worker, in the caller's transaction, with one INSERT; return its id."""
    alias = database_of(given.database)
    _refuse_in_body(definition)
    run = _new_run(definition, given, args, kwargs)
    if not _insert(alias, run, idempotent=given.run_id is not None):
        _check_same_workflow(alias, run.pk, definition)
    ring_after_commit(alias)
    return run.pk


def call(definition: registry.Definition, given: StartOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the workflow here and now, durably; return its result or raise its error."""
    alias = database_of(given.database)
    if compat.in_users_transaction(connections[alias]):
        raise InsideTransaction(definition.name, alias)
    _refuse_in_body(definition)
    run = _new_run(definition, given, args, kwargs)
    lease = inline_lease(alias)
    if run.status == RunStatus.PENDING:
        now = lease.clock.now()
        run.status, run.worker, run.attempt, run.version = RunStatus.RUNNING, lease.id, 1, options().VERSION
        run.created_at = run.run_after = run.started_at = now
        if run.timeout is not None:
            run.deadline = now + timedelta(seconds=run.timeout)
    if _insert_surely(lease, run, idempotent=given.run_id is not None):
        if run.status == RunStatus.RUNNING and (end := execute(Claim(run, definition, {}), lease)) is not None:
            return value_of(end)
    else:
        _check_same_workflow(alias, run.pk, definition)
    return value_of(_finish_here(lease, run.pk))


def _refuse_in_body(definition: registry.Definition) -> None:
    context = current_run()
    if context is not None and context.step is None:
        raise InsideWorkflow(definition.name, context.run_id)


def _new_run(
    definition: registry.Definition, given: StartOptions, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> WorkflowRun:
    timeout = given.timeout if given.timeout is not None else definition.timeout
    now: Any = DatabaseNow()
    run = WorkflowRun(
        id=given.run_id or new_id(),
        workflow=definition.name,
        status=RunStatus.PENDING,
        queue=given.queue or definition.queue,
        priority=given.priority,
        attributes=given.attributes or {},
        input=dump_input(args, kwargs, definition.name),
        timeout=None if timeout is None else as_seconds(timeout, "timeout"),
        created_at=now,
        run_after=now,
    )
    run.related = given.related
    if given.run_after is not None:
        _delay(run, given.run_after)
    return run


def _delay(run: Any, run_after: datetime | timedelta) -> None:
    """Let the run wait for its time, unless that has passed by the database's clock."""
    if isinstance(run_after, timedelta):
        if run_after > timedelta(0):
            run.status, run.waiting_for = RunStatus.WAITING, "start"
            run.wake_at = run.run_after = DatabaseNow(run_after)
        return
    due = Value(run_after, output_field=DateTimeField())
    later = GreaterThan(due, DatabaseNow())
    run.status = Case(When(later, then=Value(str(RunStatus.WAITING))), default=Value(str(RunStatus.PENDING)))
    run.waiting_for = Case(When(later, then=Value("start")), default=Value(""))
    run.wake_at = Case(When(later, then=due), default=None, output_field=DateTimeField())
    run.run_after = Case(When(later, then=due), default=DatabaseNow(), output_field=DateTimeField())


def _insert(alias: str, run: WorkflowRun, *, idempotent: bool) -> bool:
    """INSERT the run on the caller's connection; False: there is a run of its id."""
    connection = connections[alias]
    query = sql.InsertQuery(WorkflowRun)
    head, tail = _around_values(alias, idempotent)
    marks, params, typed = [], [], True
    for field in WorkflowRun._meta.concrete_fields:
        value: Any = getattr(run, field.attname)
        if hasattr(value, "resolve_expression"):
            expression = value.resolve_expression(query, allow_joins=False, for_save=True)
            mark, given = query.get_compiler(connection=connection).compile(expression)
            # Inside a CASE, PostgreSQL takes a parameter for text, and PREPARE refuses it for a time's column.
            typed = typed and isinstance(value, DatabaseNow)
        # Most of the columns, and there are more than thirty: nothing to convert.
        elif value is None or type(value) is str:
            mark, given = "%s", (value,)
        else:
            mark, given = "%s", (field.get_db_prep_save(value, connection),)
        marks.append(mark)
        params += given
    statement = f"{head}{', '.join(marks)}{tail}"
    if typed and not compat.in_users_transaction(connection) and not connection.in_atomic_block:
        return compat.execute_often(connection, statement, params) == 1
    # A plan that the session does not know would break the caller's transaction.
    with transaction.mark_for_rollback_on_error(using=alias), connection.cursor() as cursor:
        cursor.execute(statement, params)
        return bool(cursor.rowcount == 1)


def _insert_surely(lease: Lease, run: WorkflowRun, *, idempotent: bool) -> bool:
    """`_insert` of a run that this process is to execute: nobody else would, if only the answer were lost."""
    connection, lost = connections[lease.alias], False
    for _ in range(ANSWER_TRIES):
        connected = connection.connection is not None
        try:
            if _insert(lease.alias, run, idempotent=idempotent or lost):
                return True
            ours = WorkflowRun.objects.using(lease.alias).held(run.pk, run.attempt).filter(worker=lease.id)
            return lost and ours.exists()
        except Error as error:
            away = not connected and connection.connection is None and not lost
            if away or connection.in_atomic_block or compat.trouble(error, broken=True) is not Trouble.LOST:
                raise
            failure, lost = error, True
            connection.close()
        lease.wait(0.2)
    raise failure


@lru_cache
def _around_values(alias: str, idempotent: bool) -> tuple[str, str]:
    """The INSERT of a run, before and behind its values."""
    operations, meta = connections[alias].ops, WorkflowRun._meta
    fields: Any = meta.concrete_fields
    on_conflict = OnConflict.IGNORE if idempotent else None
    columns = ", ".join(operations.quote_name(field.column) for field in fields)
    head = f"{operations.insert_statement(on_conflict)} {operations.quote_name(meta.db_table)} ({columns}) VALUES ("
    return head, f") {operations.on_conflict_suffix_sql(fields, on_conflict, [], [])}"


def _check_same_workflow(alias: str, run_id: str, definition: registry.Definition) -> None:
    found = WorkflowRun.objects.using(alias).filter(pk=run_id).values_list("workflow", flat=True).first()
    if found is not None and found not in (definition.name, *definition.aliases):
        raise RunIdInUse(run_id, found, definition.name)


# -- Look -------------------------------------------------------------------------------------------------------


def fetch(alias: str, run_id: str) -> WorkflowRun:
    """Return the run; raise RunNotFound."""
    run: WorkflowRun | None = WorkflowRun.objects.using(alias).filter(pk=run_id).first()
    if run is None:
        raise RunNotFound(run_id, alias)
    return run


def look(alias: str, run_id: str) -> End | None:
    """How the run ended, or None if it has not."""
    fields = ("status", "output", "exception", "error", "cancel_reason")
    run = WorkflowRun.objects.using(alias).filter(pk=run_id).only(*fields).first()
    if run is None:
        raise RunNotFound(run_id, alias)
    match run.status:
        case RunStatus.SUCCEEDED:
            return End(value=payloads.load(run.output, f"The result of run {run_id}"))
        case RunStatus.FAILED:
            return End(error=failure_of(run_id, run.exception))
        case RunStatus.CANCELLED:
            return End(error=RunCancelled(run_id, run.cancel_reason))
        case RunStatus.DEAD:
            dead = RunDead(run_id, run.error)
            dead.__cause__ = load_exception(run.exception)
            return End(error=dead)
        case _:
            return None


def value_of(end: End) -> Any:
    """Return the value that the run ended with, or raise its error."""
    if end.error is not None:
        raise end.error
    return end.value


def pauses() -> Iterator[float]:
    """Seconds between two looks at a run that somebody else executes: short ones first, then four a second."""
    pause = 0.01
    while True:
        yield pause
        pause = min(0.25, pause * 1.3)


def _finish_here(lease: Lease, run_id: str) -> End:
    """Wait for a run's end, executing it here whenever it is due and nobody else does: there may be no worker."""
    for count, pause in enumerate(pauses()):
        if (end := look(lease.alias, run_id)) is not None:
            return end
        if count % 4 == 0:
            bury(lease.alias)
            recover(lease.alias, spread=lease.stored)
            claims.cancel_overdue(lease.alias)
        claims.wake_due(lease.alias)
        lease = lease if lease.valid() else inline_lease(lease.alias)
        for claim in claims.claim(lease, 1, run_id=run_id):
            if (end := execute(claim, lease)) is not None:
                return end
        lease.wait(pause if lease.stored else _until_due(lease.alias, run_id, pause))
    raise AssertionError("unreachable: pauses() has no end")


def _until_due(alias: str, run_id: str, pause: float) -> float:
    """In a test, where waiting moves the clock: the whole way at once."""
    row = WorkflowRun.objects.using(alias).filter(pk=run_id).values_list("wake_at", DatabaseNow()).first()
    wake_at, now = row or (None, None)
    return pause if wake_at is None else max(pause, (wake_at - now).total_seconds())


# -- Steer ------------------------------------------------------------------------------------------------------


def cancel(alias: str, run_id: str, reason: str = "") -> bool:
    """Cancel an unfinished run, in the caller's transaction; False: it had ended, or there is none.

    An atomic step's own run is cancelled behind the step: in its transaction, the fence would refuse its checkpoint.
    """
    if not isinstance(reason, str):
        raise TypeError(f"cancel() takes its reason as text, found {type(reason).__name__}: {reason!r}.")
    reason = clean_text(reason)
    context = current_run()
    own = context is not None and (context.run_id, context.alias) == (run_id, alias)
    if own and context is not None and context.step is not None and context.step.atomic:
        context.cancelling = reason
        return True
    runs = WorkflowRun.objects.using(alias).filter(pk=run_id)
    if not runs.move(
        RunStatus.CANCELLED,
        cancel_reason=reason,
        finished_at=DatabaseNow(),
        wake_at=None,
        waiting_for="",
    ):
        return False

    def announce() -> None:
        end_here(run_id, Cancelled(f"run {run_id} was cancelled"))
        run = runs.first()
        if run is not None:
            claims.announce_end(run, alias, RunStatus.CANCELLED, run.worker)

    transaction.on_commit(announce, using=alias, robust=True)
    ring_after_commit(alias)
    return True


def resume(alias: str, run_id: str) -> bool:
    """Make a FAILED, CANCELLED or DEAD run due again: it goes on from its last completed step. False: none of these."""
    # On SQLite one that reads before it writes is refused at once when another has written meanwhile.
    with compat.write_transaction(alias):
        runs = WorkflowRun.objects.using(alias).filter(pk=run_id)
        before = runs.values_list("status", "failed_step", "failed_horizon").first()
        moved = runs.move(
            RunStatus.PENDING,
            RESUMABLE,
            failures=0,
            recoveries=0,
            error="",
            exception="",
            cancel_reason="",
            worker="",
            finished_at=None,
            failed_step=None,
            failed_horizon=None,
            run_after=DatabaseNow(),
            # The claim sets a missing one, from the run's timeout.
            deadline=Case(When(Q(deadline__lte=DatabaseNow()), then=None), default=F("deadline")),
        )
        if moved and before is not None:
            status, position, horizon = before
            if status == RunStatus.FAILED and position is not None and horizon is not None:
                rewind(alias, run_id, (position, horizon))
    if moved:
        ring_after_commit(alias)
    return bool(moved)
