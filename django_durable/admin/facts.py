"""What a run's page says about the run beside its steps: names, times, counts and links."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from django.apps import apps
from django.contrib.admin import AdminSite
from django.contrib.admin.utils import quote
from django.http import HttpRequest
from django.urls import reverse
from django.utils.http import urlencode
from django.utils.translation import gettext

from django_durable.admin import words
from django_durable.engine import registry
from django_durable.models import WorkflowRun

# Of an attribute as much as fits beside the others, and of many the first.
LONGEST_ATTRIBUTE, MOST_ATTRIBUTES = 300, 50


class Fact(NamedTuple):
    label: str
    value: Any
    href: str = ""


def of(run: WorkflowRun, request: HttpRequest, site: AdminSite) -> list[Fact]:
    """The facts that there are, in the order of the page."""
    listed = reverse(f"{site.name}:django_durable_workflowrun_changelist")
    workflow = run.workflow if registry.find(run.workflow) else f"{run.workflow} ({gettext('not known here')})"
    found = [
        Fact(gettext("workflow"), workflow, f"{listed}?{urlencode({'workflow': run.workflow})}"),
        Fact(gettext("queue"), run.queue, f"{listed}?{urlencode({'queue': run.queue})}"),
        Fact(gettext("related to"), *_related(run, request, site)),
        Fact(gettext("created"), words.moment(run.created_at)),
        Fact(gettext("due"), words.moment(run.wake_at or (None if run.started_at else run.run_after))),
        Fact(gettext("started"), words.moment(run.started_at)),
        Fact(gettext("finished"), words.moment(run.finished_at)),
        Fact(gettext("waited to start"), words.between(run.created_at, run.started_at)),
        Fact(gettext("duration"), words.between(run.started_at, run.finished_at)),
        Fact(gettext("deadline"), words.moment(run.deadline)),
        Fact(gettext("timeout"), "" if run.timeout is None else words.duration(run.timeout)),
        Fact(gettext("priority"), run.priority or ""),
        Fact(gettext("attempt"), run.attempt),
        Fact(gettext("failures"), run.failures),
        Fact(gettext("recoveries"), run.recoveries),
        Fact(gettext("version"), run.version),
        Fact(gettext("partition key"), run.partition_key),
        Fact(gettext("deduplication key"), run.deduplication_key),
        Fact(gettext("parent"), run.parent_id, _run_url(site, run.parent_id)),
        Fact(gettext("forked from"), run.forked_from_id, _run_url(site, run.forked_from_id)),
        Fact(gettext("cancel reason"), run.cancel_reason),
    ]
    return [fact for fact in found if fact.value not in ("", None)]


def attributes(run: WorkflowRun) -> list[tuple[str, str]]:
    """The attributes as names and short texts."""
    stored: Any = run.attributes
    if not isinstance(stored, dict):
        return [("", _short(stored))] if stored else []
    return [(name, _short(stored[name])) for name in list(stored)[:MOST_ATTRIBUTES]]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_ATTRIBUTE else f"{text[:LONGEST_ATTRIBUTE]}…"


def _run_url(site: AdminSite, run_id: str | None) -> str:
    return reverse(f"{site.name}:django_durable_workflowrun_change", args=[quote(run_id)]) if run_id else ""


def _related(run: WorkflowRun, request: HttpRequest, site: AdminSite) -> tuple[str, str]:
    """The related object's name and, if the reader may see it, its page. The object itself is not read."""
    if not run.related_id:
        return "", ""
    try:
        model = apps.get_model(run.related_model)
    except (LookupError, ValueError):
        return f"{run.related_model} {run.related_id}", ""
    name = f"{model._meta.verbose_name} {run.related_id}"
    if not site.is_registered(model) or not site.get_model_admin(model).has_view_permission(request):
        return name, ""
    return name, reverse(
        f"{site.name}:{model._meta.app_label}_{model._meta.model_name}_change", args=[quote(run.related_id)]
    )
