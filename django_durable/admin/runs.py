"""The list of runs, and a run's page."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.db.models import Exists, OuterRef, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed
from django.template.response import TemplateResponse
from django.utils.html import format_html
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from django_durable.admin import facts, headline, steps, values, words
from django_durable.admin.access import ReadOnly, RunModelAdmin, in_our_database, may_see_payloads
from django_durable.admin.filters import CreatedFilter, QueueFilter, StatusFilter, WorkflowFilter
from django_durable.admin.paging import CappedPaginator
from django_durable.admin.steps import ERROR, FIRST_LINE, starts
from django_durable.admin.values import HIDDEN, SHOWN
from django_durable.clock import DatabaseNow
from django_durable.engine.starting import database_of
from django_durable.models import Worker, WorkflowRun
from django_durable.states import RunStatus

# What the list shows; payloads stay in the database.
LISTED = (
    "id",
    "workflow",
    "status",
    "queue",
    "created_at",
    "started_at",
    "finished_at",
    "wake_at",
    "waiting_for",
    "attempt",
    "failures",
    "recoveries",
)
# What may be asked by the address beside the filters. Any other column would answer questions about payloads
# (?input__startswith=...) to those who may not see them.
LOOKUPS = frozenset({"created_at__gte", "created_at__lt", "related_model", "related_id", "version", "worker"})


@admin.register(WorkflowRun)
class RunAdmin(ReadOnly, RunModelAdmin):
    list_display = ("state", "workflow_name", "short_id", "queue_name", "age", "duration", "glance")
    list_display_links = ("workflow_name", "short_id")
    list_filter = (StatusFilter, WorkflowFilter, QueueFilter, CreatedFilter)
    list_per_page = 50
    # Each of these would count the whole table.
    paginator = CappedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    ordering = ("-created_at", "-pk")
    # Only says that there is a search; `get_search_results` does it.
    search_fields = ("=id",)
    search_help_text = _("A run's id, or its beginning.")
    actions = None

    class Media:
        css = {"all": ("django_durable/admin.css",)}

    # -- The list -----------------------------------------------------------------------------------------------

    def get_queryset(self, request: HttpRequest) -> QuerySet[WorkflowRun]:
        alive = Worker.objects.using(database_of()).filter(pk=OuterRef("worker"), expires_at__gt=DatabaseNow())
        runs = in_our_database(super().get_queryset(request))
        return runs.annotate(read_at=DatabaseNow(), is_held=Exists(alive)).only(*LISTED)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        # Case counts: a search that ignored it could use no index.
        term = search_term.strip()
        return (queryset.filter(pk__startswith=term) if term else queryset), False

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest | None = None) -> bool:
        return lookup in LOOKUPS or lookup in [found.parameter_name for found in self.list_filter]

    @admin.display(description=_("status"))
    def state(self, run: WorkflowRun) -> str:
        return words.badge(run.status, run.get_status_display())

    @admin.display(description=_("workflow"))
    def workflow_name(self, run: WorkflowRun) -> str:
        own, module = words.short_name(run.workflow)
        return format_html(
            '<span title="{}">{} <span class="durable-quiet">{}</span></span>', run.workflow, own, module
        )

    @admin.display(description=_("id"))
    def short_id(self, run: WorkflowRun) -> str:
        return format_html('<code title="{}">{}</code>', run.pk, words.short_id(run.pk))

    @admin.display(description=_("queue"))
    def queue_name(self, run: WorkflowRun) -> str:
        return run.queue

    @admin.display(description=_("age"), ordering="created_at")
    def age(self, run: WorkflowRun) -> str:
        return words.moment(run.created_at, words.between(run.created_at, read_at(run), roughly=True))

    @admin.display(description=_("duration"), empty_value="-")
    def duration(self, run: WorkflowRun) -> str | None:
        end = read_at(run) if run.status == RunStatus.RUNNING else run.finished_at
        return words.between(run.started_at, end) or None

    @admin.display(description=_("notes"), empty_value="")
    def glance(self, run: WorkflowRun) -> str | None:
        return " · ".join(_glance(run)) or None

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        # Django's own is "Select workflow run to view".
        return super().changelist_view(request, {"title": _("Workflow runs"), **(extra_context or {})})

    # -- A run's page -------------------------------------------------------------------------------------------

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        """The run with its steps. Nothing is changed here, so there is no form."""
        if request.method not in ("GET", "HEAD"):
            return HttpResponseNotAllowed(["GET", "HEAD"])
        payloads = may_see_payloads(request)
        run = self._stored(request, unquote(object_id), payloads=payloads)
        if not self.has_view_permission(request, run):
            raise PermissionDenied
        if run is None:
            # Django's own answer to a page that is not there.
            return super().change_view(request, object_id, form_url, extra_context)
        context = {
            **self.admin_site.each_context(request),
            "title": words.short_name(run.workflow)[0],
            "subtitle": run.pk,
            "original": run,
            "opts": self.opts,
            "media": self.media,
            "has_view_permission": True,
            **self._page(request, run, payloads=payloads),
            **(extra_context or {}),
        }
        return TemplateResponse(request, "admin/django_durable/workflowrun/run.html", context)

    def _stored(self, request: HttpRequest, run_id: str, *, payloads: bool) -> Any:
        """The run with its error and, for those who may see them, its values: as much as a page shows."""
        found = super().get_queryset(request)
        found = in_our_database(found).annotate(read_at=DatabaseNow()).defer("input", "output", "error", "exception")
        found = found.annotate(**starts("error", ERROR if payloads else FIRST_LINE))
        if payloads:
            found = found.annotate(**starts("input", SHOWN), **starts("output", SHOWN))
        return found.filter(pk=run_id).first()

    def _page(self, request: HttpRequest, run: Any, *, payloads: bool) -> dict[str, Any]:
        alias = database_of()
        own_name = words.short_name(run.workflow)[0]
        error = values.headline(run.error_start) if payloads else values.error_type(run.error_start)
        origin = steps.page_of(run.failed_step) if run.failed_step else None
        context = {
            "run": run,
            "badge": words.badge(run.status, run.get_status_display()),
            "status_class": words.status_class(run.status),
            "headline": headline.sentence(headline.Seen(run, error, run.read_at, alias)),
            "facts": facts.of(run, request, self.admin_site),
            "attributes": facts.attributes(run),
            "error": error,
            "origin_page": origin,
            "steps": steps.load(run, alias, run.read_at, request.GET.get("steps", 1), payloads=payloads),
            "permission": "django_durable.view_payload",
        }
        if not payloads:
            return {**context, "input": HIDDEN, "output": HIDDEN, "traceback": HIDDEN}
        return {
            **context,
            "input": values.call(own_name, run.input_start, run.input_size),
            "output": values.value(run.output_start, run.output_size) if run.output_size else None,
            "traceback": values.traceback(run.error_start, run.error_size),
        }


def read_at(run: Any) -> datetime:
    """The database's time when it was asked for the run: the list's annotation."""
    found: datetime = run.read_at
    return found


def _glance(run: Any) -> list[str]:
    found: list[str] = []
    if run.status == RunStatus.RUNNING and not run.is_held:
        found.append(gettext("no live process"))
    if run.status == RunStatus.WAITING:
        if run.waiting_for:
            found.append(run.waiting_for.replace(":", " "))
        if run.wake_at is not None:
            left = (run.wake_at - read_at(run)).total_seconds()
            found.append(
                gettext("due") if left <= 0 else gettext("in %(left)s") % {"left": words.duration(left, roughly=True)}
            )
    if run.attempt > 1:
        found.append(gettext("attempt %(n)d") % {"n": run.attempt})
    if run.failures:
        found.append(ngettext("%(n)d failure", "%(n)d failures", run.failures) % {"n": run.failures})
    if run.recoveries:
        found.append(ngettext("%(n)d recovery", "%(n)d recoveries", run.recoveries) % {"n": run.recoveries})
    return found
