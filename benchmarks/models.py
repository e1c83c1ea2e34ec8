from django.db import models


class Entry(models.Model):
    """What a user's step writes."""

    text = models.CharField(max_length=100)
