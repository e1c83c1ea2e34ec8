"""What is logged: one line for each thing that happens to a run, with the facts as attributes to filter by."""

import logging

import pytest

import django_durable as durable
from django_durable.testing import crash_after, run_until_idle
from tests.app.workflows import checkout, echo, fail

pytestmark = pytest.mark.django_db


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.DEBUG, logger="django_durable.run")
    return lambda: [record for record in caplog.records if record.name == "django_durable.run"]


def test_a_run_is_logged_with_its_facts(lines):
    run = checkout.start("A")
    run_until_idle()
    records = lines()
    assert [(record.levelname, record.step) for record in records] == [
        ("INFO", None),
        ("DEBUG", "reserve"),
        ("DEBUG", "charge"),
        ("DEBUG", "fulfil"),
        ("INFO", None),
    ]
    for record in records:
        assert (record.run_id, record.workflow, record.attempt) == (run.id, "tests.checkout", 1)
        assert run.id in record.getMessage()
    assert "started" in records[0].getMessage()
    assert "step 2 (charge): SUCCEEDED" in records[2].getMessage()
    assert "SUCCEEDED" in records[-1].getMessage()


@durable.step(name="flaky", atomic=False, max_attempts=2, retry_delay=0)
def flaky():
    raise ConnectionError("away")


@durable.workflow(name="tests.logs.flaky")
def failing():
    flaky()


def test_what_went_wrong_is_louder(lines):
    """A step's recorded error may be one that the workflow expects; a repeated try and a failed run are not."""
    failing.start()
    run_until_idle()
    assert [(record.levelname, record.step) for record in lines()] == [
        ("INFO", None),
        ("WARNING", "flaky"),
        ("INFO", "flaky"),
        ("ERROR", None),
    ]


def test_a_cancelled_run_and_a_recovered_one_are_warnings(lines, django_capture_on_commit_callbacks):
    with crash_after("charge"):
        checkout.start("A")
        run_until_idle()
    run_until_idle()
    with django_capture_on_commit_callbacks(execute=True):
        echo.start().cancel()
    warnings = [record for record in lines() if record.levelname == "WARNING"]
    assert ["recovery 1" in record.getMessage() for record in warnings] == [True, False]
    assert "CANCELLED" in warnings[1].getMessage()
    for record in warnings:
        assert record.run_id
        assert record.workflow in ("tests.checkout", "tests.echo")


@durable.step(name="talk", atomic=False)
def talk():
    durable.current().logger.info("from the step", extra={"order": 5})


@durable.workflow(name="tests.logs.talk")
def talking():
    durable.current().logger.warning("from the %s", "body")
    talk()


def test_the_logger_of_current_adds_the_facts_to_the_users_own_lines(lines):
    talking.using(run_id="1")()
    body, step = (record for record in lines() if "from the" in record.getMessage())
    assert (body.getMessage(), body.run_id, body.workflow, body.step, body.attempt) == (
        "from the body",
        "1",
        "tests.logs.talk",
        None,
        1,
    )
    assert (step.run_id, step.step, step.attempt, step.order) == ("1", "talk", 1, 5)


def test_a_line_that_nobody_wants_costs_nothing(caplog):
    caplog.set_level(logging.ERROR, logger="django_durable.run")
    checkout("A")
    assert [record for record in caplog.records if record.name == "django_durable.run"] == []
    with pytest.raises(ValueError, match="as asked"):
        fail()
    assert len(caplog.records) == 1
