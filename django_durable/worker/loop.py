"""The worker: looks for due runs, claims them in batches, and takes over from the dead."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import NamedTuple, cast

from django.db import Error, connections, reset_queries
from django.db.models import Exists, Q, Subquery

from django_durable import compat
from django_durable.clock import DatabaseNow
from django_durable.compat import Trouble
from django_durable.conf import options
from django_durable.engine import claims, leases, registry
from django_durable.engine.heartbeat import Heartbeat
from django_durable.engine.leases import Lease
from django_durable.engine.sweep import wake_overlooked
from django_durable.exceptions import TablesMissing
from django_durable.models import Worker as WorkerRow
from django_durable.models import WorkflowRun
from django_durable.worker.listener import Listener, listener_for
from django_durable.worker.pool import Pool

logger = logging.getLogger("django_durable.worker")

# The pause after something has happened; it doubles while nothing does, up to POLL_INTERVAL.
SHORT_PAUSE = 0.01

# A bell may mean that a run was cancelled; so long at least lies between two looks at those that are executed here.
CHECK_PAUSE = 0.1

# Other workers' lost sessions mean their deaths only when ours has stood for so long: after the database's restart
# they come back one by one. Seconds.
TRUSTED_SESSION = 10.0

# How often a worker looks for wake-ups that were lost: there are none. Seconds.
SAFETY_PAUSE = 60.0


class Look(NamedTuple):
    """What one statement says about the work there is."""

    due: bool
    next_wake: float | None
    dead: bool
    overdue: bool
    stray: bool


class Worker:
    """One process's share of the work. `run` returns after `stop`, or with `burst` when nothing is due any more."""

    def __init__(
        self,
        alias: str,
        *,
        queues: Iterable[str] = (),
        concurrency: int | None = None,
        burst: bool = False,
        grace: float = 30.0,
    ) -> None:
        self.alias = alias
        self.queues = tuple(queues)
        self.burst = burst
        self.grace = grace
        self.lease = Lease(alias, "worker", self.queues)
        self.pool = Pool(concurrency or options().WORKER_CONCURRENCY, self._freed)
        self._bell = threading.Event()
        self._stopping = threading.Event()
        self._at_once = threading.Event()
        self._heartbeat: Heartbeat | None = None
        self._listener: Listener | None = None
        # The last claim was a full one: there is more, and every free thread is to ask for it.
        self._more = False
        # What is executed now is a suspect, with nothing beside it.
        self._alone = False
        self._pause = SHORT_PAUSE
        self._swept_at = 0.0
        self._secured_at = time.monotonic()
        self._looked_at = 0.0
        self._checked_at = 0.0
        self._missed: dict[str, float] = {}
        self._unknown: set[str] = set()
        self._failing = False
        # With `burst`: nothing is due any more.
        self._ended = False

    # -- Outside --

    def stop(self, *, at_once: bool = False) -> None:
        """Claim nothing more, and end when what runs has ended or `grace` is over; `at_once`, hand it back now."""
        if at_once:
            self._at_once.set()
        self._stopping.set()
        self._bell.set()

    @property
    def ready(self) -> bool:
        """Whether the lease is good: the database answers, and nobody took this process for dead."""
        return not self.lease.lost and self.lease.age < self.lease.seconds and not self._stopping.is_set()

    def run(self) -> None:
        """Work until told to stop. A database that is away is a pause."""
        if not self._begin():
            return
        try:
            while not self._stopping.is_set():
                if not self._safely(self._turn):
                    continue
                if self._ended:
                    break
                self._bell.wait(self._pause)
        finally:
            self._end()

    # -- Inside --

    def _begin(self) -> bool:
        while not self._safely(self._register):
            if self._stopping.is_set():
                return False
        self._heartbeat = Heartbeat(self.lease)
        self._heartbeat.start()
        self._listener = listener_for(self.alias, self._ring, lambda: self.lease.id)
        if self._listener is not None:
            self._listener.start()
        logger.info(
            "Worker %s: %s threads, queues %s, %s workflows",
            self.lease.id,
            self.pool.size,
            ", ".join(self.queues) or "all",
            len(registry.names()),
        )
        return True

    def _register(self) -> None:
        try:
            self.lease.register()
        except Error as error:
            if compat.trouble(error, broken=True) is Trouble.OTHER:
                raise TablesMissing(self.alias, str(error).strip()) from error
            raise

    def _ring(self) -> None:
        self._bell.set()

    def _freed(self) -> None:
        if self._more or self.burst or self._stopping.is_set():
            self._bell.set()

    def _safely(self, turn: Callable[[], object]) -> bool:
        """Take a turn; False: the database did not answer, and some time has passed."""
        try:
            turn()
        except Error as error:
            connections[self.alias].close()
            if not self._failing:
                logger.warning("The database does not answer, trying again: %s", str(error).strip())
            self._failing = True
            self._stopping.wait(0.25)
            return False
        if self._failing:
            logger.warning("The database answers again")
        self._failing = False
        return True

    def _turn(self) -> None:
        """One look, and what follows from it. A bell is answered by a claim alone, unless a look is due anyway."""
        if self.lease.lost:
            self._start_anew()
        rung = self._bell.is_set()
        self._bell.clear()
        now = time.monotonic()
        sweep = now - self._swept_at >= options().HEARTBEAT_SECONDS
        poll = now - self._looked_at >= options().POLL_INTERVAL
        acted, look = False, None
        if sweep or poll or not rung:
            look = self._look()
            self._looked_at = now
            acted = self._follow(look, sweep)
        if poll or (rung and now - self._checked_at >= CHECK_PAUSE):
            self.lease.check_active()
            self._checked_at = now
        if rung or acted or (look is not None and look.due):
            if self.pool.free:
                acted |= self._claim()
            else:
                self._more = True
        if sweep:
            self._swept_at = now
            self._report_unknown()
        if now - self._secured_at >= SAFETY_PAUSE:
            self._secured_at = now
            acted |= bool(wake_overlooked(self.alias))
        self._ended = self.burst and self._drained()
        self._pause = SHORT_PAUSE if acted else min(options().POLL_INTERVAL, self._pause * 2)
        if look is not None and look.next_wake is not None:
            self._pause = min(self._pause, max(0.001, look.next_wake))
        reset_queries()

    def _look(self) -> Look:
        """All that a turn has to know, in one statement over the processes of this machine."""
        due = WorkflowRun.objects.using(self.alias).pending().filter(workflow__in=registry.names())
        if self.queues:
            due = due.filter(queue__in=self.queues)
        waiting = WorkflowRun.objects.using(self.alias).waiting().filter(wake_at__isnull=False).order_by("wake_at")
        overdue = WorkflowRun.objects.using(self.alias).filter(finished_at__isnull=True, deadline__lte=DatabaseNow())
        workers = WorkerRow.objects.using(self.alias)
        stray = WorkflowRun.objects.using(self.alias).running().filter(worker=self.lease.id)
        rows = list(
            workers.filter(Q(pk=self.lease.id) | Q(machine=compat.machine_id()) | Q(session_key__isnull=False))
            .order_by()
            .values_list(
                "pk",
                "machine",
                "pid",
                "pid_started",
                Exists(due),
                Subquery(waiting.values("wake_at")[:1]),
                Exists(workers.filter(expires_at__lt=DatabaseNow())),
                Exists(overdue),
                Exists(stray.exclude(pk__in=list(self.lease.active))),
                DatabaseNow(),
                compat.session_is_alive(connections[self.alias]),
            )
        )
        if self.lease.id not in {row[0] for row in rows}:
            self.lease.lose()
            return Look(False, None, False, False, False)
        is_due, wake_at, has_dead, is_overdue, has_stray, reading = rows[0][4:10]
        self.lease.clock.set(cast(datetime, reading))
        # On this machine a process is known to be dead long before its lease runs out.
        gone = leases.dead_neighbours(row[:4] for row in rows) + self._lost_sessions(
            {row[0] for row in rows if not row[10]}
        )
        if gone:
            leases.bury(self.alias, gone)
        next_wake = None if wake_at is None else (wake_at - reading).total_seconds()
        return Look(bool(is_due), next_wake, bool(has_dead) or bool(gone), bool(is_overdue), bool(has_stray))

    def _lost_sessions(self, lost: set[str]) -> list[str]:
        """Of the workers whose session is gone, those that had a second to come back."""
        now = time.monotonic()
        held_since = getattr(self._listener, "held_since", None)
        if self.lease.id in lost or held_since is None or now - held_since < TRUSTED_SESSION:
            lost = set()
        self._missed = {pk: self._missed.get(pk, now) for pk in lost}
        return [pk for pk, since in self._missed.items() if now - since >= 1.0]

    def _follow(self, look: Look, sweep: bool) -> bool:
        acted = False
        if look.dead:
            leases.bury(self.alias)
        if look.dead or sweep:
            while recovered := leases.recover(self.alias):
                acted = True
                if recovered < leases.BATCH:
                    break
        if look.overdue:
            acted |= bool(claims.cancel_overdue(self.alias))
        if look.next_wake is not None and look.next_wake <= 0:
            acted |= bool(claims.wake_due(self.alias))
        if look.stray:
            acted |= bool(self.lease.return_strays())
        return acted

    def _claim(self) -> bool:
        limit, busy = self.pool.free, self.pool.busy > 0
        if busy and self._alone:
            self._more = True
            return False
        claimed = claims.claim(self.lease, limit, queues=self.queues, busy=busy)
        self._alone = any(claims.is_suspect(claim.run) for claim in claimed)
        for claim in claimed:
            self.pool.submit(claim, self.lease)
        self._more = len(claimed) == limit or self._alone
        return bool(claimed)

    def _report_unknown(self) -> None:
        """Say once of each workflow that is due and that nobody here knows; another worker may."""
        unknown = claims.unknown_workflows(self.alias, self.queues)
        for name in sorted(unknown - self._unknown):
            logger.warning(
                "Runs of workflow %r are due, and this worker has no such workflow; they stay PENDING. "
                "Is its app installed here, or was it renamed without aliases=?",
                name,
            )
        self._unknown |= unknown

    def _start_anew(self) -> None:
        """Somebody took this process for dead: its runs are theirs. Go on as another."""
        logger.warning("Worker %s was declared dead (it was stopped, or too slow to renew its lease)", self.lease.id)
        if self._heartbeat is not None:
            self._heartbeat.stop()
        lease = Lease(self.alias, "worker", self.queues)
        lease.register()
        self.lease = lease
        self._heartbeat = Heartbeat(lease)
        self._heartbeat.start()

    def _drained(self) -> bool:
        if self.pool.busy or self._more:
            return False
        look = self._look()
        return not look.due and not look.dead and (look.next_wake is None or look.next_wake > 0)

    def _end(self) -> None:
        until = time.monotonic() + self.grace
        while self.pool.busy and not self._at_once.is_set() and time.monotonic() < until:
            self._bell.clear()
            self._bell.wait(0.05)
        # Steps that still run are cut off from here on; what they come to is fenced, or found by the next owner.
        self.lease.stopping.set()
        self.pool.close()
        handed_back = self._hand_back()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._listener is not None:
            self._listener.stop()
        self.pool.join(0 if handed_back else 2)
        connections.close_all()
        logger.info("Worker %s ended, %s runs handed back", self.lease.id, handed_back)

    def _hand_back(self) -> int:
        held = len(self.lease.active)
        for _ in range(3):
            try:
                # On SQLite a step that did not end keeps everybody else from writing, and us from ending.
                compat.limit_lock_wait(connections[self.alias], 0.5)
                self.lease.remove()
            except Error:
                connections[self.alias].close()
            else:
                return held
        # Others see that this process is dead, or its lease runs out.
        logger.warning("The database does not let go of the runs of worker %s; others recover them", self.lease.id)
        return held
