"""System checks, tag "durable": see docs/reference/checks.md.

They read settings and registries, and open no connection: `check` must answer while the database is away. The one
that asks the server is tagged "database" instead, and Django runs it only for the databases that a command names.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.db import connections, router
from django.utils.module_loading import import_string

from django_durable import compat
from django_durable.conf import KINDS, OPTION_NAMES, Options, is_number, is_whole, wrong_value
from django_durable.engine import registry
from django_durable.models import WorkflowRun

TAG = "durable"

# Beside one for each executing thread: the worker's loop and its heartbeat.
WORKER_CONNECTIONS = 2
# psycopg_pool's own.
DEFAULT_POOL_SIZE = 4

TESTED_VENDORS = ("sqlite", "postgresql")

# Named by the documentation of a later version.
PLANNED = ("DISPATCH", "QUEUES", "RETENTION")

Messages = Iterator[CheckMessage]


def rule(find: Callable[[], Messages], *, deploy: bool = False) -> Callable[[], Messages]:
    """Register a check of the settings or the code."""

    def run(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
        return list(find())

    register(run, TAG, deploy=deploy)
    return find


def deploy_rule(find: Callable[[], Messages]) -> Callable[[], Messages]:
    """Register one that only ``check --deploy`` shows."""
    return rule(find, deploy=True)


def database_rule(find: Callable[[Any], Messages]) -> Callable[[Any], Messages]:
    """Register a check of how the runs' database is configured; an alias that leads nowhere is reported elsewhere."""

    def run() -> Messages:
        if (alias := runs_alias()) in connections:
            yield from find(connections[alias])

    rule(run)
    return find


def sqlite_rule(find: Callable[[Any], Messages]) -> Callable[[Any], Messages]:
    """Register a check of a SQLite file. One in memory has neither readers nor writers beside it."""

    def run(connection: Any) -> Messages:
        if connection.vendor == "sqlite" and not connection.is_in_memory_db():
            yield from find(connection)

    database_rule(run)
    return find


# -- What the options may be ------------------------------------------------------------------------------------


def given() -> dict[Any, Any]:
    """The project's own options; none if DURABLE is no dict, which is reported once."""
    found = getattr(settings, "DURABLE", {})
    return found if isinstance(found, dict) else {}


def option(name: str) -> Any:
    """The option's value, or its default in place of a wrong one, which is reported once."""
    default = getattr(Options(), name)
    value = given().get(name, default)
    return value if KINDS[name].fits(value) else default


def runs_alias() -> str:
    """The alias of the database where new runs go."""
    alias: str = option("DATABASE") or router.db_for_write(WorkflowRun)
    return alias


def _nearest(name: object, known: Collection[str], otherwise: str) -> str:
    near = get_close_matches(str(name), known, n=1)
    return f"Did you mean {near[0]!r}?" if near else otherwise


# -- The settings -----------------------------------------------------------------------------------------------


@rule
def durable_is_a_dict() -> Messages:
    found = getattr(settings, "DURABLE", {})
    if not isinstance(found, dict):
        yield Error(
            f"The setting DURABLE is no dict, but {type(found).__name__}: {reprlib.repr(found)}.",
            hint="Write DURABLE = {...}, or leave it out: every option has a default.",
            id="django_durable.E001",
        )


@rule
def options_are_known() -> Messages:
    for name in given():
        if name in OPTION_NAMES:
            continue
        if name in PLANNED:
            hint = "This version does not have it yet. Remove it."
        else:
            hint = _nearest(str(name).upper(), OPTION_NAMES, f"The options are {', '.join(OPTION_NAMES)}.")
        yield Error(f"DURABLE has no option {name!r}.", hint=hint, id="django_durable.E002")


@rule
def options_have_good_values() -> Messages:
    for name, kind in KINDS.items():
        if name not in given():
            continue
        value = given()[name]
        if not kind.fits(value):
            yield Error(
                wrong_value(name, value),
                hint=f"Write such a value, or leave it out for the default, {getattr(Options(), name)!r}.",
                id="django_durable.E003",
            )


