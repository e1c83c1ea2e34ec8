"""What `manage.py check` says: each number, when it speaks and when it is silent, and that it asks no database."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from django.core import checks as django_checks
from django.db import connection, connections
from django.test import override_settings

import django_durable as durable
from django_durable import checks
from django_durable.conf import OPTION_NAMES, Options
from django_durable.engine import registry

ROOT = Path(__file__).resolve().parent.parent
ID = re.compile(r"django_durable\.([EW]\d{3})")

SQLITE = {
    "ENGINE": "django.db.backends.sqlite3",
    "NAME": "/nowhere/db.sqlite3",
    "OPTIONS": {
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
    },
}
POSTGRES = {"ENGINE": "django.db.backends.postgresql", "NAME": "nothing", "HOST": "127.0.0.1", "PORT": "1"}
UNKNOWN = {"ENGINE": "django.db.backends.dummy", "NAME": "nothing"}


def sqlite(**options: Any) -> dict[str, Any]:
    """The settings of a good SQLite database with other OPTIONS; None takes one out."""
    changed = {**SQLITE["OPTIONS"], **options}
    return {**SQLITE, "OPTIONS": {name: value for name, value in changed.items() if value is not None}}


def pooled(pool: Any) -> dict[str, Any]:
    return {**POSTGRES, "OPTIONS": {"pool": pool}}


class RunsRouter:
    """Sends the package's models to the database of the tests below, and lets them be migrated there."""

    def db_for_read(self, model: type, **hints: Any) -> str | None:
        return "runs" if model._meta.app_label == "django_durable" else None

    db_for_write = db_for_read


class NoTablesRouter(RunsRouter):
    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        return app_label != "django_durable"


class LostRouter(RunsRouter):
    def db_for_write(self, model: type, **hints: Any) -> str:
        return "ruins"


class GoodSerializer:
    def dumps(self, value: Any) -> str:
        return repr(value)

    def loads(self, text: str) -> Any:
        return text


class HalfSerializer:
    def dumps(self, value: Any) -> str:
        return repr(value)


class NeedySerializer(GoodSerializer):
    def __init__(self, key: str) -> None:
        self.key = key


Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[Check]:
    """Run the checks on a project: its DURABLE, its runs' database, other settings; return the messages by number.

    These tests have no database, so that a check which connects fails.
    """

    def run(
        durable: Any = None,
        database: dict[str, Any] | None = None,
        deploy: bool = False,
        router: type = RunsRouter,
        **others: Any,
    ) -> dict[str, Any]:
        configured = connections.configure_settings({"default": {}, "runs": {**(database or SQLITE)}})["runs"]
        monkeypatch.setitem(connections.settings, "runs", configured)
        given = {"DURABLE": {} if durable is None else durable}
        with override_settings(DATABASE_ROUTERS=[router()], **given, **others):
            found = django_checks.run_checks(tags=["durable"], include_deployment_checks=deploy)
        messages = {ID.fullmatch(message.id)[1]: message for message in found}
        assert len(messages) == len(found), found
        return messages

    yield run
    with suppress(AttributeError):
        del connections["runs"]


