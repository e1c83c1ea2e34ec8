"""Workflows that several test modules share."""

import django_durable as durable
from tests.app.models import Ledger


def times(key: str) -> int:
    """How often this happened, as the database tells."""
    return Ledger.objects.filter(key=key).count()


@durable.step(name="reserve")
def reserve(order: str) -> str:
    Ledger.objects.create(key=f"{order}: reserved")
    return "seat 1"


@durable.step(name="charge", atomic=False)
def charge(order: str) -> int:
    """The outside world: it keeps what was done there, whatever becomes of the run."""
    Ledger.objects.create(key=f"{order}: charged")
    return 4900


@durable.step(name="fulfil")
def fulfil(order: str) -> None:
    Ledger.objects.create(key=f"{order}: fulfilled")


@durable.workflow(name="tests.checkout")
def checkout(order: str) -> dict[str, object]:
    seat = reserve(order)
    paid = charge(order)
    fulfil(order)
    return {"seat": seat, "paid": paid}


def ledger_of(order: str) -> list[int]:
    """How often each step of a checkout took effect."""
    return [times(f"{order}: {what}") for what in ("reserved", "charged", "fulfilled")]


@durable.workflow(name="tests.echo")
def echo(value: object = None) -> object:
    """A run without a step."""
    return value


@durable.workflow(name="tests.fail")
def fail(message: str = "as asked") -> None:
    raise ValueError(message)
