r"""Values as JSON text, and back: the same types, the same values.

The format (it lives in databases for years, so it only ever grows):

- None, bool, float, str, list and a dict with str keys are plain JSON; so is an int below 2**2048.
- Every other value is a tag object, ``{"$": "<kind>", ...}``, most with their content in ``"v"``:
  ``{"$": "tuple", "v": [1, 2]}``, ``{"$": "decimal", "v": "1.50"}``,
  ``{"$": "enum", "c": "shop.models:Colour", "v": "RED"}``.
- A JSON object with the key ``"$"`` is always a tag object. A dict with that key, or with a key that is not a plain
  str, is ``{"$": "dict", "v": [[key, value], ...]}``.
- A class is named ``module:qualified.name`` in ``"c"``. A kind's members are listed beside its code, in `values`,
  `objects` and `failures`.
- A str in which a high surrogate stands right before a low one is ``{"$": "str", "v": [pieces]}``, because JSON would
  merge the two; NaN and infinities are ``{"$": "float", "v": "nan"}``; larger ints are hexadecimal.
- The text is ASCII without spaces. Equal values of equal order have equal text; the elements of sets are sorted by
  their own text. Objects that are shared are stored once for each place where they stand.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, NoReturn

from django.utils.functional import Promise

from django_durable.exceptions import SerializationError
from django_durable.serialization import types
from django_durable.serialization.advice import advice_for
from django_durable.serialization.types import TAG, Stored, brief, short

__all__ = ["MAX_DEPTH", "dumps", "loads"]

MAX_DEPTH = 100
"""How deep values may be nested: each level takes up to three of JSON, and reading them back recurses."""

LARGE_INT = 1 << 2048
"""From here on ints are stored as hexadecimal: Python refuses decimal ints of more digits than a limit (least 640)."""

_INFINITY = float("inf")


def dumps(value: Any) -> str:
    """Return `value` as ASCII JSON text from which `loads` makes an equal value of the same types.

    Raises SerializationError, which names the place within the value, if any part of it cannot come back as it was.
    """
    try:
        return to_json(value if _is_plain(value, 0) else Encoder().encode(value))
    except (TypeError, ValueError, RuntimeError) as error:  # RecursionError is a RuntimeError
        raise SerializationError(
            f"the value could not be written: {brief(error)}. Is it changed while it is stored, or its nesting "
            "too deep for the stack that is left? Pass a copy, or a flatter value."
        ) from error


def loads(text: str) -> Any:
    """Return the value that `dumps` stored as `text`.

    Raises SerializationError for any text that `dumps` would not write, or whose classes or rows are gone. Whatever the
    text says, only classes of the kinds that can be stored are built, and none of their `__init__` is called.
    """
    # A text without a quoted tag holds no tag object, and is read without a call for each object.
    return _read(text, _tagged if isinstance(text, str) and _QUOTED_TAG in text else _plain)


def from_json(text: str) -> Any:
    """Return the bare JSON tree of `text`: tag objects stay what they are."""
    return _read(text, _plain)


def _read(text: str, decoder: json.JSONDecoder) -> Any:
    if not isinstance(text, str):
        raise SerializationError(f"stored text is a {type(text).__name__}, not a str. The column was changed.")
    try:
        return decoder.decode(text)
    except RecursionError as error:
        raise SerializationError("stored text is nested too deeply to be read. No value is stored so deep.") from error
    except ValueError as error:
        raise SerializationError(
            f"stored text is not what was written: {brief(error)}. It starts with {short(text[:80])}."
        ) from error


class Encoder:
    """Makes JSON-able trees of values, and knows where in the value it is."""

    def __init__(self, root: str = "value", *, proving: bool = False) -> None:
        self.proving = proving  # a proof is one level deep: else each level would double the work
        self.exceptions = 0  # how many exceptions enclose the value
        self.causes = 0  # how many of them are reached through __cause__
        self._path = [root]
        self._enclosing: set[int] = set()

    def encode(self, value: Any) -> Any:
        """Return a tree of plain JSON types for `value`."""
        cls = type(value)
        if value is None or cls is bool:
            return value
        encode = types.encoder_for(cls)
        if encode is None:
            # Django's form errors speak lazily. In an exception the language may be chosen now; a value is not changed.
            if self.exceptions and Promise in cls.__mro__:
                return self.encode(str(value))
            self.refuse(advice_for(value))
        if cls in _ATOMS:
            return encode(value, self)
        identity = id(value)
        if identity in self._enclosing:
            self.refuse("contains itself; JSON has no references. Store the parts and what links them by id.")
        if len(self._enclosing) >= MAX_DEPTH:
            self.refuse(
                f"is nested more than {MAX_DEPTH} deep. Flatten it, or store it elsewhere and pass a reference."
            )
        self._enclosing.add(identity)
        try:
            return encode(value, self)
        finally:
            self._enclosing.remove(identity)

    def walk(self, value: Any, where: str) -> Any:
        """`encode` a part of the value being encoded, which stands at `where` in it (``[2]``, ``.name``)."""
        self._path.append(where)
        try:
            return self.encode(value)
        finally:
            self._path.pop()

    def refuse(self, problem: str, cause: BaseException | None = None) -> NoReturn:
        """Raise the SerializationError that says where the value is and what is wrong with it."""
        raise SerializationError(f"{''.join(self._path)} {problem}") from cause

    def proves(self, stored: Stored) -> bool:
        """Whether `stored`, once read, would be stored the same again. Reads no database."""
        text = to_json(stored)
        return to_json(Encoder(proving=True).encode(_read(text, _proving))) == text


def is_mergeable(text: str) -> bool:
    """Whether JSON would merge two of the str's surrogates into one character."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return any("\ud800" <= a <= "\udbff" and "\udc00" <= b <= "\udfff" for a, b in pairwise(text))
    return False


