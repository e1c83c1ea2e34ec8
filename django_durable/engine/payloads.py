"""Values on their way into and out of the tables: the serializer of the settings, and the size limit."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

from django.utils.module_loading import import_string

from django_durable import serialization
from django_durable.conf import options
from django_durable.exceptions import PayloadTooLarge, SerializationError


class Serializer(Protocol):
    def dumps(self, value: Any) -> str: ...

    def loads(self, text: str) -> Any: ...


@lru_cache
def _import(path: str) -> Serializer:
    found = import_string(path)
    serializer: Serializer = found() if isinstance(found, type) else found
    return serializer


def _serializer() -> Any:
    path = options().SERIALIZER
    return serialization if path is None else _import(path)


def dump(value: Any, place: str) -> str:
    """Return the value's stored text; raise SerializationError or PayloadTooLarge that names the place."""
    try:
        text: str = _serializer().dumps(value)
    except SerializationError as error:
        raise error.at(place) from error.__cause__
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if size > options().MAX_PAYLOAD_BYTES:
        raise PayloadTooLarge.of(size, options().MAX_PAYLOAD_BYTES).at(place)
    return text


def load(text: str, place: str) -> Any:
    """Return the stored value; raise SerializationError that names the place."""
    try:
        return _serializer().loads(text)
    except SerializationError as error:
        raise error.at(place) from error.__cause__


def dump_input(args: tuple[Any, ...], kwargs: dict[str, Any], workflow: str) -> str:
    return dump({"args": list(args), "kwargs": kwargs}, f"The arguments of workflow {workflow!r}")


def load_input(run_id: str, text: str) -> tuple[list[Any], dict[str, Any]]:
    stored = load(text, f"The arguments of run {run_id}")
    return stored["args"], stored["kwargs"]
