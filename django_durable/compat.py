"""What differs between databases and operating systems, asked as a question in one place."""

from __future__ import annotations

import os
import re
import secrets
import socket
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from django.db import Error, InterfaceError, OperationalError, connections, transaction
from django.db.models import BooleanField, Expression, Value
from django.db.models.expressions import RawSQL


class Trouble(Enum):
    """What a database error means for the statement that met it."""

    # The connection is gone, or leads to a server that cannot write: whether a COMMIT arrived is unknown.
    LOST = "lost"
    # The database asks to run the transaction again: serialization failure, deadlock, a lock held too long.
    AGAIN = "again"
    # The statement is wrong, or the data: the caller's own error.
    OTHER = "other"


# PostgreSQL: connection exceptions, shutdown, idle timeouts.
_BROKEN_STATES = ("08", "57P01", "57P02", "57P05", "25P03")
# Starting up; read-only, after a failover; too many connections.
_AWAY_STATES = frozenset({"57P03", "25006", "53300"})
# No prepared statement of this name (`execute_often`), serialization failure, deadlock, lock not available, disk full.
_AGAIN_STATES = ("26000", "40001", "40P01", "55P03", "53100")
# MySQL and MariaDB: server gone, lost, read-only; deadlock, lock wait timeout, record changed.
_LOST_NUMBERS = frozenset({2006, 2013, 2055, 1053, 1290, 1792})
_AGAIN_NUMBERS = frozenset({1213, 1205, 1020})
_SQLITE_AGAIN = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})


# A statement or transaction that took too long; a statement in a transaction that an error had broken.
TIMEOUT_STATES = frozenset({"57014", "25P04"})
ABORTED_STATE = "25P02"


def trouble(error: BaseException, *, broken: bool) -> Trouble:
    """Judge a database error by SQLSTATE and by whether our connection broke: its class misleads (25P03 is internal).

    Whether it is `broken` the caller knows: behind a failed transaction Django has closed a broken connection and
    opened another, which answers well.
    """
    if not isinstance(error, Error):
        return Trouble.OTHER
    cause = error.__cause__
    if state := sqlstate(error):
        # Told by some other database's server, it is the caller's own error.
        if state.startswith(_BROKEN_STATES):
            return Trouble.LOST if broken else Trouble.OTHER
        if state in _AWAY_STATES:
            return Trouble.LOST
        return Trouble.AGAIN if state in _AGAIN_STATES else Trouble.OTHER
    if isinstance(cause, sqlite3.Error):
        return Trouble.AGAIN if (getattr(cause, "sqlite_errorcode", 0) & 0xFF) in _SQLITE_AGAIN else Trouble.OTHER
    number = error.args[0] if error.args else None
    if number in _LOST_NUMBERS:
        return Trouble.LOST
    if number in _AGAIN_NUMBERS:
        return Trouble.AGAIN
    # No code at all: the driver speaks for itself, because the server no longer could.
    return Trouble.LOST if broken and isinstance(error, OperationalError | InterfaceError) else Trouble.OTHER


def sqlstate(error: BaseException) -> str | None:
    """The five characters by which the SQL standard names an error, where the driver passes them on."""
    cause = error.__cause__
    return getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)


def usable(connection: Any) -> bool:
    """Whether the connection still answers; one that Django has closed after an error does not."""
    if connection.connection is None:
        return False
    try:
        return bool(connection.is_usable())
    except Exception:
        return False


def row_share_lock(connection: Any) -> str:
    """The clause that keeps a selected row from being changed until our commit, or "" where all writers queue."""
    features = connection.features
    if not features.has_select_for_update:
        return ""
    # Databases with the four strengths of row lock let parallel steps of one run commit side by side.
    return "FOR SHARE" if features.has_select_for_no_key_update else "FOR UPDATE"


def existence_lock(connection: Any) -> str:
    """The clause that keeps a selected row from being locked whole until our commit, and hinders nothing else.

    PostgreSQL's own check of a foreign key takes it: checkpoints and changes of the status go on beside it.
    """
    features = connection.features
    if not features.has_select_for_update:
        return ""
    return "FOR KEY SHARE" if features.has_select_for_no_key_update else "FOR UPDATE"


def locked(rows: Any) -> Any:
    """The queryset's rows, locked whole until our commit, where there are row locks."""
    return rows.select_for_update() if connections[rows.db].features.has_select_for_update else rows


def upsert(rows: Any, row: Any, *, unique: list[str], update: list[str]) -> None:
    """INSERT the row, or UPDATE these fields of the one that has its unique ones."""
    # MySQL takes no names: any unique key counts.
    named = connections[rows.db].features.supports_update_conflicts_with_target
    target = unique if named else None
    rows.bulk_create([row], update_conflicts=True, unique_fields=target, update_fields=update)


