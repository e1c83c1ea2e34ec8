"""The proof: what is in the shop's database, in the payment service's own ledger, and in the mail folder."""

from __future__ import annotations

import email
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx


@dataclass(frozen=True)
class Line:
    """What became of one order."""

    order: str
    seat: str
    order_status: str
    ticket_status: str
    is_holder: bool
    run_status: str
    recoveries: int
    charges: int
    mails: int

    @property
    def is_lost(self) -> bool:
        kept = self.order_status == "paid" and self.ticket_status == "sold" and self.is_holder
        return not (kept and self.run_status == "SUCCEEDED" and self.charges and self.mails)

    @property
    def is_double(self) -> bool:
        return self.charges > 1 or self.mails > 1


@dataclass(frozen=True)
class Found:
    """All that there is, and what it says."""

    bought: list[str]
    lines: list[Line]
    charges: list[dict[str, Any]]
    requests: int
    # In words: what is there without an order, and steps that were executed though they had been recorded.
    strays: list[str]
    repeated: list[str]

    @property
    def lost(self) -> int:
        missing = set(self.bought) - {line.order for line in self.lines}
        return len(missing) + sum(line.is_lost for line in self.lines)

    @property
    def double(self) -> int:
        sold = Counter(line.seat for line in self.lines if line.order_status == "paid")
        seats = sum(times > 1 for times in sold.values())
        return seats + sum(line.is_double for line in self.lines) + len(self.strays) + len(self.repeated)


def connect_to_the_shop(env: dict[str, str]) -> None:
    """Let this process read the shop's database, as one more client."""
    os.environ.update(env)
    import django

    django.setup()


def look_at_order(order: str) -> tuple[str, str, str, list[str]]:
    """Return an order's status, its ticket's, its run's, and the names of the recorded steps."""
    from shop.models import Order

    from django_durable.models import WorkflowRun

    found = Order.objects.get(public_id=order)
    run = WorkflowRun.objects.get(pk=found.run_id)
    steps = run.steps.filter(status="SUCCEEDED").order_by("position")
    return found.status, found.tickets.get().status, run.status, [step.name for step in steps]


def read_ledger(payments: str) -> dict[str, Any]:
    ledger: dict[str, Any] = httpx.get(f"{payments}/charges", trust_env=False).raise_for_status().json()
    return ledger


def collect(bought: list[str], payments: str, mail_folder: Path, events: Iterable[dict[str, Any]]) -> Found:
    """Look everywhere, and set side by side what belongs to one order."""
    from shop.models import Order

    from django_durable.models import WorkflowRun

    ledger = read_ledger(payments)
    charges = [charge for charge in ledger["charges"] if charge["status"] == "succeeded"]
    charged = Counter(charge["order"] for charge in charges)
    mailed = Counter(_mailed_orders(mail_folder))
    lines = []
    for order in Order.objects.order_by("created_at"):
        ticket = order.tickets.get()
        run = WorkflowRun.objects.get(pk=order.run_id)
        lines.append(
            Line(
                order=order.public_id,
                seat=ticket.seat,
                order_status=order.status,
                ticket_status=ticket.status,
                is_holder=ticket.holder_id == order.pk,
                run_status=run.status,
                recoveries=run.recoveries,
                charges=charged.pop(order.public_id, 0),
                mails=mailed.pop(order.public_id, 0),
            )
        )
    strays = [f"A charge without an order: {order}." for order in charged]
    strays += [f"A mail without an order: {order}." for order in mailed]
    return Found(bought, lines, charges, len(ledger["requests"]), strays, _repeated_steps(events))


def table(found: Found) -> Iterable[str]:
    """Yield a line of text for each order."""
    yield f"{'order':<13}{'seat':<6}{'ticket':<10}{'order is':<10}{'charges':<9}{'mails':<7}run"
    for line in found.lines:
        yield (
            f"{line.order:<13}{line.seat:<6}{line.ticket_status:<10}{line.order_status:<10}{line.charges:<9}"
            f"{line.mails:<7}{line.run_status}{', recovered' if line.recoveries else ''}"
        )


def _repeated_steps(events: Iterable[dict[str, Any]]) -> list[str]:
    recorded: set[tuple[str, int]] = set()
    repeated = []
    for event in events:
        place = (event.get("run", ""), event.get("position", 0))
        if event.get("what") == "recorded" and event["status"] != "RETRYING":
            recorded.add(place)
        elif event.get("what") == "executing" and place in recorded:
            repeated.append(f"Executed again after it was recorded: {event['step']} of {event['run']}.")
    return repeated


def _mailed_orders(folder: Path) -> Iterable[str]:
    """Yield the order's number of each mail; a file holds those of one connection."""
    for path in sorted(folder.glob("*.log")):
        for text in path.read_text().split("-" * 79 + "\n"):
            message_id = email.message_from_string(text)["Message-ID"]
            if message_id:
                yield message_id.strip("<>").removeprefix("order-").partition("@")[0]
