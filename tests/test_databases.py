"""The suite runs where it says it runs, and processes that it starts work on the same databases."""

import os
import subprocess
import sys

import pytest
from django.conf import settings
from django.db import connection, connections

from tests.app.models import Ledger


def test_the_database_is_the_one_that_was_asked_for():
    assert connection.vendor == os.environ["DURABLE_EXPECT_VENDOR"]
    assert connections["other"].vendor == connection.vendor


@pytest.mark.django_db
def test_each_half_has_the_database_that_its_tests_expect():
    if connection.vendor == "sqlite":
        # A file that many can write to.
        assert os.path.exists(connection.settings_dict["NAME"])
        with connection.cursor() as cursor:
            assert cursor.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.transaction_mode == "IMMEDIATE"
    else:
        # One of this checkout's own, on a server that others may use.
        assert settings.CHECKOUT in connection.settings_dict["NAME"]


@pytest.mark.django_db(databases=["default", "other"])
def test_the_other_database_is_another():
    Ledger.objects.using("other").create(key="there")
    assert not Ledger.objects.filter(key="there").exists()


@pytest.mark.django_db(transaction=True)
def test_a_process_of_the_test_sees_its_data(process_env):
    Ledger.objects.create(key="from the test")
    script = (
        "import django; django.setup()\n"
        "from tests.app.models import Ledger\n"
        "Ledger.objects.filter(key='from the test').update(note='seen')"
    )
    subprocess.run([sys.executable, "-c", script], env=process_env, check=True)
    assert Ledger.objects.get(key="from the test").note == "seen"
