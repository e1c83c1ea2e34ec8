from django.apps import AppConfig
from django.conf import settings


class ShopConfig(AppConfig):
    name = "shop"
    verbose_name = "Ticket shop"

    def ready(self) -> None:
        if settings.STORY:
            from shop import story

            story.listen()
