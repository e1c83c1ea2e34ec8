from django.urls import path

from shop import views

urlpatterns = [
    path("", views.events, name="events"),
    path("events/<int:event_id>/", views.event, name="event"),
    path("events/<int:event_id>/buy/", views.buy, name="buy"),
    path("events/<int:event_id>/wait/", views.wait, name="wait"),
    path("orders/<slug:public_id>/", views.order, name="order"),
    path("orders/<slug:public_id>/progress/", views.order_progress, name="order-progress"),
    path("orders/<slug:public_id>/cancel/", views.cancel, name="cancel"),
    path("orders/<slug:public_id>/decide/", views.decide, name="decide"),
    path("approvals/", views.approvals, name="approvals"),
]