# One row for each way to make a check speak: its number, what the message says, and the project.
SPEAKING = [
    ("E001", "no dict, but list", {"durable": ["WORKER_CONCURRENCY"]}),
    ("E002", "no option 'LEASE_SECOND'", {"durable": {"LEASE_SECOND": 30}}),
    ("E002", "no option 'lease_seconds'", {"durable": {"lease_seconds": 30}}),
    ("E002", "no option 7", {"durable": {7: 30}}),
    ("E002", "no option 'QUEUES'", {"durable": {"QUEUES": {}}}),
    (
        "E003",
        "\"LEASE_SECONDS\"] takes a number of seconds above 0, found str: '30'",
        {"durable": {"LEASE_SECONDS": "30"}},
    ),
    ("E003", "LEASE_SECONDS", {"durable": {"LEASE_SECONDS": True}}),
    ("E003", "LEASE_SECONDS", {"durable": {"LEASE_SECONDS": float("inf")}}),
    ("E003", "HEARTBEAT_SECONDS", {"durable": {"HEARTBEAT_SECONDS": -1}}),
    ("E003", "POLL_INTERVAL", {"durable": {"POLL_INTERVAL": 0}}),
    ("E003", "PARK_AFTER", {"durable": {"PARK_AFTER": float("nan")}}),
    ("E003", "WORKER_CONCURRENCY", {"durable": {"WORKER_CONCURRENCY": 0}}),
    ("E003", "WORKER_CONCURRENCY", {"durable": {"WORKER_CONCURRENCY": 8.0}}),
    ("E003", "MAX_PAYLOAD_BYTES", {"durable": {"MAX_PAYLOAD_BYTES": None}}),
    ("E003", "NOTIFY", {"durable": {"NOTIFY": "no"}}),
    ("E003", "STRICT", {"durable": {"STRICT": 1}}),
    ("E003", "EMBEDDED_WORKER", {"durable": {"EMBEDDED_WORKER": None}}),
    ("E003", "VERSION", {"durable": {"VERSION": "v" * 201}}),
    ("E003", "VERSION", {"durable": {"VERSION": "1\0"}}),
    ("E003", "VERSION", {"durable": {"VERSION": 1}}),
    ("E003", "DATABASE", {"durable": {"DATABASE": 1}}),
    ("E003", "SERIALIZER", {"durable": {"SERIALIZER": GoodSerializer}}),
    ("E004", "runs out before it is renewed", {"durable": {"LEASE_SECONDS": 5}}),
    ("E005", "cannot be imported: ImportError", {"durable": {"SERIALIZER": "nowhere"}}),
    ("E005", "cannot be imported: ModuleNotFoundError", {"durable": {"SERIALIZER": "nowhere.codec"}}),
    ("E005", "has no dumps and no loads", {"durable": {"SERIALIZER": "pathlib.Path"}}),
    ("E005", "has no loads", {"durable": {"SERIALIZER": f"{__name__}.HalfSerializer"}}),
    ("E005", "TypeError", {"durable": {"SERIALIZER": f"{__name__}.NeedySerializer"}}),
    ("E006", "USE_TZ is False", {"USE_TZ": False}),
    ("E008", "'rnus'", {"durable": {"DATABASE": "rnus"}}),
    ("E008", "The database router sends runs to 'ruins'", {"router": LostRouter}),
    ("E009", "AUTOCOMMIT False", {"database": {**SQLITE, "AUTOCOMMIT": False}}),
    ("W001", "one or two late heartbeats", {"durable": {"HEARTBEAT_SECONDS": 11}}),
    ("W002", '"POLL_INTERVAL"] is 31', {"durable": {"POLL_INTERVAL": 31}}),
    ("W003", "fails the run", {"durable": {"STRICT": True}, "deploy": True}),
    ("W004", "dies with that process", {"durable": {"EMBEDDED_WORKER": True}, "deploy": True}),
    ("W005", "out of 'runs'", {"router": NoTablesRouter}),
    ("W006", "sends WorkflowRun to 'runs'", {"durable": {"DATABASE": "default"}}),
    ("W007", "mirrors 'default'", {"database": {**SQLITE, "TEST": {"MIRROR": "default"}}}),
    ("W008", "SQLite and PostgreSQL only", {"database": UNKNOWN}),
    # Another database's pool is counted in other ways.
    ("W008", "SQLite and PostgreSQL only", {"database": {**UNKNOWN, "OPTIONS": {"pool": True}}}),
    ("W009", "local times of Europe/Berlin", {"database": {**SQLITE, "TIME_ZONE": "Europe/Berlin"}}),
    ("W010", "a pool of 4 connections", {"database": pooled(True)}),
    ("W010", "takes up to 10", {"database": pooled({"min_size": 2, "max_size": 9})}),
    ("W010", "a pool of 6 connections", {"database": pooled({"min_size": 6})}),
    ("W010", "takes up to 5", {"database": pooled(True), "durable": {"WORKER_CONCURRENCY": 3}}),
    ("W011", "deferred", {"database": sqlite(transaction_mode=None)}),
    ("W011", "deferred", {"database": sqlite(transaction_mode="DEFERRED")}),
    ("W012", "write-ahead log", {"database": sqlite(init_command=None)}),
    ("W012", "write-ahead log", {"database": sqlite(init_command="PRAGMA journal_mode=DELETE")}),
    ("W013", "a timeout of 0.5 seconds", {"database": sqlite(timeout=0.5)}),
    ("W014", "'db.sqlite3', a relative path", {"database": {**SQLITE, "NAME": "db.sqlite3"}}),
    ("W014", "a relative path", {"database": {**SQLITE, "NAME": Path("var/db.sqlite3")}}),
    ("W015", "in memory", {"database": {**SQLITE, "NAME": ":memory:"}}),
    ("W015", "in memory", {"database": {**SQLITE, "NAME": "file:mine?mode=memory"}}),
]

