"""The list's filters. Their choices are found by index, never by DISTINCT over the table."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from django.contrib import admin
from django.db import connections
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _

from django_durable.clock import DatabaseNow
from django_durable.engine import registry
from django_durable.engine.starting import database_of
from django_durable.models import WorkflowRun
from django_durable.states import RunStatus

# What a person can still choose from. Others are reached by ?workflow=... in the address.
MAX_CHOICES = 100
# A queue that neither a known workflow nor a pending run names is looked for among so many of the newest runs.
NEWEST = 1_000

Choices = list[tuple[str, Any]]


class _Choice(admin.SimpleListFilter):
    """A filter on one column's exact value."""

    parameter_name: str

    # One choice is worth showing too: it says what there is.
    def has_output(self) -> bool:
        return bool(self.lookup_choices)

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        value = self.value()
        return queryset if value is None else queryset.filter(**{self.parameter_name: value})

    def named(self, names: Iterable[str]) -> Choices:
        """The names as choices; the one from the address is among them, known or not."""
        shown = sorted(set(names))[:MAX_CHOICES]
        chosen = self.value()
        return [(name, name) for name in sorted({*shown, chosen or ""} - {""})]


class StatusFilter(_Choice):
    title = _("status")
    parameter_name = "status"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Choices:
        return list(RunStatus.choices)


class WorkflowFilter(_Choice):
    """The workflows that this process knows, and those that only stored runs still name."""

    title = _("workflow")
    parameter_name = "workflow"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Choices:
        return self.named([*registry.names(), *stored_names("workflow")])


class QueueFilter(_Choice):
    """The queues of the known workflows, of the pending runs, and of the newest runs."""

    title = _("queue")
    parameter_name = "queue"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Choices:
        known = [found.queue for name in registry.names() if (found := registry.find(name))]
        runs = WorkflowRun.objects.using(database_of())
        newest = runs.order_by("-created_at").values_list("queue", flat=True)[:NEWEST]
        return self.named([*known, *stored_names("queue", RunStatus.PENDING), *newest])


class CreatedFilter(admin.SimpleListFilter):
    title = _("created")
    parameter_name = "created"

    spans = {
        "hour": (_("Past hour"), timedelta(hours=1)),
        "day": (_("Past 24 hours"), timedelta(days=1)),
        "week": (_("Past 7 days"), timedelta(days=7)),
        "month": (_("Past 30 days"), timedelta(days=30)),
    }

    def lookups(self, request: HttpRequest, model_admin: Any) -> Choices:
        return [(key, label) for key, (label, _span) in self.spans.items()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        _label, span = self.spans.get(self.value() or "", ("", None))
        return queryset if span is None else queryset.filter(created_at__gte=DatabaseNow(-span))


def stored_names(column: str, status: RunStatus | None = None) -> list[str]:
    """The different values of a column that leads an index, with one look into the index for each.

    DISTINCT would read every row of a large table for a handful of names.
    """
    connection = connections[database_of()]
    quote = connection.ops.quote_name
    table, name = quote(WorkflowRun._meta.db_table), quote(column)
    # Written into the statement: as a parameter it could not be matched with a partial index's condition.
    where = "" if status is None else f" AND {quote('status')} = '{status}'"
    # Names of ours only: tables, columns and a status.
    statement = f"""
        WITH RECURSIVE found(name) AS (
            SELECT MIN({name}) FROM {table} WHERE {name} >= ''{where}
            UNION ALL
            SELECT (SELECT MIN({name}) FROM {table} WHERE {name} > found.name{where}) FROM found
            WHERE found.name IS NOT NULL
        )
        SELECT name FROM found WHERE name IS NOT NULL LIMIT {MAX_CHOICES}
    """  # noqa: S608
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return [name for (name,) in cursor.fetchall()]
