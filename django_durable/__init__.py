"""Durable workflows for Django: ordinary functions that survive any failure.

import django_durable as durable
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from django_durable.exceptions import AlreadyDecided as AlreadyDecided
    from django_durable.exceptions import DurableError as DurableError
    from django_durable.exceptions import GiveUp as GiveUp
    from django_durable.exceptions import InsideTransaction as InsideTransaction
    from django_durable.exceptions import InvalidInput as InvalidInput
    from django_durable.exceptions import NonDeterminism as NonDeterminism
    from django_durable.exceptions import NothingToDecide as NothingToDecide
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
    from django_durable.primitives.approvals import Decision as Decision
    from django_durable.primitives.approvals import aapproval as aapproval
    from django_durable.primitives.approvals import approval as approval
    from django_durable.primitives.children import WaitResult as WaitResult
    from django_durable.primitives.children import await_ as await_
    from django_durable.primitives.children import wait as wait
    from django_durable.primitives.continuing import continue_as_new as continue_as_new
    from django_durable.primitives.current import current as current
    from django_durable.primitives.determinism import now as now
    from django_durable.primitives.determinism import random as random
    from django_durable.primitives.determinism import uuid4 as uuid4
    from django_durable.primitives.events import aget_event as aget_event
    from django_durable.primitives.events import aset_event as aset_event
    from django_durable.primitives.events import get_event as get_event
    from django_durable.primitives.events import set_event as set_event
    from django_durable.primitives.messages import areceive as areceive
    from django_durable.primitives.messages import asend as asend
    from django_durable.primitives.messages import receive as receive
    from django_durable.primitives.messages import send as send
    from django_durable.primitives.patches import apatched as apatched
    from django_durable.primitives.patches import patched as patched
    from django_durable.primitives.saga import saga as saga
    from django_durable.primitives.streams import stream as stream
    from django_durable.primitives.timers import asleep as asleep
    from django_durable.primitives.timers import asleep_until as asleep_until
    from django_durable.primitives.timers import sleep as sleep
    from django_durable.primitives.timers import sleep_until as sleep_until
    from django_durable.serialization import register_type as register_type
    from django_durable.steps import arun_step as arun_step
    from django_durable.steps import run_step as run_step
    from django_durable.steps import step as step
    from django_durable.workflows import workflow as workflow

__version__ = "0.1.0"

# Looked up at first use: this module is imported with INSTALLED_APPS, before any model may be.
_HOMES = {
    "exceptions": (
        "AlreadyDecided DurableError GiveUp InsideTransaction InvalidInput NonDeterminism NotInWorkflow "
        "NothingToDecide PayloadTooLarge QueryOutsideStep RetryAfter RunCancelled RunDead RunFailed RunIdInUse "
        "RunNotFound SerializationError StepFailed StepTimeout WorkflowNotRegistered"
    ),
    "handles": "RunHandle aget_run get_run",
    "primitives.approvals": "Decision aapproval approval",
    "primitives.children": "WaitResult await_ wait",
    "primitives.continuing": "continue_as_new",
    "primitives.current": "current",
    "primitives.determinism": "now random uuid4",
    "primitives.events": "aget_event aset_event get_event set_event",
    "primitives.messages": "areceive asend receive send",
    "primitives.patches": "apatched patched",
    "primitives.saga": "saga",
    "primitives.streams": "stream",
    "primitives.timers": "asleep asleep_until sleep sleep_until",
    "serialization": "register_type",
    "steps": "arun_step run_step step",
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
