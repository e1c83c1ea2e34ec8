"""Plain `pytest` runs the suite twice: on SQLite, then on a real PostgreSQL.

`--db=sqlite` or `--db=postgres` runs one half. A DATABASE_URL in the environment wins: one run, on that database.
pyproject.toml loads this with `-p`: from conftest.py it would come after Django's settings have been read, and the
PostgreSQL half would pass on SQLite without a word. tests/test_databases.py guards against that.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.postgres import private_postgres, why_unavailable
from tests.scratch import scratch_directory

HALVES = {"sqlite": "SQLite", "postgres": "PostgreSQL"}
given_by_caller = "DATABASE_URL" in os.environ
resources = ExitStack()
# Where a half leaves its counts for the closing line. Taken out of the environment, or a pytest that a test starts
# would overwrite them.
tally_file = os.environ.pop("DURABLE_TEST_TALLY", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "Which databases to test on. A DATABASE_URL in the environment wins."
    parser.addoption("--db", choices=["both", *HALVES], default="both", help=text)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Choose the database before pytest-django reads the settings. Workers of pytest-xdist inherit the choice."""
    if not given_by_caller:
        os.environ["DATABASE_URL"] = start_database(early_config.known_args_namespace.db)
    scheme = os.environ["DATABASE_URL"].partition(":")[0]
    vendor = "postgresql" if scheme.startswith(("postgres", "pgsql")) else scheme
    os.environ["DURABLE_EXPECT_VENDOR"] = vendor


def start_database(db: str) -> str:
    if db != "postgres":
        return f"sqlite:///{resources.enter_context(scratch_directory())}/db.sqlite3"
    if reason := why_unavailable():
        raise pytest.UsageError(f"--db=postgres: {reason}. Run `make test`, or set DATABASE_URL to a server of yours.")
    return resources.enter_context(private_postgres()).url


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Hand both halves to child sessions, or let pytest go on with the one that was asked for."""
    option = config.option
    only_shows = option.help or option.version or option.collectonly or option.markers or option.showfixtures
    if option.db != "both" or given_by_caller or only_shows:
        return None
    return run_both(config)


def run_both(config: pytest.Config) -> int:
    """Run the halves one after the other, and close with one line for both. The worst exit status counts."""
    reason = why_unavailable()
    status, counts = 0, Counter(passed=0, failed=0)
    for half in ["sqlite"] if reason else HALVES:
        print(f"\n{f' The tests on {HALVES[half]} ':=^100}", flush=True)
        code = run_half(half, config.invocation_params, counts)
        status = max(status, code)
        if code in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.USAGE_ERROR) or (code and config.option.maxfail):
            break
    if reason:
        required = os.environ.get("DURABLE_REQUIRE_POSTGRES") == "1"
        print(f"\n{' NOT TESTED ON POSTGRESQL ':!^100}\n{reason}. Set DATABASE_URL to test on a server of yours.")
        if required:
            print("DURABLE_REQUIRE_POSTGRES=1 makes that a failure.")
            status, counts["failed"] = max(status, 1), counts["failed"] + 1
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"\n{counts['passed']} passed, {counts['failed']} failed{skipped}", flush=True)
    return status


def run_half(half: str, invocation: pytest.Config.InvocationParams, counts: Counter[str]) -> int:
    """Run the suite on one database in a session of its own; add its results to `counts`."""
    with scratch_directory() as scratch:
        tally = scratch / "tally.json"
        environment = {**os.environ, "DURABLE_TEST_TALLY": str(tally)}
        environment.pop("DATABASE_URL", None)
        # Ctrl-C reaches the child too, which ends in order: wait for that, and do not kill its database under it.
        before = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            command = [sys.executable, "-m", "pytest", *map(str, invocation.args), f"--db={half}"]
            code = subprocess.run(command, cwd=invocation.dir, env=environment).returncode
        finally:
            signal.signal(signal.SIGINT, before)
        if not tally.exists():
            # Even one that ended with status 0: a session without counts died, or never began.
            counts["failed"] += 1
            return abs(code) or 1
        counts.update(json.loads(tally.read_text()))
        return code


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if tally_file and reporter:
        number = {outcome: len(reports) for outcome, reports in reporter.stats.items()}
        failed = number.get("failed", 0) + number.get("error", 0)
        counts = {"passed": number.get("passed", 0), "failed": failed, "skipped": number.get("skipped", 0)}
        Path(tally_file).write_text(json.dumps(counts))


def pytest_unconfigure() -> None:
    resources.close()


# For sessions that fail before they are configured, such as on an error in the settings.
atexit.register(resources.close)


@pytest.fixture
def process_env(django_db_setup: None) -> dict[str, str]:
    """The environment for a process that shall work on the databases of this test (which needs transaction=True)."""
    from django.db import connections

    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "DURABLE_TEST_DATABASE": str(connections["default"].settings_dict["NAME"]),
        "DURABLE_TEST_DATABASE_OTHER": str(connections["other"].settings_dict["NAME"]),
    }
