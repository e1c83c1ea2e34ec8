"""What an async body awaits: its recorded calls, as coroutines."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from django_durable.engine.asynchronous.attempts import Attempts
from django_durable.engine.asynchronous.body import body_of
from django_durable.engine.asynchronous.step_attempts import attempts_of
from django_durable.engine.asynchronous.threads import in_thread
from django_durable.engine.context import RunContext, current_body
from django_durable.engine.stepper import StepDefinition

T = TypeVar("T")


def awaitable(name: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> Coroutine[Any, Any, T]:
    """Let a plain function, which makes one recorded call, be awaited; in an async body that is a call of the body's.

    It has its position when this returns.
    """
    context = current_body()
    call = partial(function, *args, **kwargs)
    return in_thread(call) if context is None else body_of(context, name).call(name, Attempts(call))


def call_step(
    context: RunContext, step: StepDefinition, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Coroutine[Any, Any, Any]:
    """Call a step, async or not, from an async body."""
    return body_of(context, step.name).call(step.name, attempts_of(context, step, args, kwargs))
