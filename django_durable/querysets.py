"""Selections of runs that have a name, and the one statement that changes a status."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from django.db import models
from django.db.models import Exists, OuterRef

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


def _worker_model() -> Any:
    from django_durable.models import Worker

    return Worker
