"""`run_until_idle`: a worker's work, on the test's connection."""

from __future__ import annotations

from datetime import timedelta

from django_durable import clock
from django_durable.clock import DatabaseNow
from django_durable.conf import options
from django_durable.engine import claims, leases
from django_durable.engine.leases import Lease
from django_durable.engine.replay import execute
from django_durable.engine.starting import database_of
from django_durable.models import WorkflowRun


def run_until_idle(database: str | None = None) -> int:
    """Execute all runs that are due, on this connection, until none is; return the number of executions.

    Every queue, timers and retries that are due, deadlines, and runs whose executor has died (that counts as a
    recovery). Waits of up to `PARK_AFTER`, which a worker spends in its thread, move the durable clock instead;
    longer ones take `advance`. A run's own exception is stored in it, and not raised here.
    """
    alias = database_of(database)
    executions = 0
    # One for each execution, as a process may crash in any of them.
    while True:
        while leases.recover(alias, spread=False):
            pass
        claims.cancel_overdue(alias)
        claims.wake_due(alias)
        lease = Lease(alias, "worker", stored=False)
        claimed = claims.claim(lease, 1)
        if claimed:
            executions += 1
            execute(claimed[0], lease)
        elif not _let_a_short_wait_pass(alias) and not WorkflowRun.objects.using(alias).orphaned().exists():
            return executions


def _let_a_short_wait_pass(alias: str) -> bool:
    # A delay of just PARK_AFTER may have been drawn out by its 10 %.
    soon = DatabaseNow(timedelta(seconds=options().PARK_AFTER * 1.1))
    waiting = WorkflowRun.objects.using(alias).waiting().filter(wake_at__lte=soon).order_by("wake_at")
    found = waiting.values_list("wake_at", DatabaseNow()).first()
    if found is None:
        return False
    wake_at, now = found
    clock.move(max(timedelta(milliseconds=1), wake_at - now))
    return True
