"""Who may see what. A secret in a payload reaches nobody without the permission, on any page, by any question."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone

import django_durable as durable
from django_durable.models import Worker, WorkflowRun
from django_durable.testing import run_until_idle
from tests.admin.addresses import LIST, WORKERS, run_history, run_page, worker_page
from tests.admin.conftest import logged_in, staff

pytestmark = pytest.mark.django_db

CANARY = "canary-4111-1111"


@durable.step(atomic=False, name="remember")
def remember(secret: str) -> str:
    return secret


@durable.step(atomic=False, name="stumble", max_attempts=2, retry_delay=60)
def stumble(secret: str) -> None:
    raise ValueError(secret)


@durable.workflow(name="tests.secret")
def secretive(secret: str, how: str) -> str:
    remember(secret)
    if how == "fails":
        raise ValueError(secret)
    if how == "waits":
        stumble(secret)
    return secret


@pytest.fixture
def secrets() -> list[str]:
    """The ids of runs that hold the canary in every place that a payload can be in."""
    runs = [secretive.start(CANARY, how) for how in ("ends", "fails", "waits")]
    run_until_idle()
    return [run.id for run in runs]


def worker() -> Worker:
    now = timezone.now()
    return Worker.objects.create(
        id="w1", host="web-1", pid=7, started_at=now, last_seen=now, expires_at=now + timedelta(minutes=1)
    )


def pages(secrets: list[str]) -> list[str]:
    own = [page(run) for run in secrets for page in (run_page, run_history)]
    return ["/admin/", LIST, f"{LIST}?q={secrets[0]}", WORKERS, *own]


def test_who_may_see_payloads_sees_them(auditor, secrets):
    for run in secrets:
        assert auditor.get(run_page(run)).content.decode().count(CANARY) >= 2


def test_who_may_not_finds_the_secret_nowhere(viewer, secrets):
    for page in pages(secrets):
        response = viewer.get(page)
        assert response.status_code == 200, page
        assert CANARY not in response.content.decode(), page


def test_who_may_not_see_payloads_is_told_why(viewer, secrets):
    ends, fails, waits = (viewer.get(run_page(run)).content.decode() for run in secrets)
    for page in (ends, fails, waits):
        assert "needs the permission <code>django_durable.view_payload</code>" in page
    # The type says what kind of trouble it is, and nothing about whom.
    assert "ValueError" in fails
    assert "Traceback" not in fails
    assert "ValueError" in waits


@pytest.mark.parametrize("column", ["input", "output", "error", "exception", "steps__output", "steps__error"])
def test_a_filter_in_the_address_answers_no_question_about_payloads(viewer, secrets, column):
    """Or one would guess a secret letter by letter, from which runs are listed."""
    assert viewer.get(f"{LIST}?{column}__contains=canary").status_code == 400


def test_the_filters_that_pages_link_to_are_allowed(viewer, secrets):
    for question in ("status=FAILED", "workflow=tests.secret", "queue=default", "created=day", "version=1"):
        assert viewer.get(f"{LIST}?{question}").status_code == 200, question


def test_nobody_else_gets_in(secrets):
    strangers = [Client(), logged_in(User.objects.create_user("customer"))]
    clerk = logged_in(staff("clerk"))
    for page in (LIST, run_page(secrets[0]), run_history(secrets[0]), WORKERS, worker_page(worker().pk)):
        for stranger in strangers:
            assert stranger.get(page).headers["Location"].startswith("/admin/login/"), page
        assert clerk.get(page).status_code == 403, page


def test_the_permission_for_payloads_alone_opens_no_page(secrets):
    client = logged_in(staff("odd", "view_payload"))
    assert client.get(run_page(secrets[0])).status_code == 403
    assert client.get(LIST).status_code == 403


def test_even_a_superuser_changes_nothing(root, secrets):
    before = list(WorkflowRun.objects.order_by("pk").values())
    a_worker = worker()
    for page in (run_page(secrets[0]), worker_page(a_worker.pk)):
        assert root.post(page, {"status": "PENDING", "host": "x"}).status_code in (403, 405)
        assert root.post(page.replace("change", "delete"), {"post": "yes"}).status_code == 403
    for listed in (LIST, WORKERS):
        assert root.get(f"{listed}add/").status_code == 403
        root.post(listed, {"action": "delete_selected", "_selected_action": [secrets[0], a_worker.pk], "post": "yes"})
    assert list(WorkflowRun.objects.order_by("pk").values()) == before
    assert Worker.objects.get() == a_worker


def test_a_run_that_was_pruned_is_said_to_be_gone(viewer):
    response = viewer.get(run_page("no-such-run"), follow=True)
    assert response.status_code == 200
    assert "no-such-run" in response.content.decode()
    assert response.redirect_chain
