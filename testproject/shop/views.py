"""ATOMIC_REQUESTS is on: a view is one transaction. Those that only read opt out, so that they wait for nobody."""

from __future__ import annotations

from datetime import timedelta

from django.contrib import messages
from django.contrib.auth.decorators import login_required, permission_required
from django.db.models import Count, Q
from django.db.transaction import non_atomic_requests
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

import django_durable as durable
from django_durable.models import WorkflowRun
from shop import seats
from shop.forms import BuyForm, DecisionForm, OrderForm, WaitForm
from shop.models import Event, Order, Ticket
from shop.progress import follow
from shop.workflows import APPROVAL, TIME_IN_LINE, checkout, waiting_list


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
    is_sold_out = not event.tickets.filter(status=Ticket.Status.AVAILABLE).exists()
    return _render_event(request, WaitForm(event=event) if is_sold_out else BuyForm(event=event))


@require_POST
def buy(request: HttpRequest, event_id: int) -> HttpResponse:
    """Store the order and start its checkout: one commit. A worker does the rest."""
    event = get_object_or_404(Event, pk=event_id)
    form = BuyForm(request.POST, event=event)
    if not form.is_valid():
        return _render_event(request, form, status=422)
    order = form.save()
    # The same run id starts one run, however often the form arrives.
    checkout.using(run_id=order.run_id, related=order, attributes={"order": order.public_id}).start(
        order.pk, order.amount, form.cleaned_data["card"], is_large=order.is_large
    )
    return redirect(order)


@require_POST
def wait(request: HttpRequest, event_id: int) -> HttpResponse:
    """Put the buyer in line: the order, and a run that waits for a seat."""
    event = get_object_or_404(Event, pk=event_id)
    form = WaitForm(request.POST, event=event)
    if not form.is_valid():
        return _render_event(request, form, status=422)
    order = form.save()
    waiting_list.using(run_id=order.run_id, related=order, attributes={"order": order.public_id}).start(
        order.pk, order.amount, form.cleaned_data["card"]
    )
    # A seat may have been given back while the form was filled in.
    seats.serve_the_line(event.pk)
    return redirect(order)


@require_POST
def cancel(request: HttpRequest, public_id: str) -> HttpResponse:
    order = get_object_or_404(Order, public_id=public_id)
    if not seats.cancel(order):
        messages.warning(request, "It is too late to cancel this order.")
    return redirect(order)


@non_atomic_requests
@require_safe
@never_cache
@login_required
@permission_required("shop.approve_order", raise_exception=True)
def approvals(request: HttpRequest) -> HttpResponse:
    """The box office's page: the large orders that wait for its yes or no."""
    runs = WorkflowRun.objects.waiting().filter(waiting_for=f"approval:{APPROVAL}")
    undecided = set(runs.values_list("pk", flat=True))
    large = Order.objects.filter(status=Order.Status.APPROVAL).select_related("event").prefetch_related("tickets")
    orders = [order for order in large.order_by("pk") if order.run_id in undecided]
    forms = [(order, DecisionForm(auto_id=f"{order}-%s")) for order in orders]
    return render(request, "shop/approvals.html", {"forms": forms, "large": Order.LARGE})


@require_POST
@login_required
@permission_required("shop.approve_order", raise_exception=True)
def decide(request: HttpRequest, public_id: str) -> HttpResponse:
    order = get_object_or_404(Order, public_id=public_id)
    is_approved = "approve" in request.POST
    try:
        # It asks for the approval's permission again, and cleans the data by its form: see checkout().
        durable.get_run(order.run_id).decide(
            APPROVAL, is_approved, by=request.user, data={"note": request.POST.get("note", "")}
        )
    except (durable.AlreadyDecided, durable.NothingToDecide):
        messages.warning(request, f"Order {order} does not wait for a decision: it was made, or the buyer cancelled.")
    except durable.InvalidInput as error:
        messages.error(request, " ".join(error.messages))
    else:
        messages.success(request, f"Order {order} is {'approved' if is_approved else 'rejected'}.")
    return redirect("approvals")


@non_atomic_requests
@require_safe
@never_cache
def order(request: HttpRequest, public_id: str) -> HttpResponse:
    return _render_order(request, public_id, "shop/order.html")


@non_atomic_requests
@require_safe
@never_cache
def order_progress(request: HttpRequest, public_id: str) -> HttpResponse:
    """The part of the order's page that changes: order.js asks for it whenever the run has come further."""
    return _render_order(request, public_id, "shop/_progress.html")


def _render_event(request: HttpRequest, form: OrderForm, status: int = 200) -> HttpResponse:
    context = {"event": form.event, "form": form, "large": Order.LARGE, "hours": TIME_IN_LINE // timedelta(hours=1)}
    return render(request, "shop/event.html", context, status=status)


def _render_order(request: HttpRequest, public_id: str, template: str) -> HttpResponse:
    order = get_object_or_404(Order.objects.select_related("event"), public_id=public_id)
    return render(request, template, {"order": order, "progress": follow(order)})
