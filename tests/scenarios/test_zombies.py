"""A worker is frozen for longer than its lease, another takes over, and the first one wakes up: a zombie."""

from __future__ import annotations

import pytest

from tests.scenarios.harness import SHORT_LEASE, Stage
from tests.scenarios.workflows import checkout, probe


@pytest.mark.parametrize("moment", ["body reserved", "charge ends", "body charged", "body ends"])
def test_what_a_zombie_still_does_is_not_recorded(stage: Stage, moment: str) -> None:
    stage.options = SHORT_LEASE
    # One thread: its next run shows that it has done with this one.
    zombie = stage.worker("--concurrency=1", "--queue=default", "--queue=probes", plan={moment: "stop"})
    run = checkout.using(run_id="checkout").start("ada")
    stage.frozen(zombie)

    # The second stands at the same moment of the same run when the first wakes up.
    successor = stage.worker("--queue=default", plan={moment: "wait:gate"})
    stage.sees("struck", moment=moment, pid=successor.pid)
    log = stage.folder / "log"
    known = log.read_text()
    zombie.thaw()
    assert probe.using(queue="probes").start().result(timeout=30) == zombie.pid

    assert "was declared dead" in zombie.said()
    assert run.status == "RUNNING", "the zombie has ended a run that is another's"
    assert log.read_text() == known, "the zombie has begun a step of a run that is another's"
    stage.open("gate")
    stage.ended(run.id)
    stage.judge(run.id)
    assert run.result()["ended_by"] == successor.pid
    assert run.model.recoveries == 1
    assert len(stage.log("charge")) == (2 if moment == "charge ends" else 1)


def test_a_zombie_goes_on_working_under_a_new_name(stage: Stage) -> None:
    stage.options = SHORT_LEASE
    zombie = stage.worker(plan={"body reserved": "stop"})
    run = checkout.using(run_id="checkout").start("ada")
    stage.frozen(zombie)
    successor = stage.worker()
    stage.ended(run.id)
    zombie.thaw()
    successor.terminate()
    assert successor.wait() == 0

    others = [checkout.using(run_id=f"later-{number}").start("bob") for number in range(20)]
    stage.ended(*[other.id for other in others])

    stage.judge(run.id, *[other.id for other in others])
    assert {other.result()["ended_by"] for other in others} == {zombie.pid}
    assert all(other.model.recoveries == 0 for other in others)


def test_a_run_whose_worker_stays_frozen_ends_elsewhere(stage: Stage) -> None:
    stage.options = SHORT_LEASE
    frozen = stage.worker(plan={"charge begins": "stop"})
    run = checkout.using(run_id="checkout").start("ada")
    stage.frozen(frozen)
    stage.worker()
    stage.ended(run.id)
    stage.judge(run.id)
    assert frozen.state == "T"
