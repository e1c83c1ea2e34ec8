"""A run begins once, or not at all; and what began in a web process goes on when that dies."""

from __future__ import annotations

import pytest

from django_durable.models import WorkflowRun
from tests.app.models import Ledger
from tests.scenarios.harness import SHORT_LEASE, Stage


@pytest.mark.parametrize("ways", [["call"] * 2, ["call"] * 4, ["start"] * 4, ["call", "start"] * 2], ids=" ".join)
def test_processes_that_begin_the_same_run_at_once_begin_one(stage: Stage, ways: list[str]) -> None:
    if set(ways) == {"start"}:
        stage.worker()
    racers = [stage.act("race", "same", way, "go") for way in ways]
    stage.until(lambda: len(stage.log("at the line")) == len(ways), "all stand at the line")
    stage.open("go")
    assert [racer.wait() for racer in racers] == [0] * len(ways), [racer.said() for racer in racers]

    facts = stage.judge("same")
    results = [line["result"] for line in stage.log("result", run="same")]
    assert len(results) == len(ways)
    assert all(result == results[0] for result in results)
    assert len(facts["runs"]) == 1
    assert facts["runs"]["same"]["attempt"] == 1
    assert len(stage.log("charge")) == 1


@pytest.mark.parametrize(
    "moment", ["reserve ends", "reserve committed", "charge ends", "fulfil committed", "body ends"]
)
def test_a_worker_finishes_what_a_killed_web_process_began(stage: Stage, moment: str) -> None:
    # The lease of the web process outlives this test by far: its death is seen, not waited for.
    worker = stage.worker()
    web = stage.act("direct_call", "order", "ada", plan={moment: "kill"})
    assert web.wait() == -9
    stage.ended("order")

    facts = stage.judge("order")
    assert facts["runs"]["order"]["recoveries"] == 1
    assert stage.log("result") == []
    assert worker.code is None


def test_a_web_process_that_freezes_in_a_call_returns_what_came_of_it(stage: Stage) -> None:
    stage.options = SHORT_LEASE
    web = stage.act("direct_call", "order", "ada", plan={"body reserved": "stop"})
    stage.frozen(web)
    worker = stage.worker()
    stage.ended("order")
    web.thaw()
    assert web.wait() == 0, web.said()

    stage.judge("order")
    [line] = stage.log("result")
    assert line["result"]["ended_by"] == worker.pid


def test_without_any_worker_the_customers_next_try_finishes_what_a_killed_process_began(stage: Stage) -> None:
    stage.options = SHORT_LEASE
    killed = stage.act("direct_call", "order", "ada", plan={"charge ends": "kill"})
    assert killed.wait() == -9
    again = stage.act("direct_call", "order", "ada")
    assert again.wait() == 0, again.said()
    stage.judge("order")
    assert stage.log("result")[0]["result"]["ended_by"] == again.pid
    assert [line["pid"] for line in stage.log("charge")] == [killed.pid, again.pid]


def test_a_start_in_a_transaction_that_rolls_back_is_no_run(stage: Stage) -> None:
    stage.worker()
    assert stage.act("start_and_roll_back", "never").wait() == 0
    assert stage.log("rolled back")
    stage.finish()
    assert not WorkflowRun.objects.exists()
    assert not Ledger.objects.exists()


def test_a_start_whose_process_dies_before_the_commit_is_no_run(stage: Stage) -> None:
    stage.worker()
    assert stage.act("start_and_die", "never").wait() == -9
    assert stage.log("dying before the commit")
    stage.finish()
    assert not WorkflowRun.objects.exists()
    assert not Ledger.objects.exists()