@rule
def heartbeat_fits_the_lease() -> Messages:
    lease, beat = option("LEASE_SECONDS"), option("HEARTBEAT_SECONDS")
    found = f'DURABLE["HEARTBEAT_SECONDS"] is {beat:g}, and DURABLE["LEASE_SECONDS"] is {lease:g}'
    hint = f"Let the heartbeat be a third of the lease or less: {lease / 3:.3g} seconds, or a longer lease."
    if beat >= lease:
        yield Error(
            f"{found}: every lease runs out before it is renewed, and other workers take its runs.",
            hint=hint,
            id="django_durable.E004",
        )
    # A third of a float may be a hair more than a third.
    elif beat > lease / 3 * 1.000001:
        yield Warning(
            f"{found}: one or two late heartbeats, and other workers take a living process for dead.",
            hint=hint,
            id="django_durable.W001",
        )


@rule
def dead_workers_are_noticed() -> Messages:
    lease, poll = option("LEASE_SECONDS"), option("POLL_INTERVAL")
    if poll > lease:
        yield Warning(
            f'DURABLE["POLL_INTERVAL"] is {poll:g}, more than DURABLE["LEASE_SECONDS"], {lease:g}: an idle worker may '
            "look for the runs of a dead one that much later than their lease has run out.",
            hint="Poll more often. A poll is one statement.",
            id="django_durable.W002",
        )


@rule
def serializer_can_be_used() -> Messages:
    path = option("SERIALIZER")
    if path is None:
        return
    try:
        found = import_string(path)
        serializer = found() if isinstance(found, type) else found
    except Exception as error:
        trouble = f"cannot be imported: {type(error).__name__}: {error}"
    else:
        missing = [name for name in ("dumps", "loads") if not callable(getattr(serializer, name, None))]
        if not missing:
            return
        trouble = f"has no {' and no '.join(missing)}"
    yield Error(
        f'DURABLE["SERIALIZER"], {path!r}, {trouble}.',
        hint="Name a module, an object or a class with dumps(value) -> str and loads(text) -> value.",
        id="django_durable.E005",
    )


@rule
def time_zones_are_in_use() -> Messages:
    if not settings.USE_TZ:
        yield Error(
            "USE_TZ is False: times without a zone say neither when a run is due nor when a lease ends. On SQLite no "
            "run can be executed at all; on PostgreSQL runs with a timeout fail when they go on.",
            hint="Set USE_TZ = True, which is Django's default.",
            id="django_durable.E006",
        )


@deploy_rule
def strict_is_for_development() -> Messages:
    if option("STRICT"):
        yield Warning(
            'DURABLE["STRICT"] is True: in production, a query in a workflow\'s body outside a step fails the run.',
            hint="Leave it out: then it follows DEBUG.",
            id="django_durable.W003",
        )


@deploy_rule
def workers_are_processes() -> Messages:
    if option("EMBEDDED_WORKER"):
        yield Warning(
            'DURABLE["EMBEDDED_WORKER"] is True: a worker begins with a web process\'s first request and dies with '
            "that process; in between, nobody executes or recovers a run.",
            hint="Run `manage.py durable_worker` as a service of its own.",
            id="django_durable.W004",
        )


# -- The code ---------------------------------------------------------------------------------------------------


@rule
def workflow_names_are_unique() -> Messages:
    for name, first, second in dict.fromkeys(registry.duplicates):
        yield Error(
            f"Two workflows have the name {name!r}: {first} and {second}. A stored run could be either's.",
            hint="Pass name= to one of them, or take the name out of its aliases=.",
            id="django_durable.E007",
        )


# -- The runs' database -----------------------------------------------------------------------------------------


@rule
def database_exists() -> Messages:
    alias = runs_alias()
    if alias in connections:
        return
    chooser = 'DURABLE["DATABASE"]' if option("DATABASE") else "The database router"
    yield Error(
        f"{chooser} sends runs to {alias!r}, which is not in DATABASES.",
        hint=_nearest(alias, list(connections), f"DATABASES has {', '.join(map(repr, connections))}."),
        id="django_durable.E008",
    )


