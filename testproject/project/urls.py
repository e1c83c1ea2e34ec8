from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path("admin/", admin.site.urls),
    path("durable/", include("django_durable.urls")),
    path("", include("shop.urls")),
]
