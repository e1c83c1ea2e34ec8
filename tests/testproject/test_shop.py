"""The shop's own tests (testproject/shop/tests.py) run in its own project, with its own settings."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.testproject.processes import run


@pytest.mark.timeout(180)
def test_the_shops_own_tests_pass(tmp_path: Path):
    # On the database of this session: Django makes a test database of the shop's own there.
    env = {"SHOP_VAR": str(tmp_path), "DATABASE_URL": os.environ["DATABASE_URL"]}
    done = run("-W", "error", "manage.py", "test", "--noinput", timeout=150, **env)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^Found [1-9]\d* test", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^OK$", done.stdout, re.MULTILINE), f"some were skipped:\n{done.stdout}"


def test_the_shop_has_its_migrations(tmp_path: Path):
    done = run("manage.py", "makemigrations", "shop", "--check", "--dry-run", timeout=60, SHOP_VAR=str(tmp_path))
    assert done.returncode == 0, done.stdout


OLD_ORDER = """
from django.db import connection
with connection.cursor() as cursor:
    cursor.execute("INSERT INTO shop_event VALUES (1, 'A play', 'Here', '2026-01-01 20:00:00+00:00', 900)")
    cursor.execute("INSERT INTO shop_ticket (id, seat, status, event_id) VALUES (1, 'A1', 'sold', 1)")
    cursor.execute(
        "INSERT INTO shop_order (id, public_id, form_id, email, amount, status, payment, created_at, ticket_id) "
        "VALUES (1, 'OLD', '0195513c2f6070008000000000000001', 'a@example.com', 900, 'paid', 'ch_1', "
        "'2026-01-01 00:00+00:00', 1)"
    )
    cursor.execute("UPDATE shop_ticket SET holder_id = 1")
"""
NEW_ORDER = """
from shop.models import Order
order = Order.objects.get()
print("found", order, order.event, order.seats)
"""


@pytest.mark.timeout(180)
def test_orders_from_before_the_waiting_list_are_kept(tmp_path: Path, database: str):
    """`make serve` opens the folder of an older demo, too."""
    env = {"SHOP_VAR": str(tmp_path), "DATABASE_URL": database}
    for command in (
        ["migrate", "--verbosity=0", "shop", "0001"],
        ["shell", "--no-imports", "-c", OLD_ORDER],
        ["migrate", "--verbosity=0", "shop"],
        ["shell", "--no-imports", "-c", NEW_ORDER],
    ):
        done = run("manage.py", *command, timeout=60, **env)
        assert done.returncode == 0, done.stdout
    assert "found OLD A play A1" in done.stdout
