"""Approvals: a person decides, once, with the right to do it; and the run waits for that without a thread."""

import threading
from datetime import UTC, datetime, timedelta

import pytest
from asgiref.sync import async_to_sync
from django import forms
from django.contrib.auth.models import AnonymousUser, Permission, User
from django.core.exceptions import PermissionDenied
from django.db import transaction

import django_durable as durable
from django_durable.engine import approvals, claims
from django_durable.engine.context import before_step
from django_durable.engine.heartbeat import inline_lease
from django_durable.engine.replay import execute
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.primitives.approvals import Decision
from django_durable.testing import advance, crash_after, crash_before, run_until_idle
from tests.app.models import Ledger
from tests.app.workflows import times
from tests.threads import together

pytestmark = pytest.mark.django_db

CANCEL = "django_durable.cancel_run"


class Limit(forms.Form):
    amount = forms.IntegerField(max_value=1000)
    until = forms.DateField(required=False)


class NoForm:
    pass


@durable.step(name="ship")
def ship(order):
    Ledger.objects.create(key=f"{order}: shipped")


@durable.workflow(name="tests.approvals.order")
def order(number, permission=None, timeout=None):
    decision = durable.approval("limit", permission=permission, timeout=timeout)
    if decision.approved:
        ship(number)
    return decision


@durable.workflow(name="tests.approvals.form")
def with_form(timeout=None):
    return durable.approval("limit", form=Limit, timeout=timeout).data


@durable.workflow(name="tests.approvals.rounds")
def rounds(count):
    return [durable.approval("round").data for _ in range(count)]


@durable.workflow(name="tests.approvals.line")
def line(number):
    if number:
        return durable.approval("limit").by
    durable.continue_as_new(number + 1)


@durable.step(name="fragile", atomic=False)
def fragile(approved):
    Ledger.objects.create(key="fragile")
    if times("fragile") == 1:
        raise ConnectionError("once")


@durable.workflow(name="tests.approvals.saga", max_attempts=2)
def asked_in_a_saga():
    with durable.saga() as undo:
        decision = durable.approval("limit")
        undo.add(ship, "undone")
        fragile(decision.approved)
    return decision.by


@durable.workflow(name="tests.approvals.wrong")
def wrong(kind):
    arguments = {
        "name": ("",),
        "text": (7,),
        "permission": ("limit", ""),
        "form": ("limit", None, NoForm),
        "local form": ("limit", None, type("Local", (forms.Form,), {})),
        "timeout": ("limit", None, None, -1),
    }
    durable.approval(*arguments[kind])


def waiting(workflow=order, *args):
    run = workflow.start(*args)
    run_until_idle()
    assert run.status == "WAITING"
    return run


def user(name, *codenames):
    made = User.objects.create_user(name)
    for codename in codenames:
        made.user_permissions.add(Permission.objects.get(codename=codename))
    return User.objects.get(pk=made.pk)


@pytest.fixture
def ada():
    return user("ada", "cancel_run")


# -- Deciding -------------------------------------------------------------------------------------------------------


def test_a_run_waits_for_a_person_and_goes_on_with_the_decision(ada):
    run = waiting(order, 7)
    assert (run.model.waiting_for, run.model.worker, run.model.wake_at) == ("approval:limit", "", None)
    assert run_until_idle() == 0

    run.decide("limit", True, by=ada, data={"note": "fine"})
    assert run.status == "PENDING"
    run_until_idle()
    decision = run.result(0)
    assert (decision.approved, decision.by, decision.data, decision.timed_out) == (True, "ada", {"note": "fine"}, False)
    assert decision.decided_at.tzinfo is not None
    assert times("7: shipped") == 1
    step = run.model.steps.get(position=1)
    assert (step.name, step.kind, step.status) == ("approval limit", "approval", "SUCCEEDED")
    assert step.started_at <= decision.decided_at <= step.finished_at


def test_a_rejection_is_an_answer_and_no_error():
    run = waiting(order, 7)
    run.decide("limit", False, data="too much")
    run_until_idle()
    assert run.result(0) == Decision(False, None, "too much", run.result(0).decided_at, False)
    assert times("7: shipped") == 0


def test_nobody_decides_in_time():
    run = waiting(order, 7, None, 3600)
    advance("59 minutes")
    assert run_until_idle() == 0
    advance("2 minutes")
    run_until_idle()
    assert run.result(0) == Decision(False, None, None, None, True)
    with pytest.raises(durable.AlreadyDecided, match=r"'limit' of run .* was open until"):
        run.decide("limit", True)


def test_the_deadline_counts_from_the_question_and_holds_before_a_worker_has_seen_it():
    run = waiting(order, 7, None, 3600)
    advance("50 minutes")
    assert run.pause()
    assert run.resume()
    run_until_idle()
    advance("11 minutes")
    with pytest.raises(durable.AlreadyDecided, match="was open until"):
        run.decide("limit", True)
    run_until_idle()
    assert run.result(0).timed_out


