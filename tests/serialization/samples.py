"""Classes whose instances the tests store. At the top of a module, as stored classes have to be."""

from __future__ import annotations

import enum
import functools
from dataclasses import InitVar, dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from django.db import models

T = TypeVar("T")
calls: list[str] = []


class Colour(enum.Enum):
    RED = 1
    GREEN = "g"
    CRIMSON = 1  # an alias of RED

    @classmethod
    def _missing_(cls, value: object) -> Any:
        calls.append(f"_missing_({value!r})")
        return cls.RED


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(enum.StrEnum):
    YES = "yes"
    NO = "no"


class Access(enum.Flag):
    READ = 1
    WRITE = 2
    ADMIN = 4


class Bits(enum.IntFlag):
    A = 1
    B = 2


class Status(models.TextChoices):
    PAID = "paid", "Paid"
    OPEN = "open", "Open"


class Outer:
    class Inner(enum.Enum):
        ONLY = object()


@dataclass
class Point:
    x: Any
    y: Any = 0


@dataclass(frozen=True, slots=True)
class Frozen:
    name: str
    tags: tuple[str, ...] = ()


@dataclass
class Guarded:
    """Its constructor has effects, and its attributes defend themselves: a replay must run none of that."""

    amount: int
    factor: InitVar[int] = 2
    total: int = field(init=False)

    def __post_init__(self, factor: int) -> None:
        calls.append("__post_init__")
        object.__setattr__(self, "total", self.amount * factor)

    def __setattr__(self, name: str, value: Any) -> None:
        calls.append(f"__setattr__({name})")
        object.__setattr__(self, name, value)

    @functools.cached_property
    def double(self) -> int:
        return self.total * 2


@dataclass
class Child(Point):
    label: str = ""


@dataclass(slots=True)
class SlottedChild(Point):
    label: str = ""


class Undecorated(Point):
    pass


@dataclass
class Box(Generic[T]):
    content: T


@dataclass
class Unset:
    later: int = field(init=False)


@dataclass
class Grown:
    """Once it had only `name`; the other fields were added while runs were under way."""

    name: str
    currency: str = "EUR"
    items: list[int] = field(default_factory=list)


@dataclass
class Needs:
    name: str
    made: int = field(default_factory=lambda: calls.append("default_factory") or 1)


@dataclass
class ListWithFields(list[int]):
    note: str = ""


class Pair(NamedTuple):
    a: int
    b: int


class MyDict(dict[Any, Any]):
    pass


class Money:
    """An ordinary class: it can be stored only when it is registered."""

    def __init__(self, cents: int, currency: str) -> None:
        calls.append("Money.__init__")
        self.cents = cents
        self.currency = currency

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((self.cents, self.currency))


class Price(Money):
    pass


class CardDeclined(Exception):
    def __init__(self, code: str, *, retry_at: Any = None) -> None:
        calls.append("CardDeclined.__init__")
        super().__init__(f"declined: {code}")
        self.code = code
        self.retry_at = retry_at


class TwoArguments(Exception):
    def __init__(self, a: int, b: int) -> None:
        self.a = a
        self.b = b
        super().__init__(a)


class Slotted(Exception):
    __slots__ = ("detail",)


class NamedOSError(OSError):
    def __init__(self, code: int, name: str) -> None:
        super().__init__(code, "it failed", name)
        self.name = name


class MyGroup(ExceptionGroup[Exception]):
    def __new__(cls, message: str, excs: list[Exception], note: str = "") -> MyGroup:
        calls.append("MyGroup.__new__")
        self = super().__new__(cls, message, excs)
        self.note = note
        return self


@dataclass
class DataError(Exception):
    code: int
    reason: str


class BothKinds(KeyError, OSError):
    pass
