"""The worker's loop, in a thread of the test's process. Real processes are in tests/scenarios."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from django.core.signals import request_started
from django.db import connection
from django.utils import timezone

import django_durable as durable
from django_durable.models import Worker as WorkerRow
from django_durable.models import WorkflowRun
from django_durable.worker import embedded, loop
from django_durable.worker.loop import Worker

pytestmark = pytest.mark.django_db(transaction=True)


@durable.step(atomic=False)
def echo(value):
    return value


@durable.workflow
def echoing(value):
    return echo(value)


@contextmanager
def working(**options: object) -> Iterator[Worker]:
    worker = Worker("default", **options)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.02)


def remote_worker(session_key: int | None) -> WorkerRow:
    """A row as a worker on another machine has it, good for the whole lease."""
    now = timezone.now()
    return WorkerRow.objects.create(
        id="b" * 32,
        host="elsewhere",
        pid=1,
        machine="another boot",
        pid_started=1,
        session_key=session_key,
        started_at=now,
        last_seen=now,
        expires_at=now + timedelta(hours=1),
    )


def running_on(worker: WorkerRow) -> WorkflowRun:
    run = echoing.start("moved").model
    WorkflowRun.objects.filter(pk=run.pk).update(status="RUNNING", worker=worker.pk, attempt=1)
    return run


def test_a_worker_executes_what_is_started():
    with working():
        assert echoing.start("hello").result(timeout=20) == "hello"
    assert not WorkerRow.objects.exists(), "a worker that ends takes its row with it"


def test_a_worker_of_one_queue_leaves_the_others_alone():
    with working(queues=["mail"]):
        other = echoing.using(queue="reports").start(1)
        assert echoing.using(queue="mail").start(2).result(timeout=20) == 2
    assert other.status == "PENDING"


def test_burst_ends_when_nothing_is_due():
    handles = [echoing.start(number) for number in range(20)]
    later = echoing.using(run_after=timedelta(hours=1)).start(0)
    worker = Worker("default", burst=True, concurrency=3)
    worker.run()
    assert [handle.result(timeout=0) for handle in handles] == list(range(20))
    assert later.status == "WAITING"


if connection.vendor == "postgresql":  # the database that has session locks

    def test_a_worker_elsewhere_whose_session_is_gone_is_dead_before_its_lease(monkeypatch):
        monkeypatch.setattr(loop, "TRUSTED_SESSION", 0.0)
        run = running_on(remote_worker(session_key=4711))
        with working():
            wait_until(lambda: WorkflowRun.objects.get(pk=run.pk).status == "SUCCEEDED")
        run.refresh_from_db()
        assert run.recoveries == 1

    def test_a_worker_elsewhere_whose_session_stands_keeps_its_runs(monkeypatch):
        import psycopg

        monkeypatch.setattr(loop, "TRUSTED_SESSION", 0.0)
        params = connection.get_connection_params()
        for name in ("cursor_factory", "context"):
            params.pop(name, None)
        with psycopg.connect(**params, autocommit=True) as session:
            session.execute("SELECT pg_advisory_lock(4711)")
            run = running_on(remote_worker(session_key=4711))
            with working() as worker:
                looks: list[float] = []
                monkeypatch.setattr(worker, "_lost_sessions", _counting(worker._lost_sessions, looks))
                wait_until(lambda: len(looks) > 2 and looks[-1] - looks[0] > 2.5)
            assert WorkflowRun.objects.get(pk=run.pk).status == "RUNNING"


def _counting(function: Callable[..., object], calls: list[float]) -> Callable[..., object]:
    def counted(*args: object) -> object:
        calls.append(time.monotonic())
        return function(*args)

    return counted


def test_the_embedded_worker_starts_with_the_first_request_and_not_before(settings):
    handle = echoing.start("in the web process")
    request_started.send(sender=None)
    assert handle.status == "PENDING", "it is off by default"
    settings.DURABLE = {"EMBEDDED_WORKER": True}
    try:
        request_started.send(sender=None)
        assert handle.result(timeout=20) == "in the web process"
    finally:
        embedded.stop_embedded_worker()
    assert not WorkerRow.objects.exists()
