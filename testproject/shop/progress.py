"""What an order's page shows of its run: the recorded steps, in the buyer's words."""

from __future__ import annotations

from dataclasses import dataclass

from django_durable.models import WorkflowRun
from django_durable.states import RunStatus, StepStatus
from shop.models import Order

STAGES = {
    "reserve_ticket": "Reserve your seat",
    "charge_card": "Charge your card",
    "fulfil": "Issue your ticket",
    "send_confirmation": "Send your confirmation",
}
# What the page says above the stages, by the order's status.
HEADLINES = {
    Order.Status.OPEN: "We are working on it",
    Order.Status.PAID: "The seat is yours",
    Order.Status.DECLINED: "Your card was declined",
    Order.Status.SOLD_OUT: "Somebody else was faster",
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
    """Return how far this order's checkout has come."""
    run = WorkflowRun.objects.filter(pk=order.run_id).first()
    if run is None:  # pruned long ago; the order itself remains
        return Progress(HEADLINES[Order.Status(order.status)], "", [], is_finished=True)
    steps = {step.name: step for step in run.steps.all()}
    stages: list[Stage] = []
    is_open = not run.is_finished
    for name, label in STAGES.items():
        step = steps.get(name)
        note = ""
        if step is None:
            state = "now" if is_open else "later"
        elif step.status == StepStatus.SUCCEEDED:
            state = "done"
        elif step.status == StepStatus.RETRYING:
            state, note = "now", f"The payment service is busy; attempt {step.attempts + 1}"
        else:
            state = "failed"
        is_open = is_open and state == "done"
        stages.append(Stage(label, state, note))
    return Progress(HEADLINES[Order.Status(order.status)], _note(order, run), stages, run.is_finished)


def _note(order: Order, run: WorkflowRun) -> str:
    if order.status == Order.Status.DECLINED:
        return "Nothing was charged, and your seat is free again."
    if order.status == Order.Status.SOLD_OUT:
        return "Nothing was charged. Choose another seat."
    if order.status == Order.Status.PAID:
        return f"Your confirmation goes to {order.email}." if not run.is_finished else f"We wrote to {order.email}."
    if run.status in (RunStatus.FAILED, RunStatus.DEAD, RunStatus.CANCELLED):
        return "Something went wrong on our side. Your seat stays reserved, and we will write to you."
    return "You may close this page: your order goes on by itself."
