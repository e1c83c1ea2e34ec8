"""Whatever the rows say, no page obeys it: every stored field holds markup here, and none comes out as markup."""

from __future__ import annotations

import json
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from django.db import models
from django.utils import timezone

import django_durable
from django_durable.models import StepCheckpoint, Worker, WorkflowRun
from django_durable.states import RunStatus, StepStatus
from tests.admin.addresses import LIST, WORKERS, run_page, worker_page
from tests.admin.workflows import every_status

pytestmark = pytest.mark.django_db

EVIL = """</script></pre><script>alert(1)</script><img src=x onerror=alert(2)>"'` onmouseover="alert(3)" style="x" """
# As much as the shortest columns hold.
SHORT = """<b x='">"""


class Markup(HTMLParser):
    """What a browser makes of a page: its elements, as (tag, attributes)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag

    def inline(self) -> list[tuple[str, dict[str, str | None]]]:
        """The elements that a strict content security policy refuses."""
        return [
            (tag, attributes)
            for tag, attributes in self.elements
            if tag == "style"
            or (tag == "script" and "src" not in attributes and attributes.get("type") != "application/json")
            or any(name == "style" or name.startswith("on") for name in attributes)
            or (attributes.get("href") or "").lower().startswith("javascript:")
        ]

    def of_ours(self) -> list[tuple[str, dict[str, str | None]]]:
        """The elements that the attack would have made."""
        return [(tag, attributes) for tag, attributes in self.elements if tag == "b" or attributes.get("src") == "x"]


def evil(model: type[models.Model], **columns) -> dict:
    """Every text column of the model with markup in it."""
    made = {}
    for field in model._meta.concrete_fields:
        if isinstance(field, models.ForeignKey) or field.name in columns:
            continue
        if isinstance(field, models.JSONField):
            made[field.name] = {EVIL: EVIL}
        elif isinstance(field, models.TextField) or (isinstance(field, models.CharField) and field.max_length > 100):
            made[field.name] = EVIL
        elif isinstance(field, models.CharField):
            made[field.name] = SHORT
    return {**made, **columns}


def stored(status: str, step: str) -> WorkflowRun:
    now = timezone.now()
    times = {"created_at": now, "run_after": now, "started_at": now, "deadline": now, "wake_at": now}
    payload = json.dumps({"args": [EVIL, {"$": EVIL}, {"$": "enum", "c": EVIL, "v": EVIL}], "kwargs": {EVIL: EVIL}})
    run = WorkflowRun.objects.create(
        **evil(WorkflowRun, id=f"{EVIL}{status}"[:200], status=status, input=payload, output=payload, **times),
        parent_id=EVIL,
        forked_from_id=EVIL,
        failed_step=1,
    )
    StepCheckpoint.objects.create(
        **evil(
            StepCheckpoint, run_id=run.pk, position=1, status=step, attempt=1, started_at=now, finished_at=now,
            output=payload, database=SHORT,
        )
    )  # fmt: skip
    Worker.objects.create(
        **evil(Worker, id=f"{SHORT}{status}"[:32], kind=SHORT, pid=1, queues=[EVIL, {EVIL: EVIL}]),
        started_at=now,
        last_seen=now,
        expires_at=now + timedelta(minutes=1),
    )
    return run


@pytest.mark.parametrize("status", [*RunStatus.values, SHORT])
@pytest.mark.parametrize("who", ["auditor", "viewer"])
def test_no_stored_text_becomes_markup(request, who, status):
    client = request.getfixturevalue(who)
    run = stored(status, StepStatus.FAILED if status == "FAILED" else SHORT)
    worker = Worker.objects.get()
    WorkflowRun.objects.update(worker=worker.pk)
    addresses = [LIST, f"{LIST}?q=%3C", f"{LIST}?workflow=%3Cb%3E", WORKERS, run_page(run.pk), worker_page(worker.pk)]
    for address in addresses:
        response = client.get(address)
        assert response.status_code == 200, address
        html = response.content.decode()
        assert "<script>alert" not in html
        assert not Markup(html).of_ours(), address
        assert not Markup(html).inline(), address
    # The test has looked at pages that do show the text.
    assert "&lt;script&gt;alert(1)" in client.get(run_page(run.pk)).content.decode()


def test_ordinary_pages_have_nothing_inline(auditor):
    """No style and script in the page, no handler: a content security policy needs no exception for us."""
    for run in every_status().values():
        assert not Markup(auditor.get(run_page(run.id)).content.decode()).inline()
    for address in (LIST, WORKERS):
        assert not Markup(auditor.get(address).content.decode()).inline()


def test_the_admin_trusts_no_text_by_hand():
    """Escaping is the template's work and format_html's; whoever marks text as safe takes it over."""
    package = Path(django_durable.__file__).parent
    sources = [*package.glob("admin/*.py"), *package.glob("templates/admin/**/*.html")]
    assert len(sources) > 10
    for source in sources:
        for trust in ("mark_safe", "|safe", "autoescape", "SafeString("):
            assert trust not in source.read_text(), source