def test_the_first_decision_stands(ada):
    run = waiting(order, 7)
    run.decide("limit", False, by=ada)
    # Before the run has seen it, and after.
    with pytest.raises(durable.AlreadyDecided, match="was rejected by ada at"):
        run.decide("limit", True)
    run_until_idle()
    with pytest.raises(durable.AlreadyDecided, match="was rejected by ada at"):
        run.decide("limit", True)
    assert run.result(0).approved is False
    assert times("7: shipped") == 0


def test_a_decision_that_is_rolled_back_was_none():
    run = waiting(order, 7)
    with transaction.atomic():
        run.decide("limit", False)
        transaction.set_rollback(True)
    assert run_until_idle() == 0
    run.decide("limit", True)
    run_until_idle()
    assert run.result(0).approved is True


def test_two_approvals_of_one_name_are_two_decisions():
    run = waiting(rounds, 3)
    for number in range(3):
        run.decide("round", True, data=number)
        with pytest.raises(durable.AlreadyDecided):
            run.decide("round", True, data="again")
        run_until_idle()
    assert run.result(0) == [0, 1, 2]


def test_a_late_click_does_not_decide_the_next_round():
    run = waiting(rounds, 2)
    (asked,) = approvals.pending("default", run.id)
    run.decide("round", True, data="first", position=asked.position)
    run_until_idle()
    assert run.status == "WAITING"
    with pytest.raises(durable.AlreadyDecided):
        run.decide("round", True, data="a late click", position=asked.position)
    run.decide("round", True, data="second", position=asked.position + 1)
    run_until_idle()
    assert run.result(0) == ["first", "second"]


def test_a_decision_that_the_run_has_not_seen_yet_is_none_that_waits():
    run = waiting(order, 7)
    run.decide("limit", True)
    assert approvals.pending("default", run.id) == []
    with crash_after("approval limit"):
        run_until_idle()
    with pytest.raises(durable.AlreadyDecided, match="was approved by somebody"):
        run.decide("limit", False)
    run_until_idle()
    assert run.result(0).approved


def test_an_atomic_step_of_another_run_decides_with_its_commit():
    @durable.step(name="decider")
    def decider(handle, fails):
        handle.decide("limit", True)
        if fails:
            raise ValueError("undone with the step")

    @durable.workflow(name="tests.approvals.decider")
    def deciding(handle, fails):
        decider(handle, fails)

    run = waiting(order, 7)
    with pytest.raises(ValueError, match="undone"):
        deciding(run, True)
    assert run.status == "WAITING"
    deciding(run, False)
    run_until_idle()
    assert run.result(0).approved


def test_from_async_code():
    run = waiting(order, 7)
    async_to_sync(run.adecide)("limit", True, data=[1])
    run_until_idle()
    assert run.result(0).data == [1]


async def ask_both():
    import asyncio

    async def ask(name):
        decision = await durable.aapproval(name, timeout=3600)
        return await durable.arun_step(f"{name} decided", str, decision.by)

    return await asyncio.gather(ask("left"), ask("right"))


both = durable.workflow(name="tests.approvals.both")(ask_both)


def test_an_async_workflow_asks_several_people_at_once():
    run = waiting(both)
    assert [asked.name for asked in approvals.pending("default", run.id)] == ["left", "right"]
    run.decide("right", True, by=user("bob"))
    run.decide("left", True, by=user("ada"))
    with pytest.raises(durable.AlreadyDecided):
        run.decide("left", False)
    with crash_after("right decided"):
        advance("10 seconds")
        run_until_idle()
    run_until_idle()
    assert run.result(0) == ["ada", "bob"]


# -- Who may, and with what -----------------------------------------------------------------------------------------


def test_only_who_has_the_permission_decides(ada):
    run = waiting(order, 7, CANCEL)
    for stranger in (None, AnonymousUser(), user("bob"), user("eve", "pause_run")):
        with pytest.raises(PermissionDenied, match=r"takes the permission 'django_durable\.cancel_run'"):
            run.decide("limit", True, by=stranger)
    ada.is_active = False
    with pytest.raises(PermissionDenied):
        run.decide("limit", True, by=ada)
    assert run.status == "WAITING"

    ada.is_active = True
    run.decide("limit", True, by=ada)
    run_until_idle()
    assert run.result(0).by == "ada"


