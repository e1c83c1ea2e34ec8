"""The list of runs: what one sees at a glance, and that a large table costs no more than a small one."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_durable.admin import paging
from django_durable.admin.filters import stored_names
from django_durable.models import WorkflowRun
from django_durable.states import RunStatus
from tests.admin.addresses import LIST
from tests.admin.workflows import every_status

pytestmark = pytest.mark.django_db


def store(count: int, **columns) -> None:
    """Rows as a long past leaves them; no engine has to run for that."""
    now = timezone.now()
    made = [
        WorkflowRun(
            **{
                "id": f"run-{columns.get('queue', 'default')}-{number:06}",
                "workflow": "store.workflows.checkout",
                "status": RunStatus.SUCCEEDED,
                "input": '{"args":[],"kwargs":{}}',
                "created_at": now - timedelta(seconds=number),
                "run_after": now,
                **columns,
            }
        )
        for number in range(count)
    ]
    WorkflowRun.objects.bulk_create(made, batch_size=500)


def listed(html: str) -> list[str]:
    """The ids of the runs on the page, in order."""
    return re.findall(r'<code title="([^"]*)">', html)


def queries(client, address: str) -> list[str]:
    with CaptureQueriesContext(connection) as captured:
        assert client.get(address).status_code == 200
    return [query["sql"] for query in captured]


def test_every_status_is_shown_with_what_matters(viewer):
    runs = every_status()
    html = viewer.get(LIST).content.decode()
    for status in RunStatus:
        assert f'<span class="durable-badge durable-{status.lower()}">{status.label}</span>' in html
    rows = {run: row for row in html.split("<tr") for run in listed(row)}
    assert "1 failure" in rows[runs["failed"].id]
    assert "attempt 2" in rows[runs["recovered"].id]
    assert "1 recovery" in rows[runs["recovered"].id]
    assert "retry charge_card" in rows[runs["retrying step"].id]
    assert "no live process" in rows[runs["orphaned"].id]
    assert "no live process" not in rows[runs["pending"].id]


def test_the_newest_come_first(viewer):
    store(3)
    assert listed(viewer.get(LIST).content.decode()) == [f"run-default-00000{n}" for n in range(3)]


@pytest.mark.parametrize(
    ("question", "keys"),
    [
        ("status=FAILED", {"failed"}),
        ("status=DEAD", {"dead"}),
        ("workflow=store.workflows.count_to", {"recovered", "orphaned"}),
        ("queue=reports", {"retrying run"}),
        ("queue=imports&status=RUNNING", {"orphaned"}),
        ("q=order-1002", {"failed"}),
        ("q=count", {"recovered", "orphaned"}),
        ("q=%20order-1006%20", {"pending"}),
        ("q=rder-1006", set()),
        ("created=hour&status=PENDING", {"pending"}),
    ],
)
def test_filters_and_search_find_what_they_say(viewer, question, keys):
    runs = every_status()
    found = listed(viewer.get(f"{LIST}?{question}").content.decode())
    assert sorted(found) == sorted(runs[key].id for key in keys)


def test_the_filter_by_time_leaves_older_runs_out(viewer):
    store(1, id="old", created_at=timezone.now() - timedelta(hours=2))
    store(1, id="new")
    assert listed(viewer.get(f"{LIST}?created=hour").content.decode()) == ["new"]
    assert listed(viewer.get(f"{LIST}?created=day").content.decode()) == ["new", "old"]


def test_names_that_only_rows_know_can_be_chosen(viewer):
    """A workflow that was removed from the code still has runs, and somebody has to find them."""
    store(2, workflow="store.workflows.removed", queue="quiet")
    store(1, id="waits", workflow="store.workflows.other", queue="rare", status=RunStatus.PENDING)
    html = viewer.get(LIST).content.decode()
    for choice in ("workflow=store.workflows.removed", "queue=quiet", "queue=rare"):
        assert f"?{choice}" in html
    assert stored_names("workflow") == ["store.workflows.other", "store.workflows.removed"]
    assert stored_names("queue", RunStatus.PENDING) == ["rare"]


def test_an_empty_table_is_a_page_too(viewer):
    assert stored_names("workflow") == []
    assert "0 workflow runs" in viewer.get(LIST).content.decode()


def test_a_hundred_times_the_runs_cost_not_one_query_more(viewer):
    store(10)
    few = queries(viewer, LIST)
    store(990, queue="bulk", workflow="store.workflows.bulk")
    many = queries(viewer, LIST)
    assert len(many) == len(few) <= 12


def test_no_statement_counts_the_table_or_reads_a_payload(viewer):
    store(100)
    for address in (LIST, f"{LIST}?status=SUCCEEDED&q=run", f"{LIST}?p=2"):
        for sql in queries(viewer, address):
            if "COUNT(" in sql:
                assert "LIMIT" in sql
            for column in ("input", "output", "error", "exception"):
                assert f'"{column}"' not in sql
            assert "DISTINCT" not in sql


def test_counting_and_paging_end_at_the_cap(viewer, monkeypatch):
    monkeypatch.setattr(paging, "CAP", 120)
    store(130)
    html = viewer.get(LIST).content.decode()
    assert "120 workflow runs" in html
    assert "There are more than these 120" in html
    # 50 on a page: two full ones, and 20 up to the cap.
    assert len(listed(viewer.get(f"{LIST}?p=2").content.decode())) == 50
    last = listed(viewer.get(f"{LIST}?p=3").content.decode())
    assert last == [f"run-default-{n:06}" for n in range(100, 120)]
    # Django's answer to a page that is not there.
    assert viewer.get(f"{LIST}?p=4").status_code == 302


def test_below_the_cap_the_count_is_exact(viewer, monkeypatch):
    monkeypatch.setattr(paging, "CAP", 120)
    store(120)
    html = viewer.get(LIST).content.decode()
    assert "120 workflow runs" in html
    assert "There are more" not in html


def test_a_facet_count_cannot_be_asked_for(viewer):
    store(5)
    assert len(queries(viewer, f"{LIST}?_facets=True")) == len(queries(viewer, LIST))
