"""The settings, and that nothing happens before a project asks for it."""

import json
import subprocess
import sys
from datetime import timedelta

import pytest
from django.core.exceptions import ImproperlyConfigured

import django_durable as durable
from django_durable.conf import OPTION_NAMES, as_seconds, options
from tests.app.workflows import echo


def test_every_option_has_the_default_of_the_documentation(settings):
    settings.DURABLE = {}
    given = options()
    assert (given.DATABASE, given.WORKER_CONCURRENCY, given.LEASE_SECONDS, given.HEARTBEAT_SECONDS) == (None, 8, 30, 5)
    assert (given.POLL_INTERVAL, given.NOTIFY, given.PARK_AFTER, given.MAX_PAYLOAD_BYTES) == (1, True, 1, 2**20)
    assert (given.SERIALIZER, given.VERSION, given.EMBEDDED_WORKER) == (None, "", False)


def test_no_setting_at_all_is_fine(settings):
    if hasattr(settings, "DURABLE"):
        del settings.DURABLE
    options.cache_clear()
    assert options().LEASE_SECONDS == 30


def test_a_changed_setting_is_in_force_at_once(settings):
    settings.DURABLE = {"PARK_AFTER": 7}
    assert options().PARK_AFTER == 7
    settings.DURABLE = {"PARK_AFTER": 8}
    assert options().PARK_AFTER == 8


def test_unknown_keys_do_not_stop_the_project_from_starting(settings):
    """The system check names them; a deployment of two versions side by side goes on."""
    settings.DURABLE = {"PARK_AFTR": 7, "VERSION": "5"}
    assert (options().VERSION, options().PARK_AFTER) == ("5", 1)
    assert "PARK_AFTR" not in OPTION_NAMES


@pytest.mark.parametrize("value", [None, [], "LEASE_SECONDS=30", 5], ids=repr)
def test_settings_that_are_no_dict_are_an_error_that_shows_what_was_found(settings, value):
    settings.DURABLE = value
    with pytest.raises(ImproperlyConfigured, match="DURABLE must be a dict, found"):
        options()


WRONG = [
    ("DATABASE", 5),
    ("WORKER_CONCURRENCY", 0),
    ("WORKER_CONCURRENCY", "8"),
    ("WORKER_CONCURRENCY", True),
    ("LEASE_SECONDS", 0),
    ("LEASE_SECONDS", "30"),
    ("LEASE_SECONDS", timedelta(seconds=30)),
    ("HEARTBEAT_SECONDS", -1),
    ("POLL_INTERVAL", float("nan")),
    ("POLL_INTERVAL", float("inf")),
    ("NOTIFY", "no"),
    ("PARK_AFTER", -1),
    ("MAX_PAYLOAD_BYTES", 0),
    ("MAX_PAYLOAD_BYTES", 1e6),
    ("SERIALIZER", object()),
    ("VERSION", 5),
    ("VERSION", "x" * 201),
    ("VERSION", "a\0b"),
    ("EMBEDDED_WORKER", 1),
    ("STRICT", "yes"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_an_error_that_names_the_option_and_what_it_takes(settings, name, value):
    settings.DURABLE = {name: value}
    with pytest.raises(ImproperlyConfigured, match=rf'DURABLE\["{name}"\] takes .*, found {type(value).__name__}'):
        options()


def test_every_wait_may_be_parked(settings):
    settings.DURABLE = {"PARK_AFTER": 0}
    assert options().PARK_AFTER == 0


@pytest.mark.parametrize(("debug", "given", "strict"), [(True, None, True), (False, None, False), (True, False, False)])
def test_strict_follows_debug_unless_it_is_set(settings, debug, given, strict):
    settings.DEBUG = debug
    settings.DURABLE = {} if given is None else {"STRICT": given}
    assert options().strict is strict


@pytest.mark.parametrize(
    ("value", "seconds"), [(0, 0.0), (5, 5.0), (0.5, 0.5), (timedelta(minutes=2), 120.0), (timedelta(0), 0.0)]
)
def test_a_duration_is_seconds_or_a_timedelta(value, seconds):
    assert as_seconds(value, "timeout") == seconds
    assert type(as_seconds(value, "timeout")) is float


@pytest.mark.parametrize("value", [None, "5", True, [5], -1, -0.1, float("nan"), float("inf"), timedelta(-1)], ids=repr)
def test_what_is_no_duration_is_refused_by_its_name(value):
    with pytest.raises((TypeError, ValueError), match="retry_delay takes"):
        as_seconds(value, "retry_delay")


@pytest.mark.django_db(databases=["default", "other"])
def test_the_database_of_the_settings_is_where_runs_live(settings):
    settings.DURABLE = {"DATABASE": "other"}
    run = echo.start()
    assert run.database == "other"
    assert durable.get_run(run.id) == run
    assert echo.using(database="default").start().database == "default"


@pytest.mark.django_db(databases=["default", "other"])
def test_without_one_the_router_says_where(settings):
    settings.DATABASE_ROUTERS = ["tests.test_conf.RunsElsewhere"]
    assert echo.start().database == "other"


class RunsElsewhere:
    def db_for_write(self, model, **hints):
        return "other" if model._meta.app_label == "django_durable" else None


# -- Nothing starts by itself ---------------------------------------------------------------------------------------


def run_python(script, environment=None):
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_is_imported_without_settings():
    """INSTALLED_APPS is read before any model may be: importing us may not import one."""
    script = (
        "import sys, threading, django_durable as d\n"
        "assert d.DurableError and d.GiveUp and 'workflow' in dir(d)\n"
        "assert threading.active_count() == 1\n"
        "print('django_durable.models' in sys.modules, 'django.db' in sys.modules)"
    )
    assert run_python(script).startswith("False")


def test_every_public_name_is_there():
    for name in durable.__all__:
        assert getattr(durable, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'stepp'"):
        durable.stepp  # noqa: B018


WATCH = """
import json, os, sys, threading, traceback
import django
import django_durable
PACKAGE = os.path.dirname(django_durable.__file__) + os.sep
from django.db.backends.base.base import BaseDatabaseWrapper
connected, queries = [], []
original = BaseDatabaseWrapper.connect
def connect(self):
    if any(frame.filename.startswith(PACKAGE) for frame in traceback.extract_stack()):
        connected.append(self.alias)
    original(self)
    self.execute_wrappers.append(lambda run, sql, *rest: (queries.append(sql), run(sql, *rest))[1])
BaseDatabaseWrapper.connect = connect
started = threading.Thread.start
threads = []
def start(self):
    threads.append(self.name)
    started(self)
threading.Thread.start = start
django.setup()
after_setup = [list(connected), list(threads)]
from django.core.management import call_command
call_command(*sys.argv[1:], verbosity=0)
print(json.dumps({"setup": after_setup, "connected": connected, "threads": threads,
                  "ours": [sql for sql in queries if "django_durable_worker" in sql or "LISTEN" in sql]}))
"""


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
@pytest.mark.parametrize("command", [["check"], ["migrate"], ["makemigrations", "--check", "--dry-run"]], ids=" ".join)
def test_other_commands_start_no_thread_and_no_connection_of_ours(process_env, command):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCH, *command],
        env=process_env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert seen["setup"] == [[], []]
    assert seen["threads"] == []
    if command == ["check"]:
        # From 6.1 on Django's own check of a JSONField asks SQLite; nothing of ours does.
        assert seen["connected"] == []
    assert [sql for sql in seen["ours"] if not sql.startswith(("CREATE", "ALTER"))] == []
