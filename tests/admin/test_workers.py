"""The list of workers: who is alive, and who only looks dead."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from django.utils import timezone

from django_durable.models import Worker, WorkflowRun
from tests.admin.addresses import WORKERS, worker_page

pytestmark = pytest.mark.django_db


def a_process(pid: int, kind: str = "worker", good_for: int = 60, **columns) -> Worker:
    """A process whose lease is good for some seconds, or ended some seconds ago."""
    now = timezone.now()
    return Worker.objects.create(
        id=f"w{pid}", host="web-1", pid=pid, kind=kind, started_at=now, last_seen=now,
        expires_at=now + timedelta(seconds=good_for), **columns,
    )  # fmt: skip


def rows(html: str) -> dict[str, list[str]]:
    """What the row of each process says, by its pid."""
    texts = [re.findall(r">\s*([^<>]*[^<>\s])\s*<", row) for row in html.split("<tr") if ", pid " in row]
    return {re.search(r", pid (\d+)", " ".join(row))[1]: row for row in texts}


def test_a_lease_that_has_run_out_is_told_from_one_that_nobody_needs(viewer):
    a_process(1, queues=["mail", "sms"])
    a_process(2, good_for=-60)
    a_process(3, "web", good_for=-60)
    a_process(4, "web", good_for=-60)
    now = timezone.now()
    for status in ("RUNNING", "SUCCEEDED"):
        WorkflowRun.objects.create(
            id=f"r {status}", workflow="w", status=status, worker="w4", input="null", created_at=now, run_after=now
        )
    shown = rows(viewer.get(WORKERS).content.decode())
    assert {pid: row[0] for pid, row in shown.items()} == {"1": "alive", "2": "expired", "3": "idle", "4": "expired"}
    assert "mail, sms" in shown["1"]
    assert "all" in shown["2"]
    # The runs that it holds, and not those that it once held.
    assert "1" in shown["4"]
    assert "0" in shown["3"]


def test_a_worker_has_a_page(viewer):
    worker = a_process(7)
    html = viewer.get(worker_page(worker.pk)).content.decode()
    assert "web-1, pid 7" in html
    assert "alive" in html
