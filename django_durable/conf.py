"""``settings.DURABLE``: the options, their defaults, and the units they are in."""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple

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


class Kind(NamedTuple):
    """The values that an option takes, in words and as a test."""

    wants: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# More than a thread can wait is infinity, or as good as that.
SECONDS = Kind("a number of seconds above 0", lambda value: is_number(value) and 0 < value < threading.TIMEOUT_MAX)
PAUSE = Kind("a number of seconds, 0 or more", lambda value: is_number(value) and 0 <= value < threading.TIMEOUT_MAX)
COUNT = Kind("a whole number from 1", lambda value: is_whole(value) and value >= 1)
SWITCH = Kind("True or False", lambda value: isinstance(value, bool))
SWITCH_OR_NONE = Kind("True, False or None", lambda value: value is None or isinstance(value, bool))
ALIAS = Kind("the alias of a database, as text, or None", lambda value: value is None or isinstance(value, str))
PATH = Kind("a dotted path, as text, or None", lambda value: value is None or isinstance(value, str))
# What the column of a run's version holds.
LABEL = Kind(
    "text of at most 200 printable characters",
    lambda value: isinstance(value, str) and len(value) <= 200 and value.isprintable(),
)

KINDS = {
    "DATABASE": ALIAS,
    "WORKER_CONCURRENCY": COUNT,
    "LEASE_SECONDS": SECONDS,
    "HEARTBEAT_SECONDS": SECONDS,
    "POLL_INTERVAL": SECONDS,
    "NOTIFY": SWITCH,
    "PARK_AFTER": PAUSE,
    "MAX_PAYLOAD_BYTES": COUNT,
    "SERIALIZER": PATH,
    "VERSION": LABEL,
    "EMBEDDED_WORKER": SWITCH,
    "STRICT": SWITCH_OR_NONE,
}

# Longer ones overflow a date in the worker that claims the run. Seconds.
CENTURY = 100 * 365.25 * 86400

OPTION_NAMES = tuple(field.name for field in fields(Options))


@lru_cache(maxsize=1)
def options() -> Options:
    """The options in force; raises ImproperlyConfigured for a wrong value, as servers run no system checks.

    Unknown keys are left to the check, which names the nearest known one.
    """
    given = getattr(settings, "DURABLE", {})
    if not isinstance(given, dict):
        raise ImproperlyConfigured(f"DURABLE must be a dict, found {type(given).__name__}: {given!r}.")
    for name, kind in KINDS.items():
        if name in given and not kind.fits(given[name]):
            raise ImproperlyConfigured(wrong_value(name, given[name]))
    return Options(**{name: given[name] for name in OPTION_NAMES if name in given})


def wrong_value(name: str, value: Any) -> str:
    """The sentence about a value that an option does not take."""
    return f'DURABLE["{name}"] takes {KINDS[name].wants}, found {type(value).__name__}: {reprlib.repr(value)}.'


def as_seconds(value: Any, name: str) -> float:
    """Return a duration, given in seconds or as a timedelta, in seconds.

    Raises TypeError for anything else, and ValueError for a negative one, or one that no calendar holds.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} takes seconds (a number) or a timedelta, found {type(value).__name__}: {value!r}.")
    if not 0 <= value <= CENTURY:
        raise ValueError(f"{name} takes a duration from 0 to 100 years, in seconds, found {value!r}.")
    return float(value)


def check_text(name: str, value: Any, limit: int) -> None:
    """Raise TypeError or ValueError if the value cannot be stored as this option."""
    if not isinstance(value, str):
        raise TypeError(f"{name} takes a str, found {type(value).__name__}: {value!r}.")
    if not 1 <= len(value) <= limit:
        raise ValueError(f"{name} takes 1 to {limit} characters, found {len(value)}: {value[:50]!r}.")
    if not value.isprintable():
        raise ValueError(f"{name} takes printable characters, found {value!r}.")


def _forget(*, setting: str, **kwargs: Any) -> None:
    if setting == "DURABLE":
        options.cache_clear()


setting_changed.connect(_forget, dispatch_uid="django_durable.conf")