def test_a_form_cleans_what_is_approved():
    run = waiting(with_form)
    for data in ({}, None, {"amount": "2000"}, {"amount": "many"}):
        with pytest.raises(durable.InvalidInput) as refused:
            run.decide("limit", True, data=data)
        assert "amount" in refused.value.message_dict
    assert run.status == "WAITING"
    run.decide("limit", True, data={"amount": "70", "until": "2030-01-02", "more": "is dropped"})
    run_until_idle()
    assert run.result(0) == {"amount": 70, "until": datetime(2030, 1, 2).date()}


def test_a_rejection_needs_no_form():
    run = waiting(with_form)
    run.decide("limit", False, data={"because": "no money"})
    run_until_idle()
    assert run.result(0) == {"because": "no money"}


def test_what_the_form_does_not_take_is_said_at_once():
    run = waiting(with_form)
    with pytest.raises(TypeError, match="as a dict"):
        run.decide("limit", True, data=[("amount", 7)])
    other = waiting(order, 7)
    with pytest.raises(durable.SerializationError, match="approval 'limit'"):
        other.decide("limit", True, data=object())
    with pytest.raises(TypeError, match="by as a user"):
        other.decide("limit", True, by="ada")
    with pytest.raises(TypeError, match="True or False"):
        other.decide("limit", "yes")
    assert (run.status, other.status) == ("WAITING", "WAITING")


def test_a_form_is_found_by_its_stored_name_and_nothing_else_is_imported():
    run = waiting(with_form)
    (asked,) = approvals.pending("default", run.id)
    assert asked.form_class() is Limit
    steps = StepCheckpoint.objects.filter(run=run.id)
    stored = steps.get().output
    for path, message in (("this:s", "neither loaded"), (f"{__name__}:NoForm", "no Form class")):
        steps.update(output=stored.replace(f"{__name__}:Limit", path))
        with pytest.raises(durable.SerializationError, match=message):
            run.decide("limit", True, data={"amount": 1})
    import sys

    assert "this" not in sys.modules


def test_what_waits_can_be_listed():
    run = waiting(order, 7, CANCEL, 3600)
    (asked,) = approvals.pending("default", run.id)
    assert (asked.name, asked.position, asked.permission, asked.form) == ("limit", 1, CANCEL, None)
    assert asked.form_class() is None
    assert asked.deadline - asked.asked_at == timedelta(hours=1)
    (without,) = approvals.pending("default", waiting(with_form).id)
    assert (without.permission, without.form, without.deadline) == (None, f"{__name__}:Limit", None)
    run.cancel()
    assert approvals.pending("default", run.id) == []


@pytest.mark.parametrize("kind", ["name", "text", "permission", "form", "local form", "timeout"])
def test_a_wrong_question_is_refused_where_it_is_asked(kind):
    with pytest.raises((TypeError, ValueError)):
        wrong(kind)
    assert StepCheckpoint.objects.count() == 0


# -- Nothing to decide ----------------------------------------------------------------------------------------------


def test_a_run_that_waits_for_something_else_says_for_what():
    run = waiting(order, 7)
    with pytest.raises(durable.NothingToDecide, match=r"'price': it waits for 'approval:limit'"):
        run.decide("price", True)
    fresh = order.start(8)
    with pytest.raises(durable.NothingToDecide, match="it is PENDING"):
        fresh.decide("limit", True)
    run.cancel()
    with pytest.raises(durable.NothingToDecide, match="it is CANCELLED"):
        run.decide("limit", True)
    with pytest.raises(durable.RunNotFound):
        durable.RunHandle("nobody", "default").decide("limit", True)


def test_outside_a_workflow_and_in_a_step_there_is_nobody_to_wait():
    with pytest.raises(durable.NotInWorkflow):
        durable.approval("limit")


def test_a_resumed_run_still_waits_for_the_person():
    run = waiting(order, 7)
    run.cancel()
    assert run.resume()
    run_until_idle()
    run.decide("limit", True)
    run_until_idle()
    assert run.result(0).approved


def test_a_decision_made_while_the_run_is_paused_is_there_when_it_goes_on():
    run = waiting(order, 7)
    run.pause()
    run.decide("limit", True)
    assert run_until_idle() == 0
    run.resume()
    run_until_idle()
    assert run.result(0).approved


def test_a_fork_asks_again_and_leaves_the_original_alone():
    run = waiting(order, 7)
    run.decide("limit", True)
    run_until_idle()
    fork = run.fork(from_step=1)
    run_until_idle()
    assert fork.status == "WAITING"
    fork.decide("limit", False)
    run_until_idle()
    assert (run.result(0).approved, fork.result(0).approved) == (True, False)
    behind = run.fork(from_step=2)
    run_until_idle()
    assert behind.result(0).approved


def test_a_course_that_begins_anew_is_decided_anew():
    run = waiting(asked_in_a_saga)
    run.decide("limit", True, by=user("ada"))
    run_until_idle()
    advance("2 seconds")
    run_until_idle()
    assert run.model.waiting_for == "approval:limit"
    run.decide("limit", True, by=user("bob"))
    run_until_idle()
    assert run.result(0) == "bob"


