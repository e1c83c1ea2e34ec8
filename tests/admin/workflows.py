"""Runs of every status, made by the engine itself, for the admin to show."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

import django_durable as durable
from django_durable.handles import RunHandle
from django_durable.testing import crash_after, run_until_idle
from tests.app.models import Ledger


class CardDeclined(Exception):
    pass


@dataclass(frozen=True)
class Receipt:
    reference: str
    amount: Decimal


@durable.step(name="reserve_ticket")
def reserve_ticket(order: str) -> dict[str, Any]:
    entry = Ledger.objects.create(key=order, note="reserved")
    return {"order": order, "seat": ("B", 12), "held_for": timedelta(minutes=15), "entry": entry}


@durable.step(
    name="charge_card",
    atomic=False,
    max_attempts=4,
    retry_delay=90,
    retry_on=(TimeoutError,),
    give_up_on=(CardDeclined,),
)
def charge_card(order: str, amount: Decimal, card: str) -> Receipt:
    if card == "tok_declined":
        raise CardDeclined(f"the card of order {order} was declined: insufficient funds")
    if card == "tok_slow":
        raise TimeoutError("no answer from the payment service within 5 s")
    return Receipt(f"pay_{order}", amount)


@durable.step(name="fulfil")
def fulfil(order: str) -> None:
    Ledger.objects.create(key=order, note="sold")


@durable.step(name="send_confirmation", atomic=False)
def send_confirmation(order: str) -> str:
    return f"mail sent for {order}"


@durable.workflow(name="store.workflows.checkout")
def checkout(order: str, amount: Decimal, card: str) -> dict[str, Any]:
    reserve_ticket(order)
    receipt = charge_card(order, amount, card)
    fulfil(order)
    send_confirmation(order)
    return {"ok": True, "receipt": receipt}


@durable.workflow(name="store.workflows.nightly_report", queue="reports", max_attempts=3, retry_delay=600)
def nightly_report(day: str) -> str:
    raise RuntimeError(f"no figures for {day} yet")


# What a deployment changes while a run is under way.
renamed = {"first": "collect"}


@durable.workflow(name="store.workflows.import_catalogue", queue="imports")
def import_catalogue(supplier: str) -> int:
    durable.run_step(renamed["first"], lambda: 3)
    return durable.run_step("store", lambda: 3)


@durable.workflow(name="store.workflows.count_to", queue="imports")
def count_to(last: int) -> int:
    return sum(durable.run_step(f"count_{number}", lambda number=number: number) for number in range(1, last + 1))


def every_status() -> dict[str, RunHandle]:
    """Start one run for each way that a run can be, and drain; the key says which."""
    euros = Decimal("49.50")
    runs = {
        "succeeded": checkout.using(run_id="order-1001", attributes={"channel": "web"}).start(
            "1001", euros, "tok_visa"
        ),
        "failed": checkout.using(run_id="order-1002").start("1002", euros, "tok_declined"),
        "retrying step": checkout.using(run_id="order-1003").start("1003", euros, "tok_slow"),
        "retrying run": nightly_report.start("2026-11-20"),
        "delayed": checkout.using(run_id="order-1005", run_after=timedelta(hours=20)).start("1005", euros, "tok_visa"),
    }
    runs["cancelled"] = checkout.using(run_id="order-1004", run_after=timedelta(days=2)).start(
        "1004", euros, "tok_visa"
    )
    runs["cancelled"].cancel("the customer changed his mind")
    run_until_idle()

    runs["dead"] = import_catalogue.using(run_id="import-acme").start("acme")
    with crash_after("collect"):
        run_until_idle()
    renamed["first"] = "download"
    try:
        run_until_idle()
    finally:
        renamed["first"] = "collect"

    runs["recovered"] = count_to.using(run_id="count-3").start(3)
    with crash_after("count_2"):
        run_until_idle()
    run_until_idle()

    runs["orphaned"] = count_to.using(run_id="count-5").start(5)
    with crash_after("count_2"):
        run_until_idle()

    runs["pending"] = checkout.using(run_id="order-1006", priority=5, related=Ledger.objects.create(key="1006")).start(
        "1006", euros, "tok_visa"
    )
    return runs
