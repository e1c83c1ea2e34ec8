"""A user's own site: the app's addresses, and a page that draws a run's progress."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.template import RequestContext, Template
from django.urls import include, path

PAGE = """<!doctype html>
<html lang="en"><head><title>An order</title>
{% if request.GET.dark %}<meta name="color-scheme" content="light dark">{% endif %}</head><body>
{% load durable %}{% durable_progress run streams="progress" %}
</body></html>"""


def order(request: HttpRequest, run_id: str) -> HttpResponse:
    return HttpResponse(Template(PAGE).render(RequestContext(request, {"run": run_id})))


urlpatterns = [path("durable/", include("django_durable.urls")), path("orders/<run_id>/", order)]
