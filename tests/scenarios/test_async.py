"""An async run whose worker is really killed, while several of its steps are under way."""

from __future__ import annotations

import pytest

from tests.app.models import Ledger
from tests.scenarios.async_app.workflows import order
from tests.scenarios.harness import Process, Stage

APP = {"SCENARIO_APP": "tests.scenarios.async_app"}

RESULT = [
    ["fast answered", "fast", "faster answered", "faster"],
    ["slow answered", "slow"],
    "by card",
    "last answered",
]


def worker(stage: Stage, plan: dict[str, str] | None = None) -> Process:
    return stage.command("durable_worker", plan=plan, **APP)


def asked(stage: Stage) -> list[str]:
    return [line["service"] for line in stage.log("asked")]


@pytest.mark.parametrize("moment", ["faster answers", "faster booked", "fast booked"])
def test_a_worker_is_killed_while_async_steps_run_beside_each_other(stage: Stage, moment: str) -> None:
    run = order.using(run_id="order").start("slow gate")
    first = worker(stage, {moment: "kill"})
    stage.until(lambda: first.code is not None, "the first worker dies")
    assert first.code == -9, first.said()
    recorded = {(step.position, step.name, step.output) for step in run.model.steps.all()}
    before = asked(stage)

    second = worker(stage)
    stage.open("slow gate")
    stage.until(lambda: run.status == "WAITING", "the run waits for its message")
    run.send("by card", "paid")
    stage.ended(run.id)
    assert run.result(timeout=0) == RESULT
    # What was recorded stands, and is not asked for again; what was not, is.
    assert recorded <= {(step.position, step.name, step.output) for step in run.model.steps.all()}
    answered = [service for service in before if any(f'"{service} answered"' == output for *_, output in recorded)]
    assert not set(answered) & set(asked(stage)[len(before) :])
    assert sorted(Ledger.objects.values_list("key", flat=True)) == ["order/fast", "order/faster", "order/slow"]
    assert len({line["key"] for line in stage.log("asked")}) == 4
    assert run.model.recoveries == 1
    second.terminate()
    assert second.wait() == 0, second.said()


def test_a_worker_that_is_told_to_stop_lets_async_steps_end(stage: Stage) -> None:
    run = order.using(run_id="order").start("slow gate")
    only = worker(stage)
    stage.sees("asked", service="slow")
    stage.until(lambda: Ledger.objects.filter(key="order/faster").exists(), "the fast half is done")
    only.terminate()
    stage.open("slow gate")
    assert only.wait() == 0, only.said()
    assert (run.status, run.model.recoveries, run.model.attempt) == ("WAITING", 0, 1)
    assert asked(stage).count("slow") == 1
