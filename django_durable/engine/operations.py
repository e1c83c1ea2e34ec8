"""What is asked of runs from outside a workflow: start one, call one, look how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.db import Error, connections

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.compat import Trouble
from django_durable.engine import claims, payloads, registry, steering
from django_durable.engine.bell import ring_after_commit
from django_durable.engine.claims import Claim
from django_durable.engine.heartbeat import inline_lease
from django_durable.engine.leases import Lease, bury, recover
from django_durable.engine.replay import End, execute, failure_of
from django_durable.engine.starting import (
    StartOptions,
    check_same_workflow,
    database_of,
    hold,
    insert,
    new_run,
)
from django_durable.exceptions import InsideTransaction, NothingDue, RunCancelled, RunDead, RunNotFound
from django_durable.models import WorkflowRun
from django_durable.serialization import load_exception
from django_durable.states import UNFINISHED, RunStatus

# How often a direct call asks again whether its run was stored, when the connection was lost in between.
ANSWER_TRIES = 50

# A direct call leaves the run's children to the workers, if there are any. After so many looks, about a second, it
# executes them itself.
PATIENT_LOOKS = 12

# In a test, a call that has moved the clock so often in vain waits for what is not there: a run of another database.
TEST_LOOKS = 100


# -- Start ------------------------------------------------------------------------------------------------------


def start(definition: registry.Definition, given: StartOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Store a run for a worker, in the caller's transaction, with one INSERT; return its id."""
    alias = database_of(given.database)
    run = new_run(definition, given, args, kwargs)
    if not insert(alias, run, idempotent=given.run_id is not None):
        check_same_workflow(alias, run.pk, definition)
    ring_after_commit(alias)
    return run.pk


def call(definition: registry.Definition, given: StartOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the workflow here and now, durably; return its result or raise its error."""
    alias = database_of(given.database)
    if compat.in_users_transaction(connections[alias]):
        raise InsideTransaction(definition.name, alias)
    run = new_run(definition, given, args, kwargs)
    lease = inline_lease(alias)
    if run.status == RunStatus.PENDING:
        hold(run, lease)
    if insert_surely(lease, run, idempotent=given.run_id is not None):
        if run.status == RunStatus.RUNNING and (end := execute(Claim(run, definition, {}), lease)) is not None:
            return value_of(end)
    else:
        check_same_workflow(alias, run.pk, definition)
    return value_of(_finish_here(lease, run.pk))


def insert_surely(lease: Lease, run: WorkflowRun, *, idempotent: bool) -> bool:
    """`insert` of a run that this process is to execute: nobody else would, if only the answer were lost."""
    connection, lost = connections[lease.alias], False
    for _ in range(ANSWER_TRIES):
        connected = connection.connection is not None
        try:
            if insert(lease.alias, run, idempotent=idempotent or lost):
                return True
            ours = WorkflowRun.objects.using(lease.alias).held(run.pk, run.attempt).filter(worker=lease.id)
            return lost and ours.exists()
        except Error as error:
            away = not connected and connection.connection is None and not lost
            if away or connection.in_atomic_block or compat.trouble(error, broken=True) is not Trouble.LOST:
                raise
            failure, lost = error, True
            connection.close()
        lease.wait(0.2)
    raise failure


# -- Look -------------------------------------------------------------------------------------------------------


def fetch(alias: str, run_id: str) -> WorkflowRun:
    """Return the run; raise RunNotFound."""
    run: WorkflowRun | None = WorkflowRun.objects.using(alias).filter(pk=run_id).first()
    if run is None:
        raise RunNotFound(run_id, alias)
    return run


def look(alias: str, run_id: str) -> End | None:
    """How the run ended, or None if it has not."""
    fields = ("status", "output", "exception", "error", "cancel_reason", "continued_as")
    run = WorkflowRun.objects.using(alias).filter(pk=run_id).only(*fields).first()
    if run is None:
        raise RunNotFound(run_id, alias)
    if run.continued_as:
        return look(alias, steering.latest(alias, run.continued_as))
    match run.status:
        case RunStatus.SUCCEEDED:
            return End(value=payloads.load(run.output, f"The result of run {run_id}"))
        case RunStatus.FAILED:
            return End(error=failure_of(run_id, run.exception))
        case RunStatus.CANCELLED:
            return End(error=RunCancelled(run_id, run.cancel_reason))
        case RunStatus.DEAD:
            dead = RunDead(run_id, run.error)
            dead.__cause__ = load_exception(run.exception)
            return End(error=dead)
        case _:
            return None


def value_of(end: End) -> Any:
    """Return the value that the run ended with, or raise its error."""
    if end.error is not None:
        raise end.error
    return end.value


def pauses() -> Iterator[float]:
    """Seconds between two looks at a run that somebody else executes: short ones first, then four a second."""
    pause = 0.01
    while True:
        yield pause
        pause = min(0.25, pause * 1.3)


def _finish_here(lease: Lease, run_id: str) -> End:
    """Wait for a run's end, executing it here whenever it is due and nobody else does: there may be no worker."""
    idle = 0
    for count, pause in enumerate(pauses()):
        if (end := look(lease.alias, run_id)) is not None:
            return end
        run_id = steering.latest(lease.alias, run_id)
        if count % 4 == 0:
            bury(lease.alias)
            recover(lease.alias, spread=lease.stored)
            claims.cancel_overdue(lease.alias)
        claims.wake_due(lease.alias)
        lease = lease if lease.valid() else inline_lease(lease.alias)
        claimed = claims.claim(lease, 1, run_id=run_id)
        if not claimed and (count >= PATIENT_LOOKS or not lease.stored):
            claimed = claim_awaited(lease, run_id)
        for claim in claimed:
            if (end := execute(claim, lease)) is not None and claim.run.pk == run_id:
                return end
        if claimed:
            idle = 0
        elif lease.stored:
            lease.wait(pause)
        else:
            idle += 1
            lease.wait(seconds_until_due(lease.alias, run_id, patient=idle < TEST_LOOKS))
    raise AssertionError("unreachable: pauses() has no end")


def claim_awaited(lease: Lease, run_id: str) -> list[Claim]:
    """Take a due descendant of the run, which it may wait for; in a test, where nobody else would, any due run."""
    if not lease.stored:
        return claims.claim(lease, 1)
    runs, level = WorkflowRun.objects.using(lease.alias), [run_id]
    while level:
        children = runs.filter(parent__in=level, status__in=UNFINISHED)
        for due in children.filter(status=RunStatus.PENDING).values_list("pk", flat=True)[:1]:
            return claims.claim(lease, 1, run_id=due)
        level = list(children.values_list("pk", flat=True))
    return []


def seconds_until_due(alias: str, run_id: str, *, patient: bool = True) -> float:
    """In a test, where waiting moves the clock: the seconds until anything is due."""
    runs = WorkflowRun.objects.using(alias)
    timers = runs.waiting().filter(wake_at__isnull=False).order_by("wake_at")
    for wake_at, now in timers.values_list("wake_at", DatabaseNow())[: int(patient)]:
        return max(0.001, float((wake_at - now).total_seconds()))
    raise NothingDue(run_id, str(runs.filter(pk=run_id).values_list("waiting_for", flat=True).first()))