# One row for each limit that is just kept, and each case that looks like the trouble and is none.
SILENT = [
    ("E001", {"durable": {}}),
    ("E002", {"durable": {name: getattr(Options(), name) for name in OPTION_NAMES}}),
    ("E003", {"durable": {"LEASE_SECONDS": 60, "PARK_AFTER": 0, "WORKER_CONCURRENCY": 1, "VERSION": "v" * 200}}),
    ("E003", {"durable": {"STRICT": None, "DATABASE": None, "SERIALIZER": None, "POLL_INTERVAL": 0.01}}),
    ("E004", {"durable": {"LEASE_SECONDS": 15}}),
    ("E005", {"durable": {"SERIALIZER": f"{__name__}.GoodSerializer"}}),
    ("E005", {"durable": {"SERIALIZER": "django_durable.serialization"}}),
    ("E006", {"USE_TZ": True}),
    ("E008", {"durable": {"DATABASE": "runs"}}),
    ("E009", {"database": {**SQLITE, "AUTOCOMMIT": True}}),
    ("W001", {"durable": {"HEARTBEAT_SECONDS": 10}}),
    ("W001", {"durable": {"HEARTBEAT_SECONDS": 0.1, "LEASE_SECONDS": 0.3, "POLL_INTERVAL": 0.3}}),
    ("W002", {"durable": {"POLL_INTERVAL": 30}}),
    ("W003", {"durable": {"STRICT": True}}),
    ("W003", {"durable": {"STRICT": None}, "deploy": True, "DEBUG": True}),
    ("W004", {"durable": {"EMBEDDED_WORKER": True}}),
    ("W005", {"database": SQLITE}),
    ("W006", {"durable": {"DATABASE": "runs"}}),
    ("W007", {"database": {**SQLITE, "TEST": {"NAME": "/nowhere/test.sqlite3"}}}),
    ("W008", {"database": POSTGRES}),
    ("W009", {"database": {**SQLITE, "TIME_ZONE": "UTC"}}),
    ("W009", {"database": {**POSTGRES, "TIME_ZONE": "Europe/Berlin"}}),
    ("W009", {"database": SQLITE, "TIME_ZONE": "Europe/Berlin"}),
    ("W010", {"database": pooled({"min_size": 2, "max_size": 11})}),
    ("W010", {"database": pooled(True), "durable": {"WORKER_CONCURRENCY": 1}}),
    ("W010", {"database": POSTGRES}),
    ("W011", {"database": sqlite(transaction_mode="immediate")}),
    ("W012", {"database": sqlite(init_command="pragma journal_mode = 'wal';")}),
    ("W013", {"database": sqlite(timeout=None)}),
    ("W013", {"database": sqlite(timeout=5)}),
    ("W014", {"database": {**SQLITE, "NAME": Path("/nowhere/db.sqlite3")}}),
    ("W014", {"database": {**SQLITE, "NAME": "file:/nowhere/db.sqlite3"}}),
    # A test's own database, which needs none of what a file needs.
    ("W015", {"database": {"ENGINE": SQLITE["ENGINE"], "NAME": "file:memorydb_default?mode=memory&cache=shared"}}),
]


