"""The right to execute: a process's row, its heartbeat, its death, and what becomes of its runs."""

import os
import threading
from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone

import django_durable as durable
from django_durable import clock, compat
from django_durable.engine import claims, heartbeat, leases
from django_durable.engine.context import RunContext
from django_durable.engine.heartbeat import Heartbeat, forget_inline_leases, inline_lease
from django_durable.engine.leases import Lease
from django_durable.engine.replay import execute
from django_durable.models import Worker, WorkflowRun
from django_durable.testing import advance, crash_after, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import checkout, echo, ledger_of, times
from tests.threads import elsewhere, together

pytestmark = pytest.mark.django_db


@pytest.fixture
def lease():
    lease = Lease("default", "worker", ["mail"])
    lease.register()
    return lease


def running(worker, count=1, **changes):
    """Runs that this worker executes."""
    runs = [echo.start() for _ in range(count)]
    WorkflowRun.objects.filter(pk__in=[run.id for run in runs]).update(
        status="RUNNING", worker=worker, attempt=1, **changes
    )
    return runs


# -- A process's row ------------------------------------------------------------------------------------------------


def test_a_registered_process_says_who_it_is(settings):
    settings.DURABLE = {"LEASE_SECONDS": 40, "VERSION": "5"}
    lease = Lease("default", "worker", ["mail"])
    lease.register()
    row = Worker.objects.get(pk=lease.id)
    assert (row.kind, row.pid, row.queues, row.version) == ("worker", os.getpid(), ["mail"], "5")
    assert abs(row.expires_at - row.last_seen - timedelta(seconds=40)) < timedelta(seconds=1)
    assert lease.valid()
    assert abs(lease.clock.now() - row.last_seen) < timedelta(seconds=30)


def test_registering_again_after_a_lost_answer_is_no_second_row(lease):
    lease.register()
    assert Worker.objects.count() == 1


def test_ids_are_new_for_every_process():
    assert len({Lease("default", "worker").id for _ in range(100)}) == 100


def test_a_renewed_lease_lasts_longer(lease):
    before = Worker.objects.get().expires_at
    advance("10 seconds")
    assert lease.renew() is True
    assert Worker.objects.get().expires_at >= before + timedelta(seconds=10)


def test_a_lease_is_extended_and_never_won_back(lease):
    Worker.objects.all().delete()
    assert lease.renew() is False
    assert lease.lost
    assert not lease.valid()
    lease.register()
    assert not lease.valid()


def test_a_lease_that_may_have_run_out_is_looked_at_before_a_step(lease, monkeypatch):
    """The process was stopped for longer than its lease: others may have taken over meanwhile."""
    slept = clock.boot_seconds() + 60
    monkeypatch.setattr(leases, "boot_seconds", lambda: slept)
    assert lease.age > lease.seconds
    assert lease.valid() is True
    slept += 60
    Worker.objects.all().delete()
    assert lease.valid() is False


def test_the_lease_of_a_parent_is_not_the_childs(lease, monkeypatch):
    monkeypatch.setattr(leases.os, "getpid", lambda: lease.pid + 1)
    assert not lease.valid()


# -- Death ----------------------------------------------------------------------------------------------------------


def test_a_process_is_dead_when_its_lease_ran_out_and_its_runs_are_anybodys(lease):
    runs = running(lease.id, 3)
    assert leases.bury("default") == 0
    assert leases.recover("default") == 0
    assert not WorkflowRun.objects.stuck().exists()
    advance("31 seconds")
    assert WorkflowRun.objects.stuck().count() == 3
    assert leases.bury("default") == 1
    assert leases.recover("default") == 3
    for run in runs:
        stored = run.model
        assert (stored.status, stored.worker, stored.recoveries) == ("PENDING", "", 1)
    assert leases.recover("default") == 0
    assert lease.renew() is False


def test_a_missing_row_means_dead():
    (run,) = running("deleted by a person")
    assert WorkflowRun.objects.orphaned().count() == WorkflowRun.objects.stuck().count() == 1
    leases.recover("default")
    assert run.status == "PENDING"


