"""The workflows that this process knows, by stored name. Nothing else is ever looked up by a name from a row."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol

from django_durable.engine.retries import RetryPolicy
from django_durable.exceptions import WorkflowNotRegistered


class Definition(Protocol):
    """What the engine has to know of a workflow."""

    name: str
    aliases: tuple[str, ...]
    func: Callable[..., Any]
    queue: str
    retry: RetryPolicy
    max_recoveries: int
    timeout: float | None


class Duplicate(NamedTuple):
    name: str
    first: str
    second: str


_workflows: dict[str, Definition] = {}
duplicates: list[Duplicate] = []


def register(definition: Definition) -> None:
    """Make the workflow runnable by its name and aliases. Two functions of one name are reported by the checks."""
    for name in (definition.name, *definition.aliases):
        known = _workflows.get(name)
        # The same lines again are a reloaded module, or a notebook's cell that was run twice.
        if known is not None and _place(known) != _place(definition):
            duplicates.append(Duplicate(name, _place(known), _place(definition)))
        _workflows[name] = definition


def find(name: str) -> Definition | None:
    return _workflows.get(name)


def get(name: str) -> Definition:
    """Return the workflow of this name; raise WorkflowNotRegistered with the nearest one if there is none."""
    definition = _workflows.get(name)
    if definition is None:
        near = get_close_matches(name, _workflows, n=1)
        raise WorkflowNotRegistered(name, near[0] if near else None)
    return definition


def names() -> list[str]:
    return sorted(_workflows)


def _place(definition: Definition) -> str:
    code = getattr(definition.func, "__code__", None)
    where = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(definition.func)
    return f"{definition.func.__module__}.{definition.func.__qualname__} ({where})"
