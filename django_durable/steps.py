"""`step`, `run_step`: the calls of a workflow that are recorded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import timedelta
from typing import Any, Generic, ParamSpec, TypeVar, overload

from asgiref.sync import markcoroutinefunction, sync_to_async
from django.db import transaction

from django_durable.conf import as_seconds, is_whole
from django_durable.engine import parallel
from django_durable.engine.asynchronous.awaitables import call_step
from django_durable.engine.calls import is_async
from django_durable.engine.context import current_body, current_run
from django_durable.engine.retries import RetryPolicy, policy
from django_durable.engine.starting import database_of
from django_durable.engine.stepper import perform

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
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
        self.is_async = is_async(func)
        if self.is_async:
            markcoroutinefunction(self)
        self.name = name
        self.atomic = atomic
        self.using = using
        self.retry = retry
        self.timeout = timeout
        self.isolation = isolation

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        context = current_body()
        if context is not None:
            run: Callable[..., Any] = call_step if self.is_async else perform
            value: R = run(context, self, args, kwargs)
            return value
        # Outside a workflow it is the plain function; inside another step it is part of that step.
        if not self.atomic:
            return self.func(*args, **kwargs)
        around = current_run()
        with transaction.atomic(using=self.using or (around.alias if around else database_of())):
            return self.func(*args, **kwargs)

    @overload
    def acall(self: Step[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]: ...

    @overload
    def acall(self: Step[P, T], *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]: ...

    @markcoroutinefunction
    def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Call the step from async code, and await what this returns: of a plain step, too.

        In an async workflow a plain step is executed in the run's own thread, one at a time; its position is given
        by this call.
        """
        if self.is_async:
            return self(*args, **kwargs)
        context = current_body()
        if context is not None:
            return call_step(context, self, args, kwargs)
        return sync_to_async(self)(*args, **kwargs)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> parallel.StepFuture[R]:
        """Call the step beside the workflow's body; the future's `result()` waits for its value or error.

        Up to 8 are under way at a time, each in a thread with connections of its own. All that were submitted come to
        their outcomes before the run ends. Outside a workflow and inside another step it is called here and now.
        """
        self._refuse_async("submit")
        context = current_body()
        if context is None:
            return parallel.Called(lambda: self(*args, **kwargs))
        return parallel.submit(context, self, args, kwargs)

    def map(self, items: Iterable[Any], max_parallel: int = parallel.MAX_PARALLEL) -> list[R]:
        """Call the step with each item, up to `max_parallel` at a time; return the values in the items' order.

        If some fail, the others come to their outcomes all the same; then the first error in order is raised. Outside
        a workflow and inside another step they are called here, one after the other. Raises ValueError for a
        `max_parallel` below 1.
        """
        self._refuse_async("map")
        if not is_whole(max_parallel) or max_parallel < 1:
            raise ValueError(f"max_parallel takes a whole number from 1, found {max_parallel!r}.")
        context = current_body()
        if context is None:
            call: Callable[[Any], R] = self
            return [call(item) for item in items]
        return parallel.each(context, self, items, max_parallel)

    def _refuse_async(self, method: str) -> None:
        if self.is_async:
            raise TypeError(
                f"{method}() runs plain functions in threads, and step {self.name!r} is an async function. In an async "
                "workflow await several of its calls with asyncio.gather()."
            )

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
        if atomic and is_async(func):
            raise TypeError(
                f"{getattr(func, '__qualname__', func)!r} is an async function, and Django has no async transaction: "
                "write @durable.step(atomic=False), or make it a plain def, which an async workflow awaits with "
                ".acall()."
            )
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


@markcoroutinefunction
def arun_step(
    name: str, fn: Callable[..., Any], /, *args: Any, atomic: bool = False, **kwargs: Any
) -> Coroutine[Any, Any, Any]:
    """See run_step(). `fn` is a plain or an async function."""
    return _unretried(name, atomic, fn).acall(*args, **kwargs)


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
    if inspect.isasyncgenfunction(func) or inspect.isgeneratorfunction(func):
        raise TypeError(
            f"@durable.{what} takes a function that returns its value, and {getattr(func, '__qualname__', func)!r} is "
            "a generator. Write it as def ... return, or as async def ... return."
        )
