"""What the processes of a scenario do."""

from __future__ import annotations

import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from django.core.management import call_command
from django.db import close_old_connections, connection, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from tests.scenarios import workflows
from tests.scenarios.approval_workflows import allow  # noqa: F401 (a part, too)
from tests.scenarios.waiting_workflows import call_sending, rival, send_both  # noqa: F401 (parts, too)
from tests.scenarios.workflows import freeze, note, wait_at


def worker(*arguments: str) -> None:
    """`manage.py durable_worker`."""
    call_command("durable_worker", *arguments)


def migrate() -> None:
    call_command("migrate", run_syncdb=True, verbosity=0)


def direct_call(run_id: str, *arguments: Any, workflow: str = "checkout") -> None:
    """What a view does, without the web server around it."""
    note("result", run=run_id, result=getattr(workflows, workflow).using(run_id=run_id)(*arguments))


def dying_at_statement(nth: int, moment: str, act: str, *arguments: Any) -> None:
    """Act, and die by SIGKILL before or after the nth statement, COMMIT or ROLLBACK."""
    install(Executioner(nth, moment))
    globals()[act](*arguments)


def cut_off_at_statement(nth: int, moment: str, act: str, *arguments: Any) -> None:
    """Act, and lose the connection at the nth: before it was sent, or after it was done and before its answer."""
    install(Cutter(nth, moment))
    globals()[act](*arguments)


def busy_after_a_start_without_answer(run_id: str, gate: str) -> None:
    """A web process that lives on, and has other calls to make."""
    from django.db import OperationalError

    install(StartCutter())
    try:
        result = workflows.checkout.using(run_id=run_id)("ada")
    except OperationalError as error:
        note("told of an error", error=str(error))
    else:
        note("result", run=run_id, result=result)
    # As between two requests.
    close_old_connections()
    workflows.long(gate)


def frozen_at_commit_of(step: str, act: str, *arguments: Any) -> None:
    """Act, and freeze by SIGSTOP between this step's checkpoint and its COMMIT."""
    install(Freezer(step))
    globals()[act](*arguments)


class Watcher(ABC):
    """Sees everything that goes to the database, from all threads."""

    @abstractmethod
    def around(self, connection: BaseDatabaseWrapper, what: str, params: Any, send: Callable[[], Any]) -> Any: ...


class Executioner(Watcher):
    """Counts, and ends the process at the nth."""

    def __init__(self, nth: int, moment: str) -> None:
        self.nth = nth
        self.moment = moment
        self.count = 0
        self.lock = threading.Lock()

    def around(self, connection: BaseDatabaseWrapper, what: str, params: Any, send: Callable[[], Any]) -> Any:
        with self.lock:
            self.count += 1
            mine = self.count == self.nth
        if mine and self.moment == "before":
            self.strike(connection, what)
        result = send()
        if mine and self.moment == "after":
            self.strike(connection, what)
        return result

    def strike(self, connection: BaseDatabaseWrapper, what: str) -> None:
        note("killed at statement", nth=self.nth, moment=self.moment, statement=what[:300])
        os.kill(os.getpid(), signal.SIGKILL)


class Cutter(Executioner):
    """Takes the connection away, as a cable or a proxy does: no word from the server, and no SQLSTATE."""

    def strike(self, connection: BaseDatabaseWrapper, what: str) -> None:
        import psycopg

        note("cut off at statement", nth=self.nth, moment=self.moment, statement=what[:300])
        connection.connection.close()
        with connection.wrap_database_errors:
            raise psycopg.OperationalError("consuming input failed: server closed the connection unexpectedly")


class StartCutter(Cutter):
    """Takes the connection away between a run's first commit and its answer."""

    def __init__(self) -> None:
        super().__init__(1, "after")

    def around(self, connection: BaseDatabaseWrapper, what: str, params: Any, send: Callable[[], Any]) -> Any:
        if what.startswith("INSERT") and "workflowrun" in what:
            return super().around(connection, what, params, send)
        return send()


