from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connections

from tests.docs.pages import Block, blocks, commands
from tests.docs.project import Project, normalized
from tests.settings import CHECKOUT

POSTGRES = "On PostgreSQL"
TABLES = "The tables"


class Reader:
    """Works through the tutorial: every block and every command, in the order of the page.

    `types` has what a reader does beside typing: commands that need an answer, open a terminal or press a button.
    """

    def __init__(self, project: Project, page: list[Block]) -> None:
        self.project = project
        self.page = page
        self.worker: Any = None
        self.types: dict[str, Any] = {}
        self.sees: dict[str, Any] = {}

    def read_until(self, title: str) -> None:
        while self.page and self.page[0].section != title:
            self.take(self.page.pop(0))

    def read_on(self) -> None:
        while self.page:
            self.take(self.page.pop(0))

    def take(self, block: Block) -> None:
        if block.language == "console":
            for command in commands(block):
                self.types.get(command.line, self.project.type)(command)
        elif block.language == "text":
            self.sees[block.caption](normalized(block.text))
        else:
            self.project.write(block.caption, faster(block))


def faster(block: Block) -> str:
    """The page gives its reader fifteen seconds to act. A test needs less."""
    if block.caption != "shop/outside.py":
        return block.text
    assert "PRINTER_SECONDS = 15" in block.text
    return block.text.replace("PRINTER_SECONDS = 15", "PRINTER_SECONDS = 3")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Somebody who has followed the tutorial up to its tables, on the database of this half of the suite."""
    page = blocks("docs/tutorial.md")
    on_postgres = [block for block in page if block.section == POSTGRES]
    page = [block for block in page if block.section != POSTGRES]
    with database() as (env, name):
        if env:
            # "Then go on from the tables."
            at = next(number for number, block in enumerate(page) if block.section == TABLES)
            page[at:at] = on_postgres
        project = Project(tmp_path_factory.mktemp("tutorial"), env)
        reader = Reader(project, page)
        # What these tests run in has the package already; that these are the right names is test_readme.py's.
        reader.types["pip install django-durable-workflows"] = installed
        reader.types['pip install "django-durable-workflows[postgres]"'] = installed
        reader.types["createdb ticketshop"] = lambda command: name_it(reader, name)
        try:
            reader.read_until(TABLES)
            yield reader
        finally:
            project.close()


def installed(command: Any) -> None:
    from importlib.metadata import metadata

    assert metadata("django-durable-workflows")["Requires-Python"] == ">=3.11"


def name_it(reader: Reader, name: str) -> None:
    """The database is there, under a name that is not in use on a server which has other work."""
    block = reader.page[0]
    assert '"NAME": "ticketshop"' in block.text
    reader.page[0] = block._replace(text=block.text.replace('"NAME": "ticketshop"', f'"NAME": "{name}"'))


@contextmanager
def database() -> Iterator[tuple[dict[str, str], str]]:
    """On PostgreSQL: an empty database on the server of this session, and how a project reaches it. Else nothing."""
    connection = connections["default"]
    if connection.vendor != "postgresql":
        yield {}, ""
        return
    import psycopg

    given = connection.get_connection_params()
    where = {key: str(given[key]) for key in ("host", "port", "user", "password") if given.get(key)}
    name = f"docs_{CHECKOUT}"
    with psycopg.connect(dbname=given["dbname"], autocommit=True, **where) as server:
        server.execute(f"DROP DATABASE IF EXISTS {name}")
        server.execute(f"CREATE DATABASE {name}")
        try:
            yield {f"PG{key.upper()}": value for key, value in where.items()}, name
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")
