"""Python's own values: how each is stored and read.

``int`` v hexadecimal · ``float`` v "nan", "inf", "-inf" · ``str`` v pieces · ``bytes`` v base64 · ``tuple``, ``set``,
``frozenset`` v elements · ``dict`` v pairs · ``decimal``, ``uuid``, ``date`` v text · ``timedelta`` v [days, seconds,
microseconds] · ``datetime``, ``time`` v ISO text of the wall clock, tz a zone, fold 1 if set · ``zone`` v key ·
``offset`` v seconds, name if it has one.
"""

from __future__ import annotations

import base64
import re
import zoneinfo
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from django_durable.exceptions import SerializationError
from django_durable.serialization.codec import LARGE_INT, Encoder, is_mergeable, to_json
from django_durable.serialization.types import TAG, Stored, add_class, add_tag, member, short

C = TypeVar("C", dict[Any, Any], set[Any])

# --- str, int, float: tagged only where JSON would change them

_BETWEEN_SURROGATES = re.compile("(?<=[\ud800-\udbff])(?=[\udc00-\udfff])")


def _store_str(value: str, encoder: Encoder) -> Any:
    return {TAG: "str", "v": _BETWEEN_SURROGATES.split(value)} if is_mergeable(value) else value


def _read_str(stored: Stored) -> str:
    return "".join(member(stored, "v", list))


def _store_int(value: int, encoder: Encoder) -> Any:
    return value if -LARGE_INT < value < LARGE_INT else {TAG: "int", "v": f"{value:x}"}


def _read_int(stored: Stored) -> int:
    return int(member(stored, "v", str), 16)


def _store_float(value: float, encoder: Encoder) -> Any:
    return value if value - value == 0 else {TAG: "float", "v": repr(value)}


def _read_float(stored: Stored) -> float:
    return float(member(stored, "v", str))


# --- containers


def _store_list(value: list[Any], encoder: Encoder) -> Any:
    return [encoder.walk(item, f"[{i}]") for i, item in enumerate(value)]


def _store_tuple(value: tuple[Any, ...], encoder: Encoder) -> Any:
    return {TAG: "tuple", "v": [encoder.walk(item, f"[{i}]") for i, item in enumerate(value)]}


def _read_tuple(stored: Stored) -> tuple[Any, ...]:
    return tuple(member(stored, "v", list))


def _store_dict(value: dict[Any, Any], encoder: Encoder) -> Any:
    if TAG not in value and all(type(key) is str and not is_mergeable(key) for key in value):
        return {key: encoder.walk(item, f"[{to_json(key)}]") for key, item in value.items()}
    pairs = [[encoder.walk(key, f" key {short(key)}"), encoder.walk(item, _at(key))] for key, item in value.items()]
    return {TAG: "dict", "v": pairs}


def _at(key: Any) -> str:
    return f"[{to_json(key) if type(key) is str else short(key)}]"


def _read_dict(stored: Stored) -> dict[Any, Any]:
    pairs = member(stored, "v", list)
    if not all(type(pair) is list for pair in pairs):
        raise TypeError("it is not made of pairs")
    return _complete(dict(pairs), pairs)


def _store_set(value: set[Any] | frozenset[Any], encoder: Encoder) -> Any:
    elements = [encoder.walk(item, " element") for item in value]
    return {TAG: type(value).__name__, "v": sorted(elements, key=to_json)}


def _read_set(stored: Stored) -> set[Any]:
    elements = member(stored, "v", list)
    return _complete(set(elements), elements)


def _read_frozenset(stored: Stored) -> frozenset[Any]:
    return frozenset(_read_set(stored))


def _complete(made: C, elements: list[Any]) -> C:
    # Elements that were different when they were stored and are equal now would be lost without a word.
    if len(made) != len(elements):
        raise ValueError("two of its elements are equal")
    return made


# --- bytes, numbers, ids


def _store_bytes(value: bytes, encoder: Encoder) -> Any:
    return {TAG: "bytes", "v": base64.b64encode(value).decode("ascii")}


def _read_bytes(stored: Stored) -> bytes:
    return base64.b64decode(member(stored, "v", str), validate=True)


def _store_decimal(value: Decimal, encoder: Encoder) -> Any:
    return {TAG: "decimal", "v": str(value)}


def _read_decimal(stored: Stored) -> Decimal:
    return Decimal(member(stored, "v", str))


def _store_uuid(value: UUID, encoder: Encoder) -> Any:
    return {TAG: "uuid", "v": str(value)}


def _read_uuid(stored: Stored) -> UUID:
    return UUID(member(stored, "v", str))


