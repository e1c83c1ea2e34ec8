"""`current`: which run and step this code is part of."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from django_durable.engine.context import RunLogger, current_run, current_step
from django_durable.exceptions import NotInWorkflow


@dataclass(frozen=True, slots=True)
class Current:
    """The running workflow and step.

    `attempt` counts from 1: the step's tries, or outside a step the run's executions. `step` is None outside a step.
    `logger` adds run_id, workflow, step and attempt to each record.
    """

    run_id: str
    workflow: str
    step: str | None
    attempt: int
    idempotency_key: str

    @property
    def logger(self) -> RunLogger:
        extra = {"run_id": self.run_id, "workflow": self.workflow, "step": self.step, "attempt": self.attempt}
        return RunLogger(logging.getLogger("django_durable.run"), extra)


def current() -> Current:
    """Return what is being executed here; raise NotInWorkflow outside a workflow.

    ``idempotency_key`` is the same on every try of a step, whichever process makes it, and another for every call of
    a step: give it to whoever must not act twice.
    """
    context = current_run()
    if context is None:
        raise NotInWorkflow("current()")
    step = current_step()
    return Current(
        run_id=context.run_id,
        workflow=context.run.workflow,
        step=step.name if step else None,
        attempt=step.attempt if step else context.attempt,
        idempotency_key=f"{context.run_id}:{step.position}" if step else context.run_id,
    )
