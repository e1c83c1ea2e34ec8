"""What can be stored: the kinds of values, how users add theirs, and how a class named in stored text is found.

A kind has a tag, a function that stores and one that reads. Kinds that are one class are found by exact class; kinds
that are many classes (enums, dataclasses, exceptions, ...) are families. `values`, `objects` and `failures` fill the
tables here; `register_type` adds the user's own.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from datetime import date, datetime
from decimal import Decimal
from types import MemberDescriptorType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from uuid import UUID
from weakref import WeakKeyDictionary

from django.db import Error as DatabaseError

from django_durable.exceptions import SerializationError

if TYPE_CHECKING:
    from django_durable.serialization.codec import Encoder

T = TypeVar("T")
Stored = dict[str, Any]
Encode = Callable[[Any, "Encoder"], Any]
Decode = Callable[[Stored], Any]

TAG = "$"
_SHOWN = frozenset({str, int, float, bool, bytes, type(None), UUID, Decimal, date, datetime})

_encoders: dict[type, Encode] = {}
_decoders: dict[str, Decode] = {}
_families: list[tuple[Callable[[type], bool], Encode]] = []
_family_of: WeakKeyDictionary[type, Encode] = WeakKeyDictionary()
_registered: dict[str, tuple[type, Callable[[Any], Any]]] = {}
_own_tags: set[str] = set()
_built_in: set[type] = {type(None), bool}

# The class's own namespace, read below every metaclass, so that looking up a name can run nobody's code.
class_namespace: Callable[[type], Mapping[str, Any]] = type.__dict__["__dict__"].__get__
_module_namespace: Callable[[ModuleType], dict[str, Any]] = vars(ModuleType)["__dict__"].__get__


# --- the tables


def add_class(cls: type, encode: Encode) -> None:
    """Store exact instances of a class of Python's own with `encode`; users cannot register it any more."""
    _encoders[cls] = encode
    _built_in.add(cls)


def add_family(matches: Callable[[type], bool], encode: Encode) -> None:
    """Store instances of every class that `matches` with `encode`; families may not overlap."""
    _families.append((matches, encode))


def add_tag(tag: str, decode: Decode) -> None:
    """Read objects tagged `tag` with `decode`."""
    _decoders[tag] = decode


def encoder_for(cls: type) -> Encode | None:
    """Return what stores instances of exactly this class, or None if nothing does."""
    encode = _encoders.get(cls) or _family_of.get(cls)
    if encode is None:
        for matches, family in _families:
            if matches(cls):
                _family_of[cls] = encode = family
                break
    return encode


def decoder_for(tag: str) -> Decode | None:
    """Return what reads objects tagged `tag`, or None if the tag is unknown."""
    return _decoders.get(tag)


# --- what users and other modules add


def register_type(cls: type[T], encode: Callable[[T], Any], decode: Callable[[Any], T]) -> None:
    """Let instances of exactly `cls` be stored.

    ``encode(obj)`` returns a value that can be stored, ``decode(value)`` makes an equal object of it. Registering a
    class again replaces its functions. Stored text names the class by its module and qualified name, so every process
    that reads it must have registered it too: do it in the module that defines the class.
    """
    _check(cls, encode, decode)
    name = name_of(cls)

    def store(value: T, encoder: Encoder) -> Stored:
        return {TAG: "type", "c": name, "v": _through(encode, value, encoder)}

    _encoders[cls] = store
    _registered[name] = (cls, decode)


def register_kind(tag: str, cls: type[T], encode: Callable[[T], Any], decode: Callable[[Any], T]) -> None:
    """`register_type` for this package's own classes, which are stored under a short tag instead of their name."""
    _check(cls, encode, decode)
    if tag in _decoders and tag not in _own_tags:
        raise ValueError(f"The tag {tag!r} is taken by a built-in kind. Choose another one.")

    def store(value: T, encoder: Encoder) -> Stored:
        return {TAG: tag, "v": _through(encode, value, encoder)}

    def read(stored: Stored) -> Any:
        return _back(cls, decode, stored["v"])

    _own_tags.add(tag)
    _encoders[cls] = store
    _decoders[tag] = read


def _check(cls: Any, encode: Any, decode: Any) -> None:
    if not isinstance(cls, type):
        raise TypeError(f"register_type takes a class first, not {cls!r}.")
    if not callable(encode) or not callable(decode):
        raise TypeError(f"register_type({cls.__qualname__}, encode, decode): both must be callable.")
    if cls in _built_in:
        raise ValueError(f"{cls.__qualname__} is stored as it is; register a class of your own.")


def _through(encode: Callable[[Any], Any], value: Any, encoder: Encoder) -> Any:
    try:
        encoded = encode(value)
    except (SerializationError, DatabaseError):  # a lost connection says nothing about the value: let it be retried
        raise
    except Exception as error:
        encoder.refuse(f"could not be encoded: its registered encode function raised {brief(error)}. Mend it.", error)
    return encoder.walk(encoded, ".<encoded>")