def can_return_from_update(connection: Any) -> bool:
    """Whether the database has UPDATE ... RETURNING, and WITH in front of it; there is no feature flag for it."""
    return connection.vendor in ("postgresql", "sqlite") and bool(connection.features.can_return_columns_from_insert)


def can_notify(connection: Any) -> bool:
    """Whether the database has LISTEN and NOTIFY; there is no feature flag for it."""
    return bool(connection.vendor == "postgresql")


def session_is_alive(connection: Any) -> Expression:
    """Whether a worker row's session still holds its advisory lock; True where there are no such sessions."""
    if not can_notify(connection):
        return Value(True)
    return RawSQL(
        "(session_key IS NULL OR EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 "
        "AND (classid::bigint << 32 | objid::bigint) = session_key "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())))",
        (),
        output_field=BooleanField(),
    )


def database_file(connection: Any) -> str | None:
    """The path of the file that every commit changes, or None: a server's, or one in memory."""
    if connection.vendor != "sqlite" or connection.is_in_memory_db():
        return None
    return os.path.abspath(str(connection.settings_dict["NAME"]))


def in_users_transaction(connection: Any) -> bool:
    """Whether what we commit now could be rolled back by somebody else. A TestCase's own transaction is exempt,
    as for ``atomic(durable=True)``."""
    blocks = connection.atomic_blocks
    if blocks:
        return not blocks[-1]._from_testcase
    return connection.connection is not None and not connection.get_autocommit()


# A connection sends a statement so often before the server is asked to keep its plan: one that lives for a single
# request would only pay for it.
PREPARE_AFTER = 3
_NO_SUCH_PLAN = "26000"
# For each of the driver's connections: how often it sent a statement, or the name that the server knows it by.
_sent: WeakKeyDictionary[Any, dict[str, int | str]] = WeakKeyDictionary()
_keeps_plans = True


def execute_often(connection: Any, sql: str, params: Sequence[Any], types: Sequence[str] = ()) -> int:
    """Execute a statement that the engine sends all the time; return the number of rows.

    PostgreSQL takes longer to plan a checkpoint than to store it, so its session is asked to keep the plan. A pooler
    in transaction mode may lead the next call to another session, which has none of that name: then this process goes
    on without. Inside a transaction, which that error has broken, it counts as one to be run again.
    """
    global _keeps_plans
    name = _kept_plan(connection, sql, types)
    if name is not None:
        with connection.wrap_database_errors:
            sent = _PlannedCursor(connection.create_cursor(), name)
        make = connection.make_debug_cursor if connection.queries_logged else connection.make_cursor
        try:
            with make(sent) as cursor:
                cursor.execute(sql, params)
                return int(cursor.rowcount)
        except Error as error:
            if sqlstate(error) != _NO_SUCH_PLAN:
                raise
            _keeps_plans = False
            if connection.in_atomic_block:
                raise
    with connection.cursor() as cursor:
        cursor.execute(sql, params)
        return int(cursor.rowcount)


class _PlannedCursor:
    """A driver's cursor that sends a statement by the name of its plan. Above it, all see the statement itself."""

    def __init__(self, cursor: Any, name: str) -> None:
        self._cursor = cursor
        self._name = name
        self._meant: tuple[str, Sequence[Any]] = ("", ())

    def execute(self, sql: str, params: Sequence[Any]) -> Any:
        # The comment is for who reads the server's log.
        marks, verb = ", ".join(["%s"] * len(params)), " ".join(sql.split()[:3])
        self._meant = sql, params
        return self._cursor.execute(f"EXECUTE {self._name}({marks}) /* {verb} */", params)

    @property
    def query(self) -> bytes:
        """What Django's log of queries shows."""
        sql, params = self._meant
        shown = self._cursor.mogrify(sql, params) if hasattr(self._cursor, "mogrify") else sql
        return shown if isinstance(shown, bytes) else str(shown).encode()

    @property
    def _query(self) -> _PlannedCursor:
        # Where psycopg 3 keeps it, and psycopg 2 in `query` itself.
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


