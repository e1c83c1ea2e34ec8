"""The tables: what a run shows of itself, the named selections, and what a deletion takes with it."""

import pytest
from django.contrib.auth.models import Permission
from django.db import IntegrityError, models, transaction

import django_durable as durable
from django_durable.models import StepCheckpoint, Worker, WorkflowRun
from django_durable.states import FINISHED, RunStatus
from django_durable.testing import run_until_idle
from tests.app.models import Account
from tests.app.workflows import checkout, echo

pytestmark = pytest.mark.django_db


def test_the_steps_of_a_run_are_in_their_order():
    checkout("A")
    run = WorkflowRun.objects.get()
    assert [step.position for step in run.steps.all()] == [1, 2, 3]
    assert [str(step) for step in run.steps.all()] == ["1. reserve", "2. charge", "3. fulfil"]
    assert str(run) == f"tests.checkout {run.pk}"


def test_a_run_has_what_the_documentation_promises():
    promised = """id workflow status queue priority partition_key deduplication_key attributes input output error
        created_at run_after started_at finished_at deadline wake_at waiting_for attempt failures recoveries worker
        parent forked_from version cancel_reason"""
    assert set(promised.split()) <= {field.name for field in WorkflowRun._meta.get_fields()}
    promised = "run position name kind status output error attempts started_at finished_at"
    assert set(promised.split()) <= {field.name for field in StepCheckpoint._meta.get_fields()}
    promised = "id kind host pid queues version started_at last_seen"
    assert set(promised.split()) <= {field.name for field in Worker._meta.get_fields()}


@pytest.mark.parametrize("status", RunStatus)
def test_the_named_selections(status):
    run = echo.start()
    WorkflowRun.objects.update(status=status)
    found = {
        name
        for name in ("pending", "running", "waiting", "finished", "failed", "dead", "stuck", "orphaned")
        if getattr(WorkflowRun.objects, name)().filter(pk=run.id).exists()
    }
    expected = {status.value.lower()} & {"pending", "running", "waiting", "failed", "dead"}
    expected |= {"finished"} if status in FINISHED else set()
    # Nobody has a row for it here.
    expected |= {"stuck", "orphaned"} if status == "RUNNING" else set()
    assert found == expected
    assert WorkflowRun.objects.get().is_finished == (status in FINISHED)


def test_selections_can_be_combined():
    account = Account.objects.create(name="Ada")
    run = echo.using(related=account).start()
    assert WorkflowRun.objects.for_object(account).pending().filter(queue="default").get().pk == run.id
    assert not WorkflowRun.objects.for_object(account).finished().exists()


def test_deleting_a_run_deletes_its_steps_so_that_its_id_can_be_used_again():
    checkout.using(run_id="1")("A")
    WorkflowRun.objects.get().delete()
    assert not StepCheckpoint.objects.exists()
    checkout.using(run_id="1")("B")
    assert StepCheckpoint.objects.count() == 3


def test_a_step_has_one_outcome():
    checkout.using(run_id="1")("A")
    step = StepCheckpoint.objects.get(position=1)
    with pytest.raises(IntegrityError), transaction.atomic():
        StepCheckpoint.objects.bulk_create([step])


def test_related_models_that_are_gone_are_no_error():
    run = echo.using(related=Account.objects.create(name="Ada")).start()
    for label in ("tests_app.removed", "removed_app.model", "no label at all"):
        WorkflowRun.objects.update(related_model=label)
        assert run.model.related is None


def test_the_permissions_of_the_documentation_exist():
    names = set(Permission.objects.filter(content_type__model="workflowrun").values_list("codename", flat=True))
    promised = "view_payload start_run cancel_run pause_run resume_run fork_run send_message view_workflowrun"
    assert set(promised.split()) <= names


def test_index_names_fit_every_database():
    for model in (WorkflowRun, StepCheckpoint, Worker):
        for index in [*model._meta.indexes, *model._meta.constraints]:
            assert len(index.name) <= 30
            assert index.name.startswith("durable_")


def test_payloads_are_text_so_that_no_database_can_reorder_or_refuse_them():
    for model, names in [(WorkflowRun, ("input", "output", "exception")), (StepCheckpoint, ("output", "exception"))]:
        for name in names:
            assert type(model._meta.get_field(name)) is models.TextField
    run = echo.start({"z": 1, "a": float("nan"), "n": "\0"})
    assert run.model.input.isascii()
    run_until_idle()
    assert list(run.result(timeout=0)) == ["z", "a", "n"]


def test_relations_between_runs_are_no_constraint():
    """Deleting the parent of a million runs must not lock or delete them."""
    for name in ("parent", "forked_from"):
        field = WorkflowRun._meta.get_field(name)
        assert field.db_constraint is False
        assert field.remote_field.on_delete is models.DO_NOTHING
    child = echo.start()
    WorkflowRun.objects.filter(pk=child.id).update(parent_id="gone")
    assert durable.get_run(child.id).model.parent_id == "gone"
