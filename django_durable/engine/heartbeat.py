"""The thread that keeps a process's lease, and the lease that a web process takes for its direct calls."""

from __future__ import annotations

import logging
import os
import threading

from django.db import Error, connections

from django_durable.conf import options
from django_durable.engine.leases import Lease

logger = logging.getLogger("django_durable.worker")


class Heartbeat(threading.Thread):
    """Renews a lease from a connection of its own: the executing threads' may be busy for an hour.

    It ends when the lease is lost, when it is told to, or, for a web process, when no run needs it.
    """

    def __init__(self, lease: Lease) -> None:
        super().__init__(name=f"durable-heartbeat-{lease.id[:8]}", daemon=True)
        self.lease = lease
        self.done = threading.Event()

    def run(self) -> None:
        lease, failing = self.lease, False
        # A worker's loop looks by itself for what was cancelled; a web process has this thread alone.
        beat = options().HEARTBEAT_SECONDS
        interval = min(beat, options().POLL_INTERVAL) if lease.kind == "web" else beat
        try:
            while not self.done.wait(interval) and not lease.lost:
                if lease.kind == "web" and not lease.active:
                    # A web process's connections are counted; an idle one of ours would also keep a test's database
                    # from being dropped.
                    connections[lease.alias].close()
                    if lease.age > lease.seconds:
                        break
                    continue
                try:
                    if lease.age < beat * 0.9 or lease.renew():
                        lease.check_active()
                        if lease.kind == "web":
                            lease.return_strays()
                    failing = False
                except Error as error:
                    if not failing:
                        logger.warning("No heartbeat for %s: %s", lease.id, str(error).strip())
                    failing = True
                    connections[lease.alias].close()
        finally:
            connections[lease.alias].close()

    def stop(self) -> None:
        self.done.set()
        if self.is_alive():
            self.join(timeout=5)


_inline: dict[str, tuple[Lease, Heartbeat]] = {}
_lock = threading.Lock()


def inline_lease(alias: str) -> Lease:
    """The lease under which this process executes direct calls; stored at the first one, after any fork."""
    if connections[alias].in_atomic_block:
        # Only a test's transaction gets here. No other process can see what it executes.
        return Lease(alias, "web", stored=False)
    with _lock:
        lease, heartbeat = _inline.get(alias, (None, None))
        if lease is not None and lease.pid == os.getpid() and not lease.lost and lease.age > lease.seconds / 2:
            lease.renew()
        if lease is None or lease.pid != os.getpid() or lease.lost:
            lease, heartbeat = Lease(alias, "web"), None
            lease.register()
        if heartbeat is None or not heartbeat.is_alive():
            heartbeat = Heartbeat(lease)
            heartbeat.start()
        _inline[alias] = (lease, heartbeat)
        return lease


def forget_inline_leases(**kwargs: object) -> None:
    """Take a new lease at the next direct call: the tables were created anew, or emptied, under the old one."""
    with _lock:
        for _, heartbeat in _inline.values():
            heartbeat.done.set()
        _inline.clear()


def _after_fork() -> None:
    # The lock may have been held by a thread that does not exist in the child.
    global _lock
    _lock = threading.Lock()
    _inline.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
