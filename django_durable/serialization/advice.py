"""What to say about a value that cannot be stored: its type, and what its author probably wants instead."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

_REGISTER = "register its class: durable.register_type(cls, encode, decode)"

_CONVERSIONS: tuple[tuple[type, str], ...] = (
    (str, '"".join(value)'),
    (int, "int(value)"),
    (float, "float(value)"),
    (dict, "dict(value)"),
    (list, "list(value)"),
    (tuple, "tuple(value)"),
    (set, "set(value)"),
    (frozenset, "frozenset(value)"),
    (bytes, "bytes(value)"),
)

_HINTS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((type,), "Pass its name, and look the class up where it is needed."),
    ((FunctionType, BuiltinFunctionType, MethodType, partial), "Pass what it returns, or call it inside a step."),
    ((ModuleType,), "Pass the values that are needed from it."),
    ((Coroutine,), "Await it, and pass what it returns."),
    ((AsyncIterator,), "Collect it into a list first: [item async for item in it]."),
    ((io.IOBase,), "Save the file and pass its path or storage name, or pass its bytes."),
    ((Iterator, range, type({}.keys()), type({}.values()), type({}.items())), "Pass list(...) of it."),
    ((bytearray, memoryview), "Pass bytes(...) of it."),
    ((PurePath,), f"Pass str(...) of it, or {_REGISTER}."),
    ((type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.Event), "Make it inside the step."),
)

# Where Django's own classes live; what is not loaded cannot be the value's class.
_DJANGO_HINTS: tuple[tuple[str, str, str], ...] = (
    ("django.db.models.query", "QuerySet", "Pass list(queryset), or the primary keys."),
    ("django.db.models.manager", "BaseManager", "Pass list(manager.all()), or the primary keys."),
    ("django.utils.functional", "Promise", "It is a lazy translation: pass str(...) of it."),
    (
        "django.utils.functional",
        "LazyObject",
        "It is a lazy wrapper, as request.user is: pass the object itself, or its primary key.",
    ),
    ("django.http.request", "HttpRequest", "Pass the values that are needed from it, such as request.user.pk."),
    ("django.http.request", "QueryDict", "Pass value.dict(), or dict(value.lists())."),
    ("django.http.response", "HttpResponseBase", "Pass its content and status."),
    ("django.core.files.base", "File", "Save the file and pass its storage name (.name), or pass its bytes."),
    ("django.forms.forms", "BaseForm", "Pass form.cleaned_data."),
)


def advice_for(value: Any) -> str:
    """Return the rest of the sentence that starts with the value's place: what was found there and what to do."""
    cls = type(value)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    return f"is a {name}, which cannot be stored. {_hint(cls)}"


def _hint(cls: type) -> str:
    for module, name, hint in _DJANGO_HINTS:
        base = vars(sys.modules[module]).get(name) if module in sys.modules else None
        if base in cls.__mro__:
            return hint
    for bases, hint in _HINTS:
        if issubclass(cls, bases):
            return hint
    for base, conversion in _CONVERSIONS:
        if issubclass(cls, base):
            return f"Its class would be lost: pass {conversion}, or {_REGISTER}."
    return f"Pass the plain values that are needed from it, or {_REGISTER}."
