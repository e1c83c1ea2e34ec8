import django.db.models.deletion
from django.db import migrations, models


def take_over(apps, schema_editor):
    Order = apps.get_model("shop", "Order")
    for order in Order.objects.select_related("ticket"):
        order.event_id = order.ticket.event_id
        order.save(update_fields=["event"])
        order.tickets.add(order.ticket)


class Migration(migrations.Migration):
    dependencies = [("shop", "0001_initial")]

    operations = [
        # The tickets' `orders` are those of the new relation.
        migrations.AlterField(
            model_name="order",
            name="ticket",
            field=models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, related_name="+", to="shop.ticket"),
        ),
        migrations.AddField(
            model_name="order",
            name="event",
            field=models.ForeignKey(
                null=True, on_delete=django.db.models.deletion.PROTECT, related_name="orders", to="shop.event"
            ),
        ),
        migrations.AddField(
            model_name="order",
            name="tickets",
            field=models.ManyToManyField(related_name="orders", to="shop.ticket"),
        ),
        migrations.RunPython(take_over),
    ]