@database_rule
def statements_commit_by_themselves(connection: Any) -> Messages:
    if not connection.settings_dict["AUTOCOMMIT"]:
        yield Error(
            f"Database {connection.alias!r} holds runs and has AUTOCOMMIT False: no step could commit its checkpoint.",
            hint="Remove AUTOCOMMIT, or keep the runs in another database.",
            id="django_durable.E009",
        )


@database_rule
def tables_are_migrated(connection: Any) -> Messages:
    if not router.allow_migrate_model(connection.alias, WorkflowRun):
        yield Warning(
            f"The database router keeps django_durable's tables out of {connection.alias!r}, where its runs go.",
            hint="Let allow_migrate() accept the app label 'django_durable' there, or set DURABLE[\"DATABASE\"] to the "
            "alias that has the tables.",
            id="django_durable.W005",
        )


@database_rule
def router_agrees(connection: Any) -> Messages:
    chosen = router.db_for_write(WorkflowRun)
    if chosen != connection.alias:
        yield Warning(
            f'DURABLE["DATABASE"] is {connection.alias!r}, but the database router sends WorkflowRun to {chosen!r}: '
            "a query such as WorkflowRun.objects.failed() looks into a database without runs.",
            hint=f"Let a router's db_for_read() and db_for_write() answer {connection.alias!r} for the app label "
            "'django_durable'. DURABLE[\"DATABASE\"] can be left out then.",
            id="django_durable.W006",
        )


@database_rule
def database_is_no_replica(connection: Any) -> Messages:
    if primary := connection.settings_dict["TEST"].get("MIRROR"):
        yield Warning(
            f"Database {connection.alias!r} holds runs and is a replica: its TEST says that it mirrors {primary!r}.",
            hint=f'Keep the runs in {primary!r}: set DURABLE["DATABASE"], or the router\'s db_for_write().',
            id="django_durable.W007",
        )


@database_rule
def database_is_supported(connection: Any) -> Messages:
    if connection.vendor not in TESTED_VENDORS:
        yield Warning(
            f"Database {connection.alias!r} holds runs and is {connection.display_name}: this version is built and "
            "tested for SQLite and PostgreSQL only, and its promises are not kept elsewhere.",
            hint="Keep the runs in a database of one of these kinds.",
            id="django_durable.W008",
        )


@database_rule
def stored_times_are_unique(connection: Any) -> Messages:
    local = settings.USE_TZ and not connection.features.supports_timezones and connection.timezone_name != "UTC"
    if local:
        yield Warning(
            f"Database {connection.alias!r} holds runs and stores local times of {connection.timezone_name}: where the "
            "clock is set back in autumn, an hour comes twice, living workers look dead, and timers are late.",
            hint="Remove TIME_ZONE from this database's settings, or keep the runs in another database.",
            id="django_durable.W009",
        )


@database_rule
def pool_is_large_enough(connection: Any) -> Messages:
    pool = connection.settings_dict["OPTIONS"].get("pool")
    if connection.vendor != "postgresql" or not pool:
        return
    sizes = pool if isinstance(pool, dict) else {}
    size = sizes.get("max_size") or sizes.get("min_size", DEFAULT_POOL_SIZE)
    threads = option("WORKER_CONCURRENCY")
    if is_whole(size) and size < threads + WORKER_CONNECTIONS:
        yield Warning(
            f"Database {connection.alias!r} holds runs and has a pool of {size} connections, but a worker process "
            f"takes up to {threads + WORKER_CONNECTIONS}: {threads} threads, and {WORKER_CONNECTIONS} for its loop "
            "and its heartbeat. A heartbeat that waits for a connection lets its worker look dead.",
            hint=f'Set "max_size" of its pool to {threads + WORKER_CONNECTIONS} or more, or '
            'DURABLE["WORKER_CONCURRENCY"] to a smaller number.',
            id="django_durable.W010",
        )


@sqlite_rule
def sqlite_writes_from_the_start(connection: Any) -> Messages:
    mode = connection.settings_dict["OPTIONS"].get("transaction_mode")
    if str(mode).upper() not in ("IMMEDIATE", "EXCLUSIVE"):
        yield Warning(
            f"Database {connection.alias!r} holds runs and is SQLite with deferred transactions: a view that reads "
            'first and writes later fails with "database is locked" as soon as a worker has written in between, '
            "whatever the timeout.",
            hint='Set "transaction_mode": "IMMEDIATE" in its OPTIONS.',
            id="django_durable.W011",
        )


