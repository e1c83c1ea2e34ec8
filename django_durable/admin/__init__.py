"""The admin: runs, their steps, and who executes them. To look at; what changes a run comes through the engine."""

from __future__ import annotations

from django_durable.admin.runs import RunAdmin
from django_durable.admin.workers import WorkerAdmin

__all__ = ["RunAdmin", "WorkerAdmin"]
