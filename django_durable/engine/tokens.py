"""Signed permissions to look at one run, for pages whose visitors have no account."""

from __future__ import annotations

import time
from collections.abc import Collection
from datetime import timedelta
from typing import NamedTuple

from django.core import signing
from django.db import connections

from django_durable.conf import as_seconds, check_text

SALT = "django_durable.run"


class Permission(NamedTuple):
    """What the holder of a token may see: the run's status and its steps' names, and what is named here."""

    database: str
    run_id: str
    events: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()


def sign(
    database: str,
    run_id: str,
    max_age: float | timedelta | None,
    *,
    events: Collection[str],
    streams: Collection[str],
) -> str:
    """Return the token of this permission; raise TypeError or ValueError for arguments that make no sense."""
    expires = None if max_age is None else time.time() + as_seconds(max_age, "max_age")
    return signing.dumps(
        [database, run_id, expires, _keys("events", events), _keys("streams", streams)], salt=SALT, compress=True
    )


def read(token: str) -> Permission | None:
    """What the token permits; None if it is not one of ours, has expired, or is about a database that is gone."""
    try:
        database, run_id, expires, events, streams = signing.loads(token, salt=SALT)
    except signing.BadSignature:
        return None
    if (expires is not None and time.time() >= expires) or database not in connections:
        return None
    return Permission(database, run_id, tuple(events), tuple(streams))


def _keys(name: str, keys: Collection[str]) -> list[str]:
    # A text is a collection of texts, too: of its letters.
    if isinstance(keys, str):
        raise TypeError(f"{name} takes a list of keys, found the text {keys!r}.")
    for key in keys:
        check_text(f"A key of {name}", key, 200)
    return sorted(set(keys))
