"""The state machine: what is allowed works, what is not is refused, and every change goes through `move`."""

import pytest
from django.utils import timezone

import django_durable as durable
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.states import FINISHED, RESUMABLE, SOURCES, UNFINISHED, RunStatus, StepStatus
from tests.app.workflows import echo

pytestmark = pytest.mark.django_db

# Written out once more, by hand: the promise of the documentation.
ALLOWED = {
    ("PENDING", "RUNNING"),
    ("RUNNING", "SUCCEEDED"),
    ("RUNNING", "FAILED"),
    ("RUNNING", "WAITING"),
    ("RUNNING", "PENDING"),
    ("RUNNING", "DEAD"),
    ("WAITING", "PENDING"),
    ("PENDING", "WAITING"),
    ("PENDING", "CANCELLED"),
    ("RUNNING", "CANCELLED"),
    ("WAITING", "CANCELLED"),
    ("FAILED", "PENDING"),
    ("CANCELLED", "PENDING"),
    ("DEAD", "PENDING"),
}


@pytest.fixture
def run():
    return echo.start()


@pytest.mark.parametrize("to", RunStatus)
@pytest.mark.parametrize("source", RunStatus)
def test_a_status_changes_only_where_it_may(run, source, to):
    WorkflowRun.objects.update(status=source)
    moved = WorkflowRun.objects.filter(pk=run.id).move(to, cancel_reason="changed with it")
    allowed = (source, to) in ALLOWED
    assert moved == int(allowed)
    assert run.status == (to if allowed else source)
    assert (run.model.cancel_reason == "changed with it") == allowed


def test_a_narrower_move_is_never_a_wider_one(run):
    runs = WorkflowRun.objects.filter(pk=run.id)
    runs.update(status="RUNNING")
    assert runs.move(RunStatus.PENDING, RESUMABLE) == 0
    assert runs.move(RunStatus.SUCCEEDED, RunStatus) == 1
    assert runs.move(RunStatus.PENDING, RunStatus) == 0


def test_many_runs_move_by_one_statement(django_assert_num_queries):
    for _ in range(5):
        echo.start()
    with django_assert_num_queries(1):
        assert WorkflowRun.objects.move(RunStatus.CANCELLED) == 5


def test_every_status_is_reached_and_is_of_one_sort():
    assert set(RunStatus) == set(SOURCES)
    assert set(RunStatus) == UNFINISHED | FINISHED
    assert not UNFINISHED & FINISHED
    assert FINISHED - {"SUCCEEDED"} == set(RESUMABLE)


@pytest.mark.parametrize("status", RunStatus)
def test_cancel_and_resume_obey_the_table(run, status):
    WorkflowRun.objects.update(status=status)
    assert run.cancel() is (status in UNFINISHED)
    WorkflowRun.objects.update(status=status, finished_at=timezone.now())
    assert run.resume() is (status in RESUMABLE)


def test_the_statuses_are_stored_as_the_text_that_handles_show(run):
    assert list(RunStatus.values) == ["PENDING", "RUNNING", "WAITING", "SUCCEEDED", "FAILED", "CANCELLED", "DEAD"]
    assert list(StepStatus.values) == ["SUCCEEDED", "FAILED", "RETRYING", "WAITING"]
    assert run.status == "PENDING"


def test_a_new_status_would_be_no_migration():
    for model, field in [(WorkflowRun, "status"), (StepCheckpoint, "status"), (StepCheckpoint, "kind")]:
        if (deconstructed := model._meta.get_field(field).deconstruct()[3]).get("choices"):
            assert callable(deconstructed["choices"])


@pytest.mark.parametrize("status", FINISHED)
def test_a_handle_tells_every_end(run, status):
    WorkflowRun.objects.update(
        status=status, output="5", exception='{"type": "Gone", "text": "why"}', error="Gone: why"
    )
    errors = {"FAILED": durable.RunFailed, "CANCELLED": durable.RunCancelled, "DEAD": durable.RunDead}
    if status == "SUCCEEDED":
        assert run.result(timeout=0) == 5
    else:
        with pytest.raises(errors[status], match=run.id):
            run.result(timeout=0)
