"""The checkout. Each step's outcome is recorded, so a checkout whose process dies goes on after its last step."""

from __future__ import annotations

from typing import Any

from django.core.mail import EmailMessage

import django_durable as durable
from shop import payment_client
from shop.models import Order, Ticket
from shop.payment_client import CardDeclined, PaymentUnavailable
from shop.story import told


@durable.workflow
def checkout(order_id: int, amount: int, card: str) -> dict[str, Any]:
    # The arguments are stored with the run, and people with the permission may read them. So `card` is a token, as
    # payment services hand them to the browser ("tok_4242"): a real card number never comes near the shop.
    if not reserve_ticket(order_id):
        return {"ok": False, "reason": "sold out"}
    try:
        payment = charge_card(order_id, amount, card)
    except CardDeclined:
        release_ticket(order_id)
        return {"ok": False, "reason": "declined"}
    # If the payment service never answered, PaymentUnavailable ends the run as FAILED, and the ticket stays reserved:
    # nobody knows yet whether the card was charged. "Resume" in the admin asks again, with the same key.
    fulfil(order_id, payment)
    send_confirmation(order_id)
    return {"ok": True, "payment": payment}


@durable.step
@told
def reserve_ticket(order_id: int) -> bool:
    """Hold the ticket for this order; False if somebody else was faster."""
    order = Order.objects.get(pk=order_id)
    # One conditional UPDATE: of all buyers who try at the same time, it matches the row for one.
    reserved = Ticket.objects.filter(pk=order.ticket_id, status=Ticket.Status.AVAILABLE).update(
        status=Ticket.Status.RESERVED, holder=order
    )
    if not reserved:
        Order.objects.filter(pk=order_id).update(status=Order.Status.SOLD_OUT)
    return bool(reserved)


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
def release_ticket(order_id: int) -> None:
    """The card was declined: let somebody else have the ticket."""
    Ticket.objects.filter(holder=order_id, status=Ticket.Status.RESERVED).update(
        status=Ticket.Status.AVAILABLE, holder=None
    )
    Order.objects.filter(pk=order_id).update(status=Order.Status.DECLINED)


@durable.step
@told
def fulfil(order_id: int, payment: str) -> None:
    """The ticket is sold and the order paid: both, or, if this process dies before the commit, neither."""
    sold = Ticket.objects.filter(holder=order_id, status=Ticket.Status.RESERVED).update(status=Ticket.Status.SOLD)
    if not sold:
        raise RuntimeError(f"Order {order_id} was charged ({payment}), but its ticket is not reserved for it.")
    Order.objects.filter(pk=order_id).update(status=Order.Status.PAID, payment=payment)


# A step of its own, so that no transaction waits for a mail server. Mail knows no idempotency key: should the process
# die between the sending and the record, it goes out again, with the Message-ID of the first, which mailboxes know.
@durable.step(atomic=False, max_attempts=5)
@told
def send_confirmation(order_id: int) -> None:
    order = Order.objects.select_related("ticket__event").get(pk=order_id)
    EmailMessage(
        subject=f"Your ticket: order {order.public_id}",
        body=f"{order.ticket}\n{order.ticket.event.starts_at:%A, %d %B %Y, %H:%M} UTC\n{order.ticket.event.venue}\n",
        to=[order.email],
        headers={"Message-ID": f"<order-{order.public_id}@shop.example>"},
    ).send()
