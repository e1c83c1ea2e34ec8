"""What the workflows under test write to. Without migrations: the test databases get the tables directly."""

from django.db import models


class Ledger(models.Model):
    """One row for each time that something happened: twice is two rows, and a test sees it."""

    key = models.CharField(max_length=200, db_index=True)
    note = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)


class Account(models.Model):
    name = models.CharField(max_length=200)
    balance = models.IntegerField(default=0)
