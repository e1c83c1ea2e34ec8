"""Events, their tickets, and the orders for them. The workflows in workflows.py move the last two along."""

from __future__ import annotations

import secrets
import uuid

from django.core.validators import MinValueValidator
from django.db import models
from django.urls import reverse

ALPHABET = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # nothing that reads like something else


def new_public_id() -> str:
    """Return an order number: short enough to be read out, too many to be guessed."""
    return "".join(secrets.choice(ALPHABET) for _ in range(10))


class Event(models.Model):
    name = models.CharField(max_length=200)
    venue = models.CharField(max_length=200)
    starts_at = models.DateTimeField()
    price = models.PositiveIntegerField(help_text="In cents.", validators=[MinValueValidator(1)])

    class Meta:
        ordering = ("starts_at",)

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("event", args=[self.pk])


class Ticket(models.Model):
    """One seat. It goes from available to reserved to sold, or back to available; `holder` says for whom."""

    class Status(models.TextChoices):
        AVAILABLE = "available"
        # Held for an order that is not paid yet.
        RESERVED = "reserved"
        SOLD = "sold"

    event = models.ForeignKey(Event, on_delete=models.CASCADE, related_name="tickets")
    seat = models.CharField(max_length=10)
    status = models.CharField(max_length=10, choices=Status, default=Status.AVAILABLE)
    holder = models.ForeignKey("Order", null=True, blank=True, on_delete=models.SET_NULL, related_name="+")

    class Meta:
        ordering = ("event", "seat")
        constraints = (models.UniqueConstraint(fields=["event", "seat"], name="one_ticket_per_seat"),)

    def __str__(self) -> str:
        return f"{self.event}, seat {self.seat}"

    @property
    def is_available(self) -> bool:
        return self.status == self.Status.AVAILABLE


class Order(models.Model):
    """A buyer wants tickets. Many may want the same ones: one of them gets them."""

    class Status(models.TextChoices):
        # In line for a ticket: the event is sold out.
        WAITING = "waiting"
        # The checkout is under way.
        OPEN = "open"
        # It holds its tickets, and the box office is to look at it.
        APPROVAL = "approval"
        PAID = "paid"
        DECLINED = "declined"
        # The box office said no, or nothing in time.
        REJECTED = "rejected"
        # Somebody else was faster.
        SOLD_OUT = "sold_out"
        # Nobody gave a ticket back in time.
        EXPIRED = "expired"
        CANCELLED = "cancelled"

    # While it is one of these, nothing has been charged, and nothing will be before somebody else acts.
    CANCELLABLE = (Status.WAITING, Status.APPROVAL)
    # An order of more tickets than this needs an approval.
    LARGE = 4

    public_id = models.CharField("order number", max_length=10, unique=True, default=new_public_id, editable=False)
    # Drawn when the form is shown: the form posted twice is one order.
    form_id = models.UUIDField(unique=True, default=uuid.uuid4, editable=False)
    event = models.ForeignKey(Event, on_delete=models.PROTECT, related_name="orders")
    # Those it is about, whatever became of it. Whose they are, they say themselves: see Ticket.holder.
    tickets = models.ManyToManyField(Ticket, related_name="orders")
    email = models.EmailField()
    amount = models.PositiveIntegerField(help_text="In cents.")
    status = models.CharField(max_length=10, choices=Status, default=Status.OPEN)
    payment = models.CharField("payment reference", max_length=100, blank=True)
    note = models.TextField("note of the box office", blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-created_at",)
        permissions = (("approve_order", "Can approve large orders"),)

    def __str__(self) -> str:
        return self.public_id

    def get_absolute_url(self) -> str:
        return reverse("order", args=[self.public_id])

    @property
    def run_id(self) -> str:
        """The id of this order's one run: to start it again is to find it."""
        return f"order-{self.public_id}"

    @property
    def seats(self) -> str:
        return ", ".join(ticket.seat for ticket in self.tickets.all())

    @property
    def is_large(self) -> bool:
        return len(self.tickets.all()) > self.LARGE

    @property
    def is_cancellable(self) -> bool:
        return self.status in self.CANCELLABLE