def test_what_kills_its_workers_comes_back_more_slowly_each_time():
    """Spread out, or a fleet would die as fast as it starts."""
    waits = []
    for recoveries in (0, 1, 5, 30):
        (run,) = running("dead", recoveries=recoveries)
        leases.recover("default")
        stored = run.model
        assert stored.recoveries == recoveries + 1
        if stored.status == "WAITING":
            assert stored.waiting_for == "recovery"
            waits.append((stored.wake_at - timezone.now()).total_seconds())
        else:
            waits.append(0)
    assert waits[0] == 0
    assert 0 < waits[1] <= 0.3
    assert 1 < waits[2] <= 3.3
    assert 14 < waits[3] <= 30.1


def test_recovering_hundreds_is_done_in_batches():
    running("dead", leases.BATCH + 1)
    assert leases.recover("default") == leases.BATCH
    assert leases.recover("default") == 1


@pytest.mark.django_db(transaction=True)
def test_two_processes_that_recover_at_once_count_one_crash():
    (run,) = running("dead")
    assert sorted(together(*[lambda: leases.recover("default")] * 3)) == [0, 0, 1]
    assert run.model.recoveries == 1


def test_only_those_named_are_buried(lease):
    other = Lease("default", "worker")
    other.register()
    assert leases.bury("default", [lease.id]) == 1
    assert Worker.objects.get().pk == other.id


def test_a_dead_process_of_this_machine_is_known_at_once():
    here, alive = compat.machine_id(), compat.process_started(os.getpid())
    neighbours = [
        ("alive", here, os.getpid(), alive),
        ("pid was given to another", here, os.getpid(), alive - 1),
        ("gone", here, 2**22 + 5, 5),
        ("of another machine", "another", 2**22 + 5, 5),
        ("of an unknown start", here, 2**22 + 5, None),
    ]
    assert leases.dead_neighbours(neighbours) == ["pid was given to another", "gone"]


def test_where_processes_cannot_be_told_apart_nobody_is_judged(monkeypatch):
    monkeypatch.setattr(compat, "machine_id", lambda: "")
    assert leases.dead_neighbours([("gone", "", 2**22 + 5, 5)]) == []


# -- Handing back ---------------------------------------------------------------------------------------------------


def test_a_process_that_stops_hands_back_and_no_crash_is_counted(lease):
    (mine,), (others,) = running(lease.id), running("another")
    lease.remove()
    assert (mine.status, mine.model.worker, mine.model.recoveries) == ("PENDING", "", 0)
    assert (others.status, others.model.worker) == ("RUNNING", "another")
    assert not Worker.objects.exists()


@durable.step(name="stop_here", atomic=False)
def stop_here():
    Ledger.objects.create(key="stop_here")
    for lease in leases.of_this_process():
        if lease.active:
            lease.stopping.set()


@durable.step(name="next")
def next_one():
    Ledger.objects.create(key="next")


@durable.workflow(name="tests.leases.stopped")
def stopped():
    stop_here()
    next_one()


@pytest.mark.django_db(transaction=True)
def test_a_process_without_time_starts_no_further_step_but_keeps_what_was_done():
    run = stopped.start()
    lease = Lease("default", "worker")
    lease.register()
    (claim,) = claims.claim(lease, 1)
    assert execute(claim, lease) is None
    assert [step.name for step in run.model.steps.all()] == ["stop_here"]
    lease.remove()
    run_until_idle()
    assert (run.status, times("stop_here"), times("next")) == ("SUCCEEDED", 1, 1)


def test_the_heartbeat_ends_what_was_cancelled_or_taken_elsewhere(lease):
    kept, cancelled, taken = running(lease.id, 3)
    for run in (kept, cancelled, taken):
        lease.active[run.id] = RunContext(run.model, echo, lease, {}, "default")
    WorkflowRun.objects.filter(pk=cancelled.id).update(status="CANCELLED")
    WorkflowRun.objects.filter(pk=taken.id).update(attempt=2)
    lease.check_active()
    assert [lease.active[run.id].ended is None for run in (kept, cancelled, taken)] == [True, False, False]
    assert not isinstance(lease.active[taken.id].ended, Exception)


# -- Direct calls ---------------------------------------------------------------------------------------------------


def heartbeats():
    return [thread for thread in threading.enumerate() if isinstance(thread, Heartbeat) and not thread.done.is_set()]


