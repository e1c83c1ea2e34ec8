"""Exceptions as text: stored so that a replay raises the same one, and shown so that a person can read it.

The kind ``exc``: c class, a args, and where there are any: d attributes, s attributes in slots (also those of built-in
classes, such as OSError's filename), self names of attributes that are a list of just the exception itself (Django's
ValidationError), cause the `__cause__`. A failure is ``{"type": name, "text": text, "error": exc}``; without "error" if
the exception could not be rebuilt exactly.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any

from django_durable.exceptions import SerializationError, StepFailed
from django_durable.serialization.codec import Encoder, from_json, loads, to_json
from django_durable.serialization.types import (
    TAG,
    Stored,
    add_family,
    add_tag,
    brief,
    class_namespace,
    find_class,
    importable_name,
    member,
    name_of,
    short,
    unreadable,
)

__all__ = ["clean_text", "describe_exception", "dump_exception", "load_exception"]

DESCRIPTION_LIMIT = 32 * 1024
_OUR_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_MAX_CAUSES = 8
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, not part of the interpreter

# Read below the class, so that an exception that shadows these names is still stored as what it is.
_base: Any = BaseException.__dict__
# The interpreter fills it in by itself: the object that lacked an attribute, anything at all. No replay needs it.
_OBJECT = AttributeError.__dict__["obj"]
_UNSET = object()


# --- exceptions as values


def _is_exception(cls: type) -> bool:
    return issubclass(cls, BaseException)


def _store_exception(exc: BaseException, encoder: Encoder) -> Any:
    stored: Stored = {TAG: "exc", "c": importable_name(type(exc), encoder)}
    encoder.exceptions += 1
    try:
        _store_state(exc, stored, encoder)
        if not encoder.proving and not encoder.proves(stored):
            encoder.refuse(f"is a {name_of(type(exc))} that would not come back the same.")
        _store_cause(exc, stored, encoder)
    except SerializationError:
        raise
    except Exception as error:
        encoder.refuse(f"is a {name_of(type(exc))} that cannot be rebuilt from its args: {brief(error)}.", error)
    finally:
        encoder.exceptions -= 1
    return stored


def _store_state(exc: BaseException, stored: Stored, encoder: Encoder) -> None:
    args, attributes = _base["args"].__get__(exc), _base["__dict__"].__get__(exc)
    stored["a"] = [encoder.walk(arg, f".args[{i}]") for i, arg in enumerate(args)]
    itself = [name for name, value in attributes.items() if type(value) is list and len(value) == 1 and value[0] is exc]
    others = {name: value for name, value in attributes.items() if name not in itself}
    slots = _slot_values(exc, _make(type(exc), args))
    if others:
        stored["d"] = encoder.walk(others, ".__dict__")
    if slots:
        stored["s"] = encoder.walk(slots, " slots ")
    if itself:
        stored["self"] = encoder.walk(itself, ".__dict__")


def _store_cause(exc: BaseException, stored: Stored, encoder: Encoder) -> None:
    cause = _base["__cause__"].__get__(exc)
    if cause is None or encoder.causes >= _MAX_CAUSES:
        return
    encoder.causes += 1
    try:
        stored["cause"] = encoder.walk(cause, ".__cause__")
    except SerializationError:
        pass  # the exception matters more than where it came from, which its description tells
    finally:
        encoder.causes -= 1


def _read_exception(stored: Stored) -> BaseException:
    cls = find_class(member(stored, "c", str))
    if not _is_exception(cls):
        raise SerializationError(f"a stored exception names {short(stored['c'])}, which is not an exception class.")
    try:
        exc = _make(cls, tuple(member(stored, "a", list)))
        slots = _slots(cls)
        for name, value in stored.get("s", {}).items():
            slots[name].__set__(exc, value)
        attributes = _base["__dict__"].__get__(exc)
        attributes.update(stored.get("d", {}))
        for name in stored.get("self", ()):
            attributes[name] = [exc]
        if "cause" in stored:
            _base["__cause__"].__set__(exc, stored["cause"])
    except Exception as error:
        unreadable(f"a stored {name_of(cls)}", error)
    return exc


def _make(cls: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """Return a `cls` with these args, running no code but the interpreter's own."""
    built_in: Any = cls
    while built_in.__flags__ & _HEAP_TYPE:
        built_in = built_in.__base__
    exc: BaseException = built_in.__new__(cls, *args)
    if type(exc) is not cls:  # OSError(2, ...) is made as a FileNotFoundError
        raise TypeError(f"it becomes a {type(exc).__name__}")
    built_in.__init__(exc, *args)
    _base["args"].__set__(exc, args)
    return exc