@pytest.mark.parametrize(("number", "words", "project"), SPEAKING)
def test_what_is_wrong_is_said_with_what_to_do(check, number, words, project):
    found = check(**project)

    assert list(found) == [number], found
    assert words in found[number].msg
    assert found[number].msg.endswith(".")
    assert found[number].hint.endswith((".", "?"))
    assert found[number].is_serious() == number.startswith("E")


@pytest.mark.parametrize(("number", "project"), SILENT)
def test_what_is_right_is_left_alone(check, number, project):
    assert check(**project) == {}


@pytest.mark.parametrize("name", ["LEASE_SECOND", "lease_seconds", "LeaseSeconds"])
def test_a_misspelt_option_is_told_the_name_that_was_meant(check, name):
    assert check({name: 60})["E002"].hint == "Did you mean 'LEASE_SECONDS'?"


def test_an_option_of_a_later_version_is_not_taken_for_a_misspelling(check):
    assert check({"RETENTION": {}})["E002"].hint == "This version does not have it yet. Remove it."


def test_a_misspelt_alias_is_told_the_one_that_was_meant(check):
    assert check({"DATABASE": "rnus"})["E008"].hint == "Did you mean 'runs'?"


def test_several_mistakes_are_told_at_once(check):
    durable = {"LEASE_SECONDS": "30", "SERIALIZER": "nowhere.codec", "RETENTON": {}, "POLL_INTERVAL": 90}

    found = check(durable, database=sqlite(timeout=1, transaction_mode=None))

    assert sorted(found) == ["E002", "E003", "E005", "W002", "W011", "W013"]


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_workflows", {})
    monkeypatch.setattr(registry, "duplicates", [])


def test_two_workflows_of_one_name_are_named_with_their_places(check, empty_registry):
    @durable.workflow(name="checkout")
    def old(): ...

    @durable.workflow(name="checkout")
    def new(): ...

    found = check()

    assert list(found) == ["E007"]
    for place in ("old", "new", "test_checks.py:"):
        assert place in found["E007"].msg
    assert "name=" in found["E007"].hint


def test_an_alias_that_is_anothers_name_is_a_second_one_of_that_name(check, empty_registry):
    @durable.workflow(name="checkout")
    def old(): ...

    @durable.workflow(name="purchase", aliases=["checkout"])
    def new(): ...

    assert list(check()) == ["E007"]


def test_workflows_of_different_names_and_a_reloaded_one_are_no_duplicates(check, empty_registry):
    def define():
        @durable.workflow(name="checkout", aliases=["purchase"])
        def checkout(): ...

    @durable.workflow(name="refund")
    def refund(): ...

    define()
    define()

    assert check() == {}


def test_every_option_has_a_kind_that_its_default_fits():
    assert tuple(checks.KINDS) == OPTION_NAMES
    assert [name for name, kind in checks.KINDS.items() if not kind.fits(getattr(Options(), name))] == []


# -- On the database ---------------------------------------------------------------------------------------------


def budget_message() -> str | None:
    """What the check that asks the server says of the test's database."""
    found = django_checks.run_checks(tags=["database"], databases=["default"])
    messages = [message.msg for message in found if message.id == "django_durable.W016"]
    assert len(messages) == len(found), found
    return messages[0] if messages else None


@pytest.mark.django_db
def test_a_server_with_too_few_connections_for_one_worker_is_noticed():
    has_a_limit = connection.vendor == "postgresql"
    with override_settings(DURABLE={"WORKER_CONCURRENCY": 5}):
        assert budget_message() is None
    with override_settings(DURABLE={"WORKER_CONCURRENCY": 100_000}):
        message = budget_message()
    assert bool(message) == has_a_limit
    if has_a_limit:
        assert "takes up to 100003" in message


