"""A step's exception reaches the workflow, and every replay of it, as the same exception."""

import errno
import json
import urllib.error
from datetime import UTC, datetime
from functools import partial
from itertools import count

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.db import IntegrityError
from django.utils.translation import gettext_lazy
from hypothesis import given, settings
from hypothesis import strategies as st

from django_durable.exceptions import PayloadTooLarge, RunCancelled, SerializationError, StepFailed
from django_durable.serialization import (
    clean_text,
    describe_exception,
    dump_exception,
    dumps,
    load_exception,
    loads,
    register_type,
    types,
)
from tests.serialization.samples import BothKinds, CardDeclined, DataError, Money, NamedOSError, Slotted, TwoArguments
from tests.serialization.strategies import same, values


def again(exc, **kwargs):
    return load_exception(dump_exception(exc), **kwargs)


def with_attributes(exc, **attributes):
    for name, value in attributes.items():
        setattr(exc, name, value)
    return exc


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("x"),
        ValueError(),
        ValueError("a", 2, (3,)),
        ValueError("\0\udc80", "\ud83d\ude00"),
        KeyError("k"),
        FileNotFoundError(2, "not there", "f.txt"),
        OSError(2, "cannot rename", "a", None, "b"),
        OSError("only text"),
        BlockingIOError(errno.EAGAIN, "later", 5),
        UnicodeDecodeError("utf8", b"abc", 0, 1, "bad"),
        UnicodeEncodeError("ascii", "\ud83d\ude00", 0, 1, "bad"),
        StopIteration(5),
        SystemExit(3),
        KeyboardInterrupt(),
        MemoryError("m"),
        ImportError("m", name="n", path="p"),
        NameError("x", name="n"),
        SyntaxError("m", ("f", 1, 2, "text")),
        CardDeclined("stolen", retry_at=datetime(2024, 1, 1, tzinfo=UTC)),
        TwoArguments(1, 2),
        NamedOSError(2, "n"),
        DataError(1, "r"),
        BothKinds(2, "m", "f"),
        with_attributes(Slotted("s"), detail=(1, {2})),
        with_attributes(IndexError("i"), extra={"a": (1,)}),
        with_attributes(UnicodeDecodeError("utf8", b"abc", 0, 1, "bad"), start=1, end=2, reason="worse"),
        User.DoesNotExist("no such user"),
        User.MultipleObjectsReturned(),
        IntegrityError("duplicate key"),
        urllib.error.URLError("refused"),
        RunCancelled("r1", "timeout"),
        PayloadTooLarge.of(5, 4),
        StepFailed("shop.Odd", "text", "charge"),
    ],
    ids=count(),
)
def test_exceptions_come_back_the_same(exc):
    back = again(exc)
    assert type(back) is type(exc)
    assert back.args == exc.args
    assert vars(back) == vars(exc)
    assert str(back) == str(exc)
    for name in (
        "errno",
        "strerror",
        "filename",
        "filename2",
        "value",
        "code",
        "name",
        "path",
        "start",
        "lineno",
        "detail",
    ):
        assert getattr(back, name, None) == getattr(exc, name, None)
    assert dump_exception(back) == dump_exception(exc), "the second replay would differ from the first"


@settings(deadline=None, max_examples=100)
@given(st.lists(values, max_size=3), values)
def test_any_storable_args_and_attributes_come_back(args, attribute):
    exc = with_attributes(RuntimeError(*args), attribute=attribute)
    back = again(exc)
    assert same(back.args, exc.args)
    assert same(back.attribute, attribute)


def test_rebuilding_runs_no_constructor_of_the_users(calls):
    text = dump_exception(CardDeclined("stolen"))
    calls.clear()
    assert load_exception(text).code == "stolen"
    assert not calls


def test_notes_and_the_chain_of_causes_are_kept():
    exc, cause = ValueError("outer"), CardDeclined("inner")
    exc.__cause__, cause.__cause__ = cause, KeyError("root")
    exc.add_note("while charging")
    back = again(exc)
    assert back.__notes__ == ["while charging"]
    assert type(back.__cause__) is CardDeclined
    assert back.__cause__.code == "inner"
    assert repr(back.__cause__.__cause__) == "KeyError('root')"


def test_a_cause_that_cannot_be_stored_is_left_out():
    exc = ValueError("outer")
    exc.__cause__ = with_attributes(KeyError("inner"), response=object())
    back = again(exc)
    assert repr(back) == "ValueError('outer')"
    assert back.__cause__ is None


def test_endless_and_circular_causes_end():
    first = ValueError(0)
    first.__cause__ = second = KeyError(1)
    second.__cause__ = first
    assert type(again(first).__cause__) is KeyError
    exc = tail = ValueError(0)
    for i in range(5000):
        tail.__cause__ = tail = ValueError(i)
    back, length = again(exc), 0
    while back := back.__cause__:
        length += 1
    assert length == 8
    assert len(describe_exception(exc)) <= 32 * 1024


