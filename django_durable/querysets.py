"""Selections of runs that have a name, and the one statement that changes a status."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from django.db import connections, models, transaction
from django.db.models import Exists, OuterRef

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.states import FINISHED, SOURCES, RunStatus

if TYPE_CHECKING:
    from django_durable.models import WorkflowRun  # noqa: F401 (in quotes below, and not seen there)


class RunQuerySet(models.QuerySet["WorkflowRun"]):
    def pending(self) -> RunQuerySet:
        return self.filter(status=RunStatus.PENDING)

    def running(self) -> RunQuerySet:
        return self.filter(status=RunStatus.RUNNING)

    def waiting(self) -> RunQuerySet:
        return self.filter(status=RunStatus.WAITING)

    def finished(self) -> RunQuerySet:
        return self.filter(status__in=FINISHED)

    def failed(self) -> RunQuerySet:
        return self.filter(status=RunStatus.FAILED)

    def dead(self) -> RunQuerySet:
        return self.filter(status=RunStatus.DEAD)

    def orphaned(self) -> RunQuerySet:
        """RUNNING, but the process that executes them has no row: it was declared dead, or its row was deleted."""
        workers = _worker_model().objects.using(self.db).filter(pk=OuterRef("worker"))
        return self.running().filter(~Exists(workers))

    def stuck(self) -> RunQuerySet:
        """RUNNING on a process that is dead or was not heard of for its lease; the next recovery takes them."""
        alive = _worker_model().objects.using(self.db).filter(pk=OuterRef("worker"), expires_at__gt=DatabaseNow())
        return self.running().filter(~Exists(alive))

    def for_object(self, obj: models.Model) -> RunQuerySet:
        """The runs that were started with ``related=obj``."""
        return self.filter(related_model=obj._meta.label_lower, related_id=str(obj.pk))

    def held(self, run_id: str, attempt: int) -> RunQuerySet:
        """The run, if this attempt still is the one that executes it: the fence."""
        return self.filter(pk=run_id, attempt=attempt, status=RunStatus.RUNNING)

    def move(self, to: RunStatus, sources: Iterable[RunStatus] | None = None, **changes: Any) -> int:
        """Set the status to `to`, and the changes with it, where the state machine allows it; return how many moved.

        Every change of a status goes through this one guarded statement.
        """
        allowed = SOURCES[to] if sources is None else SOURCES[to] & set(sources)
        return self.filter(status__in=allowed).update(status=to, **changes)

    def move_held(self, run_id: str, attempt: int, to: RunStatus, *, unless: str = "", **changes: Any) -> int:
        """``held(run_id, attempt).move(to, ...)``, for the statement that ends each execution.

        Written by hand: the ORM takes longer to build it than the database to execute it. A change is a plain value
        or a DatabaseNow. Not if the boolean column `unless` is true.
        """
        if RunStatus.RUNNING not in SOURCES[to]:
            return 0
        meta, connection = self.model._meta, connections[self.db]
        quote = connection.ops.quote_name
        assignments, params = [f"{quote('status')} = %s"], [str(to)]
        for name, value in changes.items():
            field: Any = meta.get_field(name)
            if isinstance(value, DatabaseNow):
                sql, given = value.on(connection)
            else:
                sql, given = "%s", (field.get_db_prep_save(value, connection),)
            assignments.append(f"{quote(field.column)} = {sql}")
            params += given
        statement = (
            f"UPDATE {quote(meta.db_table)} SET {', '.join(assignments)} "  # noqa: S608 (names of ours only)
            f"WHERE {quote('id')} = %s AND {quote('attempt')} = %s AND {quote('status')} = '{RunStatus.RUNNING}'"
            f"{f' AND NOT {quote(unless)}' if unless else ''}"
        )
        with transaction.mark_for_rollback_on_error(using=self.db):
            return compat.execute_often(connection, statement, [*params, run_id, attempt])


def _worker_model() -> Any:
    from django_durable.models import Worker

    return Worker
