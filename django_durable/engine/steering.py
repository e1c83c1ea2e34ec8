"""The verbs that steer a stored run: cancel, pause, resume, fork, restart. Nothing else moves a run from outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from hashlib import sha256
from typing import Any

from django.db import connections, transaction
from django.db.models import Case, F, Q, QuerySet, When

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.engine import endings, payloads, starting
from django_durable.engine.bell import ring_after_commit
from django_durable.engine.context import current_step
from django_durable.engine.ids import new_id
from django_durable.engine.leases import end_here
from django_durable.exceptions import InsideTransaction, Parked, RunNotFound
from django_durable.models import Event, Message, StepCheckpoint, StreamItem, WorkflowRun
from django_durable.querysets import RunQuerySet
from django_durable.serialization import clean_text
from django_durable.states import OPEN_STEPS, RESUMABLE, UNFINISHED, RunStatus, StepKind, StepStatus

# What a paused run waits for.
PAUSED = "resume"

# What a new run takes over from the one that it is forked from or goes on for.
INHERITED = (
    "workflow",
    "queue",
    "priority",
    "partition_key",
    "attributes",
    "related_model",
    "related_id",
    "timeout",
)


def latest(alias: str, run_id: str) -> str:
    """The run that goes on for this one: itself, or the last in its line of continue_as_new()."""
    connection = connections[alias]
    quote = connection.ops.quote_name
    table, pk, following = (quote(name) for name in (WorkflowRun._meta.db_table, "id", "continued_as"))
    # One statement, however long the line is.
    statement = (
        f"WITH RECURSIVE line(run, next) AS (SELECT {pk}, {following} FROM {table} WHERE {pk} = %s UNION ALL "  # noqa: S608 (our names only)
        f"SELECT {table}.{pk}, {table}.{following} FROM {table} JOIN line ON {table}.{pk} = line.next) "
        "SELECT run FROM line WHERE next = ''"
    )
    with connection.cursor() as cursor:
        cursor.execute(statement, [run_id])
        row = cursor.fetchone()
    return run_id if row is None else str(row[0])


def cancel(alias: str, run_id: str, reason: str = "", *, children: bool = True) -> bool:
    """Cancel an unfinished run, in the caller's transaction; False: it had ended, or there is none.

    An atomic step's own run is cancelled behind the step, also as a descendant of another: before that, in the step's
    transaction, the fence would refuse its checkpoint.
    """
    if not isinstance(reason, str):
        raise TypeError(f"cancel() takes its reason as text, found {type(reason).__name__}: {reason!r}.")
    run_id, reason = latest(alias, run_id), clean_text(reason)
    step = current_step()
    if step is not None and (not step.atomic or step.run.alias != alias):
        step = None
    if step is not None and step.run.run_id == run_id:
        step.cancelling = reason
        return True
    unfinished = WorkflowRun.objects.using(alias).filter(status__in=UNFINISHED)
    spare = None if step is None else step.run.run_id

    def act() -> tuple[str, list[endings.Ended]]:
        # The line's end is looked for where nothing is added to it meanwhile, if the database has one writer.
        with compat.write_transaction(alias):
            last = latest(alias, run_id)
            return last, endings.cancel(alias, last, unfinished, reason, children=children, spare=spare)

    last, cancelled = endings.through_deadlocks(alias, act)
    while not cancelled and latest(alias, last) != last:
        # It went on as another between the two looks.
        last, cancelled = endings.through_deadlocks(alias, act)
    if step is not None and children and step.run.run.parent_id in {run.run_id for run in cancelled}:
        step.cancelling = reason
    if cancelled:
        transaction.on_commit(lambda: endings.tell_cancelled(alias, cancelled), using=alias, robust=True)
        # Whoever executes it is to look.
        ring_after_commit(alias)
    return bool(cancelled)


def pause(alias: str, run_id: str) -> bool:
    """Keep an unfinished run from going on until resume(), in the caller's transaction; False: it had ended.

    What an atomic step is doing meanwhile is undone, and done again behind resume(); an outside call is recorded.
    """
    run_id = latest(alias, run_id)
    step = current_step()
    if step is not None and step.atomic and (step.run.run_id, step.run.alias) == (run_id, alias):
        raise InsideTransaction.pausing(step.name, run_id)
    last, paused = endings.through_deadlocks(alias, lambda: _hold_back(alias, run_id))
    while not paused and latest(alias, last) != last:
        last, paused = endings.through_deadlocks(alias, lambda: _hold_back(alias, run_id))
    if paused:
        reason = Parked(f"run {last} was paused")
        transaction.on_commit(lambda: end_here(last, reason), using=alias, robust=True)
        # Whoever executes it is to look.
        ring_after_commit(alias)
    return bool(paused)


def _hold_back(alias: str, run_id: str) -> tuple[str, bool]:
    with compat.write_transaction(alias):
        run_id = latest(alias, run_id)
        run = WorkflowRun.objects.using(alias).filter(pk=run_id)
        stopped: dict[str, Any] = {"waiting_for": PAUSED, "wake_at": None, "worker": ""}
        paused = run.move(RunStatus.WAITING, **stopped)
        return run_id, bool(paused or run.waiting().exclude(waiting_for=PAUSED).update(**stopped))


def resume(alias: str, run_id: str) -> bool:
    """Make a paused, FAILED, CANCELLED or DEAD run due again: it goes on from its last completed step.

    With it the child whose error ended it, and all that were cancelled with it. False: it is none of these.
    """
    run_id = latest(alias, run_id)

    def act() -> bool:
        # On SQLite one that reads before it writes is refused at once when another has written meanwhile.
        with compat.write_transaction(alias):
            return _unpause(WorkflowRun.objects.using(alias).filter(pk=run_id)) or _revive(alias, run_id, RESUMABLE)

    return endings.through_deadlocks(alias, act)


def _revive(alias: str, run_id: str, ended: Collection[RunStatus]) -> bool:
    """Let the run go on if it ended so, with those of its children that ended so and took it along."""
    runs = WorkflowRun.objects.using(alias)
    run = runs.filter(pk=run_id).first()
    if run is None or not _make_due(runs.filter(pk=run_id), ended):
        return False
    if run.status == RunStatus.FAILED and run.failed_step is not None and run.failed_horizon is not None:
        rewind(alias, run_id, (run.failed_step, run.failed_horizon), children=ended)
    level = [run_id] if run.status == RunStatus.CANCELLED else []
    while level:
        # From the top down in one transaction, or each for itself because their common time was over. Who was
        # cancelled before that stays so.
        with_it = Q(finished_at__gte=run.finished_at)
        if run.deadline is not None:
            with_it |= Q(deadline=run.deadline)
        below = runs.filter(with_it, parent__in=level, cancel_reason=run.cancel_reason, status=RunStatus.CANCELLED)
        level = list(below.order_by("pk").values_list("pk", flat=True))
        _make_due(runs.filter(pk__in=level), ended)
    ring_after_commit(alias)
    return True


def _make_due(runs: RunQuerySet, ended: Collection[RunStatus]) -> int:
    return runs.move(
        RunStatus.PENDING,
        ended,
        failures=0,
        recoveries=0,
        error="",
        exception="",
        cancel_reason="",
        worker="",
        finished_at=None,
        failed_step=None,
        failed_horizon=None,
        run_after=DatabaseNow(),
        # The claim sets a missing one, from the run's timeout.
        deadline=Case(When(Q(deadline__lte=DatabaseNow()), then=None), default=F("deadline")),
    )


def _unpause(runs: RunQuerySet) -> bool:
    paused = runs.waiting().filter(waiting_for=PAUSED)
    # One that was not due when it was paused still waits for its time.
    if paused.filter(attempt=0, run_after__gt=DatabaseNow()).update(waiting_for="start", wake_at=F("run_after")):
        return True
    return endings.wake(paused) > 0


def rewind(
    alias: str,
    run_id: str,
    origin: tuple[int, int] | None,
    *,
    children: Collection[RunStatus] = frozenset({RunStatus.FAILED}),
) -> None:
    """Let a retry execute the failed step anew, and forget the steps that followed from its error.

    Steps whose positions were given before the workflow saw the error (parallel ones) keep their outcomes; those
    given later belong to a course that the retry may not take. A child whose error it was goes on, if it ended as
    one of `children`: what a person has cancelled, or is to look at, only a person lets go on. Call it in the
    transaction that makes the run due.
    """
    if origin is None:
        return
    position, horizon = origin
    steps = StepCheckpoint.objects.using(alias).filter(run=run_id)
    later = steps.filter(position__gt=horizon)
    for other in set(later.exclude(database="").values_list("database", flat=True)):
        StepCheckpoint.objects.using(other).filter(run=run_id, position__gt=horizon).delete()
    later.delete()
    Message.objects.using(alias).filter(run=run_id, consumed_by__gt=horizon).update(consumed_at=None, consumed_by=None)
    # A stream that the forgotten course has closed is open again.
    StreamItem.objects.using(alias).filter(run=run_id, step__gt=horizon, value="").delete()
    failed = steps.filter(position=position, status=StepStatus.FAILED)
    for child in failed.filter(kind__in=(StepKind.CHILD, StepKind.WAIT)).exclude(output=""):
        # Its error was the child's: the child goes on from where it failed, and the parent waits for it again.
        child_id = payloads.load(child.output, f"Run {run_id}, step {position} ({child.name})")
        if WorkflowRun.objects.using(alias).filter(pk=child_id, parent=run_id).exists():
            _revive(alias, latest(alias, child_id), children)
    failed.update(status=StepStatus.RETRYING, attempts=0, exception="")


def fork(alias: str, run_id: str, from_step: int) -> str:
    """Store a new run that goes on from another's step, in the caller's transaction; return its id.

    It has the other's input, and its outcomes below that position. The other stays as it is.
    """
    if isinstance(from_step, bool) or not isinstance(from_step, int):
        raise TypeError(f"from_step takes a step's position (a whole number), found {from_step!r}.")
    original = WorkflowRun.objects.using(alias).filter(pk=run_id).first()
    if original is None:
        raise RunNotFound(run_id, alias)
    steps = StepCheckpoint.objects.using(alias).filter(run=run_id).exclude(status__in=OPEN_STEPS)
    last = steps.order_by("-position").values_list("position", flat=True).first() or 0
    if not 1 <= from_step <= last + 1:
        raise ValueError(
            f"from_step takes a position from 1 to {last + 1}, found {from_step}: run {run_id} has {last} steps."
        )
    with compat.write_transaction(alias):
        made = _like(original, new_id(), original.input)
        made.forked_from_id = original.pk
        starting.insert(alias, made, idempotent=False)
        kept = list(steps.filter(position__lt=from_step))
        for step in kept:
            step.run_id, step.attempt = made.pk, 0
        StepCheckpoint.objects.using(alias).bulk_create(kept, batch_size=500)
        items = list(StreamItem.objects.using(alias).filter(run=run_id, step__lt=from_step).order_by("key", "position"))
        written: Counter[str] = Counter()
        for item in items:
            # Anew from 1: parallel steps, of which one is not kept, may have written between each other.
            written[item.key] += 1
            item.pk, item.run_id, item.position = None, made.pk, written[item.key]
        StreamItem.objects.using(alias).bulk_create(items, batch_size=500)
        # An older value is not kept: what the other published later, the fork publishes when it gets there.
        begun = StepCheckpoint.objects.using(alias).filter(run=run_id, position__gte=from_step)
        since = begun.order_by("started_at").values_list("started_at", flat=True).first()
        events = Event.objects.using(alias).filter(run=run_id)
        _copy_events(events if since is None else events.filter(updated_at__lte=since), made.pk)
    ring_after_commit(alias)
    return made.pk


def _copy_events(published: QuerySet[Event], to: str) -> None:
    events = list(published)
    for event in events:
        event.pk, event.run_id = None, to
    Event.objects.using(published.db).bulk_create(events)


def _like(original: WorkflowRun, run_id: str, text: str) -> WorkflowRun:
    """The unsaved row of a run that is due now, with this input, and in all else as the original was started."""
    taken_over = {name: getattr(original, name) for name in INHERITED}
    now: Any = DatabaseNow()
    return WorkflowRun(id=run_id, input=text, created_at=now, run_after=now, **taken_over)


def go_on_as_new(alias: str, run: WorkflowRun, text: str) -> str:
    """Store the run that goes on for this one with this input, and return its id; with this one's row locked."""
    first, _, number = run.pk.rpartition("~")
    before = (first, f"{first}~{int(number) - 1}") if number.isdecimal() else ()
    # A first id of the user's choice may end like those that a line gives.
    later = WorkflowRun.objects.using(alias).filter(pk__in=before, continued_as=run.pk).exists()
    made = _like(run, _next_in_line(run.pk if later else f"{run.pk}~1"), text)
    if run.parent_id is not None:
        made.parent_id = run.parent_id
        parent = WorkflowRun.objects.using(alias).filter(pk=run.parent_id)
        made.deadline = parent.values_list("deadline", flat=True).first()
    # The id may be taken: the user's own choice, or what is left of a line whose first run was pruned.
    while not starting.insert(alias, made, idempotent=True):
        made.pk = _next_in_line(made.pk)
    _hand_over(alias, run.pk, made.pk)
    return made.pk


