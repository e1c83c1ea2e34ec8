"""Waiting without a thread: the run is stored as WAITING and unwound; whoever makes it due lets it be replayed."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django_durable import compat
from django_durable.engine import checkpoints
from django_durable.engine.context import RunContext, inside
from django_durable.exceptions import Parked
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.states import RunStatus, StepStatus


def park(
    context: RunContext, until: datetime, waiting_for: str, row: StepCheckpoint | None = None, *, replaces: bool = False
) -> BaseException:
    """Store the run as WAITING until then, and `row` with it; return what unwinds the workflow."""
    checkpoints.check_not_in_transaction(context, waiting_for)
    context.join_branches()
    context.guard()
    # A parallel step may be due before; one of the body's own is not asked for its time on replay, and keeps it.
    own_retry = row is not None and row.status == StepStatus.RETRYING
    wake_at = until if own_retry else context.wake_by(until)

    def write() -> bool:
        with compat.write_transaction(context.alias):
            # The run's row first, here: taken after the checkpoint's shared lock, it would be an upgrade, on which
            # two parallel steps deadlock.
            changes: dict[str, Any] = {"wake_at": wake_at, "waiting_for": waiting_for, "worker": ""}
            runs = WorkflowRun.objects.using(context.alias)
            if not runs.move_held(context.run_id, context.attempt, RunStatus.WAITING, **changes):
                return False
            if row is not None:
                if replaces:
                    checkpoints.drop_try(context, row.position)
                checkpoints.insert(context, row, fence="none")
            return True

    # A sleep parks from the body itself, where STRICT takes no query.
    with inside(context, busy=True):
        parked = checkpoints.persist(context, write)
    if not parked:
        # Not ours any more; or ours, and only the answer to the COMMIT was lost. Either way it ends here.
        return checkpoints.lost(context)
    if row is not None:
        checkpoints.announce(context, row)
    return context.end(Parked(f"run {context.run_id} waits for {waiting_for}"))
