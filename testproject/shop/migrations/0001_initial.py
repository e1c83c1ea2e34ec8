import uuid

import django.core.validators
import django.db.models.deletion
from django.db import migrations, models

import shop.models


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Event",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=200)),
                ("venue", models.CharField(max_length=200)),
                ("starts_at", models.DateTimeField()),
                (
                    "price",
                    models.PositiveIntegerField(
                        help_text="In cents.", validators=[django.core.validators.MinValueValidator(1)]
                    ),
                ),
            ],
            options={
                "ordering": ("starts_at",),
            },
        ),
        migrations.CreateModel(
            name="Order",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                (
                    "public_id",
                    models.CharField(
                        default=shop.models.new_public_id,
                        editable=False,
                        max_length=10,
                        unique=True,
                        verbose_name="order number",
                    ),
                ),
                ("form_id", models.UUIDField(default=uuid.uuid4, editable=False, unique=True)),
                ("email", models.EmailField(max_length=254)),
                ("amount", models.PositiveIntegerField(help_text="In cents.")),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("open", "Open"),
                            ("paid", "Paid"),
                            ("declined", "Declined"),
                            ("sold_out", "Sold Out"),
                        ],
                        default="open",
                        max_length=10,
                    ),
                ),
                ("payment", models.CharField(blank=True, max_length=100, verbose_name="payment reference")),
                ("created_at", models.DateTimeField(auto_now_add=True)),
            ],
            options={
                "ordering": ("-created_at",),
            },
        ),
        migrations.CreateModel(
            name="Ticket",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("seat", models.CharField(max_length=10)),
                (
                    "status",
                    models.CharField(
                        choices=[("available", "Available"), ("reserved", "Reserved"), ("sold", "Sold")],
                        default="available",
                        max_length=10,
                    ),
                ),
                (
                    "event",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, related_name="tickets", to="shop.event"
                    ),
                ),
                (
                    "holder",
                    models.ForeignKey(
                        blank=True,
                        null=True,
                        on_delete=django.db.models.deletion.SET_NULL,
                        related_name="+",
                        to="shop.order",
                    ),
                ),
            ],
            options={
                "ordering": ("event", "seat"),
            },
        ),
        migrations.AddField(
            model_name="order",
            name="ticket",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.PROTECT, related_name="orders", to="shop.ticket"
            ),
        ),
        migrations.AddConstraint(
            model_name="ticket",
            constraint=models.UniqueConstraint(fields=("event", "seat"), name="one_ticket_per_seat"),
        ),
        migrations.AddConstraint(
            model_name="order",
            constraint=models.UniqueConstraint(
                condition=models.Q(("status", "paid")), fields=("ticket",), name="a_ticket_is_sold_once"
            ),
        ),
    ]
