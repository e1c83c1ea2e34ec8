"""An async body all of whose calls have to wait: its run is parked for the first of them."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial

from django.db import IntegrityError

from django_durable import compat
from django_durable.engine import checkpoints, endings
from django_durable.engine.asynchronous.pending import PendingCall, PendingCalls
from django_durable.engine.calls import LOOK_AGAIN, Awaited, Slot, at_work_for
from django_durable.engine.context import RunContext, inside
from django_durable.exceptions import Parked
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.states import RunStatus


def park(pending: PendingCalls, blocked: list[PendingCall]) -> list[PendingCall]:
    """Park the run until the first of these calls is due; return those that have their outcome already, if any.

    Then the run is not parked.
    """
    context = pending.context
    with inside(context, busy=True), at_work_for(Slot(context, 0, pending.stamp)):
        context.guard()
        checkpoints.check_not_in_transaction(context, blocked[0].name)
        found = checkpoints.persist(context, partial(_park_once, context, blocked))
        if found is None:
            raise checkpoints.lost(context)
        for call, row in found:
            row._state.adding = False
            context.recorded[call.position] = row
            checkpoints.announce(context, row)
        if not found:
            context.end(Parked(f"run {context.run_id} waits"))
    return [call for call, _ in found]


def _park_once(context: RunContext, blocked: list[PendingCall]) -> list[tuple[PendingCall, StepCheckpoint]] | None:
    waits = [(call, call.blocked.wait) for call in blocked if call.blocked and call.blocked.wait]
    found: list[tuple[PendingCall, StepCheckpoint]] = []
    whom: list[Awaited] = []
    try:
        with compat.write_transaction(context.alias):
            for call, wait in waits:
                looked = wait.call.look_under_locks(wait.look, wait.whom)
                if looked is None:
                    return None
                outcome, awaited = looked
                whom.append(awaited)
                if outcome is not None:
                    found.append((call, wait.call.settle(outcome)))
            if found:
                return found
            key, wake_at = _wake_up(context, blocked, whom)
            held = WorkflowRun.objects.using(context.alias).held(context.run_id, context.attempt)
            if not held.move(RunStatus.WAITING, wake_at=wake_at, waiting_for=key, worker=""):
                return None
            for (call, wait), awaited in zip(waits, whom, strict=True):
                wait.call.begin_to_wait(awaited, call.blocked.until if call.blocked else None, wait.note)
    except IntegrityError:
        # Only the answer to our own COMMIT was lost.
        stand = [(call, checkpoints.found(context, call.position)) for call, _ in waits]
        found = [(call, row) for call, row in stand if row is not None]
        if not found:
            raise
    return found


def _wake_up(context: RunContext, calls: list[PendingCall], whom: list[Awaited]) -> tuple[str, datetime | None]:
    """The key under which the run is woken, and the time at which it wakes by itself.

    A run has one key. Children of its own share one; of other things the first one's tells, and the run looks
    after the others by itself.
    """
    blocked = [call.blocked for call in calls if call.blocked is not None]
    timers = [(each.until, each.key) for each in blocked if each.until is not None]
    wake_at, key = min(timers, default=(None, ""))
    if whom:
        key = whom[0].key
    look_again = any(awaited.look_again for awaited in whom)
    if len({awaited.key for awaited in whom}) > 1:
        runs = {run for awaited in whom for run in awaited.runs}
        ends = all(awaited.key in (endings.ANY_CHILD, *map(endings.run_key, awaited.runs)) for awaited in whom)
        children = WorkflowRun.objects.using(context.alias).filter(pk__in=runs, parent=context.run_id)
        if ends and children.count() == len(runs):
            key = endings.ANY_CHILD
        else:
            look_again = True
    if look_again:
        soon = context.lease.clock.now() + timedelta(seconds=LOOK_AGAIN)
        wake_at = soon if wake_at is None else min(soon, wake_at)
    return key, wake_at
