"""What an order's page shows of its run: the recorded steps, in the buyer's words."""

from __future__ import annotations

from dataclasses import dataclass

from django_durable.models import WorkflowRun
from django_durable.states import RunStatus, StepStatus
from shop.models import Order, Ticket
from shop.workflows import waiting_list

# What the page says above the stages, and the note below them, by the order's status.
HEADLINES = {
    Order.Status.WAITING: "You are on the waiting list",
    Order.Status.OPEN: "We are working on it",
    Order.Status.APPROVAL: "Our box office looks at your order",
    Order.Status.PAID: "The seat is yours",
    Order.Status.DECLINED: "Your card was declined",
    Order.Status.REJECTED: "We could not approve your order",
    Order.Status.SOLD_OUT: "Somebody else was faster",
    Order.Status.EXPIRED: "Nobody gave a seat back in time",
    Order.Status.CANCELLED: "You cancelled this order",
}
NOTES = {
    Order.Status.OPEN: "You may close this page: your order goes on by itself.",
    Order.Status.WAITING: "We charge your card when a seat comes back, and write to you. You may close this page.",
    Order.Status.APPROVAL: "Your seats are held meanwhile, and nothing is charged. You may close this page.",
    Order.Status.DECLINED: "Nothing was charged, and your seat is free again.",
    Order.Status.REJECTED: "Nothing was charged, and your seats are free again.",
    Order.Status.SOLD_OUT: "Nothing was charged. Choose another seat.",
    Order.Status.EXPIRED: "Nothing was charged.",
    Order.Status.CANCELLED: "Nothing was charged.",
}
UNDER_WAY = (Order.Status.WAITING, Order.Status.OPEN, Order.Status.APPROVAL)
REFUSED = (Order.Status.REJECTED, Order.Status.EXPIRED)
PAYING = {
    "charge_card": "Charge your card",
    "fulfil": "Issue your ticket",
    "send_confirmation": "Send your confirmation",
}


@dataclass(frozen=True)
class Stage:
    label: str
    state: str  # done, now, later, or failed
    note: str = ""


@dataclass(frozen=True)
class Progress:
    headline: str
    note: str
    stages: list[Stage]
    is_finished: bool


def follow(order: Order) -> Progress:
    """Return how far this order's run has come."""
    status = Order.Status(order.status)
    run = WorkflowRun.objects.filter(pk=order.run_id).first()
    if run is None:  # pruned long ago; the order itself remains
        return Progress(HEADLINES[status], "", [], is_finished=True)
    steps = {step.name: step for step in run.steps.all()}
    stages: list[Stage] = []
    # The first stage that is not done: it is under way, or it is what went wrong, or nobody got there.
    next_state = "now" if not run.is_finished else "failed" if status in REFUSED else "later"
    for name, label in _labels(order, run).items():
        step = steps.get(name)
        note = ""
        if step is None:
            state = next_state
        elif step.status == StepStatus.SUCCEEDED:
            state = "done"
        elif step.status == StepStatus.RETRYING:
            state, note = "now", f"It did not work at once; attempt {step.attempts + 1}"
        else:
            state = "failed"
        if state != "done":
            next_state = "later"
        stages.append(Stage(label, state, note))
    return Progress(HEADLINES[status], _note(order, run), stages, run.is_finished)


def _labels(order: Order, run: WorkflowRun) -> dict[str, str]:
    """What each of the run's stages is called, by the name of the step that completes it."""
    if run.workflow == waiting_list.name:
        return {"send_offer": "Wait for a seat", **PAYING}
    approval = {"approve": "Ask our box office"} if order.is_large else {}
    return {"reserve_tickets": "Reserve your seats" if approval else "Reserve your seat", **approval, **PAYING}


def _note(order: Order, run: WorkflowRun) -> str:
    if order.status == Order.Status.PAID:
        sent = run.status == RunStatus.SUCCEEDED
        return f"We wrote to {order.email}." if sent else f"Your confirmation goes to {order.email}."
    if run.is_finished and order.status in UNDER_WAY:
        seats = "stays reserved" if Ticket.objects.filter(holder=order).exists() else "is not reserved"
        return f"Something went wrong on our side. Your seat {seats}, and we will write to you."
    return NOTES[Order.Status(order.status)]
