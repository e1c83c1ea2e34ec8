"""A worker inside the web process, for small sites: ``DURABLE["EMBEDDED_WORKER"]``."""

from __future__ import annotations

import atexit
import os
import threading

from django_durable.engine.starting import database_of
from django_durable.worker.loop import Worker

_lock = threading.Lock()
_running: tuple[int, Worker, threading.Thread] | None = None


def start_embedded_worker() -> None:
    """Start the worker at the process's first request: not at import, before a server's fork or in a command."""
    global _running
    if _running is not None and _running[0] == os.getpid():
        return
    with _lock:
        if _running is not None and _running[0] == os.getpid():
            return
        worker = Worker(database_of(), grace=0)
        thread = threading.Thread(target=worker.run, name="durable-embedded", daemon=True)
        _running = (os.getpid(), worker, thread)
        thread.start()
        atexit.register(stop_embedded_worker)


def stop_embedded_worker() -> None:
    """Hand back what it executes, and end it."""
    global _running
    with _lock:
        if _running is not None and _running[0] == os.getpid():
            _, worker, thread = _running
            worker.stop(at_once=True)
            thread.join(timeout=5)
        _running = None
