"""The admin's addresses."""

from __future__ import annotations

from django.contrib.admin.utils import quote
from django.urls import reverse

LIST = "/admin/django_durable/workflowrun/"
WORKERS = "/admin/django_durable/worker/"


def run_page(run_id: str) -> str:
    return reverse("admin:django_durable_workflowrun_change", args=[quote(run_id)])


def run_history(run_id: str) -> str:
    return reverse("admin:django_durable_workflowrun_history", args=[quote(run_id)])


def worker_page(worker_id: str) -> str:
    return reverse("admin:django_durable_worker_change", args=[quote(worker_id)])
