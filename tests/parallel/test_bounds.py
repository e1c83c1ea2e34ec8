"""Never more parallel steps, threads and connections than were asked for."""

import threading

import pytest
from django.db import connection, connections

import django_durable as durable
from django_durable.engine.parallel import MAX_PARALLEL
from tests.app.models import Account
from tests.parallel.common import (
    PATIENCE,
    calls,
    deposits,
    execute_as_a_worker,
    for_real,
    square,
    threads_of_steps,
)


class Crowd:
    """Who is inside at a time. Everyone waits for `size` of them."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.lock = threading.Lock()
        self.inside = self.most = 0

    def pass_through(self):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.barrier.wait(PATIENCE)
        with self.lock:
            self.inside -= 1


@durable.step(name="meet", atomic=False)
def meet(number):
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            calls.append(cursor.fetchone()[0])
    else:
        connection.ensure_connection()
        calls.append(connection.connection)
    crowd.pass_through()
    return number


@durable.workflow(name="tests.parallel.crowded")
def crowded(count, limit):
    if limit is not None:
        return meet.map(range(count), max_parallel=limit)
    return [future.result() for future in [meet.submit(number) for number in range(count)]]


def is_open(session):
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [session])
            return bool(cursor.fetchone()[0])
    try:
        session.execute("SELECT 1")
    except Exception as error:
        # The driver says so before it looks whose thread this is.
        return "closed" not in str(error)
    return True


@for_real
@pytest.mark.parametrize(("count", "limit"), [(9, 3), (16, None), (5, 1)])
def test_so_many_are_under_way_and_never_more_and_their_connections_are_closed(count, limit):
    global crowd
    size = limit or MAX_PARALLEL
    for _ in range(3):
        calls.clear()
        crowd = Crowd(size)
        assert crowded(count, limit) == list(range(count))
        assert crowd.most == size
        sessions = set(calls)
        # A thread keeps its connection from one step to the next.
        assert len(sessions) <= size
        assert threads_of_steps() == []
        until = threading.Event()
        for _ in range(200):
            # The server's process ends a moment after its client has gone.
            if not any(is_open(session) for session in sessions):
                break
            until.wait(0.02)
        assert not any(is_open(session) for session in sessions)


if connection.vendor == "postgresql":  # where a frozen process would keep its rows locked for ever

    @for_real
    def test_a_workers_parallel_transactions_may_not_be_idle_for_ever():
        @durable.step(name="limit")
        def limit(number):
            with connection.cursor() as cursor:
                cursor.execute("SHOW idle_in_transaction_session_timeout")
                return cursor.fetchone()[0]

        @durable.workflow(name="tests.parallel.limits")
        def limits():
            return limit.map(range(2))

        run = limits.start()
        execute_as_a_worker(run)
        assert run.result(timeout=0) == ["5min", "5min"]


@for_real
def test_a_thread_without_work_does_not_stay_for_as_long_as_the_run(monkeypatch):
    monkeypatch.setattr("django_durable.engine.parallel.LINGER", 0.01)

    @durable.workflow(name="tests.parallel.leaves")
    def leaves():
        square.map(range(4))
        for _ in range(500):
            if not threads_of_steps():
                break
            threading.Event().wait(0.02)
        calls.append(len(threads_of_steps()))
        return square.map(range(4))

    assert leaves() == [0, 1, 4, 9]
    assert calls[4] == 0


@for_real
def test_threads_that_others_have_left_idle_are_no_room_for_more():
    @durable.step(name="alone", atomic=False)
    def alone(number):
        with lock:
            inside.append(number)
            if len(inside) > 1:
                together.set()
        # Whoever is let in beside it comes at once: the threads are there.
        together.wait(0.05)
        inside.remove(number)
        return number

    @durable.workflow(name="tests.parallel.after_others")
    def after_others():
        meet.map(range(4), max_parallel=4)
        return alone.map(range(4), max_parallel=1)

    global crowd
    crowd = Crowd(4)
    lock, inside, together = threading.Lock(), [], threading.Event()
    assert after_others() == [0, 1, 2, 3]
    assert not together.is_set()


@for_real
def test_each_parallel_step_is_one_commit_of_its_own():
    commits = []
    database = type(connections["default"])
    original = database._commit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_commit", lambda self: (commits.append(self.alias), original(self))[1])
        # The process has its lease now.
        deposits([])
        Account.objects.create(name="Ada")
        commits.clear()
        deposits(["Ada"] * 10)
    # The start and the end are single statements, which commit by themselves.
    assert commits == ["default"] * 10


@pytest.mark.parametrize("limit", [0, -1, 2.0, True, "2", None])
def test_a_limit_that_makes_no_sense_is_refused(limit):
    with pytest.raises(ValueError, match="max_parallel takes a whole number from 1"):
        square.map([1], max_parallel=limit)
    assert calls == []
