from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from django.utils import timezone

from shop.models import Event, Ticket

EVENTS = (
    ("String quartet by candlelight", "Old Town Hall", 4900),
    ("The long way home: a slide show", "Harbour Library", 1250),
    ("Open-air cinema: Modern Times", "Castle Garden", 900),
)
SEATS = [f"{row}{number}" for row in "ABCD" for number in range(1, 7)]


class Command(BaseCommand):
    help = "Fill an empty shop with events and tickets, and make the demo's administrator: admin, password admin."

    def handle(self, *args: Any, **options: Any) -> None:
        if not settings.DEBUG:
            raise CommandError("DEBUG is off: this makes an administrator whose password everybody knows.")
        with transaction.atomic():
            if not Event.objects.exists():
                self.make_events()
            User = get_user_model()
            if not User.objects.filter(username="admin").exists():
                User.objects.create_superuser("admin", "admin@shop.example", "admin")
        self.stdout.write(
            f"{Event.objects.count()} events, {Ticket.objects.count()} tickets; user admin, password admin."
        )

    def make_events(self) -> None:
        evening = timezone.now().replace(hour=20, minute=0, second=0, microsecond=0)
        for days, (name, venue, price) in enumerate(EVENTS, start=1):
            event = Event.objects.create(
                name=name, venue=venue, price=price, starts_at=evening + timedelta(days=7 * days)
            )
            Ticket.objects.bulk_create(Ticket(event=event, seat=seat) for seat in SEATS)