class Freezer(Watcher):
    """Stops the process at the COMMIT that follows the statement which stores the step's checkpoint."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.recorded = threading.local()

    def around(self, connection: BaseDatabaseWrapper, what: str, params: Any, send: Callable[[], Any]) -> Any:
        if what.startswith("INSERT") and "stepcheckpoint" in what and self.step in (params or ()):
            self.recorded.here = True
        elif what == "COMMIT" and getattr(self.recorded, "here", False):
            self.recorded.here = False
            note("struck", moment=f"commit of {self.step}", plan="freeze")
            freeze()
        return send()


class Meter(Watcher):
    """Only counts."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def around(self, connection: BaseDatabaseWrapper, what: str, params: Any, send: Callable[[], Any]) -> Any:
        self.seen.append(what)
        return send()


def install(watcher: Watcher) -> None:
    """Show the watcher everything: statements by Django's wrapper, which COMMIT and ROLLBACK do not pass."""

    def wrapper(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        return watcher.around(context["connection"], sql, params, lambda: execute(sql, params, many, context))

    def connected(connection: BaseDatabaseWrapper, **_: Any) -> None:
        if wrapper not in connection.execute_wrappers:
            connection.execute_wrappers.append(wrapper)

    connection_created.connect(connected, weak=False)
    for name in ("_commit", "_rollback"):
        original = getattr(BaseDatabaseWrapper, name)

        def told(self: BaseDatabaseWrapper, original: Any = original, name: str = name) -> Any:
            return watcher.around(self, name.strip("_").upper(), (), lambda: original(self))

        setattr(BaseDatabaseWrapper, name, told)


def metered_worker(*arguments: str) -> None:
    """A worker that says at SIGUSR1 how many statements it has sent."""
    meter = Meter()
    install(meter)
    asked = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: asked.set())

    def answer() -> None:
        while asked.wait():
            asked.clear()
            note("statements", count=len(meter.seen), last=[each[:150] for each in meter.seen[-40:]])

    threading.Thread(target=answer, daemon=True).start()
    call_command("durable_worker", *arguments)


def start_and_roll_back(run_id: str) -> None:
    try:
        with transaction.atomic():
            workflows.checkout.using(run_id=run_id).start("ada")
            raise ZeroDivisionError
    except ZeroDivisionError:
        note("rolled back", run=run_id)


def start_and_die(run_id: str) -> None:
    with transaction.atomic():
        workflows.checkout.using(run_id=run_id).start("ada")
        note("dying before the commit", run=run_id)
        os.kill(os.getpid(), signal.SIGKILL)


def race(run_id: str, how: str, gate: str) -> None:
    """Stand at the line with an open connection; start or call when the gate opens."""
    connection.ensure_connection()
    note("at the line")
    wait_at(gate)
    chosen = workflows.checkout.using(run_id=run_id)
    result = chosen("ada") if how == "call" else chosen.start("ada").result(timeout=30)
    note("result", run=run_id, result=result)


def call_from_threads(threads: int, calls: int, gate: str) -> None:
    """Direct calls from a process with many threads; stays until the gate opens, its threads too."""

    def caller(number: int) -> None:
        for each in range(calls):
            workflows.probe.using(run_id=f"call-{number}-{each}")()
        called.wait()
        connections.close_all()

    called = threading.Barrier(threads + 1)
    crew = [threading.Thread(target=caller, args=(number,)) for number in range(threads)]
    for thread in crew:
        thread.start()
    while (done := calls_done()) < threads * calls:
        note("calls", done=done)
        time.sleep(0.1)
    note("called", runs=done)
    wait_at(gate)
    called.wait()
    for thread in crew:
        thread.join()


def calls_done() -> int:
    from django_durable.models import WorkflowRun

    return WorkflowRun.objects.filter(workflow="probe").finished().count()


def start_many(count: int, prefix: str) -> None:
    """A client that goes on through a database that is away; it notes each start that was acknowledged."""
    from django.db import Error

    for number in range(count):
        run_id = f"{prefix}-{number}"
        while True:
            try:
                workflows.checkout.using(run_id=run_id).start(f"customer {number}")
                break
            except Error:
                connection.close()
                time.sleep(0.05)
        note("started", run=run_id)
