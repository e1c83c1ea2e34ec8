"""What durability costs: commits and statements, counted. A change that adds one is seen here."""

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

import django_durable as durable
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.testing import run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import echo

pytestmark = pytest.mark.django_db(transaction=True)


@durable.step(name="nothing", atomic=False)
def nothing():
    executed.append("nothing")


@durable.step(name="nothing_inside")
def nothing_inside():
    executed.append("nothing_inside")


@durable.step(name="write")
def write():
    Ledger.objects.create(key="written")


executed: list[str] = []


@durable.workflow(name="tests.counts.outside")
def outside(count):
    for _ in range(count):
        nothing()


@durable.workflow(name="tests.counts.inside")
def inside(count):
    for _ in range(count):
        nothing_inside()


@durable.workflow(name="tests.counts.writing")
def writing(count):
    for _ in range(count):
        write()


BOUNDARIES = ("BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT", "RELEASE")


def statements(queries):
    return [query["sql"] for query in queries if not query["sql"].startswith(BOUNDARIES)]


def commits(queries):
    """Each COMMIT, and each writing statement that is a transaction of its own."""
    count, inside_block = 0, False
    for query in queries:
        sql = query["sql"]
        if sql.startswith("BEGIN"):
            inside_block = True
        elif sql.startswith("COMMIT"):
            count, inside_block = count + 1, False
        elif sql.startswith("ROLLBACK"):
            inside_block = False
        elif not inside_block and sql.startswith(("INSERT", "UPDATE", "DELETE")):
            count += 1
    return count


@pytest.fixture
def warm():
    """The process's first direct call registers it: that is once, not once for each run."""
    outside(1)
    inside(1)
    executed.clear()


@pytest.mark.parametrize("count", [0, 1, 10])
@pytest.mark.parametrize(
    ("workflow", "own"), [(outside, 0), (inside, 0), (writing, 1)], ids=["outside", "inside", "writing"]
)
def test_a_direct_run_of_n_steps_is_n_plus_two_commits_and_a_statement_for_each(warm, workflow, own, count):
    with CaptureQueriesContext(connection) as queries:
        workflow(count)
    assert commits(queries) == count + 2
    # The run's INSERT, a checkpoint for each step, the end's UPDATE; and what the user's steps do themselves.
    kinds = [sql.split()[0] for sql in statements(queries)]
    assert kinds == ["INSERT", *(["INSERT"] * (1 + own) * count), "UPDATE"]
    begins = [query["sql"] for query in queries if query["sql"].startswith("BEGIN")]
    assert len(begins) == (0 if workflow is outside else count)


def test_a_started_run_is_claimed_executed_and_ended_in_a_fixed_number_of_statements():
    counts = []
    for count in (0, 10):
        inside.start(count)
        with CaptureQueriesContext(connection) as queries:
            run_until_idle()
        counts.append((len(statements(queries)), commits(queries)))
    (none, none_commits), (ten, ten_commits) = counts
    assert (ten - none, ten_commits - none_commits) == (10, 10)


def test_a_replay_of_a_thousand_steps_is_one_select_and_executes_none():
    run = outside.start(1000)
    now = run.model.created_at
    StepCheckpoint.objects.bulk_create(
        StepCheckpoint(
            run_id=run.id,
            position=position,
            name="nothing",
            output="null",
            attempt=1,
            started_at=now,
            finished_at=now,
        )
        for position in range(1, 1001)
    )
    WorkflowRun.objects.update(attempt=1)
    executed.clear()
    with CaptureQueriesContext(connection) as queries:
        run_until_idle()
    assert run.status == "SUCCEEDED"
    assert executed == []
    table = StepCheckpoint._meta.db_table
    assert [sql.split()[0] for sql in statements(queries) if table in sql] == ["SELECT"]


def test_a_wait_for_a_result_costs_one_statement_a_look():
    run = echo.start()
    run_until_idle()
    with CaptureQueriesContext(connection) as queries:
        run.result()
    assert len(queries) == 1


def test_a_second_call_of_a_finished_run_is_two_statements(warm):
    echo.using(run_id="1")("value")
    with CaptureQueriesContext(connection) as queries:
        assert echo.using(run_id="1")("value") == "value"
    # The INSERT that finds it, whose workflow it is, its result.
    assert [sql.split()[0] for sql in statements(queries)] == ["INSERT", "SELECT", "SELECT"]


def test_runs_do_not_hold_more_connections_than_one(warm):
    from django.db import connections

    for _ in range(50):
        inside(2)
    assert len([each for each in connections.all(initialized_only=True) if each.connection is not None]) <= 2