def _kept_plan(connection: Any, sql: str, types: Sequence[str]) -> str | None:
    """The name under which the session has the statement's plan, or None: send it in full."""
    # EXECUTE takes no bound parameters: with `server_side_binding` every statement behind the first few would fail.
    if not _keeps_plans or connection.vendor != "postgresql" or connection.features.uses_server_side_binding:
        return None
    connection.ensure_connection()
    sent = _sent.setdefault(connection.connection, {})
    known = sent.get(sql, 0)
    if isinstance(known, str):
        return known
    sent[sql] = known + 1
    if known < PREPARE_AFTER:
        return None
    # Random, so that a session of another process, met through a pooler, never has another plan of this name.
    name = f"durable_{secrets.token_hex(8)}"
    numbers = count(1)
    body = re.sub("%s", lambda mark: f"${next(numbers)}", sql)
    of_types = f"({', '.join(types)})" if types else ""
    with connection.wrap_database_errors, connection.connection.cursor() as cursor:
        cursor.execute(f"PREPARE {name}{of_types} AS {body}")
    sent[sql] = name
    return name


def set_transaction(connection: Any, isolation: str | None, timeout: float | None) -> None:
    """Set the isolation level and time limit of the transaction that has just begun, where the database has them."""
    # A savepoint of a test's transaction cannot have either; SQLite is always serializable and has no timeout.
    if (isolation is None and timeout is None) or len(connection.atomic_blocks) > 1:
        return
    with connection.cursor() as cursor:
        if isolation is not None and hasattr(connection, "isolation_level"):
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation.upper()}")
        if timeout is not None and connection.vendor == "postgresql":
            limit = max(1, int(timeout * 1000))
            cursor.execute(f"SET LOCAL statement_timeout = {limit}")
            if connection.pg_version >= 170000:
                cursor.execute(f"SET LOCAL transaction_timeout = {limit}")


def limit_idle_transactions(connection: Any, seconds: float) -> None:
    """Let the server end this session's transactions that are idle so long, unless the project has set a limit.

    A process that is frozen inside a step, and not dead, would keep its successor waiting for its row locks for ever.
    """
    if connection.vendor == "postgresql":
        limit = "idle_in_transaction_session_timeout"
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT set_config('{limit}', %s, false) WHERE current_setting('{limit}') = '0'",
                [str(int(seconds * 1000))],
            )


def limit_lock_wait(connection: Any, seconds: float) -> None:
    """Let this connection's statements fail when a lock is not theirs in time."""
    milliseconds = int(seconds * 1000)
    statements = {"sqlite": f"PRAGMA busy_timeout = {milliseconds}", "postgresql": f"SET lock_timeout = {milliseconds}"}
    if statement := statements.get(connection.vendor):
        with connection.cursor() as cursor:
            cursor.execute(statement)


def in_transaction(connection: Any) -> bool:
    """Whether the driver is inside a transaction now; True where it cannot tell.

    SQLite rolls a transaction back by itself on a full disk: our next INSERT would then commit alone.
    """
    return bool(getattr(connection.connection, "in_transaction", True))


@contextmanager
def immediate(connection: Any) -> Iterator[None]:
    """Let transactions that begin in this block take SQLite's write lock first.

    A deferred one that reads before it writes fails at once with "database is locked", whatever the timeout.
    """
    if not hasattr(connection, "transaction_mode") or connection.in_atomic_block:
        yield
        return
    before = connection.transaction_mode
    connection.transaction_mode = "IMMEDIATE"
    try:
        yield
    finally:
        connection.transaction_mode = before


@contextmanager
def write_transaction(alias: str, *, durable: bool = False) -> Iterator[None]:
    """A transaction of the engine's own: it has the right to write from its first statement on.

    `durable`: a step's, whose isolation level is the user's. Ours has to see what was committed before it got a lock:
    a snapshot that is older than the lock would miss the message that it has waited for.
    """
    connection = connections[alias]
    with immediate(connection), transaction.atomic(using=alias, durable=durable):
        level = getattr(getattr(connection, "isolation_level", None), "name", "")
        if level in ("REPEATABLE_READ", "SERIALIZABLE") and not durable:
            set_transaction(connection, "read committed", None)
        yield


def claim_lock(connection: Any) -> dict[str, Any]:
    """How due runs are locked to be taken: passing over those that others take, not those that are sent messages."""
    features = connection.features
    if not features.has_select_for_update_skip_locked:
        return {}
    return {"skip_locked": True, "no_key": bool(features.has_select_for_no_key_update)}


# -- Processes --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def host_name() -> str:
    return socket.gethostname()[:200]


@lru_cache(maxsize=1)
def machine_id() -> str:
    """Names the space in which a process id means something: this boot of this kernel, this pid namespace.

    A host's name is not enough: two containers may share one, and each has a process 7. "" where it is unknown,
    and then nobody judges a process by its id.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_started(pid: int) -> int | None:
    """When the process began, in the kernel's own ticks, or None if there is none (a zombie is none either)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in brackets and may hold spaces and brackets itself.
    after_name = stat.rpartition(")")[2].split()
    state, started = after_name[0], int(after_name[19])
    return None if state in "ZX" else started
