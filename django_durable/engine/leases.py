"""The right to execute runs: a row for the process, renewed by a heartbeat, and what happens when it is not.

One row and one small UPDATE a beat, for any number of runs. Safety never rests on it: a checkpoint is fenced by its
run's own row (`engine.checkpoints`). The lease only says when others may take over.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import weakref
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from django.db import Error, connections
from django.db.models import F

from django_durable import clock, compat, signals
from django_durable.clock import Clock, DatabaseNow, boot_seconds
from django_durable.conf import options
from django_durable.exceptions import LeaseLost
from django_durable.models import Worker, WorkflowRun
from django_durable.states import RunStatus

if TYPE_CHECKING:
    from django_durable.engine.context import RunContext
    from django_durable.querysets import RunQuerySet

logger = logging.getLogger("django_durable.worker")

_of_this_process: weakref.WeakSet[Lease] = weakref.WeakSet()

# A transaction of a step may be idle for so many leases before the server ends it.
IDLE_LEASES = 10

# At most so many runs are moved by one statement, so that a sweep never holds its locks for long.
BATCH = 100


class Lease:
    """What lets this process execute runs. Without a row (`stored` False) it is a test's, inside its transaction."""

    def __init__(self, alias: str, kind: str, queues: Iterable[str] = (), *, stored: bool = True) -> None:
        self.id = uuid4().hex
        self.alias = alias
        self.kind = kind
        self.queues = list(queues)
        self.stored = stored
        self.seconds = options().LEASE_SECONDS
        self.pid = os.getpid()
        self.clock = Clock()
        # What is being executed under it: the heartbeat compares this with what the table says.
        self.active: dict[str, RunContext] = {}
        # Set when the process has no time left: runs end before their next step and are handed back.
        self.stopping = threading.Event()
        self._strays: dict[str, tuple[int, float]] = {}
        self._lost = False
        self._renewed = boot_seconds()
        _of_this_process.add(self)

    def register(self) -> None:
        """Store the row, and read the database's clock."""
        self._renewed = boot_seconds()
        now = DatabaseNow()
        worker = Worker(
            id=self.id,
            kind=self.kind,
            host=compat.host_name(),
            pid=self.pid,
            machine=compat.machine_id(),
            pid_started=compat.process_started(self.pid),
            queues=self.queues,
            version=options().VERSION,
        )
        # Expressions: the columns are the database's clock, which the model's Python types do not say.
        times = {"started_at": now, "last_seen": now, "expires_at": DatabaseNow(timedelta(seconds=self.seconds))}
        for name, value in times.items():
            setattr(worker, name, value)
        # Asked again after a lost answer, the row may be there.
        Worker.objects.using(self.alias).bulk_create([worker], ignore_conflicts=True)
        self.read_clock()

    def read_clock(self) -> None:
        reading = Worker.objects.using(self.alias).filter(pk=self.id).values_list(DatabaseNow(), flat=True).first()
        if isinstance(reading, datetime):
            self.clock.set(reading)

    def renew(self) -> bool:
        """Extend the lease; False: somebody declared this process dead. It can be extended, never won back."""
        asked = boot_seconds()
        row = Worker.objects.using(self.alias).filter(pk=self.id)
        if row.update(last_seen=DatabaseNow(), expires_at=DatabaseNow(timedelta(seconds=self.seconds))):
            self._renewed = asked
        else:
            self.lose()
        return not self._lost

    def limit_idle_transactions(self) -> None:
        """Let the server end transactions of this thread's connection that outlast the process's lease by far."""
        compat.limit_idle_transactions(connections[self.alias], IDLE_LEASES * self.seconds)

    def renew_in_transaction(self) -> None:
        """Renew with a step's own commit, where that kept the heartbeat out: on SQLite there is one writer."""
        one_writer = not connections[self.alias].features.has_select_for_update
        if one_writer and self.stored and self.age > self.seconds / 2:
            self.renew()

    def lose(self) -> None:
        self._lost = True

    @property
    def lost(self) -> bool:
        return self._lost

    @property
    def age(self) -> float:
        """Seconds since the lease was last extended, also of those in which this process or machine slept."""
        return boot_seconds() - self._renewed

    def valid(self) -> bool:
        """Whether a step may start. A lease that may have run out is extended first, or found lost."""
        if self._lost or self.stopping.is_set() or self.pid != os.getpid():
            return False
        while self.stored and self.age > self.seconds * 0.8:
            try:
                return self.renew()
            except Error:
                # It may be away for us alone, and others may be taking over: no further step until it answers.
                connections[self.alias].close()
            if self.wait(0.25):
                return False
        return True

    def wait(self, seconds: float) -> bool:
        """Wait in this thread; True: the process has no time left. A test's lease moves the clock instead."""
        if self.stored:
            return self.stopping.wait(seconds)
        clock.move(timedelta(seconds=seconds))
        return False

    def check_active(self) -> None:
        """End what this process still executes and the table no longer gives it: cancelled, or taken over."""
        mine = dict(self.active)
        if not mine:
            return
        held = dict(WorkflowRun.objects.using(self.alias).running().filter(worker=self.id).values_list("pk", "attempt"))
        for run_id, context in mine.items():
            if held.get(run_id) != context.attempt:
                context.end(LeaseLost(f"run {run_id} was cancelled, or has another owner"))

    def return_strays(self) -> int:
        """Hand back runs that the table says are ours and that no thread of ours executes; return how many.

        The answer to their claim was lost. One that was just claimed looks the same for a moment, so it has to be
        seen again, unchanged, after a while.
        """
        now, returned, seen = boot_seconds(), 0, {}
        mine = WorkflowRun.objects.using(self.alias).running().filter(worker=self.id)
        for run_id, attempt in mine.values_list("pk", "attempt"):
            if run_id in self.active:
                continue
            known, since = self._strays.get(run_id, (attempt, now))
            if known != attempt or now - since < options().HEARTBEAT_SECONDS:
                seen[run_id] = (attempt, since if known == attempt else now)
                continue
            logger.warning("Run %s was claimed by this process, which does not know of it; handed back", run_id)
            returned += hand_back(mine.filter(pk=run_id, attempt=attempt))
        self._strays = seen
        return returned

    def remove(self) -> None:
        """Hand back what this process still holds and delete its row. Not a crash: no recovery is counted."""
        with compat.write_transaction(self.alias):
            hand_back(WorkflowRun.objects.using(self.alias).filter(worker=self.id))
            Worker.objects.using(self.alias).filter(pk=self.id).delete()


