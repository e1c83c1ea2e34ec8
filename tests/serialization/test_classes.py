"""Instances of users' classes: rebuilt exactly, without running their code; or refused."""

import pytest

from django_durable.exceptions import SerializationError
from django_durable.serialization import dumps, loads, register_kind, register_type, types
from tests.serialization import samples
from tests.serialization.samples import (
    Access,
    Box,
    Child,
    Colour,
    Frozen,
    Grown,
    Guarded,
    ListWithFields,
    Money,
    MyDict,
    Needs,
    Outer,
    Pair,
    Point,
    Price,
    SlottedChild,
    Status,
    Undecorated,
    Unset,
)


@pytest.fixture
def registry(monkeypatch):
    """Registrations that end with the test."""
    for name in ("_encoders", "_decoders", "_registered", "_own_tags"):
        monkeypatch.setattr(types, name, getattr(types, name).copy())


def stored(cls, content, kind="dataclass"):
    return f'{{"$":"{kind}","c":"tests.serialization.samples:{cls}","v":{content}}}'


# --- enums


def test_an_enum_member_is_stored_by_name_and_comes_back_as_itself():
    for member in [*Colour, *Status, *Access, Outer.Inner.ONLY]:
        assert loads(dumps(member)) is member
    assert '"PAID"' in dumps(Status.PAID), "its value may change between releases, its name is what code says"


def test_combinations_of_flags_come_back_as_themselves():
    for flags in [Access(0), Access.READ | Access.ADMIN, ~Access.READ, samples.Bits(9), samples.Bits(0)]:
        assert loads(dumps(flags)) is flags


def test_a_member_that_was_removed_is_named(calls):
    with pytest.raises(SerializationError, match=r"samples:Colour has no member 'BLUE' any more"):
        loads(stored("Colour", '"BLUE"', "enum"))
    assert not calls, "_missing_ would have made it another member"


def test_bits_that_no_flag_has_are_refused():
    with pytest.raises(SerializationError):
        loads(stored("Access", "64", "enum"))


# --- dataclasses


@pytest.mark.parametrize(
    "value",
    [
        Point(1, (2,)),
        Frozen("a", ("b",)),
        Child(1, 2, "c"),
        SlottedChild(1, [2], "c"),
        Undecorated(Point(1), {1: 2}),
        Box(3),
    ],
)
def test_dataclasses_come_back_equal(value):
    back = loads(dumps(value))
    assert type(back) is type(value)
    assert back == value


def test_rebuilding_a_dataclass_runs_none_of_its_code(calls):
    value = Guarded(3)
    assert value.double == 12  # a cached property, now in the instance
    calls.clear()
    back = loads(dumps(value))
    assert not calls
    assert vars(back) == vars(value)


def test_a_generic_dataclass_made_through_its_alias_can_be_stored():
    assert loads(dumps(Box[int](5))) == Box(5)


def test_attributes_that_are_no_fields_are_kept_too():
    value = Point(1)
    value.note = ("seen",)
    vars(value)["$"] = 1
    assert vars(loads(dumps(value))) == {"x": 1, "y": 0, "note": ("seen",), "$": 1}


def test_a_dataclass_that_cannot_be_rebuilt_exactly_is_refused():
    @samples.dataclass
    class Local:
        x: int = 1

    with pytest.raises(SerializationError, match=r"value\[0\] is a .*Local.*top of a module"):
        dumps([Local()])
    with pytest.raises(SerializationError, match=r"field 'later' that is not set"):
        dumps(Unset())
    with pytest.raises(SerializationError, match="built-in type as its base"):
        dumps(ListWithFields("note"))


def test_a_field_added_while_runs_are_under_way_gets_its_default():
    assert loads(stored("Grown", '{"name":"a"}')) == Grown("a", "EUR", [])
    assert loads(stored("Grown", '{"name":"a"}')).items is not loads(stored("Grown", '{"name":"a"}')).items


@pytest.mark.parametrize(
    ("cls", "content", "complaint"),
    [
        ("Point", '{"y":1}', "'x' is missing"),
        ("Point", '{"x":1,"y":2,"z":3}', "'z' is no field of it"),
        ("Needs", '{"name":"a"}', "'made' is missing"),
    ],
)
def test_stored_fields_that_do_not_fit_are_named(cls, content, complaint, calls):
    with pytest.raises(SerializationError, match=complaint):
        loads(stored(cls, content))
    assert not calls, "a default factory would give another value at each replay"
    assert loads(dumps(Needs("a", 2))) == Needs("a", 2)


