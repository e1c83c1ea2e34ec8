"""`now`, `random`, `uuid4`: the same on every replay, another in every run, and no write."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

import django_durable as durable
from django_durable.models import WorkflowRun
from django_durable.testing import advance, crash_after, crash_before, run_until_idle

pytestmark = pytest.mark.django_db

# What each execution saw, and the queries that its draws made.
executions: list[list] = []


@pytest.fixture(autouse=True)
def no_executions_yet():
    executions.clear()


def draw():
    return durable.now(), durable.random(), durable.uuid4()


@durable.step(name="work", atomic=False)
def work(number):
    return number


@durable.workflow(name="tests.determinism.flow")
def flow(pauses=2):
    executions.append([])
    executions[-1].append(draw())
    for number in range(pauses):
        work(number)
        executions[-1].append(draw())
        durable.sleep(60)
        executions[-1].append(draw())


@durable.workflow(name="tests.determinism.branching")
def branching():
    """Its course hangs on what it draws."""
    name = "low" if durable.random() < 0.5 else "high"
    durable.run_step(f"{name} {durable.uuid4()}", int)
    durable.run_step(f"at {durable.now().isoformat()}", int)
    durable.run_step("third", int)
    return durable.uuid4()


def drain(run):
    while run.status not in ("SUCCEEDED", "FAILED", "DEAD"):
        run_until_idle()
        advance("2 minutes")


def test_every_replay_sees_the_same():
    run = flow.start()
    drain(run)
    assert len(executions) == 3
    longest = executions[-1]
    assert [len(each) for each in executions] == [2, 4, 5]
    assert all(each == longest[: len(each)] for each in executions)


@pytest.mark.parametrize("crash", [crash_before, crash_after])
def test_after_a_crash_too(crash):
    run = flow.start()
    with crash("work"):
        run_until_idle()
    drain(run)
    assert all(each == executions[-1][: len(each)] for each in executions)


def test_each_draw_is_another_and_each_run_has_its_own():
    for _ in range(2):
        drain(flow.start())
    draws = [each for execution in (executions[2], executions[-1]) for each in execution]
    assert len({number for _, number, _ in draws}) == 10
    assert len({uuid for *_, uuid in draws}) == 10


def test_numbers_and_uuids_are_of_the_usual_form():
    @durable.workflow(name="tests.determinism.many")
    def many():
        return [durable.random() for _ in range(2000)], [durable.uuid4() for _ in range(100)]

    numbers, uuids = many()
    assert all(0 <= number < 1 for number in numbers)
    # Ten boxes of two hundred: none is empty or overfull.
    boxes = [sum(int(number * 10) == box for number in numbers) for box in range(10)]
    assert min(boxes) > 120
    assert max(boxes) < 280
    assert {(type(each), each.version, each.variant) for each in uuids} == {(UUID, 4, "specified in RFC 4122")}


def test_time_is_that_of_the_latest_outcome():
    run = flow.start()
    before = datetime.now(UTC)
    drain(run)
    times = [moment for moment, *_ in executions[-1]]
    assert times == sorted(times)
    assert {moment.tzinfo for moment in times} == {UTC}
    assert abs(times[0] - before) < timedelta(minutes=1)
    assert times[0] == run.model.started_at
    steps = list(run.model.steps.all())
    assert times[1:] == [step.finished_at for step in steps]
    # It sleeps a minute, and the clock of the test is moved by two.
    assert times[2] - times[1] >= timedelta(seconds=59)


def test_they_make_no_query():
    @durable.workflow(name="tests.determinism.counted")
    def counted():
        work(1)
        with CaptureQueriesContext(connection) as queries:
            for _ in range(10):
                draw()
        return len(queries)

    assert counted() == 0


def test_the_restarted_and_the_continued_draw_anew():
    @durable.workflow(name="tests.determinism.line")
    def line(drawn=()):
        drawn = (*drawn, durable.uuid4())
        if len(drawn) < 3:
            durable.continue_as_new(drawn)
        return drawn

    assert len(set(line())) == 3
    run = WorkflowRun.objects.get(continued_as="", workflow="tests.determinism.line")
    again = durable.get_run(run.pk).restart()
    run_until_idle()
    assert again.result(0)[:2] == durable.get_run(run.pk).result(0)[:2]
    assert again.result(0)[2] != durable.get_run(run.pk).result(0)[2]


@pytest.mark.parametrize("number", range(4))
def test_a_fork_sees_again_what_its_history_was_made_from(number):
    """Or its course would leave the history that it keeps. What it draws behind that is its own."""
    run = branching.start()
    run_until_idle()
    advance("1 hour")
    fork = run.fork(from_step=4)
    run_until_idle()
    assert fork.status == "SUCCEEDED", fork.model.error
    assert fork.result(0) != run.result(0)

    advance("1 hour")
    later = fork.fork(from_step=3)
    run_until_idle()
    assert later.status == "SUCCEEDED", later.model.error
    names = [[step.name for step in each.model.steps.all()] for each in (run, fork, later)]
    assert names[0] == names[1] == names[2]

    fresh = run.fork(from_step=2)
    run_until_idle()
    mine, its = ([step.name for step in each.model.steps.all()] for each in (fresh, run))
    assert mine[0] == its[0]
    # From here on time is the fork's.
    assert mine[1] != its[1]


def test_a_fork_of_a_run_that_was_deleted_goes_on():
    run = branching.start()
    run_until_idle()
    fork = run.fork(from_step=4)
    run.model.delete()
    run_until_idle()
    assert fork.status == "SUCCEEDED", fork.model.error


@pytest.mark.parametrize("name", ["now", "random", "uuid4"])
def test_they_belong_to_a_workflow(name):
    function = getattr(durable, name)
    with pytest.raises(durable.NotInWorkflow, match=rf"{name}\(\) was called outside a workflow"):
        function()

    @durable.workflow(name=f"tests.determinism.step_{name}")
    def inside():
        durable.run_step("step", function)

    with pytest.raises(durable.NotInWorkflow, match="inside a step"):
        inside()
