"""``{% load durable %}{% durable_progress run %}``: a run's steps and status, as HTML that follows the run."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Any

from django import template
from django.urls import reverse

from django_durable import views
from django_durable.engine.starting import database_of
from django_durable.exceptions import RunNotFound
from django_durable.handles import RunHandle
from django_durable.models import WorkflowRun

register = template.Library()


@register.inclusion_tag("django_durable/progress.html", takes_context=True)
def durable_progress(
    context: template.Context,
    run: RunHandle | WorkflowRun | str,
    *,
    live: bool = True,
    max_age: float | timedelta = timedelta(days=1),
    events: Collection[str] = (),
    streams: Collection[str] = (),
) -> dict[str, Any]:
    """Draw the steps and the status of a run: a handle, a `WorkflowRun` or an id. Whoever sees the page may see it.

    With `live`, the page follows the run by a token that is valid for `max_age` (seconds or timedelta) and permits
    to read these `events` and `streams` too, of which the page's own script is told. That takes
    ``include("django_durable.urls")``. A run that is gone is a sentence.
    """
    handle = _handle(run)
    try:
        shown = views.state(handle.database, handle.id)
    except RunNotFound:
        return {"run": None}
    # With a policy that trusts scripts by a nonce: Django's own context processor, or django-csp's middleware.
    nonce = context.get("csp_nonce") or getattr(context.get("request"), "csp_nonce", "")
    drawn = {"run": shown, "live": live, "nonce": nonce}
    if live:
        token = handle.token(max_age, events=_keys(events), streams=_keys(streams))
        drawn["status_url"] = reverse("durable:status", args=[token])
        drawn["progress_url"] = reverse("durable:progress", args=[token])
    return drawn


def _handle(run: Any) -> RunHandle:
    match run:
        case RunHandle():
            return run
        case WorkflowRun():
            return RunHandle(run.pk, run._state.db or database_of())
        case str():
            return RunHandle(run, database_of())
    raise TypeError(
        f"durable_progress takes a run's handle, a WorkflowRun or an id (a str), found {type(run).__name__}: {run!r}."
    )


def _keys(keys: Collection[str]) -> Collection[str]:
    # A template has no way to write a list.
    return [keys] if isinstance(keys, str) else keys
