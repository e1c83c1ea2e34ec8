"""pydantic models, which are stored if pydantic is there and is never imported for it."""

import subprocess
import sys
from datetime import date
from decimal import Decimal
from typing import Any, Generic, TypeVar

import pytest

pydantic = pytest.importorskip("pydantic")

from django_durable.exceptions import SerializationError  # noqa: E402
from django_durable.serialization import dumps, loads  # noqa: E402

T = TypeVar("T")
ran: list[str] = []


class Line(pydantic.BaseModel):
    sku: str
    price: Decimal


class Order(pydantic.BaseModel):
    id: int = pydantic.Field(alias="orderId")
    lines: list[Line] = []
    due: date | None = None
    tags: set[str] = pydantic.Field(default_factory=set)
    _secret: int = pydantic.PrivateAttr(default=1)

    @pydantic.field_validator("id")
    @classmethod
    def positive(cls, value: int) -> int:
        ran.append("validator")
        if value < 0:
            raise ValueError("negative")
        return value

    def model_post_init(self, context: Any) -> None:
        ran.append("post_init")


class Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)
    a: tuple[int, ...]


class Loose(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    a: int


class Numbers(pydantic.RootModel[list[int]]):
    pass


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]


def stored(cls, content):
    return f'{{"$":"pydantic","c":"{__name__}:{cls}","v":{content},"set":[]}}'


@pytest.mark.parametrize(
    "value",
    [
        Order(orderId=1, lines=[Line(sku="a", price="1.50")], due=date(2024, 2, 29), tags={"x"}),
        Frozen(a=(1, 2)),
        Loose(**{"a": 1, "b": (2,), "$": {"$": 1}}),
        Numbers([1, 2]),
        Page[int](items=[1]),
        Page(items=["x"]),
    ],
    ids=["nested", "frozen", "extra", "root", "generic", "unbound generic"],
)
def test_models_come_back_equal(value):
    back = loads(dumps(value))
    assert type(back) is type(value)
    assert back == value
    assert back.model_fields_set == value.model_fields_set
    assert back.model_dump() == value.model_dump()
    assert dumps(back) == dumps(value)


def test_private_attributes_and_values_past_the_validators_are_kept():
    order = Order(orderId=1)
    order._secret = (7,)
    order.id = -5  # assignment is not validated
    ran.clear()
    back = loads(dumps(order))
    assert (back.id, back._secret) == (-5, (7,))
    assert back.model_fields_set == order.model_fields_set == {"id"}
    assert not ran, "validators are not run again: they may change the value, or refuse it by now"


def test_a_model_is_usable_after_it_came_back():
    back = loads(dumps(Order(orderId=1)))
    back.due = date(2024, 1, 1)
    assert Order.model_validate(back.model_dump(by_alias=True)) == back
    assert hash(loads(dumps(Frozen(a=(1,))))) == hash(Frozen(a=(1,)))


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(SerializationError, match="'id' is missing"):
        loads(stored("Order", "{}"))
    with pytest.raises(SerializationError, match="'colour' is no field"):
        loads(stored("Frozen", '{"a":1,"colour":2}'))
    grown = loads(stored("Order", '{"id":1}'))
    assert (grown.lines, grown.due, grown.tags) == ([], None, set())
    assert grown.lines is not loads(stored("Order", '{"id":1}')).lines


def test_an_incomplete_or_local_model_is_refused():
    with pytest.raises(SerializationError, match="field 'price' that is not set"):
        dumps(Line.model_construct(sku="x"))

    class Local(pydantic.BaseModel):
        a: int

    with pytest.raises(SerializationError, match="top of a module"):
        dumps(Local(a=1))


def test_a_value_inside_that_cannot_be_stored_is_placed():
    with pytest.raises(SerializationError, match=r'value\["order"\]\.items\[1\] is a object'):
        dumps({"order": Page(items=[1, object()])})


def test_pydantic_is_not_imported_by_us():
    program = (
        "import sys; from django_durable.serialization import dumps, loads;"
        "loads(dumps([(1,), {2}, ValueError('x')])); assert not [m for m in sys.modules if m.startswith('pydantic')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
