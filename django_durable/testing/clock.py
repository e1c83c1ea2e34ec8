"""`advance`: the durable clock, and no other, goes on."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from django_durable import clock

_UNITS = {
    unit + plural: name
    for unit, name in {
        "second": "seconds",
        "minute": "minutes",
        "hour": "hours",
        "day": "days",
        "week": "weeks",
    }.items()
    for plural in ("", "s")
}


def advance(by: timedelta | str) -> None:
    """Move the durable clock on by a timedelta, or by words such as "3 days" or "1 hour 30 minutes".

    Nothing is executed: call `run_until_idle` next. The move ends with the test: by itself under pytest, and with
    `DurableTestMixin` in a TestCase. Raises ValueError for what is no duration, or goes backwards.
    """
    duration = by if isinstance(by, timedelta) else _parse(by)
    if duration < timedelta(0):
        raise ValueError(f"advance() goes forward only, found {by!r}.")
    clock.move(duration)


def _parse(text: str) -> timedelta:
    parts = re.findall(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*(?:,|and\b)?", text.lower())
    if not parts or "".join(re.findall(r"[^\s,]", text.lower().replace("and", ""))) != "".join(
        amount + unit for amount, unit in parts
    ):
        raise ValueError(f'advance() takes a timedelta or words such as "3 days", found {text!r}.')
    total = timedelta(0)
    for amount, unit in parts:
        if unit not in _UNITS:
            raise ValueError(f"advance() knows seconds, minutes, hours, days and weeks, found {unit!r} in {text!r}.")
        total += timedelta(**{_UNITS[unit]: float(amount)})
    return total


class DurableTestMixin:
    """For TestCase: what `advance` did ends with the test. ``class CheckoutTest(DurableTestMixin, TestCase)``."""

    def setUp(self) -> None:
        super().setUp()  # type: ignore[misc]
        register: Any = self
        register.addCleanup(clock.reset)
