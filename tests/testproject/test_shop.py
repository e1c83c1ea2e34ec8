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
