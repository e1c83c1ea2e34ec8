"""Stored text becomes readable text, whatever it says, and without building anything."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from django_durable.admin import values
from django_durable.admin.words import duration, short_id, short_name, status_class
from django_durable.serialization import dumps
from tests.admin.workflows import CardDeclined, Receipt


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (1.5, "1.5"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (-(1 << 2048), f"-0x{1 << 2048:x}"),
        ('it\'s "so"\n', r'"it' + r"'" + r's \"so\"\n"'),
        ("grün", '"grün"'),
        ([], "[]"),
        ({}, "{}"),
        ((1,), "(1,)"),
        ((), "()"),
        (((1,),), "((1,),)"),
        ([(1, 2), {3}], "[(1, 2), {3}]"),
        (set(), "set()"),
        (frozenset({1}), "frozenset({1})"),
        ({"a": 1}, '{"a": 1}'),
        ({1: "x", (2, 3): None}, '{1: "x", (2, 3): None}'),
        ({"$": "x"}, '{"$": "x"}'),
        (b"\x00a", r"b'\x00a'"),
        (Decimal("1.50"), 'Decimal("1.50")'),
        (UUID(int=1), 'UUID("00000000-0000-0000-0000-000000000001")'),
        (date(2026, 11, 20), "2026-11-20"),
        (time(3, 4), "03:04:00"),
        (timedelta(days=1, seconds=5), "1 day, 0:00:05"),
        (datetime(2026, 11, 20, 3, 4), "2026-11-20 03:04:00"),
        (datetime(2026, 11, 20, 3, 4, tzinfo=UTC), "2026-11-20 03:04:00 UTC"),
        (datetime(2026, 11, 20, 3, 4, tzinfo=ZoneInfo("Europe/Paris")), "2026-11-20 03:04:00 Europe/Paris"),
        (datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=-3, minutes=-30))), "2026-01-02 00:00:00 -03:30"),
        (Colour.RED, "Colour.RED"),
        (Receipt("p1", Decimal(3)), 'Receipt(reference="p1", amount=Decimal("3"))'),
        (CardDeclined("no", 7), 'CardDeclined("no", 7)'),
        ("\ud800", r'"\ud800"'),
        ("\ud83d\ude00", r'"\ud83d\ude00"'),
    ],
)
def test_every_kind_of_value_is_readable(value, text):
    shown = values.readable(dumps(value))
    assert shown == text
    shown.encode()


def test_what_does_not_fit_in_a_line_is_indented():
    shown = values.readable(dumps({"names": ["x" * 40, "y" * 40, "z" * 40], "one": 1}))
    assert shown.splitlines() == [
        "{",
        '  "names": [',
        f'    "{"x" * 40}",',
        f'    "{"y" * 40}",',
        f'    "{"z" * 40}",',
        "  ],",
        '  "one": 1,',
        "}",
    ]


@pytest.mark.parametrize(
    "stored",
    [
        "",
        "encrypted:gAAAAB",
        "[" * 20_000,
        "[" * 9_000 + "]" * 9_000,
        "9" * 10_000,
    ],
)
def test_text_that_is_no_value_of_ours_is_shown_as_it_is(stored):
    assert values.value(stored, len(stored)).text == stored


@pytest.mark.parametrize(
    "stored",
    [
        {"$": "new_kind", "v": 1},
        {"$": "new_kind", "a": 1, "b": [2]},
        {"$": ["list"]},
        {"$": None},
        {"$": "tuple"},
        {"$": "tuple", "v": 7},
        {"$": "bytes", "v": "not base64!"},
        {"$": "timedelta", "v": [1e400, 0, 0]},
        {"$": "offset", "v": "x"},
        {"$": "model", "v": {}},
        {"$": "exc", "c": 7, "a": 7},
        {"$": "dict", "v": [1]},
        {"$": "dataclass", "c": "m:C", "v": []},
    ],
)
def test_a_changed_tag_is_shown_and_breaks_no_page(stored):
    text = json.dumps([stored])
    shown = values.value(text, len(text)).text
    assert shown == text or str(stored["$"]) in shown


def test_one_tuple_in_another_costs_no_more_for_each():
    """Rendering the inside once for the look and once for the text would double with each level: 2**90."""
    stored = '{"$":"tuple","v":[' * 90 + "1" + "]}" * 90
    assert "1" in values.value(stored, len(stored)).text


def test_one_changed_tag_in_another_costs_no_more_for_each():
    stored = '{"$":"exc","c":"m:E","d":7,"a":[' * 90 + "1" + "]}" * 90
    assert values.value(stored, len(stored)).text == stored


def test_a_models_long_key_is_shown_to_its_end():
    stored = json.dumps({"$": "model", "m": "a.M", "v": {"$": "tuple", "v": ["x" * 60, "y" * 60]}, "db": "default"})
    assert values.readable(stored).splitlines() == ["<a.M (", f'  "{"x" * 60}",', f'  "{"y" * 60}",', ")>"]


def test_text_that_would_grow_without_measure_stays_as_it_is():
    stored = "[" * 280 + ",".join(["1"] * 9000) + "]" * 280
    assert values.value(stored, len(stored)).text == stored


@pytest.mark.parametrize(
    ("error", "name", "line"),
    [
        ("shop.errors.Declined: no money\nTraceback", "Declined", "Declined: no money"),
        ("ValueError\nTraceback", "ValueError", "ValueError"),
        ("app.f.<locals>.Odd: x: y\n", "Odd", "Odd: x: y"),
        ("a secret, and no type", "an error", "a secret, and no type"),
        ("", "", ""),
    ],
)
def test_an_errors_type_is_told_from_what_it_says(error, name, line):
    assert values.error_type(error) == name
    assert values.headline(error) == line


@pytest.mark.parametrize(
    ("seconds", "words", "rough"),
    [
        (-1, "0 ms", "0 ms"),
        (0.12, "120 ms", "120 ms"),
        (0.9999, "1.0 s", "1.0 s"),
        (2.345, "2.3 s", "2.3 s"),
        (9.96, "10 s", "10 s"),
        (59.6, "1 min 0 s", "1 min"),
        (723, "12 min 3 s", "12 min"),
        (3600 * 3 + 1200, "3 h 20 min", "3 h"),
        (86400 * 5 + 3600 * 3, "5 d 3 h", "5 d"),
    ],
)
def test_durations_in_words(seconds, words, rough):
    assert duration(seconds) == words
    assert duration(seconds, roughly=True) == rough


def test_names_are_shortened_where_they_can_be():
    assert short_name("store.workflows.checkout") == ("checkout", "store.workflows")
    assert short_name("checkout") == ("checkout", "")
    assert short_name("odd.") == ("odd.", "")
    assert short_id("order-1001") == "order-1001"
    assert short_id("01a1face-4297-7000-8000-1234567890ab") == "01a1face…7890ab"


def test_a_status_that_is_none_makes_no_class_of_its_own():
    assert status_class("FAILED") == "durable-failed"
    assert status_class('x" onclick="') == "durable-unknown"
