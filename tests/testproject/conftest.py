from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest

# There, it is said loudly if the browser is missing.
from tests.admin.conftest import CHROMIUM, REQUIRED

collect_ignore = [] if CHROMIUM or REQUIRED else ["test_order_page.py"]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database of the shop's own, empty, of the kind that this session tests on."""
    url = os.environ["DATABASE_URL"]
    if os.environ["DURABLE_EXPECT_VENDOR"] != "postgresql":
        yield f"sqlite:///{tmp_path_factory.mktemp('database') / 'shop.sqlite3'}"
        return
    import psycopg

    name = f"shop_{os.getpid()}"
    with closing(psycopg.connect(url, autocommit=True)) as server:
        server.execute(f"CREATE DATABASE {name}")
        try:
            yield urlsplit(url)._replace(path=f"/{name}").geturl()
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")
