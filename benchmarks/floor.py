"""The floor: what the database alone needs for the same commits, by psycopg or sqlite3, without Django or us.

Two of them. `same_statements` repeats, with the driver's own defaults, the very statements that one run of the
workflow sent, into copies of our tables with all their indexes. `plain_rows` makes the same number of commits, each of
one short row into a table of two columns: what nobody can go below who commits so often.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from enum import Enum
from typing import Any, NamedTuple

from django.db import connection

from benchmarks.models import Entry
from django_durable.engine.ids import new_id
from django_durable.models import StepCheckpoint, WorkflowRun

COPIED = (WorkflowRun, StepCheckpoint, Entry)
PREFIX = "floor_"


# Stands for the run's id among a statement's parameters: each repetition is a run of its own.
RUN_ID: Any = object()


class Statement(NamedTuple):
    sql: str
    params: tuple[Any, ...]
    begins: bool
    commits: bool


def record(work: Callable[[], object]) -> list[Statement]:
    """Let `work` execute one run, and return the statements that it sent, made ready for the copies of the tables."""
    sent: list[tuple[str, tuple[Any, ...], bool]] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        sent.append((sql, tuple(params or ()), context["connection"].in_atomic_block))
        return execute(sql, params, many, context)

    known = set(WorkflowRun.objects.values_list("pk", flat=True))
    with connection.execute_wrapper(note):
        work()
    (run_id,) = set(WorkflowRun.objects.values_list("pk", flat=True)) - known
    sent = [entry for entry in sent if not entry[0].startswith("BEGIN")]
    statements, open_transaction = [], False
    for sql, params, in_transaction in sent:
        begins = in_transaction and not open_transaction
        # The checkpoint is the last statement of its transaction.
        commits = in_transaction and StepCheckpoint._meta.db_table in sql
        open_transaction = in_transaction and not commits
        for model in COPIED:
            sql = sql.replace(f'"{model._meta.db_table}"', f'"{PREFIX}{model._meta.db_table}"')
        if connection.vendor == "sqlite":
            sql = sql.replace("%s", "?")
        params = tuple(RUN_ID if value == run_id else plain(value) for value in params)
        statements.append(Statement(sql, params, begins, commits))
    return statements


def plain(value: Any) -> Any:
    """A status as text: a driver may look at the enum that it is."""
    return value.value if isinstance(value, Enum) else value


def create_tables() -> None:
    """Copies of our tables with the same columns and indexes, and the plain one."""
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE TABLE {PREFIX}plain (id bigint PRIMARY KEY, body text NOT NULL)")
        for model in COPIED:
            table = model._meta.db_table
            if connection.vendor == "postgresql":
                cursor.execute(f'CREATE TABLE "{PREFIX}{table}" (LIKE "{table}" INCLUDING ALL)')
                continue
            cursor.execute("SELECT sql FROM sqlite_master WHERE tbl_name = %s AND sql IS NOT NULL", [table])
            for (sql,) in cursor.fetchall():
                copy = sql.replace(f'"{table}"', f'"{PREFIX}{table}"')
                cursor.execute(copy.replace('INDEX "', f'INDEX "{PREFIX}'))


class Driver:
    """The driver's own connection, in autocommit, on the database that Django uses."""

    def __init__(self) -> None:
        settings = connection.get_connection_params()
        if connection.vendor == "sqlite":
            self.connection: Any = sqlite3.connect(
                settings["database"], timeout=settings["timeout"], isolation_level=None, check_same_thread=False
            )
            for pragma in connection.settings_dict["OPTIONS"]["init_command"].split(";"):
                self.connection.execute(pragma)
            self.begin, self.mark = "BEGIN IMMEDIATE", "?"
        else:
            import psycopg

            for name in ("cursor_factory", "context", "prepare_threshold"):
                settings.pop(name, None)
            self.connection = psycopg.connect(**settings, autocommit=True)
            self.begin, self.mark = "BEGIN", "%s"
        self.execute = self.connection.cursor().execute

    def close(self) -> None:
        self.connection.close()


@contextmanager
def same_statements(statements: list[Statement]) -> Iterator[Callable[[], None]]:
    with closing(Driver()) as driver:
        execute, begin = driver.execute, driver.begin

        def work() -> None:
            run_id = new_id()
            for sql, params, begins, commits in statements:
                if begins:
                    execute(begin)
                execute(sql, [run_id if value is RUN_ID else value for value in params])
                if commits:
                    execute("COMMIT")

        yield work


# One sequence for all threads and measurements: `next` is atomic.
_numbers = itertools.count(1)


@contextmanager
def plain_rows(statements: list[Statement]) -> Iterator[Callable[[], None]]:
    with closing(Driver()) as driver:
        execute, begin = driver.execute, driver.begin
        sql = f"INSERT INTO {PREFIX}plain (id, body) VALUES ({driver.mark}, {driver.mark})"

        def work() -> None:
            for _, _, begins, commits in statements:
                if begins:
                    execute(begin)
                execute(sql, (next(_numbers), "a short text"))
                if commits:
                    execute("COMMIT")

        yield work
