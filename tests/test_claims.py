"""Who executes what next: claiming, what comes due, and what nobody here knows."""

from datetime import timedelta

import pytest
from django.db import connection
from django.db.models import F
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

import django_durable as durable
from django_durable.engine import claims, leases
from django_durable.engine.leases import Lease
from django_durable.models import WorkflowRun
from django_durable.states import RunStatus
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import checkout, echo, ledger_of
from tests.threads import together

pytestmark = pytest.mark.django_db


@pytest.fixture
def lease():
    return Lease("default", "worker", stored=False)


def ids(claimed):
    return [claim.run.pk for claim in claimed]


# -- Claiming -------------------------------------------------------------------------------------------------------


def test_a_claim_takes_what_is_due_and_says_whose_it_is(lease):
    run = echo.start(5)
    (claim,) = claims.claim(lease, 10)
    stored = run.model
    assert (stored.status, stored.worker, stored.attempt) == ("RUNNING", lease.id, 1)
    assert stored.started_at is not None
    # What the executor holds is what is stored.
    assert (claim.run.status, claim.run.worker, claim.run.attempt) == ("RUNNING", lease.id, 1)
    assert claim.run.started_at == stored.started_at
    assert (claim.definition.name, claim.recorded) == ("tests.echo", {})
    assert claims.claim(lease, 10) == []


def test_a_claim_takes_no_more_than_it_was_asked_for_the_important_first_then_the_older(lease):
    expected = {}
    for name, priority in [("a", 0), ("b", 9), ("c", 0), ("d", -9), ("e", 9)]:
        expected[name] = echo.using(priority=priority).start(name).id
    taken = [ids(claims.claim(lease, 2)) for _ in range(3)]
    assert taken == [[expected[name] for name in part] for part in ("be", "ac", "d")]


def test_a_claim_of_some_queues_leaves_the_others(lease):
    mail, slow, rest = (echo.using(queue=queue).start() for queue in ("mail", "slow", "default"))
    assert set(ids(claims.claim(lease, 10, queues=["mail", "slow"]))) == {mail.id, slow.id}
    assert rest.status == "PENDING"
    assert claims.claim(lease, 10, queues=["mail"]) == []
    assert ids(claims.claim(lease, 10)) == [rest.id]


@pytest.mark.parametrize("status", [status for status in RunStatus if status != "PENDING"])
def test_only_what_is_pending_is_claimed(lease, status):
    run = echo.start()
    WorkflowRun.objects.update(status=status)
    assert claims.claim(lease, 10) == []
    assert run.status == status


def test_a_run_comes_with_its_history(lease):
    for run_id in "ab":
        with crash_after("charge"):
            checkout.using(run_id=run_id)("A")
    leases.recover("default")
    claimed = claims.claim(lease, 10)
    assert ids(claimed) == ["a", "b"]
    for claim in claimed:
        assert {position: step.name for position, step in claim.recorded.items()} == {1: "reserve", 2: "charge"}


@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("executed", [False, True], ids=["new", "executed before"])
def test_a_claim_is_a_few_statements_however_many_runs(lease, count, executed):
    WorkflowRun.objects.bulk_create(
        WorkflowRun(
            id=f"run {n}",
            workflow="tests.checkout",
            input='{"args": ["A"], "kwargs": {}}',
            created_at=timezone.now(),
            run_after=timezone.now(),
            attempt=int(executed),
        )
        for n in range(count)
    )
    with CaptureQueriesContext(connection) as queries:
        assert len(claims.claim(lease, 50)) == count
    statements = [query["sql"] for query in queries if not query["sql"].startswith(("SAVEPOINT", "RELEASE"))]
    # A look, where that spares idle workers a write lock; the claim; the checkpoints, if there can be any.
    look = [] if connection.features.has_select_for_update_skip_locked else ["SELECT"]
    assert [sql.split()[0] for sql in statements] == [*look, "WITH", *(["SELECT"] if executed else [])]


@pytest.mark.django_db(transaction=True)
def test_two_workers_never_claim_the_same_run():
    for _ in range(40):
        echo.start()

    def take():
        lease = Lease("default", "worker", stored=False)
        return [run_id for _ in range(10) for run_id in ids(claims.claim(lease, 3))]

    taken = [run_id for worker in together(take, take, take) for run_id in worker]
    assert len(taken) == len(set(taken)) == 40
    assert set(WorkflowRun.objects.values_list("attempt", flat=True)) == {1}


def test_different_time_limits_are_claimed_together(lease):
    runs = {timeout: echo.using(timeout=timeout).start() for timeout in (None, 60, 3600)}
    assert len(claims.claim(lease, 10)) == 3
    for timeout, run in runs.items():
        stored = run.model
        length = stored.deadline and (stored.deadline - stored.started_at).total_seconds()
        assert length == timeout


