"""The one event loop of this process for the async runs of its workers, and its thread."""

from __future__ import annotations

import asyncio
import logging
import os
import threading

logger = logging.getLogger("django_durable.run")


_loop: tuple[int, asyncio.AbstractEventLoop] | None = None
_lock = threading.Lock()


def event_loop() -> asyncio.AbstractEventLoop:
    """This process's loop for the async runs of its workers, started at the first one."""
    global _loop
    with _lock:
        # A forked child has the loop, and not its thread.
        if _loop is None or _loop[0] != os.getpid():
            loop = asyncio.new_event_loop()
            threading.Thread(target=_run_forever, args=[loop], name="durable-loop", daemon=True).start()
            _loop = os.getpid(), loop
        return _loop[1]


def _after_fork() -> None:
    # The lock may have been held by a thread that does not exist in the child.
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
        except BaseException:
            # SystemExit in a task of the user's leaves the loop. It is that run's end, and not all runs'.
            logger.exception("A task of an async workflow tried to end the process")
