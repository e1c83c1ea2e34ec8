"""One run's status and progress: ``path("durable/", include("django_durable.urls"))``."""

from __future__ import annotations

from django.urls import path

from django_durable import views

app_name = "durable"
urlpatterns = [
    path("status/<token>/", views.status, name="status"),
    path("progress/<token>/", views.progress, name="progress"),
]
