"""Instances of users' classes: how each is stored and read. No `__init__`, validator or `__setattr__` is called.

``enum`` c class, v member's name (for a combination of flags without one: its number) · ``dataclass`` c class, v
{field: value}, x other attributes · ``pydantic`` c class, v {field: value}, x other attributes, set [fields that were
given], extra and private dicts if the model has them · ``model`` m "app.Model", v primary key, db database alias:
a reference, read again from the database.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from django_durable.exceptions import SerializationError
from django_durable.serialization.codec import Encoder
from django_durable.serialization.types import (
    TAG,
    Stored,
    add_family,
    add_tag,
    class_namespace,
    find_class,
    importable_name,
    member,
    name_of,
    short,
    slots_of,
    unreadable,
)

_EMPTY = (list, dict, set, frozenset, tuple)


def _class_of(stored: Stored, what: str, matches: Callable[[type], bool]) -> Any:
    name = member(stored, "c", str)
    cls = find_class(name)
    if not matches(cls):
        raise SerializationError(
            f"a stored value names {short(name)} as a class that is {what}, and it is not. "
            "The text was changed, or the class was."
        )
    return cls


# --- enums


def _is_enum(cls: type) -> bool:
    return issubclass(cls, enum.Enum)


def _store_enum(value: enum.Enum, encoder: Encoder) -> Any:
    cls = type(value)
    stored = {TAG: "enum", "c": importable_name(cls, encoder)}
    name = value._name_
    if _members(cls).get(name) is value:
        return {**stored, "v": encoder.walk(name, ".name")}
    if not isinstance(value, enum.Flag):
        encoder.refuse(f"is not among the members of {name_of(cls)}. Was the class loaded twice?")
    return {**stored, "v": encoder.walk(value._value_, ".value")}


def _read_enum(stored: Stored) -> enum.Enum:
    cls = _class_of(stored, "an enum", _is_enum)
    which = stored["v"]
    if type(which) is int and issubclass(cls, enum.Flag):
        return _combination(cls, which)
    found = _members(cls).get(which) if type(which) is str else None
    if found is None:
        raise SerializationError(
            f"{name_of(cls)} has no member {short(which)} any more, and a stored value needs it. "
            "Put it back (an alias of another member will do)."
        )
    return found


def _members(cls: Any) -> dict[str, enum.Enum]:
    return class_namespace(cls)["_member_map_"]  # type: ignore[no-any-return]


def _combination(cls: type[enum.Flag], number: int) -> enum.Flag:
    known = class_namespace(cls)["_value2member_map_"].get(number)
    # The standard library's own way to make a combination, past any `_missing_` of the class's.
    found = enum.Flag.__dict__["_missing_"].__func__(cls, number) if known is None else known
    if type(found) is not cls:
        raise ValueError(f"{number} is not a combination of its members")
    return found


# --- dataclasses


def _is_dataclass(cls: type) -> bool:
    return any("__dataclass_fields__" in class_namespace(base) for base in cls.__mro__) and not issubclass(
        cls, (BaseException, enum.Enum)
    )


def _store_dataclass(value: Any, encoder: Encoder) -> Any:
    cls = type(value)
    stored: Stored = {TAG: "dataclass", "c": importable_name(cls, encoder)}
    try:
        object.__new__(cls)
    except TypeError as error:
        # A list, dict, ... underneath: its content is no field and would be lost.
        encoder.refuse("is a dataclass with a built-in type as its base. Register it, or hold that in a field.", error)
    state = dict(_attributes(value) or {})
    for name, slot in slots_of(cls).items():
        with suppress(AttributeError):  # a slot that is not set
            state[name] = slot.__get__(value, cls)
    return _with_state(stored, [field.name for field in dataclasses.fields(cls)], state, encoder)


def _read_dataclass(stored: Stored) -> Any:
    cls = _class_of(stored, "a dataclass", _is_dataclass)
    fields = {field.name: field for field in dataclasses.fields(cls)}

    def default_of(name: str) -> Any:
        field = fields[name]
        return field.default_factory() if field.default_factory in _EMPTY else field.default

    state = _state_of(stored, cls, fields, default_of)
    made = object.__new__(cls)
    slots = slots_of(cls)
    attributes = _attributes(made)
    for name, content in state.items():
        if name in slots:
            slots[name].__set__(made, content)
        elif attributes is None:
            raise ValueError(f"the class has no place for {short(name)}")
        else:
            attributes[name] = content
    return made


def _attributes(value: Any) -> dict[str, Any] | None:
    try:
        return object.__getattribute__(value, "__dict__")  # type: ignore[no-any-return]
    except AttributeError:
        return None


# --- the state of dataclasses and pydantic models


def _with_state(stored: Stored, fields: Collection[str], state: dict[str, Any], encoder: Encoder) -> Stored:
    for name in fields:
        if name not in state:
            encoder.refuse(
                f"has a field {name!r} that is not set, or that a descriptor keeps elsewhere. Set it, "
                "or register the class: durable.register_type(cls, encode, decode)."
            )
    # What else is in the instance: cached properties, attributes set by __post_init__. The alias that
    # typing leaves in instances of generic classes says nothing about the value.
    others = {name: state[name] for name in state if name not in fields and name != "__orig_class__"}
    stored["v"] = _named({name: state[name] for name in fields}, encoder)
    if others:
        stored["x"] = _named(others, encoder)
    return stored


def _named(attributes: dict[str, Any], encoder: Encoder) -> Any:
    if all(type(name) is str and name.isidentifier() for name in attributes):
        return {name: encoder.walk(content, f".{name}") for name, content in attributes.items()}
    return encoder.walk(attributes, "")  # such as pydantic's extra "$": a name that only a dict may have


def _state_of(stored: Stored, cls: type, fields: Collection[str], default_of: Callable[[str], Any]) -> dict[str, Any]:
    """Return the attributes to set. A field added since then gets its default, if no code has to run for it."""
    state = member(stored, "v", dict)
    problems = [f"{short(name)} is no field of it" for name in state if name not in fields]
    for name in fields:
        if name not in state:
            state[name] = default_of(name)
            if state[name] is dataclasses.MISSING:
                problems.append(f"{name!r} is missing")
    if problems:
        raise SerializationError(
            f"a stored {name_of(cls)} does not fit the class: {', '.join(problems)}. Give new fields a default, keep "
            "old ones while stored values have them, or register the class with a decode that knows both."
        )
    return {**state, **(member(stored, "x", dict) if "x" in stored else {})}


# --- pydantic models, if pydantic is there


def _is_pydantic(cls: type) -> bool:
    # Never imported by us: while it is not loaded, no value can be a pydantic model.
    pydantic = sys.modules.get("pydantic.main")
    return pydantic is not None and vars(pydantic).get("BaseModel") in cls.__mro__


def _store_pydantic(value: Any, encoder: Encoder) -> Any:
    cls = type(value)
    stored: Stored = {TAG: "pydantic", "c": importable_name(cls, encoder)}
    # What pydantic itself gives to pickle: the four parts that make up an instance.
    state = sys.modules["pydantic.main"].BaseModel.__getstate__(value)
    _with_state(stored, cls.model_fields, state["__dict__"], encoder)
    stored["set"] = encoder.walk(sorted(state["__pydantic_fields_set__"]), ".model_fields_set")
    for key, part in (("extra", "__pydantic_extra__"), ("private", "__pydantic_private__")):
        if state[part] is not None:
            stored[key] = _named(state[part], encoder)
    return stored


def _read_pydantic(stored: Stored) -> Any:
    cls = _class_of(stored, "a pydantic model", _is_pydantic)
    fields = cls.model_fields

    def default_of(name: str) -> Any:
        factory = fields[name].default_factory
        if factory is None and not fields[name].is_required():
            return fields[name].get_default()
        return factory() if factory in _EMPTY else dataclasses.MISSING

    parts = {
        "__pydantic_fields_set__": set(member(stored, "set", list)),
        "__pydantic_extra__": member(stored, "extra", dict) if "extra" in stored else None,
        "__pydantic_private__": member(stored, "private", dict) if "private" in stored else None,
    }
    made = object.__new__(cls)
    object.__setattr__(made, "__dict__", _state_of(stored, cls, fields, default_of))
    # The base's own places: a RootModel hides them behind class attributes.
    slots = slots_of(sys.modules["pydantic.main"].BaseModel)
    for part, content in parts.items():
        slots[part].__set__(made, content)
    return made


# --- model instances, by reference


def _is_model(cls: type) -> bool:
    # As above: while Django's models are not loaded, no value can be one.
    base = sys.modules.get("django.db.models.base")
    return base is not None and vars(base).get("Model") in cls.__mro__


def _store_model(value: Any, encoder: Encoder) -> Any:
    from django.apps import apps
    from django.db import router

    label = value._meta.label
    try:
        installed = apps.get_model(label)
    except LookupError:
        installed = None
    if installed is not type(value):
        encoder.refuse(f"is a {label} that is not an installed model (of a migration?). Pass its primary key instead.")
    pk = value.pk
    if value._state.adding or pk is None or (type(pk) is tuple and None in pk):
        encoder.refuse(f"is a {label} that is not in the database. Save it first, or pass its values.")
    database = value._state.db or router.db_for_read(type(value), instance=value)
    return {TAG: "model", "m": label, "v": encoder.walk(pk, ".pk"), "db": database}


def _read_model(stored: Stored) -> Any:
    from django.apps import apps
    from django.core.exceptions import AppRegistryNotReady, ObjectDoesNotExist, ValidationError
    from django.db import DataError, connections

    label, pk, database = member(stored, "m", str), stored["v"], member(stored, "db", str)
    try:
        model: Any = apps.get_model(label)
    except (LookupError, ValueError, AppRegistryNotReady) as error:
        raise SerializationError(
            f"a stored value refers to the model {short(label)}, which is not installed here. "
            "Put its app back into INSTALLED_APPS, or restore the model's name."
        ) from error
    if database not in connections.settings:
        raise SerializationError(
            f"a stored {model._meta.label} lives in the database {short(database)}, which DATABASES does not have here."
        )
    try:
        return model._base_manager.using(database).get(pk=pk)
    except ObjectDoesNotExist as error:
        raise SerializationError(
            f"{model._meta.label} with primary key {short(pk)} does not exist in database {database!r} any more. "
            "It was deleted after it was passed by reference: pass the values that are needed later, or keep the row."
        ) from error
    except (DataError, OverflowError, TypeError, ValidationError, ValueError) as error:
        unreadable(f"a stored {model._meta.label} with primary key {short(pk)}", error)


add_family(_is_enum, _store_enum)
add_family(_is_model, _store_model)
add_family(_is_pydantic, _store_pydantic)
add_family(_is_dataclass, _store_dataclass)

add_tag("enum", _read_enum)
add_tag("dataclass", _read_dataclass)
add_tag("pydantic", _read_pydantic)
add_tag("model", _read_model)
