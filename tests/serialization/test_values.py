"""What a workflow saw the first time, its replay sees again: the same types, the same values."""

import copy
import json
import os
import subprocess
import sys
import zoneinfo
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from django_durable.exceptions import SerializationError
from django_durable.serialization import dumps, loads
from tests.serialization.samples import Point
from tests.serialization.strategies import same, texts, values


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(values)
def test_every_supported_value_comes_back_as_it_was(value):
    text = dumps(value)
    assert same(loads(text), value)
    assert text.isascii()
    assert "NaN" not in text or "NaN" in repr(value)
    assert dumps(loads(text)) == text, "the second replay would differ from the first"


@given(texts)
def test_any_text_survives_beside_its_neighbours(text):
    assert loads(dumps([text, {text: text}])) == [text, {text: text}]


def test_a_surrogate_pair_stays_two_characters_and_a_real_character_stays_one():
    pair = "\ud83d" + "\ude00"
    assert json.loads(json.dumps(pair)) != pair, "plain JSON would merge them"
    assert loads(dumps(pair)) == pair
    assert loads(dumps({pair: [pair + pair]})) == {pair: [pair + pair]}
    assert loads(dumps("😀")) == "😀"
    assert loads(dumps("\ude00\ud83d")) == "\ude00\ud83d"


def test_ints_of_any_size_survive_pythons_limit_on_digits():
    huge = [10**10_000, -(10**10_000), 2**2048, 2**2048 - 1, -(2**2048)]
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)  # the least that can be set
    try:
        assert loads(dumps(huge)) == huge
    finally:
        sys.set_int_max_str_digits(limit)


def test_dicts_keep_their_order_and_their_keys():
    value = {"b": 1, "a": 2, 1: "int", "1": "str", (1, "x"): [], None: 0, 2.5: 1, frozenset({1}): 2}
    assert list(loads(dumps(value)).items()) == list(value.items())


@pytest.mark.parametrize(
    "lookalike",
    [
        {"$": "tuple", "v": [1]},
        {"$": 1},
        {"a": {"$": "exc", "c": "builtins:SystemExit", "a": []}},
        {"currency": "$"},
        [{"v": '"$"'}],
    ],
)
def test_a_users_dict_that_looks_like_our_format_is_only_a_dict(lookalike):
    assert loads(dumps(lookalike)) == lookalike


def test_a_datetime_keeps_its_zone_and_which_of_two_equal_hours_it_is():
    berlin = zoneinfo.ZoneInfo("Europe/Berlin")
    first, second = (datetime(2024, 10, 27, 2, 30, tzinfo=berlin, fold=fold) for fold in (0, 1))
    assert loads(dumps(first)).utcoffset() == timedelta(hours=2)
    assert loads(dumps(second)).utcoffset() == timedelta(hours=1)
    assert loads(dumps(second)).tzinfo is berlin
    # Arithmetic over the change of clocks needs the zone, not only the offset.
    assert loads(dumps(first)) + timedelta(days=1) == first + timedelta(days=1)


def test_the_ways_to_say_utc_stay_distinct():
    moment = datetime(2024, 1, 1)
    for zone in [UTC, timezone(timedelta(0), "UTC"), zoneinfo.ZoneInfo("UTC")]:
        assert repr(loads(dumps(moment.replace(tzinfo=zone))).tzinfo) == repr(zone)
    assert loads(dumps(moment)).tzinfo is None


def test_equal_sets_have_equal_text_in_every_process():
    program = (
        "from django_durable.serialization import dumps;"
        "print(dumps({'a', 'b', 'c', 1, 2.5, (1, 2), frozenset({'x', 'y'}), None}))"
    )
    root = str(Path(__file__).parents[2])
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "1234"
    }
    assert len(found) == 1


def test_plain_values_are_stored_as_plain_json():
    value = {"order": 7, "ok": True, "lines": [1.5, None, "a\u0000\u00e9"]}
    assert dumps(value) == json.dumps(value, separators=(",", ":"))


def test_what_was_stored_years_ago_is_still_read():
    """The format is data in databases: this text may be added to, and never changed."""
    stored = (
        '{"$":"dict","v":[[{"$":"tuple","v":[1,"a"]},{"$":"set","v":[1,2]}],'
        '["d",{"$":"decimal","v":"1.50"}],["i",{"$":"int","v":"-1%s"}],["f",{"$":"float","v":"-inf"}],'
        '["s",{"$":"str","v":["\\ud83d","\\ude00"]}],["b",{"$":"bytes","v":"AP8="}],'
        '["t",{"$":"datetime","v":"2024-10-27T02:30:00","tz":{"$":"zone","v":"Europe/Berlin"},"fold":1}],'
        '["o",{"$":"time","v":"01:02:00","tz":{"$":"offset","v":7200,"name":"X"}}],'
        '["td",{"$":"timedelta","v":[-1,5,6]}],["day",{"$":"date","v":"2024-02-29"}],'
        '["id",{"$":"uuid","v":"e006bb09-f5e0-46d3-ac01-2906986d5c1e"}],'
        '["e",{"$":"enum","c":"tests.serialization.samples:Status","v":"PAID"}],'
        '["p",{"$":"dataclass","c":"tests.serialization.samples:Point","v":{"x":1,"y":{"$":"frozenset","v":[]}}}],'
        '["x",{"$":"exc","c":"builtins:ValueError","a":["no"],"d":{"code":3}}]]}'
    ) % ("0" * 512)
    assert dumps(loads(stored)) == stored


def test_objects_that_are_shared_come_back_equal():
    shared = [1]
    assert loads(dumps([shared, shared, (shared,)])) == [[1], [1], ([1],)]


@pytest.mark.parametrize(
    "wrap",
    [lambda v: [v], lambda v: {"k": v}, lambda v: (v,), lambda v: Point(v), lambda v: {1: v}],
    ids=["list", "dict", "tuple", "dataclass", "pairs"],
)
def test_nesting_is_kept_up_to_a_clear_limit(wrap):
    value = 0
    for _ in range(100):
        value = wrap(value)
    assert same(loads(dumps(value)), value)
    with pytest.raises(SerializationError, match="nested more than 100 deep"):
        dumps(wrap(value))


def test_storing_changes_nothing_in_the_value():
    value = {"a": [1, (2, {3})], "p": Point([1], {2: 3})}
    before = copy.deepcopy(value)
    dumps(value)
    assert same(value, before)


@given(st.lists(st.floats(allow_nan=True)))
def test_a_set_of_nans_keeps_them_all(numbers):
    value = set(numbers)
    assert len(loads(dumps(value))) == len(value)
