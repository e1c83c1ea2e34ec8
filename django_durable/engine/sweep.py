"""The safety net under the wake-ups: runs that wait for what has happened already.

Whoever makes true what a run waits for wakes it in the same commit (`engine.endings`, `engine.mailbox`), so nothing
is ever found here. What is found is a defect: a hand-written UPDATE, a restored table, or one of ours. It is said.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from django.db.models import Exists, F, OuterRef, Q, QuerySet, Subquery, Value
from django.db.models.functions import Concat, Greatest, Length, Substr

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.engine import endings
from django_durable.engine.calls import LOOK_AGAIN
from django_durable.models import Event, Message, StepCheckpoint, WorkflowRun
from django_durable.querysets import RunQuerySet
from django_durable.states import FINISHED, RunStatus, StepKind, StepStatus

logger = logging.getLogger("django_durable.worker")

# What is woken at a time, so that no statement holds its locks for long; and how many are named in the log.
BATCH, NAMED = 500, 10

Ids = QuerySet[Any, str]


def wake_overlooked(alias: str) -> int:
    """Wake WAITING runs that nobody has told of their message, event or other run's end; return how many.

    Each look is one statement, and the rows it sees are of one moment: a wake-up that is under way is none of these.
    """
    woken = 0
    names: list[str] = []
    for overlooked in _overlooked(alias):
        while found := list(overlooked[:BATCH]):
            woken += _wake(alias, found)
            names += found[: NAMED - len(names)]
            if len(found) < BATCH:
                break
    if woken:
        logger.warning(
            "%s runs were WAITING for what had already happened, and were woken: %s. A wake-up was lost. Were rows "
            "changed by hand, or restored? If not, please report it.",
            woken,
            ", ".join(names),
        )
    return woken


def _wake(alias: str, found: list[str]) -> int:
    runs = WorkflowRun.objects.using(alias)
    with compat.write_transaction(alias):
        woken = endings.wake(runs.filter(pk__in=found))
        # The mark goes with the news of the end, as it would have: it is no second find.
        runs.finished().filter(parent__in=found, awaited=True).update(awaited=False)
    return woken


def _overlooked(alias: str) -> Iterator[Ids]:
    """The ids of those runs, by what they wait for."""
    waiting = WorkflowRun.objects.using(alias).waiting().order_by()
    yield _have_a_message(alias)
    # Those that look by themselves soon may wait for another database's run, of which this one has a namesake.
    asleep = waiting.filter(Q(wake_at=None) | Q(wake_at__gt=DatabaseNow(timedelta(seconds=LOOK_AGAIN))))
    ended = WorkflowRun.objects.using(alias).filter(status__in=FINISHED).order_by()
    yield _for_an_end(asleep, ended)
    yield _for_a_child(asleep, ended)
    yield _for_an_event(asleep, ended)


def _have_a_message(alias: str) -> Ids:
    # From the unread messages, which are fewer than the runs that wait: those have an index of their own.
    unread = Message.objects.using(alias).filter(consumed_at=None, run__status=RunStatus.WAITING).order_by()
    its_topic = unread.filter(run__waiting_for=Concat(Value(endings.message_key("")), F("topic")))
    return its_topic.values_list("run_id", flat=True).distinct()


def _for_an_end(waiting: RunQuerySet, ended: RunQuerySet) -> Ids:
    prefix = endings.run_key("")
    alone = waiting.filter(waiting_for__startswith=prefix).annotate(awaits=Substr("waiting_for", len(prefix) + 1))
    return alone.filter(Exists(ended.filter(pk=OuterRef("awaits")))).values_list("pk", flat=True)


def _for_a_child(waiting: RunQuerySet, ended: RunQuerySet) -> Ids:
    # Of all that it has started it waits for the marked ones, and who tells of a child's end takes the mark away.
    # One that goes on as another keeps it: the other has it too.
    child = ended.filter(parent=OuterRef("pk"), awaited=True, continued_as="")
    return waiting.filter(Exists(child), waiting_for=endings.ANY_CHILD).values_list("pk", flat=True)


def _for_an_event(waiting: RunQuerySet, ended: RunQuerySet) -> Ids:
    # Ids and keys may have colons of their own: how long the key is, the name of the waiting call tells.
    call, prefix = "get_event ", endings.event_key("", "")[:-1]
    calls = StepCheckpoint.objects.using(waiting.db).filter(
        run=OuterRef("pk"), status=StepStatus.WAITING, kind=StepKind.EVENT, name__startswith=call
    )
    named = waiting.filter(waiting_for__startswith=prefix).annotate(call=Subquery(calls.order_by().values("name")[:1]))
    length = Length("waiting_for") - Length("call") + len(call) - len(prefix) - 1
    split = named.annotate(
        key=Substr("call", len(call) + 1),
        awaits=Substr("waiting_for", len(prefix) + 1, Greatest(length, Value(0))),
    )
    published = Event.objects.using(waiting.db).filter(run=OuterRef("awaits"), key=OuterRef("key"))
    return split.filter(Exists(published) | Exists(ended.filter(pk=OuterRef("awaits")))).values_list("pk", flat=True)
