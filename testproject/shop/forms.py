from __future__ import annotations

import uuid
from collections.abc import Collection
from typing import Any

from django import forms

from shop.models import Event, Order, Ticket

CARDS = {
    "tok_4242": "Visa ending in 4242",
    "tok_5556": "Mastercard ending in 5556",
    "tok_0002": "Visa ending in 0002 (its bank declines)",
}


class SeatSelect(forms.CheckboxSelectMultiple):
    """A box for each seat; one that is taken cannot be chosen."""

    def create_option(self, name: str, value: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        option = super().create_option(name, value, *args, **kwargs)
        if not value.instance.is_available:
            option["attrs"]["disabled"] = True
        return option


class SeatsField(forms.ModelMultipleChoiceField):
    widget = SeatSelect

    def label_from_instance(self, ticket: Any) -> str:
        return str(ticket.seat)


class OrderForm(forms.Form):
    """What both forms ask for."""

    email = forms.EmailField(label="Your e-mail address", widget=forms.EmailInput(attrs={"autocomplete": "email"}))
    # In a real shop the payment service's own form in the browser makes this token out of the card's number.
    card = forms.ChoiceField(label="Test card", choices=list(CARDS.items()))
    form_id = forms.UUIDField(widget=forms.HiddenInput, initial=uuid.uuid4)

    def __init__(self, *args: Any, event: Event, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.event = event

    def store(self, tickets: Collection[Ticket], **fields: Any) -> Order:
        """Return the order of this form: a new one, or, if the form was posted before, the same again."""
        defaults = {"event": self.event, "email": self.cleaned_data["email"], **fields}
        order, is_new = Order.objects.get_or_create(form_id=self.cleaned_data["form_id"], defaults=defaults)
        if is_new:
            order.tickets.set(tickets)
        return order


class BuyForm(OrderForm):
    # A taken seat passes here: the buyer may have been the one who took it, by a double click. The checkout decides.
    seat = SeatsField(queryset=None, error_messages={"required": "Choose a seat."})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["seat"].queryset = self.event.tickets.select_related("event")

    def save(self) -> Order:
        tickets = self.cleaned_data["seat"]
        return self.store(tickets, amount=self.event.price * len(tickets))


class WaitForm(OrderForm):
    """For one seat, whichever is given back."""

    def save(self) -> Order:
        return self.store([], amount=self.event.price, status=Order.Status.WAITING)


class DecisionForm(forms.Form):
    """What the box office says to a large order, beside yes or no."""

    note = forms.CharField(label="Note to the buyer", max_length=200, required=False)
