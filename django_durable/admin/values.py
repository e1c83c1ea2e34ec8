"""Stored values as text for people, made from the stored text alone.

Nothing is revived: a model instance would be read from its table, a class that is gone would break the page, and a
class that is there would run its code in the web process.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.utils.translation import gettext

from django_durable.serialization import clean_text
from django_durable.serialization.types import TAG, Stored

# What a page shows of one value or traceback; the rest stays in the database.
SHOWN = 20_000
# Indenting makes text longer: what grows beyond this is shown as it is stored.
LONGEST = 5 * SHOWN
WIDTH = 100
INDENT = "  "

_TYPE_NAME = re.compile(r"[\w.<>]{1,200}")

Lines = list[str]


class Unreadable(Exception):
    """The text would be too long in lines of their own."""


# What reading raises on a text that the codec has not written. Then the whole text is shown as it is: to render only
# the odd part anew would render what is inside it twice, and at the next level four times.
NOT_OURS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, Unreadable)


@dataclass(frozen=True)
class Shown:
    """A text on a page: "" and not hidden, there is none."""

    text: str = ""
    note: str = ""
    hidden: bool = False


HIDDEN = Shown(hidden=True)


def value(stored: str, size: int | None) -> Shown:
    """A stored value, of which `stored` is the start and `size` the whole length."""
    if size is not None and size > SHOWN:
        return cut(stored, size)
    try:
        return Shown(readable(stored))
    except NOT_OURS:
        # Another serializer's text, or one that is nested too deep: as it is.
        return Shown(clean_text(stored))


def call(workflow: str, stored: str, size: int | None) -> Shown:
    """A run's stored input, as the call that it stands for."""
    if size is not None and size > SHOWN:
        return cut(stored, size)
    try:
        found = json.loads(stored)
        args, kwargs = found["args"], found["kwargs"]
        parts = [_lines(item) for item in args]
        parts += [_prefixed(f"{name}=", _lines(item)) for name, item in kwargs.items()]
        return Shown(_text(_bracketed(f"{workflow}(", parts, ")")))
    except NOT_OURS:
        return value(stored, size)


def cut(stored: str, size: int) -> Shown:
    """The start of a text that is too long for a page."""
    note = gettext("The first %(shown)s of %(size)s characters, as stored.")
    return Shown(clean_text(stored[:SHOWN]), note % {"shown": f"{SHOWN:,}", "size": f"{size:,}"})


def error_type(error: str) -> str:
    """The name of a recorded error's type, which may be shown to everybody; "" if there is no error."""
    name = error.partition("\n")[0].partition(": ")[0]
    if not error:
        return ""
    return name.rpartition(".")[2] if _TYPE_NAME.fullmatch(name) else gettext("an error")


def headline(error: str) -> str:
    """A recorded error's first line: its type, without the module, and its message."""
    first = error.partition("\n")[0]
    name, colon, message = first.partition(": ")
    return f"{error_type(error)}{colon}{message}" if _TYPE_NAME.fullmatch(name) else first


def traceback(error: str, size: int | None) -> Shown:
    """What stands below a recorded error's first line."""
    text = error.partition("\n")[2].rstrip()
    if size is not None and size > len(error):
        note = gettext("The first %(shown)s of %(size)s characters.")
        return Shown(text, note % {"shown": f"{len(error):,}", "size": f"{size:,}"})
    return Shown(text)


# --- tagged JSON, written as Python would


def readable(stored: str) -> str:
    """The stored text of a value in Python's notation, broken into lines. Raises one of `NOT_OURS` if it is none."""
    return _text(_lines(json.loads(stored)))


def _text(lines: Lines) -> str:
    if sum(map(len, lines)) > LONGEST:
        raise Unreadable
    # Lone surrogates can be stored, and not sent.
    return clean_text("\n".join(lines))


def _lines(node: Any) -> Lines:
    if isinstance(node, str):
        return [json.dumps(node, ensure_ascii=False)]
    if isinstance(node, list):
        return _sequence("[", node, "]")
    if not isinstance(node, dict):
        return [repr(node)]
    return _KINDS.get(node[TAG], _other)(node) if TAG in node else _pairs(node.items())


def _bracketed(start: str, parts: list[Lines], end: str) -> Lines:
    """The parts in one line if they fit, else each in lines of its own."""
    if all(len(part) == 1 for part in parts) and sum(len(part[0]) + 2 for part in parts) + len(start) <= WIDTH:
        return [start + ", ".join(part[0] for part in parts) + end]
    lines = [start]
    for part in parts:
        lines += [INDENT + line for line in part]
        lines[-1] += ","
    if sum(map(len, lines)) > LONGEST:
        raise Unreadable
    return [*lines, end]


