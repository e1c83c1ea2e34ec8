"""A run's page: one sentence says what is happening and why, and the steps tell the story."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django.utils.html import escape

import django_durable as durable
from django_durable.admin import steps
from django_durable.admin.values import SHOWN
from django_durable.models import StepCheckpoint, Worker, WorkflowRun
from django_durable.testing import run_until_idle
from tests.admin.addresses import LIST, run_page
from tests.admin.conftest import logged_in, staff
from tests.admin.workflows import checkout, count_to, every_status


def page_of(client: Client, run_id: str, **question) -> str:
    response = client.get(run_page(run_id), question)
    assert response.status_code == 200
    return response.content.decode()


def a_worker(**columns) -> Worker:
    now = timezone.now()
    given = {"id": "w1", "host": "web-1", "pid": 4242, "started_at": now, "last_seen": now}
    return Worker.objects.create(**{**given, "expires_at": now + timedelta(minutes=1), **columns})


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("succeeded", "Succeeded after "),
        ("failed", "CardDeclined: the card of order 1002 was declined: insufficient funds"),
        ("retrying step", " to retry charge_card"),
        ("retrying run", " to try again after RuntimeError: no figures for 2026-11-20 yet"),
        ("delayed", " to start"),
        ("cancelled", ": the customer changed his mind"),
        ("dead", "Dead: its code no longer fits its history. Mend the code, then resume it."),
        ("recovered", "Succeeded after "),
        ("orphaned", "Its process is gone; the next live worker recovers the run from its last completed step."),
        ("pending", ": no worker is alive. Start one: manage.py durable_worker"),
    ],
)
def test_one_sentence_says_what_is_happening(auditor, key, sentence):
    assert escape(sentence) in page_of(auditor, every_status()[key].id)


@pytest.mark.django_db
def test_a_run_that_waits_for_a_worker_says_whether_one_will_come(auditor):
    run = count_to.start(1).id  # in the queue "imports"
    worker = a_worker(queues=["default"])
    assert "no live worker takes the queue imports" in page_of(auditor, run)
    worker.queues = []
    worker.save()
    assert "1 live worker takes its queue" in page_of(auditor, run)
    WorkflowRun.objects.filter(pk=run).update(workflow="store.removed")
    assert "the workflow store.removed is not known here" in page_of(auditor, run)


@durable.workflow(name="store.patient")
def patient(wait, other=None):
    match wait:
        case "sleep":
            durable.sleep(timedelta(days=3))
        case "message":
            durable.receive("paid")
        case "deadline":
            durable.receive("paid", timeout=timedelta(days=3))
        case "event":
            durable.get_event(other, "ready")
        case "child":
            patient("message")
        case "children":
            durable.wait([patient.start("message"), patient.start("message")], "FIRST")


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("wait", "words"),
    [
        ("sleep", ["Waiting until ", " asleep"]),
        ("message", ["Has waited for ", "for a message “paid”."]),
        ("deadline", ["Has waited for ", "for a message “paid”, until ", " at most."]),
        ("event", ["for the event “ready” of run other."]),
        ("child", ["for the end of run top.1."]),
        ("children", ["for the end of one of its child runs."]),
    ],
)
def test_a_run_that_waits_says_for_what(auditor, wait, words):
    patient.using(run_id="other").start("message")
    run = patient.using(run_id="top").start(wait, "other")
    run_until_idle()
    page = page_of(auditor, run.id)
    assert all(word in page for word in words), wait
    run.pause()
    assert "Paused: it goes on when it is resumed." in page_of(auditor, run.id)


@pytest.mark.django_db
def test_a_pause_that_ends_next_month_leaves_room_for_the_steps_bars(auditor):
    run = patient.start("sleep")
    run_until_idle()
    assert StepCheckpoint.objects.get(run=run.id).finished_at > timezone.now() + timedelta(days=2)
    shown = steps.load(run.model, "default", timezone.now(), 1, payloads=False)
    assert shown.span.seconds < 3600
    assert all(step.x + step.width <= steps.TRACK for step in shown.rows)


@pytest.mark.django_db
def test_a_run_whose_worker_fell_silent_says_so(auditor):
    now = timezone.now()
    worker = a_worker()
    run = WorkflowRun.objects.create(
        id="r1",
        workflow="w",
        status="RUNNING",
        worker="w1",
        input="null",
        created_at=now,
        run_after=now,
        started_at=now,
    )
    assert "Running on a worker on web-1 (pid 4242)" in page_of(auditor, run.pk)
    worker.expires_at, worker.last_seen = now - timedelta(seconds=10), now - timedelta(seconds=40)
    worker.save()
    assert "was last heard of 40 s ago and its lease has run out" in page_of(auditor, run.pk)


@pytest.mark.django_db
def test_a_run_set_aside_for_killing_its_workers_says_how_often(auditor):
    now = timezone.now()
    error = "django_durable.exceptions.RunDead: Run r1 is DEAD: ...\nTraceback"
    WorkflowRun.objects.create(
        id="r1", workflow="w", status="DEAD", recoveries=3, error=error, input="null", created_at=now, run_after=now
    )
    assert "Dead: its process died 3 times while it ran." in page_of(auditor, "r1")


@pytest.mark.django_db
def test_a_run_set_aside_for_what_cannot_be_read_says_what_kind_of_trouble_it_is(viewer):
    now = timezone.now()
    error = "django_durable.exceptions.SerializationError: The input of run r1 ...\nTraceback"
    WorkflowRun.objects.create(
        id="r1", workflow="w", status="DEAD", error=error, input="null", created_at=now, run_after=now
    )
    assert "Dead until its cause is mended and it is resumed: SerializationError</span>" in page_of(viewer, "r1")


@pytest.mark.django_db
def test_a_timeout_that_has_passed_is_told_from_a_person_who_cancelled(auditor):
    now = timezone.now()
    WorkflowRun.objects.create(
        id="r1", workflow="w", status="CANCELLED", cancel_reason="timeout", input="null",
        created_at=now, run_after=now, started_at=now, finished_at=now + timedelta(seconds=60),
    )  # fmt: skip
    assert "Cancelled after 1 min 0 s: its time was up." in page_of(auditor, "r1")


@durable.step(atomic=False, name="look_at_me")
def look_at_me() -> str:
    """What the admin shows of this very run, while it runs."""
    auditor = logged_in(staff("witness", "view_workflowrun", "view_payload"))
    return page_of(auditor, durable.current().run_id)


@durable.workflow(name="tests.watched")
def watched() -> str:
    return look_at_me()


@pytest.mark.django_db(transaction=True)
def test_a_run_that_is_under_way_names_its_process_and_lease():
    page = watched.using(run_id="now")()
    assert "Running in a web process on " in page
    assert "; its lease is good until " in page
    assert "No step has been recorded yet." in page


@pytest.mark.django_db
def test_values_are_shown_as_python_would_write_them(auditor):
    run = every_status()["succeeded"]
    html = page_of(auditor, run.id)
    assert escape('checkout("1001", Decimal("49.50"), "tok_visa")') in html
    assert escape('Receipt(reference="pay_1001", amount=Decimal("49.50"))') in html
    assert escape('"seat": ("B", 12), "held_for": 0:15:00, "entry": <tests_app.Ledger') in html
    for name in ("reserve_ticket", "charge_card", "fulfil", "send_confirmation"):
        assert name in html
    assert "channel" in html


@pytest.mark.django_db
def test_a_failed_run_shows_both_tracebacks_and_leads_to_the_step(auditor):
    html = page_of(auditor, every_status()["failed"].id)
    assert html.count("Traceback (most recent call last)") == 2
    assert 'href="?steps=1#step-2"' in html
    assert 'id="step-2"' in html


@pytest.mark.django_db
def test_nothing_is_read_or_built_for_a_stored_value(auditor):
    """A row that is gone, a class that is gone: the page is the place where one finds out."""
    run = every_status()["succeeded"]
    WorkflowRun.objects.filter(pk=run.id).update(
        input='{"args":[{"$":"model","m":"gone.Model","v":7,"db":"default"}],'
        '"kwargs":{"by":{"$":"enum","c":"gone.mod:Colour","v":"RED"}}}'
    )
    with CaptureQueriesContext(connection) as captured:
        html = page_of(auditor, run.id)
    assert escape("checkout(<gone.Model 7>, by=Colour.RED)") in html
    assert not [query for query in captured if "tests_app_ledger" in query["sql"]]


@pytest.mark.django_db
def test_a_run_of_many_steps_is_shown_in_pages(auditor):
    run = count_to.start(250)
    run_until_idle()
    first, third = page_of(auditor, run.id), page_of(auditor, run.id, steps=3)
    assert first.count('<details class="durable-step') == 100
    assert "1 to 100 of 250" in first
    assert third.count('<details class="durable-step') == 50
    assert "count_250" in third
    for odd in ("0", "99", "x", "-1"):
        assert "of 250" in page_of(auditor, run.id, steps=odd)


@pytest.mark.django_db
def test_a_projects_way_to_write_numbers_breaks_no_link_and_no_bar(auditor, settings):
    settings.USE_THOUSAND_SEPARATOR = True
    run = WorkflowRun.objects.get(pk=every_status()["failed"].id)
    # One step, as long as the run: its bar is as long as the whole track.
    run.steps.exclude(position=2).delete()
    run.steps.update(position=1002, started_at=run.started_at, finished_at=run.finished_at)
    WorkflowRun.objects.filter(pk=run.pk).update(failed_step=1002)
    html = page_of(auditor, run.pk)
    assert 'href="?steps=11#step-1002"' in html
    assert 'id="step-1002"' in html
    assert '<rect class="durable-time" x="0" width="1000"' in html


@pytest.mark.django_db
def test_a_large_value_is_cut_by_the_database(auditor):
    run = every_status()["succeeded"]
    large = '"' + "x" * 500_000 + '"'
    WorkflowRun.objects.filter(pk=run.id).update(input=large, output=large)
    StepCheckpoint.objects.filter(run=run.id).update(output=large)
    html = page_of(auditor, run.id)
    assert len(html) < 7 * SHOWN
    assert "The first 20,000 of 500,002 characters, as stored." in html


@pytest.mark.django_db
def test_a_run_of_many_steps_costs_no_more_queries(auditor):
    runs = every_status()
    long = count_to.start(150)
    run_until_idle()
    counts = []
    for run in (runs["succeeded"].id, long.id):
        with CaptureQueriesContext(connection) as captured:
            page_of(auditor, run)
        counts.append(len(captured))
    assert counts[0] == counts[1] <= 8


@pytest.mark.django_db
def test_the_related_object_is_a_link_for_those_who_may_see_it(root, viewer):
    from django.contrib.auth.models import User

    customer = User.objects.get(username="viewer")
    run = checkout.using(related=customer).start("1", None, "tok_visa").id
    link = f'<a href="/admin/auth/user/{customer.pk}/change/">user {customer.pk}</a>'
    assert link in page_of(root, run)
    seen = page_of(viewer, run)
    assert f"user {customer.pk}" in seen
    assert link not in seen
    WorkflowRun.objects.filter(pk=run).update(related_model="gone.model")
    assert f"gone.model {customer.pk}" in page_of(root, run)


@pytest.mark.django_db
@pytest.mark.parametrize("run_id", ["a/b?c=d&e#f", "schedule: 2026-11-20T03:00", "über_5F", "100%"])
def test_a_run_is_reached_whatever_its_id_looks_like(auditor, run_id):
    count_to.using(run_id=run_id).start(1)
    assert f'href="{run_page(run_id)}' in auditor.get(LIST).content.decode().replace("&amp;", "&")
    assert "count_to" in page_of(auditor, run_id)
