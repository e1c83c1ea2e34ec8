"""Messages and events: what is put into a run's mailbox, and what a run publishes.

Who writes locks the run's existence, and then wakes who is seen waiting; who begins to wait locks the run's row whole
before it looks (`Call.wait`). Whichever comes first, the other sees it: no wake-up is lost, and nobody else is held up.
"""

from __future__ import annotations

from django.db import connections
from django.db.models import Exists

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.engine import endings, steering
from django_durable.engine.checkpoints import Outcome
from django_durable.exceptions import RunNotFound
from django_durable.models import Event, Message, WorkflowRun
from django_durable.states import FINISHED, StepStatus


def put(alias: str, run_id: str, topic: str, body: str, key: str | None) -> None:
    """Store a message, in the caller's transaction, and wake the run if it waits for one; raise RunNotFound.

    A `key` that the run has had under this topic drops it.
    """
    with compat.write_transaction(alias):
        while True:
            following, waiting_for = _lock_existence(alias, run_id)
            if not following:
                break
            run_id = steering.latest(alias, following)
        message = Message(run_id=run_id, topic=topic, key=key, body=body)
        # An expression: the column is the database's clock, which the model's Python type does not say.
        message.__dict__["created_at"] = DatabaseNow()
        Message.objects.using(alias).bulk_create([message], ignore_conflicts=key is not None)
        if waiting_for != endings.message_key(topic):
            return
        waiting = WorkflowRun.objects.using(alias).filter(pk=run_id, waiting_for=waiting_for)
        if key is not None:
            # A repeat that was dropped is no news: each would cost a replay.
            unread = Message.objects.using(alias).filter(run=run_id, topic=topic, consumed_at__isnull=True)
            waiting = waiting.filter(Exists(unread))
        endings.wake(waiting)


def take(alias: str, run_id: str, topic: str, position: int) -> Outcome | None:
    """Take the oldest unread message for the step at this position; in a transaction that holds the run's row."""
    unread = Message.objects.using(alias).filter(run=run_id, topic=topic, consumed_at__isnull=True)
    message = unread.order_by("pk").first()
    if message is None:
        return None
    unread.filter(pk=message.pk).update(consumed_at=DatabaseNow(), consumed_by=position)
    return Outcome(StepStatus.SUCCEEDED, output=message.body)


def publish(alias: str, run_id: str, key: str, value: str) -> None:
    """Store an event's latest value, in the caller's transaction, and wake who waits for it."""
    event = Event(run_id=run_id, key=key, value=value)
    event.__dict__["updated_at"] = DatabaseNow()
    with compat.write_transaction(alias):
        compat.upsert(Event.objects.using(alias), event, unique=["run", "key"], update=["value", "updated_at"])
        _lock_existence(alias, run_id)
        endings.wake(WorkflowRun.objects.using(alias).filter(waiting_for=endings.event_key(run_id, key)))


def read(alias: str, run_id: str, key: str) -> str | None:
    """The event's stored value; None: it is not set."""
    return Event.objects.using(alias).filter(run=run_id, key=key).values_list("value", flat=True).first()


def may_come(alias: str, run_id: str) -> bool:
    """Whether the run may still publish something; raise RunNotFound."""
    status = WorkflowRun.objects.using(alias).filter(pk=run_id).values_list("status", flat=True).first()
    if status is None:
        raise RunNotFound(run_id, alias)
    return status not in FINISHED


def _lock_existence(alias: str, run_id: str) -> tuple[str, str]:
    """Keep the run from beginning to wait until our commit.

    Return the id of the one that goes on for it, if there is one, and what it waits for.
    """
    connection = connections[alias]
    quote = connection.ops.quote_name
    table, clause = quote(WorkflowRun._meta.db_table), compat.existence_lock(connection)
    columns = f"{quote('continued_as')}, {quote('waiting_for')}"
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {columns} FROM {table} WHERE {quote('id')} = %s {clause}", [run_id])  # noqa: S608
        row = cursor.fetchone()
    if row is None:
        raise RunNotFound(run_id, alias)
    return str(row[0]), str(row[1])