def _back(cls: type, decode: Callable[[Any], Any], value: Any) -> Any:
    try:
        decoded = decode(value)
    except (SerializationError, DatabaseError):  # a lost connection as above
        raise
    except Exception as error:
        raise SerializationError(
            f"a stored {name_of(cls)} cannot be read: its registered decode function raised {brief(error)}. "
            "Keep it able to read what older code stored."
        ) from error
    if not isinstance(decoded, cls):
        raise SerializationError(
            f"a stored {name_of(cls)} cannot be read: its registered decode function returned "
            f"a {name_of(type(decoded))}. Make it return the class it was registered for."
        )
    return decoded


def _read_registered(stored: Stored) -> Any:
    name = member(stored, "c", str)
    if name not in _registered:
        find_class(name)  # loading an app's module may be what registers the class
    if name not in _registered:
        raise SerializationError(
            f"a stored value names {short(name)}, which is not registered here. Call "
            "durable.register_type(...) for it in a module that every process loads."
        )
    cls, decode = _registered[name]
    return _back(cls, decode, stored["v"])


add_tag("type", _read_registered)


# --- classes by name


def name_of(cls: type) -> str:
    """Return the name under which a class is stored, such as ``shop.models:Order.Status``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find_class(name: str) -> type:
    """Return the class that stored text names, or raise SerializationError.

    Nothing that the text says makes this import a module outside the installed apps, call anything, or trigger a
    module's or a class's attribute hooks. Whether the class is of an acceptable kind is for the caller to check.
    """
    module_name, separator, qualname = name.partition(":")
    module = _find_module(module_name)
    if not separator or module is None:
        raise SerializationError(
            f"a stored value names the class {short(name)}, whose module is neither loaded here nor part of an "
            "installed app. Import it where every process does, for example in the app's workflows.py."
        )
    namespace: Mapping[str, Any] = _module_namespace(module)
    found: Any = None
    for part in qualname.split("."):
        found = namespace.get(part)
        if not issubclass(type(found), type):
            raise SerializationError(
                f"a stored value names the class {short(name)}, and there is no such class. "
                "Was it renamed or moved? Leave its old name where it was, as an alias."
            )
        namespace = class_namespace(found)
    return found  # type: ignore[no-any-return]  # proved to be a class in the loop


def importable_name(cls: type, encoder: Encoder) -> str:
    """Return the name by which `cls` is found again, or refuse the value: it could never be read."""
    name = name_of(cls)
    try:
        found: type | None = find_class(name)
    except SerializationError:
        found = None
    if found is not cls:
        encoder.refuse(
            f"is a {name}, a class that cannot be found again by that name. Define it at the top of a module "
            "(not inside a function), or register it: durable.register_type(cls, encode, decode)."
        )
    return name


def slots_of(cls: type) -> dict[str, MemberDescriptorType]:
    """Return the places for attributes that instances have outside their `__dict__`, by name."""
    return {
        name: attribute
        for base in reversed(cls.__mro__)
        for name, attribute in class_namespace(base).items()
        if type(attribute) is MemberDescriptorType
    }


def _find_module(name: str) -> ModuleType | None:
    module = sys.modules.get(name)
    if _is_being_loaded(module) or (module is None and _belongs_to_an_app(name)):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            return None
        except Exception as error:
            raise SerializationError(
                f"a stored value names a class in {name}, and importing that raised {brief(error)}. Mend the module."
            ) from error
    return module if issubclass(type(module), ModuleType) else None


def _is_being_loaded(module: Any) -> bool:
    """Whether another thread has not finished importing it: its classes would seem to be gone. Importing it waits."""
    if not issubclass(type(module), ModuleType):
        return False
    return bool(getattr(_module_namespace(module).get("__spec__"), "_initializing", False))


def _belongs_to_an_app(name: str) -> bool:
    from django.apps import apps

    parts = name.split(".")
    # __main__ is a program: importing it would run it.
    if not apps.apps_ready or "__main__" in parts or not all(part.isidentifier() for part in parts):
        return False
    return any(f"{name}.".startswith(f"{config.name}.") for config in apps.get_app_configs())


# --- helpers of those who read and write


def member(stored: Stored, key: str, cls: type[T]) -> T:
    """Return ``stored[key]``, which must be exactly a `cls`."""
    value = stored[key]
    if type(value) is not cls:
        raise TypeError(f"its {key!r} is a {type(value).__name__}, not a {cls.__name__}")
    return value


def unreadable(what: str, error: BaseException) -> NoReturn:
    """Raise the SerializationError of stored text that has the right tag and the wrong content."""
    raise SerializationError(
        f"{what} cannot be read: {brief(error)}. The text was changed, or other code wrote it."
    ) from error


def short(value: Any) -> str:
    """Return a repr that is safe to put into a message: of Python's own values only, at most 80 characters."""
    if type(value) is tuple:
        text = f"({', '.join(short(item) for item in value[:8])})"
    else:
        text = repr(value) if type(value) in _SHOWN else f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def brief(error: BaseException) -> str:
    """Return an exception's type and the start of its text, whatever its `__str__` does."""
    try:
        return f"{type(error).__name__}: {str(error)[:200]!a}"
    except Exception:
        return type(error).__name__
