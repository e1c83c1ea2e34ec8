"""How it works: the diagram, the table of statuses and the statements are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

import django_durable as durable
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.states import FINISHED, SOURCES, RunStatus
from tests.app.models import Account
from tests.docs.pages import DOCS, ROOT, blocks, links, read, section, table

PAGE = "docs/how-it-works.md"
TRANSITIONS = {(str(source), str(target)) for target, sources in SOURCES.items() for source in sources}


@durable.step
def pay(name: str) -> None:
    Account.objects.filter(name=name).update(balance=49)


@durable.step(atomic=False)
def tell(name: str) -> str:
    return f"told {name}"


@durable.workflow
def a_step_of_each_kind(name: str) -> str:
    pay(name)
    return tell(name)


def test_the_table_of_statuses_is_the_state_machine() -> None:
    rows = [(source, target) for source, target, _ in table(section(PAGE, "The life of a run"))]
    assert len(rows) == len(set(rows))
    assert set(rows) == TRANSITIONS


def test_the_diagram_is_the_state_machine() -> None:
    diagram = (DOCS / "states.svg").read_text()
    arrows = [tuple(arrow.split("-")) for arrow in re.findall(r'<path id="([A-Z]+-[A-Z]+)"', diagram)]
    assert len(arrows) == len(set(arrows))
    assert set(arrows) == TRANSITIONS
    assert set(re.findall(r"<text[^>]*bold[^>]*>(\w+)<", diagram)) == set(RunStatus)


def test_succeeded_alone_has_no_way_out() -> None:
    assert "SUCCEEDED never changes." in read(PAGE)
    ends = {str(status) for status in FINISHED} - {source for source, _ in TRANSITIONS}
    assert ends == {"SUCCEEDED"}


@pytest.mark.django_db(transaction=True)
def test_the_statements_of_a_run_are_those_that_the_page_shows() -> None:
    (shown,) = [block.text for block in blocks(PAGE) if block.language == "sql"]
    a_step_of_each_kind("the first call registers the process")
    with CaptureQueriesContext(connection) as captured:
        a_step_of_each_kind("Ada")
    statements = [plain(query["sql"]) for query in captured.captured_queries]
    lines = [line.partition(" -- ")[0].strip() for line in shown.splitlines()]
    assert len(statements) == len(lines), statements
    for line, statement in zip(lines, statements, strict=True):
        if not connection.features.has_select_for_update:
            # "On SQLite there is one writer at a time, and no row lock is needed."
            line = line.removesuffix(" FOR SHARE")
        pattern = ".*".join(re.escape(part.strip()) for part in line.split("..."))
        assert re.match(pattern, statement), f"The page says {line}, the run did {statement}"


TABLES = {"run": WorkflowRun, "step": StepCheckpoint, "ticket": Account}


def plain(statement: str) -> str:
    """The statement as the page writes it: without quotes and brackets, with short names of the tables."""
    statement = statement.replace('"', "").replace("(", "").replace(")", "")
    for name, model in TABLES.items():
        statement = statement.replace(f"{model._meta.db_table}.", "").replace(model._meta.db_table, name)
    return " ".join(statement.split())


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.relative_to(DOCS)}" for path in DOCS.rglob("*.md"))])
def test_every_link_leads_somewhere(page: str) -> None:
    for link in links(page):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.is_file(), f"{page} leads to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page} leads to {link}, and there is only {anchors(target)}"


def anchors(path: Path) -> set[str]:
    """What a heading, or a label above it, can be reached by."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    labels = set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    return labels | {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
