"""Who executes what next: the due runs are claimed, and what became due or overdue is noticed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from django.db import connections
from django.db.models import F
from django.db.models.functions import Coalesce

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.conf import options
from django_durable.engine import endings, registry
from django_durable.engine.leases import Lease
from django_durable.engine.registry import Definition
from django_durable.exceptions import RunDead
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.serialization import describe_exception, dump_exception
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
        taking = compat.claim_lock(connection)
        runs = list(due.select_for_update(**taking).order_by("-priority", "run_after", "pk")[:limit])
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
        groups: dict[datetime | None, list[WorkflowRun]] = defaultdict(list)
        for run in runs:
            groups[_new_deadline(run, started)].append(run)
        for deadline, same in groups.items():
            changes = taken if deadline is None else {**taken, "deadline": deadline}
            WorkflowRun.objects.using(lease.alias).filter(pk__in=[run.pk for run in same]).move(
                RunStatus.RUNNING, **changes
            )
            for run in same:
                run.deadline = deadline or run.deadline
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
    lock = connection.ops.for_update_sql(**taking) if (taking := compat.claim_lock(connection)) else ""
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
        if (deadline := _new_deadline(taken, started)) is not None:
            # If this process dies before, the next claim sets it.
            taken.deadline = deadline
            held = WorkflowRun.objects.using(lease.alias).held(taken.pk, taken.attempt)
            held.update(deadline=taken.deadline)
    return runs


def _new_deadline(run: WorkflowRun, started: datetime) -> datetime | None:
    """The time limit that begins with this execution, or None. A child may have its parent's already."""
    if run.timeout is None or (run.deadline is not None and run.started_at is not None and run.started_at < started):
        return None
    own = started + timedelta(seconds=run.timeout)
    return own if run.deadline is None or own < run.deadline else None


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
    # A run that was never executed has no history to ask for, unless it has another's.
    executed = [run.pk for run in runs if run.attempt > 1 or run.forked_from_id is not None]
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
    held = WorkflowRun.objects.using(lease.alias).held(run.pk, run.attempt)
    error, exception = describe_exception(reason), dump_exception(reason)
    if not endings.end(lease.alias, run.pk, held, RunStatus.DEAD, error=error, exception=exception):
        return False
    endings.announce_end(lease.alias, run.pk, run.workflow, RunStatus.DEAD, lease.id, run.attempt)
    return True


def wake_due(alias: str) -> int:
    """Make WAITING runs whose time has come PENDING. They queue up behind what was due before them."""
    waiting = WorkflowRun.objects.using(alias).waiting()
    ids = list(waiting.filter(wake_at__lte=DatabaseNow()).order_by("wake_at").values_list("pk", flat=True)[:BATCH])
    if not ids:
        return 0
    woken = waiting.filter(pk__in=ids, wake_at__lte=DatabaseNow())
    return woken.move(RunStatus.PENDING, run_after=F("wake_at"), wake_at=None, waiting_for="")


def cancel_overdue(alias: str) -> int:
    """Cancel unfinished runs whose deadline has passed, with their children; return how many."""
    overdue = WorkflowRun.objects.using(alias).filter(
        status__in=UNFINISHED, finished_at__isnull=True, deadline__lte=DatabaseNow()
    )
    # A parent before the children that have its deadline: then the whole tree is cancelled in one go.
    ids = list(overdue.order_by("deadline", "created_at").values_list("pk", flat=True)[:BATCH])
    count = 0
    for run_id in ids:
        cancelled = endings.cancel(alias, run_id, overdue, "timeout")
        endings.tell_cancelled(alias, cancelled)
        count += len(cancelled)
    return count


def unknown_workflows(alias: str, queues: Iterable[str] = ()) -> set[str]:
    """Names among the first due runs that this process has no code for: those pass over to the front and stay."""
    due = WorkflowRun.objects.using(alias).pending()
    if queues := list(queues):
        due = due.filter(queue__in=queues)
    first = due.order_by("-priority", "run_after", "pk").values_list("workflow", flat=True)[:BATCH]
    return {name for name in first if registry.find(name) is None}
