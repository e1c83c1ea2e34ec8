"""A new run's row: what it is started with, and the one INSERT that stores it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from django.db import connections, models, router, transaction
from django.db.models import Case, DateTimeField, Value, When, sql
from django.db.models.constants import OnConflict
from django.db.models.lookups import GreaterThan
from django.utils import timezone

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.conf import as_seconds, check_text, options
from django_durable.engine import payloads, registry
from django_durable.engine.ids import new_id
from django_durable.engine.leases import Lease
from django_durable.exceptions import RunIdInUse, SerializationError
from django_durable.models import WorkflowRun
from django_durable.states import RunStatus


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


def new_run(
    definition: registry.Definition, given: StartOptions, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> WorkflowRun:
    """Return the unsaved row of a run that is due, or waits for its time."""
    timeout = given.timeout if given.timeout is not None else definition.timeout
    now: Any = DatabaseNow()
    run = WorkflowRun(
        id=given.run_id or new_id(),
        workflow=definition.name,
        status=RunStatus.PENDING,
        queue=given.queue or definition.queue,
        priority=given.priority,
        attributes=given.attributes or {},
        input=payloads.dump_input(args, kwargs, definition.name),
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


def insert(alias: str, run: WorkflowRun, *, idempotent: bool) -> bool:
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


@lru_cache
def _around_values(alias: str, idempotent: bool) -> tuple[str, str]:
    """The INSERT of a run, before and behind its values."""
    operations, meta = connections[alias].ops, WorkflowRun._meta
    fields: Any = meta.concrete_fields
    on_conflict = OnConflict.IGNORE if idempotent else None
    columns = ", ".join(operations.quote_name(field.column) for field in fields)
    head = f"{operations.insert_statement(on_conflict)} {operations.quote_name(meta.db_table)} ({columns}) VALUES ("
    return head, f") {operations.on_conflict_suffix_sql(fields, on_conflict, [], [])}"


def check_same_workflow(alias: str, run_id: str, definition: registry.Definition) -> None:
    """Raise RunIdInUse if the stored run is another workflow's."""
    found = WorkflowRun.objects.using(alias).filter(pk=run_id).values_list("workflow", flat=True).first()
    if found is not None and found not in (definition.name, *definition.aliases):
        raise RunIdInUse(run_id, found, definition.name)


def hold(run: WorkflowRun, lease: Lease) -> None:
    """Let the row be stored as one that this process executes at once."""
    now = lease.clock.now()
    run.status, run.worker, run.attempt, run.version = RunStatus.RUNNING, lease.id, 1, options().VERSION
    run.created_at = run.run_after = run.started_at = now
    if run.timeout is not None:
        own = now + timedelta(seconds=run.timeout)
        run.deadline = own if run.deadline is None else min(own, run.deadline)
