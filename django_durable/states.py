"""The state machine of a run, and the outcomes and kinds of a step: all of it, in one place.

PENDING ──claim──▶ RUNNING ──▶ SUCCEEDED
 │ ▲                 │ ├─────▶ FAILED ────┐
 │ │ due, woken      │ ├─────▶ DEAD ──────┤ resume()
WAITING ◀──has to wait ├─────▶ PENDING    │
 ▲ │        or paused  │  (handed back,   ▼
 │ │                   │   recovered)   PENDING
 └─┴─ any unfinished ──┴─────▶ CANCELLED ──▲
 pause()
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
    # It waits for something: not an outcome, replay goes on waiting.
    WAITING = "WAITING", _("waiting")


class StepKind(TextChoices):
    # A call of the outside world: at least once, its outcome recorded.
    STEP = "step", _("step")
    # A transaction: its writes and its checkpoint commit together.
    ATOMIC = "atomic", _("atomic")
    # A pause; its value is the time at which it ends.
    SLEEP = "sleep", _("sleep")
    # A message taken from the run's own mailbox, or put into another's.
    RECEIVE = "receive", _("receive")
    SEND = "send", _("send")
    # A value that the run has published, or another's that it has read.
    EVENT = "event", _("event")
    # Another run that this one has started or called.
    CHILD = "child", _("child")
    # The end of other runs.
    WAIT = "wait", _("wait")
    # A marker: the run came to this point behind the change of its code.
    PATCH = "patch", _("patch")
    # A person's decision.
    APPROVAL = "approval", _("approval")
    # A value written to one of the run's streams.
    STREAM = "stream", _("stream")


# Not outcomes: what a replay executes again, or goes on with.
OPEN_STEPS = frozenset({StepStatus.RETRYING, StepStatus.WAITING})

UNFINISHED = frozenset({RunStatus.PENDING, RunStatus.RUNNING, RunStatus.WAITING})
FINISHED = frozenset(RunStatus) - UNFINISHED
RESUMABLE = frozenset({RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.DEAD})

# target -> the statuses that it may be reached from.
SOURCES: dict[RunStatus, frozenset[RunStatus]] = {
    RunStatus.PENDING: frozenset({RunStatus.RUNNING, RunStatus.WAITING}) | RESUMABLE,
    RunStatus.RUNNING: frozenset({RunStatus.PENDING}),
    # From PENDING by pause() alone: what is due is held back before it has begun.
    RunStatus.WAITING: frozenset({RunStatus.RUNNING, RunStatus.PENDING}),
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
