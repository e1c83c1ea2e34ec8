"""The threads that execute claimed runs, and the hygiene of their connections."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from django.db import close_old_connections, connections, reset_queries

from django_durable.conf import options
from django_durable.engine.claims import Claim
from django_durable.engine.leases import Lease
from django_durable.engine.replay import execute

logger = logging.getLogger("django_durable.worker")

# A connection of a project that closes its own after each request is kept so long, or every run would begin by
# connecting.
CONNECTION_AGE = 600.0


class Pool:
    """Up to `size` threads. They are daemons: a step that never ends must not keep the process."""

    def __init__(self, size: int, on_free: Callable[[], None]) -> None:
        self.size = size
        self._on_free = on_free
        self._work: queue.SimpleQueue[tuple[Claim, Lease] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._busy = 0

    @property
    def busy(self) -> int:
        return self._busy

    @property
    def free(self) -> int:
        return self.size - self._busy

    def submit(self, claim: Claim, lease: Lease) -> None:
        with self._lock:
            self._busy += 1
            if len(self._threads) < min(self._busy, self.size):
                thread = threading.Thread(target=self._loop, name=f"durable-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._work.put((claim, lease))

    def close(self) -> None:
        """Let the idle threads end, and close their connections."""
        for _ in self._threads:
            self._work.put(None)

    def join(self, timeout: float) -> bool:
        """Wait for all threads to end; False: some are still at it."""
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _loop(self) -> None:
        kept: dict[str, Any] = {}
        while (work := self._work.get()) is not None:
            claim, lease = work
            close_old_connections()
            try:
                self._greet(lease, kept)
                execute(claim, lease)
            except BaseException:
                # The lease's sweep finds the run and hands it back.
                logger.exception("Run %s could not be executed to an end", claim.run.pk)
            _tidy_connections(kept)
            with self._lock:
                self._busy -= 1
            self._on_free()
        connections.close_all()

    def _greet(self, lease: Lease, kept: dict[str, Any]) -> None:
        """Set up a connection that this thread has not used before. A pooler, for which NOTIFY is off, may share it."""
        connection = connections[lease.alias]
        connection.ensure_connection()
        if kept.get(lease.alias) is not connection.connection and options().NOTIFY:
            lease.limit_idle_transactions()


def _tidy_connections(kept: dict[str, Any]) -> None:
    """Close what is broken or too old. `kept` knows the thread's connections whose age was set already."""
    for connection in connections.all(initialized_only=True):
        driver = connection.connection
        pooled = connection.settings_dict.get("OPTIONS", {}).get("pool")
        if connection.settings_dict["CONN_MAX_AGE"] == 0 and not pooled and kept.get(connection.alias) is not driver:
            connection.close_at = time.monotonic() + CONNECTION_AGE
            kept[connection.alias] = driver
    close_old_connections()
    # With DEBUG on, Django keeps the last 9,000 statements of every connection.
    reset_queries()
