"""`step`, `run_step`: the calls of a workflow that are recorded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Generic, ParamSpec, TypeVar, overload

from django.db import transaction

from django_durable.conf import as_seconds
from django_durable.engine.context import current_run
from django_durable.engine.operations import database_of
from django_durable.engine.retries import RetryPolicy, policy
from django_durable.engine.stepper import perform

P = ParamSpec("P")
R = TypeVar("R")
Errors = type[BaseException] | Sequence[type[BaseException]]

ISOLATION_LEVELS = ("read committed", "repeatable read", "serializable")


class Step(Generic[P, R]):
    """A function whose calls in a workflow are executed once and recorded; see `step`."""

    def __init__(
        self,
        func: Callable[P, R],
        *,
        name: str,
        atomic: bool,
        using: str | None,
        retry: RetryPolicy,
        timeout: float | None,
        isolation: str | None,
    ) -> None:
        functools.update_wrapper(self, func)
        self.func = func
        self.name = name
        self.atomic = atomic
        self.using = using
        self.retry = retry
        self.timeout = timeout
        self.isolation = isolation

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        context = current_run()
        if context is not None and context.step is None:
            value: R = perform(context, self, args, kwargs)
            return value
        # Outside a workflow it is the plain function; inside another step it is part of that step.
        if not self.atomic:
            return self.func(*args, **kwargs)
        with transaction.atomic(using=self.using or (context.alias if context else database_of())):
            return self.func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Step {self.name}>"


@overload
def step(func: Callable[P, R], /) -> Step[P, R]: ...


@overload
def step(
    *,
    name: str | None = None,
    atomic: bool = True,
    using: str | None = None,
    max_attempts: int = 1,
    retry_delay: float | timedelta = 1.0,
    retry_backoff: float = 2.0,
    retry_max_delay: float | timedelta = 3600.0,
    retry_on: Errors = (Exception,),
    give_up_on: Errors = (),
    timeout: float | timedelta | None = None,
    isolation: str | None = None,
) -> Callable[[Callable[P, R]], Step[P, R]]: ...


def step(
    func: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    atomic: bool = True,
    using: str | None = None,
    max_attempts: int = 1,
    retry_delay: float | timedelta = 1.0,
    retry_backoff: float = 2.0,
    retry_max_delay: float | timedelta = 3600.0,
    retry_on: Errors = (Exception,),
    give_up_on: Errors = (),
    timeout: float | timedelta | None = None,
    isolation: str | None = None,
) -> Any:
    """Make a function a step: in a workflow, its outcome is recorded, and a completed call is never repeated.

    `name`: what is recorded and compared on replay; default the function's ``__qualname__``.
    `atomic`: the function runs in a transaction that also stores its checkpoint, so its writes happen exactly once.
    With False no transaction is held: for the outside world, at least once.
    `using`: the database of an atomic step's data, if it is not the run's; its checkpoint is stored there too.
    `max_attempts`, `retry_delay`, `retry_max_delay` (seconds or timedelta), `retry_backoff`, `retry_on`,
    `give_up_on`: an exception of `retry_on` and not of `give_up_on` is tried again, up to `max_attempts` calls in
    all, after ``min(retry_max_delay, retry_delay * retry_backoff ** (k - 1))`` seconds, give or take 10 %, behind
    the k-th. `RetryAfter` and `GiveUp`, raised by the function, decide for themselves.
    `timeout`: seconds; an atomic step's is the database's statement and transaction timeout, where it has one, and
    ends in `StepTimeout`. A plain function outside a transaction cannot be stopped: give its client a timeout.
    `isolation`: "read committed", "repeatable read" or "serializable", where the database has it.

    Outside a workflow the step is the plain function, in ``atomic()`` if it is atomic; inside another step it is a
    part of that one. Raises TypeError or ValueError for arguments that make no sense.
    """
    if isolation is not None and str(isolation).lower() not in ISOLATION_LEVELS:
        raise ValueError(f"isolation takes one of {', '.join(ISOLATION_LEVELS)}, found {isolation!r}.")
    if not atomic and (using is not None or isolation is not None):
        raise ValueError("using= and isolation= are an atomic step's: with atomic=False there is no transaction.")
    retry = policy(
        max_attempts=max_attempts,
        retry_delay=retry_delay,
        retry_backoff=retry_backoff,
        retry_max_delay=retry_max_delay,
        retry_on=retry_on,
        give_up_on=give_up_on,
    )
    seconds = None if timeout is None else as_seconds(timeout, "timeout")

    def decorate(func: Callable[P, R]) -> Step[P, R]:
        check_function(func, "step", name)
        return Step(
            func,
            name=checked_name(func.__qualname__ if name is None else name, "step"),
            atomic=atomic,
            using=using,
            retry=retry,
            timeout=seconds,
            isolation=isolation,
        )

    return decorate if func is None else decorate(func)


def run_step(name: str, fn: Callable[..., R], /, *args: Any, atomic: bool = False, **kwargs: Any) -> R:
    """Call any callable as a step of this name, with the other arguments. Not atomic unless `atomic` is True."""
    return _unretried(name, atomic, fn)(*args, **kwargs)


def _unretried(name: str, atomic: bool, fn: Callable[..., R]) -> Step[..., R]:
    made: Step[..., R] = step(name=name, atomic=atomic)(fn)
    return made


def checked_name(name: object, what: str) -> str:
    """Return a workflow's or step's name; raise ValueError if it cannot be stored."""
    if not isinstance(name, str) or not 1 <= len(name) <= 255 or not name.isprintable():
        raise ValueError(f"A {what}'s name takes 1 to 255 printable characters, found {name!r}.")
    return name


def check_function(func: Any, what: str, name: str | None) -> None:
    """Raise TypeError for what cannot be decorated."""
    if not callable(func):
        raise TypeError(f"@durable.{what} takes a function, found {type(func).__name__}: {func!r}.")
    if name is None and not hasattr(func, "__qualname__"):
        raise TypeError(f"@durable.{what} takes the name of a {type(func).__name__} as name=..., it has none itself.")
    if inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func) or inspect.isgeneratorfunction(func):
        raise TypeError(
            f"@durable.{what} takes a plain function, and {getattr(func, '__qualname__', func)!r} is an async function "
            "or a generator. Write it as def ... return; call async code in it with asgiref's async_to_sync."
        )
