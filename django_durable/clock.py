"""Time. The database's clock decides what is due and who is dead; tests may move it.

`DatabaseNow` is that clock inside a statement. `Clock` carries its reading forward in a process, by the operating
system's own monotonic clock, so that a checkpoint can be stamped without asking for the time.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db.models import DateTimeField, Func
from django.utils import timezone

# How far `django_durable.testing.advance` has moved the clock; zero outside tests.
_moved = timedelta(0)


def move(by: timedelta) -> None:
    global _moved
    _moved += by


def reset() -> None:
    global _moved
    _moved = timedelta(0)


class DatabaseNow(Func):
    """The database's present time, `plus` a duration; stable within a statement, so an index can serve it."""

    output_field = DateTimeField()

    def __init__(self, plus: timedelta = timedelta(0)) -> None:
        self.plus = plus
        super().__init__()

    def _shifted(self, now: str, interval: str) -> tuple[str, tuple[Any, ...]]:
        seconds = (self.plus + _moved).total_seconds()
        return (f"({now} + {interval})", (seconds,)) if seconds else (now, ())

    def as_sql(self, compiler: Any, connection: Any, *args: Any, **kwargs: Any) -> tuple[str, tuple[Any, ...]]:
        return self._shifted("CURRENT_TIMESTAMP(6)", "INTERVAL %s SECOND")

    def as_postgresql(self, compiler: Any, connection: Any, **kwargs: Any) -> tuple[str, tuple[Any, ...]]:
        # STATEMENT_, not CLOCK_TIMESTAMP: a volatile function would make every due-row scan a full one.
        return self._shifted("STATEMENT_TIMESTAMP()", "%s * INTERVAL '1 second'")

    def as_sqlite(self, compiler: Any, connection: Any, **kwargs: Any) -> tuple[str, tuple[Any, ...]]:
        # The file's host is ours, and so is its clock; SQLite's own has milliseconds only, which would
        # make runs started within one of them lose their order.
        return "%s", (connection.ops.adapt_datetimefield_value(timezone.now() + self.plus + _moved),)

    def on(self, connection: Any) -> tuple[str, tuple[Any, ...]]:
        """The SQL and its parameters, for a statement that is written by hand."""
        compiled: tuple[str, tuple[Any, ...]] = getattr(self, f"as_{connection.vendor}", self.as_sql)(None, connection)
        return compiled


def boot_seconds() -> float:
    """Seconds of a clock that nobody sets and that goes on while the machine sleeps, where there is one."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Clock:
    """The database's time, as last read, carried forward without a query."""

    __slots__ = ("_base", "_read_at")

    def __init__(self) -> None:
        self.set(datetime.now(UTC) + _moved)

    def set(self, reading: datetime) -> None:
        """Take a reading of `DatabaseNow`."""
        self._base = reading.astimezone(UTC) - _moved
        self._read_at = boot_seconds()

    def now(self) -> datetime:
        return self._base + timedelta(seconds=boot_seconds() - self._read_at) + _moved
