"""`crash_after` and `crash_before`: the executor dies at a step, as by SIGKILL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django_durable import signals
from django_durable.engine import context as engine_context
from django_durable.engine import leases
from django_durable.engine.context import RunContext, current_run
from django_durable.engine.heartbeat import forget_inline_leases
from django_durable.exceptions import Crash
from django_durable.states import StepStatus


@contextmanager
def crash_after(step: str) -> Iterator[None]:
    """Let the executor die right after this step's outcome was committed.

    The block ends there, quietly; the run is left RUNNING, and the next `run_until_idle` recovers it. Raises
    AssertionError if the step is never recorded in the block.
    """

    def recorded(*, name: str, status: str, **facts: Any) -> None:
        context = current_run()
        if name == step and status != StepStatus.RETRYING and context is not None:
            raise context.end(Crash(f"after {step}"))

    with _crash(step, "recorded"):
        signals.step_recorded.connect(recorded, weak=False)
        try:
            yield
        finally:
            signals.step_recorded.disconnect(recorded)


@contextmanager
def crash_before(step: str) -> Iterator[None]:
    """Let the executor die right before it executes this step; otherwise as `crash_after`."""

    def begins(context: RunContext, name: str) -> None:
        if name == step:
            raise context.end(Crash(f"before {step}"))

    with _crash(step, "executed"):
        engine_context.before_step.append(begins)
        try:
            yield
        finally:
            engine_context.before_step.remove(begins)


@contextmanager
def _crash(step: str, what: str) -> Iterator[None]:
    try:
        yield
    except Crash:
        # Dead is dead: not even its row is renewed any more.
        for lease in leases.of_this_process():
            if lease.stored:
                lease.lose()
                leases.bury(lease.alias, [lease.id])
        forget_inline_leases()
    else:
        raise AssertionError(f"The block ended before step {step!r} was {what}: is that its recorded name?")
