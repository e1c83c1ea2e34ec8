"""The connection is lost at the checkout's first statement, at its second, at each; the process lives on."""

from __future__ import annotations

from itertools import count

import pytest

from django_durable.models import WorkflowRun
from tests.scenarios.harness import LONG_LEASE, SHORT_LEASE, Stage
from tests.scenarios.workflows import checkout


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("act", ["worker", "direct_call"])
def test_cut_off_at_any_statement_a_checkout_still_happens_once(stage: Stage, act: str, moment: str) -> None:
    # "After" a COMMIT the effect stands, and its process cannot know.
    stage.options = {**LONG_LEASE, "HEARTBEAT_SECONDS": 60, "NOTIFY": False}
    began, codes = [], []
    for nth in count(1):
        run_id = f"{act}-{nth}"
        if act == "worker":
            checkout.using(run_id=run_id).start("ada")
            process = stage.act("cut_off_at_statement", nth, moment, act, "--burst")
        else:
            process = stage.act("cut_off_at_statement", nth, moment, act, run_id, "ada")
        codes.append(process.wait())
        assert codes[-1] == 0 or act == "direct_call", process.said()
        stage.finish()
        if act == "worker" or WorkflowRun.objects.filter(pk=run_id).exists():
            began.append(run_id)
        if not stage.log("cut off at statement", nth=nth):
            break
    cuts = stage.log("cut off at statement")
    assert [line["nth"] for line in cuts] == list(range(1, nth))
    assert sum(line["statement"] == "COMMIT" for line in cuts) >= 2
    stage.judge(*began)
    # A caller is told only of what failed before the run began.
    assert codes.count(0) >= len(codes) - 5
    if act == "worker":
        assert not WorkflowRun.objects.exclude(recoveries=0).exists()


def test_a_call_whose_start_was_not_acknowledged_is_not_stuck_while_its_process_lives(stage: Stage) -> None:
    stage.options = SHORT_LEASE
    stage.worker()
    web = stage.act("busy_after_a_start_without_answer", "order", "gate")
    stage.sees("holding", pid=web.pid)
    assert stage.log("cut off at statement")
    stage.ended("order", patience=20)
    stage.judge("order")
    assert web.code is None
    stage.open("gate")
    assert web.wait() == 0, web.said()
