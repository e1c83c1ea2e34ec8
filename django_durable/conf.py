"""``settings.DURABLE``: the options, their defaults, and the units they are in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import timedelta
from functools import lru_cache
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed


@dataclass(frozen=True, kw_only=True)
class Options:
    """One field an option; durations are seconds."""

    # The alias whose database holds the runs; None: the database router's choice.
    DATABASE: str | None = None
    # Runs that one worker process executes at a time.
    WORKER_CONCURRENCY: int = 8
    # A process that was not heard of for so long is dead, and its runs are anybody's.
    LEASE_SECONDS: float = 30.0
    HEARTBEAT_SECONDS: float = 5.0
    # The longest that a worker goes without looking for due runs.
    POLL_INTERVAL: float = 1.0
    # Wake workers by LISTEN/NOTIFY where the database has it.
    NOTIFY: bool = True
    # Waits longer than this give the worker's thread back.
    PARK_AFTER: float = 1.0
    MAX_PAYLOAD_BYTES: int = 1024 * 1024
    # Dotted path of an object with dumps(value) -> str and loads(text) -> value; None: the built-in codec.
    SERIALIZER: str | None = None
    # The code's version, shown beside the runs that it executed.
    VERSION: str = ""
    # Run a worker inside the web process, from its first request on.
    EMBEDDED_WORKER: bool = False
    # A query in a workflow's body, outside a step, is an error; None: as settings.DEBUG.
    STRICT: bool | None = None

    @property
    def strict(self) -> bool:
        return settings.DEBUG if self.STRICT is None else self.STRICT


OPTION_NAMES = tuple(field.name for field in fields(Options))


@lru_cache(maxsize=1)
def options() -> Options:
    """The options in force. Unknown keys are left to the system check, which names the nearest known one."""
    given = getattr(settings, "DURABLE", {})
    if not isinstance(given, dict):
        raise ImproperlyConfigured(f"DURABLE must be a dict, found {type(given).__name__}: {given!r}.")
    return Options(**{name: given[name] for name in OPTION_NAMES if name in given})


def as_seconds(value: Any, name: str) -> float:
    """Return a duration, given in seconds or as a timedelta, in seconds.

    Raises TypeError for anything else, and ValueError for a negative or non-finite one.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} takes seconds (a number) or a timedelta, found {type(value).__name__}: {value!r}.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} takes a duration of 0 or more seconds, found {value!r}.")
    return float(value)


def _forget(*, setting: str, **kwargs: Any) -> None:
    if setting == "DURABLE":
        options.cache_clear()


setting_changed.connect(_forget, dispatch_uid="django_durable.conf")
