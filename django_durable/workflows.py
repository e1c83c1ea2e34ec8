"""`workflow`: the functions that survive."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Generic, ParamSpec, TypedDict, TypeVar, Unpack, overload

from asgiref.sync import markcoroutinefunction, sync_to_async
from django.core.exceptions import ValidationError
from django.db.models import Model
from django.forms import BaseForm

from django_durable.conf import as_seconds, check_text
from django_durable.engine import awaiting, children, operations, registry
from django_durable.engine.asynchronous.awaitables import awaitable
from django_durable.engine.calls import is_async
from django_durable.engine.context import current_body
from django_durable.engine.retries import RetryPolicy, policy
from django_durable.engine.starting import StartOptions, database_of
from django_durable.exceptions import InvalidInput
from django_durable.handles import RunHandle
from django_durable.steps import Errors, check_function, checked_name

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class StartChanges(TypedDict, total=False):
    """What `Workflow.using` takes."""

    run_id: str | None
    queue: str | None
    priority: int
    run_after: datetime | timedelta | None
    timeout: float | timedelta | None
    attributes: dict[str, Any] | None
    related: Model | None
    database: str | None


class Workflow(Generic[P, R]):
    """A durable function; see `workflow`."""

    def __init__(
        self,
        func: Callable[P, R],
        *,
        name: str,
        aliases: tuple[str, ...],
        queue: str,
        retry: RetryPolicy,
        timeout: float | None,
        max_recoveries: int,
        validate: Any,
    ) -> None:
        functools.update_wrapper(self, func)
        self.func = func
        self.is_async = is_async(func)
        if self.is_async:
            markcoroutinefunction(self)
        self.name = name
        self.aliases = aliases
        self.queue = queue
        self.retry = retry
        self.timeout = timeout
        self.max_recoveries = max_recoveries
        self.validate = validate
        self.signature = inspect.signature(func)
        self.options = StartOptions()

    def __repr__(self) -> str:
        return f"<Workflow {self.name}>"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it here and now, durably; return its result or raise its error. An async workflow is to be awaited.

        In another workflow's body it is a child run, executed here if nobody else holds it; if it has to wait, its
        parent waits with it. Raises `InsideTransaction` inside a transaction, whose rollback would undo its
        checkpoints.
        """
        value: R
        if self.is_async:
            value = self._await(args, kwargs)
        elif (context := current_body()) is not None:
            value = children.call(context, self, self.options, partial(self._arguments, args, kwargs))
        else:
            value = operations.call(self, self.options, *self._arguments(args, kwargs))
        return value

    def _await(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context, arguments = current_body(), partial(self._arguments, args, kwargs)
        if context is None:
            return awaiting.acall(self, self.options, arguments)
        return awaitable(self.name, lambda: children.call(context, self, self.options, arguments))

    def start(self, *args: P.args, **kwargs: P.kwargs) -> RunHandle:
        """Store a run for a worker, in the caller's transaction, and return its handle.

        In another workflow's body it is a child run, started exactly once.

        Raises TypeError for arguments that do not fit, `InvalidInput` for those that `validate` refuses,
        `SerializationError` for those that cannot be stored, and `RunIdInUse`.
        """
        context, arguments = current_body(), partial(self._arguments, args, kwargs)
        if context is not None:
            child = children.start(context, self, self.options, arguments)
            return RunHandle(child, self.options.database or context.alias)
        return RunHandle(operations.start(self, self.options, *arguments()), database_of(self.options.database))

    @overload
    def acall(
        self: Workflow[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]: ...

    @overload
    def acall(self: Workflow[P, T], *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]: ...

    @markcoroutinefunction
    def acall(self, *args: Any, **kwargs: Any) -> Any:
        """Call the workflow from async code, plain or async, and await what this returns; see __call__()."""
        if self.is_async or current_body() is not None:
            return self._await(args, kwargs)
        return sync_to_async(self)(*args, **kwargs)

    @markcoroutinefunction
    def astart(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, RunHandle]:
        """See start()."""
        return awaitable(self.name, self.start, *args, **kwargs)

    def using(self, **options: Unpack[StartChanges]) -> Workflow[P, R]:
        """Return a copy whose runs are started with these options; further ones add to them.

        `run_id`: 1 to 200 characters; a second start with it finds the first one's run, whose arguments stand.
        `queue`: default the workflow's. `priority`: higher goes first. `run_after`: a datetime with a zone, or a
        timedelta; in the past is now. `timeout`: seconds or timedelta from the first execution to the end.
        `attributes`: a dict of plain JSON, searchable. `related`: a saved model instance that the run is about.
        `database`: the alias of the database that the run lives in. Raises TypeError or ValueError for what cannot be.
        """
        changed = copy.copy(self)
        changed.options = dataclasses.replace(self.options, **options)
        return changed

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"Workflow {self.name!r}: {error}; it takes {self.signature}.") from None
        if self.validate is None:
            return args, kwargs
        bound.apply_defaults()
        data: dict[str, Any] = {}
        for parameter, value in bound.arguments.items():
            if self.signature.parameters[parameter].kind is inspect.Parameter.VAR_KEYWORD:
                data.update(value)
            else:
                data[parameter] = value
        cleaned = _cleaned(self.validate, data)
        try:
            self.signature.bind(**cleaned)
        except TypeError as error:
            raise TypeError(
                f"Workflow {self.name!r}: what validate= returned does not fit: {error}; it takes {self.signature}."
            ) from None
        return (), cleaned


def _cleaned(validate: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The data after a form, a pydantic model or a callable has looked at them; raise InvalidInput if it refuses."""
    if isinstance(validate, type) and issubclass(validate, BaseForm):
        form = validate(data=data)
        if not form.is_valid():
            raise InvalidInput(form.errors.as_data())
        return dict(form.cleaned_data)
    try:
        if hasattr(validate, "model_validate"):
            valid = validate.model_validate(data)
            return {name: getattr(valid, name) for name in validate.model_fields}
        cleaned = validate(data)
    except ValidationError as error:
        raise InvalidInput(error) from error
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    if not isinstance(cleaned, dict):
        raise TypeError(f"validate= must return a dict of keyword arguments, found {type(cleaned).__name__}.")
    return cleaned


@overload
def workflow(func: Callable[P, R], /) -> Workflow[P, R]: ...


@overload
def workflow(
    *,
    name: str | None = None,
    queue: str = "default",
    max_attempts: int = 1,
    retry_delay: float | timedelta = 1.0,
    retry_backoff: float = 2.0,
    retry_max_delay: float | timedelta = 3600.0,
    retry_on: Errors = (Exception,),
    timeout: float | timedelta | None = None,
    max_recoveries: int = 100,
    validate: Any = None,
    aliases: tuple[str, ...] | list[str] = (),
) -> Callable[[Callable[P, R]], Workflow[P, R]]: ...


def workflow(
    func: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    queue: str = "default",
    max_attempts: int = 1,
    retry_delay: float | timedelta = 1.0,
    retry_backoff: float = 2.0,
    retry_max_delay: float | timedelta = 3600.0,
    retry_on: Errors = (Exception,),
    timeout: float | timedelta | None = None,
    max_recoveries: int = 100,
    validate: Any = None,
    aliases: tuple[str, ...] | list[str] = (),
) -> Any:
    """Make a function durable: what it has completed is never repeated, and any worker goes on from there.

    Between its steps the function must be deterministic: it is run again from the top, its completed steps answered
    from their checkpoints.

    `name`: what is stored; default ``module.qualname``. `aliases`: former names, whose runs stay runnable.
    `queue`: where its runs are put unless `using` says otherwise.
    `max_attempts`, `retry_delay`, `retry_max_delay` (seconds or timedelta), `retry_backoff`, `retry_on`: an exception
    that leaves the function lets the run try again, its completed steps kept, up to `max_attempts` times in all.
    `timeout`: seconds or timedelta from a run's first execution to its end, waiting included; then it is CANCELLED.
    `max_recoveries`: a run that was under way in so many crashed processes and one more is set aside as DEAD.
    `validate`: a Django Form class, a pydantic model class, or a callable from dict to dict; gets the arguments with
    their defaults before anything is stored, and what it returns become the keyword arguments.
    """
    if not isinstance(aliases, tuple | list):
        raise TypeError(f"aliases takes a list of names, found {aliases!r}.")
    if validate is not None and not callable(validate):
        raise TypeError(f"validate takes a Form class, a pydantic model class or a callable, found {validate!r}.")
    if isinstance(max_recoveries, bool) or not isinstance(max_recoveries, int) or max_recoveries < 0:
        raise ValueError(f"max_recoveries takes a whole number from 0, found {max_recoveries!r}.")
    check_text("queue", queue, 100)
    former = tuple(checked_name(alias, "workflow") for alias in aliases)
    retry = policy(
        max_attempts=max_attempts,
        retry_delay=retry_delay,
        retry_backoff=retry_backoff,
        retry_max_delay=retry_max_delay,
        retry_on=retry_on,
    )
    seconds = None if timeout is None else as_seconds(timeout, "timeout")

    def decorate(func: Callable[P, R]) -> Workflow[P, R]:
        check_function(func, "workflow", name)
        made = Workflow(
            func,
            name=checked_name(f"{func.__module__}.{func.__qualname__}" if name is None else name, "workflow"),
            aliases=former,
            queue=queue,
            retry=retry,
            timeout=seconds,
            max_recoveries=max_recoveries,
            validate=validate,
        )
        registry.register(made)
        return made

    return decorate if func is None else decorate(func)
