"""The pages about approvals, sagas, changed code and long loops: their code runs, in the order of the page."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest

import django_durable as durable
from django_durable.handles import RunHandle
from django_durable.primitives.approvals import Decision
from tests.docs.pages import blocks, code, read, section, table
from tests.docs.test_reference import own_registry, run_examples  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("own_registry")]


@pytest.mark.parametrize("page", ["saga", "changing-code", "long-loops"])
def test_the_examples_do_what_they_say(page):
    assert len([block for block in blocks(f"docs/how-to/{page}.md") if block.language == "python"]) >= 2
    run_examples(f"docs/how-to/{page}.md")


def test_the_examples_of_approvals_do_what_they_say(monkeypatch):
    # A form is found by its name in another process: the page's code is a module of an app.
    module = ModuleType("claims")
    monkeypatch.setitem(sys.modules, "claims", module)
    for block in blocks("docs/how-to/approvals.md"):
        if block.language == "python":
            exec(compile(block.text, f"approvals, {block.section}", "exec"), module.__dict__)
    assert module.other.result(0) == "grace said no"


def test_the_facts_of_a_decision_are_the_real_ones():
    (line,) = [line for line in read("docs/how-to/approvals.md").splitlines() if line.startswith("The `Decision` has")]
    assert re.findall(r"`(\w+)`", line)[1:] == list(Decision.__dataclass_fields__)


def test_the_errors_of_a_decision_are_the_real_ones():
    names = {code(error) for error, _ in table(section("docs/how-to/approvals.md", "Decide"))}
    assert names - {"PermissionDenied"} <= set(durable.__all__)
    assert names == {"PermissionDenied", "InvalidInput", "AlreadyDecided", "NothingToDecide"}


def test_what_is_said_of_the_first_id_is_about_real_methods():
    rows = table(section("docs/how-to/long-loops.md", "One id for all of them"))
    named = {name.rstrip("()") for row in rows for name in re.findall(r"`([\w()]+)`", row[0])}
    assert named - {"steps"} <= set(dir(RunHandle))
