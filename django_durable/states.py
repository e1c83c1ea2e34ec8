"""The state machine of a run, and the outcomes and kinds of a step: all of it, in one place.

PENDING ──claim──▶ RUNNING ──▶ SUCCEEDED
   ▲                 │ ├─────▶ FAILED ────┐
   │ due, woken      │ ├─────▶ DEAD ──────┤ resume()
WAITING ◀──has to wait ├─────▶ PENDING    │
   │                   │  (handed back,   ▼
   │                   │   recovered)   PENDING
   └─ any unfinished ──┴─────▶ CANCELLED ──▲
"""

from __future__ import annotations

from typing import Any

from django.db.models import TextChoices
from django.utils.translation import gettext_lazy as _


class RunStatus(TextChoices):
    # Due now, waiting for a worker: the queue's depth is the count of these.
    PENDING = "PENDING", _("pending")
    # An executor holds its lease.
    RUNNING = "RUNNING", _("running")
    # Not due: delayed, or waiting for a time, a retry, a message, a child, a person.
    WAITING = "WAITING", _("waiting")
    # Ended with a result.
    SUCCEEDED = "SUCCEEDED", _("succeeded")
    # Ended with an exception.
    FAILED = "FAILED", _("failed")
    # Ended by a person or by its deadline.
    CANCELLED = "CANCELLED", _("cancelled")
    # Set aside for a person: it kills its workers, or its code no longer fits its history.
    DEAD = "DEAD", _("dead")


class StepStatus(TextChoices):
    # The step's one outcome is a value.
    SUCCEEDED = "SUCCEEDED", _("succeeded")
    # The step's one outcome is an exception.
    FAILED = "FAILED", _("failed")
    # It failed and will be tried again: not an outcome, replay executes it.
    RETRYING = "RETRYING", _("retrying")


class StepKind(TextChoices):
    # A call of the outside world: at least once, its outcome recorded.
    STEP = "step", _("step")
    # A transaction: its writes and its checkpoint commit together.
    ATOMIC = "atomic", _("atomic")


UNFINISHED = frozenset({RunStatus.PENDING, RunStatus.RUNNING, RunStatus.WAITING})
FINISHED = frozenset(RunStatus) - UNFINISHED
RESUMABLE = frozenset({RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.DEAD})

# target -> the statuses that it may be reached from.
SOURCES: dict[RunStatus, frozenset[RunStatus]] = {
    RunStatus.PENDING: frozenset({RunStatus.RUNNING, RunStatus.WAITING}) | RESUMABLE,
    RunStatus.RUNNING: frozenset({RunStatus.PENDING}),
    RunStatus.WAITING: frozenset({RunStatus.RUNNING}),
    RunStatus.SUCCEEDED: frozenset({RunStatus.RUNNING}),
    RunStatus.FAILED: frozenset({RunStatus.RUNNING}),
    RunStatus.DEAD: frozenset({RunStatus.RUNNING}),
    RunStatus.CANCELLED: UNFINISHED,
}


def run_status_choices() -> list[tuple[str, Any]]:
    """Choices as a callable, so that a new status is no migration in users' projects."""
    return list(RunStatus.choices)


def step_status_choices() -> list[tuple[str, Any]]:
    return list(StepStatus.choices)


def step_kind_choices() -> list[tuple[str, Any]]:
    return list(StepKind.choices)
