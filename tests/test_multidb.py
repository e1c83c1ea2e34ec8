"""Two databases: steps whose data live in another one than the run, and runs that live there as a whole."""

import pytest
from django.db import connections

import django_durable as durable
from django_durable import signals
from django_durable.exceptions import Crash
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.states import RunStatus
from django_durable.testing import crash_after, crash_before, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import checkout
from tests.threads import elsewhere

pytestmark = pytest.mark.django_db(databases=["default", "other"])


def there(key="there"):
    return Ledger.objects.using("other").filter(key=key).count()


tries: list[int] = []


@pytest.fixture(autouse=True)
def no_tries_yet():
    tries.clear()


@durable.step(name="there", using="other", max_attempts=2, retry_delay=0)
def write_there(what="succeed"):
    Ledger.objects.using("other").create(key="there")
    tries.append(1)
    if what == "fail" or (what == "fail once" and len(tries) == 1):
        raise ValueError("after the write")
    if what == "unstorable":
        return lambda: None
    return {"tries": len(tries), "in": connections["other"].in_atomic_block}


@durable.step(name="here")
def write_here():
    Ledger.objects.create(key="here")


@durable.workflow(name="tests.multidb.both")
def both(what="succeed"):
    write_here()
    value = write_there(what)
    write_here()
    return value


def rows(alias):
    fields = ("position", "name", "status", "attempts", "database")
    return list(StepCheckpoint.objects.using(alias).order_by("position").values_list(*fields))


def test_a_step_elsewhere_has_its_checkpoint_there_and_the_run_shows_it_too():
    run = both.start()
    run_until_idle()
    assert run.result(timeout=0) == {"tries": 1, "in": True}
    assert there() == 1
    assert rows("other") == [(2, "there", "SUCCEEDED", 1, "other")]
    assert [(step.name, step.database) for step in run.model.steps.all()] == [
        ("here", ""),
        ("there", "other"),
        ("here", ""),
    ]


@pytest.mark.parametrize("what", ["fail", "unstorable"])
def test_a_failure_leaves_nothing_there_and_is_recorded_here(what):
    for _ in range(2):
        with pytest.raises((ValueError, durable.SerializationError)):
            both.using(run_id="1")(what)
    assert (there(), rows("other")) == (0, [])
    assert rows("default")[1][:3] == (2, "there", "FAILED")


def test_a_retry_there_succeeds():
    assert both("fail once")["tries"] == 2
    assert there() == 1
    assert rows("default")[1] == (2, "there", "SUCCEEDED", 2, "other")


def dying_before_the_mirror():
    """The process dies between the two commits: the step is done there, and the run does not know yet."""

    def check(execute, sql, params, many, context):
        if tries and sql.startswith("INSERT") and StepCheckpoint._meta.db_table in sql:
            raise Crash(sql)
        return execute(sql, params, many, context)

    return connections["default"].execute_wrapper(check)


@pytest.mark.parametrize("what", ["succeed", "fail once"])
@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_crash_between_the_two_commits_repeats_nothing(what):
    run = both.start(what)
    if what == "succeed":
        with pytest.raises(Crash), dying_before_the_mirror():
            run_until_idle()
    else:
        with crash_before("there"):
            run_until_idle()
        tries.append(1)
        with pytest.raises(Crash), dying_before_the_mirror():
            run_until_idle()
    assert (there(), len(rows("other")), len(rows("default"))) == (1, 1, 1)
    done = len(tries)
    run_until_idle()
    assert run.result(timeout=0)["tries"] == done == len(tries)
    assert there() == 1
    assert [step.name for step in run.model.steps.all()] == ["here", "there", "here"]


def test_a_replay_does_not_look_there_again():
    """Recorded here, it is answered from here: one SELECT for all steps."""
    run = both.start()
    with crash_before("here"):
        run_until_idle()
    run_until_idle()
    StepCheckpoint.objects.using("other").all().delete()
    WorkflowRun.objects.update(status="PENDING")
    run_until_idle()
    assert run.status == "SUCCEEDED"
    assert there() == 1


@durable.workflow(name="tests.multidb.none")
def never_there():
    write_here()


