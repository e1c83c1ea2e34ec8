"""A trip that a person has to allow, that is undone once, and that goes on as a new run; and who allows it."""

from __future__ import annotations

from typing import Any

import django_durable as durable
from tests.scenarios.workflows import effect, folder, take_seat


@durable.step(name="book trip")
def book_trip() -> str:
    take_seat(1)
    return effect("booked")


@durable.step(name="give back")
def give_back() -> str:
    take_seat(-1)
    return effect("given back")


@durable.step(name="pay", atomic=False)
def pay() -> None:
    """Refused once for each run."""
    refused = folder() / f"refused {durable.current().run_id}"
    if not refused.exists():
        refused.touch()
        raise ConnectionError("the bank is down")


@durable.workflow(name="trip", max_attempts=3, retry_delay=0.01)
def trip(leg: int = 1, allowed: tuple[Any, ...] = ()) -> list[Any]:
    durable.patched("sweep")
    allowed = (*allowed, durable.approval("go").data)
    with durable.saga() as undo:
        book_trip()
        undo.add(give_back)
        pay()
    if leg < 2:
        durable.continue_as_new(leg + 1, allowed)
    return list(allowed)


def allow(run_id: str, data: Any) -> None:
    """What a view does, whose process may die in it."""
    durable.get_run(run_id).decide("go", True, data=data)
