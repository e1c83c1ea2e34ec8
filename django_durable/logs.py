"""Log lines, made from the signals: the engine formats none.

Logger ``django_durable.run``; each record carries ``run_id``, ``workflow``, ``step`` and ``attempt``.
"""

from __future__ import annotations

import logging
from typing import Any

from django.dispatch import receiver

from django_durable import signals
from django_durable.states import RunStatus, StepStatus

logger = logging.getLogger("django_durable.run")

_END_LEVELS = {RunStatus.FAILED: logging.ERROR, RunStatus.DEAD: logging.ERROR, RunStatus.CANCELLED: logging.WARNING}
# An error that the workflow expects, a declined card, is recorded as FAILED too: no warning, unless it ends the run.
_STEP_LEVELS = {StepStatus.RETRYING: logging.WARNING, StepStatus.FAILED: logging.INFO}


def _log(level: int, message: str, *args: Any, step: str | None = None, **facts: Any) -> None:
    if logger.isEnabledFor(level):
        extra = {key: facts.get(key) for key in ("run_id", "workflow", "attempt", "database", "worker")}
        logger.log(level, message, *args, extra={**extra, "step": step})


@receiver(signals.run_started, dispatch_uid="django_durable.logs")
def _started(**facts: Any) -> None:
    _log(logging.INFO, "Run %s of %s started", facts["run_id"], facts["workflow"], **facts)


@receiver(signals.step_recorded, dispatch_uid="django_durable.logs")
def _recorded(**facts: Any) -> None:
    level = _STEP_LEVELS.get(facts["status"], logging.DEBUG)
    if logger.isEnabledFor(level):
        message = "Run %s, step %s (%s): %s after %s attempt(s)"
        args = (facts["run_id"], facts["position"], facts["name"], facts["status"], facts["attempts"])
        _log(level, message, *args, step=facts["name"], **facts)


@receiver(signals.run_finished, dispatch_uid="django_durable.logs")
def _finished(**facts: Any) -> None:
    level = _END_LEVELS.get(facts["status"], logging.INFO)
    _log(level, "Run %s of %s ended: %s", facts["run_id"], facts["workflow"], facts["status"], **facts)


@receiver(signals.run_recovered, dispatch_uid="django_durable.logs")
def _recovered(**facts: Any) -> None:
    message = "Run %s of %s is taken from worker %s, which died (recovery %s)"
    _log(logging.WARNING, message, facts["run_id"], facts["workflow"], facts["worker"], facts["recoveries"], **facts)