# --- registered classes


def test_a_class_of_ones_own_can_be_stored_once_it_is_registered(registry, calls):
    value = {"price": Money(150, "EUR")}
    with pytest.raises(SerializationError, match=r'value\["price"\] is a .*samples\.Money.*register_type'):
        dumps(value)
    register_type(Money, lambda m: (m.cents, m.currency), lambda v: Money(*v))
    assert loads(dumps(value)) == value
    with pytest.raises(SerializationError, match="Price"):
        dumps(Price(1, "EUR"))  # a subclass is another class


def test_subclasses_of_what_can_be_stored_keep_their_class_when_registered(registry):
    register_type(Pair, tuple, lambda v: Pair(*v))
    register_type(MyDict, dict, MyDict)
    back = loads(dumps([Pair(1, 2), MyDict(a=Pair(3, 4))]))
    assert back == [Pair(1, 2), MyDict(a=Pair(3, 4))]
    assert [type(item) for item in back] == [Pair, MyDict]


def test_registering_again_replaces(registry):
    register_type(Money, lambda m: 1 / 0, lambda v: Money(0, ""))
    register_type(Money, lambda m: [m.cents, m.currency], lambda v: Money(*v))
    assert loads(dumps(Money(1, "EUR"))) == Money(1, "EUR")


def test_a_registration_wins_over_the_built_in_way(registry):
    register_type(Point, lambda p: [p.x], lambda v: Point(v[0], "registered"))
    assert loads(dumps(Point(1, 2))) == Point(1, "registered")


def test_errors_in_registered_functions_say_where_and_what(registry):
    register_type(Money, lambda m: 1 / 0, lambda v: Money(*v))
    with pytest.raises(SerializationError, match=r"value\[0\] could not be encoded.*ZeroDivisionError"):
        dumps([Money(1, "EUR")])
    register_type(Money, lambda m: {"bad": object()}, lambda v: Money(*v))
    with pytest.raises(SerializationError, match=r'\["bad"\] is a object'):
        dumps(Money(1, "EUR"))
    register_type(Money, lambda m: m, lambda v: v)
    with pytest.raises(SerializationError, match="contains itself"):
        dumps(Money(1, "EUR"))
    register_type(Money, lambda m: 1, lambda v: Money(*v))
    with pytest.raises(SerializationError, match=r"decode function raised TypeError"):
        loads(dumps(Money(1, "EUR")))
    register_type(Money, lambda m: 1, lambda v: v)
    with pytest.raises(SerializationError, match=r"returned a builtins:int"):
        loads(dumps(Money(1, "EUR")))


def test_a_stored_class_that_is_not_registered_here_is_named(registry):
    register_type(Money, lambda m: 1, lambda v: Money(1, "EUR"))
    text = dumps(Money(1, "EUR"))
    del types._registered["tests.serialization.samples:Money"]
    with pytest.raises(SerializationError, match=r"samples:Money.*not registered here"):
        loads(text)


@pytest.mark.parametrize("cls", [int, dict, str, type(None), bool, __import__("datetime").datetime])
def test_what_has_a_form_already_cannot_be_registered(cls):
    with pytest.raises(ValueError, match="stored as it is"):
        register_type(cls, str, cls)


def test_registering_nonsense_is_refused_at_once():
    with pytest.raises(TypeError, match="takes a class"):
        register_type("shop.Money", str, str)
    with pytest.raises(TypeError, match="callable"):
        register_type(Money, "encode", Money)


def test_a_kind_of_our_own_has_a_short_tag(registry):
    register_kind("run", Money, lambda m: m.cents, lambda v: Money(v, "EUR"))
    register_kind("run", Money, lambda m: m.cents, lambda v: Money(v, "EUR"))
    assert dumps(Money(5, "EUR")) == '{"$":"run","v":5}'
    assert loads('[{"$":"run","v":5}]') == [Money(5, "EUR")]
    with pytest.raises(ValueError, match="taken"):
        register_kind("tuple", Money, vars, Money)
