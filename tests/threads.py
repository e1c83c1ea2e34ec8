"""Several threads at once, each with connections of its own, and what they came to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from django.db import connections


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Call each function in a thread of its own, all from the same moment; return what they returned or raised."""
    gate = threading.Barrier(len(functions))
    outcomes: list[Any] = [None] * len(functions)

    def work(place: int, function: Callable[[], Any]) -> None:
        try:
            gate.wait(timeout=10)
            outcomes[place] = function()
        except BaseException as error:
            outcomes[place] = error
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work, args=item, daemon=True) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads), "a thread has not ended"
    return outcomes


def elsewhere(function: Callable[[], Any]) -> Any:
    """Call the function on connections of its own, as another process would, and return what it returned."""
    (outcome,) = together(function)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
