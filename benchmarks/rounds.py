"""Several ways of doing the same, timed in turns (A B C A B C ...), so that noise of the machine hits all alike."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack

from django.db import connections

# The length of one turn. Short beside the machine's moods, long beside one piece of work.
TURN = 0.05

# A side is entered once in each thread, so that it can have a connection of its own there; what it yields does one
# piece of work.
Side = Callable[[], AbstractContextManager[Callable[[], object]]]


def compare(sides: Mapping[str, Side], *, threads: int, seconds: float) -> dict[str, list[float]]:
    """Return for each side the pieces of work per second of each of its turns, summed over the threads.

    `seconds` is the time that each side gets.
    """
    turns = [name for _ in range(max(3, round(seconds / TURN))) for name in sides]
    barrier = threading.Barrier(threads)
    rates = [dict.fromkeys(range(len(turns)), 0.0) for _ in range(threads)]
    failures: list[BaseException] = []

    def work(own: dict[int, float]) -> None:
        try:
            with ExitStack() as stack:
                stack.callback(connections.close_all)
                pieces = {name: stack.enter_context(side()) for name, side in sides.items()}
                for piece in pieces.values():
                    for _ in range(5):
                        piece()
                for turn, name in enumerate(turns):
                    barrier.wait()
                    own[turn] = rate(pieces[name])
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    workers = [threading.Thread(target=work, args=(own,)) for own in rates]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise next((error for error in failures if not isinstance(error, threading.BrokenBarrierError)), failures[0])
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn, name in enumerate(turns):
        found[name].append(sum(own[turn] for own in rates))
    return found


def rate(piece: Callable[[], object]) -> float:
    """Pieces of work per second, over one turn."""
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < TURN:
        piece()
        count += 1
    return count / spent


def share(ours: list[float], floor: list[float]) -> float:
    """Our speed as a share of the floor's: the median over pairs of turns, which stood side by side."""
    return statistics.median(a / b for a, b in zip(ours, floor, strict=True))
