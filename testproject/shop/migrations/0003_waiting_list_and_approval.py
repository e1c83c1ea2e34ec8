import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("shop", "0002_orders_of_several_tickets")]

    operations = [
        migrations.RemoveConstraint(model_name="order", name="a_ticket_is_sold_once"),
        migrations.RemoveField(model_name="order", name="ticket"),
        migrations.AlterField(
            model_name="order",
            name="event",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.PROTECT, related_name="orders", to="shop.event"
            ),
        ),
        migrations.AlterField(
            model_name="order",
            name="status",
            field=models.CharField(
                choices=[
                    ("waiting", "Waiting"),
                    ("open", "Open"),
                    ("approval", "Approval"),
                    ("paid", "Paid"),
                    ("declined", "Declined"),
                    ("rejected", "Rejected"),
                    ("sold_out", "Sold Out"),
                    ("expired", "Expired"),
                    ("cancelled", "Cancelled"),
                ],
                default="open",
                max_length=10,
            ),
        ),
        migrations.AddField(
            model_name="order",
            name="note",
            field=models.TextField(blank=True, verbose_name="note of the box office"),
        ),
        migrations.AlterModelOptions(
            name="order",
            options={
                "ordering": ("-created_at",),
                "permissions": (("approve_order", "Can approve large orders"),),
            },
        ),
    ]
