"""Durable workflows for Django: ordinary functions that survive any failure.

import django_durable as durable
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from django_durable.exceptions import DurableError as DurableError
    from django_durable.exceptions import GiveUp as GiveUp
    from django_durable.exceptions import InsideTransaction as InsideTransaction
    from django_durable.exceptions import InsideWorkflow as InsideWorkflow
    from django_durable.exceptions import InvalidInput as InvalidInput
    from django_durable.exceptions import NonDeterminism as NonDeterminism
    from django_durable.exceptions import NotInWorkflow as NotInWorkflow
    from django_durable.exceptions import PayloadTooLarge as PayloadTooLarge
    from django_durable.exceptions import QueryOutsideStep as QueryOutsideStep
    from django_durable.exceptions import RetryAfter as RetryAfter
    from django_durable.exceptions import RunCancelled as RunCancelled
    from django_durable.exceptions import RunDead as RunDead
    from django_durable.exceptions import RunFailed as RunFailed
    from django_durable.exceptions import RunIdInUse as RunIdInUse
    from django_durable.exceptions import RunNotFound as RunNotFound
    from django_durable.exceptions import SerializationError as SerializationError
    from django_durable.exceptions import StepFailed as StepFailed
    from django_durable.exceptions import StepTimeout as StepTimeout
    from django_durable.exceptions import WorkflowNotRegistered as WorkflowNotRegistered
    from django_durable.handles import RunHandle as RunHandle
    from django_durable.handles import aget_run as aget_run
    from django_durable.handles import get_run as get_run
    from django_durable.primitives.current import current as current
    from django_durable.serialization import register_type as register_type
    from django_durable.steps import run_step as run_step
    from django_durable.steps import step as step
    from django_durable.workflows import workflow as workflow

__version__ = "0.1.0"

# Looked up at first use: this module is imported with INSTALLED_APPS, before any model may be.
_HOMES = {
    "exceptions": (
        "DurableError GiveUp InsideTransaction InsideWorkflow InvalidInput NonDeterminism NotInWorkflow "
        "PayloadTooLarge QueryOutsideStep RetryAfter RunCancelled RunDead RunFailed RunIdInUse RunNotFound "
        "SerializationError StepFailed StepTimeout WorkflowNotRegistered"
    ),
    "handles": "RunHandle aget_run get_run",
    "primitives.current": "current",
    "serialization": "register_type",
    "steps": "run_step step",
    "workflows": "workflow",
}
_home_of = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_home_of)


def __getattr__(name: str) -> Any:
    if name not in _home_of:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_home_of[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
