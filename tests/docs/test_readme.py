"""The README: its code runs in a project, and what it says of versions, commands and names is so."""

from __future__ import annotations

import ast
import re
import tomllib

from tests.docs.conftest import Reader
from tests.docs.pages import ROOT, blocks, commands, read, section

PAGE = "README.md"

BUY_AND_WORK = """
from django.core.management import call_command
from django.db import transaction
from shop.models import Ticket
from shop.workflows import checkout

ticket, email = Ticket.objects.get(seat="A5"), "ada@example.com"
with transaction.atomic():
    {view}
assert run.status == "PENDING"
call_command("durable_worker", burst=True, verbosity=0)
ticket.refresh_from_db()
print([run.result(timeout=0), ticket.buyer, open("payments.log").read(), run.id])
"""


def test_the_code_sells_a_ticket_in_the_tutorials_project(reader: Reader) -> None:
    reader.read_until("The first sale")
    workflows, view = [block.text for block in blocks(PAGE) if block.language == "python"]
    reader.project.write("shop/workflows.py", workflows)
    (line,) = [line.partition("#")[0].strip() for line in view.splitlines() if not line.startswith("#")]
    printed = reader.project.shell(BUY_AND_WORK.format(view=line))
    result, buyer, ledger, run_id = ast.literal_eval(printed.splitlines()[-1])
    assert result == {"ok": True, "payment": f"payment-{run_id}:2"}
    assert buyer == "ada@example.com"
    assert ledger == f"charged 4900 to ada@example.com, key {run_id}:2\n"


def test_it_is_twenty_lines_and_one_page() -> None:
    lines = [line for block in blocks(PAGE) if block.language == "python" for line in block.text.splitlines() if line]
    assert len(lines) <= 20
    assert len(read(PAGE).splitlines()) <= 100


def test_what_it_asks_for_is_what_the_package_asks_for() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    text = section(PAGE, "Install")
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in text
    assert f"Django {project['dependencies'][0].removeprefix('Django>=')} or newer" in text
    install = [command.line for block in blocks(PAGE) if block.language == "console" for command in commands(block)]
    extra = "postgres"
    assert install == [f'pip install "{project["name"]}[{extra}]"']
    assert extra in project["optional-dependencies"]
    assert project["readme"] == PAGE


def test_the_commands_that_it_names_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"`make (\w+)`", read(PAGE)))
    assert {"demo", "test"} <= named <= targets
    assert (ROOT / "testproject" / "demo.py").is_file()
