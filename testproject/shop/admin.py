from __future__ import annotations

from django.contrib import admin
from django.contrib.admin.utils import quote
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html

from shop.models import Event, Order, Ticket


class TicketInline(admin.TabularInline):
    model = Ticket
    fields = ("seat", "status", "holder")
    readonly_fields = ("status", "holder")
    extra = 0


@admin.register(Event)
class EventAdmin(admin.ModelAdmin):
    list_display = ("name", "venue", "starts_at", "price")
    search_fields = ("name",)
    inlines = (TicketInline,)


@admin.register(Order)
class OrderAdmin(admin.ModelAdmin):
    """To look at: the shop changes orders, nobody else."""

    list_display = ("public_id", "status", "run", "event", "email", "payment")
    list_filter = ("status",)
    list_select_related = ("event",)
    search_fields = ("=public_id", "=email", "=payment")

    @admin.display(description="run")
    def run(self, order: Order) -> str:
        url = reverse("admin:django_durable_workflowrun_change", args=[quote(order.run_id)])
        return format_html('<a href="{}">{}</a>', url, order.run_id)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Order | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Order | None = None) -> bool:
        return False
