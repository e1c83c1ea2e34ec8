"""What cannot come back as it was is refused when it is stored, with its place and what to do instead."""

import asyncio
import collections
import io
import threading
from itertools import count
from pathlib import Path

import pytest
from django import forms
from django.contrib.auth.models import User
from django.core.files.base import ContentFile
from django.http import HttpRequest, HttpResponse, QueryDict
from django.utils.functional import SimpleLazyObject
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy

from django_durable.exceptions import SerializationError
from django_durable.serialization import dumps
from tests.serialization.samples import MyDict, Pair, Point


async def coroutine():
    """Something that was not awaited."""


async def async_generator():
    yield 1


class Count(int):
    pass


class Unfriendly:
    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (mark_safe("x"), '"".join(value)'),
        (Pair(1, 2), r"tuple(value)"),
        (MyDict(a=1), r"dict(value)"),
        (collections.OrderedDict(a=1), r"dict(value)"),
        (collections.defaultdict(list), r"dict(value)"),
        (collections.Counter("a"), r"dict(value)"),
        (Count(1), r"int(value)"),
        (gettext_lazy("hello"), "lazy translation"),
        (SimpleLazyObject(lambda: 1), "primary key"),
        (User.objects.all(), r"list(queryset)"),
        (User.objects, r"list(manager.all())"),
        (User, "Pass its name"),
        (User(username="new"), "Save it first"),
        (User(pk=5), "Save it first"),
        (QueryDict("a=1"), r"value.dict()"),
        (HttpRequest(), "request.user.pk"),
        (HttpResponse(), "content"),
        (forms.Form(), "cleaned_data"),
        (ContentFile(b"x", name="n"), "storage name"),
        (io.BytesIO(), "storage name"),
        (Path("x"), "str(...)"),
        ((n for n in ()), "list(...)"),
        (iter([]), "list(...)"),
        (range(3), "list(...)"),
        ({}.keys(), "list(...)"),
        (async_generator(), "async for"),
        (lambda: 1, "what it returns"),
        (print, "what it returns"),
        ("".join, "what it returns"),
        (int, "Pass its name"),
        (asyncio, "values that are needed"),
        (bytearray(b"x"), "bytes(...)"),
        (memoryview(b"x"), "bytes(...)"),
        (threading.Lock(), "inside the step"),
        (1j, "register_type"),
        (object(), "register_type"),
        (Unfriendly(), "register_type"),
    ],
    ids=count(),
)
def test_each_is_told_what_to_do(value, advice):
    with pytest.raises(SerializationError) as caught:
        dumps({"items": [0, 1, value]})
    problem = caught.value.problem
    assert problem.startswith('value["items"][2] is a ')
    assert type(value).__name__ in problem
    assert advice in problem


def test_a_coroutine_that_was_not_awaited_is_told_so():
    forgotten = coroutine()
    with pytest.raises(SerializationError, match="Await it"):
        dumps(forgotten)
    forgotten.close()


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (object(), "value is"),
        ([[object()]], "value[0][0] is"),
        ({"a": ({"b": object()},)}, 'value["a"][0]["b"] is'),
        ({(1, "x"): object()}, "value[(1, 'x')] is"),
        ({object(): 1}, "value key <object> is"),
        ({object()}, "value element is"),
        (Point(1, [object()]), "value.y[0] is"),
        (ValueError(1, object()), "value.args[1] is"),
        ({"a" * 500: object()}, "is a object"),
    ],
)
def test_the_place_is_named(value, place):
    with pytest.raises(SerializationError) as caught:
        dumps(value)
    assert place in caught.value.problem


def test_a_value_that_contains_itself_is_refused():
    loop: list = []
    loop.append({"again": (loop,)})
    with pytest.raises(SerializationError, match=r'value\[0\]\["again"\]\[0\] contains itself'):
        dumps(loop)
    point = Point(1)
    point.y = point
    with pytest.raises(SerializationError, match=r"value\.y contains itself"):
        dumps(point)
    wide: list = []
    wide.extend([wide] * 10)
    with pytest.raises(SerializationError, match="contains itself"):
        dumps(wide)


def test_a_very_deep_value_is_refused_and_not_a_recursion_error():
    value: object = ()
    for _ in range(100_000):
        value = [value]
    with pytest.raises(SerializationError, match="nested more than 100 deep"):
        dumps(value)


def test_a_stand_in_that_claims_another_class_is_not_believed():
    class Spoof:
        __class__ = Point  # as mocks do

    with pytest.raises(SerializationError, match="Spoof"):
        dumps(Spoof())
