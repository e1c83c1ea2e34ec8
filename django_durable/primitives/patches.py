"""`patched`: a change of a workflow's code, beside runs that have begun without it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from asgiref.sync import markcoroutinefunction

from django_durable.conf import check_text
from django_durable.engine import payloads
from django_durable.engine.asynchronous.awaitables import awaitable
from django_durable.engine.calls import Call, body
from django_durable.engine.checkpoints import Outcome
from django_durable.engine.context import RunContext
from django_durable.states import StepKind, StepStatus


def patched(name: str) -> bool:
    """Return whether this run takes the change of this name (1 to 200 characters): not if it was past this point.

    A run that comes here for the first time records a mark, and takes it from then on. Asked again, also elsewhere in
    the workflow, the answer is the same for the whole run. Raises NotInWorkflow outside a workflow's body.
    """
    context = _asked(name)
    if name not in context.patches:
        marked = _marked(context, name) is not None
        context.patches[name] = marked or _comes_here_first(context)
        if marked:
            context.pass_markers()
        elif context.patches[name]:
            _mark(context, name)
    return context.patches[name]


@markcoroutinefunction
def apatched(name: str) -> Coroutine[Any, Any, bool]:
    """See patched()."""
    context = _asked(name)
    if name not in context.patches:
        # Shown in its turn, the mark is a call like any other of the body: what others do meanwhile is repeated too.
        context.mark = _marked(context, name)
        context.patches[name] = context.mark is not None or _comes_here_first(context)
        if context.patches[name]:
            return awaitable("apatched", _mark, context, name)
    return _answered(context.patches[name])


async def _answered(answer: bool) -> bool:
    return answer


def _asked(name: str) -> RunContext:
    context = body("patched")
    check_text("name", name, 200)
    return context


def _marked(context: RunContext, name: str) -> int | None:
    """Where the run's mark is, if it has one."""
    marks = (step for step in context.recorded.values() if step.kind == StepKind.PATCH and step.name == _label(name))
    return next((step.position for step in marks), None)


def _comes_here_first(context: RunContext) -> bool:
    # Not only the next position: that of a parallel step may still be empty when those behind it are taken.
    return not any(position > context.position for position in context.recorded)


def _mark(context: RunContext, name: str) -> bool:
    call = Call(context, _label(name), StepKind.PATCH)
    if not call.done:
        call.commit(lambda: Outcome(StepStatus.SUCCEEDED, output=payloads.dump(True, call.place)))
    taken: bool = call.answer()
    return taken


def _label(name: str) -> str:
    return f"patch {name}"
