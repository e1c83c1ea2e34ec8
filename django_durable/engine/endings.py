"""The end of a run: one guarded statement, and with it, in the same commit, whoever waits for it is woken."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from django.db import Error, connections
from django.db.models import Exists, OuterRef, Q

from django_durable import compat, signals
from django_durable.clock import DatabaseNow
from django_durable.compat import Trouble
from django_durable.engine.bell import ring_after_commit
from django_durable.engine.leases import end_here
from django_durable.exceptions import Cancelled
from django_durable.models import WorkflowRun
from django_durable.querysets import RunQuerySet
from django_durable.states import FINISHED, UNFINISHED, RunStatus

T = TypeVar("T")

# What a run waits for, as it is stored. A run's end is told to those who wait for it alone, for any of their
# children, or for one of its events, which may not come any more.
ANY_CHILD = "children"


def run_key(run_id: str) -> str:
    return f"run:{run_id}"


def event_key(run_id: str, key: str) -> str:
    return f"event:{run_id}:{key}"


def message_key(topic: str) -> str:
    return f"message:{topic}"


def end_held(alias: str, run_id: str, attempt: int, to: RunStatus, **changes: Any) -> bool:
    """End a run that this attempt holds; False: it does not.

    One statement if nobody waits for it. Who begins to wait sets `awaited` under the lock of the run's row, so that
    either this statement comes first and is seen, or it finds the mark.
    """
    runs = WorkflowRun.objects.using(alias)
    changes["finished_at"] = DatabaseNow()
    if runs.move_held(run_id, attempt, to, unless="awaited", **changes):
        return True
    held = runs.held(run_id, attempt)
    # Most often there is no more to it: it was cancelled, or has another owner.
    if not held.exists():
        return False
    return end(alias, run_id, held, to, **changes)


def end(alias: str, run_id: str, which: RunQuerySet, to: RunStatus, **changes: Any) -> bool:
    """End the run if it is one of `which`, and wake who waits for it; False: it is not."""
    with compat.write_transaction(alias):
        lock_parent(alias, run_id)
        changes = {"finished_at": DatabaseNow(), "wake_at": None, "waiting_for": "", "awaited": False, **changes}
        if not which.filter(pk=run_id).move(to, **changes):
            return False
        wake_who_awaits(alias, [run_id])
    return True


def lock_parent(alias: str, run_id: str) -> None:
    """Parents before their children, as a cancel that goes down the tree: the other way round, both would wait."""
    runs = WorkflowRun.objects.using(alias)
    locked = None
    # A parent that goes on as a new run hands its children over.
    while (parent := runs.filter(pk=run_id).values_list("parent_id", flat=True).first()) != locked:
        list(compat.locked(runs.filter(pk=parent)).values_list("pk"))
        locked = parent


def wake_who_awaits(alias: str, ended: Iterable[str]) -> int:
    """Make the runs due that wait for the end of one of these; in the transaction that ends them."""
    ended = list(ended)
    runs = WorkflowRun.objects.using(alias)
    parents = runs.filter(pk__in=ended, parent__isnull=False).order_by().values_list("parent_id", flat=True)
    their = Q(waiting_for__in=[run_key(run_id) for run_id in ended])
    their |= Q(waiting_for=ANY_CHILD, pk__in=list(parents))
    for run_id in ended:
        their |= Q(waiting_for__startswith=event_key(run_id, ""))
    return wake(runs.filter(their))


def wake(runs: RunQuerySet) -> int:
    """Make WAITING runs due, and the workers look; in the caller's transaction."""
    woken = runs.waiting().move(RunStatus.PENDING, run_after=DatabaseNow(), wake_at=None, waiting_for="")
    if woken:
        ring_after_commit(runs.db)
    return woken


class Ended(NamedTuple):
    """What is told of a run that ended."""

    run_id: str
    workflow: str
    attempt: int
    worker: str


def cancel(
    alias: str, run_id: str, which: RunQuerySet, reason: str, *, children: bool = True, spare: str | None = None
) -> list[Ended]:
    """Cancel the run if it is one of `which`, and its unfinished descendants; return those that were cancelled.

    In the caller's transaction, behind which they are to be told of (`tell_cancelled`). From the top down: who
    finishes meanwhile locks its parent first, too, and finds it cancelled or not. `spare` is a descendant that is
    left as it is, with those below it.
    """
    return through_deadlocks(alias, lambda: _cancel(alias, run_id, which, reason, children, spare))


def _cancel(alias: str, run_id: str, which: RunQuerySet, reason: str, children: bool, spare: str | None) -> list[Ended]:
    runs = WorkflowRun.objects.using(alias)
    facts = ("pk", "workflow", "attempt", "worker")
    with compat.write_transaction(alias):
        cancelled = [Ended(*row) for row in which.filter(pk=run_id).values_list(*facts)]
        if not cancelled or not end(alias, run_id, which, RunStatus.CANCELLED, cancel_reason=reason):
            return []
        level = [run_id]
        while children and level:
            below = runs.filter(parent__in=level, status__in=UNFINISHED).exclude(pk=spare).order_by("pk")
            rows = [Ended(*row) for row in compat.locked(below).values_list(*facts)]
            ids = [row.run_id for row in rows]
            # One that has ended may have left children of its own.
            over = runs.filter(parent__in=level, status__in=FINISHED).filter(Exists(runs.filter(parent=OuterRef("pk"))))
            level = [*ids, *over.order_by().values_list("pk", flat=True)]
            runs.filter(pk__in=ids).move(
                RunStatus.CANCELLED,
                cancel_reason=reason,
                finished_at=DatabaseNow(),
                wake_at=None,
                waiting_for="",
                awaited=False,
            )
            wake_who_awaits(alias, ids)
            cancelled += rows
    return cancelled


def through_deadlocks(alias: str, act: Callable[[], T]) -> T:
    """Act again if the database ends our transaction for another's sake. In the caller's, only the caller can."""
    for pause in (0.01, 0.05, 0.2, 0.5, 1.0):
        try:
            return act()
        except Error as error:
            if connections[alias].in_atomic_block or compat.trouble(error, broken=False) is not Trouble.AGAIN:
                raise
        time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 (not a secret)
    return act()


def tell_cancelled(alias: str, cancelled: list[Ended]) -> None:
    """Let what this process executes of them go no further, and send the signals; behind the commit."""
    for run in cancelled:
        end_here(run.run_id, Cancelled(f"run {run.run_id} was cancelled"))
        announce_end(alias, run.run_id, run.workflow, RunStatus.CANCELLED, run.worker, run.attempt)


def announce_end(alias: str, run_id: str, workflow: str, status: RunStatus, worker: str, attempt: int) -> None:
    signals.run_finished.send_robust(
        WorkflowRun,
        run_id=run_id,
        workflow=workflow,
        database=alias,
        worker=worker,
        status=status,
        attempt=attempt,
    )