def hand_back(runs: RunQuerySet, *, crashed: bool = False) -> int:
    """Make runs that their executor gives up PENDING again; `crashed` counts it as a recovery."""
    counted: dict[str, Any] = {"recoveries": F("recoveries") + 1} if crashed else {}
    return runs.move(RunStatus.PENDING, {RunStatus.RUNNING}, worker="", **counted)


def of_this_process() -> list[Lease]:
    return list(_of_this_process)


def end_here(run_id: str, reason: BaseException) -> None:
    """Let a run that this process executes go no further than the step that it is in."""
    for lease in of_this_process():
        if context := lease.active.get(run_id):
            context.end(reason)


# -- Recovery ---------------------------------------------------------------------------------------------------


def bury(alias: str, ids: Iterable[str] | None = None) -> int:
    """Declare processes dead by deleting their rows: those named, or all whose lease ran out."""
    workers = Worker.objects.using(alias)
    dead = workers.filter(expires_at__lt=DatabaseNow()) if ids is None else workers.filter(pk__in=list(ids))
    # One statement: a project's receivers of delete signals would make a list first, and let who renews meanwhile die.
    return dead._raw_delete(alias)


def recover(alias: str, *, spread: bool = True) -> int:
    """Make runs whose process has no row due again, and return how many.

    Stateless, and right from any number of processes at once: each looks at the rows again, and whatever fails is
    found by the next. A run that was recovered before waits a little, longer each time, so that what kills its
    workers does not do so as fast as they start.
    """
    orphans = WorkflowRun.objects.using(alias).orphaned()
    if not orphans.exists():
        return 0
    with compat.write_transaction(alias):
        locking = connections[alias].features.has_select_for_update_skip_locked
        found = list(
            orphans.select_for_update(skip_locked=locking)
            .order_by()
            .values_list("pk", "worker", "workflow", "recoveries")[:BATCH]
        )
        runs = WorkflowRun.objects.using(alias).running()
        counted: dict[str, Any] = {"worker": "", "recoveries": F("recoveries") + 1}
        for count in {recoveries for *_, recoveries in found}:
            same = runs.filter(pk__in=[pk for pk, *_, recoveries in found if recoveries == count])
            if spread and count:
                pause = min(30.0, 0.1 * 2.0 ** min(count, 20)) * random.uniform(0.5, 1)  # noqa: S311 (not a secret)
                later = DatabaseNow(timedelta(seconds=pause))
                same.move(RunStatus.WAITING, wake_at=later, waiting_for="recovery", **counted)
            else:
                same.move(RunStatus.PENDING, **counted)
    for pk, worker, workflow, recoveries in found:
        signals.run_recovered.send_robust(
            WorkflowRun, run_id=pk, workflow=workflow, database=alias, worker=worker, recoveries=recoveries + 1
        )
    return len(found)


def dead_neighbours(neighbours: Iterable[tuple[str, str, int, int | None]]) -> list[str]:
    """Of (id, machine, pid, process start) rows, the ids of those on this machine whose process is gone."""
    here = compat.machine_id()
    return [
        pk
        for pk, machine, pid, started in neighbours
        if here and machine == here and started is not None and compat.process_started(pid) != started
    ]