def _prefixed(prefix: str, lines: Lines) -> Lines:
    return [prefix + lines[0], *lines[1:]]


def _sequence(start: str, items: Iterable[Any], end: str) -> Lines:
    return _bracketed(start, [_lines(item) for item in items], end)


def _pairs(pairs: Iterable[tuple[Any, Any]]) -> Lines:
    parts = []
    for key, item in pairs:
        *before, last = _lines(key)
        parts.append([*before, *_prefixed(f"{last}: ", _lines(item))])
    return _bracketed("{", parts, "}")


def _fields(name: str, fields: dict[str, Any]) -> Lines:
    return _bracketed(f"{name}(", [_prefixed(f"{field}=", _lines(item)) for field, item in fields.items()], ")")


def _own_name(stored: Stored) -> str:
    return str(stored["c"]).partition(":")[2] or str(stored["c"])


def _tuple(stored: Stored) -> Lines:
    lines = _sequence("(", stored["v"], ")")
    # In one line, a tuple of one element is told from brackets by its comma.
    return [f"{lines[0][:-1]},)"] if len(stored["v"]) == len(lines) == 1 else lines


def _clock(stored: Stored) -> Lines:
    zone = f" {' '.join(_lines(stored['tz']))}" if "tz" in stored else ""
    return [f"{str(stored['v']).replace('T', ' ')}{zone}"]


def _offset(stored: Stored) -> Lines:
    seconds = stored["v"]
    if "name" in stored:
        return [str(stored["name"])]
    if seconds == 0:
        return ["UTC"]
    sign = "-" if seconds < 0 else "+"
    return [f"{sign}{abs(seconds) // 3600:02.0f}:{abs(seconds) % 3600 // 60:02.0f}"]


def _model(stored: Stored) -> Lines:
    *before, last = _prefixed(f"<{stored['m']} ", _lines(stored["v"]))
    database = "" if stored["db"] == "default" else f" in {stored['db']}"
    return [*before, f"{last}{database}>"]


def _exception(stored: Stored) -> Lines:
    return _bracketed(
        f"{_own_name(stored)}(",
        [
            *(_lines(item) for item in stored["a"]),
            *(_prefixed(f"{name}=", _lines(item)) for name, item in stored.get("d", {}).items()),
        ],
        ")",
    )


def _other(stored: Stored) -> Lines:
    """A kind of another module's, or of a newer version."""
    rest = {name: item for name, item in stored.items() if name != TAG}
    return _sequence(f"{stored[TAG]}(", rest.values(), ")") if set(rest) == {"v"} else _fields(str(stored[TAG]), rest)


def _instance(stored: Stored) -> Lines:
    return _fields(_own_name(stored), {**stored["v"], **stored.get("x", {}), **stored.get("extra", {})})


_KINDS: dict[Any, Callable[[Stored], Lines]] = {
    "str": lambda stored: [json.dumps("".join(stored["v"]))],
    "int": lambda stored: [f"0x{stored['v']}".replace("0x-", "-0x")],
    "float": lambda stored: [str(stored["v"])],
    "tuple": _tuple,
    "set": lambda stored: _sequence("{", stored["v"], "}") if stored["v"] else ["set()"],
    "frozenset": lambda stored: _sequence("frozenset({", stored["v"], "})"),
    "dict": lambda stored: _pairs((key, item) for key, item in stored["v"]),
    "bytes": lambda stored: [repr(base64.b64decode(stored["v"], validate=True))],
    "decimal": lambda stored: [f'Decimal("{stored["v"]}")'],
    "uuid": lambda stored: [f'UUID("{stored["v"]}")'],
    "date": lambda stored: [str(stored["v"])],
    "timedelta": lambda stored: [str(timedelta(*stored["v"]))],
    "datetime": _clock,
    "time": _clock,
    "zone": lambda stored: [str(stored["v"])],
    "offset": _offset,
    "enum": lambda stored: [f"{_own_name(stored)}.{stored['v']}"],
    "dataclass": _instance,
    "pydantic": _instance,
    "model": _model,
    "exc": _exception,
    "type": lambda stored: _sequence(f"{_own_name(stored)}(", [stored["v"]], ")"),
}
