"""Wakes idle workers when a run has become due. Nothing depends on it: a bell not rung costs one poll interval."""

from __future__ import annotations

import time
from contextlib import suppress

from django.db import connections, transaction

from django_durable import compat
from django_durable.conf import options

CHANNEL = "django_durable"

# A bell rung within this many seconds of the last one adds nothing: the workers are awake and look again soon.
QUIET = 0.005
_rung: dict[str, float] = {}


def ring_after_commit(alias: str) -> None:
    """Ring once the caller's transaction has committed; at once if there is none.

    Not inside it: a transaction that notifies takes a lock on the whole database while it commits.
    """
    if options().NOTIFY and compat.can_notify(connections[alias]):
        transaction.on_commit(lambda: _ring(alias), using=alias)


def _ring(alias: str) -> None:
    now = time.monotonic()
    if now - _rung.get(alias, -1.0) < QUIET:
        return
    _rung[alias] = now
    # By the driver, past Django's cursor: it is no part of the caller's work, and may fail without a word.
    with suppress(Exception), connections[alias].connection.cursor() as cursor:
        cursor.execute(f"SELECT pg_notify('{CHANNEL}', '')")
