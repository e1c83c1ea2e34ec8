"""Who may see what: nobody changes rows here, and payloads take a permission of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from django.contrib import admin
from django.db.models import Model, QuerySet
from django.http import HttpRequest

from django_durable.engine.starting import database_of

# At run time ModelAdmin takes no type argument; the type checker wants one.
if TYPE_CHECKING:
    from django_durable.models import Worker, WorkflowRun

    RunModelAdmin = admin.ModelAdmin[WorkflowRun]
    WorkerModelAdmin = admin.ModelAdmin[Worker]
else:
    RunModelAdmin = WorkerModelAdmin = admin.ModelAdmin


M = TypeVar("M", bound=Model)


class ReadOnly:
    """For a ModelAdmin: to look at, for superusers too. A row changed by hand would be a run that nobody executes."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


def may_see_payloads(request: HttpRequest) -> bool:
    """Inputs, outputs, errors' messages and tracebacks may hold what only some people should read."""
    return request.user.has_perm("django_durable.view_payload")


def in_our_database(queryset: QuerySet[M]) -> QuerySet[M]:
    """The rows where runs are written: a router's read replica would show yesterday's status."""
    return queryset.using(database_of())
