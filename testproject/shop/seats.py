"""Seats that come back, and the people who wait for one: in the caller's transaction, a step's or a view's."""

from __future__ import annotations

import django_durable as durable
from shop.models import Event, Order, Ticket

RELEASED = "ticket released"  # the topic of the message


def give_back(order: Order, status: Order.Status, note: str = "") -> None:
    """End an order that did not come about: its seats go to the next in line, or are free again."""
    with_the_line_of(order.event_id)
    Order.objects.filter(pk=order.pk).update(status=status, note=note)
    Ticket.objects.filter(holder=order, status=Ticket.Status.RESERVED).update(
        status=Ticket.Status.AVAILABLE, holder=None
    )
    serve_the_line(order.event_id)


def cancel(order: Order) -> bool:
    """Cancel an order and its run; False if it is too late, because its card may be charged by now."""
    with_the_line_of(order.event_id)
    # The run leaves these two by conditional UPDATEs as well: of it and us, one comes first, and the other sees it.
    if not Order.objects.filter(pk=order.pk, status__in=Order.CANCELLABLE).update(status=Order.Status.CANCELLED):
        return False
    give_back(order, Order.Status.CANCELLED)
    # Once this has committed, no step of the run commits any more.
    durable.get_run(order.run_id).cancel("by the buyer")
    return True


def serve_the_line(event_id: int) -> None:
    """Hold each free seat for who is first in line, and tell that order's run."""
    with_the_line_of(event_id)
    free = Ticket.objects.filter(event=event_id, status=Ticket.Status.AVAILABLE)
    line = Order.objects.filter(event=event_id, status=Order.Status.WAITING)
    tickets = list(free.order_by("pk").select_for_update(no_key=True))
    orders = line.order_by("pk").select_for_update(no_key=True)[: len(tickets)]
    for ticket, order in zip(tickets, orders, strict=False):
        Ticket.objects.filter(pk=ticket.pk).update(status=Ticket.Status.RESERVED, holder=order)
        Order.objects.filter(pk=order.pk).update(status=Order.Status.OPEN)
        order.tickets.add(ticket)
        # The seat is held, and the run told, by one commit: nobody is told of a seat that another has.
        durable.send(order.run_id, ticket.pk, topic=RELEASED)


def with_the_line_of(event_id: int) -> None:
    """Take turns until the end of the transaction with all who join this line, leave it, or bring a seat back.

    Otherwise one might join while a seat comes back: neither would see the other, and both would wait.
    """
    Event.objects.select_for_update(no_key=True).get(pk=event_id)