def _next_in_line(run_id: str) -> str:
    """The id of the run that goes on for this one: the first's with ~2, ~3, ... behind it."""
    first, mark, number = run_id.rpartition("~")
    following = f"{first}~{int(number) + 1}" if mark and number.isdecimal() else f"{run_id}~2"
    # Its own hash stands for a first id that leaves no room.
    return following if len(following) <= 200 else f"{sha256(run_id.encode()).hexdigest()}~2"


def _hand_over(alias: str, run_id: str, to: str) -> None:
    """Give the run that goes on this one's unread messages, its events and children."""
    Message.objects.using(alias).filter(run=run_id, consumed_at__isnull=True).update(run=to)
    WorkflowRun.objects.using(alias).filter(parent=run_id, status__in=UNFINISHED).update(parent=to)
    _copy_events(Event.objects.using(alias).filter(run=run_id), to)
    # The first of the line, which is the one that others know, leads to the last at once, however long the line is.
    first = WorkflowRun.objects.using(alias).filter(pk=run_id.rpartition("~")[0], continued_as=run_id)
    first.update(continued_as=to)
    if WorkflowRun.objects.using(alias).filter(pk=run_id, awaited=True).exists():
        # Who waits for an event or the end of this one goes on waiting for the other's.
        endings.wake_who_awaits(alias, [run_id])
