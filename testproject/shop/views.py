"""ATOMIC_REQUESTS is on: a view is one transaction. Those that only read opt out, so that they wait for nobody."""

from __future__ import annotations

from django.db.models import Count, Q
from django.db.transaction import non_atomic_requests
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

from shop.forms import BuyForm
from shop.models import Event, Order, Ticket
from shop.progress import follow
from shop.workflows import checkout


@non_atomic_requests
@require_safe
def events(request: HttpRequest) -> HttpResponse:
    available = Count("tickets", filter=Q(tickets__status=Ticket.Status.AVAILABLE))
    return render(request, "shop/events.html", {"events": Event.objects.annotate(available=available)})


@non_atomic_requests
@require_safe
@never_cache  # the form's id is drawn anew for each visit
def event(request: HttpRequest, event_id: int) -> HttpResponse:
    event = get_object_or_404(Event, pk=event_id)
    return render(request, "shop/event.html", {"event": event, "form": BuyForm(event=event)})


@require_POST
def buy(request: HttpRequest, event_id: int) -> HttpResponse:
    """Store the order and start its checkout: two INSERTs, one commit. A worker does the rest."""
    event = get_object_or_404(Event, pk=event_id)
    form = BuyForm(request.POST, event=event)
    if not form.is_valid():
        return render(request, "shop/event.html", {"event": event, "form": form}, status=422)
    order = form.save()
    # The same run id starts one run, however often the form arrives.
    checkout.using(run_id=order.run_id, related=order, attributes={"order": order.public_id}).start(
        order.pk, order.amount, form.cleaned_data["card"]
    )
    return redirect(order)


@non_atomic_requests
@require_safe
@never_cache
def order(request: HttpRequest, public_id: str) -> HttpResponse:
    return _render_order(request, public_id, "shop/order.html")


@non_atomic_requests
@require_safe
@never_cache
def order_progress(request: HttpRequest, public_id: str) -> HttpResponse:
    """The part of the order's page that changes: order.js asks for it until the checkout has ended."""
    return _render_order(request, public_id, "shop/_progress.html")


def _render_order(request: HttpRequest, public_id: str, template: str) -> HttpResponse:
    order = get_object_or_404(Order.objects.select_related("ticket__event"), public_id=public_id)
    return render(request, template, {"order": order, "progress": follow(order)})
