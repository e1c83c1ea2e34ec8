"""`continue_as_new`: a loop without end, in runs of a finite history."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

from django_durable.engine import payloads
from django_durable.engine.calls import body
from django_durable.exceptions import ContinueAsNew


def continue_as_new(*args: Any, **kwargs: Any) -> NoReturn:
    """End this run, and let a new one of the same workflow go on with these arguments; never returns.

    The new run's id is the first's with ``~2``, ``~3``, ... behind it. It has this one's unread messages, events,
    children and options, and no history. Who holds the first one's handle reaches the latest. `validate` is not asked
    again. Raises TypeError for arguments that do not fit, SerializationError for those that cannot be stored, and
    NotInWorkflow outside a workflow's body.
    """
    context = body("continue_as_new")
    definition = context.definition
    signature = inspect.signature(definition.func)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"continue_as_new() of workflow {definition.name!r}: {error}; it takes {signature}.") from None
    # Also if the body swallows it: this never returns.
    context.continuing = ContinueAsNew(payloads.dump_input(args, kwargs, definition.name))
    raise context.continuing
