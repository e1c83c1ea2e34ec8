"""For the demo: each process tells what happens to its runs, one line of JSON on its standard output for each thing.

Nothing here is needed to use django_durable. The shop's own part in it is the line @told above each step.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from django.conf import settings

import django_durable as durable
from django_durable import signals

P = ParamSpec("P")
R = TypeVar("R")

# (run, position) of the steps whose function was entered, and of those already told as answered, in this process.
_entered: set[tuple[str, int]] = set()
_answered: set[tuple[str, int]] = set()


def tell(what: str, **facts: Any) -> None:
    line = json.dumps({"at": time.time(), "pid": os.getpid(), "what": what, **facts})
    # One write: lines of two threads do not mix, and what was written outlives a SIGKILL.
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def told(function: Callable[P, R]) -> Callable[P, R]:
    """Under @durable.step: tell when the step's function is entered and when it raises. Without the demo: nothing."""
    if not settings.STORY:
        return function

    @functools.wraps(function)
    def telling(*args: P.args, **kwargs: P.kwargs) -> R:
        current, name = durable.current(), function.__name__
        position = _tell_answered(current.run_id, name)
        _entered.add((current.run_id, position))
        step = {"run": current.run_id, "position": position, "step": name}
        tell("executing", **step, attempt=current.attempt)
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            tell("raised", **step, error=f"{type(error).__name__}: {error}")
            raise
        _hold_back(step)
        return result

    return telling


def _tell_answered(run_id: str, name: str) -> int:
    """Tell which steps were answered from their checkpoints to get here; return the position of this one.

    The checkout calls its steps one after the other. So each recorded step lies behind this one, and if this process
    never entered its function, the workflow has its answer from the checkpoint.
    """
    from django_durable.models import StepCheckpoint

    position = 0
    for step in StepCheckpoint.objects.filter(run_id=run_id).order_by("position"):
        if step.status == "RETRYING" and step.name == name:
            return step.position
        position = step.position
        if (run_id, position) not in _entered | _answered:
            _answered.add((run_id, position))
            tell("answered", run=run_id, position=position, step=step.name)
    return position + 1


def _hold_back(step: dict[str, Any]) -> None:
    """Wait if the demo holds this step back: its function has done all its work, and nothing is recorded yet."""
    hold = settings.STORY_HOLD / str(step["step"])
    if hold.exists():
        tell("held", **step)
        hold.read_bytes()  # a named pipe: this waits until the demo writes to it, which it never does


def listen() -> None:
    """Tell what the package's signals report, each after its commit."""
    for signal in (signals.run_started, signals.step_recorded, signals.run_recovered, signals.run_finished):
        signal.connect(_tell_signal)


def _tell_signal(signal: Any, run_id: str, **facts: Any) -> None:
    if signal is signals.step_recorded:
        step = {"position": facts["position"], "step": facts["name"], "attempts": facts["attempts"]}
        tell("recorded", run=run_id, **step, status=facts["status"])
    elif signal is signals.run_started:
        tell("started", run=run_id)
    elif signal is signals.run_recovered:
        tell("recovered", run=run_id)
    else:
        tell("finished", run=run_id, status=facts["status"])