def test_a_time_limit_is_set_once(lease):
    run = echo.using(timeout=60).start()
    claims.claim(lease, 1)
    before = run.model.deadline
    WorkflowRun.objects.update(status="PENDING")
    advance("30 seconds")
    claims.claim(Lease("default", "worker", stored=False), 1)
    assert run.model.deadline == before
    assert run.model.attempt == 2


def test_the_codes_version_is_shown_beside_the_run(settings, lease):
    settings.DURABLE = {"VERSION": "2030.1"}
    run = echo.start()
    claims.claim(lease, 1)
    assert run.model.version == "2030.1"


# -- Names ----------------------------------------------------------------------------------------------------------


def test_a_workflow_that_nobody_here_knows_stays_and_blocks_nobody(lease):
    unknown = echo.using(priority=9).start()
    WorkflowRun.objects.update(workflow="shop.gone")
    known = echo.start("known")
    assert run_until_idle() == 1
    assert (unknown.status, unknown.model.attempt, known.status) == ("PENDING", 0, "SUCCEEDED")
    assert claims.unknown_workflows("default") == {"shop.gone"}
    assert claims.unknown_workflows("default", ["mail"]) == set()
    # Its app is installed again.
    WorkflowRun.objects.filter(pk=unknown.id).update(workflow="tests.echo")
    assert run_until_idle() == 1


# -- Time -----------------------------------------------------------------------------------------------------------


def test_what_has_waited_long_enough_is_woken_and_queues_up_by_its_time():
    runs = [echo.using(run_after=timedelta(minutes=minutes)).start() for minutes in (10, 20, 30)]
    assert claims.wake_due("default") == 0
    advance("25 minutes")
    assert claims.wake_due("default") == 2
    assert [run.status for run in runs] == ["PENDING", "PENDING", "WAITING"]
    woken = runs[0].model
    assert (woken.wake_at, woken.waiting_for) == (None, "")
    assert timedelta(minutes=9) < woken.run_after - woken.created_at < timedelta(minutes=11)


def test_waking_thousands_is_done_in_batches_of_two_statements(django_assert_num_queries):
    now = timezone.now()
    WorkflowRun.objects.bulk_create(
        WorkflowRun(
            id=f"run {n}", workflow="tests.echo", status="WAITING", input="", created_at=now, run_after=now, wake_at=now
        )
        for n in range(claims.BATCH + 1)
    )
    advance("1 second")
    with django_assert_num_queries(2):
        assert claims.wake_due("default") == claims.BATCH
    assert claims.wake_due("default") == 1
    with django_assert_num_queries(1):
        assert claims.wake_due("default") == 0


@pytest.mark.parametrize("status", [RunStatus.PENDING, RunStatus.RUNNING, RunStatus.WAITING])
def test_whoever_is_beyond_its_time_is_cancelled_wherever_it_stands(status):
    late, early, free = echo.using(timeout=60).start(), echo.using(timeout=3600).start(), echo.start()
    WorkflowRun.objects.update(status=status)
    WorkflowRun.objects.filter(timeout__isnull=False).update(deadline=F("created_at"))
    WorkflowRun.objects.filter(pk=early.id).update(deadline=timezone.now() + timedelta(hours=1))
    assert claims.cancel_overdue("default") == 1
    stored = late.model
    assert (stored.status, stored.cancel_reason, stored.wake_at) == ("CANCELLED", "timeout", None)
    assert stored.finished_at is not None
    assert early.status == free.status == status
    assert claims.cancel_overdue("default") == 0


# -- Crashes --------------------------------------------------------------------------------------------------------


@durable.step(name="killer", atomic=False)
def killer():
    Ledger.objects.create(key="killer")


@durable.workflow(name="tests.claims.killing", max_recoveries=2)
def killing():
    killer()


def crash_once():
    with crash_before("killer"):
        run_until_idle()


def test_a_run_that_kills_its_workers_is_set_aside_at_the_crash_after_the_last_recovery():
    run = killing.start()
    for crashes in (1, 2, 3):
        crash_once()
        assert (run.status, run.model.recoveries) == ("RUNNING", crashes - 1)
    neighbour = checkout.start("A")
    run_until_idle()
    stored = run.model
    assert (stored.status, stored.recoveries) == ("DEAD", 3)
    assert "3 times (max_recoveries=2)" in stored.error
    assert stored.finished_at is not None
    assert ledger_of("A") == [1, 1, 1]
    assert neighbour.status == "SUCCEEDED"
    with pytest.raises(durable.RunDead, match="max_recoveries=2"):
        run.result(timeout=0)
    # After a person has mended it, it has all its chances again.
    assert run.resume() is True
    assert run.model.recoveries == 0
    crash_once()
    run_until_idle()
    assert (run.status, run.model.recoveries) == ("SUCCEEDED", 1)


def test_a_run_that_may_not_crash_at_all():
    @durable.workflow(name="tests.claims.fragile", max_recoveries=0)
    def fragile():
        killer()

    run = fragile.start()
    crash_once()
    run_until_idle()
    assert run.status == "DEAD"