# --- dates and times


def _store_date(value: date, encoder: Encoder) -> Any:
    return {TAG: "date", "v": value.isoformat()}


def _read_date(stored: Stored) -> date:
    return date.fromisoformat(member(stored, "v", str))


def _store_timedelta(value: timedelta, encoder: Encoder) -> Any:
    return {TAG: "timedelta", "v": [value.days, value.seconds, value.microseconds]}


def _read_timedelta(stored: Stored) -> timedelta:
    days, seconds, microseconds = member(stored, "v", list)
    return timedelta(days, seconds, microseconds)


def _store_clock(value: datetime | time, encoder: Encoder) -> Any:
    stored: Stored = {TAG: type(value).__name__, "v": value.replace(tzinfo=None).isoformat()}
    if value.tzinfo is not None:
        stored["tz"] = encoder.walk(value.tzinfo, ".tzinfo")
    if value.fold:
        stored["fold"] = value.fold
    return stored


def _read_datetime(stored: Stored) -> datetime:
    return datetime.fromisoformat(member(stored, "v", str)).replace(tzinfo=_tz(stored), fold=stored.get("fold", 0))


def _read_time(stored: Stored) -> time:
    return time.fromisoformat(member(stored, "v", str)).replace(tzinfo=_tz(stored), fold=stored.get("fold", 0))


def _tz(stored: Stored) -> tzinfo | None:
    tz = stored.get("tz")
    if tz is not None and not isinstance(tz, tzinfo):
        raise TypeError(f"its time zone is a {type(tz).__name__}")
    return tz


def _store_zone(value: zoneinfo.ZoneInfo, encoder: Encoder) -> Any:
    if value.key is None or not _is_zone(value.key):
        encoder.refuse("is a ZoneInfo without a key of the time zone database. Use ZoneInfo(key), or an offset.")
    return {TAG: "zone", "v": value.key}


def _read_zone(stored: Stored) -> zoneinfo.ZoneInfo:
    key = member(stored, "v", str)
    if not _is_zone(key):
        raise SerializationError(
            f"a stored time zone, {short(key)}, is not in this machine's time zone database. "
            "Install the tzdata package."
        )
    return zoneinfo.ZoneInfo(key)


@lru_cache(maxsize=1024)
def _is_zone(key: str) -> bool:
    # Asked before ZoneInfo is: for a key that it does not find, that imports a package whose name is made of the key.
    # And no file is looked for elsewhere, which on Windows may mean another machine.
    if not re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", key):
        return False
    return any(Path(root, key).is_file() for root in zoneinfo.TZPATH) or key in _all_zones()


@cache
def _all_zones() -> set[str]:
    return zoneinfo.available_timezones()


def _store_offset(value: timezone, encoder: Encoder) -> Any:
    seconds = value.utcoffset(None).total_seconds()
    stored: Stored = {TAG: "offset", "v": int(seconds) if seconds.is_integer() else seconds}
    # What pickle uses too; tzname() would not tell a name from the default.
    _, *name = value.__getinitargs__()  # type: ignore[attr-defined]
    if name:
        stored["name"] = encoder.walk(name[0], ".tzname()")
    return stored


def _read_offset(stored: Stored) -> timezone:
    offset = timedelta(seconds=stored["v"])
    return timezone(offset, member(stored, "name", str)) if "name" in stored else timezone(offset)


add_class(str, _store_str)
add_class(int, _store_int)
add_class(float, _store_float)
add_class(list, _store_list)
add_class(tuple, _store_tuple)
add_class(dict, _store_dict)
add_class(set, _store_set)
add_class(frozenset, _store_set)
add_class(bytes, _store_bytes)
add_class(Decimal, _store_decimal)
add_class(UUID, _store_uuid)
add_class(date, _store_date)
add_class(timedelta, _store_timedelta)
add_class(datetime, _store_clock)
add_class(time, _store_clock)
add_class(zoneinfo.ZoneInfo, _store_zone)
add_class(timezone, _store_offset)

add_tag("str", _read_str)
add_tag("int", _read_int)
add_tag("float", _read_float)
add_tag("tuple", _read_tuple)
add_tag("dict", _read_dict)
add_tag("set", _read_set)
add_tag("frozenset", _read_frozenset)
add_tag("bytes", _read_bytes)
add_tag("decimal", _read_decimal)
add_tag("uuid", _read_uuid)
add_tag("date", _read_date)
add_tag("timedelta", _read_timedelta)
add_tag("datetime", _read_datetime)
add_tag("time", _read_time)
add_tag("zone", _read_zone)
add_tag("offset", _read_offset)
