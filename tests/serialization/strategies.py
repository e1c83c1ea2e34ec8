"""Every value that can be stored, for hypothesis, and what "the same value" means."""

from __future__ import annotations

import dataclasses
import math
import zoneinfo
from datetime import UTC, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

from tests.serialization.samples import Access, Bits, Child, Colour, Frozen, Level, Point, SlottedChild, Status, Word

# With surrogates (category Cs) and NUL, also side by side, which JSON would merge.
texts = st.text(st.characters(codec=None), max_size=20) | st.text("a\0\ud83d\ude00\udc80😀$", max_size=6)
zones = st.one_of(
    st.none(),
    st.just(UTC),
    st.sampled_from(["Europe/Berlin", "America/New_York", "UTC", "Asia/Kathmandu"]).map(zoneinfo.ZoneInfo),
    st.builds(timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23))),
    st.builds(timezone, st.just(timedelta(hours=2)), texts),
)
datetimes = st.builds(
    lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold), st.datetimes(), zones, st.sampled_from([0, 1])
)
times = st.builds(
    lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold), st.times(), zones, st.integers(0, 1)
)
enums = st.sampled_from(
    [*Colour, *Level, *Word, *Status, Access.READ | Access.ADMIN, Access(0), Access.WRITE, Bits.A | Bits.B, Bits(9)]
)
atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 3).map(lambda n: (-7) ** (1500 * n + 1)),
    st.floats(),
    texts,
    st.binary(max_size=20),
    datetimes,
    times,
    st.dates(),
    st.timedeltas(),
    st.decimals(),
    st.sampled_from([Decimal("sNaN12"), Decimal("-NaN"), Decimal("1.500"), Decimal("-0E+9"), Decimal("Infinity")]),
    st.uuids(),
    enums,
    zones,
)
hashables = st.recursive(
    atoms.filter(lambda value: is_hashable(value)),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3) | st.builds(Frozen, texts, inner)
    ),
    max_leaves=4,
)
values = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(texts, inner, max_size=4),
        st.dictionaries(hashables, inner, max_size=4),
        st.sets(hashables, max_size=4),
        st.frozensets(hashables, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(Child, inner, inner, texts),
        st.builds(SlottedChild, inner, inner, texts),
        st.builds(ValueError, inner, texts),
    ),
    max_leaves=12,
)


def is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # Decimal("sNaN")
        return False
    return True


def same(a: Any, b: Any) -> bool:
    """Same types and values all the way down, where == is too kind (1 == True, 0.0 == -0.0, 1.0 == Decimal("1.00"))."""
    if type(a) is not type(b):
        return False
    if isinstance(a, BaseException):
        return same(a.args, b.args) and same(vars(a), vars(b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, set | frozenset):
        rest = list(b)
        for x in a:
            match = next((i for i, y in enumerate(rest) if same(x, y)), None)
            if match is None:
                return False
            rest.pop(match)
        return not rest
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, Decimal):
        return a.as_tuple() == b.as_tuple()
    if isinstance(a, datetime | time):
        return a.isoformat() == b.isoformat() and a.fold == b.fold and same(a.tzinfo, b.tzinfo)
    if isinstance(a, timezone):
        return repr(a) == repr(b)
    if isinstance(a, zoneinfo.ZoneInfo):
        return a.key == b.key
    return bool(a == b)
