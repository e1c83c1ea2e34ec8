"""When the service fails: 3 requests in every 10, by a seeded sequence, so that a bad day can be repeated."""

from __future__ import annotations

import random
import threading
from enum import Enum


class Fault(Enum):
    # The request is served.
    NONE = "none"
    # 503, and nothing was done.
    BEFORE = "before"
    # 503, and yet the card was charged: the answer was lost, not the charge. Who retries with a new key pays twice.
    AFTER = "after"


class Faults:
    """Draws the fault of each request, in the order in which the requests come."""

    def __init__(self, seed: int, in_ten: int = 3) -> None:
        self._random = random.Random(seed)
        self._in_ten = in_ten
        self._drawn: list[Fault] = []
        self._lock = threading.Lock()

    def draw(self) -> Fault:
        with self._lock:
            if not self._drawn:
                bad = [Fault.AFTER if n % 2 else Fault.BEFORE for n in range(self._in_ten)]
                self._drawn = bad + [Fault.NONE] * (10 - self._in_ten)
                self._random.shuffle(self._drawn)
            return self._drawn.pop()
