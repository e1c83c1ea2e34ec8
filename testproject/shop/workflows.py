"""The shop's workflows. Each step's outcome is recorded, so a run whose process dies goes on after its last step."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.mail import EmailMessage

import django_durable as durable
from shop import payment_client, seats
from shop.forms import DecisionForm
from shop.models import Order, Ticket
from shop.payment_client import CardDeclined, PaymentUnavailable
from shop.story import told

APPROVAL = "large order"
TIME_TO_APPROVE = timedelta(days=2)
TIME_IN_LINE = timedelta(hours=24)


@durable.workflow
def checkout(order_id: int, amount: int, card: str, is_large: bool = False) -> dict[str, Any]:
    # The arguments are stored with the run, and people with the permission may read them. So `card` is a token, as
    # payment services hand them to the browser ("tok_4242"): a real card number never comes near the shop.
    # `is_large` is an argument, too: what is large may change while a run waits, and its course may not.
    if not reserve_tickets(order_id, is_large):
        return {"ok": False, "reason": "sold out"}
    if is_large:
        # Waits in the database alone: it holds no thread, and the servers may restart meanwhile.
        decision = durable.approval(APPROVAL, "shop.approve_order", form=DecisionForm, timeout=TIME_TO_APPROVE)
        note = (decision.data or {}).get("note", "")  # nothing, if nobody decided in time
        if not decision.approved:
            reject(order_id, note)
            send_regrets(order_id)
            return {"ok": False, "reason": "rejected"}
        approve(order_id, note)
    return pay(order_id, amount, card)


@durable.workflow
def waiting_list(order_id: int, amount: int, card: str) -> dict[str, Any]:
    """Wait for a seat that somebody gives back; from there on it is a checkout like any other."""
    ticket_id = durable.receive(seats.RELEASED, timeout=TIME_IN_LINE)
    # In the moment between the deadline and this step, a seat may have come: then it is held for this order.
    if ticket_id is None and leave_the_line(order_id):
        send_regrets(order_id)
        return {"ok": False, "reason": "nothing came free"}
    send_offer(order_id)
    outcome = pay(order_id, amount, card)
    if not outcome["ok"]:
        send_regrets(order_id)
    return outcome


def pay(order_id: int, amount: int, card: str) -> dict[str, Any]:
    """The second half of both: a plain function, whose steps are those of the run that calls it."""
    try:
        payment = charge_card(order_id, amount, card)
    except CardDeclined:
        release_tickets(order_id)
        return {"ok": False, "reason": "declined"}
    # If the payment service never answered, PaymentUnavailable ends the run as FAILED, and the tickets stay reserved:
    # nobody knows yet whether the card was charged. `get_run(...).resume()` asks again, with the same key.
    fulfil(order_id, payment)
    send_confirmation(order_id)
    return {"ok": True, "payment": payment}


@durable.step
@told
def reserve_tickets(order_id: int, is_large: bool) -> bool:
    """Hold all of the order's tickets for it; False, and none held, if somebody else was faster."""
    order = Order.objects.get(pk=order_id)
    # Of all buyers who try at the same time, the first to lock a row has it; one order for all, or two would deadlock.
    wanted = Ticket.objects.filter(pk__in=order.tickets.values("pk")).order_by("pk")
    is_free = all(ticket.is_available for ticket in wanted.select_for_update(no_key=True))
    if is_free:
        wanted.update(status=Ticket.Status.RESERVED, holder=order)
        order.status = Order.Status.APPROVAL if is_large else Order.Status.OPEN
    else:
        order.status = Order.Status.SOLD_OUT
    order.save(update_fields=["status"])
    return is_free


@durable.step
@told
def approve(order_id: int, note: str) -> None:
    """From here on the card may be charged: too late to cancel."""
    Order.objects.filter(pk=order_id).update(status=Order.Status.OPEN, note=note)


@durable.step
@told
def reject(order_id: int, note: str) -> None:
    seats.give_back(Order.objects.get(pk=order_id), Order.Status.REJECTED, note)


@durable.step
@told
def leave_the_line(order_id: int) -> bool:
    """The time is over; False if a seat came at the last moment."""
    waiting = Order.objects.filter(pk=order_id, status=Order.Status.WAITING)
    return bool(waiting.update(status=Order.Status.EXPIRED))


# Not atomic: no transaction can undo a charge, and none should be open while another company thinks.
@durable.step(atomic=False, max_attempts=8, retry_delay=0.2, retry_on=(PaymentUnavailable,), give_up_on=(CardDeclined,))
@told
def charge_card(order_id: int, amount: int, card: str) -> str:
    """Charge the card, once, and return the payment's reference."""
    order = Order.objects.get(pk=order_id)
    # The key is the same for every attempt, and after a crash: however often this asks, the card is charged once.
    key = durable.current().idempotency_key
    return payment_client.charge(key=key, order=order.public_id, amount=amount, card=card)


@durable.step
@told
def release_tickets(order_id: int) -> None:
    """The card was declined: let somebody else have the tickets."""
    seats.give_back(Order.objects.get(pk=order_id), Order.Status.DECLINED)


@durable.step
@told
def fulfil(order_id: int, payment: str) -> None:
    """The tickets are sold and the order paid: both, or, if this process dies before the commit, neither."""
    order = Order.objects.get(pk=order_id)
    sold = Ticket.objects.filter(holder=order, status=Ticket.Status.RESERVED).update(status=Ticket.Status.SOLD)
    if sold != order.tickets.count():
        raise RuntimeError(f"Order {order} was charged ({payment}), but its tickets are not reserved for it.")
    Order.objects.filter(pk=order_id).update(status=Order.Status.PAID, payment=payment)


# A step of its own, so that no transaction waits for a mail server. Mail knows no idempotency key: should the process
# die between the sending and the record, it goes out again, with the Message-ID of the first, which mailboxes know.
@durable.step(atomic=False, max_attempts=5)
@told
def send_confirmation(order_id: int) -> None:
    order = Order.objects.select_related("event").get(pk=order_id)
    place = f"{order.event.starts_at:%A, %d %B %Y, %H:%M} UTC\n{order.event.venue}"
    mail(order, "order", "Your ticket", f"{order.event}, seat {order.seats}\n{place}\n")


@durable.step(atomic=False, max_attempts=5)
@told
def send_offer(order_id: int) -> None:
    order = Order.objects.select_related("event").get(pk=order_id)
    mail(order, "offer", "A seat for you", f"{order.event}, seat {order.seats}, is yours. We charge your card now.\n")


@durable.step(atomic=False, max_attempts=5)
@told
def send_regrets(order_id: int) -> None:
    order = Order.objects.select_related("event").get(pk=order_id)
    why = {
        Order.Status.EXPIRED: "Nobody gave a seat back in time.",
        Order.Status.DECLINED: "Your card was declined, so the seat goes to the next in line.",
        Order.Status.REJECTED: f"Our box office did not approve your order. {order.note}".strip(),
    }[Order.Status(order.status)]
    mail(order, "regrets", "No ticket", f"{order.event}\n{why}\nNothing was charged.\n")


def mail(order: Order, kind: str, subject: str, body: str) -> None:
    EmailMessage(
        subject=f"{subject}: order {order}",
        body=body,
        to=[order.email],
        headers={"Message-ID": f"<{kind}-{order}@shop.example>"},
    ).send()
