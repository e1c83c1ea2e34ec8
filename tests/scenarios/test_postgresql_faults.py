"""PostgreSQL ends connections, dies and comes back: for workers and clients that is a pause, not an end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import psycopg
import pytest
from django.db import connection

from tests.app.models import Account
from tests.postgres import PrivatePostgres, private_postgres
from tests.scenarios.harness import SHORT_LEASE, Stage, Zygote, answer, free_port
from tests.scenarios.workflows import checkout


class Terminator(threading.Thread):
    """Ends all connections of clients to this database, again and again."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause
        self.done = threading.Event()
        self.ended = 0
        self.rounds = 0
        self.error: Exception | None = None
        settings = connection.get_connection_params()
        self.params = {
            name: settings[name] for name in ("dbname", "user", "password", "host", "port") if settings.get(name)
        }
        self.mine = connection.connection.info.backend_pid

    def run(self) -> None:
        try:
            with psycopg.connect(**self.params, autocommit=True) as own:
                while not self.done.wait(self.pause):
                    ended = own.execute(
                        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND backend_type = 'client backend' "
                        "AND pid NOT IN (pg_backend_pid(), %s)",
                        [self.mine],
                    )
                    self.ended += ended.fetchone()[0]
                    self.rounds += 1
        except Exception as error:
            self.error = error

    def stop(self) -> None:
        self.done.set()
        self.join()
        assert self.error is None


def test_connections_that_are_ended_all_the_time(stage: Stage) -> None:
    stage.options = {**SHORT_LEASE, "LEASE_SECONDS": 5}
    Account.objects.bulk_create([Account(name="free"), Account(name="taken")])
    workers = [stage.worker("--concurrency=4") for _ in range(2)]
    ids = [f"run-{number}" for number in range(200)]
    for number, run_id in enumerate(ids):
        checkout.using(run_id=run_id).start("ada", "declined" if number % 4 == 0 else "good")
    client = stage.act("start_many", 100, "client")
    terminator = Terminator(pause=0.04)
    terminator.start()
    try:
        stage.until(lambda: terminator.rounds >= 150 or terminator.error, "all connections are ended, 150 times")
    finally:
        terminator.stop()
    # It hit; how often depends on how fast the machine is.
    assert terminator.ended > 100
    assert client.wait() == 0, client.said()
    started = [line["run"] for line in stage.log("started")]
    assert len(started) == 100
    stage.ended(*ids, *started)
    stage.judge(*ids, *started)
    assert all(worker.code is None for worker in workers), [worker.said() for worker in workers]
    assert not [worker.said() for worker in workers if "Traceback" in worker.said()]


# -- A server of our own, that may be killed --------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[PrivatePostgres]:
    with private_postgres() as server:
        yield server


@pytest.fixture
def there(stage: Stage, server: PrivatePostgres, zygotes: dict[str, Zygote]) -> Iterator[Stage]:
    """The stage, and this test's own connection, moved to that server."""
    stage.environment = {**stage.environment, "DATABASE_URL": server.url}
    del stage.environment["DURABLE_TEST_DATABASE"]
    if server.url not in zygotes:
        zygotes[server.url] = Zygote(stage.environment)
    stage.zygote = zygotes[server.url]
    if server.pid is None:
        server.start()
    migrated = stage.act("migrate")
    assert migrated.wait() == 0, migrated.said()
    here = dict(connection.settings_dict)
    connection.close()
    connection.settings_dict.update(NAME="postgres", USER="postgres", PASSWORD="", HOST=str(server.home), PORT="")
    try:
        yield stage
    finally:
        stage.close()
        connection.close()
        with server.connect() as own:
            own.execute(
                "TRUNCATE tests_app_ledger, tests_app_account, django_durable_workflowrun, "
                "django_durable_stepcheckpoint, django_durable_worker"
            )
        connection.settings_dict.update(here)


def test_the_server_is_killed_and_comes_back(there: Stage, server: PrivatePostgres) -> None:
    stage = there
    stage.options = {**SHORT_LEASE, "LEASE_SECONDS": 3}
    Account.objects.bulk_create([Account(name="free"), Account(name="taken")])
    port = free_port()
    workers = [stage.worker(f"--health-port={port}"), stage.worker()]
    client = stage.act("start_many", 300, "client")
    for share in (20, 80):
        stage.until(lambda share=share: len(stage.log("charge")) > share, "the runs are under way")
        connection.close()
        server.kill()
        stage.until(lambda: answer(port, "/readyz") == 503, "the worker says that it is not ready", database=False)
        assert answer(port, "/healthz") == 200
        server.start()
        stage.until(lambda: answer(port, "/readyz") == 200, "the worker is ready again", database=False)
    assert client.wait() == 0, client.said()

    ids = [f"client-{number}" for number in range(300)]
    assert {line["run"] for line in stage.log("started")} == set(ids)
    stage.ended(*ids, patience=60)
    stage.judge(*ids)
    assert all(worker.code is None for worker in workers), [worker.said() for worker in workers]
    assert all(worker.said().count("The database answers again") >= 2 for worker in workers)


def test_a_worker_that_starts_while_the_database_is_away_waits_for_it(there: Stage, server: PrivatePostgres) -> None:
    stage = there
    run = checkout.using(run_id="early").start("ada")
    connection.close()
    server.kill()
    # As a user starts it: with the checks that `manage.py` makes.
    worker = stage.command("durable_worker")
    stage.until(
        lambda: worker.code is not None or "does not answer" in worker.said(), "the worker says so", database=False
    )
    assert worker.code is None, worker.said()
    server.start()
    stage.ended(run.id)
    stage.judge(run.id)


def test_an_idle_worker_sends_at_most_two_statements_a_second(there: Stage, server: PrivatePostgres) -> None:
    stage = there
    # The defaults, as a user gets them.
    stage.options = {}
    worker = stage.worker()
    run = checkout.using(run_id="first").start("ada")
    stage.ended(run.id)
    set_everywhere(server, "log_statement = 'all'")
    connection.close()
    before = server.log.stat().st_size
    stage.pass_time(10)
    with server.log.open() as log:
        log.seek(before)
        sent = [line for line in log if "LOG:  statement:" in line or "LOG:  execute" in line]
    set_everywhere(server, "log_statement = 'none'")
    assert worker.code is None
    # Beats and looks were among them: the log works, and the worker lives.
    assert 5 <= len(sent) <= 20, "".join(sent)


def set_everywhere(server: PrivatePostgres, setting: str) -> None:
    with server.connect() as own:
        own.execute(f"ALTER SYSTEM SET {setting}")
        own.execute("SELECT pg_reload_conf()")