@pytest.mark.django_db(transaction=True)
def test_the_first_direct_call_registers_the_process_and_later_ones_use_it():
    assert not Worker.objects.exists()
    checkout("A")
    row = Worker.objects.get()
    assert (row.kind, row.pid) == ("web", os.getpid())
    checkout("B")
    assert together(lambda: checkout("C"), lambda: checkout("D"))[0]["paid"] == 4900
    assert Worker.objects.get().pk == row.pk
    assert set(WorkflowRun.objects.values_list("worker", flat=True)) == {row.pk}
    assert len(heartbeats()) == 1


@pytest.mark.django_db(transaction=True)
def test_a_start_registers_nobody():
    checkout.start("A")
    assert not Worker.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_process_that_was_declared_dead_goes_on_as_another():
    checkout("A")
    first = Worker.objects.get().pk
    heartbeat._inline["default"][0].lose()
    Worker.objects.all().delete()
    checkout("B")
    assert Worker.objects.get().pk != first
    assert ledger_of("B") == [1, 1, 1]


@pytest.mark.django_db(transaction=True)
def test_a_child_process_takes_a_lease_of_its_own():
    parent = inline_lease("default")
    lock = heartbeat._lock
    heartbeat._after_fork()
    assert inline_lease("default").id != parent.id
    assert heartbeat._lock is not lock
    assert Worker.objects.count() == 2


def test_a_tests_own_transaction_has_no_row_and_no_thread():
    before = heartbeats()
    checkout("A")
    assert not Worker.objects.exists()
    assert heartbeats() == before


@pytest.mark.django_db(transaction=True)
def test_a_web_process_that_dies_in_a_direct_call_is_recovered_by_any_worker():
    with crash_after("charge"):
        checkout.using(run_id="order-1")("A")
    run = durable.get_run("order-1")
    assert run.status == "RUNNING"
    run_until_idle()
    assert run.result(timeout=0) == {"seat": "seat 1", "paid": 4900}
    assert (ledger_of("A"), run.model.recoveries) == ([1, 1, 1], 1)


@pytest.mark.django_db(transaction=True)
@pytest.mark.timeout(20)
def test_a_second_call_goes_on_where_the_first_ones_process_died():
    """There may be no worker at all: who waits for the run has to find out that nobody executes it."""
    with crash_after("charge"):
        checkout.using(run_id="order-1")("A")
    assert elsewhere(lambda: checkout.using(run_id="order-1")("A")) == {"seat": "seat 1", "paid": 4900}
    assert ledger_of("A") == [1, 1, 1]


@durable.workflow(name="tests.leases.exits")
def exits():
    raise SystemExit(3)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_process_that_is_ended_in_a_direct_call_hands_its_run_back(monkeypatch, error):
    def body():
        raise error

    monkeypatch.setattr(exits, "func", body)
    with pytest.raises(error):
        exits.using(run_id="1")()
    assert (durable.get_run("1").status, durable.get_run("1").model.recoveries) == ("PENDING", 0)


def test_a_workflow_that_exits_fails_in_a_worker():
    run = exits.start()
    neighbour = checkout.start("A")
    run_until_idle()
    assert (run.status, neighbour.status) == ("FAILED", "SUCCEEDED")
    assert "SystemExit" in run.model.error


@pytest.mark.django_db(transaction=True)
def test_a_heartbeat_renews_from_a_connection_of_its_own(settings):
    settings.DURABLE = {"HEARTBEAT_SECONDS": 0.01}
    lease = Lease("default", "worker")
    lease.register()
    before = Worker.objects.get().last_seen
    thread = Heartbeat(lease)
    thread.start()
    try:
        while Worker.objects.get().last_seen == before:
            assert thread.is_alive()
    finally:
        thread.stop()
    assert not thread.is_alive()
    assert connection.connection is not None


@pytest.mark.django_db(transaction=True)
def test_a_heartbeat_that_finds_no_row_ends_and_the_lease_is_lost(settings):
    settings.DURABLE = {"HEARTBEAT_SECONDS": 0.01}
    lease = Lease("default", "worker")
    lease.register()
    Worker.objects.all().delete()
    thread = Heartbeat(lease)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert lease.lost


def test_forgetting_ends_the_heartbeats():
    forget_inline_leases()
    assert heartbeats() == []
