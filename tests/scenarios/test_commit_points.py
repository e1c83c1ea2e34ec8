"""A worker is killed right before and right after each commit of a checkout; another one goes on."""

from __future__ import annotations

import pytest

from tests.scenarios.harness import Stage
from tests.scenarios.workflows import checkout

GOOD = [
    "body begins",
    "reserve begins",
    "reserve ends",
    "reserve committed",
    "body reserved",
    "charge begins",
    "charge ends",
    "body charged",
    "fulfil begins",
    "fulfil ends",
    "fulfil committed",
    "body ends",
]
DECLINED = ["charge ends", "body charged", "release ends", "release committed", "body ends"]


@pytest.mark.parametrize(
    ("card", "moment"), [("good", moment) for moment in GOOD] + [("declined", moment) for moment in DECLINED]
)
def test_the_next_worker_goes_on_from_the_last_completed_step(stage: Stage, card: str, moment: str) -> None:
    run = checkout.using(run_id="checkout").start("ada", card)
    victim = stage.worker_that_may_die(plan={moment: "kill"})
    assert victim.wait() == -9
    assert stage.log("struck", moment=moment)

    survivor = stage.worker()
    stage.ended(run.id)

    stage.judge(run.id)
    assert run.result()["ended_by"] == survivor.pid
    # Only a death between the charge and its record makes it happen again.
    assert len(stage.log("charge")) == (2 if moment == "charge ends" else 1)
    assert run.model.recoveries == 1
    assert run.model.attempt == 2


def test_a_run_survives_one_death_after_another(stage: Stage) -> None:
    run = checkout.using(run_id="unlucky").start("ada")
    deaths = ["reserve ends", "reserve committed", "charge ends", "fulfil committed"]
    for moment in deaths:
        victim = stage.worker_that_may_die(plan={moment: "kill"})
        assert victim.wait() == -9
    stage.worker()
    stage.ended(run.id)
    stage.judge(run.id)
    assert run.model.recoveries == len(deaths)
