"""Who executes what next: the due runs are claimed, and what became due or overdue is noticed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

from django.db import connections
from django.db.models import F
from django.db.models.functions import Coalesce

from django_durable import compat, signals
from django_durable.clock import DatabaseNow
from django_durable.conf import options
from django_durable.engine import registry
from django_durable.engine.leases import Lease
from django_durable.engine.registry import Definition
from django_durable.exceptions import RunDead
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.states import UNFINISHED, RunStatus

# What a sweep moves at a time.
BATCH = 500

# A run that was under way in so many crashes may be their cause. A worker executes it with nothing beside it, so that
# it takes no neighbours along, and none of them is blamed for its crashes.
SUSPECT_RECOVERIES = 2
# A worker that is never idle stops taking others when one has waited so long. Seconds.
SUSPECT_PATIENCE = 30.0


class Claim(NamedTuple):
    """A run that is ours to execute, with all that was recorded of it."""

    run: WorkflowRun
    definition: Definition
    recorded: dict[int, StepCheckpoint]


def claim(
    lease: Lease, limit: int, *, queues: Iterable[str] = (), run_id: str | None = None, busy: bool = False
) -> list[Claim]:
    """Take up to `limit` due runs, by priority and then age, and return them with their checkpoints.

    Of all queues if none is named. Workflows that this process does not know are left to one that does. A `busy`
    process executes others already: it takes no suspect.
    """
    chosen = {"workflow": registry.names()}
    if queues := list(queues):
        chosen["queue"] = queues
    if run_id is not None:
        chosen["id"] = [run_id]
    while True:
        runs = _take(lease, chosen, limit, busy=busy)
        claimed = _with_history(lease, runs)
        # Where all were set aside, there may be others behind them.
        if claimed or not runs:
            return claimed


def _take(lease: Lease, chosen: dict[str, list[str]], limit: int, *, busy: bool) -> list[WorkflowRun]:
    """Make due runs RUNNING and ours: those whose columns have one of the chosen values."""
    due = WorkflowRun.objects.using(lease.alias).pending()
    due = due.filter(**{f"{column}__in": values for column, values in chosen.items()})
    connection, alone = connections[lease.alias], "id" in chosen
    locking = connection.features.has_select_for_update_skip_locked
    # Where a claim keeps all other writers out, look before.
    if not chosen["workflow"] or (not locking and not due.exists()):
        return []
    if not alone and compat.can_return_from_update(connection):
        runs = _take_at_once(lease, chosen, limit)
        if runs or not due.filter(recoveries__gte=SUSPECT_RECOVERIES).exists():
            return runs
    with compat.write_transaction(lease.alias):
        runs = list(due.select_for_update(skip_locked=locking).order_by("-priority", "run_after", "pk")[:limit])
        runs = runs if alone else _apart(runs, lease, busy)
        if not runs:
            return []
        started = lease.clock.now()
        taken: dict[str, Any] = {
            "worker": lease.id,
            "version": options().VERSION,
            "attempt": F("attempt") + 1,
            "started_at": Coalesce("started_at", started),
        }
        groups: dict[float | None, list[WorkflowRun]] = defaultdict(list)
        for run in runs:
            groups[run.timeout if run.deadline is None else None].append(run)
        for timeout, same in groups.items():
            deadline: dict[str, Any] = {} if timeout is None else {"deadline": started + timedelta(seconds=timeout)}
            WorkflowRun.objects.using(lease.alias).filter(pk__in=[run.pk for run in same]).move(
                RunStatus.RUNNING, **taken, **deadline
            )
            for run in same:
                run.deadline = deadline.get("deadline", run.deadline)
    for run in runs:
        run.status, run.worker, run.version = RunStatus.RUNNING, lease.id, options().VERSION
        run.attempt += 1
        run.started_at = run.started_at or started
    return runs


def _take_at_once(lease: Lease, chosen: dict[str, list[str]], limit: int) -> list[WorkflowRun]:
    """Take the first of the due runs, or none if there is a suspect among them, whom others are to be kept apart from.

    One statement, written by hand: an idle worker's latency consists of it.
    """
    connection = connections[lease.alias]
    quote, columns = connection.ops.quote_name, [str(field.column) for field in WorkflowRun._meta.concrete_fields]
    lock = "FOR UPDATE SKIP LOCKED" if connection.features.has_select_for_update_skip_locked else ""
    where = "".join(f" AND {quote(column)} IN ({', '.join(['%s'] * len(values))})" for column, values in chosen.items())
    name = {column: quote(column) for column in columns}
    table, pending = quote(WorkflowRun._meta.db_table), f"{name['status']} = '{RunStatus.PENDING}'"
    # MATERIALIZED: or a planner may choose to evaluate the SELECT again and again, and claim more than the limit.
    statement = (
        f"WITH due AS MATERIALIZED (SELECT {name['id']}, {name['recoveries']} FROM {table} "  # noqa: S608 (our names only)
        f"WHERE {pending}{where} ORDER BY {name['priority']} DESC, {name['run_after']}, {name['id']} LIMIT %s {lock}) "
        f"UPDATE {table} SET {name['status']} = '{RunStatus.RUNNING}', {name['attempt']} = {name['attempt']} + 1, "
        f"{name['worker']} = %s, {name['version']} = %s, {name['started_at']} = COALESCE({name['started_at']}, %s) "
        f"WHERE {pending} AND {name['id']} IN (SELECT {name['id']} FROM due) "
        f"AND NOT EXISTS (SELECT 1 FROM due WHERE {name['recoveries']} >= {SUSPECT_RECOVERIES}) "
        f"RETURNING {', '.join(name.values())}"
    )
    started = lease.clock.now()
    moment = connection.ops.adapt_datetimefield_value(started)
    values = [value for values in chosen.values() for value in values]
    found = WorkflowRun.objects.using(lease.alias).raw(statement, [*values, limit, lease.id, options().VERSION, moment])
    runs = sorted(found, key=lambda run: (-run.priority, run.run_after, run.pk))
    for taken in runs:
        if taken.timeout is not None and taken.deadline is None:
            # If this process dies before, the next claim sets it.
            taken.deadline = started + timedelta(seconds=taken.timeout)
            held = WorkflowRun.objects.using(lease.alias).held(taken.pk, taken.attempt)
            held.update(deadline=taken.deadline)
    return runs


def is_suspect(run: WorkflowRun) -> bool:
    return run.recoveries >= SUSPECT_RECOVERIES


def _apart(runs: list[WorkflowRun], lease: Lease, busy: bool) -> list[WorkflowRun]:
    """Of the due runs, those that may be executed together: one suspect, or none."""
    suspects = [run for run in runs if is_suspect(run)]
    if not suspects:
        return runs
    if not busy:
        return suspects[:1]
    waited = lease.clock.now() - min(run.run_after for run in suspects)
    return [] if waited.total_seconds() > SUSPECT_PATIENCE else [run for run in runs if not is_suspect(run)]


def _with_history(lease: Lease, runs: list[WorkflowRun]) -> list[Claim]:
    # A run that was never executed has no history to ask for.
    executed = [run.pk for run in runs if run.attempt > 1]
    history: dict[str, dict[int, StepCheckpoint]] = defaultdict(dict)
    if executed:
        for step in StepCheckpoint.objects.using(lease.alias).filter(run__in=executed):
            history[step.run_id][step.position] = step
    claims = []
    for run in runs:
        definition = registry.get(run.workflow)
        if run.recoveries > definition.max_recoveries:
            set_aside(lease, run, RunDead.crashed(run.pk, run.recoveries, definition.max_recoveries))
        else:
            claims.append(Claim(run, definition, history[run.pk]))
    return claims


def set_aside(lease: Lease, run: WorkflowRun, reason: Exception) -> bool:
    """Make a run that we hold DEAD, with the reason for a person to read. False: it was not ours any more."""
    from django_durable.serialization import describe_exception, dump_exception

    moved = (
        WorkflowRun.objects.using(lease.alias)
        .held(run.pk, run.attempt)
        .move(
            RunStatus.DEAD,
            error=describe_exception(reason),
            exception=dump_exception(reason),
            finished_at=DatabaseNow(),
        )
    )
    if moved:
        announce_end(run, lease.alias, RunStatus.DEAD, lease.id)
    return bool(moved)


def announce_end(run: WorkflowRun, alias: str, status: RunStatus, worker: str) -> None:
    signals.run_finished.send_robust(
        WorkflowRun,
        run_id=run.pk,
        workflow=run.workflow,
        database=alias,
        worker=worker,
        status=status,
        attempt=run.attempt,
    )


def wake_due(alias: str) -> int:
    """Make WAITING runs whose time has come PENDING. They queue up behind what was due before them."""
    waiting = WorkflowRun.objects.using(alias).waiting()
    ids = list(waiting.filter(wake_at__lte=DatabaseNow()).order_by("wake_at").values_list("pk", flat=True)[:BATCH])
    if not ids:
        return 0
    woken = waiting.filter(pk__in=ids, wake_at__lte=DatabaseNow())
    return woken.move(RunStatus.PENDING, run_after=F("wake_at"), wake_at=None, waiting_for="")


def cancel_overdue(alias: str) -> int:
    """Cancel unfinished runs whose deadline has passed."""
    overdue = WorkflowRun.objects.using(alias).filter(
        status__in=UNFINISHED, finished_at__isnull=True, deadline__lte=DatabaseNow()
    )
    runs = list(overdue.only("pk", "workflow", "attempt", "worker")[:BATCH])
    cancelled = 0
    for run in runs:
        if overdue.filter(pk=run.pk).move(
            RunStatus.CANCELLED, cancel_reason="timeout", finished_at=DatabaseNow(), wake_at=None, waiting_for=""
        ):
            cancelled += 1
            announce_end(run, alias, RunStatus.CANCELLED, run.worker)
    return cancelled


def unknown_workflows(alias: str, queues: Iterable[str] = ()) -> set[str]:
    """Names among the first due runs that this process has no code for: those pass over to the front and stay."""
    due = WorkflowRun.objects.using(alias).pending()
    if queues := list(queues):
        due = due.filter(queue__in=queues)
    first = due.order_by("-priority", "run_after", "pk").values_list("workflow", flat=True)[:BATCH]
    return {name for name in first if registry.find(name) is None}
