"""When to try again: one policy for steps and workflows."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from django_durable.conf import as_seconds
from django_durable.exceptions import GiveUp, RetryAfter, SerializationError

Errors = tuple[type[BaseException], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    max_attempts: int
    delay: float
    backoff: float
    max_delay: float
    retry_on: Errors
    give_up_on: Errors = ()

    def wait(self, error: BaseException, attempts: int) -> float | None:
        """Return the seconds to wait after the failed attempt number `attempts` (from 1), or None to stop trying.

        ``min(max_delay, delay * backoff ** (attempts - 1))``, before `jittered`.
        """
        if attempts >= self.max_attempts:
            return None
        if isinstance(error, RetryAfter):
            return error.seconds
        # What cannot be stored today cannot be stored on the next try, after one more effect.
        if isinstance(error, (GiveUp, SerializationError, *self.give_up_on)):
            return None
        if not isinstance(error, self.retry_on):
            return None
        try:
            return min(self.max_delay, self.delay * self.backoff ** (attempts - 1))
        except OverflowError:
            return self.max_delay

    @staticmethod
    def final(error: BaseException) -> BaseException:
        """What the workflow sees: the cause behind a GiveUp or RetryAfter, if they have one."""
        if isinstance(error, GiveUp | RetryAfter) and error.__cause__ is not None:
            return error.__cause__
        return error


def jittered(seconds: float) -> float:
    """The delay, give or take 10 %, so that what failed together does not come back together."""
    return seconds * random.uniform(0.9, 1.1)  # noqa: S311 (not a secret)


def policy(
    *,
    max_attempts: Any,
    retry_delay: Any,
    retry_backoff: Any,
    retry_max_delay: Any,
    retry_on: Any,
    give_up_on: Any = (),
) -> RetryPolicy:
    """Check a decorator's retry arguments; raise TypeError or ValueError that names the wrong one."""
    if isinstance(max_attempts, bool) or not isinstance(max_attempts, int) or max_attempts < 1:
        raise ValueError(f"max_attempts takes a whole number from 1, found {max_attempts!r}.")
    if isinstance(retry_backoff, bool) or not isinstance(retry_backoff, int | float) or not retry_backoff >= 0:
        raise ValueError(f"retry_backoff takes a factor of 0 or more, found {retry_backoff!r}.")
    return RetryPolicy(
        max_attempts=max_attempts,
        delay=as_seconds(retry_delay, "retry_delay"),
        backoff=float(retry_backoff),
        max_delay=as_seconds(retry_max_delay, "retry_max_delay"),
        retry_on=_errors(retry_on, "retry_on"),
        give_up_on=_errors(give_up_on, "give_up_on"),
    )


def _errors(given: Any, name: str) -> Errors:
    if not isinstance(given, type | tuple | list | set | frozenset):
        raise TypeError(f"{name} takes exception classes, found {given!r}.")
    found = (given,) if isinstance(given, type) else tuple(given)
    for item in found:
        if not (isinstance(item, type) and issubclass(item, BaseException)):
            raise TypeError(f"{name} takes exception classes, found {item!r}.")
    return found
