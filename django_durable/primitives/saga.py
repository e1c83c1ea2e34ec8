"""`saga`: what was done is undone, in reverse order, when an error leaves the block."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

from django_durable.engine.calls import body, is_async
from django_durable.engine.context import RunContext, Undone
from django_durable.steps import Step, step
from django_durable.workflows import Workflow


class _Compensation(NamedTuple):
    func: Step[..., Any] | Workflow[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Saga:
    """The compensations of a block; see `saga`."""

    def __init__(self) -> None:
        self._context: RunContext | None = None
        self._first = 0
        self._compensations: list[_Compensation] = []

    def add(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Undo with this call, if an error leaves the block: a step, a workflow, or a function that becomes a step.

        Raises TypeError for what cannot be called or has no name, and RuntimeError outside the block.
        """
        if self._context is None:
            raise RuntimeError("undo.add() was called outside its block. Write: with durable.saga() as undo: ...")
        if not callable(fn):
            raise TypeError(f"undo.add() takes a function, and then its arguments; found {fn!r}.")
        if not isinstance(fn, Step | Workflow):
            if not hasattr(fn, "__qualname__"):
                raise TypeError(f"undo.add() takes a function that has a name, found {fn!r}. Make it a step.")
            fn = step(atomic=False)(fn)
        self._compensations.append(_Compensation(fn, args, kwargs))

    def __enter__(self) -> Saga:
        if is_async(body("saga").definition.func):
            raise TypeError("In an async workflow write: async with durable.saga() as undo: ...")
        return self._begin()

    async def __aenter__(self) -> Saga:
        return self._begin()

    def _begin(self) -> Saga:
        self._context = body("saga")
        self._first = self._context.position + 1
        self._compensations = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        context = self._end(error)
        if context is None or not isinstance(error, Exception):
            return
        # What is under way beside the body may be what is to be undone.
        context.join_branches()
        failed: list[int] = []
        for compensation in reversed(self._compensations):
            try:
                compensation.func(*compensation.args, **compensation.kwargs)
            except Exception as problem:
                failed.append(_note(context, error, compensation, problem))
        context.undone.append(Undone(error, self._first, context.position, tuple(failed)))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        context = self._end(error)
        if context is None or not isinstance(error, Exception):
            return
        failed: list[int] = []
        for compensation in reversed(self._compensations):
            try:
                await compensation.func.acall(*compensation.args, **compensation.kwargs)
            except Exception as problem:
                failed.append(_note(context, error, compensation, problem))
        context.undone.append(Undone(error, self._first, context.position, tuple(failed)))

    def _end(self, error: BaseException | None) -> RunContext | None:
        """The run, if the block is to be undone; None: it is not."""
        context, self._context = self._context, None
        # What is no Exception unwinds a run that is parked, cancelled, or goes on elsewhere: nothing has failed.
        return context if isinstance(error, Exception) and self._compensations else None


def _note(context: RunContext, error: Exception, compensation: _Compensation, problem: Exception) -> int:
    """Note the failure of a compensation in the error that matters, the one that began it; return its position."""
    error.add_note(f"Its compensation {compensation.func.name} failed: {type(problem).__name__}: {problem}")
    positions = (position for shown, position, _ in context.delivered if shown is problem)
    return next(positions, context.position)


def saga() -> Saga:
    """Undo what a block has done if an exception leaves it: ``with durable.saga() as undo: ...``.

    Each ``undo.add(fn, *args, **kwargs)`` in the block is called then, as a step, in reverse order; then the exception
    goes on. One that fails itself is noted in it, and does not keep the others. A run that is parked or cancelled is
    not undone. A retry or `resume` of the run begins the block anew. In an async workflow it is ``async with``. Raises
    NotInWorkflow outside a workflow's body.
    """
    return Saga()
