from __future__ import annotations

import uuid
from typing import Any

from django import forms

from shop.models import Event, Order

CARDS = {
    "tok_4242": "Visa ending in 4242",
    "tok_5556": "Mastercard ending in 5556",
    "tok_0002": "Visa ending in 0002 (its bank declines)",
}


class SeatSelect(forms.RadioSelect):
    """A radio button for each seat; one that is taken cannot be chosen."""

    def create_option(self, name: str, value: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        option = super().create_option(name, value, *args, **kwargs)
        if not value.instance.is_available:
            option["attrs"]["disabled"] = True
        return option


class SeatField(forms.ModelChoiceField):
    widget = SeatSelect

    def label_from_instance(self, ticket: Any) -> str:
        return str(ticket.seat)


class BuyForm(forms.Form):
    # A taken seat passes here: the buyer may have been the one who took it, by a double click. The checkout decides.
    seat = SeatField(queryset=None, empty_label=None)
    email = forms.EmailField(label="Your e-mail address", widget=forms.EmailInput(attrs={"autocomplete": "email"}))
    # In a real shop the payment service's own form in the browser makes this token out of the card's number.
    card = forms.ChoiceField(label="Test card", choices=list(CARDS.items()))
    form_id = forms.UUIDField(widget=forms.HiddenInput, initial=uuid.uuid4)

    def __init__(self, *args: Any, event: Event, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.event = event
        self.fields["seat"].queryset = event.tickets.select_related("event")

    def save(self) -> Order:
        """Return the order of this form: a new one, or, if the form was posted before, the same again."""
        order, _ = Order.objects.get_or_create(
            form_id=self.cleaned_data["form_id"],
            defaults={
                "ticket": self.cleaned_data["seat"],
                "email": self.cleaned_data["email"],
                "amount": self.event.price,
            },
        )
        return order