def test_exception_groups_come_back_with_their_members():
    group = ExceptionGroup("two", [ValueError(1), ExceptionGroup("one", [CardDeclined("c")])])
    back = again(group)
    assert type(back) is ExceptionGroup
    assert repr(back) == repr(group)
    assert back.exceptions[1].exceptions[0].code == "c"
    assert back.split(ValueError)[0].exceptions[0].args == (1,)


def test_deep_groups_are_proved_in_reasonable_time():
    group = ValueError(1)
    for i in range(20):
        group = ExceptionGroup(str(i), [group])
    assert repr(again(group)) == repr(group)


@pytest.mark.parametrize(
    "error",
    [
        ValidationError("wrong"),
        ValidationError(gettext_lazy("This field is required."), code="required"),
        ValidationError("at least %(n)s", code="min", params={"n": 3}),
        ValidationError(["a", ValidationError("b", code="c")]),
        ValidationError({"name": ["a", gettext_lazy("b")], "age": ValidationError("c", code="d")}),
    ],
    ids=["one", "lazy", "params", "list", "dict"],
)
def test_django_validation_errors_come_back_equal(error):
    back = again(error)
    assert type(back) is ValidationError
    assert back == error
    assert back.messages == error.messages
    assert hasattr(back, "error_dict") == hasattr(error, "error_dict")
    assert (
        [e.code for e in back.error_list] == [e.code for e in error.error_list]
        if hasattr(error, "error_list")
        else True
    )
    if hasattr(error, "error_dict"):
        assert back.message_dict == error.message_dict


def test_an_attribute_error_does_not_carry_its_object():
    try:
        object().missing  # noqa: B018
    except AttributeError as error:
        back = again(error)
    assert type(back) is AttributeError
    assert back.name == "missing"


def test_an_exception_can_be_a_value_among_others():
    value = {"errors": [CardDeclined("a"), (KeyError("b"),)]}
    back = loads(dumps(value))
    assert same(back, value)
    with pytest.raises(SerializationError, match=r'value\["e"\]\.args\[0\] is a object'):
        dumps({"e": ValueError(object())})


# --- what cannot be rebuilt


class Changing(Exception):
    """Its args are not those that it was made with."""

    def __init__(self, text):
        super().__init__(text)
        self.args = (text, iter([]))


class Shadowing(Exception):
    args = property(lambda self: ("not the real ones",))
    __cause__ = property(lambda self: 1 / 0)


class Odd(Exception):
    def __str__(self):
        raise SystemExit("str")

    __repr__ = __str__


class OddMeta(type):
    @property
    def __module__(cls):
        raise RuntimeError("name")


class Nameless(Exception, metaclass=OddMeta):
    pass


class OddDict(Exception):
    @property
    def __dict__(self):
        raise RuntimeError("dict")

    @property
    def args(self):
        raise RuntimeError("args")


class OddText(str):
    def encode(self, *args):
        raise RuntimeError("encode")


class Subclassed(Exception):
    def __str__(self):
        return OddText("text")


def odd_exceptions():
    class Local(Exception):
        pass

    circular = ValueError("circular")
    circular.me = circular
    looped: list = []
    looped.append(looped)
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    wrong_os = with_attributes(OSError("x"), args=(2, "becomes another class"))
    found = [
        Local("local"),
        ValueError(object()),
        with_attributes(ValueError("x"), response=object()),
        Changing("x"),
        Odd(),
        Nameless("x"),
        OddDict("x"),
        Subclassed(),
        circular,
        with_attributes(ValueError("x"), args=(circular,)),
        ValueError(looped),
        ValueError(deep),
        wrong_os,
        ValueError(Odd()),
        ValueError("\0\udc80" * 100_000),
        ValueError("x" * 1_000_000),
        ValueError("😀" * 1_000_000),
        with_attributes(ValueError("x"), blob=b"x" * 1_000_000),
        urllib.error.HTTPError("http://x", 404, "not found", {}, None),
        ValidationError("x", params={"model": User}),
        User.DoesNotExist(User(username="unsaved")),
        BaseExceptionGroup("g", [KeyboardInterrupt(), ValueError(object())]),
    ]
    return {f"{i}-{type(exc).__name__}": exc for i, exc in enumerate(found)}


