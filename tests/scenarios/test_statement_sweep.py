"""The checkout's process dies at its first statement, at its second, at each: no moment is left out."""

from __future__ import annotations

from itertools import count

import pytest

from django_durable.models import WorkflowRun
from tests.app.models import Account
from tests.scenarios.harness import LONG_LEASE, Stage
from tests.scenarios.workflows import checkout

# A checkout takes more statements than this; a sweep that ended sooner has missed the checkout.
FEWEST = {"worker": 15, "direct_call": 10}


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("card", ["good", "declined"])
@pytest.mark.parametrize("act", ["worker", "direct_call"])
def test_killed_at_any_statement_a_checkout_still_happens_once(stage: Stage, act: str, card: str, moment: str) -> None:
    # The lease stays out of it: what a dead process held is free because it is seen to be dead.
    stage.options = {**LONG_LEASE, "HEARTBEAT_SECONDS": 60, "NOTIFY": False}
    Account.objects.bulk_create([Account(name="free"), Account(name="taken")])
    began = []
    for nth in count(1):
        run_id = f"{act}-{nth}"
        if act == "worker":
            checkout.using(run_id=run_id).start("ada", card)
            victim = stage.act("dying_at_statement", nth, moment, act, "--burst")
        else:
            victim = stage.act("dying_at_statement", nth, moment, act, run_id, "ada", card)
        code = victim.wait()
        assert code in (0, -9), victim.said()
        stage.finish()
        if act == "worker" or WorkflowRun.objects.filter(pk=run_id).exists():
            began.append(run_id)
        if code == 0:
            break
    deaths = stage.log("killed at statement")
    assert [line["nth"] for line in deaths] == list(range(1, nth))
    assert len(deaths) >= FEWEST[act]
    # Which statement is the n-th differs a little from one process to the next, as the worker's looks come in between.
    assert "COMMIT" in {line["statement"] for line in deaths}
    # A direct call that died before its first commit has left nothing; what began was finished.
    assert len(began) >= len(deaths) - 5
    stage.judge(*began)


def test_killed_at_any_statement_of_a_recovery(stage: Stage) -> None:
    """Who takes over from the dead may die in doing so, at any statement; the next one takes over from both."""
    stage.options = {**LONG_LEASE, "HEARTBEAT_SECONDS": 60, "NOTIFY": False}
    ids = []
    for nth in count(1):
        run = checkout.using(run_id=f"checkout-{nth}").start("ada")
        ids.append(run.id)
        assert stage.worker_that_may_die(plan={"charge ends": "kill"}).wait() == -9
        heir = stage.act("dying_at_statement", nth, "after", "worker", "--burst")
        code = heir.wait()
        assert code in (0, -9), heir.said()
        stage.finish()
        if code == 0:
            break
    deaths = stage.log("killed at statement")
    assert [line["nth"] for line in deaths] == list(range(1, nth))
    assert len(deaths) >= FEWEST["worker"]
    facts = stage.judge(*ids)
    # The first death always counts; the second one does if the heir had claimed the run and not ended it.
    assert {facts["runs"][run_id]["recoveries"] for run_id in ids} == {1, 2}
