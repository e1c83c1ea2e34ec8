"""Streams: the values that a run writes while it runs, at positions from 1 without gaps, and a reader's place in one.

A position is taken by INSERT ... ON CONFLICT DO NOTHING, which waits for whoever is about to commit the same one. So
a position is seen only behind all that are before it, and who reads on from the last one that it has seen misses none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from django.db import connections
from django.db.models import Max, Min
from django.db.models.constants import OnConflict

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.engine import checkpoints, steering
from django_durable.engine.context import RunContext
from django_durable.exceptions import RunNotFound
from django_durable.models import StreamItem, WorkflowRun
from django_durable.states import FINISHED

# Stored instead of a value: no value's text is empty.
CLOSED = ""
# The values that one look reads: a stream may be long, and a reader slow.
BATCH = 100

_COLUMNS = ("run_id", "key", "position", "value", "step", "created_at")


class _Refused(Exception):
    """The run has another executor: rolls the write back."""


def append(alias: str, run_id: str, key: str, value: str, step: int, *, reopens: bool = False) -> bool:
    """Store the stream's next value, in the caller's transaction; False: the stream is closed.

    `step`: the position of the step that writes. `reopens`: what an earlier try of this step has closed is open again.
    """
    items = StreamItem.objects.using(alias).filter(run=run_id, key=key)
    while True:
        position, last, by = items.order_by("-position").values_list("position", "value", "step").first() or (0, "?", 0)
        if last == CLOSED:
            if not reopens or by != step:
                return False
            items.filter(position=position).delete()
            position -= 1
        # Not taken: somebody has just committed this position. By ON CONFLICT and no savepoint: in a transaction that
        # is to be serializable the database asks to run it again, where an IntegrityError would look like a bug.
        if _insert(alias, run_id, key, position + 1, value, step):
            return True


def append_alone(context: RunContext, key: str, value: str, step: int, *, reopens: bool) -> bool:
    """`append` in a commit of its own, or in the transaction that the step's own code has opened.

    Raises LeaseLost if the run has another executor by now: its values and ours would be mixed.
    """
    connection = connections[context.alias]
    quote = connection.ops.quote_name
    fence = (
        f"SELECT 1 FROM {quote(WorkflowRun._meta.db_table)} "  # noqa: S608 (names of ours only)
        f"WHERE {quote('id')} = %s AND {quote('attempt')} = %s {compat.row_share_lock(connection)}"
    )
    try:
        with compat.write_transaction(context.alias):
            written = append(context.alias, context.run_id, key, value, step, reopens=reopens)
            # Last, as a step's checkpoint: the run's row is not locked while we wait for another writer.
            with connection.cursor() as cursor:
                cursor.execute(fence, [context.run_id, context.attempt])
                if cursor.fetchone() is None:
                    raise _Refused
        return written
    except _Refused:
        raise checkpoints.lost(context) from None


def _insert(alias: str, run_id: str, key: str, position: int, value: str, step: int) -> bool:
    connection = connections[alias]
    now, params = DatabaseNow().on(connection)
    statement = _insert_sql(alias).replace("<now>", now)
    with connection.cursor() as cursor:
        cursor.execute(statement, [run_id, key, position, value, step, *params])
        return bool(cursor.rowcount == 1)


@lru_cache
def _insert_sql(alias: str) -> str:
    operations, meta = connections[alias].ops, StreamItem._meta
    fields = [meta.get_field(name) for name in _COLUMNS]
    columns = ", ".join(operations.quote_name(name) for name in _COLUMNS)
    return (
        f"{operations.insert_statement(OnConflict.IGNORE)} {operations.quote_name(meta.db_table)} ({columns}) "
        f"VALUES (%s, %s, %s, %s, %s, <now>) "
        f"{operations.on_conflict_suffix_sql(fields, OnConflict.IGNORE, [], [])}"
    )


class Place:
    """How far a stream has been read. It goes on in the run that goes on for this one."""

    def __init__(self, alias: str, run_id: str, key: str, after: int = 0) -> None:
        self.alias = alias
        self.key = key
        # Counts on through the runs of a line.
        self.position = after
        # Nothing more will come: the stream is closed, or the run has ended.
        self.over = False
        self.closed = False
        self._run_id = run_id
        # The positions that the earlier runs of the line have used.
        self._before = 0

    def read(self) -> list[tuple[int, str]]:
        """The next values with their positions, and only then, if there are none, whether it is `over`.

        Raises RunNotFound.
        """
        while not self.over:
            runs = WorkflowRun.objects.using(self.alias).filter(pk=self._run_id)
            # Asked first: what is written between the two looks is seen.
            run = runs.values_list("status", "continued_as").first()
            if run is None:
                raise RunNotFound(self._run_id, self.alias)
            status, following = run
            items = StreamItem.objects.using(self.alias).filter(run=self._run_id, key=self.key)
            rows = items.filter(position__gt=self.position - self._before).order_by("position")
            found = []
            for position, value in rows.values_list("position", "value")[:BATCH]:
                self.position = self._before + position
                if value == CLOSED:
                    self.over = self.closed = True
                    break
                found.append((self.position, value))
            if found or self.over or status not in FINISHED:
                return found
            if not following:
                self.over = True
            self._before += items.aggregate(last=Max("position"))["last"] or 0
            self._run_id = _next(self.alias, self._run_id, following)
        return []


def latest_values(alias: str, run_id: str, key: str, count: int) -> tuple[list[tuple[int, str]], bool]:
    """The last values in the stream of the run that goes on for this one, as a `Place` counts; and if it is closed."""
    last, before, closed = steering.latest(alias, run_id), 0, False
    items = StreamItem.objects.using(alias).filter(key=key)
    for ids in _batched([run_id, *_between(run_id, last)] if last != run_id else []):
        earlier = items.filter(run__in=ids).exclude(run__continued_as="").order_by()
        ends = earlier.values("run").annotate(last=Max("position"), least=Min("value"))
        for length, least in ends.values_list("last", "least"):
            before += length
            closed = closed or least == CLOSED
    rows = list(items.filter(run=last).order_by("-position").values_list("position", "value")[: count + 1])
    closed = closed or (bool(rows) and rows[0][1] == CLOSED)
    values = [(before + position, value) for position, value in rows if value != CLOSED]
    return values[:count][::-1], closed


def _next(alias: str, run_id: str, following: str) -> str:
    """The run behind this one in its line, where `following` is a later one: the first of a line names the last."""
    if not following:
        return following
    for ids in _batched(_between(run_id, following)):
        runs = WorkflowRun.objects.using(alias).filter(pk__in=ids).exclude(continued_as="")
        members = set(runs.values_list("pk", flat=True))
        # Missing are those that were pruned, and of an id that was taken when the line came to it.
        for between in ids:
            if between in members:
                return between
    return following


def _between(run_id: str, following: str) -> list[str]:
    """The ids that a line gives between these two."""
    first, _, last = following.rpartition("~")
    own = run_id.rpartition("~")[2] if run_id.rpartition("~")[0] == first else "1"
    if not (first and own.isdecimal() and last.isdecimal()):
        return []
    return [f"{first}~{number}" for number in range(int(own) + 1, int(last))]


def _batched(ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(ids), 200):
        yield ids[start : start + 200]
