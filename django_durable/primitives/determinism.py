"""`now`, `random`, `uuid4`: what a replay sees again, without a write."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from uuid import UUID

from django_durable.engine import checkpoints
from django_durable.engine.calls import body
from django_durable.engine.context import Generation, RunContext, inside
from django_durable.models import StepCheckpoint, WorkflowRun
from django_durable.states import OPEN_STEPS


def now() -> datetime:
    """Return the workflow's own time, with a zone (UTC): that of the latest outcome that it has seen.

    Before the first, that of the run's start. Raises NotInWorkflow outside a workflow's body.
    """
    context = body("now")
    begun = _generation(context).started_at
    return (begun if context.time is None else max(begun, context.time)).astimezone(UTC)


def random() -> float:
    """Return a number from 0 to 1, without 1, as ``random.random()`` does: the same on replay, another in each run.

    Not for secrets: it follows from the run's id. Raises NotInWorkflow outside a workflow's body.
    """
    return (int.from_bytes(_draw("random")[:8]) >> 11) * 2.0**-53


def uuid4() -> UUID:
    """Return a random UUID: the same on replay, another in each run.

    Not for secrets: it follows from the run's id. Raises NotInWorkflow outside a workflow's body.
    """
    return UUID(bytes=_draw("uuid4")[:16], version=4)


def _draw(what: str) -> bytes:
    context = body(what)
    context.draws += 1
    return sha256(f"{_generation(context).run_id}:{context.draws}".encode()).digest()


def _generation(context: RunContext) -> Generation:
    """Whose part of the history this is: in what a fork keeps of another run, it has to see what that one saw."""
    if context.lineage is None:
        context.lineage = _lineage(context)
    return next(each for each in context.lineage if each.kept <= context.position)


def _lineage(context: RunContext) -> list[Generation]:
    """The run, and before it, for what it keeps of them, those that it was forked from."""
    run = context.run
    started_at = run.started_at or context.lease.clock.now()
    if run.forked_from_id is None:
        return [Generation(run.pk, started_at, 0)]
    line = [Generation(run.pk, started_at, _kept(context.recorded.values()))]
    before = run.forked_from_id
    while line[-1].kept:
        with inside(context, busy=True):
            generation, following = checkpoints.persist(context, partial(_forked, context, before))
        line.append(generation)
        before = following
    return line


def _forked(context: RunContext, run_id: str) -> tuple[Generation, str]:
    """The run that was forked, and the one that it was forked from itself."""
    runs = WorkflowRun.objects.using(context.alias).filter(pk=run_id)
    started_at, before = runs.values_list("started_at", "forked_from_id").first() or (None, None)
    if started_at is None:
        # It was pruned. Its draws are known by its id; its start is not, but the first step's is.
        return Generation(run_id, min(step.started_at for step in context.recorded.values()), 0), ""
    steps = StepCheckpoint.objects.using(context.alias).filter(run=run_id) if before else ()
    return Generation(run_id, started_at, _kept(steps)), before or ""


def _kept(steps: Iterable[StepCheckpoint]) -> int:
    """The last of the positions whose outcomes a fork has taken over: none of its executions has written those."""
    kept = (step.position for step in steps if step.attempt == 0 and step.status not in OPEN_STEPS)
    return max(kept, default=0)