@pytest.mark.django_db(databases=["default"])
def test_a_workflow_without_such_a_step_never_reads_the_other_database():
    """Django refuses queries on a database that a test does not declare: this one would fail."""
    run = never_there.start()
    with crash_after("here"):
        run_until_idle()
    run_until_idle()
    assert run.status == "SUCCEEDED"


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_step_there_of_a_run_that_was_cancelled_writes_nothing(monkeypatch):
    def body():
        elsewhere(lambda: WorkflowRun.objects.move(RunStatus.CANCELLED))
        write_there()

    monkeypatch.setattr(both, "func", body)
    run = both.start()
    run_until_idle()
    assert (run.status, there(), rows("other"), rows("default")) == ("CANCELLED", 0, [], [])


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_an_outcome_of_another_executor_there_is_taken(monkeypatch):
    def another():
        run = WorkflowRun.objects.get()
        now = run.created_at
        StepCheckpoint.objects.using("other").create(
            run_id=run.pk,
            position=1,
            name="there",
            kind="atomic",
            output='"the other\'s"',
            attempt=1,
            database="other",
            started_at=now,
            finished_at=now,
        )

    def body():
        elsewhere(another)
        return write_there()

    monkeypatch.setattr(both, "func", body)
    assert both() == "the other's"
    assert (there(), len(tries)) == (0, 1)
    assert rows("default") == rows("other") == [(1, "there", "SUCCEEDED", 1, "other")]


def test_a_step_there_is_told_of_once():
    heard = []

    def receive(sender, name, database, **facts):
        heard.append((name, database))

    signals.step_recorded.connect(receive)
    try:
        both()
    finally:
        signals.step_recorded.disconnect(receive)
    assert heard == [("here", "default"), ("there", "default"), ("here", "default")]


def test_a_crash_after_a_step_there_is_after_both_commits():
    run = both.start()
    with crash_after("there"):
        run_until_idle()
    assert len(rows("default")) == 2
    run_until_idle()
    assert (run.status, there()) == ("SUCCEEDED", 1)


@durable.workflow(name="tests.multidb.compensating", max_attempts=2, retry_delay=0)
def compensating():
    try:
        sometimes()
    except ConnectionError:
        write_there()
        raise
    return write_there()


@durable.step(name="sometimes", atomic=False)
def sometimes():
    if durable.current().run_id and WorkflowRun.objects.get().failures == 0:
        raise ConnectionError


def test_a_retry_forgets_the_later_steps_there_too():
    run = compensating.start()
    run_until_idle()
    # The compensation was one write; the retry's own step is another, not answered from the compensation's.
    assert (run.status, there()) == ("SUCCEEDED", 2)
    assert [row[:2] for row in rows("other")] == [(2, "there")]


def test_a_step_whose_database_is_the_runs_own_is_an_ordinary_one():
    @durable.workflow(name="tests.multidb.own")
    def own():
        return write_there()

    own.using(database="other")()
    run = WorkflowRun.objects.using("other").get()
    assert [step.database for step in run.steps.all()] == [""]
    assert StepCheckpoint.objects.using("other").count() == 1
    assert not StepCheckpoint.objects.exists()


def test_a_run_in_another_database_leaves_nothing_in_this_one():
    assert checkout.using(database="other", run_id="1")("A")["paid"] == 4900
    assert not WorkflowRun.objects.exists()
    assert not StepCheckpoint.objects.exists()
    run = durable.get_run("1", database="other")
    assert [step.name for step in run.model.steps.all()] == ["reserve", "charge", "fulfil"]
    assert checkout.using(database="other").start("B").cancel() is True


def test_the_same_id_in_two_databases_is_two_runs():
    here, other = (checkout.using(database=alias, run_id="1").start("A") for alias in ("default", "other"))
    assert here != other
    other.cancel()
    assert here.status == "PENDING"


def test_a_database_that_is_not_there_is_named():
    @durable.step(name="nowhere", using="nowhere")
    def nowhere(): ...

    @durable.workflow(name="tests.multidb.nowhere")
    def workflow():
        nowhere()

    run = workflow.start()
    run_until_idle()
    assert run.status == "FAILED"
    assert "nowhere" in run.model.error