@sqlite_rule
def sqlite_lets_read_while_writing(connection: Any) -> Messages:
    commands = str(connection.settings_dict["OPTIONS"].get("init_command") or "")
    if not re.search(r"journal_mode\W+wal\b", commands, re.IGNORECASE):
        yield Warning(
            f"Database {connection.alias!r} holds runs and is SQLite without a write-ahead log: whoever writes waits "
            "for all who read, and they for whoever writes.",
            hint='Set "init_command": "PRAGMA journal_mode=WAL" in its OPTIONS. If the '
            "file has been set to WAL by other means, silence this check.",
            id="django_durable.W012",
        )


@sqlite_rule
def sqlite_waits_for_its_turn(connection: Any) -> Messages:
    timeout = connection.settings_dict["OPTIONS"].get("timeout", 5)
    if is_number(timeout) and timeout < 5:
        yield Warning(
            f"Database {connection.alias!r} holds runs and is SQLite with a timeout of {timeout:g} seconds: a writer "
            'that does not get its turn by then fails with "database is locked".',
            hint='Set "timeout": 20 in its OPTIONS.',
            id="django_durable.W013",
        )


@sqlite_rule
def sqlite_file_is_found_again(connection: Any) -> Messages:
    name = os.fspath(connection.settings_dict["NAME"])
    if name and not name.startswith("file:") and not os.path.isabs(name):
        yield Warning(
            f"Database {connection.alias!r} holds runs and is the SQLite file {name!r}, a relative path: a worker "
            "that is started in another directory opens another file, without these runs.",
            hint=f"Write an absolute path, such as BASE_DIR / {name!r}.",
            id="django_durable.W014",
        )


@database_rule
def sqlite_is_shared(connection: Any) -> Messages:
    if connection.vendor != "sqlite" or not connection.is_in_memory_db():
        return
    # Of this form is what Django makes for tests, which run in one process.
    if not str(connection.settings_dict["NAME"]).startswith("file:memorydb_"):
        yield Warning(
            f"Database {connection.alias!r} holds runs and is a SQLite database in memory: no worker process can see "
            "it, and its runs end with the process that started them.",
            hint="Give it a file's absolute path as NAME.",
            id="django_durable.W015",
        )


# -- The server -------------------------------------------------------------------------------------------------

# Each limit that there is; a negative one is none. LEAST ignores NULL.
CONNECTION_LIMIT = """
SELECT LEAST(
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - COALESCE(current_setting('reserved_connections', true)::int, 0),
    (SELECT rolconnlimit FROM pg_roles WHERE rolname = session_user AND rolconnlimit >= 0),
    (SELECT datconnlimit FROM pg_database WHERE datname = current_database() AND datconnlimit >= 0)
)
"""


def server_allows_a_worker(
    app_configs: Any, databases: Collection[str] | None = None, **kwargs: Any
) -> list[CheckMessage]:
    alias = runs_alias()
    if alias not in (databases or ()) or alias not in connections or connections[alias].vendor != "postgresql":
        return []
    with connections[alias].cursor() as cursor:
        cursor.execute(CONNECTION_LIMIT)
        (limit,) = cursor.fetchone()
    listening = int(option("NOTIFY") and compat.can_notify(connections[alias]))
    needed = option("WORKER_CONCURRENCY") + WORKER_CONNECTIONS + listening
    if limit >= needed:
        return []
    return [
        Warning(
            f"The server of database {alias!r} allows this user {limit} connections, and one worker process takes up "
            f"to {needed}; further workers and the web processes need theirs, too.",
            hint='Set DURABLE["WORKER_CONCURRENCY"] to a smaller number, or raise the limit of the server, the '
            "database or the role.",
            id="django_durable.W016",
        )
    ]


# Not TAG: with `--tag durable` alone, Django 6.1 would hand it all databases.
register(server_allows_a_worker, Tags.database)