def test_the_first_of_a_line_is_decided_where_the_line_has_come_to():
    run = line.start(0)
    run_until_idle()
    run.decide("limit", True, by=user("ada"))
    run_until_idle()
    assert run.result(0) == "ada"


# -- Crashes --------------------------------------------------------------------------------------------------------


def test_a_crash_before_the_run_is_parked_asks_once():
    run = order.start(7)
    with crash_before("approval limit"):
        run_until_idle()
    with pytest.raises(durable.NothingToDecide, match="it is RUNNING"):
        run.decide("limit", True)
    run_until_idle()
    run.decide("limit", True)
    run_until_idle()
    assert run.result(0).approved
    assert run.model.recoveries == 1


def test_a_crash_behind_the_decision_keeps_it():
    run = waiting(order, 7)
    run.decide("limit", True)
    with crash_before("ship"):
        run_until_idle()
    with pytest.raises(durable.AlreadyDecided):
        run.decide("limit", False)
    run_until_idle()
    assert run.result(0).approved
    assert times("7: shipped") == 1


def test_a_crash_behind_the_timeout_keeps_it():
    run = waiting(order, 7, None, 60)
    advance("61 seconds")
    with crash_after("approval limit"):
        run_until_idle()
    with pytest.raises(durable.AlreadyDecided, match="was open until"):
        run.decide("limit", True)
    run_until_idle()
    assert run.result(0).timed_out


# -- At the same time -----------------------------------------------------------------------------------------------


def executed(run_id):
    """Execute the run as a worker would, if it is due."""
    lease = inline_lease("default")
    claims.wake_due("default")
    for claim in claims.claim(lease, 1, run_id=run_id):
        execute(claim, lease)


@pytest.mark.django_db(transaction=True)
def test_of_many_deciders_one_is_first():
    for number in range(10):
        run = order.start(number)
        executed(run.id)

        def decide(choice, run=run):
            run.decide("limit", choice, data=threading.get_ident())
            return choice

        outcomes = together(*(lambda choice=choice: decide(choice) for choice in (True, False, True, False)))
        won = [outcome for outcome in outcomes if isinstance(outcome, bool)]
        lost = [outcome for outcome in outcomes if isinstance(outcome, durable.AlreadyDecided)]
        assert (len(won), len(lost)) == (1, 3), outcomes
        executed(run.id)
        assert run.result(0).approved is won[0]
    assert WorkflowRun.objects.filter(status="SUCCEEDED").count() == 10


@pytest.mark.django_db(transaction=True)
def test_of_a_person_and_the_deadline_one_is_first():
    for number in range(15):
        run = order.start(number, None, 3600)
        executed(run.id)
        # Just before the deadline the run is woken: it looks, and gives up, while the person decides.
        steps = StepCheckpoint.objects.filter(run=run.id)
        moment = datetime.now(UTC) + timedelta(seconds=0.1)
        steps.update(finished_at=moment, started_at=moment - timedelta(hours=1))
        WorkflowRun.objects.filter(pk=run.id).update(wake_at=moment - timedelta(seconds=0.2))

        def decide(run=run, moment=moment):
            while datetime.now(UTC) < moment - timedelta(seconds=0.004):
                pass
            run.decide("limit", True)
            return "decided"

        decided, _ = together(decide, lambda run=run: executed(run.id))
        executed(run.id)
        decision = run.result(0)
        if decided == "decided":
            assert (decision.approved, decision.timed_out) == (True, False)
        else:
            assert isinstance(decided, durable.AlreadyDecided), decided
            assert (decision.approved, decision.timed_out) == (False, True)


@pytest.mark.django_db(transaction=True)
def test_a_decision_that_is_being_made_is_waited_for_and_wakes_the_run():
    """A worker has read that nobody has decided, and is about to park the run again, when the decision commits."""
    run = order.start(7)
    executed(run.id)
    run.pause()
    run.resume()
    claimed, written, at_its_look = (threading.Event() for _ in range(3))

    def decide():
        claimed.wait(timeout=10)
        with transaction.atomic():
            run.decide("limit", True)
            written.set()
            at_its_look.wait(timeout=10)

    def replay():
        lease = inline_lease("default")
        (claim,) = claims.claim(lease, 1, run_id=run.id)
        assert claim.recorded[1].status == "WAITING"
        claimed.set()
        written.wait(timeout=10)
        before_step.append(lambda context, name: at_its_look.set())
        try:
            execute(claim, lease)
        finally:
            before_step.pop()

    assert together(decide, replay) == [None, None]
    assert run.status == "SUCCEEDED"
    assert run.result(0).approved
