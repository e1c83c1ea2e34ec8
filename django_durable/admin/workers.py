"""Who is alive: the processes that execute runs."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Count, IntegerField, OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from django_durable.admin import words
from django_durable.admin.access import ReadOnly, WorkerModelAdmin, in_our_database
from django_durable.admin.paging import CappedPaginator
from django_durable.clock import DatabaseNow
from django_durable.engine.starting import database_of
from django_durable.models import Worker, WorkflowRun


@admin.register(Worker)
class WorkerAdmin(ReadOnly, WorkerModelAdmin):
    list_display = ("lease", "process", "kind", "queue_names", "executes", "version", "started", "seen")
    list_display_links = ("process",)
    list_per_page = 100
    paginator = CappedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    ordering = ("-last_seen", "pk")
    actions = None
    fields = ("lease", "process", "kind", "queue_names", "executes", "version", "started", "seen", "expires", "id")
    readonly_fields = fields

    class Media:
        css = {"all": ("django_durable/admin.css",)}

    def get_queryset(self, request: HttpRequest) -> QuerySet[Worker]:
        running = WorkflowRun.objects.using(database_of()).running().filter(worker=OuterRef("pk")).order_by()
        counted = running.values("worker").annotate(count=Count("pk")).values("count")
        return in_our_database(super().get_queryset(request)).annotate(
            read_at=DatabaseNow(), running=Coalesce(Subquery(counted, output_field=IntegerField()), 0)
        )

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        return super().changelist_view(request, {"title": _("Workers"), **(extra_context or {})})

    @admin.display(description=_("lease"))
    def lease(self, worker: Any) -> str:
        if worker.expires_at > worker.read_at:
            return format_html('<span class="durable-badge durable-succeeded">{}</span>', gettext("alive"))
        # A web process lets its lease go between direct calls; a worker does not.
        if worker.kind == "web" and not worker.running:
            return format_html('<span class="durable-badge durable-cancelled">{}</span>', gettext("idle"))
        return format_html('<span class="durable-badge durable-failed">{}</span>', gettext("expired"))

    @admin.display(description=_("process"))
    def process(self, worker: Worker) -> str:
        return gettext("%(host)s, pid %(pid)d") % {"host": worker.host, "pid": worker.pid}

    @admin.display(description=_("queues"))
    def queue_names(self, worker: Worker) -> str:
        queues: Any = worker.queues
        return ", ".join(map(str, queues)) if queues else gettext("all")

    @admin.display(description=_("runs"))
    def executes(self, worker: Any) -> int:
        found: int = worker.running
        return found

    @admin.display(description=_("started"), ordering="started_at")
    def started(self, worker: Worker) -> str:
        return words.moment(worker.started_at)

    @admin.display(description=_("last seen"), ordering="last_seen")
    def seen(self, worker: Any) -> str:
        ago = gettext("%(time)s ago") % {"time": words.between(worker.last_seen, worker.read_at)}
        return words.moment(worker.last_seen, ago)

    @admin.display(description=_("lease good until"))
    def expires(self, worker: Worker) -> str:
        return words.moment(worker.expires_at)
