from django.apps import AppConfig
from django.core.signals import request_started
from django.db.models.signals import post_migrate
from django.utils.module_loading import autodiscover_modules
from django.utils.translation import gettext_lazy as _

from django_durable.conf import options


class DurableConfig(AppConfig):
    name = "django_durable"
    label = "django_durable"
    verbose_name = _("Durable workflows")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Find the workflows and connect what listens. No thread, query or connection: every command comes by here."""
        from django_durable import checks, handles, logs  # noqa: F401 (each registers itself)
        from django_durable.engine.heartbeat import forget_inline_leases

        post_migrate.connect(forget_inline_leases, dispatch_uid="django_durable.leases")
        autodiscover_modules("workflows")
        request_started.connect(_start_embedded_worker, dispatch_uid="django_durable.embedded")


def _start_embedded_worker(**kwargs: object) -> None:
    if options().EMBEDDED_WORKER:
        from django_durable.worker.embedded import start_embedded_worker

        start_embedded_worker()