def _is_plain(value: Any, depth: int) -> bool:
    """Whether JSON itself keeps `value` exactly, so that nothing has to be tagged."""
    cls: type = type(value)
    if cls is str:
        return value.isascii() or not is_mergeable(value)
    if value is None or cls is bool:
        return True
    if cls is int:
        return bool(-LARGE_INT < value < LARGE_INT)
    if cls is float:
        return bool(-_INFINITY < value < _INFINITY)
    if depth >= MAX_DEPTH:
        return False
    if cls is dict:
        if TAG in value:
            return False
        for key, item in value.items():
            if type(key) is not str or not (key.isascii() or not is_mergeable(key)):
                return False
            # The most frequent leaf, without a call.
            if not (type(item) is str and item.isascii()) and not _is_plain(item, depth + 1):
                return False
        return True
    if cls is list:
        for item in value:  # noqa: SIM110  (all() would make a generator for each list)
            if not _is_plain(item, depth + 1):
                return False
        return True
    return False


def _revive(stored: Stored) -> Any:
    """Return what a JSON object stands for: itself, unless it is a tag object."""
    if TAG not in stored:
        return stored
    tag = stored[TAG]
    decode = types.decoder_for(tag) if type(tag) is str else None
    if decode is None:
        raise SerializationError(
            f"a stored value is of the kind {short(tag)}, which is not known here. "
            "A newer version of the code wrote it: run that version here too."
        )
    try:
        return decode(stored)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        types.unreadable(f"a stored {tag}", error)


class _Reference:
    """Stands for a model instance while an exception is proved: the proof must not query, nor need the row."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored


def _revive_without_rows(stored: Stored) -> Any:
    return _Reference(stored) if stored.get(TAG) == "model" else _revive(stored)


def _store_reference(reference: _Reference, _: Encoder) -> Stored:
    return reference.stored


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


types.add_class(_Reference, _store_reference)

_ATOMS = frozenset({str, int, float})
_QUOTED_TAG = f'"{TAG}"'
_plain = json.JSONDecoder(parse_constant=_refuse_constant)
_tagged = json.JSONDecoder(object_hook=_revive, parse_constant=_refuse_constant)
_proving = json.JSONDecoder(object_hook=_revive_without_rows, parse_constant=_refuse_constant)

# check_circular: both ways into the writer have already refused cycles.
to_json = json.JSONEncoder(allow_nan=False, check_circular=False, separators=(",", ":")).encode