def _slots(cls: type) -> dict[str, Any]:
    return {
        name: attribute
        for base in reversed(cls.__mro__)
        if base not in (object, BaseException)
        for name, attribute in class_namespace(base).items()
        if type(attribute) in (MemberDescriptorType, GetSetDescriptorType)
        and name not in ("__dict__", "__weakref__")
        and attribute is not _OBJECT
    }


def _slot_values(exc: BaseException, fresh: BaseException) -> dict[str, Any]:
    """Return the attributes outside `__dict__` that making the exception anew from its args does not give."""
    values = {}
    for name, slot in _slots(type(exc)).items():
        value, made = (_content(slot, each) for each in (exc, fresh))
        # Numbers, and a group's exceptions, are made anew at each look.
        if value is not made and not (type(value) is type(made) and type(value) in (int, tuple) and value == made):
            values[name] = value
    return values


def _content(slot: Any, exc: BaseException) -> Any:
    try:
        return slot.__get__(exc, type(exc))
    except AttributeError:
        return _UNSET


add_family(_is_exception, _store_exception)
add_tag("exc", _read_exception)


# --- failures: what is recorded when a step or a run ends with an exception


def dump_exception(exc: BaseException, *, limit: int = 256 * 1024) -> str:
    """Return text of at most `limit` characters from which `load_exception` raises the same exception again.

    That it does is proved here, by doing it: same class, args and attributes. If it does not, the text holds the
    type's name and what the exception says. Never raises: a failure that cannot be recorded would be met again at
    every replay.
    """
    failure: dict[str, Any] = {"type": _type_name(exc), "text": _text_of(exc, limit // 32)}
    try:
        text = to_json({**failure, "error": Encoder("the exception").encode(exc)})
        if len(text) <= limit:
            return text
        failure["why"] = f"its stored form takes {len(text):,} characters"
    except BaseException as error:  # whatever the exception's own code raises, SystemExit included
        failure["why"] = _text_of(error, limit // 32)
    return to_json(failure)


def load_exception(text: str, *, otherwise: Callable[[str, str], BaseException] = StepFailed) -> BaseException:
    """Return the exception that `dump_exception` stored, or ``otherwise(type_name, text)`` if its class is unusable.

    Raises SerializationError if the text is not a stored exception at all.
    """
    failure = from_json(text)
    if type(failure) is not dict or type(failure.get("type")) is not str or type(failure.get("text")) is not str:
        raise SerializationError(f"stored text is not a stored exception. It starts with {short(text[:80])}.")
    if "error" in failure:
        # Its class, or a row that it refers to, may be gone by now: its name and text are not.
        with suppress(SerializationError):
            revived = loads(text)
            if type(revived) is dict and isinstance(revived["error"], BaseException):
                return revived["error"]
    return otherwise(failure["type"], failure["text"])


# --- for people


def describe_exception(exc: BaseException) -> str:
    """Return ``type: message`` in one line, then the traceback with its causes; fit for any text column.

    At most 32 KiB characters: of a longer one its start and its end. Never raises.
    """
    headline = " ".join(_text_of(exc, 2000).split())
    try:
        told = traceback.TracebackException.from_exception(exc)
        _leave_out_our_frames(told)
        lines = "".join(told.format())
    except BaseException as error:  # formatting runs the exception's own code
        lines = f"(its traceback could not be formatted: {type(error).__name__})"
    first = f"{_type_name(exc)}: {headline}" if headline else _type_name(exc)
    return f"{first}\n{_shorten(clean_text(lines), DESCRIPTION_LIMIT - len(first) - 1)}"


def _leave_out_our_frames(told: traceback.TracebackException) -> None:
    """Between a workflow's line and its step's lie the engine's, the same in every traceback."""
    links: list[traceback.TracebackException | None] = [told]
    while links:
        link = links.pop()
        if link is not None:
            theirs = [frame for frame in link.stack if not frame.filename.startswith(_OUR_FOLDER)]
            link.stack = traceback.StackSummary.from_list(theirs or list(link.stack))
            links += [link.__cause__, link.__context__, *(link.exceptions or ())]


def clean_text(text: str) -> str:
    """Return `text` with NUL and lone surrogates written as ``\\x00`` and ``\\udc80``: no database refuses it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def _type_name(exc: BaseException) -> str:
    cls = type(exc)
    try:
        name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
        return _shorten(clean_text(name), 200)
    except BaseException:  # a metaclass's own attributes
        return "an exception"


def _text_of(exc: BaseException, limit: int) -> str:
    try:
        # A str subclass's own methods may not decide what is stored.
        return _shorten(clean_text(str.__str__(str(exc))), limit)
    except BaseException as error:  # the exception's own __str__
        return f"(it has no readable text: its __str__ raised {type(error).__name__})"


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    mark = f"\n... {len(text):,} characters in all ...\n"
    room = max(limit - len(mark), 0)
    return f"{text[: room - room // 3]}{mark}{text[len(text) - room // 3 :]}"[:limit]
