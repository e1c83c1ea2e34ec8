"""What `durable_worker` does with its arguments: one process or several, signals, health, reloading."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from django_durable.worker.health import serve_health
from django_durable.worker.loop import Worker
from django_durable.worker.processes import Supervisor

logger = logging.getLogger("django_durable")

SAME_SIGNAL = 0.5  # seconds

_LEVELS = {0: logging.WARNING, 1: logging.INFO}


class Job(Protocol):
    """What runs until it is told to stop."""

    @property
    def ready(self) -> bool: ...

    def run(self) -> None: ...

    def stop(self, *, at_once: bool = False) -> None: ...


def run_worker(
    alias: str,
    *,
    queues: Sequence[str],
    concurrency: int,
    processes: int,
    burst: bool,
    autoreload: bool,
    health_port: int | None,
    grace: float,
    verbosity: int,
) -> None:
    """Run one worker here, or supervise several; return when it has ended."""
    log_to_stderr(verbosity)
    settings: dict[str, Any] = {"queues": tuple(queues), "concurrency": concurrency, "burst": burst, "grace": grace}

    def main() -> None:
        job: Job
        job = Worker(alias, **settings) if processes == 1 else Supervisor(alias, processes, verbosity, settings)
        with ExitStack() as stack:
            if health_port is not None:
                stack.enter_context(serve_health(health_port, lambda: job.ready))
            if autoreload:
                _run_until_reloaded(job)
            else:
                run_until_signalled(job)

    if autoreload:
        from django.utils.autoreload import run_with_reloader

        run_with_reloader(main)
    else:
        main()


def _run_until_reloaded(job: Job) -> None:
    """Run the job here; the reloader ends the process from its main thread, and what runs is handed back before."""
    ended = threading.Event()

    def finish() -> None:
        job.stop(at_once=True)
        ended.wait(timeout=5)

    atexit.register(finish)
    try:
        job.run()
    finally:
        ended.set()


def log_to_stderr(verbosity: int) -> None:
    """Show the package's log lines, unless the project has said where they go."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(_LEVELS.get(verbosity, logging.DEBUG))


def run_until_signalled(job: Job) -> None:
    """Run the job in a thread and wait here: the first SIGTERM or SIGINT lets it finish, the second does not."""
    received: list[tuple[float, int]] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            job.run()
        except BaseException as error:
            failure.append(error)

    def note(number: int, frame: object) -> None:
        # One that follows at once is the same wish, told twice: to the process and to its group.
        if not received or time.monotonic() - received[-1][0] > SAME_SIGNAL:
            received.append((time.monotonic(), number))

    # A handler runs between two instructions of this thread, so it may touch no lock: it notes the signal, and the
    # loop below acts.
    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=run, name="durable-worker")
    thread.daemon = True
    thread.start()
    acted = 0
    while thread.is_alive():
        thread.join(0.1)
        if len(received) > acted:
            job.stop(at_once=len(received) > 1)
            acted = len(received)
    if failure:
        raise failure[0]
    if acted > 1 or _threads_left():
        # A step that goes on in its thread would meet an interpreter that is being taken apart.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(128 + received[-1][1] if acted > 1 else 0)
    for number, handler in previous.items():
        signal.signal(number, handler)


def _threads_left() -> bool:
    return any(thread.name.startswith("durable-") and thread.is_alive() for thread in threading.enumerate())
