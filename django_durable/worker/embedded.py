"""A worker inside the web process, for small sites: ``DURABLE["EMBEDDED_WORKER"]``."""

from __future__ import annotations

import atexit
import os
import threading

from django_durable.engine.operations import database_of
from django_durable.worker.loop import Worker

_lock = threading.Lock()
_running_in: int | None = None


def start_embedded_worker(**kwargs: object) -> None:
    """Start the worker at the process's first request: not at import, before a server's fork or in a command."""
    global _running_in
    if _running_in == os.getpid():
        return
    with _lock:
        if _running_in == os.getpid():
            return
        _running_in = os.getpid()
        worker = Worker(database_of(), grace=0)
        thread = threading.Thread(target=worker.run, name="durable-embedded", daemon=True)
        thread.start()

        def stop() -> None:
            worker.stop(at_once=True)
            thread.join(timeout=5)

        atexit.register(stop)