@pytest.mark.parametrize("name", odd_exceptions())
def test_what_cannot_be_rebuilt_is_recorded_all_the_same(name):
    exc = odd_exceptions()[name]  # not the parameter: pytest would show it, and fall over it
    text = dump_exception(exc)
    assert len(text) <= 256 * 1024
    assert text.isascii()
    back = load_exception(text, otherwise=partial(StepFailed, step="charge"))
    if type(back) is StepFailed:
        assert "step 'charge' failed with " in str(back)
        assert "\0" not in str(back).encode().decode()
    else:
        assert type(back) is type(exc)
        assert dump_exception(back) == text
    description = describe_exception(exc)
    assert len(description) <= 32 * 1024
    description.encode()
    assert "\0" not in description


def test_an_exception_that_shadows_its_parts_is_stored_as_what_it_is():
    back = again(Shadowing("real"))
    assert type(back) is Shadowing
    assert BaseException.args.__get__(back) == ("real",)


def test_what_would_come_back_different_is_found_out_when_it_is_recorded(monkeypatch):
    members = [ValueError(1)]
    group = ExceptionGroup("two by now", members)
    group.args = ("two by now", [*members, KeyError(2)])
    assert type(again(group)) is StepFailed
    for name in ("_encoders", "_registered"):
        monkeypatch.setattr(types, name, getattr(types, name).copy())
    register_type(Money, lambda money: money.cents, lambda cents: Money(cents))  # a currency is missing
    text = dump_exception(ValueError(Money(1, "EUR")))
    assert "error" not in json.loads(text)
    assert "decode function raised TypeError" in json.loads(text)["why"]


def test_the_stand_in_says_what_it_stands_for():
    class Local(Exception):
        pass

    back = again(Local("no money\0"), otherwise=partial(StepFailed, step="charge"))
    assert type(back) is StepFailed
    assert back.type_name.endswith("Local")
    assert back.text == "no money\\x00"
    assert "top of a module" in json.loads(dump_exception(Local("x")))["why"]


def test_a_large_exception_keeps_its_start_and_its_end():
    back = again(ValueError(f"start{'x' * 1_000_000}end"))
    assert type(back) is StepFailed
    assert back.text.startswith("start")
    assert back.text.endswith("end")
    assert type(load_exception(dump_exception(ValueError("x" * 9000), limit=8192))) is StepFailed


def test_a_class_that_is_gone_by_now_becomes_the_stand_in():
    text = dump_exception(CardDeclined("stolen")).replace("samples:CardDeclined", "samples:Renamed")
    back = load_exception(text, otherwise=partial(StepFailed, step="charge"))
    assert type(back) is StepFailed
    assert back.type_name == "tests.serialization.samples.CardDeclined"
    assert back.text == "declined: stolen"


def test_a_registered_exception_uses_its_own_functions(monkeypatch):
    for name in ("_encoders", "_registered"):
        monkeypatch.setattr(types, name, getattr(types, name).copy())
    register_type(Changing, lambda e: e.args[0], Changing)
    back = again(Changing("x"))
    assert type(back) is Changing
    assert back.args[0] == "x"


@pytest.mark.django_db
def test_a_failure_that_holds_a_row_asks_the_database_nothing_when_it_is_recorded(django_assert_num_queries):
    user = User.objects.create(username="ann")
    exc = with_attributes(CardDeclined("x"), user=user)
    with django_assert_num_queries(0):  # the transaction that it comes from may be broken
        text = dump_exception(exc)
    assert load_exception(text).user == user
    User.objects.all().delete()
    assert type(load_exception(text)) is StepFailed


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"type":1,"text":"x"}', '{"$":"tuple","v":[]}', "nonsense", "["]
)
def test_text_that_is_no_stored_exception_is_refused(text):
    with pytest.raises(SerializationError):
        load_exception(text)


# --- for people


def test_a_description_starts_with_one_line_and_shows_the_causes():
    try:
        try:
            {}["k"]
        except KeyError as error:
            raise CardDeclined("two\nlines") from error
    except CardDeclined as error:
        text = describe_exception(error)
    first, rest = text.split("\n", 1)
    assert first == "tests.serialization.samples.CardDeclined: declined: two lines"
    assert rest.startswith("Traceback (most recent call last):")
    assert "KeyError: 'k'" in rest
    assert "direct cause" in rest
    assert __file__ in rest


def test_a_long_description_keeps_its_start_and_its_end():
    text = describe_exception(ValueError("x" * 100_000 + "the end"))
    assert len(text) <= 32 * 1024
    assert text.startswith("ValueError: xxx")
    assert text.rstrip().endswith("the end")
    assert describe_exception(ValueError()).startswith("ValueError\n")


@given(st.text(st.characters(codec=None)))
def test_clean_text_can_be_stored_and_changes_only_what_cannot(text):
    clean = clean_text(text)
    assert "\0" not in clean
    clean.encode("utf-8")
    if "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text):
        assert clean == text


def test_clean_text_shows_what_was_there():
    assert clean_text("a\0b\udc80c\ud83d\ude00d😀") == "a\\x00b\\udc80c\\ud83d\\ude00d😀"
