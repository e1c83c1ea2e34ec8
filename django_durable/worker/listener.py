"""What wakes an idle worker before its next poll. Losing it costs latency, never a run."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from django.db import connections

from django_durable import compat
from django_durable.conf import options
from django_durable.engine.bell import CHANNEL, QUIET
from django_durable.models import Worker

logger = logging.getLogger("django_durable.worker")

# How often a SQLite file is looked at: a system call, no statement.
FILE_INTERVAL = 0.003
PROBE_SECONDS = 2.0


def listener_for(alias: str, ring: Callable[[], None], worker_id: Callable[[], str]) -> Listener | None:
    """The listener that this database allows, or None: then the worker only polls."""
    connection = connections[alias]
    if options().NOTIFY and compat.can_notify(connection) and _speaks_psycopg3():
        return NotifyListener(alias, ring, worker_id)
    path = compat.database_file(connection)
    return FileListener(path, ring) if path else None


def _speaks_psycopg3() -> bool:
    from django.db.backends.postgresql.psycopg_any import is_psycopg3

    return bool(is_psycopg3)


class Listener(threading.Thread):
    def __init__(self, name: str, ring: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.ring = ring
        self.done = threading.Event()

    def stop(self) -> None:
        self.done.set()
        if self.is_alive():
            self.join(timeout=5)


class FileListener(Listener):
    """SQLite: a commit changes the write-ahead log, or the file."""

    def __init__(self, path: str, ring: Callable[[], None]) -> None:
        super().__init__("durable-listener", ring)
        self.paths = (f"{path}-wal", path)

    def run(self) -> None:
        seen = self._stamp()
        while not self.done.wait(FILE_INTERVAL):
            stamp = self._stamp()
            if stamp != seen:
                seen = stamp
                self.ring()

    def _stamp(self) -> list[tuple[int, int] | None]:
        stamps: list[tuple[int, int] | None] = []
        for path in self.paths:
            try:
                stat = os.stat(path)
            except OSError:
                stamps.append(None)
            else:
                stamps.append((stat.st_mtime_ns, stat.st_size))
        return stamps


class NotifyListener(Listener):
    """PostgreSQL: LISTEN, on a connection of its own.

    Its session holds an advisory lock that is named in the worker's row. When the process dies, its session ends,
    and workers on other machines see the lock gone long before the lease runs out.
    """

    def __init__(self, alias: str, ring: Callable[[], None], worker_id: Callable[[], str]) -> None:
        super().__init__("durable-listener", ring)
        self.alias = alias
        self.worker_id = worker_id
        self.heard = False
        self.held_since: float | None = None

    def run(self) -> None:
        failing = False
        while not self.done.is_set():
            try:
                with self._connect() as connection:
                    connection.execute(f"LISTEN {CHANNEL}")
                    if not self._probe(connection):
                        logger.warning(
                            "NOTIFY does not reach this worker: a pooler in transaction mode lies between. It polls "
                            'every %s s; set DURABLE["NOTIFY"] to False to say that this is meant.',
                            options().POLL_INTERVAL,
                        )
                        return
                    failing = False
                    # What was notified while we were not listening is not told again.
                    self.ring()
                    key = self._take_lock(connection)
                    named = ""
                    while not self.done.is_set():
                        if named != (named := self.worker_id()):
                            self._tell_key(connection, key, named)
                        for _ in connection.notifies(timeout=0.5, stop_after=1):
                            self.ring()
                            # Whoever was about to ring within QUIET seconds of this one did not.
                            self.done.wait(2 * QUIET)
                            self.ring()
            except Exception as error:
                self.held_since = None
                if not failing:
                    logger.warning("The listening connection was lost: %s", str(error).strip())
                failing = True
                self.done.wait(0.5)

    def _connect(self) -> Any:
        import psycopg

        params = connections[self.alias].get_connection_params()
        for name in ("cursor_factory", "context", "pool"):
            params.pop(name, None)
        return psycopg.connect(**params, autocommit=True)

    def _take_lock(self, connection: Any) -> int:
        key = secrets.randbits(62)
        connection.execute("SELECT pg_advisory_lock(%s)", [key])
        self.held_since = time.monotonic()
        return key

    def _tell_key(self, connection: Any, key: int, worker_id: str) -> None:
        table = connections[self.alias].ops.quote_name(Worker._meta.db_table)
        connection.execute(f"UPDATE {table} SET session_key = %s WHERE id = %s", [key, worker_id])  # noqa: S608

    def _probe(self, connection: Any) -> bool:
        if not self.heard:
            connection.execute(f"NOTIFY {CHANNEL}")
            self.heard = any(True for _ in connection.notifies(timeout=PROBE_SECONDS, stop_after=1))
        return self.heard
