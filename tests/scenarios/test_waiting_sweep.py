"""A process dies behind each of its statements, while runs are parked and woken in it: nothing is lost, nothing twice.

Before a statement is behind the one before it, so that each moment is struck once. The first sweep is a long one:
DURABLE_SWEEP_STRIDE=1 strikes at each of its statements, otherwise at every seventh.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import count

import pytest

from django_durable.engine.sweep import wake_overlooked
from django_durable.models import Message, WorkflowRun
from django_durable.states import UNFINISHED
from tests.app.models import Ledger
from tests.scenarios.harness import LONG_LEASE, Stage
from tests.scenarios.waiting_workflows import EFFECTS, asking, send_both, sending, waiting

# The lease stays out of it: what a dead process held is free because it is seen to be dead. Even a short wait parks.
OPTIONS = {**LONG_LEASE, "HEARTBEAT_SECONDS": 60, "NOTIFY": False, "PARK_AFTER": 0.001, "POLL_INTERVAL": 0.05}
STRIDE = int(os.environ.get("DURABLE_SWEEP_STRIDE", "7"))
RESULT = {"messages": ["first", "second"], "helped": "helped", "missing": None}
# Each kind of statement of a wait is struck by a sweep over all of them.
STRUCK = [
    ("COMMIT", ""),
    ("INSERT", "stepcheckpoint"),
    ("DELETE", "stepcheckpoint"),
    ("INSERT", "message"),
    ("UPDATE", "message"),
    ("INSERT", "event"),
    ("UPDATE", "waiting_for"),
    ("UPDATE", "awaited"),
]


def finish(stage: Stage) -> None:
    """Let a clean worker do the rest. Nobody is to be waiting for what has happened."""
    assert wake_overlooked("default") == 0
    worker = stage.act("worker")
    stage.until(lambda: not WorkflowRun.objects.filter(status__in=UNFINISHED).exists(), "a clean worker finishes it")
    worker.end()


def judge(run_ids: list[str]) -> None:
    """Each run has its result, and each of its effects is there once."""
    runs = list(WorkflowRun.objects.all())
    assert {run.status for run in runs} == {"SUCCEEDED"}
    assert set(run_ids) <= {run.pk for run in runs}
    assert [run_id for run_id in run_ids if waiting.using(run_id=run_id).start().result(0) != RESULT] == []
    effects = Counter(Ledger.objects.values_list("key", flat=True))
    assert effects == Counter(f"{run.pk}/{each}" for run in runs for each in EFFECTS[run.workflow])
    assert Message.objects.filter(consumed_at=None).count() == 0
    assert Message.objects.count() == 2 * len(run_ids)


@pytest.mark.timeout(120 if STRIDE > 1 else 1200)
def test_killed_at_any_statement_while_runs_are_parked_and_woken(stage: Stage) -> None:
    stage.options = OPTIONS
    ids = []
    for nth in count(STRIDE, STRIDE):
        run = waiting.using(run_id=f"waiting-{nth}").start()
        runs = [run, asking.start(run.id), sending.start(run.id)]
        ids.append(run.id)
        victim = stage.act("dying_at_statement", nth, "after", "worker", "--concurrency=1")
        stage.until(
            lambda victim=victim, runs=runs: victim.code is not None or all(each.model.is_finished for each in runs),
            "the worker dies, or ends it",
        )
        if victim.code is None:
            victim.end()
            break
        assert victim.code == -9, victim.said()
        finish(stage)
    judge(ids)
    deaths = stage.log("killed at statement")
    assert [line["nth"] for line in deaths[: len(ids) - 1]] == list(range(STRIDE, nth, STRIDE))
    # It is at least as many statements as these runs have waits, and effects of three statements each.
    assert nth > 60
    if STRIDE > 1:
        return
    said = [line["statement"] for line in deaths]
    for start, part in STRUCK:
        assert any(each.startswith(start) and part in each for each in said), (start, part)


def test_a_sender_that_is_killed_at_any_statement_is_asked_again(stage: Stage) -> None:
    """A webhook's process dies; the payment service sends it again, and the run hears of it once."""
    stage.options = OPTIONS
    ids, deaths = [], 0
    for nth in count(1):
        run = waiting.using(run_id=f"waiting-{nth}").start()
        ids.append(run.id)
        parked(stage, run.id)
        victim = stage.act("dying_at_statement", nth, "after", "send_both", run.id)
        code = victim.wait()
        assert code in (0, -9), victim.said()
        deaths += code == -9
        # All of it, or nothing.
        sent = Message.objects.filter(run=run.id).count()
        assert sent in (0, 2)
        send_both(run.id)
        finish(stage)
        if code == 0:
            break
    # Lock, store and wake, twice, and the COMMIT.
    assert deaths == nth - 1 >= 7
    judge(ids)


def test_a_workflow_that_sends_is_killed_at_any_statement(stage: Stage) -> None:
    stage.options = OPTIONS
    ids = []
    for nth in count(1):
        run = waiting.using(run_id=f"waiting-{nth}").start()
        ids.append(run.id)
        parked(stage, run.id)
        sender = sending.using(run_id=f"sending-{nth}")
        victim = stage.act("dying_at_statement", nth, "after", "call_sending", f"sending-{nth}", run.id)
        code = victim.wait()
        assert code in (0, -9), victim.said()
        # If it died before it was stored, nobody has promised anything.
        sender.start(run.id)
        finish(stage)
        if code == 0:
            break
    assert nth > 12
    judge(ids)


def parked(stage: Stage, run_id: str) -> None:
    """Let a run come to where it waits for a message."""
    worker = stage.act("worker")
    stage.until(lambda: WorkflowRun.objects.get(pk=run_id).waiting_for == "message:orders", "it waits for a message")
    worker.end()