@pytest.mark.django_db
@pytest.mark.parametrize("limited", ["role", "database"])
def test_a_role_or_database_with_few_connections_is_noticed(limited):
    """Small hosted databases allow a role 20 connections on a server of 500."""
    if connection.vendor != "postgresql":
        with override_settings(DURABLE={"WORKER_CONCURRENCY": 100_000}):
            assert budget_message() is None
        return
    with connection.cursor() as cursor:
        quote = connection.ops.quote_name
        if limited == "role":
            cursor.execute("CREATE ROLE few CONNECTION LIMIT 10")
            cursor.execute("SET LOCAL SESSION AUTHORIZATION few")
        else:
            cursor.execute(f"ALTER DATABASE {quote(connection.settings_dict['NAME'])} CONNECTION LIMIT 10")
    with override_settings(DURABLE={"WORKER_CONCURRENCY": 7}):
        assert budget_message() is None
    with override_settings(DURABLE={"WORKER_CONCURRENCY": 8}):
        assert "allows this user 10 connections" in budget_message()
    with override_settings(DURABLE={"WORKER_CONCURRENCY": 8, "NOTIFY": False}):
        assert budget_message() is None


@pytest.mark.django_db
def test_the_server_is_asked_once_and_only_when_a_command_names_the_database(django_assert_num_queries):
    with django_assert_num_queries(0):
        django_checks.run_checks(tags=["durable"])
        django_checks.run_checks(tags=["database"], databases=["other"])
    with django_assert_num_queries(1 if connection.vendor == "postgresql" else 0):
        django_checks.run_checks(tags=["database"], databases=["default"])


# -- As a command ------------------------------------------------------------------------------------------------


def manage(tmp_path: Path, database: str, *command: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a management command of a project with these settings."""
    lines = ["from tests.settings import *", *(f"{name} = {value!r}" for name, value in settings.items())]
    (tmp_path / "project_settings.py").write_text("\n".join(lines))
    env = {name: value for name, value in os.environ.items() if not name.startswith("DURABLE_")}
    env |= {
        "DATABASE_URL": database,
        "DJANGO_SETTINGS_MODULE": "project_settings",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), str(ROOT), env.get("PYTHONPATH")])),
    }
    return subprocess.run(
        [sys.executable, "-m", "django", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_check_answers_while_the_database_is_away(tmp_path, database):
    """It is run where an image is built, and while somebody looks for why nothing works."""
    file = tmp_path / "db.sqlite3"
    url = f"sqlite:///{file}" if database == "sqlite" else "postgresql://nobody@127.0.0.1:1/nothing"

    done = manage(tmp_path, url, "check", "--tag", "durable", "--deploy", DURABLE={"POLL_INTERVAL": 31})

    assert done.returncode == 0, done.stderr
    assert re.findall(ID, done.stderr) == ["W002"]
    # Whoever connects to SQLite makes the file.
    assert not file.exists()


def test_a_worker_with_a_wrong_setting_does_not_start_and_says_why(tmp_path):
    url = f"sqlite:///{tmp_path / 'db.sqlite3'}"

    done = manage(tmp_path, url, "durable_worker", "--burst", DURABLE={"LEASE_SECOND": 30})

    assert done.returncode == 1
    assert "DURABLE has no option 'LEASE_SECOND'." in done.stderr
    assert "Did you mean 'LEASE_SECONDS'?" in done.stderr


# -- The page ----------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "reference" / "checks.md").read_text()
NUMBERS = sorted(ID.findall(Path(checks.__file__).read_text()))


def test_every_number_is_given_once_and_has_its_row_in_the_documentation():
    assert len(set(NUMBERS)) == len(NUMBERS)
    assert re.findall(r"^\| `django_durable\.(\w+)` \|", PAGE, re.MULTILINE) == NUMBERS
    assert set(ID.findall(PAGE)) == set(NUMBERS)


def test_every_number_has_a_test_that_makes_it_speak_and_one_that_keeps_it_silent():
    # Of the registry, and of the server: their tests have a set-up of their own, above.
    elsewhere = {"E007", "W016"}
    assert {row[0] for row in SPEAKING} | elsewhere == set(NUMBERS)
    assert {row[0] for row in SILENT} | elsewhere == set(NUMBERS)


def test_the_documented_sqlite_settings_pass_all_checks(check):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"BASE_DIR": Path("/nowhere")}
    exec(code, names)

    assert check(database=names["DATABASES"]["default"], deploy=True) == {}
